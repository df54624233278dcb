//! Waiting for files that stay somebody else's.
//!
//! An epoll instance keeps an interest in a file, not a hold on it: the registration lasts while anybody has the file open and goes
//! with its last descriptor (epoll(7)). So a listener can be waited for without keeping its port in use.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
};

use nix::{
    errno::Errno,
    sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout},
};
use tokio::io::{Interest, unix::AsyncFd};

use super::watched::watched;

const BURST: usize = 64;

/// Files of others, and the tokens by which they are told apart.
#[derive(Debug)]
pub struct Wakeups(AsyncFd<OwnedFd>, Epoll);

impl Wakeups {
    pub fn new() -> io::Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        let seen = epoll.0.try_clone()?;
        Ok(Self(watched(seen, Interest::READABLE)?, epoll))
    }

    /// From now on `next` tells the token whenever the file becomes readable, and once if it is so already. The descriptor may be
    /// closed at once. A file that is added twice may be told twice.
    pub fn add(&self, file: impl AsFd, token: u64) -> io::Result<()> {
        let event = EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLET, token);
        match self.1.add(file, event) {
            Ok(()) | Err(Errno::EEXIST) => Ok(()),
            Err(error) => Err(error.into()),
        }
    }

    /// The tokens of files that have become readable.
    pub async fn next(&self) -> io::Result<Vec<u64>> {
        self.0
            .async_io(Interest::READABLE, |_| {
                let mut events = [EpollEvent::empty(); BURST];
                match self.1.wait(&mut events, EpollTimeout::ZERO)? {
                    0 => Err(io::ErrorKind::WouldBlock.into()),
                    count => Ok(events[..count].iter().map(EpollEvent::data).collect()),
                }
            })
            .await
    }
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, net::TcpStream};

    use super::*;

    #[tokio::test]
    async fn a_listener_is_waited_for_without_being_held() {
        let wakeups = Wakeups::new().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let duplicate = listener.try_clone().unwrap();
        wakeups.add(&duplicate, 7).unwrap();
        drop(duplicate);
        let _client = TcpStream::connect(address).unwrap();
        assert_eq!(wakeups.next().await.unwrap(), [7]);
        drop(listener);
        // Nobody listens any more, although the interest was never given up.
        assert!(TcpStream::connect(address).is_err());
    }
}
