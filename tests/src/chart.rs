//! The Helm chart, and what is rendered from it into `deploy/manifests`. Helm itself is the caller's to bring.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{process::succeed, wait::seconds};

/// Each file and the options that give it. The kinds of Istio's are apart: what is applied without Helm would replace those of a cluster.
pub const MANIFESTS: [(&str, &[&str]); 2] =
    [("marline.yaml", &["--set", "crds.install=false"]), ("istio-crds.yaml", &["--show-only", "templates/crds.yaml"])];

#[must_use]
pub fn manifests() -> PathBuf {
    deploy().join("manifests")
}

/// What Helm would send to a cluster of which it knows nothing.
pub fn render(helm: &Path, options: &[&str]) -> Result<String> {
    let mut command = Command::new(helm);
    command.args(["template", "marline"]).arg(deploy().join("chart/marline")).args(["--namespace", "marline-system"]);
    succeed(command.args(options), seconds(60))
}

/// The capabilities of the agent's container: the only ones that the manifests add.
pub fn agents_capabilities() -> Result<Vec<String>> {
    let text = fs::read_to_string(manifests().join("marline.yaml"))?;
    let (_, added) = text.split_once(" add:\n").context("no container of the manifests adds a capability")?;
    let lines = added.lines().map(str::trim).take_while(|line| line.starts_with('#') || line.starts_with("- "));
    Ok(lines.filter_map(|line| line.strip_prefix("- ")).map(str::to_owned).collect())
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}
