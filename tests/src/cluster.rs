//! Two nodes, the link between them, and their pods; agents on top when asked for.
//!
//! A node is a network namespace that forwards; a pod is one more, tied to its node by a veth pair as the `ptp` CNI plugin
//! does it: an address of its own (/32, /128), the node as the gateway, no bridge and no NAT. Names carry the cluster's
//! name, so that clusters of different runs do not meet. The network is in `cluster/network.rs`, what outlives a process
//! (and how it is removed) in `cluster/remains.rs`; the agent is in `agent.rs`.

pub mod network;
pub mod remains;

use std::{
    collections::BTreeMap,
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{self, Command, Output},
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use tempfile::TempDir;

use crate::{
    agent::Agent,
    cgroup::{self, Tree},
    config::{self, Extra, Mode, NAMESPACE, Settings, TRUST_DOMAIN},
    netns,
    process::{Place, Process},
};

/// One of the two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Side {
    A,
    B,
}

impl Side {
    pub const BOTH: [Self; 2] = [Self::A, Self::B];

    #[must_use]
    pub fn letter(self) -> &'static str {
        match self {
            Self::A => "a",
            Self::B => "b",
        }
    }

    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::A => Self::B,
            Self::B => Self::A,
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::A => 1,
            Self::B => 2,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Family {
    V4,
    V6,
}

impl Family {
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Self::V4 => "ipv4",
            Self::V6 => "ipv6",
        }
    }
}

/// What the agents are told about a pod.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Membership {
    /// Enrolled by its node's agent.
    Mesh,
    /// Known to all and labelled `marline.io/mesh: disabled`: never enrolled.
    Outside,
    /// All believe that it is in the mesh, and no agent holds it: the place for impostors.
    Impostor,
    /// No agent has heard of it.
    Unknown,
}

/// What to make a pod from.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct PodSpec {
    pub name: String,
    pub side: Side,
    pub membership: Membership,
}

impl PodSpec {
    pub fn new(name: &str, side: Side, membership: Membership) -> Self {
        Self { name: name.to_owned(), side, membership }
    }
}

/// A pod that is there.
#[derive(Clone, Debug)]
pub struct Pod {
    pub name: String,
    pub side: Side,
    pub membership: Membership,
    pub v4: Ipv4Addr,
    pub v6: Ipv6Addr,
    pub place: Place,
    /// For the files of what runs in it.
    pub directory: PathBuf,
}

impl Pod {
    #[must_use]
    pub fn address(&self, family: Family) -> IpAddr {
        match family {
            Family::V4 => self.v4.into(),
            Family::V6 => self.v6.into(),
        }
    }

    #[must_use]
    pub fn socket(&self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.address(family), port)
    }

    /// The identity that this pod must be known by.
    #[must_use]
    pub fn identity(&self) -> String {
        format!("spiffe://{TRUST_DOMAIN}/ns/{NAMESPACE}/sa/{}", self.name)
    }

    /// A command to run in this pod.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        self.place.command(program)
    }

    /// Runs a program to its end, whatever that is.
    pub fn output(&self, program: &str, arguments: &[&str], limit: Duration) -> Result<Output> {
        crate::process::output(self.command(program).args(arguments), limit)
            .with_context(|| format!("{program} in {}", self.name))
    }

    /// Runs a program that has to succeed and gives what it wrote to standard output.
    pub fn succeed(&self, program: &str, arguments: &[&str], limit: Duration) -> Result<String> {
        crate::process::succeed(self.command(program).args(arguments), limit)
            .with_context(|| format!("{program} in {}", self.name))
    }

    /// Starts a program that runs until it is stopped, and waits until it listens on the port.
    pub fn serve(&self, name: &str, command: &mut Command, port: u16) -> Result<Process> {
        let log = self.directory.join(format!("{name}.log"));
        let mut process = Process::start(format!("{name} in {}", self.name), command, &log)?;
        process.listens(&self.place.netns, port)?;
        Ok(process)
    }
}

/// What to make a cluster from.
#[derive(Clone, Debug)]
pub struct ClusterSpec {
    pub mode: Mode,
    pub pods: Vec<PodSpec>,
    /// More lines for `AgentConfig.spec` on both nodes.
    pub extra: Extra,
}

impl ClusterSpec {
    /// A client and a server in the mesh on each node, and a pod outside of it on node a.
    #[must_use]
    pub fn pairs(mode: Mode) -> Self {
        let pods = vec![
            PodSpec::new("client-a", Side::A, Membership::Mesh),
            PodSpec::new("server-a", Side::A, Membership::Mesh),
            PodSpec::new("outside", Side::A, Membership::Outside),
            PodSpec::new("client-b", Side::B, Membership::Mesh),
            PodSpec::new("server-b", Side::B, Membership::Mesh),
        ];
        Self { mode, pods, extra: Vec::new() }
    }
}

/// A cluster that is there. All of it is removed when this is dropped, unless it was told to stay.
pub struct Cluster {
    name: String,
    tree: Tree,
    directory: PathBuf,
    temporary: Option<TempDir>,
    stays: bool,
    mode: Mode,
    extra: Extra,
    pods: BTreeMap<String, Pod>,
    made: u8,
    agents: BTreeMap<Side, Agent>,
}

impl Cluster {
    /// Makes the network of a cluster under a name of this process, after removing what dead processes have left.
    pub fn create(spec: &ClusterSpec) -> Result<Self> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        remains::sweep();
        let name = format!("{}{}x{}", remains::PREFIX, process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let temporary = tempfile::Builder::new().prefix("marline-").tempdir().context("making a directory")?;
        let directory = temporary.path().to_owned();
        Self::build(name, directory, Some(temporary), spec)
    }

    /// Makes the network of a cluster with a name and a directory that outlive this process.
    pub fn create_lasting(name: &str, directory: &Path, spec: &ClusterSpec) -> Result<Self> {
        remains::remove(name)?;
        Self::build(name.to_owned(), directory.to_owned(), None, spec)
    }

    fn build(name: String, directory: PathBuf, temporary: Option<TempDir>, spec: &ClusterSpec) -> Result<Self> {
        let mut cluster = Self {
            tree: Tree::named(&name)?,
            name,
            directory,
            temporary,
            stays: false,
            mode: spec.mode,
            extra: spec.extra.clone(),
            pods: BTreeMap::new(),
            made: 0,
            agents: BTreeMap::new(),
        };
        cgroup::create(&cluster.tree.rest())?;
        for side in Side::BOTH {
            cgroup::create(&cluster.tree.node(side.letter()))?;
            let config = cluster.config_directory(side);
            fs::create_dir_all(&config).with_context(|| format!("making {}", config.display()))?;
        }
        network::create_nodes(&cluster.name)?;
        for pod in &spec.pods {
            cluster.create_pod(pod)?;
        }
        cluster.write_config()?;
        Ok(cluster)
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// For files that live as long as the cluster.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The directory that a node's agent reads its configuration from.
    #[must_use]
    pub fn config_directory(&self, side: Side) -> PathBuf {
        self.directory.join(side.letter()).join("config")
    }

    /// Where programs of a node run that belong to no pod.
    #[must_use]
    pub fn node(&self, side: Side) -> Place {
        Place { netns: netns::path(&network::node_name(&self.name, side)), cgroup: self.tree.rest() }
    }

    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    pub fn pods(&self) -> impl Iterator<Item = &Pod> {
        self.pods.values()
    }

    pub fn pod(&self, name: &str) -> Result<Pod> {
        self.pods.get(name).cloned().ok_or_else(|| anyhow!("there is no pod {name}"))
    }

    /// Makes a pod; the agents hear of it with the next `write_config`.
    pub fn create_pod(&mut self, spec: &PodSpec) -> Result<Pod> {
        if self.pods.contains_key(&spec.name) {
            bail!("there is a pod {} already", spec.name);
        }
        let index = self.made.checked_add(10).filter(|index| *index < 250).context("no address is left")?;
        let (v4, v6) = network::pod_addresses(spec.side, index);
        let cgroup = self.tree.pod(spec.side.letter(), &spec.name);
        cgroup::create(&cgroup)?;
        let netns_name = network::pod_name(&self.name, &spec.name);
        network::create_pod(&self.name, spec.side, &spec.name, index)?;
        let directory = self.directory.join(spec.side.letter()).join(&spec.name);
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let pod = Pod {
            name: spec.name.clone(),
            side: spec.side,
            membership: spec.membership,
            v4,
            v6,
            place: Place { netns: netns::path(&netns_name), cgroup },
            directory,
        };
        self.made += 1;
        self.pods.insert(pod.name.clone(), pod.clone());
        Ok(pod)
    }

    /// Removes a pod with all that runs in it; the agents hear of it with the next `write_config`.
    pub fn remove_pod(&mut self, name: &str) -> Result<()> {
        let pod = self.pods.remove(name).ok_or_else(|| anyhow!("there is no pod {name}"))?;
        cgroup::remove(&pod.place.cgroup)?;
        netns::remove(&network::pod_name(&self.name, name))
    }

    /// Writes the configuration of both nodes from what the cluster is now.
    pub fn write_config(&self) -> Result<()> {
        for side in Side::BOTH {
            let directory = self.config_directory(side);
            config::write_agent(&directory, &self.settings(side))?;
            config::write_mode(&directory, self.mode)?;
            config::write_workloads(&directory, side, self.pods.values())?;
        }
        Ok(())
    }

    /// Changes the mesh-wide mode in the files of both nodes and waits until running agents have taken it.
    pub fn change_mode(&mut self, mode: Mode) -> Result<()> {
        self.mode = mode;
        self.reload(|cluster| {
            Side::BOTH.iter().try_for_each(|side| config::write_mode(&cluster.config_directory(*side), mode))
        })
    }

    /// Changes files of the configuration and waits until all running agents have taken the change.
    pub fn reload(&self, change: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        let before = self.agents.values().map(Agent::reloads).collect::<Result<Vec<_>>>()?;
        change(self)?;
        self.agents.values().zip(before).try_for_each(|(agent, before)| agent.wait_reloaded(before))
    }

    /// Starts the agent of a node and waits until it is ready.
    pub fn start_agent(&mut self, side: Side) -> Result<&Agent> {
        self.launch_agent(side)?.wait_ready()?;
        self.agent(side)
    }

    /// Starts the agent of a node without waiting for anything.
    pub fn launch_agent(&mut self, side: Side) -> Result<&mut Agent> {
        let settings = self.settings(side);
        crate::agent::init_ca(&settings.ca)?;
        let agent = Agent::launch(side, self.node(side), &self.config_directory(side), settings)?;
        // A predecessor is gone by now or is killed here.
        self.agents.remove(&side);
        Ok(self.agents.entry(side).or_insert(agent))
    }

    /// Starts both agents and waits until both are ready.
    pub fn start_agents(&mut self) -> Result<()> {
        for side in Side::BOTH {
            self.launch_agent(side)?;
        }
        self.agents.values_mut().try_for_each(Agent::wait_ready)
    }

    pub fn agent(&self, side: Side) -> Result<&Agent> {
        self.agents.get(&side).ok_or_else(|| anyhow!("no agent was started on node {}", side.letter()))
    }

    pub fn agent_mut(&mut self, side: Side) -> Result<&mut Agent> {
        self.agents.get_mut(&side).ok_or_else(|| anyhow!("no agent was started on node {}", side.letter()))
    }

    pub fn agents(&self) -> impl Iterator<Item = &Agent> {
        self.agents.values()
    }

    /// What a reader of a failure wants to see.
    #[must_use]
    pub fn report(&self) -> String {
        self.agents.values().map(Agent::report).collect()
    }

    /// Leaves everything in place: namespaces, cgroups, agents and files.
    pub fn stay(mut self) {
        self.stays = true;
        for (_, agent) in std::mem::take(&mut self.agents) {
            agent.detach();
        }
        if let Some(temporary) = self.temporary.take() {
            let _ = temporary.keep();
        }
    }

    fn settings(&self, side: Side) -> Settings {
        Settings {
            ca: self.directory.join("ca"),
            cgroup: self.tree.node(side.letter()),
            pins: remains::pins(&network::node_name(&self.name, side)),
            access_log: self.directory.join(side.letter()).join("access.log"),
            extra: self.extra.clone(),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.stays {
            return;
        }
        if std::thread::panicking() {
            eprintln!("{}", self.report());
        }
        self.agents.clear();
        if let Err(error) = remains::remove(&self.name) {
            eprintln!("removing the cluster {}: {error:#}", self.name);
        }
    }
}
