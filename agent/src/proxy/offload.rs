//! Where a connection's records are sealed and opened: in the kernel where it can, else in userspace, chosen per connection and
//! said. What the kernel can is `probe`'s to find; moving the bytes is `pump`'s.

use std::{os::fd::AsFd, sync::Arc};

use rustls::SupportedCipherSuite;

use crate::tls::{
    config,
    ktls::{self, Direction, KtlsError},
    records::{Ending, Opener, RecordError, Sealer, Session},
};
use crate::words::{Mode, PumpKind};

use super::handshake::Secured;

/// Which records the operator allows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RecordsChoice {
    #[default]
    Auto,
    /// Refuse what the kernel cannot do.
    Kernel,
    Userspace,
}

/// What this kernel was seen to do.
#[derive(Debug, Clone)]
pub struct Capabilities {
    pub suites: Vec<rustls::CipherSuite>,
    pub pump: PumpKind,
    pub why: String,
}

impl Capabilities {
    pub fn none(why: impl Into<String>) -> Self {
        Self { suites: Vec::new(), pump: PumpKind::Copy, why: why.into() }
    }

    pub fn kernel(&self, suite: SupportedCipherSuite) -> bool {
        self.suites.contains(&suite.suite())
    }
}

#[derive(Debug, thiserror::Error)]
pub enum OffloadError {
    #[error("kernel TLS is demanded and this kernel does not do {suite:?}: {why}")]
    Demanded { suite: rustls::CipherSuite, why: String },
    #[error(transparent)]
    Ktls(#[from] KtlsError),
    #[error(transparent)]
    Records(#[from] RecordError),
}

/// The records of one connection's wire leg.
pub enum Records {
    /// None: the bytes go as they are.
    Plain(PumpKind),
    Kernel {
        pump: PumpKind,
        session: Arc<Session>,
    },
    Userspace {
        sealer: Box<Sealer>,
        opener: Box<Opener>,
        session: Arc<Session>,
    },
}

impl Records {
    pub fn name(&self) -> &'static str {
        match self {
            Self::Plain(_) => "plaintext",
            Self::Kernel { .. } => "ktls",
            Self::Userspace { .. } => "userspace",
        }
    }

    pub fn session(&self) -> Option<&Arc<Session>> {
        match self {
            Self::Plain(_) => None,
            Self::Kernel { session, .. } | Self::Userspace { session, .. } => Some(session),
        }
    }

    /// How the two ends tell each other that a stream is over.
    pub fn ending(&self) -> Ending {
        match self {
            Self::Plain(_) => Ending::Fin,
            Self::Kernel { session, .. } | Self::Userspace { session, .. } => session.ending,
        }
    }

    /// The name in a connection's record.
    pub fn name_in(&self, mode: Mode) -> &'static str {
        match self {
            Self::Plain(_) if mode == Mode::Mtls => "without-records",
            other => other.name(),
        }
    }

    /// Whether a socket has all that its records need in the kernel.
    pub fn kernel_keeps(&self) -> bool {
        match self {
            Self::Kernel { .. } => true,
            Self::Plain(_) => config::WITHOUT_RECORDS,
            Self::Userspace { .. } => false,
        }
    }

    pub fn pump(&self) -> PumpKind {
        match self {
            Self::Plain(pump) | Self::Kernel { pump, .. } => *pump,
            Self::Userspace { .. } => PumpKind::Copy,
        }
    }
}

/// Readies a socket on which a handshake is about to begin, where its records will be the kernel's. What this cannot do, `offload` says.
pub fn prepare(socket: impl AsFd, choice: RecordsChoice, kernel: &Capabilities) {
    if choice != RecordsChoice::Userspace && !kernel.suites.is_empty() {
        let _ = ktls::attach(&socket);
    }
}

/// Takes the keys of a handshake that is done to where the records will be.
pub fn offload(
    socket: impl AsFd,
    secured: Secured,
    choice: RecordsChoice,
    kernel: &Capabilities,
) -> Result<Records, OffloadError> {
    let Secured { suite, alpn, secrets, schedule, .. } = secured;
    if config::WITHOUT_RECORDS && config::ending(alpn.as_deref()) == Ending::Fin {
        return Ok(Records::Plain(kernel.pump));
    }
    let session = Arc::new(Session::new(suite, config::ending(alpn.as_deref()), schedule));
    let in_kernel = match choice {
        RecordsChoice::Userspace => false,
        RecordsChoice::Auto => kernel.kernel(suite) && ktls::attach(&socket).is_ok(),
        RecordsChoice::Kernel if kernel.kernel(suite) => {
            ktls::attach(&socket)?;
            true
        }
        RecordsChoice::Kernel => {
            return Err(OffloadError::Demanded { suite: suite.suite(), why: kernel.why.clone() });
        }
    };
    if in_kernel {
        // From here on there is no way back: the socket may have one direction's keys. A failure ends the connection.
        ktls::install(&socket, Direction::Transmit, suite, secrets.tx)?;
        ktls::install(&socket, Direction::Receive, suite, secrets.rx)?;
        Ok(Records::Kernel { pump: kernel.pump, session })
    } else {
        Ok(Records::Userspace {
            sealer: Box::new(Sealer::new(suite, secrets.tx)?),
            opener: Box::new(Opener::new(suite, secrets.rx)?),
            session,
        })
    }
}
