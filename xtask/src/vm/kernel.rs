//! Stock Debian kernels: fetched from the machine's own apt sources, unpacked below `target/vm/KERNEL`, never installed.
//! Booting them is left to `machine`.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use nix::fcntl::{Flock, FlockArg};

use crate::{
    deps::{self, need},
    step::Step,
    workspace,
};

/// The kernels that Marline is tested on beside the one it runs on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Kernel {
    /// Debian 12's newer kernel.
    #[value(name = "6.12")]
    V6_12,
    /// Debian 12's own kernel.
    #[value(name = "6.1")]
    V6_1,
}

impl Kernel {
    pub(crate) const ALL: [Self; 2] = [Self::V6_12, Self::V6_1];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::V6_12 => "6.12",
            Self::V6_1 => "6.1",
        }
    }

    /// The package that depends on the newest build of this kernel.
    fn meta_package(self) -> &'static str {
        match self {
            Self::V6_12 => "linux-image-6.12-cloud-amd64",
            Self::V6_1 => "linux-image-cloud-amd64",
        }
    }
}

/// An unpacked kernel.
pub(crate) struct Unpacked {
    /// What `uname -r` says.
    pub release: String,
    /// Holds `boot/` and `lib/modules/RELEASE`.
    pub root: PathBuf,
}

impl Unpacked {
    pub(crate) fn image(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.release))
    }

    pub(crate) fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.release)
    }

    /// The files to insert, in order, so that these modules are loaded. What is built in needs none.
    pub(crate) fn module_files(&self, wanted: &[&str]) -> Result<Vec<PathBuf>> {
        let path = self.modules().join("modules.dep");
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(insertion_order(&text, wanted).into_iter().map(|file| self.modules().join(file)).collect())
    }
}

/// Makes the kernel ready to boot, from what is there or from the network.
pub(crate) fn prepare(kernel: Kernel) -> Result<Unpacked> {
    let home = workspace::vm().join(kernel.name());
    fs::create_dir_all(&home).with_context(|| format!("cannot create {}", home.display()))?;
    let lock = File::create(home.join("lock")).with_context(|| format!("cannot lock {}", home.display()))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("cannot lock the kernel's folder")?;
    // Written last: a folder without it is the rest of an interrupted attempt.
    let stamp = home.join("release");
    if let Ok(release) = fs::read_to_string(&stamp) {
        let unpacked = Unpacked { release: release.trim().to_owned(), root: home.join("root") };
        if unpacked.image().is_file() && unpacked.modules().join("modules.dep").is_file() {
            return Ok(unpacked);
        }
    }
    deps::ensure("load kernel modules", &[need("depmod", "kmod")])?;
    let package = newest_package(kernel)?;
    let step = Step::begin(format!("fetching Debian's {package} (unpacked below target/vm, not installed)"));
    let root = home.join("root");
    let _ = fs::remove_file(&stamp);
    let _ = fs::remove_dir_all(&root);
    fs::create_dir_all(&root).map_err(|error| step.fail(format!("{}: {error}", root.display())))?;
    deps::unpack(&package, &home.join("download"), &root)?;
    let release = release_in(&root).ok_or_else(|| step.fail(format!("{package} holds no boot/vmlinuz-*")))?;
    Step::quiet("indexing the kernel's modules").output(
        Command::new(deps::find("depmod").unwrap_or_else(|| "depmod".into())).arg("-b").arg(&root).arg(&release),
    )?;
    fs::write(&stamp, &release).map_err(|error| step.fail(format!("{}: {error}", stamp.display())))?;
    Ok(Unpacked { release, root })
}

/// A busybox that needs no libraries: the first program of the guest. Taken from its package, not installed.
pub(crate) fn busybox() -> Result<PathBuf> {
    let home = workspace::vm().join("busybox");
    let file = home.join("root/bin/busybox");
    if !file.is_file() {
        let _step = Step::begin("fetching Debian's busybox-static (unpacked below target/vm, not installed)");
        deps::unpack("busybox-static", &home.join("download"), &home.join("root"))?;
    }
    Ok(file)
}

fn newest_package(kernel: Kernel) -> Result<String> {
    let meta = kernel.meta_package();
    let step = Step::quiet(format!("looking for Debian's kernel {}", kernel.name())).way_out(
        "the apt sources must name bookworm and bookworm-security: see /etc/apt/sources.list.d/debian.sources",
    );
    let look = || -> Option<String> {
        let shown = step.output(Command::new("apt-cache").args(["show", "--no-all-versions", meta])).ok()?;
        dependency(&shown, kernel.name())
    };
    if let Some(package) = look() {
        return Ok(package);
    }
    deps::update()?;
    look().ok_or_else(|| step.fail(format!("no package {meta} that depends on a linux-image-{}.*", kernel.name())))
}

/// The image package that the meta package depends on, if it is of the wanted series.
fn dependency(shown: &str, series: &str) -> Option<String> {
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: "))?;
    let package = depends.split([',', ' ']).next()?;
    package.strip_prefix("linux-image-")?.strip_prefix(series)?.starts_with('.').then(|| package.to_owned())
}

fn release_in(root: &Path) -> Option<String> {
    let entries = fs::read_dir(root.join("boot")).ok()?.flatten();
    entries.into_iter().find_map(|entry| entry.file_name().to_str()?.strip_prefix("vmlinuz-").map(str::to_owned))
}

/// Reads modules.dep (`file: dependency dependency …`, the deepest dependency last).
fn insertion_order<'a>(modules_dep: &'a str, wanted: &[&str]) -> Vec<&'a str> {
    let mut order: Vec<&str> = Vec::new();
    for name in wanted {
        let line =
            modules_dep.lines().filter_map(|line| line.split_once(':')).find(|(file, _)| module_name(file) == *name);
        let Some((file, dependencies)) = line else { continue };
        for file in dependencies.split_whitespace().rev().chain([file]) {
            if !order.contains(&file) {
                order.push(file);
            }
        }
    }
    order
}

/// `kernel/fs/fuse/virtiofs.ko.xz` -> `virtiofs`; the kernel takes `-` and `_` in names as the same.
fn module_name(file: &str) -> String {
    let base = file.rsplit('/').next().unwrap_or(file);
    base.split(".ko").next().unwrap_or(base).replace('-', "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need_and_only_once() {
        let text = "k/virtiofs.ko: k/fuse.ko k/virtio.ko k/virtio_ring.ko\nk/virtio-pci.ko.xz: k/virtio.ko k/virtio_ring.ko\nk/fuse.ko:\n";
        let order = insertion_order(text, &["virtio_pci", "virtiofs", "built_in"]);
        assert_eq!(order, ["k/virtio_ring.ko", "k/virtio.ko", "k/virtio-pci.ko.xz", "k/fuse.ko", "k/virtiofs.ko"]);
    }

    #[test]
    fn the_meta_package_leads_to_an_image_of_its_own_series_only() {
        let shown = "Package: linux-image-cloud-amd64\nDepends: linux-image-6.1.0-56-cloud-amd64 (= 6.1.192-2)\n";
        assert_eq!(dependency(shown, "6.1").as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(dependency("Depends: linux-image-6.12.9-cloud-amd64 (= 1)\n", "6.1"), None);
        assert_eq!(dependency("Package: x\n", "6.1"), None);
    }
}
