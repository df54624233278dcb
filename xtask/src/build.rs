//! `cargo xtask build`: the eBPF object, then the agent that embeds it.
//! Which toolchain can make the object, and getting one, is left to `toolchain`.

use std::{
    fs,
    hash::{DefaultHasher, Hash, Hasher},
    io::ErrorKind,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::{
    step::{self, Step},
    toolchain::Toolchain,
    workspace,
};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
The eBPF object goes to target/ebpf/marline-ebpf.o and is built again only when ebpf/, common/ or the toolchain changed. Rust for
eBPF comes from Debian's rustc-web, or from a rustup nightly with rust-src if that is already there; bpf-linker is built
once with cargo. What is missing is installed.")]
pub(crate) struct Args {
    /// Optimise the agent
    #[arg(long)]
    release: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let agent = agent(args.release)?;
    step::say(&format!("built {}", agent.display()));
    Ok(())
}

/// Builds the eBPF object, unless nothing it is made from has changed.
pub(crate) fn ebpf() -> Result<()> {
    workspace::require_x86_64()?;
    let sources = workspace::root().join("ebpf");
    let object = workspace::ebpf_object();
    let stamp = object.with_extension("stamp");
    // Without a toolchain only the sources decide: a copied object needs no compiler.
    let toolchain = Toolchain::present();
    let mark =
        |toolchain: &Toolchain| -> Result<String> { Ok(format!("{:016x} {}", fingerprint()?, toolchain.version)) };
    if let Some(toolchain) = &toolchain
        && object.is_file()
        && fs::read_to_string(&stamp).is_ok_and(|known| Some(known) == mark(toolchain).ok())
    {
        return Ok(());
    }
    let toolchain = match toolchain {
        Some(toolchain) => toolchain,
        None => Toolchain::install()?,
    };
    let mark = mark(&toolchain)?;
    let step = Step::begin(format!("building the eBPF program with {}", toolchain.version))
        .way_out("if the linker complains about LLVM bitcode: cargo install bpf-linker again as above, or remove the rustup nightly from the PATH");
    let target = workspace::target().join("ebpf-build");
    let mut cargo = toolchain.cargo();
    cargo.current_dir(&sources).env("CARGO_TARGET_DIR", &target).args(["build", "--release", "--locked"]);
    // Added to the flags of ebpf/.cargo/config.toml: the object names no folder of this machine, so that another makes the same one.
    let flags = workspace::remapped().map(|(from, to)| format!("{:?}", format!("--remap-path-prefix={from}={to}")));
    cargo.arg("--config").arg(format!("target.bpfel-unknown-none.rustflags=[{}]", flags.join(",")));
    step.run(&mut cargo)?;
    let built = target.join("bpfel-unknown-none/release/marline-ebpf");
    let bytes = fs::read(&built).map_err(|error| step.fail(format!("{}: {error}", built.display())))?;
    replace(&object, &bytes)
        .and_then(|()| replace(&stamp, mark.as_bytes()))
        .map_err(|error| step.fail(format!("{error:#}")))
}

/// Builds the eBPF object and the agent, and returns the agent's path.
pub(crate) fn agent(release: bool) -> Result<PathBuf> {
    ebpf()?;
    let step = Step::begin(if release { "building the agent (release)" } else { "building the agent" });
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "marline", "--bin", "marline"]);
    if release {
        cargo.arg("--release");
    }
    let built = artifacts(&step, &mut cargo)?;
    let agent = built.into_iter().find(|artifact| artifact.name == "marline").map(|artifact| artifact.executable);
    agent.ok_or_else(|| step.fail("cargo did not say where the binary is"))
}

/// Builds the agent that uses no records on direct connections, and returns its path. It encrypts nothing there.
pub(crate) fn agent_without_records(release: bool) -> Result<PathBuf> {
    ebpf()?;
    let step = Step::begin(if release {
        "building the agent without records (release)"
    } else {
        "building the agent without records"
    });
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "marline", "--bin", "marline-without-records"]);
    cargo.args(["--features", "without-records"]);
    if release {
        cargo.arg("--release");
    }
    let built = artifacts(&step, &mut cargo)?;
    let agent = built
        .into_iter()
        .find(|artifact| artifact.name == "marline-without-records")
        .map(|artifact| artifact.executable);
    agent.ok_or_else(|| step.fail("cargo did not say where the binary is"))
}

/// Builds the load program of the benchmarks, with optimisations, and returns its path.
pub(crate) fn load() -> Result<PathBuf> {
    let step = Step::begin("building the load program (release)");
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--release", "--package", "marline-tests", "--bin", "bench_load"]);
    let built = artifacts(&step, &mut cargo)?;
    let load = built.into_iter().find(|artifact| artifact.name == "bench_load").map(|artifact| artifact.executable);
    load.ok_or_else(|| step.fail("cargo did not say where the binary is"))
}

/// An executable that cargo built.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Artifact {
    /// Name of the cargo target: a binary, a test file, or a library whose unit tests these are.
    pub name: String,
    /// `bin`, `lib` or `test`.
    pub kind: String,
    pub executable: PathBuf,
    pub package_root: PathBuf,
    /// Whether it is a test harness, and not the program itself.
    pub test: bool,
}

/// Runs cargo with its own diagnostics on the terminal, and returns the executables it made.
pub(crate) fn artifacts(step: &Step, cargo: &mut Command) -> Result<Vec<Artifact>> {
    let text = step.read(cargo.arg("--message-format=json-render-diagnostics"))?;
    Ok(text.lines().filter_map(artifact).collect())
}

#[derive(Deserialize)]
struct Message {
    manifest_path: PathBuf,
    target: Target,
    profile: Profile,
    executable: PathBuf,
}

#[derive(Deserialize)]
struct Profile {
    test: bool,
}

#[derive(Deserialize)]
struct Target {
    name: String,
    kind: Vec<String>,
}

/// Other messages, and artifacts that cannot be run, lack these fields.
fn artifact(line: &str) -> Option<Artifact> {
    let message: Message = serde_json::from_str(line).ok()?;
    let kind = message.target.kind.into_iter().next()?;
    let package_root = message.manifest_path.parent()?.to_path_buf();
    Some(Artifact {
        name: message.target.name,
        kind,
        executable: message.executable,
        package_root,
        test: message.profile.test,
    })
}

/// Writes a file as a whole, and only if it differs: whoever depends on it is built anew for a new time stamp alone.
fn replace(path: &Path, bytes: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|old| old == bytes) {
        return Ok(());
    }
    let what = || format!("cannot write {}", path.display());
    fs::create_dir_all(path.parent().unwrap_or(path)).with_context(what)?;
    let new = path.with_extension("new");
    fs::write(&new, bytes).with_context(what)?;
    fs::rename(&new, path).with_context(what)
}

/// One number for everything that the eBPF object is made from.
fn fingerprint() -> Result<u64> {
    let mut hasher = DefaultHasher::new();
    for dir in ["ebpf", "common"] {
        hash_tree(&workspace::root().join(dir), &mut hasher)?;
    }
    Ok(hasher.finish())
}

fn hash_tree(dir: &Path, hasher: &mut DefaultHasher) -> Result<()> {
    let what = || format!("cannot read {}", dir.display());
    let mut entries: Vec<PathBuf> = Vec::new();
    for entry in fs::read_dir(dir).with_context(what)? {
        entries.push(entry.with_context(what)?.path());
    }
    entries.sort();
    for path in entries {
        if path.is_dir() {
            if path.file_name().is_some_and(|name| name != "target") {
                hash_tree(&path, hasher)?;
            }
            continue;
        }
        match fs::read(&path) {
            Ok(bytes) => (&path, bytes).hash(hasher),
            // An editor's lock file is a dangling link.
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("cannot read {}", path.display())),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_messages_about_executables_count() {
        let binary = r#"{"reason":"compiler-artifact","manifest_path":"/w/tests/Cargo.toml","target":{"kind":["test"],"name":"matrix","x":1},"profile":{"test":true},"executable":"/t/matrix-1"}"#;
        let expected = Artifact {
            name: "matrix".into(),
            kind: "test".into(),
            executable: "/t/matrix-1".into(),
            package_root: "/w/tests".into(),
            test: true,
        };
        assert_eq!(artifact(binary), Some(expected));
        let library = r#"{"reason":"compiler-artifact","manifest_path":"/w/c/Cargo.toml","target":{"kind":["lib"],"name":"c"},"profile":{"test":false},"executable":null}"#;
        assert_eq!(artifact(library), None);
        assert_eq!(artifact(r#"{"reason":"build-finished","success":true}"#), None);
        assert_eq!(artifact("not json"), None);
    }

    #[test]
    fn an_unchanged_file_keeps_its_time() {
        let dir = std::env::temp_dir().join(format!("xtask-replace-{}", std::process::id()));
        let file = dir.join("a/object.o");
        replace(&file, b"one").unwrap();
        let before = fs::metadata(&file).unwrap().modified().unwrap();
        std::thread::sleep(std::time::Duration::from_millis(20));
        replace(&file, b"one").unwrap();
        assert_eq!(fs::metadata(&file).unwrap().modified().unwrap(), before);
        replace(&file, b"two").unwrap();
        assert_eq!(fs::read(&file).unwrap(), b"two");
        assert_ne!(fs::metadata(&file).unwrap().modified().unwrap(), before);
        fs::remove_dir_all(dir).unwrap();
    }
}
