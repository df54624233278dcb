//! What the kernel accounts to this process: memory, descriptors, processor time, threads. Read from procfs. And how the C library keeps memory.
#![allow(unsafe_code)]
use std::{fs, io, time::Duration};

#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Usage {
    pub resident_bytes: u64,
    /// The most that was ever resident.
    pub peak_bytes: u64,
    pub virtual_bytes: u64,
    pub threads: u64,
    pub open_fds: u64,
    pub max_fds: u64,
    pub processor: Duration,
    /// Since the epoch.
    pub started: Duration,
}

/// Has the threads share as many heaps as there are processors, where glibc would give eight times as many threads one of their own. Each keeps
/// what was free in it for itself: threads that may wait come and go here, and are many when pods are enrolled.
pub fn share_heaps() {
    #[cfg(target_env = "gnu")]
    {
        let heaps = std::thread::available_parallelism().map_or(2, |count| count.get().max(2));
        // SAFETY: it changes a setting of the allocator, under the allocator's own lock.
        unsafe { libc::mallopt(libc::M_ARENA_MAX, libc::c_int::try_from(heaps).unwrap_or(libc::c_int::MAX)) };
    }
}

pub fn usage() -> io::Result<Usage> {
    let text = |name: &str| fs::read_to_string(format!("/proc/self/{name}"));
    let (status, stat, limits) = (text("status")?, text("stat")?, text("limits")?);
    let boot = fs::read_to_string("/proc/stat")?;
    let kib = |key: &str| number(&status, key).unwrap_or_default() * 1024;
    let ticks = ticks(&stat).unwrap_or_default();
    let seconds = |ticks: u64| Duration::from_secs_f64(ticks as f64 / clock_ticks());
    Ok(Usage {
        resident_bytes: kib("VmRSS:"),
        peak_bytes: kib("VmHWM:"),
        virtual_bytes: kib("VmSize:"),
        threads: number(&status, "Threads:").unwrap_or_default(),
        open_fds: fs::read_dir("/proc/self/fd")?.count().saturating_sub(1) as u64,
        max_fds: number(&limits, "Max open files").unwrap_or_default(),
        processor: seconds(ticks.processor),
        started: Duration::from_secs(number(&boot, "btime").unwrap_or_default()) + seconds(ticks.started),
    })
}

/// The first number in the line that begins with the key.
fn number(text: &str, key: &str) -> Option<u64> {
    let rest = text.lines().find_map(|line| line.strip_prefix(key))?;
    rest.split_whitespace().next()?.parse().ok()
}

#[derive(Default, Debug, PartialEq)]
struct Ticks {
    processor: u64,
    started: u64,
}

/// Fields 14, 15 and 22 of proc(5)'s stat. The second is the program's name, which may hold anything.
fn ticks(stat: &str) -> Option<Ticks> {
    let (_, rest) = stat.rsplit_once(')')?;
    let fields: Vec<&str> = rest.split_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
    Some(Ticks { processor: field(14)? + field(15)?, started: field(22)? })
}

fn clock_ticks() -> f64 {
    // What sysconf(_SC_CLK_TCK) says on every Linux of today.
    100.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_from_behind_the_programs_name() {
        let stat = "7 (a) b) c) S 1 7 7 0 -1 4194560 1 0 0 0 11 22 0 0 20 0 9 0 333 1 1";
        assert_eq!(ticks(stat), Some(Ticks { processor: 33, started: 333 }));
        assert_eq!(ticks("7 (a"), None);
    }

    #[test]
    fn this_process_uses_something() {
        let usage = usage().unwrap();
        assert!(usage.resident_bytes > 1 << 20 && usage.resident_bytes <= usage.virtual_bytes, "{usage:?}");
        assert!(usage.threads >= 1 && usage.open_fds >= 3 && usage.max_fds >= usage.open_fds, "{usage:?}");
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
        assert!(usage.started <= now && usage.started + Duration::from_secs(86_400) > now, "{usage:?}");
    }
}
