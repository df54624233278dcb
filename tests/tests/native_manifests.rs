//! What is applied to a cluster: the plain manifests are the chart's, and whatever the chart can be told renders to what Kubernetes' own schemas
//! allow. Whether it works there is not asked here: there is no API server.

use std::{
    env, fs,
    path::PathBuf,
    process::{Command, Output},
};

use anyhow::{Context, Result, ensure};
use marline_tests::{chart, process::output, wait::seconds};

/// The oldest that the chart is for, the one that its code knows, and the newest there are schemas of.
const VERSIONS: [&str; 3] = ["1.30", "1.33", "1.37"];
const MONITORED: [&str; 2] = ["--api-versions", "monitoring.coreos.com/v1/ServiceMonitor"];

/// A program that the runner has fetched, or the words that there is none.
fn program(variable: &str, test: &str) -> Option<PathBuf> {
    let found = env::var_os(variable).map(PathBuf::from);
    if found.is_none() {
        println!("SKIPPED: {test}: {variable} is not set: it could not be fetched");
    }
    found
}

fn documents(text: &str) -> usize {
    text.lines().filter(|line| line.starts_with("kind: ")).count()
}

fn names(text: &str, kind: &str) -> Vec<String> {
    let of_kind = |document: &&str| document.lines().any(|line| line == format!("kind: {kind}"));
    let name = |document: &str| document.lines().find_map(|line| line.strip_prefix("  name: ").map(str::to_owned));
    text.split("\n---\n").filter(of_kind).filter_map(name).collect()
}

#[test]
fn the_plain_manifests_are_what_the_chart_renders() -> Result<()> {
    let Some(helm) = program("MARLINE_HELM", "the_plain_manifests_are_what_the_chart_renders") else { return Ok(()) };
    for (name, options) in chart::MANIFESTS {
        let (committed, rendered) =
            (fs::read_to_string(chart::manifests().join(name))?, chart::render(&helm, options)?);
        ensure!(committed == rendered, "{name} differs from the chart; way out: cargo xtask manifests");
    }
    Ok(())
}

/// What the schemas say of a file: strict, so unknown fields are errors.
fn validated(schemas: &PathBuf, text: &str) -> Result<Output> {
    let dir = tempfile::tempdir()?;
    let file = dir.path().join("objects.yaml");
    fs::write(&file, text)?;
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", schemas).args(["-m", "kubernetes_validate", "--strict"]);
    for version in VERSIONS {
        command.args(["--kubernetes-version", version]);
    }
    output(command.arg(file), seconds(120))
}

fn valid(schemas: &PathBuf, what: &str, text: &str) -> Result<()> {
    let judged = validated(schemas, text)?;
    let said = String::from_utf8_lossy(&judged.stdout).into_owned() + &String::from_utf8_lossy(&judged.stderr);
    let passed = said.matches(" passed for resource ").count();
    // Of the operator's kind there is no schema.
    let expected = (documents(text) - names(text, "ServiceMonitor").len()) * VERSIONS.len();
    ensure!(judged.status.success() && passed == expected && passed > 0, "{what}: {passed} of {expected}:\n{said}");
    Ok(())
}

#[test]
fn every_object_is_valid_by_kubernetes_own_schemas_whatever_the_chart_is_told() -> Result<()> {
    let test = "every_object_is_valid_by_kubernetes_own_schemas_whatever_the_chart_is_told";
    let (Some(helm), Some(schemas)) = (program("MARLINE_HELM", test), program("MARLINE_KUBERNETES_VALIDATE", test))
    else {
        return Ok(());
    };
    let everything = chart::render(&helm, &MONITORED)?;
    valid(&schemas, "as it is", &everything)?;
    let uninstalling = chart::render(&helm, &["--set=cni.uninstall=true,imagePullSecrets[0].name=pull"])?;
    valid(&schemas, "uninstalling", &uninstalling)?;
    let other = [
        "--set=keeper.enabled=false,networkPolicy.enabled=false,ca.enabled=false,serviceMonitor.enabled=false",
        "--set=image.repository=registry.example/marline,image.tag=1.2.3,imagePullSecrets[0].name=pull,agent.maxSurge=1",
        "--set-json=agent.config={\"ca\":{\"path\":\"ca\"},\"accessLog\":{\"sample\":0.1}}",
    ];
    valid(&schemas, "told otherwise", &chart::render(&helm, &other)?)?;
    let namespace = fs::read_to_string(chart::manifests().join("namespace.yaml"))?;
    valid(&schemas, "the namespace", &namespace)?;
    // The judge itself: a field that there is not, and a value of another type.
    for (from, to) in [("hostPID: true", "hostPIDs: true"), ("hostPID: true", "hostPID: certainly")] {
        let wrong = everything.replace(from, to);
        ensure!(wrong != everything && !validated(&schemas, &wrong)?.status.success(), "{to} was taken");
    }
    Ok(())
}

#[test]
fn kinds_that_a_cluster_has_are_left_alone_and_those_that_it_lacks_are_not_used() -> Result<()> {
    let test = "kinds_that_a_cluster_has_are_left_alone_and_those_that_it_lacks_are_not_used";
    let Some(helm) = program("MARLINE_HELM", test) else { return Ok(()) };
    let bare = chart::render(&helm, &[])?;
    let ours = names(&bare, "CustomResourceDefinition");
    ensure!(ours.len() == 5 && names(&bare, "ServiceMonitor").is_empty(), "{ours:?}");
    // An Istio from before v1.
    let old = ["--api-versions", "security.istio.io/v1beta1/PeerAuthentication"];
    let left = names(&chart::render(&helm, &old)?, "CustomResourceDefinition");
    let missing: Vec<_> = ours.iter().filter(|name| !left.contains(name)).collect();
    ensure!(missing == ["peerauthentications.security.istio.io"], "{missing:?}");
    let monitored = names(&chart::render(&helm, &MONITORED)?, "ServiceMonitor");
    ensure!(monitored == ["marline", "marline-ca"], "{monitored:?}");
    // What they select, by the names of its ports.
    for (service, port) in
        [("marline-agent", "{name: metrics, port: 15020"), ("marline-ca", "{name: status, port: 15014")]
    {
        let is_it = |document: &&str| {
            document.contains("kind: Service\n") && document.contains(&format!("  name: {service}\n"))
        };
        let found = bare.split("\n---\n").find(is_it).with_context(|| format!("no Service {service}"))?;
        ensure!(found.contains(port), "{found}");
    }
    Ok(())
}

#[test]
fn the_plugin_and_the_pins_are_taken_away_by_containers_that_end_and_nothing_puts_them_back() -> Result<()> {
    let test = "the_plugin_and_the_pins_are_taken_away_by_containers_that_end_and_nothing_puts_them_back";
    let Some(helm) = program("MARLINE_HELM", test) else { return Ok(()) };
    let show = "--show-only=templates/agent.yaml";
    let text = chart::render(&helm, &["--set=cni.uninstall=true,agent.config.capture.pinPath=/sys/fs/bpf/own", show])?;
    let (before, after) = text.split_once("\n      containers:\n").context("no containers")?;
    let (_, init) = before.split_once("initContainers:").context("no init containers")?;
    let (chain, pins) = init.split_once("args: [unload, /sys/fs/bpf/own]").context("the pins stay")?;
    ensure!(chain.contains("args: [cni, uninstall, --keep-plugin") && !pins.contains("args:"), "{init}");
    ensure!(before.contains("maxSurge: 0") && after.contains("args: [unload, /sys/fs/bpf/own, --stay]"), "{text}");
    ensure!(after.matches("args:").count() == 1 && !text.contains("--watch") && !text.contains("[agent,"), "{after}");
    // What an agent waits for, as the CA's root, must not keep it from being taken away.
    ensure!(!text.contains("configMap:") && !text.contains("serviceAccountToken:"), "{text}");
    // Only this value lets pods go.
    ensure!(!chart::render(&helm, &[])?.contains("unload"), "pods are let go without a word");
    Ok(())
}

#[test]
fn a_chart_that_was_not_told_its_registry_or_has_no_ca_says_so_and_renders_nothing() -> Result<()> {
    let test = "a_chart_that_was_not_told_its_registry_or_has_no_ca_says_so_and_renders_nothing";
    let Some(helm) = program("MARLINE_HELM", test) else { return Ok(()) };
    let image = "--set=image.repository=registry.example/marline";
    let told: [(&[&str], &str); 2] =
        [(&[], "image.repository is not set"), (&[image, "--set=ca.enabled=false"], "agent.config.ca")];
    for (options, words) in told {
        let rendered = output(chart::template(&helm).args(options), seconds(60))?;
        let said = String::from_utf8_lossy(&rendered.stderr).into_owned();
        ensure!(
            !rendered.status.success() && rendered.stdout.is_empty() && said.contains(words),
            "{options:?}: {said}"
        );
    }
    let elsewhere = [image, "--set=ca.enabled=false", "--set-json=agent.config={\"ca\":{\"path\":\"ca\"}}"];
    let text = String::from_utf8(output(chart::template(&helm).args(elsewhere), seconds(60))?.stdout)?;
    ensure!(text.contains("image: registry.example/marline:") && text.contains("path: ca"), "{text}");
    Ok(())
}
