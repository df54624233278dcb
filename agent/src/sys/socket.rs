//! What the agent asks of a TCP socket beyond reading and writing: records through kernel TLS's control messages, abortive
//! close, queue lengths, liveness. Moving bytes between two sockets is `splice`'s; keys are `tls::ktls`'s.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};

/// `SOL_TLS` and its control messages (include/linux/socket.h, include/uapi/linux/tls.h).
const SOL_TLS: libc::c_int = 282;
const TLS_SET_RECORD_TYPE: libc::c_int = 1;
const TLS_GET_RECORD_TYPE: libc::c_int = 2;
const CMSG_SPACE: usize = 32;

/// One `recvmsg` from a kernel TLS socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Received {
    pub len: usize,
    /// TLS content type; `None` where the kernel gave none, which with `len` 0 is the end of the stream.
    pub content_type: Option<u8>,
}

/// Reads without waiting. 0 is the end of the stream.
pub fn recv(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    recv_flags(socket, buffer, libc::MSG_DONTWAIT)
}

/// Looks at what is queued without taking it.
pub fn peek(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<usize> {
    recv_flags(socket, buffer, libc::MSG_DONTWAIT | libc::MSG_PEEK)
}

/// Writes without waiting.
pub fn send(socket: impl AsFd, data: &[u8]) -> io::Result<usize> {
    send_flags(socket, data, 0)
}

/// Writes without waiting what is to leave together with what is written next: nobody may count on its leaving without that
/// (TCP lets it go after a while, kernel TLS keeps its record open).
pub fn send_more(socket: impl AsFd, data: &[u8]) -> io::Result<usize> {
    send_flags(socket, data, libc::MSG_MORE)
}

/// Reads from a kernel TLS socket without waiting, with the content type of what was read. The kernel never mixes types in
/// one call (net/tls/tls_sw.c, tls_sw_recvmsg).
pub fn recv_record(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Received> {
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = Control([0; CMSG_SPACE]);
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    msg.msg_controllen = CMSG_SPACE;
    // SAFETY: every pointer in `msg` is to a local or to `buffer`, with its true length, and outlives the call.
    let len = count(unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut msg, libc::MSG_DONTWAIT) })?;
    let mut content_type = None;
    // SAFETY: the kernel has set msg_controllen to what it wrote into `control`; the CMSG macros walk only that.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const msg);
        while !header.is_null() {
            if (*header).cmsg_level == SOL_TLS && (*header).cmsg_type == TLS_GET_RECORD_TYPE {
                content_type = Some(*libc::CMSG_DATA(header));
            }
            header = libc::CMSG_NXTHDR(&raw const msg, header);
        }
    }
    Ok(Received { len, content_type })
}

/// Sends one record of another type than application data through kernel TLS. Heeds O_NONBLOCK.
pub fn send_record(socket: impl AsFd, content_type: u8, payload: &[u8]) -> io::Result<usize> {
    let mut iov = libc::iovec { iov_base: payload.as_ptr().cast_mut().cast(), iov_len: payload.len() };
    let mut control = Control([0; CMSG_SPACE]);
    // SAFETY: as in `recv_record`.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE and CMSG_LEN compute sizes; one byte of data needs fewer than the 32 bytes of `control`, which is
    // aligned for a cmsghdr. CMSG_FIRSTHDR is then non-null and its data within `control`.
    unsafe {
        msg.msg_controllen = libc::CMSG_SPACE(1) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const msg);
        (*header).cmsg_level = SOL_TLS;
        (*header).cmsg_type = TLS_SET_RECORD_TYPE;
        (*header).cmsg_len = libc::CMSG_LEN(1) as usize;
        *libc::CMSG_DATA(header) = content_type;
    }
    // SAFETY: every pointer in `msg` is to a local or to `payload`, with its true length; sendmsg does not write to them.
    count(unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const msg, libc::MSG_NOSIGNAL) })
}

/// Bytes that the peer's kernel has not acknowledged (SIOCOUTQ). Records that kernel TLS still holds are not in it.
pub fn unacknowledged(socket: impl AsFd) -> io::Result<usize> {
    let mut queued: libc::c_int = 0;
    // SAFETY: TIOCOUTQ (the same number as SIOCOUTQ) writes one int.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::TIOCOUTQ, &raw mut queued) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(usize::try_from(queued).unwrap_or(0)) }
}

/// Bytes that have come and were not read (SIOCINQ). From a kernel TLS socket: those that make no whole record yet, if all records
/// were read and the kernel has not copied them aside.
pub fn unread(socket: impl AsFd) -> io::Result<usize> {
    let mut queued: libc::c_int = 0;
    // SAFETY: FIONREAD (the same number as SIOCINQ) writes one int.
    let result = unsafe { libc::ioctl(socket.as_fd().as_raw_fd(), libc::FIONREAD, &raw mut queued) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(usize::try_from(queued).unwrap_or(0)) }
}

/// What the kernel knows of the peer's liveness and of the bytes moved.
#[derive(Debug, Clone, Copy, Default)]
pub struct TcpInfo {
    /// Retransmissions of the oldest segment in a row, and unanswered window probes in a row.
    pub retransmits: u8,
    pub probes: u8,
    pub unacked: u32,
    pub since_last_ack: Duration,
}

pub fn tcp_info(socket: impl AsFd) -> io::Result<TcpInfo> {
    // SAFETY: tcp_info is plain data for which all zeroes is a valid value.
    let mut info: libc::tcp_info = unsafe { std::mem::zeroed() };
    let mut len = libc::socklen_t::try_from(size_of::<libc::tcp_info>()).unwrap_or(0);
    // SAFETY: the kernel writes at most `len` bytes into `info`.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(TcpInfo {
        retransmits: info.tcpi_retransmits,
        probes: info.tcpi_probes,
        unacked: info.tcpi_unacked,
        since_last_ack: Duration::from_millis(u64::from(info.tcpi_last_ack_recv)),
    })
}

/// The next close sends RST and throws queued bytes away: how a reset, a truncation or a refusal is passed on.
pub fn abort_on_close(socket: impl AsFd) -> io::Result<()> {
    SockRef::from(&socket).set_linger(Some(Duration::ZERO))
}

/// Small writes leave at once (the application has its own say about Nagle on its own socket) and an idle dead peer is
/// noticed after `idle` plus three unanswered probes. A peer that dies with bytes in flight is noticed by `proxy::watchdog`:
/// TCP_USER_TIMEOUT would also end a connection whose living peer merely keeps its window shut (tcp_timer.c, tcp_probe_timer).
pub fn tune(socket: impl AsFd, idle: Duration) -> io::Result<()> {
    let socket = SockRef::from(&socket);
    socket.set_tcp_nodelay(true)?;
    let interval = (idle / 3).max(Duration::from_secs(1));
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(3))
}

/// The error that the kernel keeps for the socket, if any; asking clears it.
pub fn take_error(socket: impl AsFd) -> io::Result<Option<io::Error>> {
    SockRef::from(&socket).take_error()
}

fn recv_flags(socket: impl AsFd, buffer: &mut [u8], flags: libc::c_int) -> io::Result<usize> {
    // SAFETY: the pointer and the length are those of `buffer`, which is borrowed for the call.
    count(unsafe { libc::recv(socket.as_fd().as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) })
}

fn send_flags(socket: impl AsFd, data: &[u8], flags: libc::c_int) -> io::Result<usize> {
    let flags = flags | libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: the pointer and the length are those of `data`, which outlives the call.
    count(unsafe { libc::send(socket.as_fd().as_raw_fd(), data.as_ptr().cast(), data.len(), flags) })
}

fn count(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// Room for control messages, aligned as the kernel's `cmsghdr` wants it.
#[repr(C, align(8))]
struct Control([u8; CMSG_SPACE]);
