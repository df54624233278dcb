//! The keeper: a process that holds the notify descriptors of the pods' seccomp filters, so that with the agent gone a pod's
//! calls wait instead of failing, and an agent's successor gets the descriptors back.
//!
//! This file has what both sides know: names, errors, the container. `state` reads what OCI runtimes send, `serve` is the
//! process, `link` the agent's side of it, `ledger` the memory that tells the keeper what a dead agent has left unanswered,
//! and `offer` hands a descriptor in, as `marline run` does. What is answered to calls is the agent's matter.

pub mod closer;
mod ledger;
mod link;
mod offer;
mod serve;
mod state;

use std::{
    io,
    path::{Path, PathBuf},
};

pub use link::{Held, Link, Pending, Receiver};
pub use offer::{Offer, OfferError};
use serde::{Deserialize, Serialize};
pub use serve::serve;

/// Where the keeper's sockets are, if nothing else is said.
pub const DIRECTORY: &str = "/run/marline";

/// What is known of the processes under one filter. The sender says it: a runtime or `marline run`, both root.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Container {
    /// The first process; it may have ended. 0 where the runtime has not said it, as crun does not for what it executes in a
    /// container.
    pub pid: u32,
    pub id: String,
    /// `listenerMetadata` of the seccomp profile.
    pub metadata: String,
}

#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    #[error("another keeper serves {}", .0.display())]
    Taken(PathBuf),
    #[error("cannot {what} {}", path.display())]
    Path { what: &'static str, path: PathBuf, source: io::Error },
    #[error("no keeper answers at {}; is `marline keeper` running?", path.display())]
    Absent { path: PathBuf, source: io::Error },
    #[error("the connection to the keeper failed")]
    Link(#[source] io::Error),
    #[error("the keeper speaks another version than this agent: {0}")]
    Strange(String),
    #[error("waiting for the keeper's sockets failed")]
    Wait(#[source] io::Error),
}

/// `listenerPath` of seccomp profiles.
pub fn seccomp_socket(dir: &Path) -> PathBuf {
    dir.join("seccomp.sock")
}

/// Where the agent connects.
pub fn agent_socket(dir: &Path) -> PathBuf {
    dir.join("keeper.sock")
}

/// The largest message between keeper and agent; `state` keeps containers' names well below it.
const MESSAGE: usize = 32 << 10;

/// What the keeper tells an agent, one message each, as JSON. Each brings one descriptor.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
enum ToAgent {
    /// With the ledger's memory.
    Ledger { version: u32 },
    /// With a notify descriptor.
    Held { id: u64, container: Container },
}

/// Of the messages and of the ledger's memory.
const VERSION: u32 = 1;
