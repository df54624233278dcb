//! The embedded kernel programs: loading them onto the pinned maps, and attaching them in a predecessor's place.
use std::{
    collections,
    fs::File,
    os::fd::AsFd,
    path::Path,
    thread::{self, JoinHandle},
};

use aya::{
    Ebpf, EbpfLoader, Pod, include_bytes_aligned,
    maps::{HashMap, Map, MapData, MapType, PerCpuArray, SkStorage, SockHash},
    programs::{
        CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, CgroupSock, CgroupSockAddr, Program, ProgramError, SkLookup,
        SockOps, links::FdLink,
    },
};
use marline_common::{
    Address, DirectEntry, DirectFacts, Endpoint, Flow, GateEntry, KubeletEntry, MAX_ADDRESSES, MAX_CLIENTS,
    MAX_COUNTERS, MAX_DIRECT, MAX_KUBELET, MAX_MAPPED_PORTS, MAX_ORIGINS, MAX_PODS, MAX_PROBED_PORTS, MAX_PROBES,
    MAX_REFUSED, Origin, PodEndpoint, PodEntry, PodPort, SocketEntry, Transcript,
};

use super::{
    entries::Addresses,
    error::BpfError,
    log,
    pins::{self, Pins},
};
use crate::sys::netns::{Netns, NetnsCookie};

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/marline-ebpf.o"));

pub(super) const ADDRESS_HOOKS: [&str; 6] =
    ["connect4", "connect6", "getpeername4", "getpeername6", "getsockname4", "getsockname6"];
pub(super) const INBOUND: &str = "inbound";
pub(super) const KUBELET: &str = "kubelet";
const EGRESS: &str = "egress";
/// All but those of [`ADDRESS_HOOKS`].
const OTHERS: [&str; 5] = ["connecting", KUBELET, "create", EGRESS, INBOUND];

/// The shape of a map that outlives its agent: name, type, size of key and value, capacity.
type Layout = (&'static str, MapType, usize, usize, u32);

const PINNED: [Layout; 17] = [
    ("PODS", MapType::Hash, size_of::<NetnsCookie>(), size_of::<PodEntry>(), MAX_PODS),
    ("ADDRESSES", MapType::Hash, size_of::<Address>(), size_of::<NetnsCookie>(), MAX_ADDRESSES),
    ("LISTENERS", MapType::SockHash, size_of::<Address>(), size_of::<u32>(), MAX_ADDRESSES),
    ("LISTENERS_MAPPED", MapType::SockHash, size_of::<Address>(), size_of::<u32>(), MAX_ADDRESSES),
    ("MAPPED_PORTS", MapType::Hash, size_of::<PodPort>(), size_of::<u32>(), MAX_MAPPED_PORTS),
    ("SOCKETS", MapType::SkStorage, size_of::<u32>(), size_of::<SocketEntry>(), 0),
    ("ORIGINS", MapType::LruHash, size_of::<PodEndpoint>(), size_of::<Origin>(), MAX_ORIGINS),
    ("CLIENTS", MapType::Hash, size_of::<PodEndpoint>(), size_of::<Endpoint>(), MAX_CLIENTS),
    ("REFUSED", MapType::LruHash, size_of::<PodEndpoint>(), size_of::<u64>(), MAX_REFUSED),
    ("PROBES", MapType::Hash, size_of::<PodEndpoint>(), size_of::<u32>(), MAX_PROBES),
    ("DIRECT", MapType::SkStorage, size_of::<u32>(), size_of::<DirectEntry>(), 0),
    ("GATES", MapType::SkStorage, size_of::<u32>(), size_of::<GateEntry>(), 0),
    ("TRANSCRIPTS", MapType::SkStorage, size_of::<u32>(), size_of::<Transcript>(), 0),
    ("DIRECT_FACTS", MapType::Hash, size_of::<u64>(), size_of::<DirectFacts>(), MAX_DIRECT),
    ("PROBED_PORTS", MapType::Hash, size_of::<PodPort>(), size_of::<u32>(), MAX_PROBED_PORTS),
    ("KUBELET", MapType::LruHash, size_of::<Flow>(), size_of::<KubeletEntry>(), MAX_KUBELET),
    ("COUNTERS", MapType::PerCpuArray, size_of::<u32>(), size_of::<u64>(), MAX_COUNTERS),
];

/// The maps that the agent reads and writes.
pub(super) struct Maps {
    pub(super) pods: HashMap<MapData, NetnsCookie, PodEntry>,
    pub(super) addresses: Addresses,
    pub(super) listeners: SockHash<MapData, Address>,
    pub(super) listeners_mapped: SockHash<MapData, Address>,
    pub(super) mapped_ports: HashMap<MapData, PodPort, u32>,
    pub(super) origins: HashMap<MapData, PodEndpoint, Origin>,
    pub(super) clients: HashMap<MapData, PodEndpoint, Endpoint>,
    pub(super) refused: HashMap<MapData, PodEndpoint, u64>,
    pub(super) probes: HashMap<MapData, PodEndpoint, u32>,
    pub(super) direct: SkStorage<MapData, DirectEntry>,
    pub(super) gates: SkStorage<MapData, GateEntry>,
    pub(super) transcripts: SkStorage<MapData, Transcript>,
    pub(super) direct_facts: HashMap<MapData, u64, DirectFacts>,
    pub(super) probed_ports: HashMap<MapData, PodPort, u32>,
    pub(super) kubelet: HashMap<MapData, Flow, KubeletEntry>,
    pub(super) counters: PerCpuArray<MapData, u64>,
}

/// What reads the object. To make it takes a moment, in which it reads the kernel's own types, wanted or not: it can be begun before
/// anything is known.
pub struct Loader(JoinHandle<EbpfLoader<'static>>);

impl Loader {
    /// Nothing where no thread can be had.
    pub fn begin() -> Option<Self> {
        thread::Builder::new().name("bpf-loader".to_owned()).spawn(loader).ok().map(Self)
    }
}

fn loader() -> EbpfLoader<'static> {
    // Remembered by the library: what this kernel can do.
    let _ = aya::features();
    let mut loader = EbpfLoader::new();
    // Nothing is relocated against the kernel's own types.
    loader.btf(None);
    loader
}

/// Loads every program. Maps that a predecessor pinned are taken over with what is in them.
/// `own` is the agent's cgroup, if it is below that of the pods.
pub(super) fn load(pins: &Pins, own: Option<u64>, begun: Option<Loader>) -> Result<Ebpf, BpfError> {
    for layout in &PINNED {
        check_layout(&pins.map(layout.0), layout)?;
    }
    let mut loader = begun.and_then(|begun| begun.0.join().ok()).unwrap_or_else(loader);
    for (name, ..) in PINNED {
        loader.map_pin_path(name, pins.map(name));
    }
    programs(loader, own)
}

/// Loads every program for nothing, and looks whether the maps that are pinned at `root` are such as these take over.
pub(super) fn rehearse(root: &Path, own: Option<u64>) -> Result<(), BpfError> {
    for layout in &PINNED {
        check_layout(&pins::map(root, layout.0), layout)?;
    }
    programs(loader(), own).map(drop)
}

fn programs(loader: EbpfLoader<'static>, own: Option<u64>) -> Result<Ebpf, BpfError> {
    if OBJECT.is_empty() {
        return Err(BpfError::NoObject);
    }
    // No cgroup has the id 0.
    let (level, own) = (log::level(), own.unwrap_or_default());
    let node = Netns::current().map_err(BpfError::Socket)?.cookie().0;
    let mut loader: EbpfLoader<'_> = loader;
    loader.override_global("AYA_LOG_LEVEL", &level, true).override_global("AGENT_CGROUP", &own, true);
    loader.override_global("NODE_NETNS", &node, true);
    let mut ebpf = loader.load(OBJECT).map_err(BpfError::Object)?;
    load_programs(&mut ebpf)?;
    Ok(ebpf)
}

/// What takes the kernel as long as all others together, to verify it, is loaded beside them.
fn load_programs(ebpf: &mut Ebpf) -> Result<(), BpfError> {
    let known = |found: &str| ADDRESS_HOOKS.into_iter().chain(OTHERS).find(|name| *name == found);
    let programs = ebpf.programs_mut().filter_map(|(name, program)| Some((known(name)?, program)));
    let (slow, others): (Vec<_>, Vec<_>) = programs.partition(|(name, _)| *name == EGRESS);
    let load = |programs: Vec<(&'static str, &mut Program)>| {
        programs.into_iter().try_for_each(|(name, program)| load_program(program).map_err(failed(name)))
    };
    thread::scope(|scope| {
        let slow = thread::Builder::new().spawn_scoped(scope, || load(slow));
        let slow = slow.map_err(|source| BpfError::File { action: "no thread for", path: EGRESS.into(), source })?;
        load(others)?;
        slow.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn load_program(program: &mut Program) -> Result<(), ProgramError> {
    match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSkb(program) => program.load(),
        Program::SkLookup(program) => program.load(),
        _ => Err(ProgramError::UnexpectedProgramType),
    }
}

/// What the kernel calls the programs that were loaded.
pub(super) fn numbers(ebpf: &Ebpf) -> collections::HashMap<String, u32> {
    let number = |(name, program): (&str, &Program)| Some((name.to_owned(), program.info().ok()?.id()));
    ebpf.programs().filter_map(number).collect()
}

/// Takes the maps out of the loaded object.
pub(super) fn maps(ebpf: &mut Ebpf) -> Result<Maps, BpfError> {
    Ok(Maps {
        pods: hash(ebpf, "PODS")?,
        addresses: Addresses::new(hash(ebpf, "ADDRESSES")?)?,
        listeners: take(ebpf, "LISTENERS")?.try_into().map_err(BpfError::map("LISTENERS"))?,
        listeners_mapped: take(ebpf, "LISTENERS_MAPPED")?.try_into().map_err(BpfError::map("LISTENERS_MAPPED"))?,
        mapped_ports: hash(ebpf, "MAPPED_PORTS")?,
        origins: hash(ebpf, "ORIGINS")?,
        clients: hash(ebpf, "CLIENTS")?,
        refused: hash(ebpf, "REFUSED")?,
        probes: hash(ebpf, "PROBES")?,
        direct: take(ebpf, "DIRECT")?.try_into().map_err(BpfError::map("DIRECT"))?,
        gates: take(ebpf, "GATES")?.try_into().map_err(BpfError::map("GATES"))?,
        transcripts: take(ebpf, "TRANSCRIPTS")?.try_into().map_err(BpfError::map("TRANSCRIPTS"))?,
        direct_facts: hash(ebpf, "DIRECT_FACTS")?,
        probed_ports: hash(ebpf, "PROBED_PORTS")?,
        kubelet: hash(ebpf, "KUBELET")?,
        counters: take(ebpf, "COUNTERS")?.try_into().map_err(BpfError::map("COUNTERS"))?,
    })
}

/// Attaches everything that hangs on the pods' cgroup. What a connect needs afterwards comes before the connect hooks.
pub(super) fn attach_cgroup(ebpf: &mut Ebpf, pins: &Pins, cgroup: &File, path: &Path) -> Result<(), BpfError> {
    // Links are always "multi"; the flag for it is refused with them.
    const MODE: CgroupAttachMode = CgroupAttachMode::Single;
    let attached = |name| move |source| BpfError::Attach { name, target: path.to_path_buf(), source };

    let hook = program::<SockOps>(ebpf, "connecting")?;
    let id = hook.attach(cgroup, MODE).map_err(attached("connecting"))?;
    let link = hook.take_link(id).map_err(attached("connecting"))?;
    pins.replace_link("connecting", fd_link("connecting", path, link.try_into())?)?;

    let hook = program::<CgroupSock>(ebpf, "create")?;
    let id = hook.attach(cgroup, MODE).map_err(attached("create"))?;
    let link = hook.take_link(id).map_err(attached("create"))?;
    pins.replace_link("create", fd_link("create", path, link.try_into())?)?;

    let hook = program::<CgroupSkb>(ebpf, EGRESS)?;
    let id = hook.attach(cgroup, CgroupSkbAttachType::Egress, MODE).map_err(attached(EGRESS))?;
    let link = hook.take_link(id).map_err(attached(EGRESS))?;
    pins.replace_link(EGRESS, fd_link(EGRESS, path, link.try_into())?)?;

    for name in ADDRESS_HOOKS {
        let hook = program::<CgroupSockAddr>(ebpf, name)?;
        let id = hook.attach(cgroup, MODE).map_err(attached(name))?;
        let link = hook.take_link(id).map_err(attached(name))?;
        pins.replace_link(name, fd_link(name, path, link.try_into())?)?;
    }
    Ok(())
}

/// Attaches the hook that sees the kubelet connect.
pub(super) fn attach_kubelet(ebpf: &mut Ebpf, pins: &Pins, cgroup: &File, path: &Path) -> Result<(), BpfError> {
    let attached = |source| BpfError::Attach { name: KUBELET, target: path.to_path_buf(), source };
    let hook = program::<SockOps>(ebpf, KUBELET)?;
    let id = hook.attach(cgroup, CgroupAttachMode::Single).map_err(attached)?;
    let link = hook.take_link(id).map_err(attached)?;
    pins.replace_link(KUBELET, fd_link(KUBELET, path, link.try_into())?)
}

/// Attaches the inbound hook to a pod's namespace.
pub(super) fn attach_netns(ebpf: &mut Ebpf, pins: &Pins, pin: &str, netns: &Netns) -> Result<(), BpfError> {
    let attached = |source| BpfError::Attach { name: INBOUND, target: netns.path().to_path_buf(), source };
    let hook = program::<SkLookup>(ebpf, INBOUND)?;
    let id = hook.attach(netns.as_fd()).map_err(attached)?;
    let link = hook.take_link(id).map_err(attached)?;
    pins.replace_link(pin, link.into())
}

fn program<'a, P>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, BpfError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = ebpf.program_mut(name).ok_or(BpfError::Missing { kind: "program", name })?;
    program.try_into().map_err(failed(name))
}

fn failed(name: &'static str) -> impl FnOnce(ProgramError) -> BpfError {
    move |source| BpfError::Program { name, source }
}

fn fd_link(
    name: &'static str,
    target: &Path,
    link: Result<FdLink, aya::programs::links::LinkError>,
) -> Result<FdLink, BpfError> {
    link.map_err(|_| BpfError::Attach { name, target: target.to_path_buf(), source: ProgramError::NotAttached })
}

fn take(ebpf: &mut Ebpf, name: &'static str) -> Result<Map, BpfError> {
    ebpf.take_map(name).ok_or(BpfError::Missing { kind: "map", name })
}

fn hash<K: Pod, V: Pod>(ebpf: &mut Ebpf, name: &'static str) -> Result<HashMap<MapData, K, V>, BpfError> {
    take(ebpf, name)?.try_into().map_err(BpfError::map(name))
}

/// A map of another shape must not be taken over: the programs would read past its values.
fn check_layout(path: &Path, &(name, kind, key, value, capacity): &Layout) -> Result<(), BpfError> {
    if !path.exists() {
        return Ok(());
    }
    let info = MapData::from_pin(path).and_then(|map| map.info()).map_err(BpfError::map(name))?;
    let found = (
        info.map_type().map_err(BpfError::map(name))?,
        info.key_size() as usize,
        info.value_size() as usize,
        info.max_entries(),
    );
    let expected = (kind, key, value, capacity);
    if found == expected {
        return Ok(());
    }
    let detail = format!("found type, key, value, capacity {found:?}, expected {expected:?}");
    Err(BpfError::Layout { path: path.to_path_buf(), detail })
}
