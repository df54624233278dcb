//! Hands a notify descriptor to the keeper, in the form of OCI runtimes. In two steps, because whoever is under the filter
//! must not connect any more.

use std::{
    io::{self, Read},
    os::{fd::BorrowedFd, unix::net::UnixStream},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{Container, seccomp_socket, serve::TAKEN};
use crate::sys::pass;

/// The keeper does nothing but this.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum OfferError {
    #[error("no keeper answers at {}; is `marline keeper` running?", path.display())]
    Absent { path: PathBuf, source: io::Error },
    #[error("the keeper did not take the filter's descriptor")]
    Lost(#[source] io::Error),
    #[error("the keeper refused the filter's descriptor: {0}")]
    Refused(String),
}

/// A connection on which a descriptor can be handed over.
#[derive(Debug)]
pub struct Offer(UnixStream);

impl Offer {
    pub fn connect(dir: &Path) -> Result<Self, OfferError> {
        let path = seccomp_socket(dir);
        let stream = UnixStream::connect(&path).map_err(|source| OfferError::Absent { path, source })?;
        stream.set_read_timeout(Some(PATIENCE)).map_err(OfferError::Lost)?;
        Ok(Self(stream))
    }

    /// Returns when the keeper holds it.
    pub fn hand_over(&self, descriptor: BorrowedFd<'_>, container: &Container) -> Result<(), OfferError> {
        let Container { pid, id, metadata } = container;
        let state = serde_json::json!({
            "ociVersion": "1.0.2", "fds": ["seccompFd"], "pid": pid, "metadata": metadata,
            "state": { "ociVersion": "1.0.2", "id": id, "status": "running", "pid": pid, "bundle": "" },
        });
        let text = state.to_string();
        let sent = pass::send(&self.0, text.as_bytes(), &[descriptor]).map_err(OfferError::Lost)?;
        if sent != text.len() {
            return Err(OfferError::Lost(io::ErrorKind::WriteZero.into()));
        }
        let mut answer = Vec::new();
        (&self.0).take(512).read_to_end(&mut answer).map_err(OfferError::Lost)?;
        match answer.split_first() {
            Some((&TAKEN, _)) => Ok(()),
            Some((_, why)) => Err(OfferError::Refused(String::from_utf8_lossy(why).into_owned())),
            None => Err(OfferError::Lost(io::ErrorKind::UnexpectedEof.into())),
        }
    }
}
