//! The manifests are for this binary: it takes every container's arguments, and every configuration that is in them.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[allow(dead_code, reason = "other tests use the rest")]
#[path = "support/rights.rs"]
mod manifests;

use std::{fs, os::unix::fs::symlink, path::Path, process::Command};

use serde_json::Value;

/// What is applied to install, and what to uninstall.
const FILES: [&str; 2] = ["marline.yaml", "uninstall.yaml"];

/// Kind, name and specification of all that run pods.
fn pods(file: &str) -> Vec<(String, Value)> {
    let documents = manifests::documents(file).into_iter();
    let running = documents.filter(|document| document["spec"]["template"]["spec"]["containers"].is_array());
    running.map(|document| (name(&document), document["spec"]["template"]["spec"].clone())).collect()
}

fn name(document: &Value) -> String {
    format!("{} {}", document["kind"].as_str().unwrap(), document["metadata"]["name"].as_str().unwrap())
}

fn containers(pod: &Value) -> Vec<&Value> {
    ["initContainers", "containers"].iter().filter_map(|kind| pod[*kind].as_array()).flatten().collect()
}

#[test]
fn every_containers_arguments_are_taken_by_the_program() {
    let mut seen = Vec::new();
    for (name, pod) in FILES.into_iter().flat_map(pods) {
        for container in containers(&pod) {
            let arguments: Vec<String> = serde_json::from_value(container["args"].clone()).unwrap();
            let line = std::iter::once("marline".to_owned()).chain(arguments.clone());
            if let Err(error) = marline::cli::command().try_get_matches_from(line) {
                panic!("{name}: {arguments:?}: {error}");
            }
            seen.push(arguments[0].clone());
        }
    }
    seen.sort();
    assert_eq!(seen, ["agent", "ca", "cni", "cni", "keeper", "unload", "unload"]);
    assert!(marline::cli::command().try_get_matches_from(["marline", "agent", "--waits"]).is_err(), "others are not");
}

/// Its readiness is the predecessor's until then: a pod that ends must not have counted as available before.
#[test]
fn an_agent_that_could_not_follow_its_predecessor_has_said_so_before_its_pod_counts() {
    let documents = manifests::documents("marline.yaml");
    let agent = documents.iter().find(|document| name(document) == "DaemonSet marline-agent").unwrap();
    let counts_after = agent["spec"]["minReadySeconds"].as_u64().unwrap();
    assert!(counts_after >= 2 * marline::app::REHEARSAL.as_secs(), "{counts_after} s");
}

/// Whoever follows them must not be left with nodes on which no pod starts, or pods that are shut.
#[test]
fn uninstalling_opens_the_chain_then_the_pods_and_the_documents_wait_for_that_before_they_take_the_agents_away() {
    let (_, pod) = pods("uninstall.yaml").remove(0);
    let arguments = |of: &str| -> Vec<Vec<String>> {
        let all = pod[of].as_array().unwrap().iter();
        all.map(|container| serde_json::from_value(container["args"].clone()).unwrap()).collect()
    };
    let before = arguments("initContainers");
    assert_eq!(before.iter().map(|line| line[0].as_str()).collect::<Vec<_>>(), ["cni", "unload"], "in this order");
    assert!(before[0][1] == "uninstall" && before[0].iter().any(|word| word == "--keep-plugin"), "for CRI-O's DEL");
    let agent =
        manifests::documents("marline.yaml").into_iter().find(|it| name(it) == "ConfigMap marline-agent").unwrap();
    let config: Value = serde_saphyr::from_str(agent["data"]["marline.yaml"].as_str().unwrap()).unwrap();
    assert_eq!(before[1], ["unload", config["spec"]["capture"]["pinPath"].as_str().unwrap()]);
    // The same, which finds nothing more to do, and stays.
    assert_eq!(arguments("containers"), [[&before[1][..], &["--stay".to_owned()]].concat()]);

    let text = fs::read_to_string(format!("{}/../README.md", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let commands: Vec<&str> = text.lines().filter_map(|line| line.strip_prefix("    ")).collect();
    let found =
        |words: &str| commands.iter().position(|line| line.contains(words)).unwrap_or_else(|| panic!("{words}"));
    for (first, last) in
        [("--set cni.uninstall=true", "helm uninstall marline"), ("manifests/uninstall.yaml", "kubectl delete -f")]
    {
        let steps = &commands[found(first)..=found(last)];
        let [_, waits, _] = steps else { panic!("{steps:?}") };
        assert!(waits.contains("rollout status daemonset/marline-agent") && waits.contains("--timeout="), "{steps:?}");
    }
}

/// As the kubelet mounts a ConfigMap: files are links into a hidden directory.
fn mounted(map: &Value, at: &Path) {
    fs::create_dir(at.join("..1")).unwrap();
    symlink("..1", at.join("..data")).unwrap();
    for (file, text) in map["data"].as_object().unwrap() {
        fs::write(at.join("..1").join(file), text.as_str().unwrap()).unwrap();
        symlink(Path::new("..data").join(file), at.join(file)).unwrap();
    }
}

#[test]
fn every_configuration_is_taken_by_the_program_without_a_warning() {
    let mut seen = Vec::new();
    for document in manifests::documents("marline.yaml").iter().filter(|document| document["kind"] == "ConfigMap") {
        let (name, dir) = (name(document), tempfile::tempdir().unwrap());
        mounted(document, dir.path());
        // What `--config` of the container names.
        let place = if name == "ConfigMap marline-ca" { dir.path().join("ca.yaml") } else { dir.path().to_owned() };
        let checked = Command::new(env!("CARGO_BIN_EXE_marline")).arg("check-config").arg(place).output().unwrap();
        let said = String::from_utf8_lossy(&checked.stdout).into_owned() + &String::from_utf8_lossy(&checked.stderr);
        assert!(checked.status.success() && !said.replace("0 warnings", "").contains("warning"), "{name}: {said}");
        seen.push(name);
    }
    assert_eq!(seen, ["ConfigMap marline-agent", "ConfigMap marline-ca"]);
}

/// What a configuration names must be where the pod mounts something.
#[test]
fn every_path_of_a_configuration_is_below_a_mount_of_its_container() {
    let documents = manifests::documents("marline.yaml");
    let agent = documents.iter().find(|document| name(document) == "ConfigMap marline-agent").unwrap();
    let text = agent["data"]["marline.yaml"].as_str().unwrap();
    let config: Value = serde_saphyr::from_str(text).unwrap();
    let mut paths = Vec::new();
    absolute(&config, &mut paths);
    assert!(paths.len() >= 6, "{paths:?}");
    let (_, pod) = pods("marline.yaml").into_iter().find(|(name, _)| name == "DaemonSet marline-agent").unwrap();
    let container =
        pod["containers"].as_array().unwrap().iter().find(|container| container["name"] == "agent").unwrap();
    let mounts: Vec<&str> = container["volumeMounts"]
        .as_array()
        .unwrap()
        .iter()
        .map(|mount| mount["mountPath"].as_str().unwrap())
        .collect();
    for path in paths {
        assert!(mounts.iter().any(|mount| Path::new(&path).starts_with(mount)), "{path} is in none of {mounts:?}");
    }
    for default in [marline::cni::SOCKET, marline::keeper::DIRECTORY] {
        assert!(mounts.iter().any(|mount| Path::new(default).starts_with(mount)), "{default}");
    }
}

fn absolute(value: &Value, paths: &mut Vec<String>) {
    match value {
        Value::String(text) if text.starts_with('/') => paths.push(text.clone()),
        Value::Array(all) => all.iter().for_each(|value| absolute(value, paths)),
        Value::Object(all) => all.values().for_each(|value| absolute(value, paths)),
        _ => {}
    }
}

#[test]
fn containers_have_a_root_that_they_cannot_write_and_no_privilege_that_is_not_named() {
    for (name, pod) in FILES.into_iter().flat_map(pods) {
        assert!(pod["priorityClassName"].as_str().unwrap().starts_with("system-"), "{name}");
        for container in containers(&pod) {
            let context = &container["securityContext"];
            let what = format!("{name}/{}", container["name"]);
            assert_eq!(context["readOnlyRootFilesystem"], true, "{what}");
            assert_eq!(context["allowPrivilegeEscalation"], false, "{what}");
            assert_eq!(context["seccompProfile"]["type"], "RuntimeDefault", "{what}");
            assert_eq!(context["capabilities"]["drop"], serde_json::json!(["ALL"]), "{what}");
            let added: Vec<String> = serde_json::from_value(context["capabilities"]["add"].clone()).unwrap_or_default();
            match container["name"].as_str().unwrap() {
                "agent" => assert_eq!(added.len(), 5, "{what}: {added:?}"),
                // In directories of the node's that are another user's.
                "cni" | "cni-uninstall" => assert_eq!(added, ["DAC_OVERRIDE", "CHOWN"], "{what}"),
                _ => assert!(added.is_empty(), "{what}: {added:?}"),
            }
            // In the node's network a pod's port is the node's: the scheduler would keep the second agent of an update away for ever.
            assert!(pod["hostNetwork"] != true || container["ports"].is_null(), "{what}");
            let image = container["image"].as_str().unwrap();
            assert!(image.starts_with("YOUR-REGISTRY/"), "{what}: {image} may be somebody's");
        }
    }
}

#[test]
fn every_capability_is_explained_where_it_is_asked_for() {
    let read = |file| fs::read_to_string(format!("{}/../deploy/manifests/{file}", env!("CARGO_MANIFEST_DIR"))).unwrap();
    let text = FILES.map(read).concat();
    let lines: Vec<&str> = text.lines().map(str::trim).collect();
    let asked = |line: &str| {
        line.strip_prefix("- ").is_some_and(|name| name.chars().all(|c| c.is_ascii_uppercase() || c == '_'))
    };
    let added: Vec<_> = lines.windows(2).filter(|pair| asked(pair[1])).collect();
    assert_eq!(added.len(), 5 + 2 * 2, "{added:?}");
    for pair in added {
        assert!(pair[0].starts_with('#'), "{} is not explained", pair[1]);
    }
}
