//! Where links and maps outlive the agent: the bpf filesystem, and the two questions to ask of the machine before using it.
//!
//! What is pinned is decided by `load.rs` and `bpf.rs`.
use std::{
    fs::{self, File},
    io,
    os::fd::AsFd,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    time::Duration,
};

use aya::programs::links::FdLink;
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    mount::{MsFlags, mount},
    sys::statfs::{CGROUP2_SUPER_MAGIC, FsType, fstatfs, statfs},
};

use super::error::BpfError;
use crate::sys::netns::NetnsCookie;

/// `marline status` holds the lock for a moment to see whether an agent does: so often is it tried again, after so long each.
const TRIES: u32 = 10;
const BETWEEN: Duration = Duration::from_millis(10);
const BPFFS: &str = "/sys/fs/bpf";
pub(super) const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);

/// The pins of one agent. Held exclusively for as long as this lives.
#[derive(Debug)]
pub(super) struct Pins {
    root: PathBuf,
    _lock: Flock<File>,
}

impl Pins {
    /// Opens the place for pins, mounting the bpf filesystem and making the directories where they are missing.
    pub(super) fn open(root: &Path) -> Result<Self, BpfError> {
        ensure_bpffs(root)?;
        for directory in [root.to_path_buf(), root.join("maps"), root.join("links")] {
            fs::create_dir_all(&directory).map_err(BpfError::file("cannot create", &directory))?;
        }
        let directory = File::open(root).map_err(BpfError::file("cannot open", root))?;
        let lock = insist(directory).map_err(|errno| match errno {
            Errno::EWOULDBLOCK => BpfError::PinsInUse { path: root.to_path_buf() },
            errno => BpfError::File { action: "cannot lock", path: root.to_path_buf(), source: errno.into() },
        })?;
        Ok(Self { root: root.to_path_buf(), _lock: lock })
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        map(&self.root, name)
    }

    /// Pins a link that is attached already, in the place of a predecessor's, which is detached by that: at no moment is
    /// neither attached. A crash between the two steps leaves both, which is harmless, and the next start tidies up.
    pub(super) fn replace_link(&self, name: &str, link: FdLink) -> Result<(), BpfError> {
        let place = self.link(name);
        // Names on the bpf filesystem may not contain a dot.
        let new = self.link(&format!("{name}-new"));
        remove_if_there(&new)?;
        link.pin(&new).map_err(|source| BpfError::Pin { name: name.to_owned(), source })?;
        fs::rename(&new, &place).map_err(BpfError::file("cannot put the new link in place at", place))
    }

    pub(super) fn remove_link(&self, name: &str) -> Result<(), BpfError> {
        remove_if_there(&self.link(name))
    }

    pub(super) fn link(&self, name: &str) -> PathBuf {
        self.root.join("links").join(name)
    }
}

/// Where a map is pinned.
pub(super) fn map(root: &Path, name: &str) -> PathBuf {
    root.join("maps").join(name)
}

/// The name of the inbound link of a pod.
pub(super) fn inbound_link(netns: NetnsCookie) -> String {
    format!("inbound-{}", netns.0)
}

/// Removes everything that is pinned there. Links go first, so that no program is left without its maps. Pods are open then.
pub(super) fn unload(root: &Path) -> Result<(), BpfError> {
    for directory in [root.join("links"), root.join("maps"), root.to_path_buf()] {
        match fs::read_dir(&directory) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(BpfError::file("cannot list", directory)(error)),
            Ok(entries) => {
                for entry in entries {
                    let path = entry.map_err(BpfError::file("cannot list", &directory))?.path();
                    remove_if_there(&path)?;
                }
            }
        }
        fs::remove_dir(&directory).map_err(BpfError::file("cannot remove", directory))?;
    }
    Ok(())
}

pub(super) fn in_use(root: &Path) -> Result<bool, BpfError> {
    let directory = File::open(root).map_err(BpfError::file("cannot open", root))?;
    match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
        Ok(_lock) => Ok(false),
        Err((_, Errno::EWOULDBLOCK)) => Ok(true),
        Err((_, errno)) => Err(BpfError::file("cannot lock", root)(errno.into())),
    }
}

/// Opens the pods' cgroup, after making sure that it is one. An agent that is a pod itself is inside: then its own cgroup, of which nobody
/// else may be, comes back by its id, and is what the kernel programs leave out.
pub(super) fn open_cgroup(path: &Path) -> Result<(File, Option<u64>), BpfError> {
    let cgroup = File::open(path).map_err(BpfError::file("cannot open the pods' cgroup", path))?;
    let filesystem = fstatfs(cgroup.as_fd()).map_err(|errno| BpfError::file("cannot examine", path)(errno.into()))?;
    if filesystem.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(BpfError::NotACgroup { path: path.to_path_buf() });
    }
    let Some(own) = agents_place(path)? else { return Ok((cgroup, None)) };
    if own == path {
        return Err(BpfError::AgentInsideCgroup { path: own });
    }
    // Whoever shares it would be left out as well, and in the clear.
    if processes(&own)?.lines().any(|process| process != std::process::id().to_string()) {
        return Err(BpfError::AgentNotAlone { path: own });
    }
    // The id of a cgroup is its directory's inode.
    let id = fs::metadata(&own).map_err(BpfError::file("cannot examine", &own))?.ino();
    tracing::info!(cgroup = %own.display(), "the agent is in the pods' cgroup, as a pod: its own cgroup is not captured");
    Ok((cgroup, Some(id)))
}

fn processes(cgroup: &Path) -> Result<String, BpfError> {
    let list = cgroup.join("cgroup.procs");
    // A threaded cgroup cannot list its processes (EOPNOTSUPP); such a one is not what pods live in.
    fs::read_to_string(&list).map_err(BpfError::file("cannot read", &list))
}

/// Where this process is, if it is in the cgroup or below it. Told by the lists of processes, which hold also where the agent has a
/// cgroup namespace of its own and `/proc/self/cgroup` shows another path than the mount does.
fn agents_place(cgroup: &Path) -> Result<Option<PathBuf>, BpfError> {
    let own = std::process::id().to_string();
    if processes(cgroup)?.lines().any(|process| process == own) {
        return Ok(Some(cgroup.to_path_buf()));
    }
    for entry in fs::read_dir(cgroup).map_err(BpfError::file("cannot list", cgroup))? {
        let entry = entry.map_err(BpfError::file("cannot list", cgroup))?;
        // Groups come and go under our hands; one that is gone does not hold the agent.
        if entry.file_type().is_ok_and(|kind| kind.is_dir())
            && let Ok(Some(place)) = agents_place(&entry.path())
        {
            return Ok(Some(place));
        }
    }
    Ok(None)
}

fn ensure_bpffs(root: &Path) -> Result<(), BpfError> {
    let there = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let filesystem =
        statfs(there).map_err(|errno| BpfError::file("cannot examine the filesystem of", there)(errno.into()))?;
    if filesystem.filesystem_type() == BPF_FS_MAGIC {
        return Ok(());
    }
    if !root.starts_with(BPFFS) || !Path::new(BPFFS).exists() {
        return Err(BpfError::NotBpffs { path: root.to_path_buf() });
    }
    // In a mount namespace of its own (`ip netns exec` makes one) the pins would end with the agent, and the pods be open.
    let inode = |path: &str| fs::metadata(path).map(|metadata| metadata.ino());
    let own = inode("/proc/self/ns/mnt").map_err(BpfError::file("cannot examine", "/proc/self/ns/mnt"))?;
    match inode("/proc/1/ns/mnt") {
        Ok(host) if host != own => return Err(BpfError::PrivateMounts { path: root.to_path_buf() }),
        Ok(_) => {}
        Err(error) => tracing::warn!(
            %error,
            "cannot tell whether this mount namespace is the host's: if it is not, pods are open once the agent has ended"
        ),
    }
    tracing::info!(path = BPFFS, "mounting the bpf filesystem");
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .map_err(|errno| BpfError::file("cannot mount the bpf filesystem at", BPFFS)(errno.into()))
}

fn remove_if_there(path: &Path) -> Result<(), BpfError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(BpfError::file("cannot remove", path)(error)),
        _ => Ok(()),
    }
}

/// The lock, unless somebody keeps it.
fn insist(mut directory: File) -> Result<Flock<File>, Errno> {
    for _ in 1..TRIES {
        match Flock::lock(directory, FlockArg::LockExclusiveNonblock) {
            Err((again, Errno::EWOULDBLOCK)) => directory = again,
            outcome => return outcome.map_err(|(_, errno)| errno),
        }
        std::thread::sleep(BETWEEN);
    }
    Flock::lock(directory, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| errno)
}
