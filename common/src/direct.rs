//! What the kernel is told of direct connections: a pod's own sockets that the agent connects and hands back.
//!
//! Three pieces hang on such a socket. The agent writes the first and the last, and replaces them whole; the kernel writes the
//! middle one in place. So neither can undo what the other has noted.
use crate::{Endpoint, NetnsCookie, framing::Framing};

/// Where a direct socket stands. Written by the agent.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DirectEntry {
    /// One of the states below; anything else counts as shut.
    pub state: u32,
    /// The only destination that it may be connected to, once, while in handshake.
    pub to: Endpoint,
    /// What getpeername shows.
    pub shown: Endpoint,
    /// How many bytes were announced in all, once it is released: records begin after them.
    pub announced: u32,
}

/// Nothing leaves the socket until it is connected anew, which turns it around like any other.
pub const DIRECT_SHUT: u32 = 0;
/// What the agent has announced leaves the socket, and nothing else.
pub const DIRECT_HANDSHAKE: u32 = 1;
/// The socket is the application's, and what leaves it is TLS records.
pub const DIRECT_RELEASED: u32 = 2;
/// The socket is the application's, and whatever is written leaves it: for the build without records alone.
pub const DIRECT_WITHOUT_RECORDS: u32 = 3;

/// What the kernel has seen of a direct socket. Each word is written alone.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct GateEntry {
    /// The sequence number of the SYN, if `synced`.
    pub isn: u32,
    pub synced: u32,
    /// It was connected: a second time is not the agent's doing.
    pub connected: u32,
    /// Something was sent, or tried, that the agent had not announced, or that was no record after the release.
    pub poisoned: u32,
    /// What left after the handshake.
    pub framing: Framing,
}

/// Bytes of a handshake that can be announced: a client's side of TLS 1.3 with certificates is about half of that. Chosen so
/// that the kernel's allocation for it stays within 8 KiB, and two of them (an old and its successor) within the least that
/// Linux 6.1 grants a socket for options.
pub const MAX_ANNOUNCED: usize = 124 * ANNOUNCED_CHUNK;
/// How many bytes the kernel compares at once.
pub const ANNOUNCED_CHUNK: usize = 64;

/// The stream from its first byte, as far as the agent has announced it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Transcript {
    pub length: u32,
    pub pad: u32,
    /// A chunk more than can be announced, so that a chunk may be read at the last byte.
    pub bytes: [u8; MAX_ANNOUNCED + ANNOUNCED_CHUNK],
}

/// What the agent's successor must know of a direct connection; the kernel programs do not look at it.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct DirectFacts {
    pub length: u32,
    pub bytes: [u8; MAX_DIRECT_FACTS],
}

pub const MAX_DIRECT_FACTS: usize = 2044;

/// A port of a pod, in network byte order. The key of `MAPPED_PORTS` and `PROBED_PORTS`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct PodPort {
    pub netns: NetnsCookie,
    pub port: u16,
    pub pad: [u8; 6],
}

impl PodPort {
    #[inline(always)]
    pub const fn new(netns: NetnsCookie, port: u16) -> Self {
        Self { netns, port, pad: [0; 6] }
    }
}

impl Transcript {
    pub const EMPTY: Self = Self { length: 0, pad: 0, bytes: [0; MAX_ANNOUNCED + ANNOUNCED_CHUNK] };
}

const _: () = assert!(size_of::<DirectEntry>() == 48);
const _: () = assert!(size_of::<GateEntry>() == 40);
const _: () = assert!(size_of::<Transcript>() == 8 + MAX_ANNOUNCED + ANNOUNCED_CHUNK);
const _: () = assert!(size_of::<Transcript>() <= 8192 - 128);
const _: () = assert!(size_of::<DirectFacts>() == 2048);
const _: () = assert!(size_of::<PodPort>() == 16);
