//! Sizes of the maps and times that both sides must agree on. Everything is bounded; what happens at the bound is said here.

/// Pods on a node. Beyond it enrolment fails.
pub const MAX_PODS: u32 = 4096;
/// Addresses of all pods on a node. Beyond it enrolment fails.
pub const MAX_ADDRESSES: u32 = 16384;
/// Redirected connections that the agent has not accepted yet, and leftovers of failed ones. The least recent go first; a
/// connection that lost its entry is refused.
pub const MAX_ORIGINS: u32 = 65536;
/// Inbound connections whose true client is on record. Beyond it the agent refuses the connection.
pub const MAX_CLIENTS: u32 = 262_144;
/// Destinations that refused a moment ago. The least recent go first; then connect() succeeds and is reset, as on a first try.
pub const MAX_REFUSED: u32 = 16384;
/// Self-tests under way.
pub const MAX_PROBES: u32 = 1024;
/// Ports whose IPv4 clients are given to the v4-mapped listener. Beyond it they are not, and are served through the proxy.
pub const MAX_MAPPED_PORTS: u32 = 16384;
/// Ports that pods of the node declare in probes. Beyond it the kubelet's probes of those ports are refused.
pub const MAX_PROBED_PORTS: u32 = 16384;
/// The kubelet's connections to such ports. The least recent go first, and are refused then.
pub const MAX_KUBELET: u32 = 16384;
/// Direct connections whose facts are kept for the agent's successor. Beyond it connections are not made direct.
pub const MAX_DIRECT: u32 = 65536;
/// Slots for counters: more than there are, so that a version with more of them can adopt the maps of its predecessor.
pub const MAX_COUNTERS: u32 = 64;
/// How long connect() itself repeats a refusal.
pub const REFUSED_FOR_NANOS: u64 = 1_000_000_000;
