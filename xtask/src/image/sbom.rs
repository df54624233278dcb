//! What the binary is made of, as CycloneDX: the crates that are linked into the agent and into the kernel programs that it embeds, as cargo
//! resolves them, with the hashes of Cargo.lock. The C library and C code inside of crates go by their package.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::Path,
};

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

use super::TRIPLE;
use crate::{step::Step, workspace};

#[derive(Deserialize)]
struct Metadata {
    packages: Vec<Package>,
    resolve: Resolve,
}

#[derive(Deserialize)]
struct Package {
    id: String,
    name: String,
    version: String,
    license: Option<String>,
    source: Option<String>,
    targets: Vec<Target>,
}

#[derive(Deserialize)]
struct Target {
    kind: Vec<String>,
}

#[derive(Deserialize)]
struct Resolve {
    nodes: Vec<Node>,
}

#[derive(Deserialize)]
struct Node {
    id: String,
    deps: Vec<Dependency>,
}

#[derive(Deserialize)]
struct Dependency {
    pkg: String,
    dep_kinds: Vec<Kind>,
}

#[derive(Deserialize)]
struct Kind {
    /// None for what is linked; else `dev` or `build`.
    kind: Option<String>,
}

/// By name and version: one that both programs have is there once.
type Components = BTreeMap<(String, String), Value>;

pub(super) fn text() -> Result<String> {
    let mut components = Components::new();
    let root = workspace::root();
    gather(&root.join("Cargo.toml"), &root.join("Cargo.lock"), "marline", &mut components)?;
    let ebpf = root.join("ebpf");
    gather(&ebpf.join("Cargo.toml"), &ebpf.join("Cargo.lock"), "marline-ebpf", &mut components)?;
    // Which is what the parts are of, and none of them.
    let (name, version) = ("marline", env!("CARGO_PKG_VERSION"));
    components.remove(&(name.to_owned(), version.to_owned()));
    let glibc = Step::quiet("asking for the version of libc6-dev")
        .output(std::process::Command::new("dpkg-query").args(["-W", "-f", "${Version}", "libc6-dev"]))?;
    let mut list: Vec<Value> = components.into_values().collect();
    list.push(json!({"type": "library", "name": "glibc", "version": glibc.trim(), "licenses": [{"expression": "LGPL-2.1-or-later"}],
                     "purl": format!("pkg:deb/debian/libc6-dev@{}?arch=amd64", glibc.trim()), "bom-ref": "glibc"}));
    let bom = json!({
        "$schema": "http://cyclonedx.org/schema/bom-1.5.schema.json", "bomFormat": "CycloneDX", "specVersion": "1.5", "version": 1,
        "metadata": {"component": {"type": "application", "bom-ref": name, "name": name, "version": version,
                                   "licenses": [{"expression": "Apache-2.0"}]}},
        "components": list,
    });
    Ok(serde_json::to_string_pretty(&bom)?)
}

fn gather(manifest: &Path, lock: &Path, package: &str, into: &mut Components) -> Result<()> {
    let step = Step::quiet(format!("asking cargo what {package} is made of"));
    let mut cargo = workspace::cargo();
    cargo.args(["metadata", "--format-version=1", "--locked", "--manifest-path"]).arg(manifest);
    if package == "marline" {
        cargo.args(["--filter-platform", TRIPLE]);
    }
    let metadata: Metadata = serde_json::from_str(&step.output(&mut cargo)?)?;
    let lock = fs::read_to_string(lock).with_context(|| format!("cannot read {}", lock.display()))?;
    let hashes = hashes(&lock);
    for package in linked(&metadata, package) {
        let key = (package.name.clone(), package.version.clone());
        into.insert(key, component(package, &hashes));
    }
    Ok(())
}

/// What is linked, from the package on. Macros and build scripts run at build time alone, and so does what they need.
fn linked<'a>(metadata: &'a Metadata, root: &str) -> Vec<&'a Package> {
    let packages: BTreeMap<&str, &Package> = metadata.packages.iter().map(|p| (p.id.as_str(), p)).collect();
    let nodes: BTreeMap<&str, &Node> = metadata.resolve.nodes.iter().map(|node| (node.id.as_str(), node)).collect();
    let mut open: Vec<&str> =
        packages.values().filter(|p| p.name == root && p.source.is_none()).map(|p| p.id.as_str()).collect();
    let mut seen = BTreeSet::new();
    while let Some(id) = open.pop() {
        if !seen.insert(id) {
            continue;
        }
        let dependencies = nodes.get(id).map(|node| node.deps.as_slice()).unwrap_or_default();
        let normal = dependencies.iter().filter(|dep| dep.dep_kinds.iter().any(|kind| kind.kind.is_none()));
        let is_macro = |id: &str| {
            packages.get(id).is_some_and(|p| p.targets.iter().any(|t| t.kind.iter().any(|kind| kind == "proc-macro")))
        };
        open.extend(normal.map(|dep| dep.pkg.as_str()).filter(|id| !is_macro(id)));
    }
    seen.into_iter().filter_map(|id| packages.get(id).copied()).collect()
}

fn component(package: &Package, hashes: &BTreeMap<(String, String), String>) -> Value {
    let purl = format!("pkg:cargo/{}@{}", package.name, package.version);
    let mut component =
        json!({"type": "library", "bom-ref": purl, "name": package.name, "version": package.version, "purl": purl});
    if let Some(license) = &package.license {
        // Cargo took a slash for OR once.
        component["licenses"] = json!([{"expression": license.replace('/', " OR ")}]);
    }
    if let Some(hash) = hashes.get(&(package.name.clone(), package.version.clone())) {
        component["hashes"] = json!([{"alg": "SHA-256", "content": hash}]);
    }
    component
}

/// The checksums of a Cargo.lock, whose form is cargo's own and one entry per line.
fn hashes(lock: &str) -> BTreeMap<(String, String), String> {
    let field = |block: &str, name: &str| {
        let prefix = format!("{name} = \"");
        block.lines().find_map(|line| Some(line.strip_prefix(&prefix)?.strip_suffix('"')?.to_owned()))
    };
    let blocks = lock.split("[[package]]");
    blocks.filter_map(|b| Some(((field(b, "name")?, field(b, "version")?), field(b, "checksum")?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_list_has_what_is_linked_with_hashes_and_not_what_only_builds() {
        let bom: Value = serde_json::from_str(&text().unwrap()).unwrap();
        let find = |name: &str| bom["components"].as_array().unwrap().iter().find(|c| c["name"] == name).cloned();
        for name in ["rustls", "aya-ebpf", "marline-common"] {
            assert!(find(name).is_some(), "{name}");
        }
        assert_eq!(find("rustls").unwrap()["hashes"][0]["content"].as_str().unwrap().len(), 64);
        for name in ["tonic-build", "serde_derive", "proptest", "plotters"] {
            assert!(find(name).is_none(), "{name} is not in the binary");
        }
    }
}
