//! The frame around a scenario: it needs root, it gets a cluster, and when it fails the agents' logs are part of the failure.

use anyhow::{Context, Result, ensure};

use crate::cluster::{Cluster, ClusterSpec};

/// Makes the cluster, starts both agents, and runs the scenario on it.
pub fn on_mesh(spec: &ClusterSpec, scenario: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    on_network(spec, |cluster| {
        cluster.start_agents()?;
        scenario(cluster)
    })
}

/// Makes the cluster without agents and runs the scenario on it.
pub fn on_network(spec: &ClusterSpec, scenario: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    ensure!(nix::unistd::geteuid().is_root(), "network namespaces and eBPF need root; way out: run it with sudo");
    let mut cluster = Cluster::create(spec).context("making the cluster")?;
    let outcome = scenario(&mut cluster);
    // Whatever a step attached has been said already; a failed expectation comes without the logs.
    outcome.with_context(|| cluster.report())
}
