//! Two nodes, the link between them, and their pods; agents on top when asked for.
//!
//! A node is a network namespace that forwards; a pod is one more, tied to its node by a veth pair as the `ptp` CNI plugin
//! does it: an address of its own (/32, /128), the node as the gateway, no bridge and no NAT. Names carry the cluster's
//! name, so that clusters of different runs do not meet. The network is in `cluster/network.rs`, what outlives a process
//! (and how it is removed) in `cluster/remains.rs`; the agent is in `agent.rs`.

mod model;
pub mod network;
pub mod remains;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process,
    sync::atomic::{AtomicU32, Ordering},
};

use anyhow::{Context, Result, anyhow, bail};
pub use model::{AgentPod, ClusterSpec, Direct, Family, Membership, Pod, PodSpec, Side};
use tempfile::TempDir;

use crate::{
    agent::Agent,
    cgroup::{self, Tree},
    config::{self, Extra, Mode, Settings},
    container::Container,
    keeper::Keeper,
    netns,
    process::{Filter, Place},
};

/// A cluster that is there. All of it is removed when this is dropped, unless it was told to stay.
pub struct Cluster {
    name: String,
    tree: Tree,
    directory: PathBuf,
    temporary: Option<TempDir>,
    stays: bool,
    mode: Mode,
    extra: Extra,
    leaf_lifetime: Option<String>,
    certificates: Option<Extra>,
    program: Option<PathBuf>,
    agents_are_pods: Option<AgentPod>,
    pods: BTreeMap<String, Pod>,
    made: u8,
    direct: Option<Direct>,
    keepers: BTreeMap<Side, Keeper>,
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

    /// The cluster that an earlier process has made from the same pods with `create_lasting`, and left. It stays.
    pub fn meet(name: &str, directory: &Path, spec: &ClusterSpec) -> Result<Self> {
        let mut cluster = Self::empty(name.to_owned(), directory.to_owned(), None, spec)?;
        cluster.stays = true;
        for pod in &spec.pods {
            cluster.add_pod(pod)?;
        }
        for side in Side::BOTH {
            let (place, config) = (cluster.agent_place(side), cluster.config_directory(side));
            cluster.agents.insert(side, Agent::meet(side, place, &config, cluster.settings(side)));
            if cluster.direct.is_some() {
                let keeper = Keeper::meet(side, cluster.keeper_place(side), &cluster.keeper_log(side));
                cluster.keepers.insert(side, keeper);
            }
        }
        Ok(cluster)
    }

    fn build(name: String, directory: PathBuf, temporary: Option<TempDir>, spec: &ClusterSpec) -> Result<Self> {
        let mut cluster = Self::empty(name, directory, temporary, spec)?;
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

    fn empty(name: String, directory: PathBuf, temporary: Option<TempDir>, spec: &ClusterSpec) -> Result<Self> {
        Ok(Self {
            tree: Tree::named(&name)?,
            name,
            directory,
            temporary,
            stays: false,
            mode: spec.mode,
            extra: spec.extra.clone(),
            leaf_lifetime: spec.leaf_lifetime.clone(),
            certificates: spec.certificates.clone(),
            program: spec.program.clone(),
            agents_are_pods: spec.agents_are_pods.clone(),
            pods: BTreeMap::new(),
            made: 0,
            direct: spec.direct.clone(),
            keepers: BTreeMap::new(),
            agents: BTreeMap::new(),
        })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The agent's program.
    pub fn program(&self) -> Result<PathBuf> {
        self.settings(Side::A).binary()
    }

    /// For files that live as long as the cluster.
    #[must_use]
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The CA of both nodes.
    #[must_use]
    pub fn ca_directory(&self) -> PathBuf {
        self.directory.join("ca")
    }

    /// The directory that a node's agent reads its configuration from.
    #[must_use]
    pub fn config_directory(&self, side: Side) -> PathBuf {
        self.directory.join(side.letter()).join("config")
    }

    /// Where programs of a node run that belong to no pod.
    #[must_use]
    pub fn node(&self, side: Side) -> Place {
        Place { netns: netns::path(&network::node_name(&self.name, side)), cgroup: self.tree.rest(), filter: None }
    }

    /// Where the agent of a node runs, alone in its cgroup.
    #[must_use]
    pub fn agent_place(&self, side: Side) -> Place {
        let (node, name) = (self.node(side), format!("agent-{}", side.letter()));
        let above = if self.agents_are_pods.is_some() { self.tree.node(side.letter()) } else { node.cgroup.clone() };
        Place { cgroup: above.join(name), ..node }
    }

    fn keeper_place(&self, side: Side) -> Place {
        let node = self.node(side);
        Place { cgroup: node.cgroup.join(format!("keeper-{}", side.letter())), ..node }
    }

    fn keeper_log(&self, side: Side) -> PathBuf {
        self.directory.join(side.letter()).join("keeper.log")
    }

    /// Where the keeper of a node has its sockets.
    #[must_use]
    pub fn keeper_directory(&self, side: Side) -> PathBuf {
        self.directory.join(side.letter()).join("keeper")
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

    /// A pod whose programs are started under the filter, if there are direct paths here. Its keeper has to run by then.
    pub fn filtered(&self, name: &str) -> Result<Pod> {
        let pod = self.pod(name)?;
        if self.direct.is_none() {
            return Ok(pod);
        }
        let (marline, keeper) = (self.settings(pod.side).binary()?, self.keeper_directory(pod.side));
        Ok(pod.filtered(Filter { marline, keeper }))
    }

    /// Makes a pod; the agents hear of it with the next `write_config`.
    pub fn create_pod(&mut self, spec: &PodSpec) -> Result<Pod> {
        let (index, pod) = self.add_pod(spec)?;
        cgroup::create(&pod.place.cgroup)?;
        network::create_pod(&self.name, spec.side, &spec.name, index)?;
        fs::create_dir_all(&pod.directory).with_context(|| format!("making {}", pod.directory.display()))?;
        Ok(pod)
    }

    fn add_pod(&mut self, spec: &PodSpec) -> Result<(u8, Pod)> {
        if self.pods.contains_key(&spec.name) {
            bail!("there is a pod {} already", spec.name);
        }
        let index = self.made.checked_add(10).filter(|index| *index < 250).context("no address is left")?;
        let (v4, v6) = network::pod_addresses(spec.side, index);
        let cgroup = self.tree.pod(spec.side.letter(), &spec.name);
        let pod = Pod {
            name: spec.name.clone(),
            side: spec.side,
            membership: spec.membership,
            v4,
            v6,
            place: Place { netns: netns::path(&network::pod_name(&self.name, &spec.name)), cgroup, filter: None },
            directory: self.directory.join(spec.side.letter()).join(&spec.name),
        };
        self.made += 1;
        self.pods.insert(pod.name.clone(), pod.clone());
        Ok((index, pod))
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
        if let Some(mut predecessor) = self.agents.remove(&side) {
            predecessor.kill()?;
        }
        if self.direct.is_some() && !self.keepers.contains_key(&side) {
            self.start_keeper(side)?;
        }
        let settings = self.settings(side);
        crate::agent::init_ca(&settings)?;
        let agent = Agent::launch(side, self.agent_place(side), &self.config_directory(side), settings)?;
        Ok(self.agents.entry(side).or_insert(agent))
    }

    /// Starts a second agent beside that of a node, in a cgroup of its own, to wait for its turn. Put it in its place with `follow`.
    pub fn launch_successor(&self, side: Side) -> Result<Agent> {
        let place = self.agent_place(side);
        let next = format!("{}-next", place.cgroup.display());
        let place = Place { cgroup: next.into(), ..place };
        Agent::launch_waiting(side, place, &self.config_directory(side), self.settings(side))
    }

    /// A successor, whose predecessor has ended, is the node's agent from here on.
    pub fn follow(&mut self, successor: Agent) {
        self.agents.insert(successor.side(), successor);
    }

    /// Starts the keeper of a node, after killing the one that may run. Agents do not do without it, and do not end it.
    pub fn start_keeper(&mut self, side: Side) -> Result<&mut Keeper> {
        if let Some(mut predecessor) = self.keepers.remove(&side) {
            predecessor.kill()?;
        }
        let directory = self.keeper_directory(side);
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let program = self.settings(side).binary()?;
        let keeper = Keeper::launch(side, self.keeper_place(side), &program, &directory, &self.keeper_log(side))?;
        Ok(self.keepers.entry(side).or_insert(keeper))
    }

    pub fn keepers(&self) -> impl Iterator<Item = &Keeper> {
        self.keepers.values()
    }

    pub fn keeper_mut(&mut self, side: Side) -> Result<&mut Keeper> {
        self.keepers.get_mut(&side).ok_or_else(|| anyhow!("no keeper was started on node {}", side.letter()))
    }

    /// Starts both agents and waits until both are ready.
    pub fn start_agents(&mut self) -> Result<()> {
        for side in Side::BOTH {
            self.launch_agent(side)?;
        }
        self.agents_ready()
    }

    /// Waits until the agents that were launched are ready.
    pub fn agents_ready(&mut self) -> Result<()> {
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
        self.agents.values().map(Agent::report).chain(self.keepers.values().map(Keeper::report)).collect()
    }

    /// Leaves everything in place: namespaces, cgroups, agents and files.
    pub fn stay(mut self) {
        self.stays = true;
        if let Some(temporary) = self.temporary.take() {
            let _ = temporary.keep();
        }
    }

    fn settings(&self, side: Side) -> Settings {
        Settings {
            ca: self.ca_directory(),
            leaf_lifetime: self.leaf_lifetime.clone(),
            certificates: self.certificates.clone(),
            cgroup: self.tree.node(side.letter()),
            pins: remains::pins(&network::node_name(&self.name, side)),
            access_log: self.directory.join(side.letter()).join("access.log"),
            extra: self.extra.clone(),
            direct: self.direct.clone().map(|direct| (direct, self.keeper_directory(side))),
            program: self.program.clone(),
            container: self.agents_are_pods.clone().map(|AgentPod { maker, root, capabilities }| {
                (maker, Container { root, capabilities, shared: self.directory.clone() })
            }),
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.stays {
            std::mem::take(&mut self.agents).into_values().for_each(Agent::detach);
            std::mem::take(&mut self.keepers).into_values().for_each(Keeper::detach);
            return;
        }
        if std::thread::panicking() {
            eprintln!("{}", self.report());
        }
        self.agents.clear();
        self.keepers.clear();
        if let Err(error) = remains::remove(&self.name) {
            eprintln!("removing the cluster {}: {error:#}", self.name);
        }
    }
}
