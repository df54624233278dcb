//! The cgroup namespace: which cgroups a process may move itself to. Moving is left to the caller.
use std::{fs, fs::File, io, os::unix::fs::MetadataExt, path::Path};

use nix::sched::{CloneFlags, setns};

const OWN: &str = "/proc/thread-self/ns/cgroup";
const HOST: &str = "/proc/1/ns/cgroup";

/// Moves the calling thread into a cgroup. A container has a cgroup namespace of its own, out of which the kernel lets nobody move
/// where cgroup2 is mounted with `nsdelegate`, as systemd does it; so the thread joins that of process 1 first, if it has another.
pub fn enter(cgroup: &Path) -> io::Result<()> {
    if fs::metadata(OWN)?.ino() != fs::metadata(HOST)?.ino() {
        setns(File::open(HOST)?, CloneFlags::CLONE_NEWCGROUP)?;
    }
    fs::write(cgroup.join("cgroup.procs"), "0")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_cgroup_is_an_error() {
        let nowhere = tempfile::tempdir().unwrap();
        assert!(enter(&nowhere.path().join("gone")).is_err());
    }
}
