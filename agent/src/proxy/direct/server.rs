//! An accept() that is held: the agent accepts in the application's place. What it gets is either a leg of its own, by which it has
//! woken the application for a connection that is ready: then the ready socket is the answer. Or it is something else, which
//! is answered as it is.
//!
//! A ready connection is offered before its leg is connected, and whoever takes the offer back has the connection: the held
//! accept, which hands it over, or the connection's own task, which carries it through the leg.

use std::{
    collections::HashMap,
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{io::Interest, net::TcpStream, sync::oneshot};

use super::{
    Why, parts,
    waiting::{Waiter, Waiting},
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

/// The client as the application sees it, and the pod's end.
type Key = (SocketAddr, SocketAddr);

pub(super) struct Server {
    offers: Mutex<HashMap<Key, Offer>>,
    pub waiting: Waiting,
    /// How many held accepts are being carried out: what has left a listener's queue may be on its way to them.
    taking: AtomicUsize,
    /// Ports at which connections are accepted without accept() being held.
    unheard: Mutex<HashMap<(NetnsCookie, u16), ()>>,
}

impl Server {
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            offers: Mutex::default(),
            waiting: Waiting::new()?,
            taking: AtomicUsize::new(0),
            unheard: Mutex::default(),
        })
    }

    fn claim(&self, key: Key) -> Option<Offer> {
        lock(&self.offers).remove(&key)
    }

    pub fn heard(&self, netns: NetnsCookie, port: u16) -> bool {
        !lock(&self.unheard).contains_key(&(netns, port))
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
    ctx: Arc<Context>,
    pod: Arc<Pod>,
    key: Key,
    taken: oneshot::Receiver<Handover>,
}

/// An accept() that waits for the connection that it has taken.
pub(in crate::proxy) struct Handover {
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
    pub fn new(ctx: &Arc<Context>, pod: &Arc<Pod>, client: SocketAddr, wire: &TcpStream) -> Option<Self> {
        let local = wire.local_addr().ok()?;
        let direct = ctx.direct.as_ref()?;
        let key = (parts::canonical(client), parts::canonical(local));
        let (sender, taken) = oneshot::channel();
        lock(&direct.server.offers).insert(key, Offer { sender, v6: local.is_ipv6() });
        Some(Self { ctx: ctx.clone(), pod: pod.clone(), key, taken })
    }

    /// Waits until an accept() takes it, or until it is known that none will: then the connection is the caller's again, and goes
    /// through the leg.
    pub async fn wait(&mut self, leg: &TcpStream, permit: &mut Permit) -> Result<Handover, Why> {
        let mut looks = LOOKS.iter().chain(std::iter::repeat(&LOOKS[LOOKS.len() - 1]));
        let why = loop {
            let pause = looks.next().copied().unwrap_or(LOOKS[LOOKS.len() - 1]);
            tokio::select! {
                biased;
                taken = &mut self.taken => return taken.map_err(|_| Why::AddressFamily),
                // The application has spoken, or closed: it has the leg.
                _ = leg.ready(Interest::READABLE | Interest::ERROR) => break Why::NotNotified,
                _ = permit.revoked.wait_for(Option::is_some) => break Why::Policy,
                () = tokio::time::sleep(pause) => if self.was_accepted(leg) { break Why::NotNotified },
            }
        };
        let Some(direct) = &self.ctx.direct else { return Err(why) };
        if direct.server.claim(self.key).is_some() {
            if why == Why::NotNotified {
                lock(&direct.server.unheard).insert((self.pod.netns.cookie(), self.key.1.port()), ());
            }
            return Err(why);
        }
        // An accept() was quicker.
        (&mut self.taken).await.map_err(|_| Why::AddressFamily)
    }

    /// Whether somebody else than the agent has accepted the leg: a socket in a listener's queue has no inode yet. One that a held
    /// accept is about to claim is not told apart, so it is looked at again later.
    fn was_accepted(&self, leg: &TcpStream) -> bool {
        let Ok(source) = leg.local_addr() else { return true };
        watch::accepted(&self.pod, self.key.1, source)
            && self.ctx.direct.as_ref().is_none_or(|direct| direct.server.taking.load(Ordering::SeqCst) == 0)
    }
}

impl Drop for Offered {
    fn drop(&mut self) {
        if let Some(direct) = &self.ctx.direct {
            lock(&direct.server.offers).remove(&self.key);
        }
    }
}

/// What becomes of a connection that is handed over.
pub(in crate::proxy) struct Ready {
    pub wire: TcpStream,
    pub records: &'static str,
    /// Of the handshake.
    pub sent: u64,
    pub received: u64,
}

impl Handover {
    /// Answers the accept() with the connection.
    pub fn give(self, ctx: &Arc<Context>, pod: &Arc<Pod>, ready: Ready, account: Account, permit: Permit, key: Key) {
        if let Err(error) = self.try_give(ctx, pod, ready, account, permit, key) {
            tracing::warn!(pod = %pod.netns.path().display(), "a connection could not be handed over: {error}");
        }
    }

    fn try_give(
        mut self,
        ctx: &Arc<Context>,
        pod: &Arc<Pod>,
        ready: Ready,
        account: Account,
        permit: Permit,
        (client, local): Key,
    ) -> io::Result<()> {
        let Ready { wire, records, sent, received } = ready;
        let ends = Ends {
            cookie: options::cookie(&wire)?,
            local: parts::canonical(local),
            remote: parts::canonical(client),
            opening: Opening::Passive,
            sent,
            received,
        };
        // Leaves the runtime's list, which would otherwise watch the application's socket.
        let wire = wire.into_std()?;
        options::copy(&self.template, &wire)?;
        watch::established(ctx, pod, account, permit, ends, records)
            .map_err(|error| io::Error::other(with_causes(&*error)))?;
        let given = hand(&mut self.call, &self.caller, self.wanted, wire.into(), Some(client), self.v6)?;
        if !given {
            tracing::debug!("the caller of an accept was gone");
        }
        Ok(())
    }
}

pub(super) async fn accept(ctx: &Arc<Context>, call: Pending, wanted: Wanted) {
    let Some(direct) = &ctx.direct else { return };
    let Some((caller, listener)) = listener(&call, wanted) else {
        let _ = call.answer(Answer::Continue);
        return;
    };
    let netns = socket_netns(listener.as_fd()).ok();
    if options::unsuited(&listener, Purpose::Accept).is_some() || netns.is_none_or(|netns| direct.pod(netns).is_none())
    {
        let _ = call.answer(Answer::Continue);
        return;
    }
    if let Some(netns) = netns {
        note(ctx, netns, &listener);
    }
    // The kernel has the words for what it would not accept.
    if wanted.flags & !(libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) != 0 {
        let _ = call.answer(Answer::Continue);
        return;
    }
    let limit = options::receive_timeout(&listener).ok().flatten();
    let deadline = limit.map(|limit| Instant::now() + limit);
    let waiter = Box::new(Waiter { call, caller, wanted, deadline });
    match options::blocks(&listener) {
        Ok(true) => direct.server.waiting.enter(ctx, waiter, &listener),
        _ => {
            if let Err(waiter) = take(ctx, waiter, &listener) {
                let _ = waiter.call.answer(Answer::Errno(libc::EAGAIN));
            }
        }
    }
}

/// A listen(): what its connections must be is known before the first one comes.
pub(super) fn listens(ctx: &Arc<Context>, call: Pending, fd: i32) {
    let wanted = Wanted { fd, address: 0, length: 0, flags: 0 };
    if let Some((_, listener)) = listener(&call, wanted)
        && let Ok(netns) = socket_netns(listener.as_fd())
        && socket2::SockRef::from(&listener).protocol().is_ok_and(|protocol| protocol == Some(socket2::Protocol::TCP))
    {
        note(ctx, netns, &listener);
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
struct Taking<'a>(&'a AtomicUsize);

impl<'a> Taking<'a> {
    fn begin(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::SeqCst);
        Self(count)
    }
}

impl Drop for Taking<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Accepts and answers; the waiter comes back if nobody has connected.
pub(super) fn take(ctx: &Arc<Context>, mut waiter: Box<Waiter>, listener: &OwnedFd) -> Result<(), Box<Waiter>> {
    let Some(direct) = &ctx.direct else { return Ok(()) };
    let taking = Taking::begin(&direct.server.taking);
    let (socket, client) = match options::accept_now(listener) {
        Ok(accepted) => accepted,
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Err(waiter),
        Err(error) => {
            let errno = error.raw_os_error().unwrap_or(libc::ECONNABORTED);
            let _ = waiter.call.answer(Answer::Errno(errno));
            return Ok(());
        }
    };
    let v6 = socket2::SockRef::from(&socket).domain().is_ok_and(|domain| domain == socket2::Domain::IPV6);
    let local = socket2::SockRef::from(&socket).local_addr().ok().and_then(|address| address.as_socket());
    let key = client.zip(local).map(|(client, local)| (parts::canonical(client), parts::canonical(local)));
    let claimed = key.and_then(|key| direct.server.claim(key));
    drop(taking);
    if let Some(offer) = claimed {
        // An application that listens for IPv6 must not be given an IPv4 socket; the next one will be fit.
        if v6 == offer.v6 {
            let Waiter { call, caller, wanted, .. } = *waiter;
            if offer.sender.send(Handover { call, caller, wanted, template: socket, v6 }).is_err() {
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

/// Puts the socket among the caller's descriptors, as accept4() would.
fn hand(
    call: &mut Pending,
    caller: &Caller,
    wanted: Wanted,
    socket: OwnedFd,
    client: Option<SocketAddr>,
    v6: bool,
) -> io::Result<bool> {
    socket2::SockRef::from(&socket).set_nonblocking(wanted.flags & libc::SOCK_NONBLOCK != 0)?;
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
