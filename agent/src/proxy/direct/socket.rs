//! An application's socket while the agent uses it: connected and read and written without waiting in the kernel, whatever mode
//! the application has chosen, and with every byte announced to the gate before it is written.

use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd, OwnedFd},
    pin::Pin,
    task::{Context, Poll, ready},
};

use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf, unix::AsyncFd};

use crate::{
    bpf::Gate,
    sys::{options, socket, watched::watched},
};

pub(super) struct Borrowed {
    socket: AsyncFd<OwnedFd>,
    gate: Gate,
    written: u64,
    /// What the application wants to have before it is told: the handshake is told of every byte.
    lowat: Option<i32>,
}

impl Borrowed {
    pub fn new(socket: OwnedFd, gate: Gate) -> io::Result<Self> {
        let lowat = options::receive_lowat(&socket)?;
        let lowat = (lowat > 1).then_some(lowat);
        if lowat.is_some() {
            options::set_receive_lowat(&socket, 1)?;
        }
        let socket = watched(socket, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { socket, gate, written: 0, lowat })
    }

    pub async fn connect(&self, to: SocketAddr) -> io::Result<()> {
        if options::connect_now(&self.socket, to)? {
            return Ok(());
        }
        let mut ready = self.socket.writable().await?;
        // Before the SYN is answered the socket is ready once, without having connected.
        loop {
            if let Some(error) = socket::take_error(&self.socket)? {
                return Err(error);
            }
            match SockRef::from(&self.socket).peer_addr() {
                // The socket learns that it is connected from one more call, which is the agent's to make: to the application it is
                // connected when connect() returns.
                Ok(_) => return options::connect_now(&self.socket, to).map(drop),
                Err(error) if error.kind() == io::ErrorKind::NotConnected => {}
                Err(error) => return Err(error),
            }
            ready.clear_ready();
            ready = self.socket.writable().await?;
        }
    }

    /// How many bytes the agent has written.
    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn gate(&self) -> &Gate {
        &self.gate
    }

    /// The runtime's hold on the socket is given up; the gate and the duplicate are left.
    pub fn into_parts(self) -> (OwnedFd, Gate) {
        let socket = self.socket.into_inner();
        if let Some(lowat) = self.lowat
            && let Err(error) = options::set_receive_lowat(&socket, lowat)
        {
            tracing::debug!(%error, "a socket's low-water mark is not as it was");
        }
        (socket, self.gate)
    }
}

impl AsFd for Borrowed {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl AsyncRead for Borrowed {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut guard = ready!(self.socket.poll_read_ready(cx))?;
            let room = buffer.initialize_unfilled();
            match guard.try_io(|inner| socket::recv(inner, room)) {
                Ok(result) => {
                    buffer.advance(result?);
                    return Poll::Ready(Ok(()));
                }
                Err(_would_block) => {}
            }
        }
    }
}

impl AsyncWrite for Borrowed {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        loop {
            let mut guard = ready!(this.socket.poll_write_ready(cx))?;
            // What an earlier, shorter write has left was announced with it.
            let ahead = usize::try_from(this.gate.announced().saturating_sub(this.written)).unwrap_or(usize::MAX);
            if let Some(more) = data.get(ahead..) {
                this.gate.announce(more).map_err(io::Error::other)?;
            }
            match guard.try_io(|inner| socket::send(inner, data)) {
                Ok(result) => {
                    let sent = result?;
                    this.written += sent as u64;
                    return Poll::Ready(Ok(sent));
                }
                Err(_would_block) => {}
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
