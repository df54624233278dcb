//! What a cluster leaves in the kernel and on disk, found by name alone: so it can be removed after a crash as well.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use crate::{
    cgroup::{self, Tree},
    netns,
};

/// Names of clusters that die with their process begin with this, then the process id.
pub const PREFIX: &str = "marline-t";

const BPF: &str = "/sys/fs/bpf";

/// Where the agent of a node pins its programs. The parent has to be the BPF file system: it is mounted if it is not.
#[must_use]
pub fn pins(node: &str) -> PathBuf {
    Path::new(BPF).join(node)
}

/// Mounts the BPF file system where every distribution with systemd has it, if nobody has.
pub fn mount_bpf() -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    if mounts.lines().any(|line| line.split_whitespace().skip(1).take(2).eq([BPF, "bpf"])) {
        return Ok(());
    }
    mount(Some("bpf"), BPF, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("mounting the BPF file system; way out: mount -t bpf bpf {BPF}"))
}

/// Removes everything that carries the cluster's name: processes, cgroups, pins and namespaces. Nothing there is fine.
pub fn remove(cluster: &str) -> Result<()> {
    // Every part is tried, whatever becomes of the one before; the first error is told.
    let mut outcome = Tree::named(cluster).and_then(|tree| tree.remove());
    for node in entries(Path::new(BPF)).filter(|name| belongs(name, cluster)) {
        let pins = pins(&node);
        outcome = outcome.and(remove_pins(&pins).with_context(|| format!("removing the pins {}", pins.display())));
    }
    for name in netns::list().iter().filter(|name| belongs(name, cluster)) {
        outcome = outcome.and(netns::remove(name));
    }
    outcome
}

/// Removes the clusters of processes that are gone.
pub fn sweep() {
    let mut names: Vec<String> = netns::list();
    names.extend(entries(Path::new(BPF)));
    names.extend(cgroup::mount_point().iter().flat_map(|mount| entries(mount)));
    let mut clusters: Vec<&str> = names.iter().filter_map(|name| cluster_of_the_dead(name)).collect();
    clusters.sort_unstable();
    clusters.dedup();
    for cluster in clusters {
        if let Err(error) = remove(cluster) {
            eprintln!("removing what is left of {cluster}: {error:#}");
        }
    }
}

/// The cluster that a name belongs to, if its process is gone.
fn cluster_of_the_dead(name: &str) -> Option<&str> {
    let rest = name.strip_prefix(PREFIX)?;
    let own = rest.split('-').next()?;
    let (pid, _) = own.split_once('x')?;
    let pid: u32 = pid.parse().ok()?;
    (!Path::new("/proc").join(pid.to_string()).exists()).then(|| &name[..PREFIX.len() + own.len()])
}

fn belongs(name: &str, cluster: &str) -> bool {
    name.strip_prefix(cluster).is_some_and(|rest| rest.starts_with('-'))
}

fn entries(directory: &Path) -> impl Iterator<Item = String> {
    fs::read_dir(directory).into_iter().flatten().flatten().filter_map(|entry| entry.file_name().into_string().ok())
}

/// Pins are files in directories; removing the last name of a link detaches it.
fn remove_pins(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() { remove_pins(&entry.path())? } else { fs::remove_file(entry.path())? }
    }
    fs::remove_dir(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_processes_are_swept() {
        let living = format!("{PREFIX}{}x0-a", std::process::id());
        assert_eq!(cluster_of_the_dead(&living), None);
        // Beyond the greatest pid that Linux gives.
        assert_eq!(cluster_of_the_dead("marline-t4999999x12-client-a"), Some("marline-t4999999x12"));
        assert_eq!(cluster_of_the_dead("marline-t4999999x12"), Some("marline-t4999999x12"));
        assert_eq!(cluster_of_the_dead("marline-dev-a"), None);
    }

    #[test]
    fn a_name_that_only_begins_alike_belongs_to_another_cluster() {
        assert!(belongs("marline-t1x1-a", "marline-t1x1"));
        assert!(!belongs("marline-t1x10-a", "marline-t1x1"));
    }
}
