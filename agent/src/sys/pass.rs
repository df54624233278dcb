//! Messages with descriptors over Unix sockets (SCM_RIGHTS).
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

/// Descriptors that one message may bring. The kernel closes those beyond, and says so.
pub const MOST: usize = 8;
const ROOM: usize = 64;
// SAFETY: CMSG_SPACE computes a size.
const _: () = assert!(unsafe { libc::CMSG_SPACE((MOST * size_of::<RawFd>()) as u32) } as usize <= ROOM);

#[derive(Debug)]
pub struct Message {
    /// Bytes in the buffer; 0 is the end of a stream.
    pub len: usize,
    pub descriptors: Vec<OwnedFd>,
    /// The sender sent more bytes (where messages have bounds) or more descriptors than there was room for.
    pub cut: bool,
}

/// Sends without waiting.
pub fn send(socket: impl AsFd, data: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    if descriptors.len() > MOST {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut iov = libc::iovec { iov_base: data.as_ptr().cast_mut().cast(), iov_len: data.len() };
    let mut control = Control([0; ROOM]);
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    if !descriptors.is_empty() {
        let bytes = size_of_val(descriptors) as u32;
        msg.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: the control buffer has room for MOST descriptors and is aligned for a cmsghdr, so the header is non-null and
        // its data within the buffer. BorrowedFd is a RawFd in memory (`repr(transparent)`).
        unsafe {
            msg.msg_controllen = libc::CMSG_SPACE(bytes) as usize;
            let header = libc::CMSG_FIRSTHDR(&raw const msg);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = libc::CMSG_LEN(bytes) as usize;
            std::ptr::copy_nonoverlapping(descriptors.as_ptr().cast::<u8>(), libc::CMSG_DATA(header), bytes as usize);
        }
    }
    // SAFETY: every pointer in `msg` is to a local, to `data` or to `control`, with its true length; sendmsg writes to none.
    let sent =
        unsafe { libc::sendmsg(socket.as_fd().as_raw_fd(), &raw const msg, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}

/// Receives without waiting. The descriptors are closed on exec.
pub fn recv(socket: impl AsFd, buffer: &mut [u8]) -> io::Result<Message> {
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    let mut control = Control([0; ROOM]);
    // SAFETY: msghdr is plain data for which all zeroes is a valid value.
    let mut msg: libc::msghdr = unsafe { std::mem::zeroed() };
    msg.msg_iov = &raw mut iov;
    msg.msg_iovlen = 1;
    msg.msg_control = control.0.as_mut_ptr().cast();
    // SAFETY: CMSG_SPACE computes a size.
    msg.msg_controllen = unsafe { libc::CMSG_SPACE((MOST * size_of::<RawFd>()) as u32) } as usize;
    let flags = libc::MSG_DONTWAIT | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: every pointer in `msg` is to a local, to `buffer` or to `control`, with its true length, and outlives the call.
    let received = unsafe { libc::recvmsg(socket.as_fd().as_raw_fd(), &raw mut msg, flags) };
    let len = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    let mut descriptors = Vec::new();
    // SAFETY: the kernel has set msg_controllen to what it wrote into `control`, which the CMSG macros walk; a header's data is
    // cmsg_len less the header's own size. The descriptors were made for us by this call, and nobody else knows them.
    unsafe {
        let mut header = libc::CMSG_FIRSTHDR(&raw const msg);
        while !header.is_null() {
            if (*header).cmsg_level == libc::SOL_SOCKET && (*header).cmsg_type == libc::SCM_RIGHTS {
                let bytes = (*header).cmsg_len.saturating_sub(libc::CMSG_LEN(0) as usize);
                let data = libc::CMSG_DATA(header).cast::<RawFd>();
                for number in 0..bytes / size_of::<RawFd>() {
                    descriptors.push(OwnedFd::from_raw_fd(data.add(number).read_unaligned()));
                }
            }
            header = libc::CMSG_NXTHDR(&raw const msg, header);
        }
    }
    Ok(Message { len, descriptors, cut: msg.msg_flags & (libc::MSG_CTRUNC | libc::MSG_TRUNC) != 0 })
}

/// Room for control messages, aligned as the kernel's `cmsghdr` wants it.
#[repr(C, align(8))]
struct Control([u8; ROOM]);
