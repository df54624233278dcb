//! Where a connection from a local pod goes: to where the application sent it or, where that is a service's virtual address, to one of
//! the service's endpoints. Which of them is `policy`'s order; how many connections each has is counted here, and `sessions` knows
//! which clients stay with theirs.

use std::{
    collections::HashMap,
    hash::Hash,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

mod sessions;

use super::{connections::lock, pod::Pod, refusal::Refusal};
use crate::{
    policy::{Service, ServiceEndpoint, Traffic, Workload},
    state::{Called, Snapshot},
    sys::netns::NetnsCookie,
};
pub use sessions::Affinity;
use sessions::{Client, Sessions};

/// One place to connect to.
#[derive(Clone)]
pub struct Target {
    pub address: SocketAddr,
    /// What the application asked for.
    pub called: SocketAddr,
    /// The service's own port, which the peer's agent is asked for; without a service the application's.
    pub port: u16,
    pub workload: Option<Arc<Workload>>,
    /// The service that it is an endpoint of.
    pub service: Option<Arc<Service>>,
    /// What DestinationRules say of connections to it.
    pub traffic: Arc<Traffic>,
    /// Counted among its pod's connections to the service, where those are limited.
    pub slot: Option<Arc<Slot>>,
    /// Whose session is whoever's takes the connection.
    pub affinity: Option<Affinity>,
}

/// How many are tried for one connection.
const TRIES: usize = 4;
/// How long an endpoint that has refused is tried last.
const AVOIDED: Duration = Duration::from_secs(10);

impl Target {
    /// The host that the peer's agent is asked for by name.
    pub fn host(&self) -> &str {
        let service = self.service.as_ref().map(|service| service.host.as_str());
        service.or(self.workload.as_ref().map(|workload| workload.host.as_str())).unwrap_or("unknown")
    }
}

/// How many connections of this node each endpoint of a service has. Cheap to clone.
#[derive(Clone, Default)]
pub struct Loads {
    counts: Arc<Mutex<HashMap<SocketAddr, usize>>>,
    refused: Arc<Mutex<HashMap<SocketAddr, Instant>>>,
    slots: Arc<Mutex<HashMap<Host, usize>>>,
    sessions: Arc<Mutex<Sessions>>,
    turn: Arc<AtomicUsize>,
}

/// An endpoint, and who is there.
type Place = (SocketAddr, Option<Arc<Workload>>);

/// A service's port as one pod sees it.
type Host = (NetnsCookie, String, u16);

/// A place among the connections that a pod may have to a service.
pub struct Slot(Loads, Host);

/// One of them, as long as it lives.
pub struct InUse(Loads, SocketAddr);

impl Loads {
    /// Where to connect to, the best first.
    pub fn targets(&self, snapshot: &Snapshot, pod: &Pod, to: SocketAddr) -> Result<Vec<Target>, Refusal> {
        let Some(Called { service, port, traffic }) = snapshot.called(snapshot.now(&pod.workload), to) else {
            // It may be in the mesh: until that is known it gets no plaintext.
            if snapshot.unheard.contains(&to.ip().to_canonical()) {
                return Err(Refusal::NotTold(to.ip()));
            }
            let (workload, traffic, port) = (snapshot.workload(to.ip()).cloned(), Arc::default(), to.port());
            let (service, slot, affinity) = (None, None, None);
            return Ok(vec![Target { address: to, called: to, port, workload, service, traffic, slot, affinity }]);
        };
        let affinity = affinity(service, pod.netns.cookie(), to, port);
        // The client of a headless service has chosen.
        let endpoints = match service.is_headless() {
            true => vec![(to, snapshot.workload(to.ip()).cloned())],
            false => self.endpoints(snapshot, pod, service, to, affinity)?,
        };
        let slot = match traffic.max_connections {
            Some(limit) => Some(self.slot((pod.netns.cookie(), service.host.clone(), port), limit)?),
            None => None,
        };
        let target = |(address, workload)| Target {
            address,
            called: to,
            port,
            workload,
            service: Some(Arc::clone(service)),
            traffic: Arc::clone(&traffic),
            slot: slot.clone(),
            affinity,
        };
        Ok(endpoints.into_iter().map(target).collect())
    }

    /// Those of a service that are worth a try, the best first.
    fn endpoints(
        &self,
        snapshot: &Snapshot,
        pod: &Pod,
        service: &Service,
        to: SocketAddr,
        affinity: Option<Affinity>,
    ) -> Result<Vec<Place>, Refusal> {
        let zone = snapshot.local.iter().find(|local| local.netns == pod.netns.path());
        let zone = zone.and_then(|local| local.zone.as_deref());
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let endpoints = {
            let (counts, mut refused) = (lock(&self.counts), lock(&self.refused));
            refused.retain(|_, since| since.elapsed() < AVOIDED);
            let count = |address| counts.get(&address).copied().unwrap_or(0);
            let connections = |address| (!refused.contains_key(&address)).then(|| count(address));
            service.endpoints(to, zone, connections, turn)
        };
        let mut endpoints = endpoints.ok_or_else(|| Refusal::NoPort { host: service.host.clone(), port: to.port() })?;
        if endpoints.is_empty() {
            return Err(Refusal::NoEndpoint { host: service.host.clone(), port: to.port() });
        }
        if let Some(affinity) = affinity {
            lock(&self.sessions).lead(affinity, &mut endpoints, Instant::now());
        }
        let found = |endpoint: &ServiceEndpoint| (endpoint.address, endpoint.workload.clone());
        Ok(endpoints.into_iter().take(TRIES).map(found).collect())
    }

    fn slot(&self, host: Host, limit: usize) -> Result<Arc<Slot>, Refusal> {
        let mut slots = lock(&self.slots);
        let count = slots.entry(host.clone()).or_default();
        if *count >= limit {
            return Err(Refusal::TooMany { host: host.1, limit });
        }
        *count += 1;
        Ok(Arc::new(Slot(self.clone(), host)))
    }

    /// It could not be reached, or did not take a connection.
    pub fn refused(&self, target: &Target) {
        if target.service.is_some() {
            lock(&self.refused).insert(target.address, Instant::now());
        }
        if let Some(affinity) = &target.affinity {
            lock(&self.sessions).lose(&affinity.client, target.address);
        }
    }

    /// A connection is being made to it.
    pub fn taken(&self, target: &Target) -> InUse {
        if let Some(affinity) = target.affinity {
            lock(&self.sessions).hold(affinity, target.address, Instant::now());
        }
        *lock(&self.counts).entry(target.address).or_default() += 1;
        InUse(self.clone(), target.address)
    }
}

/// Whose session a connection to a service's address or node port is.
fn affinity(service: &Service, pod: NetnsCookie, to: SocketAddr, port: u16) -> Option<Affinity> {
    let (life, first) = (service.affinity?, *service.addresses.first()?);
    let is_v4 = to.ip().to_canonical().is_ipv4();
    Some(Affinity { client: Client { pod, service: first, port, is_v4 }, life })
}

impl Drop for Slot {
    fn drop(&mut self) {
        give_back(&self.0.slots, &self.1);
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        give_back(&self.0.counts, &self.1);
    }
}

fn give_back<K: Eq + Hash>(counts: &Mutex<HashMap<K, usize>>, key: &K) {
    let mut counts = lock(counts);
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
