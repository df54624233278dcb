//! Records that kernel TLS has accepted and not handed to TCP yet, and how they survive the end of a socket.
//!
//! A non-blocking write is accepted whole when its record was sealed, although TCP may have had room for a part of it only
//! (net/tls/tls_sw.c, tls_tx_records). close() then makes one more try, as non-blocking as the write was, and frees what is
//! left; shutdown() makes none. Seen on 6.1 and on 6.12: up to a record is lost that write() had accepted, and the peer sees an
//! orderly end. TCP's own sockets lose nothing there, and programs count on it. So before a socket is closed its send buffer is
//! made large enough for what is left.

use std::{fs, io, os::fd::AsFd, path::Path};

use socket2::SockRef;

use super::{
    options::{bytes, int, set},
    process::Caller,
};

/// `SK_MEMINFO_WMEM_QUEUED` (include/uapi/linux/sock_diag.h).
const WMEM_QUEUED: usize = 5;
/// The most memory that a record of 16 KiB takes in the queue, twice over.
const ROOM: usize = 128 << 10;

/// What is known of a socket's send queue before it ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unsent {
    /// Nothing that could be lost: not kernel TLS, or the queue is all but empty.
    Nothing,
    /// Bytes are queued; a record may just be on its way to TCP.
    Queued,
    /// There was no room for a record; now there is.
    Squeezed,
}

/// Makes room for what kernel TLS has accepted, so that closing the socket hands all of it to TCP.
pub fn make_room(socket: impl AsFd) -> io::Result<Unsent> {
    let socket = socket.as_fd();
    let mut name = [0; 4];
    if !bytes(socket, libc::SOL_TCP, libc::TCP_ULP, &mut name).is_ok_and(|name| name.starts_with(b"tls")) {
        return Ok(Unsent::Nothing);
    }
    let mut memory = [0; 36];
    let memory = bytes(socket, libc::SOL_SOCKET, libc::SO_MEMINFO, &mut memory)?;
    let queued = memory.chunks_exact(4).nth(WMEM_QUEUED).and_then(|word| word.first_chunk());
    let queued = queued.map_or(0, |word| u32::from_ne_bytes(*word)) as usize;
    let limit = SockRef::from(&socket).send_buffer_size()?;
    let lowat = int(socket, libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT).unwrap_or(0);
    if lowat == 0 && queued.saturating_add(ROOM) < limit {
        return Ok(if queued == 0 { Unsent::Nothing } else { Unsent::Queued });
    }
    if lowat != 0 {
        set(socket, libc::SOL_TCP, libc::TCP_NOTSENT_LOWAT, &(-1_i32).to_ne_bytes())?;
    }
    let locked = int(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK).ok();
    // The kernel doubles what it is told.
    let room = i32::try_from((queued.saturating_add(2 * ROOM)) / 2).unwrap_or(i32::MAX / 2);
    set(socket, libc::SOL_SOCKET, libc::SO_SNDBUFFORCE, &room.to_ne_bytes())?;
    // The socket may live on in another process, for which the kernel goes on choosing the size if it did.
    if let Some(locked) = locked {
        set(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK, &locked.to_ne_bytes())?;
    }
    Ok(Unsent::Squeezed)
}

/// The same for one descriptor of a process. Only a socket is duplicated: giving up the duplicate of a file would flush it, which its
/// file system may take its time for.
pub fn before_close(caller: &Caller, fd: i32) -> Unsent {
    if !is_socket(format!("/proc/{}/fd/{fd}", caller.tid())) {
        return Unsent::Nothing;
    }
    match caller.descriptor(fd) {
        Ok(descriptor) => make_room(&descriptor).unwrap_or(Unsent::Nothing),
        Err(_) => Unsent::Nothing,
    }
}

/// The same for all sockets of a process between two descriptors.
pub fn before_closing(caller: &Caller, first: u32, last: u32) {
    let Ok(entries) = fs::read_dir(format!("/proc/{}/fd", caller.tid())) else { return };
    for entry in entries.flatten() {
        let number = entry.file_name().to_str().and_then(|name| name.parse::<u32>().ok());
        let Some(number) = number.filter(|number| (first..=last).contains(number)) else { continue };
        if let Ok(fd) = i32::try_from(number) {
            before_close(caller, fd);
        }
    }
}

fn is_socket(descriptor: impl AsRef<Path>) -> bool {
    fs::read_link(descriptor).is_ok_and(|link| link.as_os_str().as_encoded_bytes().starts_with(b"socket:"))
}
