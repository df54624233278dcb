//! A connect() that is held: the agent connects the application's own socket, does the handshake on it, gives the records to
//! the kernel and lets go. Whatever speaks against it before that leaves the call to the kernel, which redirects it as ever.

use std::{io, os::fd::OwnedFd, sync::Arc, time::Instant};

use tokio::time::timeout;

use super::{
    Direct, Why, parts,
    socket::Borrowed,
    watch::{self, Ends},
};
use crate::{
    keeper::Pending,
    proxy::{
        Context,
        account::Account,
        authorize::{self, Permit, Way},
        connections::lock,
        handshake, identify,
        offload::{self, OffloadError, RecordsChoice},
        pod::Pod,
        refusal::Refusal,
    },
    sys::{
        netns::socket_netns,
        options::{self, Purpose},
        process::{Caller, peek},
        seccomp::Answer,
        tcp_info::Opening,
    },
    tls::{
        config::{self, Offer},
        ktls::KtlsError,
    },
    words::{Direction, Mode, with_causes},
};

/// How it ended for the application.
enum Outcome {
    Connected,
    /// connect() fails with this.
    Failed(i32),
    Left(Why),
}

pub(super) async fn connect(ctx: &Arc<Context>, mut call: Pending, fd: i32, address: u64, length: u32) {
    let Some(direct) = &ctx.direct else { return };
    let answer = match attempt(ctx, direct, &mut call, fd, address, length).await {
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
    ctx: &Arc<Context>,
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
    let pod = direct.pod(socket_netns(std::os::fd::AsFd::as_fd(&socket)).ok()?)?;
    let unsuited = options::unsuited(&socket, Purpose::Connect);
    if matches!(unsuited, Some("not an internet socket" | "not TCP" | "not unconnected")) {
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
    if let Some(why) = direct.avoided(destination) {
        return Some((cookie, Outcome::Left(why)));
    }
    let try_ = Try { ctx, direct, pod, asked, destination, cookie };
    let outcome = try_.run(call, socket).await;
    Some((cookie, outcome))
}

struct Try<'a> {
    ctx: &'a Arc<Context>,
    direct: &'a Direct,
    pod: Arc<Pod>,
    asked: std::net::SocketAddr,
    destination: std::net::SocketAddr,
    cookie: u64,
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
    async fn run(&self, call: &mut Pending, socket: OwnedFd) -> Outcome {
        let ctx = self.ctx;
        let Ok(_turn) = self.pod.outbound.clone().try_acquire_owned() else { return Outcome::Left(Why::Busy) };
        let mut account = Account::attempt(&ctx.connections, &ctx.metrics, &ctx.log, Direction::Outbound);
        let snapshot = ctx.state.load();
        let (workload, endpoint) = identify::endpoint(&snapshot, self.destination);
        account.live.learn(|facts| facts.destination = endpoint);
        let way = authorize::outbound(&snapshot, workload.as_deref(), self.destination.port(), &account.live);
        let (permit, expect) = match way {
            Err(_) => return Outcome::Left(Why::Policy),
            Ok(Way::Plaintext { .. }) => return Outcome::Left(Why::Plaintext),
            Ok(Way::Mtls { permit, expect }) => (permit, expect),
        };
        let Ok(blocks) = options::blocks(&socket) else { return Outcome::Left(Why::Agent) };
        let gate = match ctx.capture.direct(std::os::fd::AsFd::as_fd(&socket), self.destination, self.destination) {
            Ok(gate) => gate,
            Err(error) => {
                tracing::debug!("a socket cannot be gated: {}", with_causes(&error));
                return Outcome::Left(Why::Agent);
            }
        };
        call.begin();
        let mut borrowed = match Borrowed::new(socket, gate) {
            Ok(borrowed) => borrowed,
            Err(error) => {
                tracing::warn!(%error, "a socket cannot be watched");
                return Outcome::Failed(libc::ENOBUFS);
            }
        };
        let limit = if blocks { ctx.settings.connect + ctx.settings.handshake } else { self.direct.settings.hold };
        let host = workload.as_ref().map_or("unknown", |workload| workload.host.as_str());
        let made = timeout(limit, self.establish(&mut borrowed, &account, &expect, host)).await;
        let stop = match made {
            Ok(Ok(Made { records, received })) => match self.hand_over(borrowed, account, permit, records, received) {
                Ok(()) => return Outcome::Connected,
                Err(errno) => return Outcome::Failed(errno),
            },
            Ok(Err(stop)) => stop,
            Err(_) => Stop::Left(Why::TooSlow),
        };
        match stop {
            Stop::Refused(refusal) => {
                account
                    .live
                    .learn(|facts| facts.source = identify::of(Some(&self.pod.workload), self.source(&borrowed)));
                account.count();
                let errno = errno(&refusal);
                account.refused(refusal.reason(), &refusal);
                // The application may connect it again.
                let _ = options::disconnect(&borrowed);
                Outcome::Failed(errno)
            }
            Stop::Left(why) => {
                if matches!(why, Why::TooSlow | Why::PeerNotReady) {
                    self.direct.avoid(self.destination, why);
                }
                let poisoned = borrowed.gate().poisoned().unwrap_or(true);
                let (socket, gate) = borrowed.into_parts();
                match options::disconnect(&socket) {
                    Ok(()) => {
                        drop(gate);
                        Outcome::Left(if poisoned { Why::Interference } else { why })
                    }
                    Err(error) => {
                        // Records are on it: nothing can be undone, so it is ended.
                        tracing::warn!(%error, "a socket cannot be disconnected: its connect fails");
                        watch::destroy(&self.pod, self.cookie, &socket);
                        Outcome::Failed(libc::ECONNREFUSED)
                    }
                }
            }
        }
    }

    async fn establish(
        &self,
        socket: &mut Borrowed,
        account: &Account,
        expect: &[crate::identity::SpiffeId],
        host: &str,
    ) -> Result<Made, Stop> {
        let ctx = self.ctx;
        let since = Instant::now();
        timeout(ctx.settings.connect, socket.connect(self.asked))
            .await
            .unwrap_or(Err(io::ErrorKind::TimedOut.into()))
            .map_err(Refusal::connecting)?;
        let svid = ctx.svid(&self.pod.workload.id)?;
        let config =
            config::client_config(&svid, ctx.identities.roots(), expect, Offer::Direct).map_err(Refusal::from)?;
        let name = config::server_name(self.destination.port(), host);
        let result = handshake::connect(socket, config, name, ctx.settings.handshake).await;
        if result.as_ref().is_err_and(handshake::not_agreed) {
            return Err(Stop::Left(Why::PeerNotReady));
        }
        let secured = ctx.handshaken(account, Direction::Outbound, since, result)?;
        let received = secured.received;
        if socket.gate().poisoned().unwrap_or(true) {
            return Err(Stop::Left(Why::Interference));
        }
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
        Ok(Made { records, received })
    }

    /// The socket is the application's again, and nothing of it is held here.
    fn hand_over(
        &self,
        borrowed: Borrowed,
        account: Account,
        permit: Permit,
        records: &'static str,
        received: u64,
    ) -> Result<(), i32> {
        let ctx = self.ctx;
        let local = self.source(&borrowed);
        let sent = borrowed.written();
        account.live.learn(|facts| facts.source = identify::of(Some(&self.pod.workload), local));
        let (socket, gate) = borrowed.into_parts();
        let ends =
            Ends { cookie: self.cookie, local, remote: self.destination, opening: Opening::Active, sent, received };
        if let Err(error) = watch::established(ctx, &self.pod, account, permit, ends, records) {
            tracing::warn!("a direct connection cannot be followed: {}", with_causes(&*error));
            return Err(libc::ECONNABORTED);
        }
        match gate.release() {
            Ok(()) => {
                drop(socket);
                Ok(())
            }
            Err(error) => {
                tracing::warn!("a socket was not released: {}", with_causes(&error));
                lock(&self.direct.avoided).remove(&self.destination);
                Err(libc::ECONNABORTED)
            }
        }
    }

    fn source(&self, socket: &Borrowed) -> std::net::SocketAddr {
        let local = socket2::SockRef::from(socket).local_addr().ok().and_then(|address| address.as_socket());
        local.map_or(std::net::SocketAddr::new(self.destination.ip(), 0), parts::canonical)
    }
}

struct Made {
    records: &'static str,
    received: u64,
}

/// Gives the records to the kernel: a direct connection has no other way.
fn direct_records(
    ctx: &Context,
    socket: impl std::os::fd::AsFd,
    secured: handshake::Secured,
) -> Result<&'static str, Refusal> {
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
