//! The configuration files of one node's agent, written from what the cluster is: Istio-style YAML in one directory.

use std::{
    fmt::Write as _,
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::{
    cluster::{Direct, Membership, Pod, Side},
    container::Container,
};

/// The namespace (of Kubernetes' kind) that all workloads of a cluster are in.
pub const NAMESPACE: &str = "demo";
pub const TRUST_DOMAIN: &str = "cluster.local";

/// The mesh-wide mTLS mode of PeerAuthentication.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Mode {
    Strict,
    Permissive,
    Disable,
}

impl Mode {
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Strict => "STRICT",
            Self::Permissive => "PERMISSIVE",
            Self::Disable => "DISABLE",
        }
    }
}

/// What a scenario may want other than the defaults in `AgentConfig.spec`: lines of YAML, already indented.
pub type Extra = Vec<String>;

/// What does not change while an agent runs.
#[derive(Clone, Debug)]
pub struct Settings {
    pub ca: PathBuf,
    /// Fields of `AgentConfig.spec.ca`, where certificates do not come from that directory.
    pub certificates: Option<Extra>,
    pub leaf_lifetime: Option<String>,
    pub cgroup: PathBuf,
    pub pins: PathBuf,
    pub access_log: PathBuf,
    pub extra: Extra,
    /// Whether there are direct paths, and the keeper's directory.
    pub direct: Option<(Direct, PathBuf)>,
    /// The agent's program, if it is not the one that `agent::binary` finds.
    pub program: Option<PathBuf>,
    /// The container that the agent is to be in, and the program that makes it.
    pub container: Option<(PathBuf, Container)>,
}

impl Settings {
    pub fn binary(&self) -> Result<PathBuf> {
        self.program.clone().map_or_else(crate::agent::binary, Ok)
    }
}

/// Writes `agent.yaml`.
pub fn write_agent(directory: &Path, settings: &Settings) -> Result<()> {
    let certificates = match &settings.certificates {
        Some(lines) => lines.iter().map(|line| format!("    {line}\n")).collect(),
        None => format!("    path: {}\n", settings.ca.display()),
    };
    let mut text = format!(
        "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nmetadata:\n  name: agent\nspec:\n  trustDomain: {TRUST_DOMAIN}\n  \
         ca:\n{certificates}    leafLifetime: {}\n  capture:\n    cgroup: {}\n    pinPath: {}\n  admin:\n    address: 127.0.0.1:15000\n  metrics:\n    \
         address: 0.0.0.0:15020\n  readiness:\n    address: 0.0.0.0:15021\n  accessLog:\n    path: {}\n    format: json\n",
        settings.leaf_lifetime.as_deref().unwrap_or("24h"),
        settings.cgroup.display(),
        settings.pins.display(),
        settings.access_log.display(),
    );
    for line in &settings.extra {
        writeln!(text, "{line}")?;
    }
    if let Some((direct, keeper)) = &settings.direct {
        let hold = &direct.hold;
        writeln!(text, "  direct:\n    mode: auto\n    keeper: {}\n    hold: {hold}", keeper.display())?;
        for line in &direct.extra {
            writeln!(text, "{line}")?;
        }
    }
    replace(&directory.join("agent.yaml"), &text)
}

/// Writes `mode.yaml`: the mesh-wide PeerAuthentication.
pub fn write_mode(directory: &Path, mode: Mode) -> Result<()> {
    let text = format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: default\n  namespace: istio-system\n\
         spec:\n  mtls:\n    mode: {}\n",
        mode.as_str()
    );
    replace(&directory.join("mode.yaml"), &text)
}

/// Writes `workloads.yaml`: all pods that the agent of this node knows of.
pub fn write_workloads<'a>(directory: &Path, node: Side, pods: impl Iterator<Item = &'a Pod>) -> Result<()> {
    replace(&directory.join("workloads.yaml"), &workloads(node, pods)?)
}

fn workloads<'a>(node: Side, pods: impl Iterator<Item = &'a Pod>) -> Result<String> {
    let mut text = String::new();
    for pod in pods.filter(|pod| pod.membership != Membership::Unknown) {
        for (family, address) in [("v4", pod.v4.to_string()), ("v6", pod.v6.to_string())] {
            let name = &pod.name;
            write!(
                text,
                "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: {name}-{family}\n  \
                 namespace: {NAMESPACE}\n"
            )?;
            if pod.side == node && matches!(pod.membership, Membership::Mesh | Membership::Outside) {
                writeln!(text, "  annotations:\n    marline.io/netns: {}", pod.place.netns.display())?;
            }
            writeln!(text, "spec:\n  address: \"{address}\"\n  serviceAccount: {name}\n  labels:\n    app: {name}")?;
            if pod.membership == Membership::Outside {
                writeln!(text, "    marline.io/mesh: disabled")?;
            }
        }
    }
    Ok(text)
}

/// Puts a file in place as a whole: a reader sees the old one or the new one.
pub fn replace(file: &Path, text: &str) -> Result<()> {
    let swap = || -> io::Result<()> {
        let fresh = file.with_extension("new");
        fs::write(&fresh, text)?;
        fs::rename(&fresh, file)
    };
    swap().with_context(|| format!("writing {}", file.display()))
}
