//! The kubelet's probes under STRICT: a process in a cgroup of its own on the node is the kubelet, and only that one's connections, only to
//! ports that pods declare, reach applications in the clear.

#[path = "kubernetes/api.rs"]
mod api;
#[path = "kubernetes/kubelet.rs"]
mod kubelet;
#[path = "native_commands/typed.rs"]
mod typed;

use std::{fs, net::SocketAddr};

use anyhow::{Context, Result, ensure};
use api::{AUTHORIZATIONS, PODS};
use kubelet::{World, on_kubernetes};
use marline_tests::{
    access_log::{Entry, Verdict},
    cgroup,
    cluster::{Family, Pod, Side},
    process::{Place, Process, output, succeed},
    wait::{Look, seconds, wait_for},
};
use serde_json::{Value, json};
use typed::on;

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const HTTP: u16 = 8080;
const ECHO: u16 = 7000;
/// Declared, and nobody listens.
const NOBODY: u16 = 7001;
/// Somebody listens, and nothing is declared.
const UNDECLARED: u16 = 9090;

/// Where the node's kubelet runs.
fn kubelet_of(world: &World<'_>, side: Side) -> Result<Place> {
    let node = world.cluster.node(side);
    let place = Place { cgroup: node.cgroup.join(format!("kubelet-{}", side.letter())), ..node };
    cgroup::create(&place.cgroup)?;
    Ok(place)
}

fn tell_agent(world: &World<'_>, side: Side, kubelet: &Place) -> Result<()> {
    let path = world.cluster.config_directory(side).join("agent.yaml");
    let text = fs::read_to_string(&path)?;
    fs::write(&path, format!("{text}    kubeletCgroup: {}\n", kubelet.cgroup.display()))?;
    Ok(())
}

fn container() -> Value {
    json!({
        "name": "c", "image": "i", "ports": [{"name": "web", "containerPort": HTTP}],
        "readinessProbe": {"httpGet": {"path": "/", "port": "web"}},
        "livenessProbe": {"tcpSocket": {"port": ECHO}},
        "startupProbe": {"tcpSocket": {"port": NOBODY}},
    })
}

/// A pod in the mesh that declares probes, as it is from its beginning.
fn start(world: &mut World<'_>, name: &str, side: Side) -> Result<Pod> {
    world.schedule("foo", name, side, json!({"app": name}));
    world.api.change(PODS, "foo", name, |pod| pod["spec"]["containers"] = json!([container()]))?;
    let pod = world.sandbox(name, side)?;
    let added = world.call("ADD", "foo", &pod)?;
    ensure!(added.status.success(), "ADD: {}", String::from_utf8_lossy(&added.stdout));
    world.report("foo", &pod)?;
    Ok(pod)
}

fn web(pod: &Pod, port: u16) -> Result<Process> {
    let bind = ["-m", "http.server", &port.to_string(), "--bind", "::"].map(str::to_owned);
    pod.serve(&format!("web-{port}"), pod.command("/usr/bin/python3").args(bind).current_dir(&pod.directory), port)
}

/// A server whose client has to wait for the end to know that it has all, and so never ends a connection first.
const ENDS_FIRST: &str = "
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'there')
http.server.ThreadingHTTPServer(('', int(sys.argv[1])), Handler).serve_forever()
";

fn ends_first(pod: &Pod, port: u16) -> Result<Process> {
    let mut command = pod.command("/usr/bin/python3");
    pod.serve(&format!("web-{port}"), command.args(["-c", ENDS_FIRST, &port.to_string()]), port)
}

/// What curl makes of it: nothing, or its words.
fn get(from: &Place, to: SocketAddr, more: &[&str]) -> Result<Result<(), String>> {
    let mut curl = from.command("curl");
    curl.args(["-sS", "-g", "--noproxy", "*", "--max-time", "5", "-o", "/dev/null", "-w", "%{http_code}"]);
    let said = output(curl.args(more).arg(format!("http://{to}/")), seconds(20))?;
    let words = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).trim().to_owned();
    Ok(if said.status.success() && words == "200" { Ok(()) } else { Err(words) })
}

fn talks(from: &Place, to: SocketAddr) -> Result<Result<(), String>> {
    let said = output(from.command(TALKER).args(["many", &to.to_string(), "2", "1"]), seconds(20))?;
    let words = String::from_utf8_lossy(&[said.stdout, said.stderr].concat()).trim().to_owned();
    Ok(if said.status.success() { Ok(()) } else { Err(words) })
}

fn until(what: &str, look: impl Fn() -> Result<Result<(), String>>) -> Result<()> {
    wait_for(what, seconds(20), || Ok(look()?.map_or_else(Look::NotYet, Look::Done)))
}

fn refused(what: &str, went: Result<(), String>) -> Result<()> {
    // Refused by the mesh, and not because it could not be tried.
    ensure!(went.as_ref().is_err_and(|why| !why.contains("bind failed")), "{what}: {went:?}");
    Ok(())
}

fn through(what: &str, went: Result<(), String>) -> Result<()> {
    went.map_err(anyhow::Error::msg).with_context(|| what.to_owned())
}

fn is_probe(entry: &Entry) -> bool {
    entry.reason.as_deref() == Some("kubelet_probe")
}

#[test]
fn the_kubelets_connections_reach_declared_ports_and_nobody_elses_do() -> Result<()> {
    on_kubernetes(|world| {
        let (kubelet, other) = (kubelet_of(world, Side::B)?, kubelet_of(world, Side::A)?);
        tell_agent(world, Side::B, &kubelet)?;
        tell_agent(world, Side::A, &other)?;
        world.cluster.start_agents()?;
        let client = world.start("foo", "client", Side::A)?;
        let server = start(world, "server", Side::B)?;
        let plain = world.start("legacy", "plain", Side::B)?;
        let _web = web(&server, HTTP)?;
        let _undeclared = web(&server, UNDECLARED)?;
        let _echo = server.serve("echo", server.command(TALKER).args(["echo", &ECHO.to_string()]), ECHO)?;
        let node = world.cluster.node(Side::B);
        // A process of the kubelet's that is in a pod's network has not the node's.
        let inside = Place { netns: plain.place.netns.clone(), ..kubelet.clone() };
        for family in Family::BOTH {
            let (http, echo) = (server.socket(family, HTTP), server.socket(family, ECHO));
            through("an HTTP probe", get(&kubelet, http, &[])?)?;
            through("a TCP probe", talks(&kubelet, echo)?)?;
            // A probe tells whether the application listens, and not whether an agent does.
            let nobody = talks(&kubelet, server.socket(family, NOBODY))?;
            ensure!(nobody.as_ref().is_err_and(|why| why.contains("ECONNREFUSED")), "{nobody:?}");
            refused("the kubelet at an undeclared port", get(&kubelet, server.socket(family, UNDECLARED), &[])?)?;
            refused("another process of the node's", get(&node, http, &[])?)?;
            refused("another process of the node's by TCP", talks(&node, echo)?)?;
            refused("another node's kubelet", get(&other, http, &[])?)?;
            refused("a pod outside of the mesh", get(&plain.place, http, &[])?)?;
            refused("a process of the kubelet's in a pod's network", get(&inside, http, &[])?)?;
            until("mTLS from the mesh", || talks(&client.place, echo))?;
        }
        let agent = world.cluster.agent(Side::B)?;
        // Of each family a request, a TCP probe of two connections, and two where nobody listens.
        let entries = agent.wait_entries("the kubelet", 0, 10, is_probe)?;
        for entry in &entries {
            let from = entry.source.address.context("source")?.ip().to_string();
            ensure!(from == "10.77.2.1" || from == "fd77:0:0:2::1", "{entry:?}");
            ensure!(entry.source.identity.is_none() && entry.tls.is_none(), "{entry:?}");
            ensure!(entry.mode.as_deref() == Some("plaintext") && entry.path.as_deref() == Some("direct"), "{entry:?}");
            ensure!(entry.destination.workload.as_deref() == Some("server"), "{entry:?}");
            ensure!(entry.response_flags == "-", "{entry:?}");
            let nobody = entry.destination.address.is_some_and(|to| to.port() == NOBODY);
            let close = if nobody { "the application did not take it" } else { "closed" };
            ensure!(entry.close.as_deref() == Some(close), "{entry:?}");
            ensure!((entry.bytes_received == 0) == nobody && (entry.bytes_sent == 0) == nobody, "{entry:?}");
        }
        let mesh = agent.entries()?.into_iter().filter(|entry| entry.tls.is_some()).count();
        ensure!(mesh >= 4, "{mesh} connections of the mesh's had TLS");
        ensure!(agent.entries()?.iter().filter(|entry| entry.mode.as_deref() == Some("plaintext")).all(is_probe));
        let admitted = agent.exposition()?.sum("marline_capture_events_total", &[("event", "kubelet_admitted")]);
        ensure!(admitted >= 10.0, "{admitted} were admitted");
        // The application's peer is the node, and no part of the mesh's.
        let log = fs::read_to_string(server.directory.join(format!("web-{HTTP}.log")))?;
        ensure!(log.contains("::ffff:10.77.2.1 ") && log.contains("fd77:0:0:2::1 "), "{log}");
        on(world.cluster, Side::B)?
            .types(&["status"])?
            .has(0, &["1 pods declare ports for its probes", "kubelet-b"])?;

        // Policies are about those who have an identity.
        world.api.apply(
            AUTHORIZATIONS,
            json!({
                "apiVersion": "security.istio.io/v1", "kind": "AuthorizationPolicy",
                "metadata": {"name": "nothing", "namespace": "foo"}, "spec": {},
            }),
        );
        let (http, echo) = (server.socket(Family::V4, HTTP), server.socket(Family::V4, ECHO));
        until("the policy to be in force", || {
            Ok(talks(&client.place, echo)?.map_or(Ok(()), |()| Err("it goes through".to_owned())))
        })?;
        through("a probe under a policy that allows nothing", get(&kubelet, http, &[])?)?;
        Ok(())
    })
}

#[test]
fn a_port_of_the_kubelets_is_nobody_elses_when_it_is_done_and_what_is_declared_no_more_is_closed() -> Result<()> {
    on_kubernetes(|world| {
        let kubelet = kubelet_of(world, Side::B)?;
        tell_agent(world, Side::B, &kubelet)?;
        world.cluster.start_agents()?;
        let server = start(world, "server", Side::B)?;
        let _web = ends_first(&server, HTTP)?;
        let _echo = server.serve("echo", server.command(TALKER).args(["echo", &ECHO.to_string()]), ECHO)?;
        let (http, echo) = (server.socket(Family::V4, HTTP), server.socket(Family::V4, ECHO));
        let node = world.cluster.node(Side::B);
        // The server ends these connections first, so the client's port is free at once.
        for port in ["34567", "34568", "34569"] {
            through("the kubelet from a port", get(&kubelet, http, &["--local-port", port])?)?;
            refused("another from the same port", get(&node, http, &["--local-port", port])?)?;
        }
        // Nothing waits for an end that is held back at the gate.
        let agent = world.cluster.agent(Side::B)?;
        let dropped = |agent: &marline_tests::agent::Agent| {
            Ok::<_, anyhow::Error>(
                agent.exposition()?.sum("marline_capture_refusals_total", &[("reason", "egress_dropped")]),
            )
        };
        ensure!(dropped(agent)? == 0.0, "{} packets were held back", dropped(agent)?);

        // The probes go on without an agent: no container is restarted for its sake.
        world.cluster.agent_mut(Side::B)?.kill()?;
        through("a probe without an agent", get(&kubelet, http, &[])?)?;
        refused("another process without an agent", get(&node, http, &[])?)?;
        world.cluster.start_agent(Side::B)?;
        world.cluster.agent(Side::B)?.wait_pod("server", true)?;
        through("a probe with a new agent", get(&kubelet, http, &[])?)?;
        refused("another process with a new agent", get(&node, http, &[])?)?;
        let _ended = world.cluster.agent_mut(Side::B)?.stop()?;
        through("a probe after an agent has ended in order", talks(&kubelet, echo)?)?;
        world.cluster.start_agent(Side::B)?;

        // One of the probes goes, then the object.
        world.api.change(PODS, "foo", "server", |pod| {
            if let Some(probes) = pod["spec"]["containers"][0].as_object_mut() {
                probes.remove("readinessProbe");
            }
        })?;
        let closed = |to: SocketAddr| Ok(talks(&kubelet, to)?.map_or(Ok(()), |()| Err("it goes through".to_owned())));
        until("the HTTP probe to be closed", || {
            Ok(get(&kubelet, http, &[])?.map_or(Ok(()), |()| Err("it goes through".to_owned())))
        })?;
        through("the other probe", talks(&kubelet, echo)?)?;
        world.api.delete(PODS, "foo", "server");
        until("the TCP probe to be closed", || closed(echo))
    })
}

#[test]
fn without_the_kubelets_cgroup_its_probes_are_refused_and_the_agent_says_so() -> Result<()> {
    on_kubernetes(|world| {
        let kubelet = kubelet_of(world, Side::B)?;
        let none = Place { cgroup: kubelet.cgroup.join("none"), ..kubelet.clone() };
        tell_agent(world, Side::B, &none)?;
        world.cluster.start_agents()?;
        let plain_status = |state: &str| {
            let (_, worst, words) = on(world.cluster, Side::B)?.part("kubelet", &[])?;
            Ok::<_, anyhow::Error>(if worst == state { Ok(()) } else { Err(format!("{worst}: {words}")) })
        };
        // No pod of the node minds.
        until("a warning", || plain_status("warn"))?;
        ensure!(world.cluster.agent(Side::B)?.readiness()?.status == 200);
        let server = start(world, "server", Side::B)?;
        let _web = web(&server, HTTP)?;
        let http = server.socket(Family::V4, HTTP);
        refused("a probe of a kubelet that is not known", get(&kubelet, http, &[])?)?;
        let agent = world.cluster.agent(Side::B)?;
        let unready = agent.readiness()?;
        ensure!(unready.status == 503 && unready.body.contains("kubeletCgroup"), "{unready:?}");
        on(world.cluster, Side::B)?.types(&["status"])?.has(
            1,
            &["its probes of 1 pods are refused where plaintext is", "spec.kubernetes.kubeletCgroup", "kubelet-b/none"],
        )?;

        // It comes, goes, and comes again, as when the kubelet is restarted.
        for round in 0..2 {
            cgroup::create(&none.cgroup)?;
            until("the probe to come through", || get(&none, http, &[]))?;
            until("the agent to be ready", || {
                let now = agent.readiness()?;
                Ok(if now.status == 200 { Ok(()) } else { Err(now.body) })
            })?;
            refused("a process beside it", get(&kubelet, http, &[])?)?;
            if round == 0 {
                cgroup::remove(&none.cgroup)?;
                until("the agent to notice", || {
                    let now = agent.readiness()?;
                    Ok(if now.status == 503 { Ok(()) } else { Err("it is ready".to_owned()) })
                })?;
            }
        }
        // What has others below it is not the kubelet's alone.
        cgroup::create(&none.cgroup.join("below"))?;
        until("the agent to notice what is below", || {
            let now = agent.readiness()?;
            Ok(if now.body.contains("has cgroups below it") { Ok(()) } else { Err(now.body) })
        })?;
        refused("from a cgroup that others may be in", get(&none, http, &[])?)
    })
}

/// Holds a connection from a port of its own to a server that is waited for, and says nothing.
const HOLDS: &str = "
import socket, sys, time
held = socket.socket()
held.bind(('', int(sys.argv[1])))
held.connect((sys.argv[2], int(sys.argv[3])))
print('it stands', flush=True)
time.sleep(1000)
";

/// From what the node itself sends to its pods NAT takes the ports, as masquerading with random ports does; one of them it gives to another.
const TRANSLATES: &str = "table ip nat {
    chain post {
        type nat hook postrouting priority srcnat
        ip saddr 10.77.2.1 oifname \"pod*\" tcp sport 34567 snat to 10.77.2.1:44567
        ip saddr 10.77.2.1 oifname \"pod*\" tcp sport 34568 snat to 10.77.2.1:34567
        ip saddr 10.77.2.1 oifname \"pod*\" meta l4proto tcp masquerade fully-random
    }
}
";

#[test]
fn a_probe_whose_port_the_nodes_nat_changes_is_refused_and_nobody_comes_in_by_the_port_that_it_left_with() -> Result<()>
{
    on_kubernetes(|world| {
        let kubelet = kubelet_of(world, Side::B)?;
        tell_agent(world, Side::B, &kubelet)?;
        world.cluster.start_agents()?;
        let server = start(world, "server", Side::B)?;
        let _web = web(&server, HTTP)?;
        let _echo = server.serve("echo", server.command(TALKER).args(["echo", &ECHO.to_string()]), ECHO)?;
        let node = world.cluster.node(Side::B);
        let http = server.socket(Family::V4, HTTP);
        through("a probe before there is NAT", get(&kubelet, http, &[])?)?;
        let rules = world.cluster.directory().join("translates.nft");
        fs::write(&rules, TRANSLATES)?;
        succeed(node.command("nft").arg("-f").arg(&rules), seconds(10))?;

        refused("an HTTP probe from another port", get(&kubelet, http, &[])?)?;
        refused("a TCP probe from another port", talks(&kubelet, server.socket(Family::V4, ECHO))?)?;
        let agent = world.cluster.agent(Side::B)?;
        agent.wait_entries("what was refused", 0, 2, |entry| {
            let from = entry.source.address.is_some_and(|from| from.ip().to_string() == "10.77.2.1");
            from && entry.verdict == Verdict::Refused && entry.reason.as_deref() == Some("plaintext_under_strict")
        })?;
        let counted = |reason: &str| {
            Ok::<_, anyhow::Error>(agent.exposition()?.sum("marline_capture_refusals_total", &[("reason", reason)]))
        };
        until("the translated to be counted", || {
            let now = counted("kubelet_translated")?;
            Ok(if now >= 2.0 { Ok(()) } else { Err(format!("{now} are counted")) })
        })?;
        agent.wait_log("a warning", 0, |log| {
            log.contains("the node's NAT gives the kubelet's probes another source port")
        })?;

        // The kubelet's socket has this port while another comes to the pod from it.
        let ends = [http.ip().to_string(), http.port().to_string()];
        let mut python = kubelet.command("/usr/bin/python3");
        let log = world.cluster.directory().join("holds.log");
        let mut holds = Process::start("a held probe", python.args(["-c", HOLDS, "34567"]).args(&ends), &log)?;
        wait_for("it to stand", seconds(20), || {
            ensure!(holds.ended()?.is_none(), "{}", holds.log());
            Ok(if holds.log().contains("it stands") { Look::Done(()) } else { Look::NotYet(holds.log()) })
        })?;
        refused("another from the port that it left with", get(&node, http, &["--local-port", "34568"])?)?;
        ensure!(holds.ended()?.is_none(), "it was over too soon: {}", holds.log());
        let text = fs::read_to_string(server.directory.join(format!("web-{HTTP}.log")))?;
        ensure!(text.lines().filter(|line| line.contains("GET /")).count() == 1, "{text}");
        holds.kill()?;

        succeed(node.command("nft").args(["flush", "ruleset"]), seconds(10))?;
        through("a probe when NAT is gone", get(&kubelet, http, &[])?)
    })
}
