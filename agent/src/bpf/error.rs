//! What can go wrong between the agent and the kernel, in words that name the way out.
use std::{io, net::IpAddr, path::PathBuf};

use crate::sys::netns::NetnsCookie;

#[derive(Debug, thiserror::Error)]
pub enum BpfError {
    #[error("this binary was built without the kernel programs: run `cargo xtask build`")]
    NoObject,
    #[error("{path}: not a cgroup2 directory; `capture.cgroup` must name the cgroup2 directory that holds the pods")]
    NotACgroup { path: PathBuf },
    #[error(
        "the agent itself is in {path}, the pods' cgroup: its own connections would be turned around to itself; start it in \
         another cgroup or in one of its own below that, or set `capture.cgroup` to one that holds only pods"
    )]
    AgentInsideCgroup { path: PathBuf },
    #[error(
        "the agent is in {path}, below the pods' cgroup, and not alone there: its own cgroup is not captured, so others in it would \
         speak in the clear; give the agent a container (or a cgroup) of its own"
    )]
    AgentNotAlone { path: PathBuf },
    #[error("{path}: not on a bpf filesystem; `capture.pinPath` must lie on one (usually below /sys/fs/bpf)")]
    NotBpffs { path: PathBuf },
    #[error(
        "{path}: no bpf filesystem, and this mount namespace is not the host's: one mounted here would vanish with the agent \
         and open the pods; mount it on the host first (mount -t bpf bpf /sys/fs/bpf)"
    )]
    PrivateMounts { path: PathBuf },
    #[error("{path}: another agent is using these pins; give each agent its own `capture.pinPath`")]
    PinsInUse { path: PathBuf },
    #[error(
        "{path}: left by another version of the agent, with another layout ({detail}); withdraw the pods with that version, or \
         remove the pins, which opens the pods"
    )]
    Layout { path: PathBuf, detail: String },
    #[error("{action} {path}")]
    File { action: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot load the kernel programs")]
    Object(#[source] aya::EbpfError),
    #[error("the kernel programs have no {kind} named {name}")]
    Missing { kind: &'static str, name: &'static str },
    #[error("cannot load the kernel program {name}")]
    Program { name: &'static str, source: aya::programs::ProgramError },
    #[error("cannot attach the kernel program {name} to {target}")]
    Attach { name: &'static str, target: PathBuf, source: aya::programs::ProgramError },
    #[error("cannot pin the link of {name}")]
    Pin { name: String, source: aya::pin::PinError },
    #[error("the map {name}")]
    Map { name: &'static str, source: aya::maps::MapError },
    #[error("the log of the kernel programs")]
    Log(#[source] aya_log::Error),
    #[error("a listener given for {netns} is not in that network namespace")]
    ForeignListener { netns: PathBuf },
    #[error(
        "the address {address} of {netns} belongs to another enrolled pod already (namespace cookie {owner}): two pods on one \
         node cannot share an address"
    )]
    AddressTaken { address: IpAddr, netns: PathBuf, owner: u64 },
    #[error("a socket's network namespace cannot be read")]
    Socket(#[source] io::Error),
    #[error("{what} is longer than the {limit} bytes that there is room for")]
    TooLong { what: &'static str, limit: usize },
    #[error("somebody else has written to the socket or connected it while the agent was at work on it")]
    Poisoned,
    #[error("no pod is enrolled under the namespace cookie {}", netns.0)]
    NotEnrolled { netns: NetnsCookie },
}

impl BpfError {
    pub(super) fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }

    pub(super) fn map(name: &'static str) -> impl FnOnce(aya::maps::MapError) -> Self {
        move |source| Self::Map { name, source }
    }
}
