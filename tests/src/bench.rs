//! What `cargo xtask bench` and the load program `bench_load` say to each other: an order, and an answer in numbers.
//!
//! The load program is the client and the server of every mode alike; it knows nothing of a mesh. Its client is
//! `bench/client.rs`, its server `bench/server.rs`, what goes between them `bench/wire.rs`. When requests are due is `bench/pace.rs`, what latencies amount to
//! `bench/latency.rs`, where processor time went `bench/cpu.rs`, what else is known of processes `bench/tasks.rs` and `bench/trace.rs`. Rounds, modes and comparisons are xtask's.

pub mod client;
pub mod cpu;
pub mod latency;
pub mod pace;
pub mod server;
pub mod tasks;
pub mod trace;
pub mod wire;

use std::{collections::BTreeMap, net::SocketAddr, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use self::{cpu::Spent, latency::Latencies};

/// A request is a block of so many bytes and is answered with as many.
pub const BLOCK: usize = 1024;

/// What is watched under a name that begins so is a proxy, or one of several that are one.
pub const AGENTS: &str = "agent";

/// What the client shall do, and whose processor time it shall take down meanwhile.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Order {
    pub address: SocketAddr,
    pub work: Work,
    /// Whether blocks travel as the bodies of HTTP.
    #[serde(default)]
    pub http: bool,
    /// cgroups by the name that the answer shall give them.
    pub watch: BTreeMap<String, PathBuf>,
    /// Whether the proxies' system calls are to be counted, which costs so much that nothing else of the answer is worth anything.
    #[serde(default)]
    pub trace: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Work {
    /// A new connection for each request, from so many threads, each with one at a time: connect() to the first byte of the answer.
    Connect { count: u32, at_once: u32 },
    /// A new connection for each request, due at a fixed rate whatever becomes of those before: from then to the answer.
    Arrivals { rate: u32, seconds: u32 },
    /// Requests over connections that are there and warm, due at a fixed rate whatever becomes of those before.
    Requests { rate: u32, connections: u32, seconds: u32 },
    /// Requests over one warm connection, each as soon as the one before is answered: for counting work, not for latencies.
    Exchanges { count: u32 },
    /// Bytes one way over so many warm connections at once, until the receiver has said that it has all of them.
    Bulk { bytes: u64, streams: u32 },
    /// So many connections, each with one exchange behind it, and then nothing for so long.
    Idle { connections: u32, seconds: u32 },
}

/// What came of it. All of it is about the measured part alone: what warms up before is left out.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub seconds: f64,
    /// Of each connection or request, if they were taken.
    pub latencies: Option<Latencies>,
    /// How late the client itself began with a request that was due: a time that is in the latencies, but no fault of what is measured
    /// unless a request before was still under way.
    pub late: Option<Latencies>,
    pub spent: Spent,
    /// What the proxies had of memory before connections were idle, and then.
    pub memory: Option<Memory>,
    /// System calls of the proxies, if they were to be counted.
    pub calls: Option<u64>,
}

/// In bytes, of all proxies together: what no file stands behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Memory {
    pub before: u64,
    pub then: u64,
}
