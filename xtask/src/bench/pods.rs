//! A node with many pods, of which nobody connects: how long its agent takes until all are served, and what it costs then. Of Marline alone:
//! a sidecar comes with each pod, and what one costs at rest is told elsewhere.

use std::{
    path::Path,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use marline_tests::{
    bench::{cpu, tasks},
    cluster::{Cluster, ClusterSpec, Membership, PodSpec, Side},
    config::Mode as Mtls,
    wait::seconds,
};

use super::{
    bed::Mode,
    plan::{Figure, PODS},
    report::Measured,
};
use crate::step;

/// How often is asked whether it is ready.
const LOOK: Duration = Duration::from_millis(2);
/// What a start leaves to be done is not rest.
const SETTLE: Duration = Duration::from_secs(2);
const REST: Duration = Duration::from_secs(5);

/// The pods, and no agent yet.
pub(super) fn prepare(agent: &Path) -> Result<Cluster> {
    let pods = (0..PODS).map(|index| PodSpec::new(&format!("pod-{index}"), Side::A, Membership::Mesh)).collect();
    Cluster::create(&ClusterSpec { pods, program: Some(agent.to_owned()), ..ClusterSpec::pairs(Mtls::Strict) })
}

/// Starts their node's agent so many times.
pub(super) fn measure(cluster: &mut Cluster, rounds: usize) -> Result<Vec<Measured>> {
    step::say(&format!("a node with {PODS} pods"));
    let (mut ready, mut memory, mut spent) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        ready.push(1e3 * start(cluster).with_context(|| cluster.report())?.as_secs_f64());
        thread::sleep(SETTLE);
        let cgroup = cluster.agent(Side::A)?.cgroup();
        memory.push(tasks::anonymous(cgroup)? as f64 / (1024.0 * 1024.0));
        let (before, since) = (cpu::of_cgroup(cgroup)?, Instant::now());
        thread::sleep(REST);
        spent.push(1e3 * (cpu::of_cgroup(cgroup)? - before) / since.elapsed().as_secs_f64());
    }
    let figure = |name: &str, unit: &str, values| Measured {
        figure: Figure { workload: format!("a node with {PODS} pods"), name: name.into(), unit: unit.into() },
        mode: Mode::Proxied,
        values,
    };
    Ok(vec![
        figure("start to ready", "ms", ready),
        figure("memory of its agent", "MiB", memory),
        figure("CPU of its agent", "ms/s", spent),
    ])
}

/// From before the program is started until it says that it serves all of them.
fn start(cluster: &mut Cluster) -> Result<Duration> {
    let started = Instant::now();
    cluster.launch_agent(Side::A)?;
    let agent = cluster.agent(Side::A)?;
    // Until it listens, asking fails.
    while !agent.is_ready().unwrap_or(false) {
        if started.elapsed() > seconds(60) {
            bail!("the agent was not ready after a minute");
        }
        thread::sleep(LOOK);
    }
    let elapsed = started.elapsed();
    let served = agent.pods()?.len();
    if served != usize::from(PODS) {
        bail!("the agent was ready with {served} pods of {PODS}");
    }
    Ok(elapsed)
}
