//! The Helm chart, and what is rendered from it into `deploy/manifests`. Helm itself is the caller's to bring.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{process::succeed, wait::seconds};

/// Each file and the options that give it. The kinds of Istio's are apart: what is applied without Helm would replace those of a cluster.
pub const MANIFESTS: [(&str, &[&str]); 3] = [
    ("marline.yaml", &["--set", "crds.install=false"]),
    ("istio-crds.yaml", &["--show-only", "templates/crds.yaml"]),
    ("uninstall.yaml", &["--set", "cni.uninstall=true", "--show-only", "templates/agent.yaml"]),
];
/// The chart has to be told a registry. No runtime takes this one, so nobody mistakes it for an image of ours.
const REPOSITORY: &str = "image.repository=YOUR-REGISTRY/marline";

#[must_use]
pub fn manifests() -> PathBuf {
    deploy().join("manifests")
}

/// What Helm would send to a cluster of which it knows nothing.
pub fn render(helm: &Path, options: &[&str]) -> Result<String> {
    succeed(template(helm).args(["--set", REPOSITORY]).args(options), seconds(60))
}

/// Helm, with the chart and nothing that it has to be told.
#[must_use]
pub fn template(helm: &Path) -> Command {
    let mut command = Command::new(helm);
    command.args(["template", "marline"]).arg(deploy().join("chart/marline")).args(["--namespace", "marline-system"]);
    command
}

/// The capabilities that the manifests add to a container of the agent's pod: `agent` or `cni`.
pub fn capabilities(container: &str) -> Result<Vec<String>> {
    let text = fs::read_to_string(manifests().join("marline.yaml"))?;
    let (_, found) =
        text.split_once(&format!("        - name: {container}\n")).context("there is no such container")?;
    let (_, added) = found.split_once(" add:\n").context("no capability is added")?;
    let lines = added.lines().map(str::trim).take_while(|line| line.starts_with('#') || line.starts_with("- "));
    Ok(lines.filter_map(|line| line.strip_prefix("- ")).map(str::to_owned).collect())
}

fn deploy() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy")
}
