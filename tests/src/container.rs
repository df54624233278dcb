//! A container as a runtime makes it for the agent's DaemonSet: a root that cannot be written, the node's processes and what is mounted of
//! the node, the capabilities that are named and no more, no way to others. Network and cgroup are the caller's already (`process::Place`).
//! Seccomp and the security modules of runtimes are left out.

use std::{
    fs,
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    unistd::chroot,
};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};
use serde::{Deserialize, Serialize};

/// What is asked of the one who makes it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Container {
    /// The image, unpacked. Without one: an empty root with this machine's /usr.
    pub root: Option<PathBuf>,
    /// As manifests call them: `NET_ADMIN`.
    pub capabilities: Vec<String>,
    /// A directory that is there at the same path, to be written.
    pub shared: PathBuf,
}

/// Where a program of this machine is found in there.
const PROGRAM: &str = "/program";

impl Container {
    /// Becomes the program in there. Returns only if that fails.
    pub fn become_program(&self, program: &Path, arguments: &[String]) -> Result<()> {
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWCGROUP).context("leaving the node's mounts")?;
        // What the node mounts later is seen, what is mounted here is not.
        remount("/", MsFlags::MS_REC | MsFlags::MS_SLAVE)?;
        let root = self.made_root()?;
        let program = self.placed(&root, program)?;
        read_only(&root)?;
        chroot(&root).with_context(|| format!("taking {} as the root", root.display()))?;
        std::env::set_current_dir("/").context("going to the root")?;
        self.limit()?;
        let error = Command::new(&program).args(arguments).exec();
        Err(error).with_context(|| format!("starting {}", program.display()))
    }

    fn made_root(&self) -> Result<PathBuf> {
        // Seen by this container alone. The image stays as it is.
        let root = self.shared.join(".root");
        fs::create_dir_all(&root).with_context(|| root.display().to_string())?;
        mount(Some("root"), &root, Some("tmpfs"), MsFlags::empty(), None::<&str>).context("a root in memory")?;
        match &self.root {
            Some(image) => {
                let mut copy = Command::new("cp");
                let copied = copy.arg("-a").arg(image.join(".")).arg(&root).status().context("copying the image")?;
                if !copied.success() {
                    bail!("copying the image: {copied}");
                }
            }
            None => {
                bind("/usr", &root.join("usr"))?;
                for link in ["bin", "lib", "lib64", "sbin"] {
                    symlink(format!("usr/{link}"), root.join(link)).context("links into usr")?;
                }
            }
        }
        bind("/proc", &root.join("proc"))?;
        read_only(&root.join("proc/sys"))?;
        mount_new("sysfs", &root.join("sys"), MsFlags::MS_RDONLY)?;
        for directory in ["/sys/fs/cgroup", "/sys/fs/bpf", "/run/netns"] {
            bind(directory, &root.join(directory.trim_start_matches('/')))?;
        }
        mount_new("tmpfs", &root.join("tmp"), MsFlags::empty())?;
        mount_new("tmpfs", &root.join("dev"), MsFlags::empty())?;
        for device in ["null", "zero", "full", "random", "urandom"] {
            let (from, to) = (Path::new("/dev").join(device), root.join("dev").join(device));
            fs::write(&to, "").with_context(|| to.display().to_string())?;
            bind_alone(&from, &to)?;
        }
        let shared = root.join(self.shared.strip_prefix("/").context("the shared path is not absolute")?);
        fs::create_dir_all(&shared).with_context(|| shared.display().to_string())?;
        // Without what is mounted below, which is this root.
        bind_alone(&self.shared, &shared)?;
        Ok(root)
    }

    /// The path in there of a program of this machine; the image's own are below its root.
    fn placed(&self, root: &Path, program: &Path) -> Result<PathBuf> {
        if let Some(own) = self.root.as_ref().and_then(|image| program.strip_prefix(image).ok()) {
            return Ok(Path::new("/").join(own));
        }
        let place = root.join(PROGRAM.trim_start_matches('/'));
        fs::write(&place, "").context("a place for the program")?;
        bind_alone(program, &place)?;
        Ok(PROGRAM.into())
    }

    /// A program that is started by root then has these capabilities, and cannot get others.
    fn limit(&self) -> Result<()> {
        let mut kept = CapabilitySet::empty();
        for name in &self.capabilities {
            kept |= CapabilitySet::from_name(name).with_context(|| format!("{name} is no capability"))?;
        }
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            if !kept.contains(one) && capability_is_in_bounding_set(one).unwrap_or(false) {
                remove_capability_from_bounding_set(one).with_context(|| format!("giving up {one:?}"))?;
            }
        }
        let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
        set_capabilities(None, sets).context("giving up capabilities")?;
        set_no_new_privs(true).context("giving up new privileges")
    }
}

fn remount(place: impl AsRef<Path>, flags: MsFlags) -> Result<()> {
    let place = place.as_ref();
    mount(None::<&str>, place, None::<&str>, flags, None::<&str>)
        .with_context(|| format!("remounting {}", place.display()))
}

/// With all that is mounted below.
fn bind(from: impl AsRef<Path>, to: &Path) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    mount(Some(from.as_ref()), to, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("binding {}", from.as_ref().display()))
}

fn bind_alone(from: &Path, to: &Path) -> Result<()> {
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .with_context(|| format!("binding {}", from.display()))
}

fn mount_new(kind: &str, to: &Path, flags: MsFlags) -> Result<()> {
    fs::create_dir_all(to).with_context(|| to.display().to_string())?;
    mount(Some(kind), to, Some(kind), flags, None::<&str>).with_context(|| format!("mounting {}", to.display()))
}

/// This mount alone: what is mounted below can be written still.
fn read_only(place: &Path) -> Result<()> {
    mount(Some(place), place, None::<&str>, MsFlags::MS_BIND | MsFlags::MS_REC, None::<&str>)
        .with_context(|| format!("binding {}", place.display()))?;
    remount(place, MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY)
}
