//! An accept() that is held: the agent accepts in the application's place. What it gets is either a leg of its own, by which it has
//! woken the application for a connection that is ready: then the ready socket is the answer. Or it is something else, which
//! is answered as it is.
//!
//! A ready connection is offered before its leg is connected, and whoever takes the offer back has the connection: the held
//! accept, which hands it over, or the connection's own task, which carries it through the leg.

use std::{
    collections::{HashMap, HashSet},
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use tokio::{io::Interest, net::TcpStream, sync::oneshot};

use super::{
    Direct, Why,
    filter::Filter,
    noted::Noted,
    parts,
    waiting::Waiter,
    watch::{self, Ends},
};
use crate::{
    keeper::Pending,
    proxy::{Context, account::Account, authorize::Permit, connections::lock, pod::Pod},
    sys::{
        netns::{NetnsCookie, socket_netns},
        options::{self, Purpose},
        process::Caller,
        seccomp::Answer,
        tcp_info::Opening,
    },
    words::with_causes,
};

/// A connection of a pod. Another pod may have an address like its own, and clients like its clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    netns: NetnsCookie,
    /// As the application sees it.
    client: SocketAddr,
    local: SocketAddr,
}

#[derive(Default)]
pub(super) struct Server {
    offers: Mutex<HashMap<Key, Offer>>,
    /// How many held accepts are being carried out in a pod: what has left a listener's queue may be on its way to them.
    taking: Mutex<HashMap<NetnsCookie, usize>>,
    /// Ports at which connections are accepted without accept() being held.
    unheard: Mutex<HashSet<(NetnsCookie, u16)>>,
}

impl Server {
    fn claim(&self, key: Key) -> Option<Offer> {
        lock(&self.offers).remove(&key)
    }

    /// A pod is served no more.
    pub fn forget(&self, netns: NetnsCookie) {
        lock(&self.unheard).retain(|(at, _)| *at != netns);
    }

    pub fn heard(&self, netns: NetnsCookie, port: u16) -> bool {
        !lock(&self.unheard).contains(&(netns, port))
    }
}

impl Direct {
    /// Of a pod that is served: what is noted of it goes with its end.
    fn not_heard(&self, Key { netns, local, .. }: Key) {
        let pods = lock(&self.pods);
        if pods.contains_key(&netns) {
            lock(&self.server.unheard).insert((netns, local.port()));
        }
    }
}

struct Offer {
    sender: oneshot::Sender<Handover>,
    /// The family of the ready socket.
    v6: bool,
}

/// What accept() asked for.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub fd: i32,
    pub address: u64,
    pub length: u64,
    pub flags: i32,
}

/// A ready connection that an accept() may take.
pub(in crate::proxy) struct Offered {
    pod: Arc<Pod>,
    listed: Listed,
    noted: Noted,
    taken: oneshot::Receiver<Handover>,
}

/// That it stands among the offers, until it is claimed or this is dropped.
struct Listed {
    ctx: Arc<Context>,
    key: Key,
}

impl Drop for Listed {
    fn drop(&mut self) {
        if let Some(direct) = &self.ctx.direct {
            lock(&direct.server.offers).remove(&self.key);
        }
    }
}

/// An accept() that waits for the connection that it has taken.
pub(in crate::proxy) struct Handover {
    filter: Arc<Filter>,
    call: Pending,
    caller: Caller,
    wanted: Wanted,
    /// What the kernel's own accept would have given: it has all that a socket inherits from its listener.
    template: OwnedFd,
    v6: bool,
}

/// When to look whether the leg was accepted without the agent's hearing of it.
const LOOKS: [Duration; 5] = [
    Duration::from_millis(3),
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(250),
    Duration::from_secs(1),
];

impl Offered {
    /// `handshake` is what it took on the wire, sent and received.
    pub fn new(
        ctx: &Arc<Context>,
        pod: &Arc<Pod>,
        client: SocketAddr,
        wire: &TcpStream,
        account: &Account,
        (sent, received): (u64, u64),
    ) -> Result<Self, Why> {
        let gone = |error: io::Error| {
            tracing::debug!(%error, "a connection cannot be offered");
            Why::Agent
        };
        let (local, cookie) = (wire.local_addr().map_err(gone)?, options::cookie(wire).map_err(gone)?);
        let v6 = local.is_ipv6();
        let direct = ctx.direct.as_ref().ok_or(Why::Agent)?;
        let (client, local) = (parts::canonical(client), parts::canonical(local));
        let key = Key { netns: pod.netns.cookie(), client, local };
        let ends = Ends { cookie, local, remote: client, opening: Opening::Passive, sent, received };
        let noted = Noted::new(ctx, pod, account, ends).map_err(|error| {
            tracing::warn!("a direct connection cannot be followed: {}", with_causes(&error));
            Why::Agent
        })?;
        let (sender, taken) = oneshot::channel();
        lock(&direct.server.offers).insert(key, Offer { sender, v6 });
        Ok(Self { pod: pod.clone(), listed: Listed { ctx: ctx.clone(), key }, noted, taken })
    }

    /// Waits until an accept() takes it, or until it is known that none will: then the connection is the caller's again, and goes
    /// through the leg.
    pub async fn wait(&mut self, leg: &TcpStream, permit: &mut Permit) -> Result<Handover, Why> {
        let mut looks = LOOKS.iter();
        let why = loop {
            let (pause, last) = looks.next().map_or((LOOKS[LOOKS.len() - 1], true), |pause| (*pause, false));
            tokio::select! {
                biased;
                taken = &mut self.taken => return taken.map_err(|_| Why::AddressFamily),
                // The application has spoken, or closed: it has the leg.
                _ = leg.ready(Interest::READABLE | Interest::ERROR) => break Why::NotNotified,
                _ = permit.revoked.wait_for(Option::is_some) => break Why::Policy,
                () = tokio::time::sleep(pause) => {}
            }
            if self.was_accepted(leg, last).await {
                break Why::NotNotified;
            }
        };
        let Some(direct) = &self.listed.ctx.direct else { return Err(why) };
        if direct.server.claim(self.listed.key).is_some() {
            if why == Why::NotNotified {
                direct.not_heard(self.listed.key);
            }
            return Err(why);
        }
        // An accept() was quicker.
        (&mut self.taken).await.map_err(|_| Why::AddressFamily)
    }

    fn taking(&self) -> bool {
        let direct = self.listed.ctx.direct.as_ref();
        direct.is_some_and(|direct| lock(&direct.server.taking).contains_key(&self.listed.key.netns))
    }

    /// Whether somebody else than the agent has accepted the leg: a socket in a listener's queue has no inode yet. One that a held
    /// accept is about to claim is not told apart, so it is looked at again later, but not for ever.
    async fn was_accepted(&self, leg: &TcpStream, last: bool) -> bool {
        let Ok(source) = leg.local_addr() else { return true };
        watch::accepted(&self.pod, self.listed.key.local, source).await && (last || !self.taking())
    }
}

/// What becomes of a connection that is handed over.
pub(in crate::proxy) struct Ready {
    pub wire: TcpStream,
    pub records: &'static str,
    pub account: Account,
    pub permit: Permit,
}

impl Offered {
    /// Answers the accept() with the connection.
    pub fn give(self, handover: Handover, ready: Ready) {
        let home = handover.filter.home.clone();
        home.spawn(async move {
            let pod = self.pod.clone();
            if let Err(error) = self.try_give(handover, ready) {
                tracing::warn!(pod = %pod.netns.path().display(), "a connection could not be handed over: {error}");
            }
        });
    }

    fn try_give(self, mut handover: Handover, ready: Ready) -> io::Result<()> {
        let Self { noted, listed, .. } = self;
        // Leaves the runtime's list, which would otherwise watch the application's socket.
        let wire = ready.wire.into_std()?;
        options::copy(&handover.template, &wire)?;
        noted
            .hand_over(ready.account, ready.permit, ready.records)
            .map_err(|error| io::Error::other(with_causes(&error)))?;
        let Handover { call, caller, wanted, v6, .. } = &mut handover;
        if !hand(call, caller, *wanted, wire.into(), Some(listed.key.client), *v6)? {
            tracing::debug!("the caller of an accept was gone");
        }
        Ok(())
    }
}

pub(super) fn accept(filter: &Arc<Filter>, call: Pending, wanted: Wanted) {
    let Some(direct) = &filter.ctx.direct else { return };
    let Some((caller, listener)) = listener(&call, wanted) else {
        let _ = call.answer(Answer::Continue);
        return;
    };
    let netns = socket_netns(listener.as_fd()).ok().inspect(|netns| filter.at(*netns));
    let Some(netns) = netns.filter(|netns| direct.pod(*netns).is_some()) else {
        let _ = call.answer(Answer::Continue);
        return;
    };
    // The kernel has the words for what it would not accept.
    if options::unsuited(&listener, Purpose::Accept).is_some()
        || wanted.flags & !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) != 0
    {
        let _ = call.answer(Answer::Continue);
        return;
    }
    note(&filter.ctx, netns, &listener);
    let limit = options::receive_timeout(&listener).ok().flatten();
    let deadline = limit.map(|limit| Instant::now() + limit);
    let waiter = Box::new(Waiter { call, caller, wanted, deadline });
    match options::blocks(&listener) {
        Ok(true) => filter.waiting.enter(filter, waiter, &listener),
        _ => {
            if let Err(waiter) = take(filter, waiter, &listener) {
                let _ = waiter.call.answer(Answer::Errno(libc::EAGAIN));
            }
        }
    }
}

/// A listen(): what its connections must be is known before the first one comes.
pub(super) fn listens(filter: &Filter, call: Pending, fd: i32) {
    let wanted = Wanted { fd, address: 0, length: 0, flags: 0 };
    if let Some((_, listener)) = listener(&call, wanted)
        && let Ok(netns) = socket_netns(listener.as_fd()).inspect(|netns| filter.at(*netns))
        && socket2::SockRef::from(&listener).protocol().is_ok_and(|protocol| protocol == Some(socket2::Protocol::TCP))
    {
        note(&filter.ctx, netns, &listener);
    }
    let _ = call.answer(Answer::Continue);
}

/// The caller and a duplicate of its listener; `None` if it is gone or that is nothing to accept from.
pub(super) fn listener(call: &Pending, wanted: Wanted) -> Option<(Caller, OwnedFd)> {
    let caller = Caller::of(call.notification.tid).ok()?;
    let listener = caller.descriptor(wanted.fd).ok()?;
    call.valid().then_some((caller, listener))
}

/// What accept() on a port tells: that it is heard of, and which family the application expects of IPv4 clients.
fn note(ctx: &Context, netns: NetnsCookie, listener: &OwnedFd) {
    let (Some(direct), Some(Some(local))) =
        (&ctx.direct, socket2::SockRef::from(listener).local_addr().ok().map(|address| address.as_socket()))
    else {
        return;
    };
    lock(&direct.server.unheard).remove(&(netns, local.port()));
    let dual = local.is_ipv6() && !socket2::SockRef::from(listener).only_v6().unwrap_or(true);
    tracing::debug!(%local, dual, "a listener");
    let (true, Some(pod)) = (local.is_ipv4() || dual, direct.pod(netns)) else { return };
    if lock(&pod.mapped).insert(local.port(), dual) != Some(dual)
        && let Err(error) = ctx.capture.map_clients(netns, local.port(), dual)
    {
        tracing::warn!("the family of a listener cannot be noted: {}", with_causes(&error));
    }
}

/// An accept that is being carried out, up to its claim.
struct Taking<'a>(&'a Server, NetnsCookie);

impl<'a> Taking<'a> {
    fn begin(server: &'a Server, netns: NetnsCookie) -> Self {
        *lock(&server.taking).entry(netns).or_default() += 1;
        Self(server, netns)
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        let mut taking = lock(&self.0.taking);
        if let Some(count) = taking.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                taking.remove(&self.1);
            }
        }
    }
}

/// Accepts and answers; the waiter comes back if nobody has connected.
pub(super) fn take(filter: &Arc<Filter>, mut waiter: Box<Waiter>, listener: &OwnedFd) -> Result<(), Box<Waiter>> {
    let Some(direct) = &filter.ctx.direct else { return Ok(()) };
    let Ok(netns) = socket_netns(listener.as_fd()) else { return Err(waiter) };
    let taking = Taking::begin(&direct.server, netns);
    let (socket, client) = match options::accept_now(listener) {
        Ok(accepted) => accepted,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(waiter),
        // The agent's own want is not the application's.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EMFILE | libc::ENFILE)) => {
            let _ = waiter.call.answer(Answer::Continue);
            return Ok(());
        }
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::ECONNABORTED);
            let _ = waiter.call.answer(Answer::Errno(errno));
            return Ok(());
        }
    };
    let v6 = socket2::SockRef::from(&socket).domain().is_ok_and(|domain| domain == socket2::Domain::IPV6);
    let local = socket2::SockRef::from(&socket).local_addr().ok().and_then(|address| address.as_socket());
    let key = client.zip(local).map(|(client, local)| Key {
        netns,
        client: parts::canonical(client),
        local: parts::canonical(local),
    });
    let claimed = key.and_then(|key| direct.server.claim(key));
    drop(taking);
    if let Some(offer) = claimed {
        // An application that listens for IPv6 must not be given an IPv4 socket; the next one will be fit.
        if v6 == offer.v6 {
            let Waiter { call, caller, wanted, .. } = *waiter;
            let handover = Handover { filter: filter.clone(), call, caller, wanted, template: socket, v6 };
            if offer.sender.send(handover).is_err() {
                tracing::debug!("a ready connection was gone when it was accepted");
            }
            return Ok(());
        }
        tracing::debug!(ready = offer.v6, wanted = v6, "a ready socket is of the wrong family");
        drop(offer);
    }
    let Waiter { call, caller, wanted, .. } = &mut *waiter;
    if let Err(error) = hand(call, caller, *wanted, socket, client, v6) {
        tracing::warn!(%error, "an accepted connection could not be given to its application");
    }
    Ok(())
}

/// Puts the socket among the caller's descriptors, as accept4() would. Whom it cannot be given to has lost it: its client must not
/// take that for an end in good order.
fn hand(
    call: &mut Pending,
    caller: &Caller,
    wanted: Wanted,
    socket: OwnedFd,
    client: Option<SocketAddr>,
    v6: bool,
) -> io::Result<bool> {
    let given = put(call, caller, wanted, &socket, client, v6);
    if !matches!(given, Ok(true)) {
        let _ = socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO));
    }
    given
}

fn put(
    call: &mut Pending,
    caller: &Caller,
    wanted: Wanted,
    socket: &OwnedFd,
    client: Option<SocketAddr>,
    v6: bool,
) -> io::Result<bool> {
    socket2::SockRef::from(socket).set_nonblocking(wanted.flags & libc::SOCK_NONBLOCK != 0)?;
    if !call.valid() {
        return Ok(false);
    }
    if let (Some(client), true) = (client, wanted.address != 0) {
        let bytes = parts::write(client, v6);
        let room = caller.read(wanted.length, 4)?;
        let room = room.first_chunk().map_or(0, |room| i32::from_ne_bytes(*room));
        let room = usize::try_from(room).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))?;
        caller.write(wanted.address, &bytes[..room.min(bytes.len())])?;
        caller.write(wanted.length, &u32::try_from(bytes.len()).unwrap_or(0).to_ne_bytes())?;
    }
    call.give(socket.as_fd(), wanted.flags & libc::SOCK_CLOEXEC != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ports_that_are_not_heard_of_are_forgotten_with_their_pod() {
        let server = Server::default();
        let (here, there) = (NetnsCookie(1), NetnsCookie(2));
        lock(&server.unheard).extend([(here, 80), (here, 81), (there, 80)]);
        assert!(!server.heard(here, 80) && server.heard(here, 82));
        server.forget(here);
        assert!(server.heard(here, 80) && !server.heard(there, 80));
        assert_eq!(lock(&server.unheard).len(), 1);
    }
}
