//! A peer of the runtimes' socket: reads its message to the end, whatever it is, and answers with one byte and perhaps a reason.

use std::{
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

use crate::{
    keeper::{
        Container,
        state::{self, Malformed, Reading},
    },
    sys::{pass, seccomp::Listener},
};

/// The answer's first byte. Runtimes do not wait for it; `marline run` does.
pub(in crate::keeper) const TAKEN: u8 = b'+';
const REFUSED: u8 = b'-';

/// For the whole message: the sender has it at hand when it connects.
const PATIENCE: Duration = Duration::from_secs(5);
const BUFFER: usize = 32 << 10;
/// Reads before others have their turn.
const AT_ONCE: usize = 16;

pub(super) struct Sender {
    stream: UnixStream,
    pub deadline: Instant,
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

pub(super) enum Progress {
    More,
    /// It has said nothing, as a runtime does whose container fails to start.
    Silent,
    Bad(Refusal),
    Offered(Container, Listener),
}

#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    #[error(transparent)]
    Malformed(#[from] Malformed),
    #[error("the message ends in the middle")]
    Ends,
    #[error("{0} descriptors came, and the message names {1}")]
    Descriptors(usize, usize),
    #[error("more descriptors came than there is room for")]
    Many,
    #[error("the descriptor cannot be used: {0}")]
    Useless(#[source] io::Error),
    #[error("the connection failed: {0}")]
    Read(#[source] io::Error),
    #[error("the message did not come in time")]
    Late,
}

impl Sender {
    pub fn new(stream: UnixStream, now: Instant) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        Ok(Self { stream, deadline: now + PATIENCE, bytes: Vec::new(), descriptors: Vec::new() })
    }

    /// Reads what is there.
    pub fn go_on(&mut self) -> Progress {
        match self.read() {
            Ok(progress) => progress,
            Err(refusal) => Progress::Bad(refusal),
        }
    }

    /// Tells it the end; whoever has not waited for it does not hear it.
    pub fn answer(self, refusal: Option<&Refusal>) {
        let text = refusal.map_or_else(|| vec![TAKEN], |refusal| [&[REFUSED], refusal.to_string().as_bytes()].concat());
        let _ = pass::send(&self.stream, &text, &[]);
    }

    fn read(&mut self) -> Result<Progress, Refusal> {
        let mut buffer = vec![0; BUFFER];
        for _ in 0..AT_ONCE {
            let message = match pass::recv(&self.stream, &mut buffer) {
                Ok(message) => message,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Progress::More),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(Progress::Silent),
                Err(error) => return Err(Refusal::Read(error)),
            };
            self.descriptors.extend(message.descriptors);
            if message.cut || self.descriptors.len() > pass::MOST {
                return Err(Refusal::Many);
            }
            if message.len == 0 {
                return if self.bytes.is_empty() { Ok(Progress::Silent) } else { Err(Refusal::Ends) };
            }
            self.bytes.extend_from_slice(&buffer[..message.len]);
            if let Reading::Done { container, index, count } = state::read(&self.bytes)? {
                if self.descriptors.len() != count {
                    return Err(Refusal::Descriptors(self.descriptors.len(), count));
                }
                let descriptor = self.descriptors.swap_remove(index);
                return Ok(Progress::Offered(container, Listener::new(descriptor).map_err(Refusal::Useless)?));
            }
        }
        Ok(Progress::More)
    }
}

impl AsFd for Sender {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
