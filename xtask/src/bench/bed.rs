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
    access_log::{Entry, Records, Verdict},
    bench::{Answer, Order, Work},
    cluster::{Cluster, ClusterSpec, Direct, Family, Membership, Pod, PodSpec, Side},
    config::Mode as Mtls,
    process::{Process, succeed},
    sidecar::{Layer, Roles},
    wait::seconds,
};
use serde::{Deserialize, Serialize};

use super::{
    beside::{Beside, External},
    plan::AGENTS,
};
use crate::test::programs::envoy_version;

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
    /// The programs' own sockets carry TLS, and the agents are not on the way
    Direct,
    /// As `proxied` up to the handshake, and after it NO RECORDS: to compare the next with
    ProxiedWithoutRecords,
    /// As `direct` up to the handshake, and after it NO RECORDS: the mechanism alone
    DirectWithoutRecords,
    /// No agent; an Envoy in each pod as Istio has it, passing bytes on
    Sidecar,
    /// The same with Istio's HTTP filters; the load speaks HTTP
    SidecarHttp,
    /// No agent; the proxy that --external names
    #[value(skip)]
    External,
}

impl Mode {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Proxied => "proxied",
            Self::Userspace => "userspace",
            Self::Direct => "direct",
            Self::ProxiedWithoutRecords => "proxied-without-records",
            Self::DirectWithoutRecords => "direct-without-records",
            Self::Sidecar => "sidecar",
            Self::SidecarHttp => "sidecar-http",
            Self::External => External::name(),
        }
    }

    /// As every line about it calls it: nobody shall take it for encryption.
    pub(super) fn label(self) -> &'static str {
        match self {
            Self::ProxiedWithoutRecords => "proxied WITHOUT RECORDS",
            Self::DirectWithoutRecords => "direct WITHOUT RECORDS",
            _ => self.name(),
        }
    }

    pub(super) fn is_direct(self) -> bool {
        matches!(self, Self::Direct | Self::DirectWithoutRecords)
    }

    /// Whether it takes the agent that people run.
    pub(super) fn takes_agent(self) -> bool {
        matches!(self, Self::Proxied | Self::Userspace | Self::Direct)
    }

    /// What sidecars are there to do, if it has any.
    pub(super) fn sidecars(self) -> Option<Layer> {
        match self {
            Self::Sidecar => Some(Layer::Tcp),
            Self::SidecarHttp => Some(Layer::Http),
            _ => None,
        }
    }

    /// Whether it takes the agent that does without records.
    pub(super) fn without_records(self) -> bool {
        matches!(self, Self::ProxiedWithoutRecords | Self::DirectWithoutRecords)
    }
}

/// The programs that beds are made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Programs {
    /// Agents are only there if a mode takes them.
    pub agent: Option<PathBuf>,
    pub without_records: Option<PathBuf>,
    pub load: PathBuf,
    /// Envoy is only there if a mode takes it.
    pub envoy: Option<PathBuf>,
    pub external: Option<External>,
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
    beside: Option<Beside>,
    // Before the cluster would be gone it is killed with the cluster's cgroups.
    _server: Process,
}

impl Bed {
    pub(super) fn open(mode: Mode, programs: &Programs) -> Result<Self> {
        let pods =
            vec![PodSpec::new(CLIENT, Side::A, Membership::Mesh), PodSpec::new(SERVER, Side::B, Membership::Mesh)];
        let extra = if mode == Mode::Userspace { vec!["  records: userspace".to_owned()] } else { Vec::new() };
        let program = if mode.without_records() { &programs.without_records } else { &programs.agent }.clone();
        // As the harness has it, connects are held so long that a slow machine alone sends none the other way.
        let direct = mode.is_direct().then(Direct::default);
        let spec = ClusterSpec { pods, extra, direct, program, ..ClusterSpec::pairs(Mtls::Strict) };
        let mut cluster = Cluster::create(&spec)?;
        let (client, server) = (cluster.pod(CLIENT)?, cluster.pod(SERVER)?);
        let mut watch = BTreeMap::from([
            ("client".to_owned(), client.place.cgroup.clone()),
            ("server".to_owned(), server.place.cgroup.clone()),
        ]);
        if mode.takes_agent() || mode.without_records() {
            cluster.start_agents().with_context(|| cluster.report())?;
            let (agents, keepers) = (cluster.agents(), cluster.keepers());
            watch
                .extend(agents.map(|agent| (format!("{AGENTS} {}", agent.side().letter()), agent.cgroup().to_owned())));
            watch.extend(
                keepers.map(|it| (format!("{AGENTS}'s keeper {}", it.side().letter()), it.cgroup().to_owned())),
            );
        }
        let process = serve(&cluster.filtered(SERVER)?, &programs.load)?;
        let beside = Beside::start(mode, programs, &cluster, &Roles::new(client, server, PORT))?;
        for (side, cgroup) in beside.iter().flat_map(Beside::cgroups) {
            watch.insert(format!("{AGENTS} {} {}", mode.name(), side.letter()), cgroup);
        }
        let mut bed = Self { mode, cluster, load: programs.load.clone(), watch, beside, _server: process };
        // One that does not encrypt shall be found out now, and not after some minutes.
        bed.probe()?;
        Ok(bed)
    }

    /// Looks on the wire whether a proxy that nobody knows encrypts: how many connections, if there is one.
    fn probe(&mut self) -> Result<Option<usize>> {
        let Some(Beside::External(mut pair)) = self.beside.take_if(|beside| matches!(beside, Beside::External(_)))
        else {
            return Ok(None);
        };
        let outcome = pair.probe(&self.cluster, || self.run(Work::Exchanges { count: 20 }).map(drop));
        self.beside = Some(Beside::External(pair));
        outcome.map(Some)
    }

    pub(super) fn name(&self) -> &str {
        self.cluster.name()
    }

    /// Has the client do a piece of work.
    pub(super) fn run(&self, work: Work) -> Result<Answer> {
        self.order(work, false)
    }

    /// The same, while the proxies' system calls are counted.
    pub(super) fn trace(&self, work: Work) -> Result<Answer> {
        self.order(work, true)
    }

    fn order(&self, work: Work, trace: bool) -> Result<Answer> {
        let (client, server) = (self.cluster.filtered(CLIENT)?, self.cluster.pod(SERVER)?);
        let order = Order {
            address: server.socket(FAMILY, PORT),
            work,
            http: self.mode.sidecars() == Some(Layer::Http),
            watch: self.watch.clone(),
            trace,
        };
        let mut command = client.command(&self.load);
        let text = succeed(command.arg("run").arg(serde_json::to_string(&order)?), limit(work))
            .with_context(|| self.report())?;
        serde_json::from_str(&text).with_context(|| format!("the load program answered {text}"))
    }

    /// What a reader of a failure wants to see.
    fn report(&self) -> String {
        self.cluster.report() + &self.beside.as_ref().map(Beside::report).unwrap_or_default()
    }

    /// How the agents, or whoever is there in their place, say that they carried the connections so far, and how many. That one was refused is
    /// an error, and so is a direct mode that was not, or a sidecar that was passed by: its figures would be another's.
    pub(super) fn carriers(&mut self) -> Result<BTreeMap<String, usize>> {
        if let Some(handshakes) = self.probe()? {
            return Ok(External::ways(handshakes));
        }
        if let Some(Beside::Sidecars(pair)) = &self.beside {
            return Ok(pair.carried(seconds(5))?.ways(envoy_version()));
        }
        let to = self.cluster.pod(SERVER)?.socket(FAMILY, PORT);
        let mut carriers = BTreeMap::new();
        for agent in self.cluster.agents() {
            for entry in agent.entries()?.into_iter().filter(|entry| entry.destination.address == Some(to)) {
                if entry.verdict == Verdict::Refused {
                    bail!("agent {} refused a connection: {entry:?}", agent.side().letter());
                }
                *carriers.entry(carrier(&entry)).or_default() += 1;
            }
        }
        let all: usize = carriers.values().sum();
        let direct: usize = carriers.iter().filter(|(way, _)| way.starts_with(DIRECT)).map(|(_, count)| count).sum();
        if self.mode.is_direct() && 100 * direct < 99 * all {
            bail!("only {direct} of {all} ends of connections were direct: {carriers:?}");
        }
        Ok(carriers)
    }
}

/// What the access log calls a connection that the agent is not on the way of.
const DIRECT: &str = "direct";

/// One end of one connection in the agent's words.
fn carrier(entry: &Entry) -> String {
    let records = match entry.records {
        Records::Ktls => "in the kernel",
        Records::Userspace => "in the agent",
        Records::Plaintext | Records::Without | Records::None => "NONE",
    };
    let path = entry.path.as_deref().unwrap_or("proxied");
    let reason = entry.path_reason.as_ref().map(|reason| format!(" ({reason})")).unwrap_or_default();
    let pump = entry.pump.as_ref().map(|pump| format!(", pump {pump}")).unwrap_or_default();
    format!("{path}{reason}, records {records}{pump}")
}

fn serve(pod: &Pod, load: &Path) -> Result<Process> {
    pod.serve("bench_load", pod.command(load).arg("serve").arg(format!("[::]:{PORT}")), PORT)
}

/// Far more than any mode needs: it is there to end what hangs.
fn limit(work: Work) -> Duration {
    let own = match work {
        Work::Requests { seconds, .. } | Work::Arrivals { seconds, .. } | Work::Idle { seconds, .. } => {
            u64::from(seconds)
        }
        _ => 0,
    };
    seconds(120) + Duration::from_secs(own)
}
