//! What the kernel tells of the TCP sockets of one network namespace, also of those that the agent does not hold: finding one by its
//! addresses, ending it, and hearing of each that is gone with its last counts (sock_diag(7)). Which of them matter, and what the
//! counts are for, is the caller's.
mod message;

use std::{
    collections::VecDeque,
    io::{self, IoSliceMut},
    mem,
    net::{Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
    sync::{Mutex, PoisonError},
};

use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvmsg, sendto, setsockopt,
            socket, sockopt,
        },
        time::{TimeVal, TimeValLike},
    },
};
use tokio::io::{Interest, unix::AsyncFd};

use self::message::{Answer, Kind, answers, canonical, failure, request};
pub use self::message::{DiagSocket, SocketId};
use super::{netns::Netns, tcp_info::TcpState, watched::watched};

/// Asks about the sockets of one namespace, and ends them.
///
/// The kernel takes the lock of every socket that it tells of or ends (tcp_get_info, tcp_abort), and a process may hold that of
/// its own for as long as it likes, sending from memory that does not come, say. So no thread asks that others depend on.
#[derive(Debug)]
pub struct Diag {
    socket: Mutex<Asker>,
}

impl Diag {
    pub fn open(netns: &Netns) -> io::Result<Self> {
        let socket = netns.run(|| netlink(SockFlag::empty()))??;
        // The kernel answers within the call that asks; should one not, it must not hold the caller for good.
        setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(1))?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        Ok(Self { socket: Mutex::new(Asker { socket, sequence: 0 }) })
    }

    /// The connection between two addresses; of a v4-mapped one either form will do. In TIME_WAIT it is found too, without counts.
    pub fn find(&self, local: SocketAddr, remote: SocketAddr) -> io::Result<Option<DiagSocket>> {
        let wanted = SocketId { local, remote, cookie: 0 };
        let mut found = None;
        match self.ask(Kind::Find, &wanted, ANY_STATE, |socket| found = Some(socket)) {
            Err(error) if gone(&error) => return Ok(None),
            result => result?,
        }
        // Where there is no such connection the kernel tells of a listener that would take one.
        let same = |socket: &DiagSocket| canonical(&socket.id) == canonical(&wanted);
        Ok(found.filter(|socket| socket.state != TcpState::LISTENING && same(socket)))
    }

    /// All connections. Those that were reset and are still held by a process are in none of the kernel's tables any more.
    pub fn all(&self) -> io::Result<Vec<DiagSocket>> {
        let mut sockets = Vec::new();
        for any in [SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0)), SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0))] {
            let id = SocketId { local: any, remote: any, cookie: 0 };
            self.ask(Kind::Dump, &id, CONNECTED, |socket| {
                // What is left of a socket in TIME_WAIT is shown as FIN_WAIT2 while the peer has not closed.
                if socket.counts.is_some() {
                    sockets.push(socket);
                }
            })?;
        }
        Ok(sockets)
    }

    /// Ends the connection at once: RST to the peer, ECONNABORTED to whoever holds it. `false` if it is gone already.
    pub fn destroy(&self, id: &SocketId) -> io::Result<bool> {
        match self.ask(Kind::Destroy, id, ANY_STATE, |_| {}) {
            Ok(()) => Ok(true),
            Err(error) if gone(&error) => Ok(false),
            // Also the word of older kernels for TIME_WAIT.
            Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => match self.find(id.local, id.remote)? {
                Some(socket) if socket.counts.is_some() => Err(error),
                _ => Ok(false),
            },
            Err(error) => Err(error),
        }
    }

    fn ask(&self, kind: Kind, id: &SocketId, states: u32, found: impl FnMut(DiagSocket)) -> io::Result<()> {
        self.socket.lock().unwrap_or_else(PoisonError::into_inner).ask(kind, id, states, found)
    }
}

/// What `Destruction` tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The socket is gone from the kernel, after the last process had closed it and the connection had ended or entered TIME_WAIT.
    /// It is known by its cookie: its addresses may be blank. Listeners and sockets that never connected are told of as well.
    Destroyed(Box<DiagSocket>),
    /// More came than was taken in time: some sockets that are gone by now are so without a word. From here on none are missed again.
    Lost,
}

/// Hears of every TCP socket of one namespace that is destroyed.
#[derive(Debug)]
pub struct Destruction {
    socket: AsyncFd<OwnedFd>,
    waiting: VecDeque<Event>,
    lost: bool,
}

impl Destruction {
    /// From its return on, nothing is missed but what `Lost` tells of. To be called within a tokio runtime.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        // Makes the kernel load what it answers with, if that is a module: a notification without it would be dropped. A question for
        // sockets in no state is answered without looking at any.
        let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
        Diag::open(netns)?.ask(Kind::Dump, &SocketId { local: any, remote: any, cookie: 0 }, 0, |_| {})?;
        let socket = netns.run(|| netlink(SockFlag::SOCK_NONBLOCK))??;
        // A burst of closes must fit. Forced, which root may; where it is refused, the kernel's default serves.
        let _ = setsockopt(&socket, sockopt::RcvBufForce, &QUEUE);
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, DESTROYED_V4 | DESTROYED_V6))?;
        let socket = watched(socket, Interest::READABLE)?;
        Ok(Self { socket, waiting: VecDeque::new(), lost: false })
    }

    /// Waits for the next one. Nothing is lost if the future is dropped.
    pub async fn next(&mut self) -> io::Result<Event> {
        loop {
            if let Some(event) = self.waiting.pop_front() {
                return Ok(event);
            }
            let mut ready = self.socket.readable().await?;
            // Each pod has one of these, and most have nothing to tell: the buffer is the thread's.
            let waiting = &mut self.waiting;
            match ready.try_io(|socket| take(socket.get_ref(), waiting)) {
                // Once its queue has run over the kernel drops everything until it is empty (af_netlink.c, netlink_rcv_wake): told before
                // then, the loss would not be over.
                Err(_would_block) if mem::take(&mut self.lost) => return Ok(Event::Lost),
                Err(_would_block) => {}
                Ok(Ok(())) => {}
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => self.lost = true,
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Err(error),
            }
        }
    }
}

fn take(socket: &OwnedFd, waiting: &mut VecDeque<Event>) -> io::Result<()> {
    let mut buffer = [0; BUFFER];
    waiting.extend(answers(receive(socket, &mut buffer)?).filter_map(|(_, answer)| match answer {
        Answer::Socket(socket) => Some(Event::Destroyed(socket)),
        _ => None,
    }));
    Ok(())
}

const ANY_STATE: u32 = u32::MAX;
/// Every state but those that are no connection of a process: SYN_RECV (its request socket), TIME_WAIT, CLOSE and LISTEN.
const CONNECTED: u32 = 0b1011_0011_0110;
/// Bits of `SKNLGRP_INET_TCP_DESTROY` and `SKNLGRP_INET6_TCP_DESTROY` (include/uapi/linux/sock_diag.h). v4-mapped sockets are in the latter.
const DESTROYED_V4: u32 = 1 << 0;
const DESTROYED_V6: u32 = 1 << 2;
/// The kernel fills no more than this at once.
const BUFFER: usize = 32 << 10;
/// Room for some 4,000 notifications: the kernel doubles it, and each takes about 1 KiB.
const QUEUE: usize = 2 << 20;

#[derive(Debug)]
struct Asker {
    socket: OwnedFd,
    sequence: u32,
}

impl Asker {
    /// One question and its whole answer.
    fn ask(&mut self, kind: Kind, id: &SocketId, states: u32, mut found: impl FnMut(DiagSocket)) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let bytes = request(kind, self.sequence, id, states);
        sendto(self.socket.as_raw_fd(), &bytes, &NetlinkAddr::new(0, 0), MsgFlags::empty())?;
        let mut buffer = vec![0; BUFFER];
        loop {
            let datagram = match receive(&self.socket, &mut buffer) {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                result => result?,
            };
            // Answers to a question that was given up are passed over.
            for (_, answer) in answers(datagram).filter(|(sequence, _)| *sequence == self.sequence) {
                match answer {
                    Answer::Socket(socket) => {
                        found(*socket);
                        if kind == Kind::Find {
                            return Ok(());
                        }
                    }
                    Answer::Done | Answer::Error(0) => return Ok(()),
                    Answer::Error(error) => return Err(failure(error)),
                    Answer::Other => {}
                }
            }
        }
    }
}

fn netlink(flags: SockFlag) -> nix::Result<OwnedFd> {
    let flags = flags | SockFlag::SOCK_CLOEXEC;
    socket(AddressFamily::Netlink, SockType::Datagram, flags, SockProtocol::NetlinkSockDiag)
}

/// One datagram of the kernel's. A process that rules its namespace can send some as well: those are taken for empty.
fn receive<'b>(socket: &OwnedFd, buffer: &'b mut [u8]) -> io::Result<&'b [u8]> {
    let (length, by_kernel) = {
        let mut iov = [IoSliceMut::new(buffer)];
        let message = recvmsg::<NetlinkAddr>(socket.as_raw_fd(), &mut iov, None, MsgFlags::empty())?;
        (message.bytes, message.address.is_some_and(|from| from.pid() == 0))
    };
    Ok(if by_kernel { buffer.get(..length).unwrap_or_default() } else { &[] })
}

/// The socket is not there, or another one has its addresses now.
fn gone(error: &io::Error) -> bool {
    error.raw_os_error().is_some_and(|code| matches!(Errno::from_raw(code), Errno::ENOENT | Errno::ESTALE))
}
