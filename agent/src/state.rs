//! What is known now: one immutable snapshot of the mesh, swapped as a whole, and a way to hear about the next one.
//!
//! Readers never see half of a change. `control` makes the snapshots; `bpf`, `proxy` and `identity` follow them.

pub mod explain;

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use tokio::sync::watch;

use crate::{
    identity::{SpiffeId, TrustDomains},
    policy::{ClientTls, Policies, Service, Traffic, Workload, demands_mtls},
};

/// A pod on this node that is to be enrolled.
#[derive(PartialEq, Eq, Debug)]
pub struct LocalPod {
    pub workload: Arc<Workload>,
    /// The pod's network namespace: a path that can be opened for setns.
    pub netns: PathBuf,
    /// Where it is, as Istio writes localities: `REGION/ZONE`.
    pub zone: Option<String>,
}

/// Where a resource stands in the configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Source {
    /// `KIND NAMESPACE/NAME`.
    pub resource: Arc<str>,
    pub file: Arc<Path>,
    pub line: u64,
}

/// The service that a client's connection is for.
pub struct Called<'a> {
    pub service: &'a Arc<Service>,
    /// The service's own port, whatever the client has written. One that the service has not stays as it is.
    pub port: u16,
    /// What DestinationRules say of it.
    pub traffic: Arc<Traffic>,
}

/// Everything the agent knows at one moment.
#[derive(Debug)]
pub struct Snapshot {
    /// For people who look at what is in force: where it was read, and what was remarked then.
    pub sources: Vec<Source>,
    pub warnings: Vec<String>,
    /// Shared, because most changes are of workloads and leave them as they are.
    pub policies: Arc<Policies>,
    /// Ours, and those that mean the same.
    pub trust_domains: TrustDomains,
    pub local: Vec<Arc<LocalPod>>,
    /// Namespaces that are to be as they were left: of pods that are in the mesh no more and may have processes still. Sorted.
    pub closed: Vec<PathBuf>,
    /// Ports of local pods, by their namespaces, that the node's kubelet probes: it is let in there, whatever policy says.
    pub probes: BTreeMap<PathBuf, Arc<[u16]>>,
    /// Some pod of the mesh is here and nobody knows in which namespace: it could be any that an earlier agent has closed.
    pub unplaced: bool,
    /// Addresses of pods of which no more is known than that they are pods'.
    pub unheard: HashSet<IpAddr>,
    /// Set by `State`; grows by one with each replacement.
    pub generation: u64,
    workloads: Vec<Arc<Workload>>,
    by_address: HashMap<IpAddr, Arc<Workload>>,
    services: Vec<Arc<Service>>,
    by_virtual_address: HashMap<IpAddr, Arc<Service>>,
    /// Services without virtual addresses and their ports, by where their endpoints are called.
    headless: HashMap<SocketAddr, Vec<(Arc<Service>, u16)>>,
    by_node_port: HashMap<u16, Arc<Service>>,
    /// By their addresses for clients outside, of which several may share one.
    by_outside: HashMap<SocketAddr, Arc<Service>>,
    /// At which the node ports are, of all nodes.
    nodes: HashSet<IpAddr>,
    /// Endpoints of services which DestinationRules ask plaintext for, and the services' ports.
    disabled: HashMap<SocketAddr, Vec<(Arc<Service>, u16)>>,
    by_host: HashMap<String, Arc<Service>>,
    /// The first service, by its host, that has this endpoint.
    behind: HashMap<SocketAddr, Arc<Service>>,
}

impl Snapshot {
    /// `workloads` holds the local ones too. Where two workloads claim one address the first keeps it; the
    /// configuration refuses that case before it gets here.
    pub fn new(
        policies: impl Into<Arc<Policies>>,
        trust_domains: impl Into<TrustDomains>,
        workloads: Vec<Arc<Workload>>,
        local: Vec<Arc<LocalPod>>,
    ) -> Self {
        let mut by_address = HashMap::new();
        for workload in &workloads {
            for address in &workload.addresses {
                by_address.entry(address.to_canonical()).or_insert_with(|| Arc::clone(workload));
            }
        }
        let (services, by_virtual_address, headless, disabled, by_host, behind) = Default::default();
        let (sources, warnings, by_node_port, by_outside, nodes) = Default::default();
        Self {
            sources,
            warnings,
            policies: policies.into(),
            trust_domains: trust_domains.into(),
            local,
            closed: Vec::new(),
            probes: BTreeMap::new(),
            unplaced: false,
            unheard: HashSet::new(),
            generation: 0,
            workloads,
            by_address,
            services,
            by_virtual_address,
            headless,
            by_node_port,
            by_outside,
            nodes,
            disabled,
            by_host,
            behind,
        }
    }

    /// Two services with one address are refused by the configuration.
    pub fn with_services(mut self, services: Vec<Arc<Service>>) -> Self {
        let disabling = self.policies.destinations.disabling();
        for service in &services {
            self.by_host.insert(service.host.clone(), Arc::clone(service));
            for (_, endpoint) in service.all_endpoints() {
                let first = self.behind.entry(endpoint.address).or_insert_with(|| Arc::clone(service));
                if service.host < first.host {
                    *first = Arc::clone(service);
                }
            }
            for address in &service.addresses {
                self.by_virtual_address.insert(address.to_canonical(), Arc::clone(service));
            }
            for node_port in service.node_ports.keys() {
                self.by_node_port.entry(*node_port).or_insert_with(|| Arc::clone(service));
            }
            for outside in &service.outside {
                for port in service.ports.keys() {
                    let at = SocketAddr::new(outside.to_canonical(), *port);
                    self.by_outside.entry(at).or_insert_with(|| Arc::clone(service));
                }
            }
            let disabled = disabling.iter().any(|rule| rule.is_for(&service.host));
            for (port, endpoint) in service.all_endpoints().filter(|_| disabled || service.is_headless()) {
                if service.is_headless() {
                    // Clients write the service's port, or that of the endpoint as SRV records have it.
                    let written = [endpoint.address.port(), port];
                    for at in written.into_iter().skip(usize::from(endpoint.address.port() == port)) {
                        let at = SocketAddr::new(endpoint.address.ip(), at);
                        self.headless.entry(at).or_default().push((Arc::clone(service), port));
                    }
                }
                if disabled {
                    self.disabled.entry(endpoint.address).or_default().push((Arc::clone(service), port));
                }
            }
        }
        self.services = services;
        self
    }

    /// The addresses of all nodes, where the node ports are.
    pub fn with_nodes(mut self, nodes: HashSet<IpAddr>) -> Self {
        self.nodes = nodes;
        self
    }

    /// The service with this virtual address.
    pub fn service(&self, address: IpAddr) -> Option<&Arc<Service>> {
        self.by_virtual_address.get(&address.to_canonical())
    }

    /// The service with this virtual address, or with this port at an address for clients outside or at a node's. No service takes the address of
    /// a workload.
    pub fn service_at(&self, to: SocketAddr) -> Option<&Arc<Service>> {
        let ip = to.ip().to_canonical();
        let of_node = || self.by_node_port.get(&to.port()).filter(|_| self.nodes.contains(&ip));
        let exposed = || self.by_outside.get(&SocketAddr::new(ip, to.port())).or_else(of_node);
        self.service(ip).or_else(|| exposed().filter(|_| !self.by_address.contains_key(&ip)))
    }

    /// The service of this host.
    pub fn service_of_host(&self, host: &str) -> Option<&Arc<Service>> {
        self.by_host.get(host)
    }

    /// A service that the endpoint at this address is one of: of several, the first by its host.
    pub fn service_behind(&self, endpoint: SocketAddr) -> Option<&Arc<Service>> {
        self.behind.get(&SocketAddr::new(endpoint.ip().to_canonical(), endpoint.port()))
    }

    /// The service that a client's connection to an address is for, and what DestinationRules say of it.
    pub fn called(&self, client: &Workload, to: SocketAddr) -> Option<Called<'_>> {
        let said = |service: &Service, port: u16| {
            let rule = self.policies.destinations.asked(client, &service.namespace, &service.host).next();
            rule.map(|rule| Arc::clone(rule.traffic_at(port))).unwrap_or_default()
        };
        if let Some(service) = self.service_at(to) {
            let port = service.leads(to).map_or(to.port(), |(port, _)| port);
            return Some(Called { service, port, traffic: said(service, port) });
        }
        let canonical = SocketAddr::new(to.ip().to_canonical(), to.port());
        let all = self.headless.get(&canonical)?.iter();
        let all = all.map(|(service, port)| Called { service, port: *port, traffic: said(service, *port) });
        // Several may have one endpoint, and nobody says which was meant: the strictest counts, and of equals the first.
        all.rev().max_by_key(|Called { service, traffic, .. }| {
            (demands_mtls(Some(service), traffic), traffic.tls != Some(ClientTls::Disable))
        })
    }

    /// Whether a DestinationRule makes a client call the endpoint at `local` in plaintext, through some service.
    pub fn told_plaintext(&self, client: &Workload, local: SocketAddr) -> bool {
        let local = SocketAddr::new(local.ip().to_canonical(), local.port());
        self.disabled.get(&local).into_iter().flatten().any(|(service, port)| {
            let rule = self.policies.destinations.asked(client, &service.namespace, &service.host).next();
            rule.is_some_and(|rule| rule.traffic_at(*port).tls == Some(ClientTls::Disable))
        })
    }

    /// The workload at an address. IPv4-mapped IPv6 addresses find the IPv4 workload.
    pub fn workload(&self, address: IpAddr) -> Option<&Arc<Workload>> {
        self.by_address.get(&address.to_canonical())
    }

    /// A workload as it is now: its labels may have changed, and with them the policies that select it.
    pub fn now<'a>(&'a self, workload: &'a Arc<Workload>) -> &'a Arc<Workload> {
        let now = workload.addresses.iter().find_map(|address| self.workload(*address));
        let same = |now: &&Arc<Workload>| now.namespace == workload.namespace && now.name == workload.name;
        now.filter(same).unwrap_or(workload)
    }

    pub fn services(&self) -> &[Arc<Service>] {
        &self.services
    }

    pub fn workloads(&self) -> &[Arc<Workload>] {
        &self.workloads
    }

    /// Whether both say the same, whatever their generations and the places in which they say it.
    pub fn describes_the_same_as(&self, other: &Self) -> bool {
        self.policies == other.policies
            && self.trust_domains == other.trust_domains
            && self.local == other.local
            && self.closed == other.closed
            && self.probes == other.probes
            && self.unplaced == other.unplaced
            && self.unheard == other.unheard
            && self.workloads == other.workloads
            && self.services == other.services
            && self.nodes == other.nodes
    }

    /// The identities that this node must hold certificates for.
    pub fn local_identities(&self) -> std::collections::BTreeSet<SpiffeId> {
        self.local.iter().map(|pod| pod.workload.id.clone()).collect()
    }
}

/// The current snapshot. A clone is another handle on the same one.
#[derive(Clone, Debug)]
pub struct State {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    current: ArcSwap<Snapshot>,
    generation: watch::Sender<u64>,
}

impl State {
    pub fn new(mut first: Snapshot) -> Self {
        first.generation = 1;
        Self { shared: Arc::new(Shared { current: ArcSwap::from_pointee(first), generation: watch::Sender::new(1) }) }
    }

    pub fn load(&self) -> Arc<Snapshot> {
        self.shared.current.load_full()
    }

    /// Swaps the snapshot and then tells the subscribers: whoever hears of generation N finds N or a newer one.
    pub fn replace(&self, mut next: Snapshot) -> u64 {
        // The watch's lock also makes writers take turns, so generations never go backwards.
        let mut generation = 0;
        self.shared.generation.send_modify(|current| {
            *current += 1;
            generation = *current;
            next.generation = generation;
            self.shared.current.store(Arc::new(next));
        });
        generation
    }

    /// Hears the generation of each new snapshot. Slow readers see the newest, not every one.
    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.shared.generation.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;

    fn snapshot(account: &str, addresses: &[&str]) -> Snapshot {
        let trust_domain = TrustDomain::parse("cluster.local").unwrap();
        let workload = Arc::new(Workload {
            name: account.into(),
            namespace: "default".into(),
            service_account: account.into(),
            id: SpiffeId::new(&trust_domain, "default", account).unwrap(),
            addresses: addresses.iter().map(|a| a.parse().unwrap()).collect(),
            in_mesh: true,
            labels: Default::default(),
            host: Workload::host_of(account, "default"),
        });
        Snapshot::new(Policies::default(), trust_domain, vec![workload], Vec::new())
    }

    #[test]
    fn a_workload_is_found_by_each_of_its_addresses_and_by_v4_mapped_ones() {
        let snapshot = snapshot("web", &["10.0.0.1", "fd00::1"]);
        for address in ["10.0.0.1", "fd00::1", "::ffff:10.0.0.1"] {
            assert_eq!(snapshot.workload(address.parse().unwrap()).unwrap().name, "web", "{address}");
        }
        assert!(snapshot.workload("10.0.0.2".parse().unwrap()).is_none());
    }

    #[tokio::test]
    async fn a_subscriber_that_hears_of_a_snapshot_finds_it() {
        let state = State::new(snapshot("old", &["10.0.0.1"]));
        let mut changes = state.subscribe();
        assert_eq!(state.load().generation, 1);
        assert_eq!(state.replace(snapshot("new", &["10.0.0.2"])), 2);
        changes.changed().await.unwrap();
        assert_eq!(*changes.borrow_and_update(), 2);
        let now = state.load();
        assert_eq!(now.generation, 2);
        assert!(now.workload("10.0.0.1".parse().unwrap()).is_none());
        assert!(now.workload("10.0.0.2".parse().unwrap()).is_some());
    }

    #[test]
    fn concurrent_replacements_never_go_backwards() {
        let state = State::new(snapshot("web", &[]));
        let writers: Vec<_> = (0..4)
            .map(|_| {
                let state = state.clone();
                std::thread::spawn(move || (0..100).for_each(|_| assert!(state.replace(snapshot("web", &[])) > 1)))
            })
            .collect();
        let mut last = 0;
        while writers.iter().any(|writer| !writer.is_finished()) {
            let generation = state.load().generation;
            assert!(generation >= last, "{generation} after {last}");
            last = generation;
        }
        for writer in writers {
            writer.join().unwrap();
        }
        assert_eq!(state.load().generation, 401);
    }
}
