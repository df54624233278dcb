//! A packet socket: sees what goes over the links of the calling thread's network namespace, both ways. What the packets mean is left to
//! whoever reads them. It only looks: nothing can be sent with it.
#![allow(unsafe_code)]
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::sys::socket::{
    AddressFamily, LinkAddr, SockFlag, SockProtocol, SockType, recvfrom, setsockopt, socket, sockopt,
};

/// The largest packet that a link with segmentation offload shows (BIG TCP aside, of which the beginning is shown).
pub const LARGEST: usize = 1 << 18;
/// Room for what comes while nobody reads: 16 MiB.
const ROOM: usize = 16 << 20;

/// One packet, from the IP header on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seen {
    pub length: usize,
    /// Of the interface.
    pub index: usize,
    pub outgoing: bool,
}

/// See above.
#[derive(Debug)]
pub struct PacketSocket(OwnedFd);

impl PacketSocket {
    /// Sees every packet of this namespace from now on.
    pub fn open() -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
        // "Datagram": without the link's own header, which differs from link to link.
        let socket = socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll)?;
        // Without it the socket has less room, and says so when it ran over.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &ROOM);
        Ok(Self(socket))
    }

    /// The next packet that is there already.
    pub fn next(&self, buffer: &mut [u8]) -> io::Result<Option<Seen>> {
        match recvfrom::<LinkAddr>(self.0.as_raw_fd(), buffer) {
            Ok((length, from)) => {
                let from = from.ok_or_else(|| io::Error::other("a packet without its link"))?;
                let outgoing = from.pkttype() == libc::PACKET_OUTGOING;
                Ok(Some(Seen { length, index: from.ifindex(), outgoing }))
            }
            Err(nix::errno::Errno::EAGAIN) => Ok(None),
            Err(errno) => Err(errno.into()),
        }
    }

    /// How many packets were lost for want of room, since this was asked last.
    pub fn lost(&self) -> io::Result<u32> {
        let mut stats = libc::tpacket_stats { tp_packets: 0, tp_drops: 0 };
        let mut length = size_of::<libc::tpacket_stats>() as libc::socklen_t;
        // SAFETY: the descriptor is open for the call, and the kernel writes at most `length` bytes to `stats`.
        let result = unsafe {
            libc::getsockopt(
                self.0.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_STATISTICS,
                (&raw mut stats).cast(),
                &raw mut length,
            )
        };
        if result == 0 { Ok(stats.tp_drops) } else { Err(io::Error::last_os_error()) }
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
