//! What the kernel knows of the processes of a cgroup: how often their threads were switched, and how much memory of their own they have. Only of
//! those right in it, not of cgroups below: a proxy is in one.

use std::{collections::BTreeMap, fs, path::Path};

use anyhow::{Context, Result};

use crate::cgroup;

/// Threads by process and thread, and how often each was switched away from so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Switches(BTreeMap<(u32, u32), u64>);

impl Switches {
    /// Of the threads that are there now.
    #[must_use]
    pub fn of_cgroup(path: &Path) -> Self {
        let mut all = BTreeMap::new();
        for process in cgroup::processes(path) {
            // Whoever has ended since it was listed has no threads.
            for thread in fs::read_dir(format!("/proc/{process}/task")).into_iter().flatten().flatten() {
                let text = fs::read_to_string(thread.path().join("status")).unwrap_or_default();
                let number = thread.file_name().to_str().and_then(|name| name.parse().ok());
                if let (Some(number), Some(count)) = (number, switches(&text)) {
                    all.insert((process, number), count);
                }
            }
        }
        Self(all)
    }

    /// How many came since. Nothing if a thread has ended meanwhile: what it had at its end nobody knows.
    #[must_use]
    pub fn since(&self, before: &Self) -> Option<u64> {
        if before.0.keys().any(|thread| !self.0.contains_key(thread)) {
            return None;
        }
        Some(self.0.iter().map(|(thread, count)| count - before.0.get(thread).copied().unwrap_or_default()).sum())
    }
}

/// The bytes of memory that no file stands behind and that are this cgroup's processes' own; what they share counts for each in part.
pub fn anonymous(path: &Path) -> Result<u64> {
    cgroup::processes(path).into_iter().map(anonymous_of).sum()
}

fn anonymous_of(process: u32) -> Result<u64> {
    // Counted page by page, unlike what `status` says, which is only nearly so where there are several processors.
    let file = format!("/proc/{process}/smaps_rollup");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {file}"))?;
    kibibytes(&text, "Pss_Anon:")
        .or_else(|| kibibytes(&text, "Anonymous:"))
        .with_context(|| format!("no Pss_Anon in {file}"))
}

fn kibibytes(text: &str, field: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(field))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

fn switches(status: &str) -> Option<u64> {
    let field = |name: &str| status.lines().find_map(|line| line.strip_prefix(name))?.trim().parse::<u64>().ok();
    Some(field("voluntary_ctxt_switches:")? + field("nonvoluntary_ctxt_switches:")?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counted(threads: &[(u32, u64)]) -> Switches {
        Switches(threads.iter().map(|(thread, count)| ((1, *thread), *count)).collect())
    }

    #[test]
    fn both_kinds_of_switches_count() {
        let status = "Name:\tx\nvoluntary_ctxt_switches:\t40\nnonvoluntary_ctxt_switches:\t2\n";
        assert_eq!(switches(status), Some(42));
        assert_eq!(switches("Name:\tx\n"), None);
    }

    #[test]
    fn a_thread_that_began_meanwhile_counts_and_one_that_ended_leaves_no_figure() {
        let before = counted(&[(1, 10), (2, 20)]);
        assert_eq!(counted(&[(1, 15), (2, 20), (3, 7)]).since(&before), Some(12));
        assert_eq!(counted(&[(1, 15)]).since(&before), None);
    }

    #[test]
    fn memory_is_in_kibibytes_by_its_own_name() {
        let rollup = "Rss:  900 kB\nPss_Anon:    300 kB\nPss_File: 10 kB\nAnonymous:   400 kB\n";
        assert_eq!(kibibytes(rollup, "Pss_Anon:"), Some(300 * 1024));
        assert_eq!(kibibytes(rollup, "Pss_Shmem:"), None);
    }

    #[test]
    fn the_kernel_tells_the_memory_of_this_very_process() {
        assert!(anonymous_of(std::process::id()).unwrap() > 0);
    }
}
