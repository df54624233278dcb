//! The maps. All are bounded; `common/src/limits.rs` says what happens at each bound. The agent pins them by these names.
use aya_ebpf::{
    Global,
    bindings::BPF_F_NO_PREALLOC,
    btf_maps::SkStorage,
    macros::{btf_map, map},
    maps::{HashMap, LruHashMap, PerCpuArray, SockHash},
};
use marline_common::{
    Address, DirectEntry, DirectFacts, Endpoint, Flow, GateEntry, KubeletEntry, MAX_ADDRESSES, MAX_CLIENTS,
    MAX_COUNTERS, MAX_DIRECT, MAX_KUBELET, MAX_MAPPED_PORTS, MAX_ORIGINS, MAX_PODS, MAX_PROBED_PORTS, MAX_PROBES,
    MAX_REFUSED, NetnsCookie, Origin, PodEndpoint, PodEntry, PodPort, SocketEntry, Transcript,
};

/// Enrolled pods. Written by the agent.
#[map]
pub(crate) static PODS: HashMap<NetnsCookie, PodEntry> = HashMap::with_max_entries(MAX_PODS, 0);

/// The pods' addresses and whose they are. Written by the agent.
#[map]
pub(crate) static ADDRESSES: HashMap<Address, NetnsCookie> = HashMap::with_max_entries(MAX_ADDRESSES, 0);

/// The agent's inbound listeners by the pod address they stand for; a listener leaves by itself when it is closed.
///
/// Keyed by address because a lookup program is not told its namespace on 6.1, and one program for all pods is loaded and
/// verified once. Two pods of one agent therefore cannot share an address; the agent refuses to enrol the second.
#[map]
pub(crate) static LISTENERS: SockHash<Address> = SockHash::with_max_entries(MAX_ADDRESSES, 0);

/// The agent's inbound listeners for IPv4 clients of dual-stack applications: IPv6 sockets, to which such clients are v4-mapped.
#[map]
pub(crate) static LISTENERS_MAPPED: SockHash<Address> = SockHash::with_max_entries(MAX_ADDRESSES, 0);

/// The ports of pods where those applications listen. Written by the agent.
#[map]
pub(crate) static MAPPED_PORTS: HashMap<PodPort, u32> = HashMap::with_max_entries(MAX_MAPPED_PORTS, BPF_F_NO_PREALLOC);

/// Redirected sockets and where they wanted to go. In the socket itself: it can be neither forged nor flooded nor outlived.
#[btf_map]
pub(crate) static SOCKETS: SkStorage<SocketEntry> = SkStorage::new();

/// The same, by the leg's local endpoint, for the agent to find; taken out by it. Least recent go first.
#[map]
pub(crate) static ORIGINS: LruHashMap<PodEndpoint, Origin> = LruHashMap::with_max_entries(MAX_ORIGINS, 0);

/// The true clients of inbound connections, by the local endpoint of the agent's leg. Written by the agent.
#[map]
pub(crate) static CLIENTS: HashMap<PodEndpoint, Endpoint> = HashMap::with_max_entries(MAX_CLIENTS, BPF_F_NO_PREALLOC);

/// Destinations that refused a moment ago, and when (CLOCK_MONOTONIC). Written by the agent.
#[map]
pub(crate) static REFUSED: LruHashMap<PodEndpoint, u64> = LruHashMap::with_max_entries(MAX_REFUSED, 0);

/// Destinations of the agent's own probes, which pass before a pod is ready. Written by the agent.
#[map]
pub(crate) static PROBES: HashMap<PodEndpoint, u32> = HashMap::with_max_entries(MAX_PROBES, BPF_F_NO_PREALLOC);

/// Direct sockets and where they stand. Written by the agent, and deleted by whoever connects the socket anew.
#[btf_map]
pub(crate) static DIRECT: SkStorage<DirectEntry> = SkStorage::new();

/// What was seen of the ones in handshake. Written by the programs.
#[btf_map]
pub(crate) static GATES: SkStorage<GateEntry> = SkStorage::new();

/// What may leave them. Written by the agent.
#[btf_map]
pub(crate) static TRANSCRIPTS: SkStorage<Transcript> = SkStorage::new();

/// What the agent's successor must know of direct connections, by socket cookie. Only the agent reads and writes it.
#[map]
pub(crate) static DIRECT_FACTS: HashMap<u64, DirectFacts> = HashMap::with_max_entries(MAX_DIRECT, BPF_F_NO_PREALLOC);

/// The cgroup of an agent that is a pod itself, and so below the pods' cgroup; 0 where it is not. Set when the programs are loaded: the
/// next agent brings its own.
#[unsafe(no_mangle)]
pub(crate) static AGENT_CGROUP: Global<u64> = Global::new(0);

/// The node's own network namespace, where the kubelet is. Set when the programs are loaded.
#[unsafe(no_mangle)]
pub(crate) static NODE_NETNS: Global<u64> = Global::new(0);

/// The ports of pods that their objects declare in probes. Written by the agent.
#[map]
pub(crate) static PROBED_PORTS: HashMap<PodPort, u32> = HashMap::with_max_entries(MAX_PROBED_PORTS, BPF_F_NO_PREALLOC);

/// The kubelet's connections to them. Written by `kubelet`; the agent takes out what has ended.
#[map]
pub(crate) static KUBELET: LruHashMap<Flow, KubeletEntry> = LruHashMap::with_max_entries(MAX_KUBELET, 0);

#[map]
pub(crate) static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(MAX_COUNTERS, 0);
