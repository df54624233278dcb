//! The CNI plugin's process where not all is well: agents that are down, do not answer or die over a question; pods that are not captured;
//! other CNIs before it in the chain; and a node from which Marline is taken away.

#[path = "kubernetes/api.rs"]
mod api;
#[path = "kubernetes/kubelet.rs"]
mod kubelet;

use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use kubelet::on_kubernetes;
use marline_tests::{
    agent::binary,
    cluster::{Family, Pod, Side},
    process::{output, succeed},
    wait::{Look, seconds, wait_for},
};
use serde_json::{Value, json};

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const PORT: u16 = 7000;
const CALICO: &str = include_str!("../../agent/src/cni/testdata/result-calico.json");
const CILIUM: &str = include_str!("../../agent/src/cni/testdata/result-cilium.json");
/// What the calls here wait for, and what a plugin may take beyond it: it gives the agent two more seconds for an answer.
const TIMEOUT: u64 = 1;
const GRACE: u64 = 2;

fn error_of(answer: &Output) -> Result<Value> {
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    ensure!(!answer.status.success(), "it succeeded: {text}");
    serde_json::from_str(&text).with_context(|| text)
}

fn well(answer: &Output) -> Result<String> {
    let text = String::from_utf8_lossy(&answer.stdout).into_owned();
    ensure!(answer.status.success(), "{text}");
    Ok(text)
}

/// ADD of a pod that is nowhere, for whoever listens at the socket.
fn add(socket: &Path) -> Result<(Output, Duration)> {
    let mut call = Command::new(binary()?);
    call.arg("cni").env("CNI_COMMAND", "ADD").env("CNI_CONTAINERID", "c1").env("CNI_NETNS", "/run/netns/none");
    call.env("CNI_IFNAME", "eth0").env("CNI_PATH", "/opt/cni/bin");
    call.env("CNI_ARGS", "K8S_POD_NAMESPACE=foo;K8S_POD_NAME=web;K8S_POD_UID=u-1");
    let result = json!({"cniVersion": "1.0.0", "ips": [{"address": "10.0.0.7/24"}]});
    let configuration = json!({
        "cniVersion": "1.0.0", "name": "pods", "type": "marline-cni", "prevResult": result,
        "socket": socket, "timeoutSeconds": TIMEOUT,
    });
    let began = Instant::now();
    Ok((kubelet::ask(&mut call, &configuration)?, began.elapsed()))
}

/// The kubelet tries again, in a time of its own: a call must not hang, and must say why.
fn fails_in_time(answer: &(Output, Duration), words: &str) -> Result<()> {
    let said = error_of(&answer.0)?;
    ensure!(said["code"] == 11 && said["msg"].as_str().is_some_and(|msg| msg.contains(words)), "not {words:?}: {said}");
    ensure!(said["details"].as_str().is_some_and(|details| details.contains("marline status")), "no way out: {said}");
    ensure!(answer.1 < 2 * seconds(TIMEOUT + GRACE), "it took {:?}: {said}", answer.1);
    Ok(())
}

/// The next one who asks, when the question has come.
fn asked(listener: &UnixListener) -> Result<UnixStream> {
    let stream = listener.accept()?.0;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    ensure!(line.contains("\"command\":\"add\""), "{line}");
    Ok(stream)
}

#[test]
fn add_fails_in_its_time_and_says_why_when_the_agent_is_down_or_stopped_or_silent_or_dies() -> Result<()> {
    let directory = tempfile::tempdir()?;
    let socket = directory.path().join("cni.sock");
    fails_in_time(&add(&socket)?, "does not answer")?;
    // One that is stopped takes no call; the kernel does so for it.
    let listener = UnixListener::bind(&socket)?;
    fails_in_time(&add(&socket)?, "has not answered within")?;
    drop(listener);
    fs::remove_file(&socket)?;
    // One that takes it, and says nothing.
    let listener = UnixListener::bind(&socket)?;
    let silent = thread::spawn(move || asked(&listener));
    fails_in_time(&add(&socket)?, "has not answered within")?;
    let _held = silent.join().map_err(|_| anyhow!("panicked"))??;
    fs::remove_file(&socket)?;
    // One that dies over it, and nobody follows.
    let listener = UnixListener::bind(&socket)?;
    let (dies, path) = (thread::spawn(move || asked(&listener).map(drop)), socket.clone());
    fails_in_time(&add(&path)?, "does not answer")?;
    dies.join().map_err(|_| anyhow!("panicked"))??;
    fs::remove_file(&socket)?;
    // And one that is followed: the question is asked again.
    let listener = UnixListener::bind(&socket)?;
    let followed = thread::spawn(move || -> Result<()> {
        drop(asked(&listener)?);
        asked(&listener)?.write_all(b"{\"answer\":\"captured\"}\n")?;
        Ok(())
    });
    well(&add(&socket)?.0)?;
    followed.join().map_err(|_| anyhow!("panicked"))?
}

#[test]
fn check_fails_for_another_container_a_pod_that_is_not_captured_and_without_an_agent() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agent(Side::A)?;
        let web = world.start("foo", "web", Side::A)?;
        well(&world.call("CHECK", "foo", &web)?)?;
        let error = error_of(&world.caller().call_as("c-another", "CHECK", "foo", &web)?)?;
        ensure!(error["code"] == 100 && error.to_string().contains("as the container c-web"), "{error}");
        // Nobody has called ADD for this one.
        world.schedule("foo", "forgotten", Side::A, json!({}));
        let forgotten = world.sandbox("forgotten", Side::A)?;
        wait_for("a CHECK that knows the pod", seconds(20), || {
            let error = error_of(&world.call("CHECK", "foo", &forgotten)?)?;
            let told = error["code"] == 100 && error.to_string().contains("foo/forgotten is not captured");
            Ok(if told { Look::Done(()) } else { Look::NotYet(error.to_string()) })
        })?;
        world.cluster.agent_mut(Side::A)?.kill()?;
        let error = error_of(&world.call("CHECK", "foo", &web)?)?;
        ensure!(error["code"] == 11 && error.to_string().contains("does not answer"), "{error}");
        Ok(())
    })
}

#[test]
fn what_calico_and_cilium_have_printed_is_understood_and_passed_on_to_the_letter() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agent(Side::A)?;
        for (name, version, result, v4, v6) in [
            ("calico", "0.3.1", CALICO, "192.168.219.71", "fd00:10:244:db40::7"),
            ("cilium", "1.0.0", CILIUM, "10.0.1.187", "fd00::1bb"),
        ] {
            world.schedule("foo", name, Side::A, json!({}));
            let pod = world.sandbox(name, Side::A)?;
            let own = result.trim().replace(v4, &pod.v4.to_string()).replace(v6, &pod.v6.to_string());
            let call = |command: &str| world.caller().call_after(version, &own, command, "foo", &pod);
            let said = well(&call("ADD")?)?;
            ensure!(said.trim_end() == own, "{name}: {said}");
            world.cluster.agent(Side::A)?.wait_pod(name, true)?;
            if version != "0.3.1" {
                ensure!(well(&call("CHECK")?)?.is_empty(), "{name}");
            }
            ensure!(well(&call("DEL")?)?.is_empty(), "{name}");
        }
        Ok(())
    })
}

fn talks(from: &Pod, to: &Pod) -> Result<bool> {
    let to = to.socket(Family::V4, PORT).to_string();
    Ok(output(from.command(TALKER).args(["many", &to, "2", "1"]), seconds(20))?.status.success())
}

/// What `deploy/manifests/uninstall.yaml` runs on a node, when the agent has ended.
#[test]
fn a_node_from_which_marline_is_taken_away_lets_its_pods_go_and_ends_them_without_an_agent() -> Result<()> {
    on_kubernetes(|world| {
        world.cluster.start_agents()?;
        let (web, plain) = (world.start("foo", "web", Side::A)?, world.start("legacy", "plain", Side::B)?);
        let _echo = plain.serve("echo", plain.command(TALKER).args(["echo", &PORT.to_string()]), PORT)?;
        wait_for("the pod to reach one outside of the mesh", seconds(20), || {
            Ok(if talks(&web, &plain)? { Look::Done(()) } else { Look::NotYet("not yet".into()) })
        })?;
        let _ended = world.cluster.agent_mut(Side::A)?.stop()?;
        ensure!(!talks(&web, &plain)?, "the end of an agent has opened a pod");
        let node = kubelet::node_directory(world.cluster, Side::A);
        let (chains, plugins) = (node.join("net.d"), world.cluster.directory().join("bin"));
        // Where nothing else of it is left, the plugin under another name is the program.
        let program = node.join("marline");
        fs::hard_link(plugins.join("marline-cni"), &program)?;
        let mut uninstall = Command::new(&program);
        uninstall.args(["cni", "uninstall", "--keep-plugin", "--cni-conf-dir"]).arg(&chains);
        succeed(uninstall.arg("--cni-bin-dir").arg(&plugins), seconds(20))?;
        ensure!(!fs::read_to_string(chains.join("10-pods.conflist"))?.contains("marline"), "it is in the chain");
        ensure!(!talks(&web, &plain)?, "the plugin's end has opened a pod");
        // Without a capability, as the container is.
        let config = fs::read_to_string(world.cluster.config_directory(Side::A).join("agent.yaml"))?;
        let pins = config.lines().find_map(|line| line.trim().strip_prefix("pinPath: ")).context("pinPath")?;
        let mut unload = Command::new("setpriv");
        unload.args(["--no-new-privs", "--inh-caps=-all", "--bounding-set=-all"]).arg(&program).args(["unload", pins]);
        succeed(&mut unload, seconds(20))?;
        ensure!(!Path::new(pins).exists(), "{pins} is there still");
        ensure!(talks(&web, &plain)?, "the pod is shut, and so is whoever gets its address");
        // The next time there is nothing to be done.
        succeed(&mut unload, seconds(20))?;
        // A runtime that remembers the pod's chain.
        let mut delete = kubelet::plugin(&plugins.join("marline-cni"), "DEL", "foo", &web);
        let ours =
            json!({"cniVersion": "1.0.0", "name": "pods", "type": "marline-cni", "socket": node.join("cni.sock")});
        ensure!(well(&kubelet::ask(&mut delete, &ours)?)?.is_empty(), "DEL");
        Ok(())
    })
}
