//! Modes, and the bed of each: two nodes with a client on one and a server on the other, the same programs in the same pods,
//! and between them what the mode is about. Nodes, pods and agents are the harness's.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use marline_tests::{
    access_log::{Records, Verdict},
    bench::{Answer, Order, Work},
    cluster::{Cluster, ClusterSpec, Family, Membership, Pod, PodSpec, Side},
    config::Mode as Mtls,
    process::{Process, succeed},
    wait::seconds,
};
use serde::{Deserialize, Serialize};

use super::plan::AGENTS;

/// What is between the client and the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Mode {
    /// No mesh: the same pods, and no agent
    None,
    /// Two agents; the kernel keeps the TLS records if it can
    Proxied,
    /// Two agents that keep the TLS records themselves
    Userspace,
}

impl Mode {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Proxied => "proxied",
            Self::Userspace => "userspace",
        }
    }

    /// As every line about it calls it.
    pub(super) fn label(self) -> String {
        self.name().to_owned()
    }
}

/// The programs that beds are made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Programs {
    pub agent: PathBuf,
    pub load: PathBuf,
}

const PORT: u16 = 7000;
const CLIENT: &str = "client-a";
const SERVER: &str = "server-b";
/// Over IPv4: what is compared is the same for both families.
const FAMILY: Family = Family::V4;

/// A mode that is ready to be measured, until it is dropped.
pub(super) struct Bed {
    pub mode: Mode,
    cluster: Cluster,
    load: PathBuf,
    watch: BTreeMap<String, PathBuf>,
    // Before the cluster would be gone it is killed with the cluster's cgroups.
    _server: Process,
}

impl Bed {
    pub(super) fn open(mode: Mode, programs: &Programs) -> Result<Self> {
        let pods =
            vec![PodSpec::new(CLIENT, Side::A, Membership::Mesh), PodSpec::new(SERVER, Side::B, Membership::Mesh)];
        let extra = match mode {
            Mode::None | Mode::Proxied => Vec::new(),
            Mode::Userspace => vec!["  records: userspace".to_owned()],
        };
        let spec = ClusterSpec { mode: Mtls::Strict, pods, extra, program: Some(programs.agent.clone()) };
        let mut cluster = Cluster::create(&spec)?;
        let (client, server) = (cluster.pod(CLIENT)?, cluster.pod(SERVER)?);
        let mut watch = BTreeMap::from([
            ("client".to_owned(), client.place.cgroup.clone()),
            ("server".to_owned(), server.place.cgroup.clone()),
        ]);
        if mode != Mode::None {
            cluster.start_agents().with_context(|| cluster.report())?;
            let agents = cluster.agents();
            watch
                .extend(agents.map(|agent| (format!("{AGENTS} {}", agent.side().letter()), agent.cgroup().to_owned())));
        }
        let process = serve(&server, &programs.load)?;
        Ok(Self { mode, cluster, load: programs.load.clone(), watch, _server: process })
    }

    pub(super) fn name(&self) -> &str {
        self.cluster.name()
    }

    /// Has the client do a piece of work.
    pub(super) fn run(&self, work: Work) -> Result<Answer> {
        let (client, server) = (self.cluster.pod(CLIENT)?, self.cluster.pod(SERVER)?);
        let order = Order { address: server.socket(FAMILY, PORT), work, watch: self.watch.clone() };
        let mut command = client.command(&self.load);
        let text = succeed(command.arg("run").arg(serde_json::to_string(&order)?), limit(work))
            .with_context(|| self.cluster.report())?;
        serde_json::from_str(&text).with_context(|| format!("the load program answered {text}"))
    }

    /// How the agents say that they carried the connections so far, and how many each way; that they refused one is an error.
    pub(super) fn carriers(&self) -> Result<BTreeMap<String, usize>> {
        let to = self.cluster.pod(SERVER)?.socket(FAMILY, PORT);
        let mut carriers = BTreeMap::new();
        for agent in self.cluster.agents() {
            for entry in agent.entries()?.into_iter().filter(|entry| entry.destination.address == Some(to)) {
                if entry.verdict == Verdict::Refused {
                    bail!("agent {} refused a connection: {entry:?}", agent.side().letter());
                }
                let records = match entry.records {
                    Records::Ktls => "kernel",
                    Records::Userspace => "userspace",
                    Records::Plaintext => "none",
                    Records::None => "unknown",
                };
                let pump = entry.pump.unwrap_or_else(|| "no pump".into());
                *carriers.entry(format!("records {records}, {pump}")).or_default() += 1;
            }
        }
        Ok(carriers)
    }
}

fn serve(pod: &Pod, load: &Path) -> Result<Process> {
    pod.serve("bench_load", pod.command(load).arg("serve").arg(PORT.to_string()), PORT)
}

/// Far more than any mode needs: it is there to end what hangs.
fn limit(work: Work) -> Duration {
    let own = match work {
        Work::Requests { seconds, .. } => u64::from(seconds),
        _ => 0,
    };
    seconds(120) + Duration::from_secs(own)
}
