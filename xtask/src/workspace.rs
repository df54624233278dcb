//! Where things are: the checkout, its target directory, the shared folder of the VM; and how to call cargo from inside cargo.
//! Building and running is left to the commands.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

/// The folder that holds the workspace's `Cargo.toml`.
pub(crate) fn root() -> PathBuf {
    // The crate lies one level below the root. The path is baked in at build time, and a moved checkout has to build xtask anew anyway.
    let manifest = Path::new(env!("CARGO_MANIFEST_DIR"));
    manifest.parent().unwrap_or(manifest).to_path_buf()
}

/// `target/` of the checkout. Products of this tool (eBPF object, kernels, logs) always lie here, wherever cargo puts its own.
pub(crate) fn target() -> PathBuf {
    root().join("target")
}

/// The eBPF object that the agent embeds.
pub(crate) fn ebpf_object() -> PathBuf {
    target().join("ebpf/marline-ebpf.o")
}

/// Folder of everything that the VM needs and leaves behind.
pub(crate) fn vm() -> PathBuf {
    target().join("vm")
}

/// Where paths of this machine, of which binaries keep some, are said to be: the checkout and cargo's home.
pub(crate) fn remapped() -> [(String, &'static str); 2] {
    let home = env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
    let cargo = env::var_os("CARGO_HOME").map_or_else(|| home.join(".cargo"), PathBuf::from);
    [(root().display().to_string(), "/marline"), (cargo.display().to_string(), "/cargo")]
}

/// The folder that is read-write at the same path in the guest: how results come back.
pub(crate) fn vm_out() -> PathBuf {
    vm().join("out")
}

/// Cargo of the toolchain that runs us, started in the root and free of what the outer cargo set for this process.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    forget_outer_cargo(&mut command);
    command
}

/// Removes what an outer `cargo run` and rustup set for their child: an inner cargo must find its own crate and toolchain.
/// What a person sets to steer cargo (CARGO_HOME, CARGO_NET_*, CARGO_TARGET_DIR, RUSTFLAGS, …) stays.
pub(crate) fn forget_outer_cargo(command: &mut Command) {
    for (name, _) in env::vars_os() {
        let Some(text) = name.to_str() else { continue };
        let set_by_cargo =
            ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CFG_"].iter().any(|p| text.starts_with(p))
                || matches!(text, "CARGO_CRATE_NAME" | "CARGO_PRIMARY_PACKAGE" | "OUT_DIR" | "RUST_RECURSION_COUNT");
        if set_by_cargo {
            command.env_remove(text);
        }
    }
}

/// The tool builds for, and boots, one architecture only: say so before half an hour is spent.
pub(crate) fn require_x86_64() -> Result<()> {
    if env::consts::ARCH != "x86_64" || env::consts::OS != "linux" {
        bail!("this runs on x86_64 Linux only; this machine is {} {}", env::consts::ARCH, env::consts::OS);
    }
    Ok(())
}
