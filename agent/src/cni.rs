//! The CNI plugin, and what there is of it in an agent. A container runtime calls the plugin for every pod of a node before the pod's programs
//! start, and lets none start that the plugin has refused: so a pod is captured before it can connect.
//!
//! The plugin is the same binary: `protocol` is what a runtime says and hears, `plugin` one call, `client` asks the agent over the
//! socket that `server` serves in it, in the words of `wire`. `chain` and `install` put it into a node's CNI configuration, `records` and
//! `cgroups` tell an agent of pods from before it started. Which pods are in the mesh and whether they are captured is `app`'s to answer.

pub mod cgroups;
pub mod chain;
pub mod client;
pub mod install;
pub mod plugin;
pub mod protocol;
pub mod records;
pub mod server;
pub mod wire;

use std::{io, path::PathBuf};

/// The plugin's file, and `type` in a CNI configuration.
pub const NAME: &str = "marline-cni";
/// Where the agent listens for the plugin, if nothing else is said.
pub const SOCKET: &str = "/run/marline/cni.sock";
/// Where the agent keeps what it was told of pods, if nothing else is said. Gone with a reboot, as the pods' namespaces are.
pub const RECORDS: &str = "/run/marline/pods";

#[derive(Debug, thiserror::Error)]
pub enum CniError {
    #[error("{what} {}", path.display())]
    Path { what: &'static str, path: PathBuf, source: io::Error },
    #[error("{}: {why}", path.display())]
    Configuration { path: PathBuf, why: String },
    #[error(
        "there is no CNI configuration in {}: install a CNI first, or wait for it with --watch; Marline's plugin goes after it in the chain", .0.display()
    )]
    Nothing(PathBuf),
    #[error("this program's own file")]
    Program(#[source] io::Error),
}

impl CniError {
    fn path(what: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Path { what, path, source }
    }
}
