//! What clusters are made of: sides, families, pods, and the plans for them. Making them is `cluster`'s.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    config::{Extra, Mode, NAMESPACE, TRUST_DOMAIN},
    process::{Filter, Place, Process},
};

/// One of the two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    A,
    B,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    #[must_use]
    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    pub(super) fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// What the agents are told about a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Membership {
    /// Enrolled by its node's agent.
    Mesh,
    /// Known to all and labelled `marline.io/mesh: disabled`: never enrolled.
    Outside,
    /// All believe that it is in the mesh, and no agent holds it: the place for impostors.
    Impostor,
    /// No agent has heard of it.
    Unknown,
}

/// What to make a pod from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodSpec {
    pub name: String,
    pub side: Side,
    pub membership: Membership,
}

impl PodSpec {
    pub fn new(name: &str, side: Side, membership: Membership) -> Self {
        Self { name: name.to_owned(), side, membership }
    }
}

/// A pod that is there.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    pub side: Side,
    pub membership: Membership,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub place: Place,
    /// For the files of what runs in it.
    pub directory: PathBuf,
}

impl Pod {
    #[must_use]
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    #[must_use]
    pub fn socket(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(family), port)
    }

    /// The identity that this pod must be known by.
    #[must_use]
    pub fn identity(&self) -> String {
        format!("spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{}", self.name)
    }

    /// This pod with everything that is started in it under the filter that direct paths need.
    #[must_use]
    pub fn filtered(mut self, filter: Filter) -> Self {
        self.place.filter = Some(filter);
        self
    }

    /// A command to run in this pod.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        self.place.command(program)
    }

    /// Runs a program to its end, whatever that is.
    pub fn output(&self, program: &str, arguments: &[&str], limit: Duration) -> Result<Output> {
        crate::process::output(self.command(program).args(arguments), limit)
            .with_context(|| format!("{program} in {}", self.name))
    }

    /// Runs a program that has to succeed and gives what it wrote to standard output.
    pub fn succeed(&self, program: &str, arguments: &[&str], limit: Duration) -> Result<String> {
        crate::process::succeed(self.command(program).args(arguments), limit)
            .with_context(|| format!("{program} in {}", self.name))
    }

    /// Starts a program that runs until it is stopped, and waits until it listens on the port.
    pub fn serve(&self, name: &str, command: &mut Command, port: u16) -> Result<Process> {
        let log = self.directory.join(format!("{name}.log"));
        let mut process = Process::start(format!("{name} in {}", self.name), command, &log)?;
        process.listens(&self.place.netns, port)?;
        Ok(process)
    }
}

/// What to make a cluster from.
#[derive(Clone, Debug)]
pub struct ClusterSpec {
    pub mode: Mode,
    pub pods: Vec<PodSpec>,
    /// More lines for `AgentConfig.spec` on both nodes.
    pub extra: Extra,
    /// Whether there are direct paths: a keeper on each node, for the programs of pods from `Cluster::filtered`.
    pub direct: Option<Direct>,
    /// How long workloads' certificates live, if not as long as is usual.
    pub leaf_lifetime: Option<String>,
    /// Fields of `AgentConfig.spec.ca`, where certificates do not come from the cluster's directory of a CA. Paths are relative to each node's
    /// configuration.
    pub certificates: Option<Extra>,
    /// The agent's program, if it is not the one that `agent::binary` finds.
    pub program: Option<PathBuf>,
    /// Set where agents are what a DaemonSet's are: each in a container, and in a cgroup of its own below the one that it captures.
    pub agents_are_pods: Option<AgentPod>,
}

impl ClusterSpec {
    /// A client and a server in the mesh on each node, and a pod outside of it on node a.
    #[must_use]
    pub fn pairs(mode: Mode) -> Self {
        let pods = vec![
            PodSpec::new("client-a", Side::A, Membership::Mesh),
            PodSpec::new("server-a", Side::A, Membership::Mesh),
            PodSpec::new("outside", Side::A, Membership::Outside),
            PodSpec::new("client-b", Side::B, Membership::Mesh),
            PodSpec::new("server-b", Side::B, Membership::Mesh),
        ];
        Self {
            mode,
            pods,
            extra: Vec::new(),
            direct: None,
            leaf_lifetime: None,
            certificates: None,
            program: None,
            agents_are_pods: None,
        }
    }

    /// No connection is made before a program asks for it: for whoever counts those on the wire.
    #[must_use]
    pub fn without_spares(mut self) -> Self {
        self.extra.push("  spareConnections: off".to_owned());
        self
    }
}

/// How agents get into their containers.
#[derive(Clone, Debug)]
pub struct AgentPod {
    /// The program that makes them: `container` of this crate.
    pub maker: PathBuf,
    /// The image, unpacked, if they are not to have this machine's /usr.
    pub root: Option<PathBuf>,
    /// As the manifests have them.
    pub capabilities: Vec<String>,
}

/// What the agents are told about direct paths, beside where the keeper is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Direct {
    /// How long a connect may be held back for a handshake.
    pub hold: String,
    /// More lines for `AgentConfig.spec.direct`.
    pub extra: Extra,
}

impl Default for Direct {
    /// So long that a slow machine alone sends no connection the other way.
    fn default() -> Self {
        Self { hold: "10s".to_owned(), extra: Vec::new() }
    }
}
