//! What plugin and agent say to each other: one line of JSON each way, then the connection ends. The socket is root's alone.

use std::{net::IpAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

/// The longest line that is read.
pub const LINE: u64 = 256 << 10;

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
pub enum Request {
    Add(Attachment),
    Check(Attachment),
    Del(Gone),
    Gc {
        /// All that the runtime has, of this network.
        network: String,
        valid: Vec<Valid>,
    },
    Status,
}

/// A pod's sandbox that has an interface now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attachment {
    pub network: String,
    pub container: String,
    pub interface: String,
    pub netns: PathBuf,
    /// By what the kubelet says, to look the pod up. Who it is, the API server says.
    pub pod: PodRef,
    /// That the plugins before this one have given it.
    pub addresses: Vec<IpAddr>,
    /// For so long the plugin waits.
    pub wait_ms: u64,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PodRef {
    pub namespace: String,
    pub name: String,
    /// Not all runtimes tell it.
    pub uid: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gone {
    pub container: String,
    pub uid: Option<String>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Valid {
    #[serde(alias = "containerID")]
    pub container: String,
    #[serde(alias = "ifname")]
    pub interface: String,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "lowercase")]
pub enum Answer {
    /// The pod is captured: enrolled, tested and served.
    Captured,
    /// The API server says that the pod is not in the mesh, or in the node's own network.
    Outside,
    /// Done, or all is well.
    Done,
    /// Not now; it may go well when it is tried again.
    Later { why: String },
    /// It does not get better by itself.
    Refused { why: String },
}
