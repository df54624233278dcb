//! Where processor time went: the machine's from /proc/stat, in ticks of 10 ms and with everything else that runs there; that of cgroups from
//! cpu.stat, in microseconds and theirs alone. Interrupts that hit an idle processor are in the first only.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::unistd::{SysconfVar, sysconf};
use serde::{Deserialize, Serialize};

use super::tasks::Switches;

/// Processor seconds, and how often processors turned to another thread.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Spent {
    /// Of the whole machine, whoever spent them.
    pub machine: f64,
    /// Of all processors, spent on nothing.
    pub idle: f64,
    /// Of the cgroups that were watched, by their names.
    pub watched: BTreeMap<String, f64>,
    /// Context switches of the threads in them; without those of which nobody can tell any more.
    #[serde(default)]
    pub switches: BTreeMap<String, u64>,
}

impl Spent {
    /// Of all that were watched together.
    #[must_use]
    pub fn by_watched(&self) -> f64 {
        self.watched.values().sum()
    }
}

/// A look at all counters.
pub struct Look<'a> {
    watch: &'a BTreeMap<String, PathBuf>,
    counted: Spent,
    switches: BTreeMap<String, Switches>,
}

impl<'a> Look<'a> {
    pub fn now(watch: &'a BTreeMap<String, PathBuf>) -> Result<Self> {
        let switches = switches(watch);
        let counted = counted(watch)?;
        Ok(Self { watch, counted, switches })
    }

    /// What was spent since.
    pub fn spent(&self) -> Result<Spent> {
        let now = counted(self.watch)?;
        let before = |name: &String| self.counted.watched.get(name).copied().unwrap_or_default();
        let watched = now.watched.iter().map(|(name, spent)| (name.clone(), spent - before(name))).collect();
        let since = |(name, now): (String, Switches)| Some((now.since(self.switches.get(&name)?)?, name));
        let switches = switches(self.watch).into_iter().filter_map(since).map(|(count, name)| (name, count)).collect();
        Ok(Spent { machine: now.machine - self.counted.machine, idle: now.idle - self.counted.idle, watched, switches })
    }
}

/// The processor seconds that a cgroup and those below it have spent so far.
pub fn of_cgroup(cgroup: &Path) -> Result<f64> {
    let file = cgroup.join("cpu.stat");
    let text = fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))?;
    usage(&text).with_context(|| format!("no usage_usec in {}", file.display()))
}

fn counted(watch: &BTreeMap<String, PathBuf>) -> Result<Spent> {
    let text = fs::read_to_string("/proc/stat").context("reading /proc/stat")?;
    let ticks = sysconf(SysconfVar::CLK_TCK).context("asking for the length of a tick")?.context("no CLK_TCK")?;
    let (machine, idle) = machine(&text, ticks as f64).context("no line for all processors in /proc/stat")?;
    let watched = watch.iter().map(|(name, cgroup)| Ok((name.clone(), of_cgroup(cgroup)?))).collect::<Result<_>>()?;
    Ok(Spent { machine, idle, watched, switches: BTreeMap::new() })
}

fn switches(watch: &BTreeMap<String, PathBuf>) -> BTreeMap<String, Switches> {
    watch.iter().map(|(name, cgroup)| (name.clone(), Switches::of_cgroup(cgroup))).collect()
}

fn usage(text: &str) -> Option<f64> {
    let micros = text.lines().find_map(|line| line.strip_prefix("usage_usec "))?;
    Some(micros.trim().parse::<u64>().ok()? as f64 / 1e6)
}

/// Seconds busy and idle. What a hypervisor took away (steal) is neither, and guests are counted as user already.
fn machine(text: &str, ticks: f64) -> Option<(f64, f64)> {
    let line = text.lines().find_map(|line| line.strip_prefix("cpu "))?;
    let fields: Vec<u64> = line.split_whitespace().map_while(|field| field.parse().ok()).collect();
    let [user, nice, system, idle, iowait, irq, softirq, ..] = fields.as_slice() else { return None };
    Some(((user + nice + system + irq + softirq) as f64 / ticks, (idle + iowait) as f64 / ticks))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_busy_with_all_but_idling_waiting_and_what_was_stolen() {
        let text = "cpu  100 20 30 4000 500 6 7 80 9 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n";
        assert_eq!(machine(text, 100.0), Some((1.63, 45.0)));
        assert_eq!(machine("cpu  1 2 3\n", 100.0), None);
    }

    #[test]
    fn a_cgroup_tells_its_time_in_microseconds() {
        assert_eq!(usage("usage_usec 1500000\nuser_usec 1\nsystem_usec 2\n"), Some(1.5));
        assert_eq!(usage("user_usec 1\n"), None);
    }
}
