//! `cargo xtask lint`: formatting, clippy, the rules of the house, licences and sources of dependencies.
//! The rules themselves are in `rooms`.

mod lexer;
mod rooms;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Result, bail};

use self::rooms::Finding;
use crate::{
    deps,
    step::{self, Step},
    workspace,
};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Checks formatting, clippy with warnings as errors, the rules of the house (which room of the agent may use which, purity of policy, where
unsafe code may live, how files begin; a file over 400 lines is only mentioned), and, if cargo-deny is installed, licences, sources
and duplicates of dependencies. `cargo xtask test` runs formatting and the rules of the house as its first step.")]
pub(crate) struct Args {
    /// Install cargo-deny if it is missing (takes some minutes)
    #[arg(long)]
    deny: bool,
    /// Format the code instead of complaining
    #[arg(long)]
    fix: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    rustup_components()?;
    if args.fix {
        for dir in crates_to_format() {
            Step::begin(format!("formatting {}", dir.display()))
                .run(workspace::cargo().current_dir(&dir).args(["fmt", "--all"]))?;
        }
    }
    all([format(), rules(), clippy(), deny(args.deny)])
}

/// The checks that take seconds.
pub(crate) fn quick() -> Result<()> {
    rustup_components()?;
    all([format(), rules()])
}

/// One error out of many: one look tells everything.
fn all<const N: usize>(results: [Result<()>; N]) -> Result<()> {
    let faults: Vec<String> = results.into_iter().filter_map(Result::err).map(|error| error.to_string()).collect();
    if faults.is_empty() { Ok(()) } else { bail!("{}", faults.join("\n")) }
}

fn clippy() -> Result<()> {
    let step =
        Step::begin("clippy, warnings are errors").way_out("mend the code; `cargo clippy --fix` can do some of it");
    step.run(workspace::cargo().args(["clippy", "--workspace", "--all-targets", "--", "-D", "warnings"]))
}

fn format() -> Result<()> {
    let step = Step::begin("checking the format").way_out("cargo xtask lint --fix");
    // rustfmt colours without looking where it writes to.
    let colour = if step::colour() { "always" } else { "never" };
    for dir in crates_to_format() {
        step.run(workspace::cargo().current_dir(&dir).args(["fmt", "--all", "--check", "--", "--color", colour]))?;
    }
    Ok(())
}

fn rules() -> Result<()> {
    let step = Step::begin("checking the rules of the house")
        .way_out("ARCHITECTURE.md says why; the tables are in xtask/src/lint/rooms.rs");
    let (faults, hints): (Vec<Finding>, Vec<Finding>) =
        check_all(&workspace::root())?.into_iter().partition(|finding| !finding.hint);
    for finding in &hints {
        step::note(&format!("{}: {}", finding.file, finding.message));
    }
    if faults.is_empty() {
        return Ok(());
    }
    let list: String = faults.iter().map(|f| format!("\n    {}:{}: {}", f.file, f.line, f.message)).collect();
    Err(step.fail(format!("{} findings{list}", faults.len())))
}

/// The workspace and the eBPF crate, which is a workspace of its own.
fn crates_to_format() -> Vec<PathBuf> {
    let root = workspace::root();
    [root.clone(), root.join("ebpf")].into_iter().filter(|dir| dir.join("Cargo.toml").is_file()).collect()
}

/// rustup's minimal profile lacks them.
fn rustup_components() -> Result<()> {
    let works = |tool: &str| Step::quiet(tool).output(workspace::cargo().args([tool, "--version"])).is_ok();
    if works("fmt") && works("clippy") {
        return Ok(());
    }
    let step = Step::begin("installing rustfmt and clippy with rustup").way_out("rustup component add rustfmt clippy");
    step.run(Command::new("rustup").current_dir(workspace::root()).args(["component", "add", "rustfmt", "clippy"]))
}

fn check_all(root: &Path) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    let mut files = Vec::new();
    for dir in ["agent", "common", "ebpf", "tests", "xtask"] {
        rust_files(&root.join(dir), &mut files);
    }
    files.sort();
    if files.is_empty() {
        bail!("no Rust file below {}", root.display());
    }
    for file in files {
        let source = fs::read_to_string(&file)?;
        let name = file.strip_prefix(root).unwrap_or(&file).to_string_lossy().into_owned();
        findings.extend(rooms::check(&name, &source));
        if name == "agent/src/lib.rs" {
            findings.extend(rooms::unknown_rooms(&source));
        }
    }
    Ok(findings)
}

fn rust_files(dir: &Path, files: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && entry.file_name() != "target" {
            rust_files(&path, files);
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            files.push(path);
        }
    }
}

fn deny(install: bool) -> Result<()> {
    let mut there = deps::find("cargo-deny").is_some();
    if !there && install {
        let step = Step::begin("installing cargo-deny with cargo install (some minutes, once)")
            .way_out("cargo install cargo-deny --locked");
        step.run(workspace::cargo().env_remove("CARGO_TARGET_DIR").args(["install", "cargo-deny", "--locked"]))?;
        there = true;
    }
    if !there {
        step::note(
            "SKIPPED: licences, sources and advisories of dependencies: cargo-deny is not installed (--deny installs it)",
        );
        return Ok(());
    }
    for manifest in crates_to_format() {
        let step = Step::begin(format!("checking licences, sources and bans of {}", manifest.display()))
            .way_out("see deny.toml");
        let deny = |checks: &[&str]| {
            let mut cargo = workspace::cargo();
            // In the root, where deny.toml is found.
            cargo.args(["deny", "--manifest-path"]).arg(manifest.join("Cargo.toml")).arg("check").args(checks);
            cargo
        };
        step.run(&mut deny(&["bans", "licenses", "sources"]))?;
        // The database of advisories is a repository elsewhere: not reaching it is no fault of this checkout.
        let advisories =
            Step::begin("checking advisories").way_out("update the dependency, or justify an exception in deny.toml");
        if let Err(error) = advisories.output(&mut deny(&["advisories"])) {
            let text = error.to_string();
            if !(text.contains("failed to fetch advisory database")
                || text.contains("failed to open advisory database"))
            {
                return Err(error);
            }
            step::note("SKIPPED: advisories: their database cannot be reached");
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The check would pass on nothing: make sure that it sees this repository.
    #[test]
    fn the_files_of_this_checkout_are_found() {
        let mut files = Vec::new();
        rust_files(&workspace::root(), &mut files);
        for name in ["agent/src/lib.rs", "common/src/lib.rs", "xtask/src/lint/rooms.rs"] {
            assert!(files.contains(&workspace::root().join(name)), "{name}");
        }
    }
}
