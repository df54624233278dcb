//! `cargo xtask image`: the container image, made without a container engine: one static binary, an account for it, and the list of what it is
//! made of. The same commit gives the same digest. What is in the image is `image/files`'s, how it is written `image/layout`'s, the list
//! `image/sbom`'s, and trying it out `image/check`'s.
//!
//! The binary is linked statically with glibc: it is the libc that everything was tested and measured with, and what the compiler has at
//! hand. Since glibc 2.34 names are resolved (files, DNS) without libraries that are loaded later.

mod check;
mod files;
mod layout;
mod sbom;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{
    build,
    deps::{self, need},
    step::{self, Step},
    workspace,
};

const TRIPLE: &str = "x86_64-unknown-linux-gnu";

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Writes to target/image: `oci`, an OCI layout; `marline.tar`, the same as one file, which `docker load`, `ctr image import`, `podman load`
and `skopeo copy oci-archive:` take; `marline.cdx.json`, the list of its parts (CycloneDX), which the image has at /usr/share/sbom as
well, where scanners find it. Needs neither root nor a container engine; --check needs root.")]
pub(crate) struct Args {
    /// Try the image: digests, what is in it, whether its binary runs with nothing else, whether a second one is the same
    #[arg(long)]
    check: bool,
    /// With --check: compile a second time, too, elsewhere (ten minutes)
    #[arg(long, requires = "check")]
    rebuild: bool,
    /// The name that the image is loaded under
    #[arg(long, default_value = "marline:0.1.0")]
    name: String,
}

/// What the image is made of.
struct Parts {
    binary: Vec<u8>,
    sbom: Vec<u8>,
    /// Of the commit, in seconds since 1970: the only time that the image knows.
    time: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let out = workspace::target().join("image");
    let parts = parts(&out.join("build"))?;
    let image = layout::write(&out, &parts, &args.name)?;
    step::say(&format!("wrote {} ({}, {} KiB)", out.join("marline.tar").display(), image.digest, image.size / 1024));
    if !args.check {
        return Ok(());
    }
    check::run(&out, &parts)?;
    let again = if args.rebuild { self::parts(&out.join("build-again"))? } else { self::parts(&out.join("build"))? };
    check::same(&image, &layout::write(&out.join("again"), &again, &args.name)?)?;
    step::say(&format!("the image is good: {}", image.digest));
    Ok(())
}

fn parts(target: &Path) -> Result<Parts> {
    let binary = static_binary(target)?;
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
    Ok(Parts { binary: read(&binary)?, sbom: sbom::text()?.into_bytes(), time: time()? })
}

/// SOURCE_DATE_EPOCH as tools have it, or the commit's time.
fn time() -> Result<u64> {
    let step = Step::quiet("asking for the time of the commit").way_out("set SOURCE_DATE_EPOCH outside of a checkout");
    let text = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(text) => text,
        Err(_) => {
            step.output(Command::new("git").current_dir(workspace::root()).args(["log", "-1", "--format=%ct", "HEAD"]))?
        }
    };
    text.trim().parse().map_err(|error| step.fail(format!("{text:?}: {error}")))
}

/// Builds the agent without anything that it would have to find at run time.
fn static_binary(target: &Path) -> Result<PathBuf> {
    build::ebpf()?;
    deps::ensure("link statically", &[need("cc", "gcc"), need("/usr/lib/x86_64-linux-gnu/libc.a", "libc6-dev")])?;
    let step = Step::begin("building the agent as a static binary (release; some minutes the first time)");
    // Without the library's weak symbols random numbers would come from /dev: the system call is always there. Symbols are left out because the
    // names that thin LTO gives to some (`….llvm.HASH`) hang on where the binary is built; the code does not.
    let mut rust = vec![
        "-Ctarget-feature=+crt-static".to_owned(),
        "--cfg=getrandom_backend=\"linux_getrandom\"".to_owned(),
        "-Cstrip=symbols".to_owned(),
    ];
    let mut c = Vec::new();
    let own = [(target.display().to_string(), "/build")];
    // The last that fits counts: the target directory is below the checkout.
    for (from, to) in workspace::remapped().into_iter().chain(own) {
        rust.push(format!("--remap-path-prefix={from}={to}"));
        c.push(format!("-ffile-prefix-map={from}={to}"));
    }
    let mut cargo = workspace::cargo();
    cargo.env("CARGO_ENCODED_RUSTFLAGS", rust.join("\x1f")).env_remove("RUSTFLAGS").env("CFLAGS", c.join(" "));
    cargo.args(["build", "--release", "--locked", "--package", "marline", "--bin", "marline", "--target", TRIPLE]);
    cargo.arg("--target-dir").arg(target);
    let built = build::artifacts(&step, &mut cargo)?;
    let agent = built.into_iter().find(|artifact| artifact.name == "marline").map(|artifact| artifact.executable);
    agent.ok_or_else(|| step.fail("cargo did not say where the binary is"))
}
