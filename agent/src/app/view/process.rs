//! The agent as a process: what the kernel and the asynchronous runtime say of it.

use std::{collections::BTreeMap, fs, time::Instant};

use serde_json::{Value, json};
use tokio::runtime::Handle;

use crate::{metrics::Process, sys::memory};

pub(super) fn metrics() -> Option<Process> {
    let usage = memory::usage().inspect_err(|error| tracing::warn!(%error, "procfs cannot be read")).ok()?;
    Some(Process {
        cpu_seconds: usage.processor.as_secs_f64(),
        resident_bytes: usage.resident_bytes,
        open_fds: usage.open_fds,
        max_fds: usage.max_fds,
        start_seconds: usage.started.as_secs_f64(),
    })
}

pub(super) fn runtime(started: Instant, runtime: &Handle, connections: usize) -> Value {
    let tokio = runtime.metrics();
    let usage = memory::usage().unwrap_or_default();
    json!({
        "pid": std::process::id(),
        "uptime_seconds": started.elapsed().as_secs(),
        "connections": connections,
        "tokio": {
            "workers": tokio.num_workers(),
            "alive_tasks": tokio.num_alive_tasks(),
            "waiting_tasks": tokio.global_queue_depth(),
        },
        "memory": {
            "resident_bytes": usage.resident_bytes,
            "peak_bytes": usage.peak_bytes,
            "virtual_bytes": usage.virtual_bytes,
        },
        "threads": { "count": usage.threads, "by_name": threads() },
        "descriptors": { "open": usage.open_fds, "limit": usage.max_fds },
        "processor_seconds": usage.processor.as_secs_f64(),
    })
}

/// How many threads have each name: those that wait for the kernel in the place of tasks are among the runtime's.
fn threads() -> BTreeMap<String, usize> {
    let mut names = BTreeMap::new();
    for thread in fs::read_dir("/proc/self/task").into_iter().flatten().flatten() {
        if let Ok(name) = fs::read_to_string(thread.path().join("comm")) {
            *names.entry(name.trim().to_owned()).or_default() += 1;
        }
    }
    names
}
