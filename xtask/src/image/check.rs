//! `cargo xtask image --check`: the image as its users meet it. Unpacks it, reads all digests anew, looks for what must not be there, and runs
//! its binary with the image as the root and nothing else, and agents of it in containers.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    chart,
    cluster::{AgentPod, ClusterSpec, Family},
    config::Mode,
    scenario::on_mesh,
    traffic::redis::Redis,
};
use serde_json::Value;

use super::{
    Parts,
    files::{BINARY, SBOM},
    layout::{Image, digest},
};
use crate::{
    build,
    deps::{self, need},
    step::Step,
    workspace,
};

pub(super) fn run(out: &Path, parts: &Parts) -> Result<()> {
    digests(&out.join("oci"))?;
    taken_by_others(out)?;
    let root = unpacked(out)?;
    contents(&root)?;
    named(parts, &root)?;
    runs(&root)?;
    carries(&root)
}

pub(super) fn same(one: &Image, two: &Image) -> Result<()> {
    let step = Step::begin("comparing with a second image");
    if one.digest == two.digest {
        return Ok(());
    }
    Err(step.fail(format!("the first is {}, the second {}", one.digest, two.digest)))
}

/// Every blob is what its name says, and everything that is named is there.
fn digests(oci: &Path) -> Result<()> {
    let step = Step::begin("reading all digests anew");
    let read = |path: PathBuf| fs::read(&path).with_context(|| format!("cannot read {}", path.display()));
    let blob = |descriptor: &Value| -> Result<Vec<u8>> {
        let name = descriptor["digest"].as_str().unwrap_or_default();
        let bytes = read(oci.join("blobs").join(name.replace(':', "/")))?;
        ensure!(digest(&bytes) == name, step.fail(format!("{name} holds {}", digest(&bytes))));
        ensure!(descriptor["size"] == bytes.len(), step.fail(format!("{name} has another size than is said")));
        Ok(bytes)
    };
    let index: Value = serde_json::from_slice(&read(oci.join("index.json"))?)?;
    let manifest: Value = serde_json::from_slice(&blob(&index["manifests"][0])?)?;
    let config: Value = serde_json::from_slice(&blob(&manifest["config"])?)?;
    let packed = blob(&manifest["layers"][0])?;
    let mut layer = Vec::new();
    std::io::Read::read_to_end(&mut flate2::read::GzDecoder::new(packed.as_slice()), &mut layer)?;
    ensure!(config["rootfs"]["diff_ids"][0] == digest(&layer), step.fail("the layer is not the configuration's"));
    Ok(())
}

/// Skopeo reads the archive as an OCI one and as docker's, and unpacks the first.
fn taken_by_others(out: &Path) -> Result<()> {
    deps::ensure("read the image as others do", &[need("skopeo", "skopeo"), need("unshare", "util-linux")])?;
    let archive = out.join("marline.tar");
    for kind in ["oci-archive", "docker-archive"] {
        let step = Step::begin(format!("reading the archive with skopeo as {kind}"));
        step.output(Command::new("skopeo").args(["inspect", &format!("{kind}:{}", archive.display())]))?;
    }
    Ok(())
}

/// Two nodes' agents out of the image, each in a container with what the manifests give it and a root that cannot be written, and what
/// pods see beside them.
fn carries(root: &Path) -> Result<()> {
    deps::ensure(
        "talk through the image's agents",
        &[need("ip", "iproute2"), need("redis-server", "redis-server"), need("redis-cli", "redis-tools")],
    )?;
    let step = Step::begin("building what makes a container");
    let mut cargo = workspace::cargo();
    cargo.args(["build", "--package", "marline-tests", "--bin", "container"]);
    let maker = build::artifacts(&step, &mut cargo)?.into_iter().find(|artifact| artifact.name == "container");
    let maker = maker.ok_or_else(|| step.fail("cargo did not say where it is"))?.executable;
    let step = Step::begin(
        "carrying pods' traffic by two agents out of the image, in containers as the manifests describe them",
    );
    let pod = AgentPod { maker, root: Some(root.to_owned()), capabilities: chart::capabilities("agent")? };
    let pairs = ClusterSpec::pairs(Mode::Strict);
    let spec = ClusterSpec { agents_are_pods: Some(pod), program: Some(root.join(BINARY)), ..pairs };
    let carried = on_mesh(&spec, |cluster| {
        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let redis = Redis::start(&server, "through-the-image")?;
        for family in Family::BOTH {
            let seen = redis.set_and_get(&client, server.address(family))?;
            ensure!(seen.exact, "{}", seen.note);
            ensure!(redis.set_and_get(&outside, server.address(family)).is_err(), "STRICT let plaintext in");
        }
        Ok(())
    });
    carried.map_err(|error| step.fail(format!("{error:#}")))
}

/// The root of a container.
fn unpacked(out: &Path) -> Result<PathBuf> {
    let root = out.join("root");
    if root.exists() {
        fs::remove_dir_all(&root).with_context(|| format!("cannot remove {}", root.display()))?;
    }
    let index: Value = serde_json::from_slice(&fs::read(out.join("oci/index.json"))?)?;
    let at = |value: &Value| out.join("oci/blobs").join(value["digest"].as_str().unwrap_or_default().replace(':', "/"));
    let manifest: Value = serde_json::from_slice(&fs::read(at(&index["manifests"][0]))?)?;
    let layer = fs::File::open(at(&manifest["layers"][0]))?;
    tar::Archive::new(flate2::read::GzDecoder::new(layer)).unpack(&root)?;
    Ok(root)
}

fn contents(root: &Path) -> Result<()> {
    let step = Step::begin("looking for what does not belong in the image");
    let mut files = BTreeSet::new();
    list(root, root, &mut files)?;
    let expected = ["etc/group", "etc/nsswitch.conf", "etc/passwd", BINARY, SBOM].map(str::to_owned);
    if files == BTreeSet::from(expected) { Ok(()) } else { Err(step.fail(format!("it holds {files:?}"))) }
}

fn list(root: &Path, dir: &Path, files: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            list(root, &entry.path(), files)?;
        } else {
            files.insert(entry.path().strip_prefix(root)?.display().to_string());
        }
    }
    Ok(())
}

/// The crates whose source paths the binary holds (in panics) must be in the list: the binary itself is asked, not cargo.
fn named(parts: &Parts, root: &Path) -> Result<()> {
    let step = Step::begin("comparing the list of parts with the binary");
    let bom: Value = serde_json::from_slice(&fs::read(root.join(SBOM))?)?;
    let known: BTreeSet<String> = bom["components"].as_array().into_iter().flatten().map(part).collect();
    let found = crates_in(&parts.binary);
    ensure!(found.len() > 50, step.fail(format!("only {} crates were found in the binary", found.len())));
    let missing: Vec<_> = found.difference(&known).collect();
    if missing.is_empty() { Ok(()) } else { Err(step.fail(format!("not in the list: {missing:?}"))) }
}

fn part(component: &Value) -> String {
    format!("{}-{}", component["name"].as_str().unwrap_or_default(), component["version"].as_str().unwrap_or_default())
}

/// `NAME-VERSION` of all `/cargo/registry/src/INDEX/NAME-VERSION/` in the bytes.
fn crates_in(binary: &[u8]) -> BTreeSet<String> {
    const PREFIX: &[u8] = b"/cargo/registry/src/";
    let mut found = BTreeSet::new();
    let starts = binary.windows(PREFIX.len()).enumerate().filter(|(_, window)| *window == PREFIX);
    for (at, _) in starts {
        let rest = binary.get(at + PREFIX.len()..).unwrap_or_default();
        let mut segments = rest.split(|byte| *byte == b'/');
        if let (Some(_), Some(name), Some(_)) = (segments.next(), segments.next(), segments.next())
            && name.len() < 80
            && let Ok(name) = std::str::from_utf8(name)
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
        {
            found.insert(name.to_owned());
        }
    }
    found
}

/// In the image as the root, with no file and no process of this machine in sight.
fn runs(root: &Path) -> Result<()> {
    for arguments in [
        &["--version"][..],
        &["agent", "--help"],
        // A handshake and a transfer over loopback, with keys and certificates made for it.
        &["kernel"],
        &["ca", "init", "/tmp/ca"],
    ] {
        let step = Step::begin(format!("running `marline {}` out of the image", arguments.join(" ")));
        let mut command = Command::new("unshare");
        command.args(["--mount", "--pid", "--fork", "--kill-child", "--root"]).arg(root).arg("/usr/bin/marline");
        step.output(command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").args(arguments))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crates_are_found_by_their_paths() {
        let binary = b"\0/cargo/registry/src/index-1/rustls-0.23.46/src/a.rs\0/cargo/registry/src/index-1/x\0y/z/";
        assert_eq!(crates_in(binary), BTreeSet::from(["rustls-0.23.46".to_owned()]));
    }
}
