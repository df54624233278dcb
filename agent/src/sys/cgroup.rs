//! Moving into a cgroup, out of a container as well. Which cgroup, and that it is there, is left to the caller.
use std::{fs, fs::File, io, path::Path};

use nix::sched::{CloneFlags, setns};

/// Process 1 is the host's wherever an agent may run: it needs the pods' processes in its /proc.
const HOST: &str = "/proc/1/ns/cgroup";

/// Moves this process into a cgroup. Where cgroup2 is mounted with `nsdelegate`, as systemd does it, the kernel lets nobody move out of
/// a cgroup namespace, which each container has for itself: it says that there is no such cgroup. The calling thread then joins the host's.
pub fn enter(cgroup: &Path) -> io::Result<()> {
    let list = cgroup.join("cgroup.procs");
    match fs::write(&list, "0") {
        Err(error) if error.kind() == io::ErrorKind::NotFound && list.exists() => {
            setns(File::open(HOST)?, CloneFlags::CLONE_NEWCGROUP)?;
            fs::write(&list, "0")
        }
        moved => moved,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_cgroup_is_an_error() {
        let nowhere = tempfile::tempdir().unwrap();
        assert_eq!(enter(&nowhere.path().join("gone")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
