//! What a kubelet, a scheduler and a container runtime do about a pod, by the CNI protocol: the plugin is installed and called as on a node.
#![allow(dead_code, reason = "each suite uses some of it")]

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    cluster::{Cluster, ClusterSpec, Membership, Pod, PodSpec, Side, network::link_address},
    config::Mode,
    netns,
    process::{spawn, succeed},
    scenario::on_network,
    wait::seconds,
};
use serde_json::{Value, json};

use super::api::{Api, NAMESPACES, PEERS, PODS, kubeconfig_of};

/// As a CNI before Marline's has left it.
const CONFLIST: &str = r#"{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {"type": "ptp", "ipam": {"type": "host-local", "subnet": "10.77.1.0/24"}}
  ]
}
"#;

pub struct World<'a> {
    pub cluster: &'a mut Cluster,
    pub api: Api,
    plugins: PathBuf,
}

/// Two nodes, an API server with the namespaces `foo` (in the mesh) and `legacy`, STRICT everywhere, the plugin installed. No agent runs.
pub fn on_kubernetes(scenario: impl FnOnce(&mut World<'_>) -> Result<()>) -> Result<()> {
    let spec = ClusterSpec { pods: Vec::new(), ..ClusterSpec::pairs(Mode::Strict) };
    on_network(&spec, |cluster| {
        let api = Api::start(cluster)?;
        api.apply(NAMESPACES, json!({"metadata": {"name": "foo", "labels": {"marline.io/mesh": "enabled"}}}));
        api.apply(NAMESPACES, json!({"metadata": {"name": "legacy"}}));
        api.apply(NAMESPACES, json!({"metadata": {"name": "istio-system"}}));
        api.apply(
            PEERS,
            json!({
                "apiVersion": "security.istio.io/v1", "kind": "PeerAuthentication",
                "metadata": {"name": "default", "namespace": "istio-system"}, "spec": {"mtls": {"mode": "STRICT"}},
            }),
        );
        let plugins = cluster.directory().join("bin");
        for side in Side::BOTH {
            let config = cluster.config_directory(side);
            fs::remove_file(config.join("mode.yaml"))?;
            fs::remove_file(config.join("workloads.yaml"))?;
            let node = node_directory(cluster, side);
            let chain = node.join("net.d");
            fs::create_dir_all(&chain)?;
            fs::write(chain.join("10-pods.conflist"), CONFLIST)?;
            let mut agent = fs::read_to_string(config.join("agent.yaml"))?;
            agent.push_str(&format!(
                "  kubernetes:\n    nodeName: node-{}\n    kubeconfig: {}\n    cni:\n      socket: {}\n      records: {}\n      confDir: {}\n",
                side.letter(),
                kubeconfig_of(cluster.directory()).display(),
                node.join("cni.sock").display(),
                node.join("pods").display(),
                chain.display(),
            ));
            fs::write(config.join("agent.yaml"), agent)?;
            let mut install = Command::new(cluster.program()?);
            install.args(["cni", "install", "--timeout", "60", "--cni-conf-dir"]).arg(&chain);
            install.arg("--cni-bin-dir").arg(&plugins).arg("--socket").arg(node.join("cni.sock"));
            succeed(&mut install, seconds(20))?;
        }
        scenario(&mut World { cluster, api, plugins })
    })
}

pub fn node_directory(cluster: &Cluster, side: Side) -> PathBuf {
    cluster.directory().join(side.letter())
}

pub fn uid(pod: &str) -> String {
    format!("uid-of-{pod}")
}

impl World<'_> {
    /// The pod's object, as the scheduler leaves it: no address, and nothing runs.
    pub fn schedule(&self, namespace: &str, name: &str, side: Side, labels: Value) {
        self.api.apply(PODS, json!({
            "metadata": {"name": name, "namespace": namespace, "uid": uid(name), "labels": labels, "creationTimestamp": "2026-01-01T00:00:00Z"},
            "spec": {"nodeName": format!("node-{}", side.letter()), "serviceAccountName": name},
            "status": {"phase": "Pending"},
        }));
    }

    /// The sandbox with its network, as the plugins before ours leave it. Its processes are where the kubelet would have them.
    pub fn sandbox(&mut self, name: &str, side: Side) -> Result<Pod> {
        let mut pod = self.cluster.create_pod(&PodSpec::new(name, side, Membership::Unknown))?;
        let slice = format!("kubepods-besteffort-pod{}.slice", uid(name).replace('-', "_"));
        let pods = pod.place.cgroup.parent().context("the pods' cgroup")?.to_owned();
        pod.place.cgroup =
            pods.join("kubepods.slice/kubepods-besteffort.slice").join(slice).join("cri-containerd-c.scope");
        marline_tests::cgroup::create(&pod.place.cgroup)?;
        Ok(pod)
    }

    /// All of it: scheduled, set up, captured, and its address reported. ADD has to succeed.
    pub fn start(&mut self, namespace: &str, name: &str, side: Side) -> Result<Pod> {
        self.schedule(namespace, name, side, json!({"app": name}));
        let pod = self.sandbox(name, side)?;
        let added = self.call("ADD", namespace, &pod)?;
        ensure!(added.status.success(), "ADD of {name}: {}", String::from_utf8_lossy(&added.stdout));
        self.report(namespace, &pod)?;
        Ok(pod)
    }

    /// What the kubelet tells the API server after ADD.
    pub fn report(&self, namespace: &str, pod: &Pod) -> Result<()> {
        self.api.change(PODS, namespace, &pod.name, |object| {
            object["status"] = json!({
                "phase": "Running", "podIP": pod.v4.to_string(), "hostIP": link_address(pod.side).to_string(),
                "podIPs": [{"ip": pod.v4.to_string()}, {"ip": pod.v6.to_string()}],
            });
        })
    }

    /// One call of the plugin, as a runtime makes it from what is installed.
    pub fn call(&self, command: &str, namespace: &str, pod: &Pod) -> Result<Output> {
        self.caller().call(command, namespace, pod)
    }

    pub fn caller(&self) -> Caller {
        Caller { plugins: self.plugins.clone(), directory: self.cluster.directory().to_owned() }
    }

    /// The end of a pod: DEL, the namespace goes, the object goes.
    pub fn end(&mut self, namespace: &str, pod: &Pod) -> Result<()> {
        let deleted = self.call("DEL", namespace, pod)?;
        ensure!(deleted.status.success(), "DEL: {}", String::from_utf8_lossy(&deleted.stdout));
        marline_tests::cgroup::remove(&pod.place.cgroup)?;
        self.cluster.remove_pod(&pod.name)?;
        self.api.delete(PODS, namespace, &pod.name);
        Ok(())
    }
}

/// For threads that call at the same time.
#[derive(Clone)]
pub struct Caller {
    plugins: PathBuf,
    directory: PathBuf,
}

impl Caller {
    pub fn call(&self, command: &str, namespace: &str, pod: &Pod) -> Result<Output> {
        let (program, mut ours) = self.installed(pod.side)?;
        ours["prevResult"] = result(pod);
        ask(&mut plugin(&program, command, namespace, pod), &ours)
    }

    /// A call after a CNI of another version and with this result of its, to the letter.
    pub fn call_after(&self, version: &str, result: &str, command: &str, namespace: &str, pod: &Pod) -> Result<Output> {
        const PLACE: &str = "\"the result\"";
        let (program, mut ours) = self.installed(pod.side)?;
        (ours["cniVersion"], ours["prevResult"]) = (json!(version), json!("the result"));
        ask_text(&mut plugin(&program, command, namespace, pod), &ours.to_string().replace(PLACE, result))
    }

    /// A call for the pod by the name of another container.
    pub fn call_as(&self, container: &str, command: &str, namespace: &str, pod: &Pod) -> Result<Output> {
        let (program, mut ours) = self.installed(pod.side)?;
        ours["prevResult"] = result(pod);
        ask(plugin(&program, command, namespace, pod).env("CNI_CONTAINERID", container), &ours)
    }

    /// A call that is of the network and of no pod, in a version of CNI: with what such a call has beside the configuration.
    pub fn network(&self, side: Side, command: &str, version: &str, more: &Value) -> Result<Output> {
        let (program, mut ours) = self.installed(side)?;
        ours["cniVersion"] = json!(version);
        ours.as_object_mut().context("a plugin")?.extend(more.as_object().context("more")?.clone());
        let mut call = Command::new(&program);
        call.env("CNI_COMMAND", command).env("CNI_PATH", &self.plugins);
        ask(&mut call, &ours)
    }

    /// The plugin at the end of the chain, and its configuration.
    fn installed(&self, side: Side) -> Result<(PathBuf, Value)> {
        let chain = self.directory.join(side.letter()).join("net.d/10-pods.conflist");
        let list: Value = serde_json::from_str(&fs::read_to_string(chain)?)?;
        let mut ours = list["plugins"].as_array().and_then(|all| all.last()).context("plugins")?.clone();
        let program = self.plugins.join(ours["type"].as_str().context("type")?);
        (ours["name"], ours["cniVersion"]) = (list["name"].clone(), list["cniVersion"].clone());
        Ok((program, ours))
    }
}

pub fn ask(call: &mut Command, configuration: &Value) -> Result<Output> {
    ask_text(call, &configuration.to_string())
}

fn ask_text(call: &mut Command, configuration: &str) -> Result<Output> {
    let mut child = spawn(call.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()))?;
    child.stdin.take().context("standard input")?.write_all(configuration.as_bytes())?;
    Ok(child.wait_with_output()?)
}

/// What the plugin before ours would print.
pub fn result(pod: &Pod) -> Value {
    json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "veth0"}, {"name": "eth0", "mac": "0a:58:0a:4d:01:0a", "sandbox": pod.place.netns.display().to_string()}],
        "ips": [{"interface": 1, "address": format!("{}/24", pod.v4)}, {"interface": 1, "address": format!("{}/64", pod.v6)}],
        "routes": [{"dst": "0.0.0.0/0"}], "dns": {},
    })
}

pub fn plugin(program: &Path, command: &str, namespace: &str, pod: &Pod) -> Command {
    let mut call = Command::new(program);
    call.env("CNI_COMMAND", command).env("CNI_CONTAINERID", format!("c-{}", pod.name)).env("CNI_IFNAME", "eth0");
    call.env("CNI_NETNS", netns::path(&pod.place.netns.file_name().unwrap_or_default().to_string_lossy()));
    call.env("CNI_PATH", program.parent().unwrap_or(Path::new("/"))).env("CNI_ARGS", format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={};K8S_POD_INFRA_CONTAINER_ID=c-{};K8S_POD_UID={}",
        pod.name, pod.name, uid(&pod.name)
    ));
    call
}
