//! A connect() that is held: the agent connects the application's own socket, does the handshake on it, gives the records to
//! the kernel and lets go. Whatever speaks against it before that leaves the call to the kernel, which redirects it as ever. Once
//! records are on the socket nothing can be undone: what fails then ends it.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use tokio::time::{Instant, timeout};

use super::{
    Direct, Why,
    filter::Filter,
    noted::Noted,
    parts,
    socket::Borrowed,
    watch::{self, Ends},
};
use crate::{
    keeper::Pending,
    proxy::{
        Context,
        account::Account,
        authorize::{self, Permit, Way},
        handshake, identify,
        offload::{self, OffloadError, RecordsChoice},
        pod::Pod,
        refusal::Refusal,
        target::Target,
    },
    state::Snapshot,
    sys::{
        netns::{NetnsCookie, socket_netns},
        options::{self, Purpose},
        process::{Caller, peek},
        seccomp::Answer,
        tcp_info::Opening,
    },
    tls::{
        config::{self, DIRECT, Offer},
        ktls::KtlsError,
    },
    words::{Direction, Mode, with_causes},
};

/// How soon a signal is noticed.
const LOOK: Duration = Duration::from_millis(50);
/// How long a connect() of a pod waits that this agent, new, may be about to serve.
const SETTLING: Duration = Duration::from_secs(10);

/// How it ended for the application.
enum Outcome {
    Connected,
    /// connect() fails with this.
    Failed(i32),
    Left(Why),
}

pub(super) async fn connect(filter: &Filter, mut call: Pending, fd: i32, address: u64, length: u32) {
    let Some(direct) = &filter.ctx.direct else { return };
    let answer = match attempt(filter, direct, &mut call, fd, address, length).await {
        None => Answer::Continue,
        Some((cookie, Outcome::Left(why))) => {
            direct.leave(cookie, why);
            Answer::Continue
        }
        Some((_, Outcome::Failed(errno))) => Answer::Errno(errno),
        Some((_, Outcome::Connected)) => Answer::Value(0),
    };
    if let Err(error) = call.answer(answer) {
        tracing::error!(%error, "a held connect could not be answered");
    }
}

/// `None` is not the mesh's: another family, a destination inside the pod, a pod that is not served, a caller that is gone.
async fn attempt(
    filter: &Filter,
    direct: &Direct,
    call: &mut Pending,
    fd: i32,
    address: u64,
    length: u32,
) -> Option<(u64, Outcome)> {
    let tid = call.notification.tid;
    let mut bytes = [0; parts::LONGEST];
    let room = bytes.len().min(length as usize);
    let read = peek(tid, address, &mut bytes[..room]).ok()?;
    let asked = parts::read(&bytes[..read])?;
    let caller = Caller::of(tid).ok()?;
    let socket = caller.descriptor(fd).ok()?;
    if !call.valid() {
        return None;
    }
    let netns = socket_netns(socket.as_fd()).ok()?;
    filter.at(netns);
    let pod = direct.pod_soon(&filter.ctx, netns).await?;
    // Who was waited for may be gone, or wanted elsewhere.
    if !call.valid() {
        return None;
    }
    let unsuited = options::unsuited(&socket, Purpose::Connect);
    if matches!(unsuited, Some("not an internet socket" | "not TCP" | "not unconnected")) {
        return None;
    }
    // The kernel has the words for an address of another family than the socket's.
    let domain = socket2::SockRef::from(&socket).domain().ok()?;
    if (domain == socket2::Domain::IPV6) != asked.is_ipv6() {
        return None;
    }
    let destination = parts::canonical(asked);
    let ip = destination.ip();
    if ip.is_loopback() || ip.is_unspecified() || pod.workload.addresses.contains(&ip) {
        return None;
    }
    let cookie = options::cookie(&socket).ok()?;
    if unsuited.is_some() {
        return Some((cookie, Outcome::Left(Why::SocketOption)));
    }
    if !direct.usable || !direct.watch.follows(pod.netns.cookie()) {
        return Some((cookie, Outcome::Left(Why::Kernel)));
    }
    let try_ = Try { ctx: &filter.ctx, direct, pod, caller, asked, destination, cookie };
    let outcome = try_.run(call, socket).await;
    Some((cookie, outcome))
}

impl Direct {
    /// The pod; of an agent that has just begun it may be about to come.
    async fn pod_soon(&self, ctx: &Context, netns: NetnsCookie) -> Option<Arc<Pod>> {
        let mut changes = ctx.pods_changed.subscribe();
        let end = Instant::now() + SETTLING;
        loop {
            let settled = self.settled.load(Ordering::SeqCst);
            if let Some(pod) = self.pod(netns) {
                return Some(pod);
            }
            if settled || !matches!(tokio::time::timeout_at(end, changes.changed()).await, Ok(Ok(()))) {
                return None;
            }
        }
    }
}

struct Try<'a> {
    ctx: &'a Arc<Context>,
    direct: &'a Direct,
    pod: Arc<Pod>,
    caller: Caller,
    asked: SocketAddr,
    destination: SocketAddr,
    cookie: u64,
}

/// One place that the connection can go to.
struct To<'a> {
    target: &'a Target,
    /// Its address as the socket's family has it.
    asked: SocketAddr,
    /// When the caller has waited long enough.
    until: Instant,
    /// There is no other.
    last: bool,
}

enum Aimed {
    Done(Outcome),
    /// Nobody takes it there, and the socket is as it was.
    Elsewhere(OwnedFd),
}

/// Why an attempt on the socket went no further.
enum Stop {
    /// The proxied path is taken.
    Left(Why),
    /// The connection itself failed: the application hears of it.
    Refused(Refusal),
}

impl From<Refusal> for Stop {
    fn from(refusal: Refusal) -> Self {
        Self::Refused(refusal)
    }
}

impl Try<'_> {
    /// Tries the places that the connection can go to, until one of them takes it or there is another reason to stop.
    async fn run(&self, call: &mut Pending, mut socket: OwnedFd) -> Outcome {
        let ctx = self.ctx;
        let Ok(_turn) = self.pod.outbound.clone().try_acquire_owned() else { return Outcome::Left(Why::Busy) };
        let snapshot = ctx.state.load();
        // The proxied path says what is the matter.
        let Ok(targets) = ctx.loads.targets(&snapshot, &self.pod, self.destination) else {
            return Outcome::Left(Why::Policy);
        };
        let last = targets.len() - 1;
        let Ok(until) = self.deadline(&socket) else { return Outcome::Left(Why::Agent) };
        for (number, target) in targets.iter().enumerate() {
            let mut account = Account::attempt(ctx, Direction::Outbound);
            account.aims_at(ctx, target);
            let Some(asked) = parts::like(self.asked, target.address) else {
                return Outcome::Left(Why::AddressFamily);
            };
            if let Some(why) = self.direct.avoided(target.address) {
                return Outcome::Left(why);
            }
            let to = To { target, asked, until, last: number == last };
            match self.aim(call, socket, &to, account, &snapshot).await {
                Aimed::Elsewhere(back) => socket = back,
                Aimed::Done(outcome) => return outcome,
            }
        }
        Outcome::Left(Why::Agent)
    }

    async fn aim(
        &self,
        call: &mut Pending,
        socket: OwnedFd,
        to: &To<'_>,
        account: Account,
        snapshot: &Snapshot,
    ) -> Aimed {
        let left = |why| Aimed::Done(Outcome::Left(why));
        let (ctx, target) = (self.ctx, to.target);
        let (permit, expect) = match authorize::towards(snapshot, target, &account.live) {
            Err(_) => return left(Why::Policy),
            Ok(Way::Plaintext { .. }) => return left(Why::Plaintext),
            Ok(Way::Mtls { permit, expect }) => (permit, expect),
        };
        let gate = match ctx.capture.direct(socket.as_fd(), target.address, self.destination) {
            Ok(gate) => gate,
            Err(error) => {
                tracing::debug!("a socket cannot be gated: {}", with_causes(&error));
                return left(Why::Agent);
            }
        };
        call.begin();
        let mut borrowed = match Borrowed::new(socket, gate) {
            Ok(borrowed) => borrowed,
            Err(error) => {
                tracing::warn!(%error, "a socket cannot be watched");
                return Aimed::Done(Outcome::Failed(libc::ENOBUFS));
            }
        };
        let made = tokio::select! {
            made = self.establish(&mut borrowed, &account, &expect, to) => made,
            () = tokio::time::sleep_until(to.until) => Err(Stop::Left(Why::TooSlow)),
            () = self.interrupted() => Err(Stop::Left(Why::Caller)),
        };
        let stop = match made {
            Ok(made) => return Aimed::Done(self.hand_over(borrowed, made, account, permit)),
            Err(stop) => stop,
        };
        let poisoned = borrowed.gate().poisoned().unwrap_or(true);
        let ends = self.ends(&borrowed, target.address, 0);
        let undone = self.undo(borrowed, &ends);
        match stop {
            Stop::Refused(refusal) => {
                if matches!(refusal, Refusal::Refused(_) | Refusal::Unreachable(_)) {
                    ctx.loads.refused(target);
                    if let (Some(socket), false) = (undone, to.last) {
                        return Aimed::Elsewhere(socket);
                    }
                }
                account.live.learn(|facts| facts.source = identify::of(Some(&self.pod.workload), ends.local));
                let (errno, mut account) = (errno(&refusal), account);
                account.count();
                account.refused(refusal.reason(), &refusal);
                Aimed::Done(Outcome::Failed(errno))
            }
            Stop::Left(why) => {
                if matches!(why, Why::TooSlow | Why::PeerNotReady | Why::Agent) {
                    self.direct.avoid(target.address, why);
                }
                match undone {
                    Some(_) => left(if poisoned { Why::Interference } else { why }),
                    None => Aimed::Done(Outcome::Failed(libc::ECONNREFUSED)),
                }
            }
        }
    }

    /// A blocking connect() waits for as long as it would for the kernel, but no longer than the application has said.
    fn deadline(&self, socket: &OwnedFd) -> io::Result<Instant> {
        let settings = &self.ctx.settings;
        let limit = if options::blocks(socket)? {
            let longest = settings.connect + settings.handshake;
            socket2::SockRef::from(socket).write_timeout()?.map_or(longest, |timeout| timeout.min(longest))
        } else {
            self.direct.settings.hold
        };
        Ok(Instant::now() + limit)
    }

    /// A held call does not hear of signals: once one is coming, the call is the kernel's, which interrupts it.
    async fn interrupted(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            if self.caller.interrupted().unwrap_or(true) {
                return;
            }
        }
    }

    /// The application may connect the socket again, if it can be disconnected; with records on it, it is ended.
    fn undo(&self, borrowed: Borrowed, ends: &Ends) -> Option<OwnedFd> {
        let (socket, gate) = borrowed.into_parts();
        match options::disconnect(&socket) {
            Ok(()) => {
                drop(gate);
                Some(socket)
            }
            Err(error) => {
                tracing::warn!(%error, destination = %ends.remote, "a socket cannot be disconnected: its connect fails");
                self.end(ends);
                None
            }
        }
    }

    /// What went wrong may go wrong again, so the next connect is left to the kernel.
    fn end(&self, ends: &Ends) {
        self.direct.avoid(ends.remote, Why::Agent);
        watch::destroy(&self.pod, ends);
    }

    async fn establish(
        &self,
        socket: &mut Borrowed,
        account: &Account,
        expect: &[crate::identity::SpiffeId],
        to: &To<'_>,
    ) -> Result<Made, Stop> {
        let ctx = self.ctx;
        let since = std::time::Instant::now();
        timeout(to.target.traffic.connect_timeout.unwrap_or(ctx.settings.connect), socket.connect(to.asked))
            .await
            .unwrap_or(Err(io::ErrorKind::TimedOut.into()))
            .map_err(Refusal::connecting)?;
        let svid = ctx.svid(&self.pod.workload.id)?;
        let (parameters, trust) = (ctx.parameters(Direction::Outbound, to.target.address), ctx.identities.trust());
        let learned = config::Learned::default();
        let config = config::client_config_with(parameters, &svid, trust, expect, Offer::Direct, learned.clone())
            .map_err(Refusal::from)?;
        let name = config::server_name(to.target.port, to.target.host());
        let result = handshake::connect(socket, config, name, ctx.settings.handshake).await;
        if result.as_ref().is_err_and(handshake::not_agreed) {
            return Err(Stop::Left(Why::PeerNotReady));
        }
        let secured = ctx.handshaken(account, Direction::Outbound, since, &learned, result)?;
        // A server that knows nothing of ALPN does not refuse what it is offered: it will send what no application could read.
        if secured.alpn.as_deref() != Some(DIRECT) {
            return Err(Stop::Left(Why::PeerNotReady));
        }
        if socket.gate().poisoned().unwrap_or(true) {
            return Err(Stop::Left(Why::Interference));
        }
        let ends = self.ends(socket, to.target.address, secured.received);
        account.live.learn(|facts| facts.source = identify::of(Some(&self.pod.workload), ends.local));
        let noted = Noted::new(ctx, &self.pod, account, ends).map_err(|error| {
            tracing::warn!("a direct connection cannot be followed: {}", with_causes(&error));
            Stop::Left(Why::Agent)
        })?;
        let records = match direct_records(ctx, &*socket, secured) {
            // The server has closed already: on the proxied path userspace can keep the records.
            Err(Refusal::Offload(OffloadError::Ktls(KtlsError::NotThere(_)))) => return Err(Stop::Left(Why::Kernel)),
            records => records?,
        };
        // What is in the send queue must be the agent's alone: from here on the kernel seals what is written.
        let written = options::written(&*socket, Opening::Active).map_err(Refusal::Client)?;
        if written != socket.written() {
            return Err(Stop::Left(Why::Interference));
        }
        Ok(Made { records, ends, noted })
    }

    /// The socket is the application's again, and nothing of it is held here.
    fn hand_over(&self, borrowed: Borrowed, made: Made, account: Account, permit: Permit) -> Outcome {
        let Made { records, ends, noted } = made;
        let (socket, gate) = borrowed.into_parts();
        let done = match noted.hand_over(account, permit, records) {
            Ok(()) => gate.release().map_err(|error| with_causes(&error)),
            Err(error) => Err(with_causes(&error)),
        };
        match done {
            Ok(()) => {
                drop(socket);
                Outcome::Connected
            }
            Err(error) => {
                tracing::warn!(destination = %ends.remote, "a socket was not released: {error}");
                self.end(&ends);
                Outcome::Failed(libc::ECONNABORTED)
            }
        }
    }

    fn ends(&self, socket: &Borrowed, remote: SocketAddr, received: u64) -> Ends {
        let local = socket2::SockRef::from(socket).local_addr().ok().and_then(|address| address.as_socket());
        Ends {
            cookie: self.cookie,
            local: local.map_or(SocketAddr::new(remote.ip(), 0), parts::canonical),
            remote,
            opening: Opening::Active,
            sent: socket.written(),
            received,
        }
    }
}

struct Made {
    records: &'static str,
    ends: Ends,
    noted: Noted,
}

/// Gives the records to the kernel: a direct connection has no other way.
fn direct_records(ctx: &Context, socket: impl AsFd, secured: handshake::Secured) -> Result<&'static str, Refusal> {
    let records = offload::offload(socket, secured, RecordsChoice::Kernel, &ctx.kernel)?;
    if records.kernel_keeps() {
        Ok(records.name_in(Mode::Mtls))
    } else {
        Err(Refusal::Client(io::ErrorKind::Unsupported.into()))
    }
}

/// What connect() says: the kernel's own word where there is one.
fn errno(refusal: &Refusal) -> i32 {
    match refusal {
        Refusal::Refused(error) | Refusal::Unreachable(error) => match (error.raw_os_error(), error.kind()) {
            (Some(errno), _) => errno,
            (None, io::ErrorKind::TimedOut) => libc::ETIMEDOUT,
            (None, _) => libc::ECONNREFUSED,
        },
        _ => libc::ECONNREFUSED,
    }
}
