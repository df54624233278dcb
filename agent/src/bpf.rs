//! Capture: the kernel programs on the pods' cgroup and namespaces, and the maps by which the agent and they agree.
//!
//! This room enrols pods, answers where a connection wanted to go, and proves that capture works (`selftest`). Accepting and
//! serving connections is left to `proxy`, which pods there are to `state`. Links and maps are pinned: whatever becomes of
//! the agent, an enrolled pod stays closed until an agent serves it or withdraws it.
use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, BorrowedFd},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use aya::{Ebpf, maps::MapError};
use marline_common::{
    Address, Counter, Endpoint, MAX_ADDRESSES, MAX_CLIENTS, MAX_DIRECT, MAX_KUBELET, MAX_ORIGINS, MAX_PODS,
    MAX_PROBED_PORTS, MAX_REFUSED, POD_READY, POD_REFUSED, PodEndpoint, PodEntry,
};

mod direct;
mod entries;
mod error;
pub mod facts;
mod hooks;
mod kubelet;
mod load;
mod log;
mod pins;
pub mod probe;
pub mod prober;
pub mod selftest;

pub use direct::Gate;
use entries::{absent_is_fine, close_all, forget_address, forget_listeners, forget_mapped};
pub use error::BpfError;
pub use facts::{Hook, PodNetns};
pub use kubelet::{EndedProbe, EndedProbes, KubeletFault};
pub use load::Loader;
use load::Maps;
use pins::{Pins, inbound_link};

use crate::sys::{
    clock,
    netns::{Netns, NetnsCookie, socket_netns},
};

#[derive(Clone, Debug)]
pub struct CaptureSettings {
    /// The cgroup2 directory that holds the pods. The agent is outside, or alone in a cgroup below.
    pub cgroup: PathBuf,
    /// Where links and maps are pinned, on a bpf filesystem. Each agent on a host has its own.
    pub pin_path: PathBuf,
}

/// The kernel's side of the agent. Cheap to clone.
#[derive(Clone)]
pub struct Capture(Arc<Inner>);

struct Inner {
    cgroup: PathBuf,
    ebpf: Mutex<Ebpf>,
    /// The numbers that the kernel has given to the programs.
    programs: HashMap<String, u32>,
    maps: Mutex<Maps>,
    pins: Pins,
    /// Connections at an outbound listener that had no entry: not redirected, or their entry had to make room.
    without_origin: AtomicU64,
    _log: log::LogReader,
}

/// A pod's part in its own capture. All sockets are TCP listeners that were made in the pod's namespace.
#[derive(Debug)]
pub struct PodListeners<'a> {
    pub netns: &'a Netns,
    /// Ports of the outbound listeners at 127.0.0.1 and ::1.
    pub outbound4: Option<u16>,
    pub outbound6: Option<u16>,
    /// The inbound listeners, one for each family. Bound to a loopback address, so that only what was steered reaches them
    /// with a local address of the pod.
    pub inbound4: Option<BorrowedFd<'a>>,
    pub inbound6: Option<BorrowedFd<'a>>,
    /// An IPv6 listener at ::ffff:127.0.0.1, for the ports of [`Capture::map_clients`]: to it IPv4 clients are v4-mapped.
    pub inbound4_mapped: Option<BorrowedFd<'a>>,
    /// All addresses of the pod but loopback. Connections to any other address of the namespace are refused.
    pub addresses: &'a [IpAddr],
}

/// A pod that is captured but still closed. Dropping it leaves the pod closed.
#[must_use = "the pod stays closed until `ready` is called"]
#[derive(Clone, Debug)]
pub struct Enrolment {
    capture: Capture,
    netns: NetnsCookie,
}

/// Where a redirected connection wanted to go, and who wanted it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OrigDst {
    pub address: SocketAddr,
    pub socket_cookie: u64,
    pub cgroup_id: u64,
}

/// The true client of an inbound connection is on record for as long as this lives, or until another leg takes the port.
#[derive(Debug)]
pub struct ClientEntry {
    capture: Capture,
    key: PodEndpoint,
    client: Endpoint,
}

impl Capture {
    /// Loads and attaches the kernel programs. Pods that a predecessor enrolled are closed until they are enrolled again;
    /// [`Capture::pods`] lists them. A thread of its own reads the programs' log.
    pub fn load(settings: &CaptureSettings) -> Result<Self, BpfError> {
        Self::load_with(settings, &mut None)
    }

    /// The same by what was begun before, which stays where it is if it is not used.
    pub fn load_with(settings: &CaptureSettings, begun: &mut Option<Loader>) -> Result<Self, BpfError> {
        let (cgroup, own) = pins::open_cgroup(&settings.cgroup)?;
        let pins = Pins::open(&settings.pin_path)?;
        let mut ebpf = load::load(&pins, own, begun.take())?;
        let mut maps = load::maps(&mut ebpf)?;
        close_all(&mut maps)?;
        load::attach_cgroup(&mut ebpf, &pins, &cgroup, &settings.cgroup)?;
        let log = log::LogReader::start(&mut ebpf)?;
        let cgroup = settings.cgroup.clone();
        let programs = load::numbers(&ebpf);
        Ok(Self(Arc::new(Inner {
            cgroup,
            programs,
            ebpf: Mutex::new(ebpf),
            maps: Mutex::new(maps),
            pins,
            without_origin: AtomicU64::new(0),
            _log: log,
        })))
    }

    /// Whether [`Capture::load`] would do while another agent has the pins: all but the pins and attaching is done, and nothing stays.
    pub fn rehearse(settings: &CaptureSettings) -> Result<(), BpfError> {
        let (_, own) = pins::open_cgroup(&settings.cgroup)?;
        load::rehearse(&settings.pin_path, own)
    }

    /// Removes everything that an agent pinned there, whether it still runs or not. Its pods are open then.
    pub fn unload(pin_path: &Path) -> Result<(), BpfError> {
        pins::unload(pin_path)
    }

    /// Whether an agent has the pins there at this moment.
    pub fn in_use(pin_path: &Path) -> Result<bool, BpfError> {
        pins::in_use(pin_path)
    }

    pub fn cgroup(&self) -> &Path {
        &self.0.cgroup
    }

    /// Every enrolled pod, also those that only a predecessor knew: whoever is not wanted any more must be withdrawn.
    pub fn pods(&self) -> Result<Vec<NetnsCookie>, BpfError> {
        self.maps().pods.keys().collect::<Result<_, _>>().map_err(BpfError::map("PODS"))
    }

    /// Captures a pod in both directions. It is closed from the first step on and opens with [`Enrolment::ready`]. To enrol a
    /// pod again, with other addresses or listeners, closes it likewise.
    pub fn enrol(&self, pod: &PodListeners<'_>) -> Result<Enrolment, BpfError> {
        let netns = pod.netns.cookie();
        for listener in [pod.inbound4, pod.inbound6, pod.inbound4_mapped].into_iter().flatten() {
            if socket_netns(listener).map_err(BpfError::Socket)? != netns {
                return Err(BpfError::ForeignListener { netns: pod.netns.path().to_path_buf() });
            }
        }
        let own = |v4: bool| {
            pod.addresses.iter().find(|address| address.is_ipv4() == v4).map_or(Address::UNSPECIFIED, |a| (*a).into())
        };
        let entry = PodEntry {
            state: POD_REFUSED,
            port4: pod.outbound4.unwrap_or_default().to_be(),
            port6: pod.outbound6.unwrap_or_default().to_be(),
            own4: own(true),
            own6: own(false),
        };
        self.close(pod.netns, entry)?;

        let mut maps = self.maps();
        for address in pod.addresses {
            if let Some(owner) = maps.addresses.owner(&(*address).into()).filter(|owner| *owner != netns) {
                let (address, netns) = (*address, pod.netns.path().to_path_buf());
                return Err(BpfError::AddressTaken { address, netns, owner: owner.0 });
            }
        }
        for old in maps.addresses.of(netns) {
            if !pod.addresses.contains(&old.into()) {
                forget_address(&mut maps, &old)?;
            }
        }
        for address in pod.addresses {
            let key = Address::from(*address);
            maps.addresses.insert(key, netns)?;
            match if address.is_ipv4() { pod.inbound4 } else { pod.inbound6 } {
                Some(listener) => maps.listeners.insert(key, listener.as_raw_fd(), 0),
                None => absent_is_fine(maps.listeners.remove(&key)),
            }
            .map_err(BpfError::map("LISTENERS"))?;
            match pod.inbound4_mapped.filter(|_| address.is_ipv4()) {
                Some(listener) => maps.listeners_mapped.insert(key, listener.as_raw_fd(), 0),
                None => absent_is_fine(maps.listeners_mapped.remove(&key)),
            }
            .map_err(BpfError::map("LISTENERS_MAPPED"))?;
        }
        drop(maps);
        Ok(Enrolment { capture: self.clone(), netns })
    }

    /// Closes a pod in both directions without serving it: for one that is in the mesh but that the agent cannot speak for.
    pub fn refuse(&self, netns: &Netns) -> Result<(), BpfError> {
        let [own4, own6] = [Address::UNSPECIFIED; 2];
        self.close(netns, PodEntry { state: POD_REFUSED, port4: 0, port6: 0, own4, own6 })
    }

    /// Puts the addresses of a pod that was refused behind the egress gate, so that also connections from before its enrolment
    /// carry nothing. An address that belongs to a namespace which is not `served` any more passes over without a gap.
    pub fn cover(
        &self,
        netns: &Netns,
        addresses: &[IpAddr],
        served: impl Fn(NetnsCookie) -> bool,
    ) -> Result<(), BpfError> {
        let mut maps = self.maps();
        for address in addresses {
            let key = Address::from(*address);
            match maps.addresses.owner(&key) {
                Some(owner) if owner == netns.cookie() => {
                    maps.addresses.insert(key, owner)?;
                    continue;
                }
                Some(owner) if served(owner) => {
                    let (address, netns) = (*address, netns.path().to_path_buf());
                    return Err(BpfError::AddressTaken { address, netns, owner: owner.0 });
                }
                Some(_) | None => {}
            }
            forget_listeners(&mut maps, &key)?;
            maps.addresses.insert(key, netns.cookie())?;
        }
        Ok(())
    }

    /// Lets go of a pod, which is open then: it has left the mesh, or is gone.
    pub fn withdraw(&self, netns: NetnsCookie) -> Result<(), BpfError> {
        self.0.pins.remove_link(&inbound_link(netns))?;
        let mut maps = self.maps();
        for address in maps.addresses.of(netns) {
            forget_address(&mut maps, &address)?;
        }
        forget_mapped(&mut maps, Some(netns))?;
        kubelet::forget_probed(&mut maps, |key| key.netns == netns)?;
        absent_is_fine(maps.pods.remove(&netns)).map_err(BpfError::map("PODS"))
    }

    /// Where the connection that came from `client`, in the pod, wanted to go. Answers once: the entry is taken out. `None` is
    /// a connection that was not redirected, such as a program that connects to the agent's listener by itself: refuse it.
    pub fn original_destination(&self, netns: NetnsCookie, client: SocketAddr) -> Result<Option<OrigDst>, BpfError> {
        let key = PodEndpoint::new(netns, client.into());
        let mut maps = self.maps();
        let origin = match maps.origins.get(&key, 0) {
            Err(MapError::KeyNotFound) => {
                self.0.without_origin.fetch_add(1, Ordering::Relaxed);
                return Ok(None);
            }
            origin => origin.map_err(BpfError::map("ORIGINS"))?,
        };
        absent_is_fine(maps.origins.remove(&key)).map_err(BpfError::map("ORIGINS"))?;
        Ok(Some(OrigDst {
            address: origin.destination.into(),
            socket_cookie: origin.socket_cookie,
            cgroup_id: origin.cgroup_id,
        }))
    }

    /// Puts the true client on record before the agent connects to the application from `leg_source`.
    pub fn announce_client(
        &self,
        netns: NetnsCookie,
        leg_source: SocketAddr,
        client: SocketAddr,
    ) -> Result<ClientEntry, BpfError> {
        let key = PodEndpoint::new(netns, leg_source.into());
        let client = Endpoint::from(client);
        self.maps().clients.insert(key, client, 0).map_err(BpfError::map("CLIENTS"))?;
        Ok(ClientEntry { capture: self.clone(), key, client })
    }

    /// For one second connect() itself will tell the pod that this destination refuses.
    pub fn remember_refused(&self, netns: NetnsCookie, destination: SocketAddr) -> Result<(), BpfError> {
        let key = PodEndpoint::new(netns, destination.into());
        self.maps().refused.insert(key, clock::monotonic_nanos(), 0).map_err(BpfError::map("REFUSED"))
    }

    /// What the kernel programs counted since they were first pinned, and what this agent did, by name.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, BpfError> {
        let maps = self.maps();
        let sum = |counter: &Counter| {
            let values = maps.counters.get(&(*counter as u32), 0).map_err(BpfError::map("COUNTERS"))?;
            Ok((counter.name(), values.iter().sum()))
        };
        let own = ("outbound_refused_no_origin", self.0.without_origin.load(Ordering::Relaxed));
        Counter::ALL.iter().map(sum).chain([Ok(own)]).collect()
    }

    /// How many entries the maps hold now and have room for, by the map's name. Goes through all of them.
    pub fn occupancy(&self) -> [(&'static str, u64, u64); 8] {
        fn count<K>(keys: impl Iterator<Item = Result<K, MapError>>) -> u64 {
            keys.filter(Result::is_ok).count() as u64
        }
        let maps = self.maps();
        [
            ("pods", count(maps.pods.keys()), MAX_PODS.into()),
            ("addresses", maps.addresses.count(), MAX_ADDRESSES.into()),
            ("origins", count(maps.origins.keys()), MAX_ORIGINS.into()),
            ("clients", count(maps.clients.keys()), MAX_CLIENTS.into()),
            ("refused", count(maps.refused.keys()), MAX_REFUSED.into()),
            ("direct", count(maps.direct_facts.keys()), MAX_DIRECT.into()),
            ("probed_ports", count(maps.probed_ports.keys()), MAX_PROBED_PORTS.into()),
            ("kubelet", count(maps.kubelet.keys()), MAX_KUBELET.into()),
        ]
    }

    /// Lets one destination pass while the pod is closed, in either direction.
    fn allow_probe(&self, netns: NetnsCookie, destination: SocketAddr) -> Result<ProbePass, BpfError> {
        let key = PodEndpoint::new(netns, destination.into());
        self.maps().probes.insert(key, 1, 0).map_err(BpfError::map("PROBES"))?;
        Ok(ProbePass { capture: self.clone(), key })
    }

    fn close(&self, netns: &Netns, entry: PodEntry) -> Result<(), BpfError> {
        self.maps().pods.insert(netns.cookie(), entry, 0).map_err(BpfError::map("PODS"))?;
        // A pod is refused first and enrolled then.
        if self.has_inbound(netns) {
            return Ok(());
        }
        let mut ebpf = self.0.ebpf.lock().unwrap_or_else(PoisonError::into_inner);
        load::attach_netns(&mut ebpf, &self.0.pins, &inbound_link(netns.cookie()), netns)
    }

    fn maps(&self) -> MutexGuard<'_, Maps> {
        // What a panicking thread left behind is in the kernel, entry by entry, and each is whole.
        self.0.maps.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Capture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Capture").field("cgroup", &self.0.cgroup).field("pins", &self.0.pins).finish_non_exhaustive()
    }
}

impl Enrolment {
    pub fn netns(&self) -> NetnsCookie {
        self.netns
    }

    /// Opens the pod: both directions go through the agent from here on.
    pub fn ready(&self) -> Result<(), BpfError> {
        self.set_state(POD_READY)
    }

    /// Closes the pod again, for as long as the agent cannot speak for it; `ready` opens it with the same listeners.
    pub fn hold(&self) -> Result<(), BpfError> {
        self.set_state(POD_REFUSED)
    }

    fn set_state(&self, state: u32) -> Result<(), BpfError> {
        let mut maps = self.capture.maps();
        let entry = match maps.pods.get(&self.netns, 0) {
            Err(MapError::KeyNotFound) => return Err(BpfError::NotEnrolled { netns: self.netns }),
            entry => entry.map_err(BpfError::map("PODS"))?,
        };
        maps.pods.insert(self.netns, PodEntry { state, ..entry }, 0).map_err(BpfError::map("PODS"))
    }
}

impl Drop for ClientEntry {
    fn drop(&mut self) {
        let mut maps = self.capture.maps();
        // The leg may be closed already and its port be another's, whose entry must stay.
        if maps.clients.get(&self.key, 0).is_ok_and(|client| client == self.client)
            && let Err(error) = absent_is_fine(maps.clients.remove(&self.key))
        {
            tracing::warn!(%error, "a client's entry could not be removed");
        }
    }
}

#[derive(Debug)]
struct ProbePass {
    capture: Capture,
    key: PodEndpoint,
}

impl Drop for ProbePass {
    fn drop(&mut self) {
        if let Err(error) = absent_is_fine(self.capture.maps().probes.remove(&self.key)) {
            tracing::warn!(%error, "a probe's pass could not be removed");
        }
    }
}
