//! What the agent needs of sockets that are an application's: whether they are fit to be made a TLS connection, the options that
//! an accepted socket would have inherited, and calls that must not wait, whatever the application chose. What the kernel
//! tells of sockets that the agent does not hold is `diag`'s.
#![allow(unsafe_code)]

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::stat::fstat,
    unistd::fchown,
};
use socket2::SockRef;

use super::{
    socket,
    tcp_info::{Counts, Opening, TcpState},
};

/// What a socket is looked at for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// It is about to connect.
    Connect,
    /// It listens, and sockets are to be handed out in its name.
    Accept,
}

/// Why a socket cannot become a TLS connection of its own; `None` if it can.
pub fn unsuited(socket: impl AsFd, purpose: Purpose) -> Option<&'static str> {
    let socket = socket.as_fd();
    let number = |level, name| int(socket, level, name);
    if !matches!(number(libc::SOL_SOCKET, libc::SO_DOMAIN), Ok(libc::AF_INET | libc::AF_INET6)) {
        return Some("not an internet socket");
    }
    match number(libc::SOL_SOCKET, libc::SO_PROTOCOL) {
        Ok(libc::IPPROTO_TCP) => {}
        Ok(libc::IPPROTO_MPTCP) => return Some("MPTCP"),
        _ => return Some("not TCP"),
    }
    let state = counts(socket).map(|counts| counts.state);
    match (purpose, state) {
        (Purpose::Connect, Ok(TcpState::CLOSED)) | (Purpose::Accept, Ok(TcpState::LISTENING)) => {}
        (Purpose::Connect, _) => return Some("not unconnected"),
        (Purpose::Accept, _) => return Some("not listening"),
    }
    // Absent options are of kernels that cannot have them set.
    let set = |level, name| number(level, name).is_ok_and(|value| value != 0);
    if set(libc::SOL_SOCKET, libc::SO_ZEROCOPY) {
        return Some("SO_ZEROCOPY");
    }
    if bytes(socket, libc::SOL_TCP, libc::TCP_ULP, &mut [0; 16]).is_ok_and(|name| !name.is_empty()) {
        return Some("TCP_ULP");
    }
    if set(libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX) {
        return Some("SO_BINDTODEVICE");
    }
    if set(libc::SOL_TCP, libc::TCP_REPAIR) {
        return Some("TCP_REPAIR");
    }
    if purpose == Purpose::Connect && set(libc::SOL_TCP, libc::TCP_FASTOPEN_CONNECT) {
        return Some("TCP_FASTOPEN_CONNECT");
    }
    // A filter would look at records instead of what it was written for. Those loaded as eBPF are not shown, only that they are there.
    match option_length(socket, libc::SOL_SOCKET, libc::SO_GET_FILTER) {
        Ok(0) => None,
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => None,
        _ => Some("SO_ATTACH_FILTER"),
    }
}

/// Gives `to` what a socket accepted from the listener `from` would have inherited, its owner included: that of a port decides who
/// may share it (SO_REUSEPORT). Not SO_REUSEADDR, which the agent's sockets always have so that a server may be restarted
/// while they linger. File status flags are not inherited.
///
/// Too late for those that are agreed in TCP's handshake: window scale, TCP_MAXSEG, TCP_FASTOPEN, TCP_SAVE_SYN.
pub fn copy(from: impl AsFd, to: impl AsFd) -> io::Result<()> {
    let (from, to) = (from.as_fd(), to.as_fd());
    let domain = |socket| int(socket, libc::SOL_SOCKET, libc::SO_DOMAIN);
    if domain(from)? != domain(to)? {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the sockets are of different address families"));
    }
    for &(level, name) in INHERITED {
        copy_one(from, to, level, name)?;
    }
    // Not inherited, and set by IP_TOS.
    set(to, libc::SOL_SOCKET, libc::SO_PRIORITY, &0_i32.to_ne_bytes())?;
    copy_buffers(from, to)?;
    // What a listener has here was set; what a connection has may have come about.
    if let (Ok(clamp @ 1..), Ok(Counts { state: TcpState::LISTENING, .. })) =
        (int(from, libc::SOL_TCP, libc::TCP_WINDOW_CLAMP), counts(from))
    {
        set(to, libc::SOL_TCP, libc::TCP_WINDOW_CLAMP, &clamp.to_ne_bytes())?;
    }
    let (theirs, ours) = (fstat(from)?, fstat(to)?);
    if (theirs.st_uid, theirs.st_gid) != (ours.st_uid, ours.st_gid) {
        fchown(to, Some(theirs.st_uid.into()), Some(theirs.st_gid.into()))?;
    }
    Ok(())
}

/// Makes a socket that has connected, or tried to, unconnected again: its next connect() finds it as it was. Refused by kernels with
/// records on it (EOPNOTSUPP), and where another thread waits in it (EBUSY).
pub fn disconnect(socket: impl AsFd) -> io::Result<()> {
    let unspecified = libc::sockaddr { sa_family: libc::AF_UNSPEC as libc::sa_family_t, sa_data: [0; 14] };
    // SAFETY: the address is a local of the length that is given.
    let result = unsafe {
        libc::connect(
            socket.as_fd().as_raw_fd(),
            &raw const unspecified,
            size_of::<libc::sockaddr>() as libc::socklen_t,
        )
    };
    check(result)
}

/// SO_RCVLOWAT.
pub fn receive_lowat(socket: impl AsFd) -> io::Result<i32> {
    int(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT)
}

pub fn set_receive_lowat(socket: impl AsFd, bytes: i32) -> io::Result<()> {
    set(socket.as_fd(), libc::SOL_SOCKET, libc::SO_RCVLOWAT, &bytes.to_ne_bytes())
}

/// SO_RCVTIMEO, which also bounds accept(); none is no bound.
pub fn receive_timeout(socket: impl AsFd) -> io::Result<Option<std::time::Duration>> {
    SockRef::from(&socket).read_timeout()
}

/// Whether calls on the socket wait, as the application has chosen.
pub fn blocks(socket: impl AsFd) -> io::Result<bool> {
    let flags = OFlag::from_bits_retain(fcntl(socket.as_fd(), FcntlArg::F_GETFL)?);
    Ok(!flags.contains(OFlag::O_NONBLOCK))
}

/// How many bytes were ever put into the send queue of a connected socket, a FIN counting as one.
pub fn written(socket: impl AsFd, opening: Opening) -> io::Result<u64> {
    let socket = socket.as_fd();
    for _ in 0..TRIES {
        let before = counts(socket)?;
        if matches!(before.state, TcpState::CLOSED | TcpState::LISTENING | TcpState::SYN_SENT) {
            return Err(io::ErrorKind::NotConnected.into());
        }
        let queued = socket::unacknowledged(socket)? as u64;
        // Nothing was acknowledged in between: both are of one moment.
        if counts(socket)?.bytes_acked == before.bytes_acked {
            let total = before.bytes_acked + queued;
            return total.checked_sub(opening.syn()).ok_or_else(|| io::ErrorKind::NotConnected.into());
        }
    }
    Err(io::ErrorKind::Interrupted.into())
}

/// TCP's counts of a socket that is held.
pub fn counts(socket: impl AsFd) -> io::Result<Counts> {
    let mut buffer = [0; 256];
    let info = bytes(socket.as_fd(), libc::SOL_TCP, libc::TCP_INFO, &mut buffer)?;
    Counts::parse(info).ok_or_else(|| io::ErrorKind::Unsupported.into())
}

/// The number by which the kernel and its programs know the socket.
pub fn cookie(socket: impl AsFd) -> io::Result<u64> {
    let mut buffer = [0; 8];
    match bytes(socket.as_fd(), libc::SOL_SOCKET, libc::SO_COOKIE, &mut buffer)?.first_chunk() {
        Some(cookie) => Ok(u64::from_ne_bytes(*cookie)),
        None => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// Starts to connect without waiting. `true` if it is connected already; else it will be writable when it is, or has failed.
pub fn connect_now(socket: impl AsFd, to: SocketAddr) -> io::Result<bool> {
    let socket = socket.as_fd();
    let _unblocked = Unblocked::new(socket)?;
    match SockRef::from(&socket).connect(&to.into()) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Accepts without waiting: `WouldBlock` if nobody has connected. The new socket is close-on-exec and blocks.
pub fn accept_now(listener: impl AsFd) -> io::Result<(OwnedFd, Option<SocketAddr>)> {
    let listener = listener.as_fd();
    // Looked at first, so that a listener that others share is hardly ever seen with its mode changed.
    if poll(&mut [PollFd::new(listener, PollFlags::POLLIN)], PollTimeout::ZERO)? == 0 {
        return Err(io::ErrorKind::WouldBlock.into());
    }
    let _unblocked = Unblocked::new(listener)?;
    let (socket, from) = SockRef::from(&listener).accept()?;
    Ok((socket.into(), from.as_socket()))
}

/// `bytes_acked` moves with every acknowledgement; a reader that is not starved sees it stand still soon.
const TRIES: usize = 1000;

/// The libc crate does not have these yet, and kernels before 6.15 not the last three.
const TCP_TX_DELAY: libc::c_int = 37;
const TCP_RTO_MAX_MS: libc::c_int = 44;
const TCP_RTO_MIN_US: libc::c_int = 45;
const TCP_DELACK_MAX_US: libc::c_int = 46;

/// What a child socket has from its listener (sk_clone and its callees).
const INHERITED: &[(libc::c_int, libc::c_int)] = &[
    (libc::IPPROTO_IP, libc::IP_TOS),
    (libc::IPPROTO_IP, libc::IP_TTL),
    (libc::IPPROTO_IP, libc::IP_MINTTL),
    (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
    (libc::IPPROTO_IP, libc::IP_RECVERR),
    (libc::IPPROTO_IP, libc::IP_RECVTTL),
    (libc::IPPROTO_IP, libc::IP_RECVTOS),
    (libc::IPPROTO_IP, libc::IP_PKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_TCLASS),
    (libc::IPPROTO_IPV6, libc::IPV6_UNICAST_HOPS),
    (libc::IPPROTO_IPV6, libc::IPV6_MINHOPCOUNT),
    (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    (libc::IPPROTO_IPV6, libc::IPV6_DONTFRAG),
    (libc::IPPROTO_IPV6, libc::IPV6_AUTOFLOWLABEL),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVERR),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVPKTINFO),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVHOPLIMIT),
    (libc::IPPROTO_IPV6, libc::IPV6_RECVTCLASS),
    (libc::SOL_SOCKET, libc::SO_MARK),
    (libc::SOL_SOCKET, libc::SO_REUSEPORT),
    (libc::SOL_SOCKET, libc::SO_KEEPALIVE),
    (libc::SOL_SOCKET, libc::SO_LINGER),
    (libc::SOL_SOCKET, libc::SO_OOBINLINE),
    (libc::SOL_SOCKET, libc::SO_DONTROUTE),
    (libc::SOL_SOCKET, libc::SO_RCVLOWAT),
    (libc::SOL_SOCKET, libc::SO_RCVTIMEO),
    (libc::SOL_SOCKET, libc::SO_SNDTIMEO),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMP),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPNS),
    (libc::SOL_SOCKET, libc::SO_TIMESTAMPING),
    (libc::SOL_SOCKET, libc::SO_RXQ_OVFL),
    (libc::SOL_SOCKET, libc::SO_SELECT_ERR_QUEUE),
    (libc::SOL_SOCKET, libc::SO_BUSY_POLL),
    (libc::SOL_SOCKET, libc::SO_PREFER_BUSY_POLL),
    (libc::SOL_SOCKET, libc::SO_MAX_PACING_RATE),
    (libc::SOL_SOCKET, libc::SO_TXREHASH),
    (libc::SOL_SOCKET, libc::SO_RCVMARK),
    (libc::SOL_TCP, libc::TCP_CONGESTION),
    (libc::SOL_TCP, libc::TCP_NODELAY),
    (libc::SOL_TCP, libc::TCP_CORK),
    (libc::SOL_TCP, libc::TCP_KEEPIDLE),
    (libc::SOL_TCP, libc::TCP_KEEPINTVL),
    (libc::SOL_TCP, libc::TCP_KEEPCNT),
    (libc::SOL_TCP, libc::TCP_LINGER2),
    (libc::SOL_TCP, libc::TCP_USER_TIMEOUT),
    (libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT),
    (libc::SOL_TCP, libc::TCP_THIN_LINEAR_TIMEOUTS),
    (libc::SOL_TCP, libc::TCP_THIN_DUPACK),
    (libc::SOL_TCP, libc::TCP_INQ),
    (libc::SOL_TCP, TCP_TX_DELAY),
    (libc::SOL_TCP, TCP_RTO_MAX_MS),
    (libc::SOL_TCP, TCP_RTO_MIN_US),
    (libc::SOL_TCP, TCP_DELACK_MAX_US),
];

/// Sets one option where it differs. One that this kernel or address family does not have is passed over.
fn copy_one(from: BorrowedFd<'_>, to: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<()> {
    let (mut theirs, mut ours) = ([0; 32], [0; 32]);
    let Ok(wanted) = bytes(from, level, name, &mut theirs) else { return Ok(()) };
    if bytes(to, level, name, &mut ours).is_ok_and(|had| had == wanted) {
        return Ok(());
    }
    set(to, level, name, wanted)
}

/// Buffer sizes that were set, not those that the kernel has chosen and goes on choosing. It tells the double of what was set.
fn copy_buffers(from: BorrowedFd<'_>, to: BorrowedFd<'_>) -> io::Result<()> {
    const SEND: libc::c_int = 1;
    const RECEIVE: libc::c_int = 2;
    let Ok(locked) = int(from, libc::SOL_SOCKET, libc::SO_BUF_LOCK) else { return Ok(()) };
    for (bit, size, force) in
        [(SEND, libc::SO_SNDBUF, libc::SO_SNDBUFFORCE), (RECEIVE, libc::SO_RCVBUF, libc::SO_RCVBUFFORCE)]
    {
        if locked & bit != 0 {
            let half = (int(from, libc::SOL_SOCKET, size)? / 2).to_ne_bytes();
            // Forced, because the application may have been allowed to pass the limit.
            set(to, libc::SOL_SOCKET, force, &half).or_else(|_| set(to, libc::SOL_SOCKET, size, &half))?;
        }
    }
    Ok(())
}

/// A description that does not block for as long as this lives. The flag is the description's, so the application may see it; it
/// is therefore set around single calls that return at once, and only if the application has not set it itself.
struct Unblocked<'a>(Option<BorrowedFd<'a>>);

impl<'a> Unblocked<'a> {
    fn new(socket: BorrowedFd<'a>) -> io::Result<Self> {
        let flags = OFlag::from_bits_retain(fcntl(socket, FcntlArg::F_GETFL)?);
        if flags.contains(OFlag::O_NONBLOCK) {
            return Ok(Self(None));
        }
        fcntl(socket, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
        Ok(Self(Some(socket)))
    }
}

impl Drop for Unblocked<'_> {
    fn drop(&mut self) {
        // Read anew: the application may have changed other flags meanwhile. Neither call can fail on an open socket.
        if let Some(socket) = self.0
            && let Ok(flags) = fcntl(socket, FcntlArg::F_GETFL)
        {
            let _ = fcntl(socket, FcntlArg::F_SETFL(OFlag::from_bits_retain(flags) - OFlag::O_NONBLOCK));
        }
    }
}

pub(super) fn int(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<libc::c_int> {
    let mut buffer = [0; 4];
    match bytes(socket, level, name, &mut buffer)?.first_chunk() {
        Some(value) => Ok(libc::c_int::from_ne_bytes(*value)),
        None => Err(io::ErrorKind::Unsupported.into()),
    }
}

/// An option's value as the kernel writes it.
pub(super) fn bytes<'b>(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    buffer: &'b mut [u8],
) -> io::Result<&'b [u8]> {
    let mut length = libc::socklen_t::try_from(buffer.len()).unwrap_or(0);
    // SAFETY: the kernel writes at most `length` bytes, which is the buffer's own length.
    check(unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut length) })?;
    Ok(&buffer[..(length as usize).min(buffer.len())])
}

/// How long an option's value is, where the kernel tells it for no room at all. SO_GET_FILTER counts instructions.
fn option_length(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<usize> {
    let mut length: libc::socklen_t = 0;
    // SAFETY: with a length of 0 the kernel writes nothing but the length.
    check(unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, std::ptr::null_mut(), &raw mut length) })?;
    Ok(length as usize)
}

pub(super) fn set(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int, value: &[u8]) -> io::Result<()> {
    let length = libc::socklen_t::try_from(value.len()).unwrap_or(0);
    // SAFETY: pointer and length are those of `value`.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) };
    check(result).map_err(|error| io::Error::new(error.kind(), format!("socket option {level}/{name}: {error}")))
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use socket2::{Domain, Socket, Type};

    use super::*;

    // The other reasons are shown by `tests/tests/kernel_sockets`; nobody else has a safe way to set this one.
    #[test]
    fn a_socket_that_may_send_without_copying_is_unsuited() {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
        assert_eq!(unsuited(&socket, Purpose::Connect), None);
        set(socket.as_fd(), libc::SOL_SOCKET, libc::SO_ZEROCOPY, &1_i32.to_ne_bytes()).unwrap();
        assert_eq!(unsuited(&socket, Purpose::Connect), Some("SO_ZEROCOPY"));
    }
}
