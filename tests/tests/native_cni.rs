//! The CNI plugin beside ADD, CHECK and DEL, as CNI 1.1 has it: STATUS and GC, called as a runtime calls them. And `marline cni install --watch`
//! as the process that it is in the DaemonSet, beside a CNI that writes its configuration as it likes.

#[path = "kubernetes/api.rs"]
mod api;
#[path = "kubernetes/kubelet.rs"]
mod kubelet;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, chown},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use kubelet::{World, on_kubernetes};
use marline_tests::{
    agent::binary,
    chart,
    cluster::{Family, Pod, Side},
    process::{Process, output, succeed},
    wait::{Look, seconds, wait_for},
};
use serde_json::{Value, json};

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const PORT: u16 = 7000;

/// A call that is of no pod: what it prints, if it succeeds, and the error otherwise.
fn call(world: &World<'_>, side: Side, command: &str, version: &str, more: &Value) -> Result<Result<String, Value>> {
    let said = world.caller().network(side, command, version, more)?;
    let text = String::from_utf8(said.stdout)?;
    Ok(if said.status.success() { Ok(text) } else { Err(serde_json::from_str(&text).with_context(|| text)?) })
}

fn status(world: &World<'_>, side: Side) -> Result<Result<String, Value>> {
    call(world, side, "STATUS", "1.1.0", &json!({}))
}

/// GC, with these pods as all that the runtime knows.
fn collect(world: &World<'_>, side: Side, valid: &[&Pod]) -> Result<()> {
    let attachment = |pod: &&Pod| json!({"containerID": format!("c-{}", pod.name), "ifname": "eth0"});
    let valid: Vec<Value> = valid.iter().map(attachment).collect();
    let said = call(world, side, "GC", "1.1.0", &json!({"cni.dev/valid-attachments": valid}))?;
    ensure!(said.as_ref().is_ok_and(String::is_empty), "GC: {said:?}");
    Ok(())
}

fn talks(from: &Pod, to: &Pod) -> Result<bool> {
    let to = to.socket(Family::V4, PORT).to_string();
    Ok(output(from.command(TALKER).args(["many", &to, "2", "1"]), seconds(20))?.status.success())
}

fn records(world: &World<'_>, side: Side) -> Result<Vec<String>> {
    names(&kubelet::node_directory(world.cluster, side).join("pods"))
}

fn names(directory: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(directory).with_context(|| directory.display().to_string())?;
    let mut names: Vec<String> =
        entries.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect::<Result<_>>()?;
    names.sort();
    Ok(names)
}

#[test]
fn status_says_whether_pods_can_be_captured_and_if_not_why() -> Result<()> {
    on_kubernetes(|world| {
        let unavailable = |said: Result<String, Value>, words: &str| {
            let told = said.as_ref().is_err_and(|error| error["code"] == 50 && error.to_string().contains(words));
            ensure!(told, "not {words:?}: {said:?}");
            Ok(())
        };
        unavailable(status(world, Side::A)?, "does not answer")?;
        // An agent that the API server does not answer: nobody listens at that port.
        let config = world.cluster.config_directory(Side::A).join("agent.yaml");
        let (kubeconfig, deaf) =
            (api::kubeconfig_of(world.cluster.directory()), world.cluster.directory().join("deaf"));
        let text = fs::read_to_string(&config)?;
        fs::write(&deaf, fs::read_to_string(&kubeconfig)?.replace(":6443", ":6444"))?;
        fs::write(&config, text.replace(&kubeconfig.display().to_string(), &deaf.display().to_string()))?;
        world.cluster.launch_agent(Side::A)?;
        wait_for("an agent that knows nothing to say so", seconds(20), || {
            let said = status(world, Side::A)?;
            let told = said.as_ref().is_err_and(|error| error.to_string().contains("API server has not answered"));
            Ok(if told { Look::Done(()) } else { Look::NotYet(format!("{said:?}")) })
        })?;
        fs::write(&config, text)?;
        world.cluster.start_agent(Side::A)?;
        let said = status(world, Side::A)?;
        ensure!(said.as_ref().is_ok_and(String::is_empty), "{said:?}");
        // CNI has STATUS and GC since 1.1.0: a runtime that asks by an older configuration is wrong, and hears so.
        for command in ["STATUS", "GC"] {
            let said = call(world, Side::A, command, "1.0.0", &json!({"cni.dev/valid-attachments": []}))?;
            ensure!(said.as_ref().is_err_and(|error| error["code"] == 4), "{command}: {said:?}");
        }
        let said = call(world, Side::A, "GC", "1.1.0", &json!({}))?;
        ensure!(said.as_ref().is_err_and(|error| error.to_string().contains("valid-attachments")), "{said:?}");
        world.cluster.agent_mut(Side::A)?.kill()?;
        unavailable(status(world, Side::A)?, "does not answer")
    })
}

#[test]
fn garbage_that_is_collected_lets_go_what_has_no_namespace_and_nothing_else() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let (stays, lost) = (world.start("foo", "stays", Side::A)?, world.start("foo", "lost", Side::A)?);
        let (server, plain) = (world.start("foo", "server", Side::B)?, world.start("legacy", "plain", Side::B)?);
        let serves = |pod: &Pod| pod.serve("echo", pod.command(TALKER).args(["echo", &PORT.to_string()]), PORT);
        let (_one, _two) = (serves(&server)?, serves(&plain)?);
        let all = records(world, Side::A)?;
        ensure!(all.len() == 2, "{all:?}");

        // A runtime that has forgotten a pod, which is there: it goes on, captured.
        collect(world, Side::A, &[&stays])?;
        wait_for("the forgotten one to reach the server", seconds(20), || {
            Ok(if talks(&lost, &server)? { Look::Done(()) } else { Look::NotYet("not yet".into()) })
        })?;
        world.cluster.agent(Side::A)?.wait_pod("lost", true)?;
        ensure!(records(world, Side::A)? == all, "a record went with the pod there");

        // One whose namespace has gone without DEL, as when a node's runtime lost its state.
        marline_tests::cgroup::remove(&lost.place.cgroup)?;
        world.cluster.remove_pod("lost")?;
        world.api.delete(api::PODS, "foo", "lost");
        collect(world, Side::A, &[&stays])?;
        world.cluster.agent(Side::A)?.wait_pod("lost", false)?;
        let own = format!("{}.json", kubelet::uid("stays"));
        wait_for("its record to go", seconds(20), || {
            let left = records(world, Side::A)?;
            Ok(if left == [own.as_str()] { Look::Done(()) } else { Look::NotYet(format!("{left:?}")) })
        })?;
        ensure!(talks(&stays, &server)?, "the other one minds");
        let entries = world
            .cluster
            .agent(Side::A)?
            .wait_entries("mTLS", 0, 1, |entry| entry.connects(&stays, server.socket(Family::V4, PORT)))?;
        ensure!(entries.iter().all(|entry| entry.tls.is_some()), "{entries:?}");

        // Without an agent there is nothing to be done, and what is captured is shut.
        world.cluster.agent_mut(Side::A)?.kill()?;
        collect(world, Side::A, &[])?;
        ensure!(!talks(&stays, &plain)?, "GC has opened a pod");
        ensure!(records(world, Side::A)? == [own], "GC without an agent has taken a record");
        world.cluster.start_agent(Side::A)?;
        world.cluster.agent(Side::A)?.wait_pod("stays", true)
    })
}

/// A node's directories, without the node.
struct Node {
    _directory: tempfile::TempDir,
    chains: PathBuf,
    plugins: PathBuf,
    log: PathBuf,
}

impl Node {
    fn new() -> Result<Self> {
        let directory = tempfile::tempdir()?;
        let (chains, plugins) = (directory.path().join("net.d"), directory.path().join("bin"));
        fs::create_dir_all(&chains)?;
        fs::create_dir_all(&plugins)?;
        fs::write(plugins.join("ptp"), "another's")?;
        let log = directory.path().join("install.log");
        Ok(Self { _directory: directory, chains, plugins, log })
    }

    fn cni(&self, verb: &str) -> Result<Command> {
        let mut command = Command::new(binary()?);
        command.args(["cni", verb, "--cni-conf-dir"]).arg(&self.chains).arg("--cni-bin-dir").arg(&self.plugins);
        Ok(command)
    }

    /// As a CNI writes it: beside, and moved into place.
    fn write(&self, name: &str, text: &str) -> Result<()> {
        let fresh = self.chains.join(format!(".{name}.tmp"));
        fs::write(&fresh, text)?;
        Ok(fs::rename(fresh, self.chains.join(name))?)
    }

    /// Waits until a file is this text, with the plugin at its end.
    fn wait_chained(&self, watching: &mut Process, name: &str, text: &str) -> Result<()> {
        let subnet = serde_json::from_str::<Value>(text)?["plugins"][0].clone();
        wait_for(format!("{name} to end with the plugin"), seconds(20), || {
            ensure!(watching.ended()?.is_none(), "it has ended: {}", watching.log());
            let now = fs::read_to_string(self.chains.join(name)).unwrap_or_default();
            let read = serde_json::from_str::<Value>(&now).unwrap_or_default();
            let kinds: Vec<_> = read["plugins"].as_array().into_iter().flatten().map(|it| it["type"].clone()).collect();
            let right = kinds == ["ptp", "marline-cni"] && read["plugins"][0] == subnet;
            Ok(if right { Look::Done(()) } else { Look::NotYet(format!("{now:?}; {}", watching.log())) })
        })
    }
}

fn list(subnet: &str) -> String {
    format!(
        "{{\n  \"cniVersion\": \"1.0.0\",\n  \"name\": \"pods\",\n  \"plugins\": [\n    {{\"type\": \"ptp\", \"ipam\": {{\"type\": \"host-local\", \"subnet\": \"{subnet}\"}}}}\n  ]\n}}\n"
    )
}

#[test]
fn a_watching_installer_puts_the_plugin_back_whatever_the_cni_writes_and_leaves_no_trace_when_it_is_taken_away()
-> Result<()> {
    let node = Node::new()?;
    // It comes before the CNI, as on a node that is new.
    let mut watching = Process::start(
        "install --watch",
        node.cni("install")?.args(["--watch", "--socket", "/run/m.sock"]),
        &node.log,
    )?;
    wait_for("the plugin's file", seconds(20), || {
        let there = node.plugins.join("marline-cni").exists();
        Ok(if there { Look::Done(()) } else { Look::NotYet(watching.log()) })
    })?;
    let name = "10-pods.conflist";
    for round in 1..=3 {
        let text = list(&format!("10.77.{round}.0/24"));
        node.write(name, &text)?;
        node.wait_chained(&mut watching, name, &text)?;
    }
    // One that writes in place, and in two pieces: half of it is no configuration, and left alone.
    let text = list("10.77.4.0/24");
    let (half, rest) = text.split_at(text.len() / 2);
    fs::write(node.chains.join(name), half)?;
    wait_for("the half to be noticed", seconds(20), || {
        let log = watching.log();
        Ok(if log.contains("the plugin is not in the chain") { Look::Done(()) } else { Look::NotYet(log) })
    })?;
    ensure!(fs::read_to_string(node.chains.join(name))? == half, "half a configuration was written over");
    fs::write(node.chains.join(name), format!("{half}{rest}"))?;
    node.wait_chained(&mut watching, name, &text)?;
    // Another configuration comes to count.
    let first = list("10.88.0.0/16");
    node.write("05-other.conflist", &first)?;
    node.wait_chained(&mut watching, "05-other.conflist", &first)?;
    // Its directory is made anew, as when a node's CNI is set up from nothing.
    fs::remove_dir_all(&node.chains)?;
    fs::create_dir(&node.chains)?;
    for (name, text) in [(name, &text), ("05-other.conflist", &first)] {
        node.write(name, text)?;
    }
    node.wait_chained(&mut watching, "05-other.conflist", &first)?;

    let ended = watching.stop()?;
    ensure!(ended.success(), "{ended}: {}", watching.log());
    let left = fs::read_to_string(node.chains.join("05-other.conflist"))?;
    ensure!(left.contains("marline-cni"), "pods would start uncaptured while the DaemonSet is rolled out: {left}");
    // Nobody watches any more.
    let said = succeed(&mut node.cni("uninstall")?, seconds(20))?;
    ensure!(said.contains("05-other.conflist"), "{said}");
    ensure!(names(&node.chains)? == ["05-other.conflist", name], "{:?}", names(&node.chains)?);
    ensure!(fs::read_to_string(node.chains.join("05-other.conflist"))? == first, "not to the letter");
    ensure!(fs::read_to_string(node.chains.join(name))? == text, "not to the letter");
    ensure!(names(&node.plugins)? == ["ptp"], "{:?}", names(&node.plugins)?);
    Ok(())
}

/// A CNI that owns its directory, and takes out what is not its own.
#[test]
fn a_program_that_keeps_taking_the_plugin_out_is_told_of_once_with_the_way_out_and_not_raced() -> Result<()> {
    let node = Node::new()?;
    let (name, text) = ("05-cilium.conflist", list("10.77.1.0/24"));
    node.write(name, &text)?;
    let mut watching = Process::start("install --watch", node.cni("install")?.arg("--watch"), &node.log)?;
    let mut fight = |what: &str, done: &dyn Fn(&str) -> bool| {
        wait_for(what.to_owned(), seconds(60), || {
            ensure!(watching.ended()?.is_none(), "it has ended: {}", watching.log());
            if done(&watching.log()) {
                return Ok(Look::Done(()));
            }
            if fs::read_to_string(node.chains.join(name))?.contains("marline-cni") {
                node.write(name, &text)?;
            }
            Ok(Look::NotYet(watching.log()))
        })
    };
    fight("it to be told", &|log| log.contains("keeps changing"))?;
    let told = watching.log();
    ensure!(told.contains(name) && told.contains("cni.exclusive=false"), "{told}");
    // And nothing more is said while that goes on.
    for _ in 0..2 {
        node.wait_chained(&mut watching, name, &text)?;
        node.write(name, &text)?;
    }
    node.wait_chained(&mut watching, name, &text)?;
    ensure!(watching.log() == told, "{}", watching.log());
    ensure!(names(&node.chains)? == [name], "{:?}", names(&node.chains)?);
    let _ended = watching.stop()?;
    Ok(())
}

/// As where kubespray or an archive has made them.
#[test]
fn the_containers_capabilities_are_enough_for_directories_that_are_another_users() -> Result<()> {
    let other = Some(1000);
    let node = Node::new()?;
    let (name, text) = ("10-pods.conflist", list("10.77.1.0/24"));
    node.write(name, &text)?;
    let file = node.chains.join(name);
    fs::set_permissions(&file, fs::Permissions::from_mode(0o640))?;
    for path in [&file, &node.chains, &node.plugins] {
        chown(path, other, other)?;
    }
    let limited = |verb: &str, capabilities: &[String]| {
        let kept: String = capabilities.iter().map(|name| format!(",+{}", name.to_lowercase())).collect();
        let cni = node.cni(verb)?;
        let mut command = Command::new("setpriv");
        command.args(["--no-new-privs", "--inh-caps=-all"]).arg(format!("--bounding-set=-all{kept}"));
        command.arg(cni.get_program()).args(cni.get_args());
        output(&mut command, seconds(60))
    };
    let refused = limited("install", &[])?;
    ensure!(!refused.status.success() && fs::read_to_string(&file)? == text, "they are not needed: {refused:?}");
    let capabilities = chart::capabilities("cni")?;
    for (verb, there) in [("install", true), ("uninstall", false)] {
        let done = limited(verb, &capabilities)?;
        ensure!(done.status.success(), "{verb} with {capabilities:?}: {done:?}");
        let now = fs::read_to_string(&file)?;
        ensure!(now.contains("marline-cni") == there && (there || now == text), "{verb}: {now}");
        let owned = fs::metadata(&file)?;
        ensure!((owned.uid(), owned.gid(), owned.mode() & 0o777) == (1000, 1000, 0o640), "{verb}: {owned:?}");
    }
    Ok(())
}
