//! `cargo xtask demo --rotate`: leaf, intermediate and root are replaced while connections are made, and the connections are counted.
//! What is done is the harness's (`marline_tests::rotation`); here it is told, and judged.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use marline_tests::{
    cluster::{Cluster, ClusterSpec},
    config::Mode,
    rotation::{LEAF_LIFETIME, rotate},
};

use super::clean_up_when_interrupted;
use crate::{
    deps::{self, need},
    signals::Signals,
    step::{self, Step},
};

pub(super) const NEEDS: [deps::Need; 3] =
    [need("ip", "iproute2"), need("nsenter", "util-linux"), need("python3", "python3")];

/// Returns the exit code: 0 if nothing failed and what should be refused was.
pub(super) fn run(json: Option<&Path>) -> Result<i32> {
    let signals = Signals::take()?;
    let step = Step::begin("making two nodes with their pods, with certificates that live for seconds")
        .way_out("cargo xtask down, then try again");
    let spec = ClusterSpec { leaf_lifetime: Some(LEAF_LIFETIME.to_owned()), ..ClusterSpec::pairs(Mode::Strict) };
    let mut cluster = Cluster::create(&spec).map_err(|error| step.fail(format!("{error:#}")))?;
    clean_up_when_interrupted(signals, vec![cluster.name().to_owned()]);
    let step = Step::begin("starting an agent on each node").way_out("the agents' logs above tell why");
    cluster.start_agents().map_err(|error| step.fail(format!("{error:#}\n{}", cluster.report())))?;
    step::say("rotating, while client-a connects to server-b again and again");
    let outcome = rotate(&cluster, step::note).map_err(|error| {
        Step::quiet("the rotation").way_out("the agents' logs are above").fail(format!("{}{error:#}", cluster.report()))
    })?;
    if let Some(file) = json {
        let text = serde_json::to_string_pretty(&outcome)?;
        fs::write(file, text).with_context(|| format!("cannot write {}", file.display()))?;
    }
    println!(
        "{} connections, {} failed; {} certificates were made; a connection of the old root was {}, one of the new root {}",
        outcome.connections,
        outcome.failures,
        outcome.certificates,
        if outcome.old_connection_reset { "reset with it" } else { "NOT reset" },
        if outcome.new_connection_lives { "goes on" } else { "was ENDED" },
    );
    let faults = outcome.faults();
    for fault in &faults {
        println!("not as it should be: {fault}");
    }
    if !faults.is_empty() {
        eprintln!("{}", cluster.report());
    }
    Ok(i32::from(!faults.is_empty()))
}
