//! The cgroup2 tree of one cluster: pods below `pods/NODE/POD`, everything else of it below `rest`.
//!
//! Capture goes by cgroup, so a pod's processes must be below the node's pods and the agent must not. All that a cluster
//! starts lives somewhere in its tree: removing the cluster kills the tree, also what a crashed run has left behind.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, anyhow};

use crate::wait::{Look, seconds, wait_for};

/// Where the machine has mounted cgroup2: /sys/fs/cgroup on most, /sys/fs/cgroup/unified on a hybrid one.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/mounts").context("reading /proc/mounts")?;
    find_mount(&mounts).ok_or_else(|| {
        anyhow!("no cgroup2 is mounted; way out: mount -t cgroup2 none /sys/fs/cgroup (or boot with systemd)")
    })
}

fn find_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let mut fields = line.split_whitespace().skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// The tree of one cluster.
#[derive(Clone, Debug)]
pub struct Tree {
    root: PathBuf,
}

impl Tree {
    /// The tree that a cluster of this name has or would have.
    pub fn named(cluster: &str) -> Result<Self> {
        Ok(Self { root: mount_point()?.join(cluster) })
    }

    /// The directory below which a node's pods are: what its agent captures.
    #[must_use]
    pub fn node(&self, node: &str) -> PathBuf {
        self.root.join("pods").join(node)
    }

    #[must_use]
    pub fn pod(&self, node: &str, pod: &str) -> PathBuf {
        self.node(node).join(pod)
    }

    /// For agents, captures and whatever else is not a pod's.
    #[must_use]
    pub fn rest(&self) -> PathBuf {
        self.root.join("rest")
    }

    /// Kills all that runs in the tree and removes it; that it is not there is not an error.
    pub fn remove(&self) -> Result<()> {
        remove(&self.root)
    }
}

pub fn create(directory: &Path) -> Result<()> {
    fs::create_dir_all(directory).with_context(|| format!("making the cgroup {}", directory.display()))
}

/// The processes in this directory itself; none if it is not there.
#[must_use]
pub fn processes(directory: &Path) -> Vec<u32> {
    let text = fs::read_to_string(directory.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

/// Kills all that runs below `directory`, waits until it is gone, and removes the directories from the leaves up.
pub fn remove(directory: &Path) -> Result<()> {
    if !directory.exists() {
        return Ok(());
    }
    fs::write(directory.join("cgroup.kill"), "1").with_context(|| format!("killing {}", directory.display()))?;
    wait_for(format!("the processes of {} to end", directory.display()), seconds(20), || {
        let events = fs::read_to_string(directory.join("cgroup.events"))?;
        Ok(if events.contains("populated 0") {
            Look::Done(())
        } else {
            Look::NotYet(events.trim().replace('\n', ", "))
        })
    })?;
    remove_directories(directory).with_context(|| format!("removing the cgroup {}", directory.display()))
}

fn remove_directories(directory: &Path) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_directories(&entry.path())?;
        }
    }
    fs::remove_dir(directory)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mount_is_found_on_pure_and_on_hybrid_machines() {
        let hybrid = "cgroup /sys/fs/cgroup/cpu cgroup rw 0 0\ncgroup2 /sys/fs/cgroup/unified cgroup2 rw 0 0\n";
        assert_eq!(find_mount(hybrid), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(find_mount("none /sys/fs/cgroup cgroup2 rw 0 0\n"), Some(PathBuf::from("/sys/fs/cgroup")));
        assert_eq!(find_mount("tmpfs /sys/fs/cgroup tmpfs rw 0 0\n"), None);
    }
}
