//! What the kernel programs and the agent share, defined once: map keys and values, counters, limits.
//!
//! Every type here crosses the kernel boundary as plain bytes, so each is `repr(C)`, pads by name and asserts its size.
//! The maps themselves are declared in `ebpf/src/maps.rs`; loading, pinning and filling them is `agent/src/bpf.rs`.
#![no_std]

mod address;
mod counter;
mod direct;
pub mod framing;
mod kubelet;
mod limits;

pub use address::{Address, Endpoint};
pub use counter::Counter;
pub use direct::*;
pub use kubelet::*;
pub use limits::*;

/// A network namespace, as the kernel numbers it: unique until the next boot, never reused. The name of a pod in every map.
#[repr(transparent)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetnsCookie(pub u64);

/// What the hooks know of an enrolled pod. A namespace without an entry is not enrolled and is left alone.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PodEntry {
    /// `POD_REFUSED` or `POD_READY`; anything else counts as refused.
    pub state: u32,
    /// Ports of the agent's outbound listeners at 127.0.0.1 and ::1 of the pod, network byte order; 0 where there is none.
    pub port4: u16,
    pub port6: u16,
    /// What `getsockname` shows instead of a loopback address; unspecified where the pod has no address of the family.
    pub own4: Address,
    pub own6: Address,
}

/// The pod is enrolled, but the agent cannot serve it: its connections are refused, but for the agent's own probes.
pub const POD_REFUSED: u32 = 0;
/// The agent has proven that both directions are captured.
pub const POD_READY: u32 = 1;

/// An endpoint as one pod sees it. The key of `ORIGINS`, `CLIENTS`, `REFUSED` and `PROBES`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PodEndpoint {
    pub netns: NetnsCookie,
    pub endpoint: Endpoint,
    pub pad: [u8; 4],
}

impl PodEndpoint {
    #[inline(always)]
    pub const fn new(netns: NetnsCookie, endpoint: Endpoint) -> Self {
        Self { netns, endpoint, pad: [0; 4] }
    }
}

/// Where a redirected connection wanted to go, and who wanted it. Written before the SYN leaves, under the leg's local endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    pub destination: Endpoint,
    pub pad: [u8; 4],
    pub socket_cookie: u64,
    pub cgroup_id: u64,
}

/// Kept in the storage of a redirected socket: only the kernel can reach it, and it goes when the socket goes.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SocketEntry {
    pub destination: Endpoint,
    pub pad: [u8; 4],
    pub cgroup_id: u64,
}

const _: () = assert!(size_of::<NetnsCookie>() == 8);
const _: () = assert!(size_of::<PodEntry>() == 40);
const _: () = assert!(size_of::<PodEndpoint>() == 32);
const _: () = assert!(size_of::<Origin>() == 40);
const _: () = assert!(size_of::<SocketEntry>() == 32);

#[cfg(feature = "user")]
mod user {
    //! What aya needs to copy these types in and out of maps.
    #![allow(unsafe_code)]
    use super::*;

    macro_rules! pod {
        ($($t:ty),+) => {
            $(
                // SAFETY: `repr(C)` or transparent, made of integers only, every padding byte is a named field (sizes
                // asserted): all bytes are initialised and every bit pattern is a value.
                unsafe impl aya::Pod for $t {}
            )+
        };
    }
    pod!(NetnsCookie, PodEntry, PodEndpoint, PodPort, Origin, Address, Endpoint);
    pod!(DirectEntry, GateEntry, Transcript, DirectFacts);
    pod!(Flow, KubeletEntry);
}
