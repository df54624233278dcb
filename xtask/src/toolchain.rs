//! The toolchain for eBPF: a rustc that builds `core` for bpfel-unknown-none, and bpf-linker. Finds what is there, installs what is not.
//! Calling it is left to `build`.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;

use crate::{
    deps::{self, need},
    step::Step,
    workspace,
};

/// The linker reads LLVM bitcode, so its LLVM must not be older than the compiler's.
const LLVM: u32 = 22;
const BPF_LINKER: &str = "0.13.0";
/// Debian's up-to-date Rust, which it keeps for building browsers.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
const DEBIAN_CARGO: &str = "/usr/bin/cargo";

/// A way to compile for eBPF.
pub(crate) struct Toolchain {
    /// The compiler's own words.
    pub version: String,
    kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Debian,
    Nightly,
}

impl Toolchain {
    /// What is there and complete. Debian's comes first: it is one version, and the linker's LLVM is known to read its output.
    /// A nightly may be any.
    pub(crate) fn present() -> Option<Self> {
        find_linker()?;
        [Kind::Debian, Kind::Nightly].into_iter().find_map(Self::compiler)
    }

    /// Installs what is missing.
    pub(crate) fn install() -> Result<Self> {
        let toolchain = match [Kind::Debian, Kind::Nightly].into_iter().find_map(Self::compiler) {
            Some(toolchain) => toolchain,
            None => {
                let install = || deps::install("compile the eBPF program", &["rustc-web", "cargo-web", "rust-web-src"]);
                install()?;
                if Self::compiler(Kind::Debian).is_none() {
                    // Lists that are months old know an older one.
                    deps::update()?;
                    install()?;
                }
                let step = Step::quiet("looking for Debian's rustc-web")
                    .way_out("apt-get install --reinstall rustc-web cargo-web rust-web-src; a rustup nightly with rust-src serves as well, unless its LLVM is newer than bpf-linker's");
                Self::compiler(Kind::Debian)
                    .ok_or_else(|| step.fail(format!("{DEBIAN_RUSTC} is not it, or is too old")))?
            }
        };
        if find_linker().is_none() {
            install_linker()?;
        }
        Ok(toolchain)
    }

    /// A cargo that builds eBPF programs, free of what steers the outer one.
    pub(crate) fn cargo(&self) -> Command {
        let mut command = match self.kind {
            Kind::Debian => {
                let mut command = Command::new(DEBIAN_CARGO);
                // A stable compiler, told to accept -Z build-std and the unstable target.
                command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1").env_remove("RUSTUP_TOOLCHAIN");
                command
            }
            Kind::Nightly => {
                let mut command = Command::new("cargo");
                command.env("RUSTUP_TOOLCHAIN", "nightly").env_remove("RUSTC");
                command
            }
        };
        workspace::forget_outer_cargo(&mut command);
        // RUSTFLAGS would replace the flags that ebpf/.cargo/config.toml sets for the linker.
        for name in [
            "CARGO",
            "CARGO_BUILD_TARGET",
            "CARGO_ENCODED_RUSTFLAGS",
            "RUSTFLAGS",
            "RUSTC_WRAPPER",
            "RUSTC_WORKSPACE_WRAPPER",
            "LD_LIBRARY_PATH",
        ] {
            command.env_remove(name);
        }
        let path = env::var_os("PATH").unwrap_or_default();
        let all = env::split_paths(&path).chain([cargo_bin()]);
        if let Ok(path) = env::join_paths(all) {
            command.env("PATH", path);
        }
        command
    }

    fn compiler(kind: Kind) -> Option<Self> {
        if kind == Kind::Debian && !Path::new(DEBIAN_CARGO).exists() {
            return None;
        }
        let ask = |arguments: &[&str]| {
            let mut rustc = Command::new(if kind == Kind::Debian { DEBIAN_RUSTC } else { "rustc" });
            // Asking rustup for a toolchain that it lacks must not make it fetch one.
            rustc.env("RUSTUP_TOOLCHAIN", "nightly").env("RUSTUP_AUTO_INSTALL", "0").env_remove("LD_LIBRARY_PATH");
            Step::quiet("looking for a compiler").output(rustc.args(arguments)).ok()
        };
        let (version, sysroot) = (ask(&["-vV"])?, ask(&["--print", "sysroot"])?);
        let core = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/core");
        (core.is_dir() && fit(&version))
            .then(|| Self { version: version.lines().next().unwrap_or_default().to_owned(), kind })
    }
}

/// Reads `rustc -vV`. Debian 12's own rustc is 1.63, too old for the eBPF crate (its `rust-version`); a nightly may be too new for the linker.
fn fit(version: &str) -> bool {
    let minor = version.strip_prefix("rustc 1.").and_then(leading_number);
    let llvm = version.lines().find_map(|line| leading_number(line.strip_prefix("LLVM version: ")?));
    minor.is_some_and(|minor| minor >= 95) && llvm.is_some_and(|llvm| llvm <= LLVM)
}

fn leading_number(text: &str) -> Option<u32> {
    text.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

fn find_linker() -> Option<PathBuf> {
    deps::find("bpf-linker").or_else(|| Some(cargo_bin().join("bpf-linker")).filter(|file| file.is_file()))
}

fn cargo_bin() -> PathBuf {
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    env::var_os("CARGO_INSTALL_ROOT")
        .or_else(|| env::var_os("CARGO_HOME"))
        .map_or_else(|| home.join(".cargo"), PathBuf::from)
        .join("bin")
}

fn install_linker() -> Result<()> {
    let llvm_dir = format!("/usr/lib/llvm-{LLVM}");
    if !Path::new(&llvm_dir).join("bin/llvm-config").exists() || deps::find("cc").is_none() {
        let (llvm, polly) = (format!("llvm-{LLVM}-dev"), format!("libpolly-{LLVM}-dev"));
        deps::install("build bpf-linker", &[&llvm, &polly, "zlib1g-dev", "libzstd-dev", "gcc", "g++", "libc6-dev"])?;
    }
    deps::ensure("build bpf-linker", &[need("cc", "gcc"), need("c++", "g++")])?;
    let step = Step::begin(format!("building bpf-linker {BPF_LINKER} with cargo install (about a minute, once)"));
    let mut cargo = workspace::cargo();
    let feature = format!("llvm-{LLVM}");
    cargo.env("LLVM_PREFIX", llvm_dir).env_remove("CARGO_TARGET_DIR");
    cargo.args([
        "install",
        "bpf-linker",
        "--version",
        BPF_LINKER,
        "--locked",
        "--no-default-features",
        "--features",
        &feature,
    ]);
    step.way_out("see https://github.com/aya-rs/bpf-linker#installation").run(&mut cargo)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_compiler_that_is_too_old_or_ahead_of_the_linker_is_passed_over() {
        assert!(!fit("rustc 1.63.0\nLLVM version: 14.0.6\n"));
        assert!(fit(
            "rustc 1.96.0 (ac68faa20 2026-05-25) (built from a source tarball)\nhost: x\nLLVM version: 22.1.5\n"
        ));
        assert!(!fit("rustc 1.99.0-nightly (e50aa6fba 2026-05-19)\nLLVM version: 23.0.0\n"));
        assert!(!fit("gcc 12"));
    }
}
