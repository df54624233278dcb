//! What an agent tells of itself at `/status`: facts, without a judgement. `marline status` judges them, and says what to do. Fields are
//! added, and not renamed or taken away: scripts read them.

use std::{net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub pid: u32,
    /// Seconds since 1970.
    pub started: u64,
    /// Why `/readyz` says no, if it does.
    pub not_ready: Option<String>,
    pub kernel: Kernel,
    pub capture: Capture,
    pub pods: Vec<Pod>,
    pub keeper: Keeper,
    pub authority: Authority,
    /// As `/certs` lists them.
    pub certificates: Vec<Certificate>,
    pub configuration: Configuration,
    /// The API server, if resources come from there and not from the directory.
    #[serde(default)]
    pub source: Option<Source>,
    pub listeners: Listeners,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kernel {
    /// `uname -r`.
    pub release: String,
    /// What kernel TLS can do, by trying; none if it is not there.
    pub suites: Vec<String>,
    /// `splice` or `copy`.
    pub pump: String,
    /// What the probe found.
    pub why: String,
    /// `spec.records.mode`.
    pub records: String,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Capture {
    pub cgroup: PathBuf,
    /// What is wrong with the cgroup, if something is.
    pub cgroup_fault: Option<String>,
    pub pin_path: PathBuf,
    pub hooks: Vec<Hook>,
    pub maps: Vec<Map>,
}

/// A kernel program that should be in force.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Hook {
    pub name: String,
    pub target: PathBuf,
    /// Why it is not, if it is not.
    pub fault: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Map {
    pub name: String,
    pub entries: u64,
    pub capacity: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pod {
    pub namespace: String,
    pub name: String,
    pub identity: String,
    pub netns: PathBuf,
    /// `ready` or `refused`.
    pub state: String,
    /// Why it is refused; of one that is ready, what is the matter with it all the same.
    pub reason: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Keeper {
    /// `auto` or `off`, as `spec.direct.mode`.
    pub mode: String,
    pub directory: Option<PathBuf>,
    pub connected: bool,
    /// Whether this kernel can have direct connections at all.
    pub usable: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Authority {
    /// Where certificates come from: a directory, an address, or a socket.
    pub source: String,
    /// Why its files (or words), as they are now, are not taken, if they are not.
    pub refusal: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Certificate {
    pub id: String,
    pub state: String,
    pub not_after: Option<u64>,
    pub seconds_to_expiry: Option<i64>,
    pub last_error: Option<String>,
    #[serde(default)]
    pub source: serde_json::Value,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Configuration {
    pub directory: PathBuf,
    pub generation: u64,
    /// The mesh-wide mTLS mode.
    pub mode: String,
    pub workloads: usize,
    /// What became of the last change, or of the files at the start.
    pub reload: Reload,
    pub warnings: Vec<String>,
    /// Fields of AgentConfig that have changed and wait for a restart.
    pub restart: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reload {
    /// Seconds since 1970.
    pub at: u64,
    pub accepted: bool,
    /// Why not.
    pub errors: Vec<String>,
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Source {
    pub node: String,
    /// Whether everything was listed once. Before that the agent knows of no pod.
    pub ready: bool,
    /// What was not listed yet.
    pub waiting: Vec<String>,
    /// Why the API server is not heard of, if it is not: what is known stays in force meanwhile.
    pub away: Option<String>,
    /// Since when it is heard of, or not; seconds since 1970.
    pub since: u64,
    /// Kinds that the cluster does not have.
    pub absent: Vec<String>,
    /// Pods of the whole cluster that have addresses of their own.
    pub pods: usize,
    /// Pods of this node that belong into the mesh and are not captured, because nobody has told where they run.
    pub not_captured: Vec<String>,
    /// Pods of this node in the node's own network, which are left alone.
    pub host_network: Vec<String>,
    /// Pods of this node that are captured and have run uncaptured before.
    #[serde(default)]
    pub late: Vec<String>,
    /// Why pods start without the CNI plugin, if they do and this agent looks at it.
    #[serde(default)]
    pub cni_fault: Option<String>,
    /// The kubelet's cgroup, by which its probes are known.
    #[serde(default)]
    pub kubelet: Option<PathBuf>,
    /// Why its probes are refused as anybody's plaintext would be, if they are.
    #[serde(default)]
    pub kubelet_fault: Option<String>,
    /// How many pods of this node declare ports for it.
    #[serde(default)]
    pub probed: usize,
    /// Objects that cannot be read, and deny until they can.
    pub errors: Vec<String>,
    pub warnings: Vec<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Listeners {
    pub admin: SocketAddr,
    pub metrics: SocketAddr,
    pub readiness: SocketAddr,
}
