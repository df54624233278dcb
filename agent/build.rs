//! Embeds the eBPF object that `cargo xtask build` made, if it is there; without it the agent builds but refuses to start.
use std::{env, fs, path::PathBuf};

fn main() {
    println!("cargo:rerun-if-env-changed=MARLINE_EBPF");
    let manifest = PathBuf::from(env::var_os("CARGO_MANIFEST_DIR").unwrap_or_default());
    let object =
        env::var_os("MARLINE_EBPF").map_or_else(|| manifest.join("../target/ebpf/marline-ebpf.o"), PathBuf::from);
    println!("cargo:rerun-if-changed={}", object.display());
    let bytes = fs::read(&object).unwrap_or_default();
    let out = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("marline-ebpf.o");
    if let Err(error) = fs::write(&out, bytes) {
        println!("cargo:error=cannot write {}: {error}", out.display());
    }
}
