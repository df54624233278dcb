//! The guest's first file system: busybox, the modules without which it cannot reach the host's files, and a script that
//! hands over to `guest`. Everything that can be done after that is done there, in Rust.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail};

use crate::step::quote;

/// Where `guest` finds its orders: /dev is the one file system that is carried over.
pub(crate) const SPEC: &str = "/dev/marline-vm.json";

/// Tag of the virtiofs that shares the host's root.
pub(crate) const ROOT_TAG: &str = "root";

/// Builds the archive. `init` is this program's path on the host, `spec` the orders for the guest.
pub(crate) fn build(busybox: &Path, modules: &[PathBuf], init: &Path, spec: &str) -> Result<Vec<u8>> {
    let mut archive = Cpio::default();
    for dir in ["bin", "dev", "modules", "root"] {
        archive.directory(dir);
    }
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    archive.file("bin/busybox", 0o755, &read(busybox)?);
    let mut inserts = String::new();
    for (number, path) in modules.iter().enumerate() {
        if path.extension().is_none_or(|ext| ext != "ko") {
            bail!("{} is compressed: this kernel's boot modules must be plain", path.display());
        }
        let name = format!("modules/{number:02}.ko");
        archive.file(&name, 0o644, &read(path)?);
        inserts.push_str(&format!("/bin/busybox insmod /{name}\n"));
    }
    archive.file("spec", 0o644, spec.as_bytes());
    let init = init.to_str().context("this checkout's path is not UTF-8")?;
    // A failure here ends process 1, so the kernel panics and QEMU exits; the console log tells why.
    let script = format!(
        "#!/bin/busybox sh\nset -e\n/bin/busybox mount -t devtmpfs dev /dev\n{inserts}\
         /bin/busybox mount -t virtiofs -o ro {ROOT_TAG} /root\n/bin/busybox cp /spec {SPEC}\n\
         /bin/busybox mount --move /dev /root/dev\n\
         exec /bin/busybox switch_root /root {} vm-guest {SPEC}\n",
        quote(init)
    );
    archive.file("init", 0o755, script.as_bytes());
    Ok(archive.finish())
}

/// The "newc" cpio format, as much of it as the kernel needs.
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    inode: u32,
}

impl Cpio {
    fn directory(&mut self, name: &str) {
        self.entry(name, 0o040_755, &[]);
    }

    fn file(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | mode, content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, content: &[u8]) {
        self.inode += 1;
        // ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        let size = u32::try_from(content.len()).unwrap_or(u32::MAX);
        let name_size = u32::try_from(name.len() + 1).unwrap_or(u32::MAX);
        self.bytes.extend_from_slice(b"070701");
        for field in [self.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
            self.bytes.extend_from_slice(format!("{field:08x}").as_bytes());
        }
        self.bytes.extend_from_slice(name.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_archive_has_the_layout_that_the_kernel_reads() {
        let mut archive = Cpio::default();
        archive.directory("d");
        archive.file("d/f", 0o755, b"hello");
        let bytes = archive.finish();
        // 110 bytes of header, then the name with its zero byte, each part padded to 4.
        assert_eq!(&bytes[..6], b"070701");
        assert_eq!(&bytes[110..112], b"d\0");
        let second = 112;
        assert_eq!(&bytes[second..second + 6], b"070701");
        assert_eq!(&bytes[second + 14..second + 22], b"000081ed");
        assert_eq!(&bytes[second + 116..second + 121], b"hello");
        assert_eq!(bytes.len() % 4, 0);
        assert!(bytes.windows(10).any(|w| w == b"TRAILER!!!"));
    }

    #[test]
    fn a_compressed_boot_module_is_refused() {
        let error = build(Path::new("/bin/sh"), &["/m/virtiofs.ko.xz".into()], Path::new("/x"), "{}").unwrap_err();
        assert!(error.to_string().contains("compressed"), "{error}");
    }
}
