//! What an agent shows while it runs: to whom, what, and what not; what its log says when it is asked for more; how connections' endings are
//! told; and that it does not call itself ready when somebody has taken its hooks away.

use std::{net::SocketAddr, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    cluster::{Cluster, ClusterSpec, Family, Pod, Side, network, remains},
    config::{self, Mode, NAMESPACE},
    http,
    process::{Process, succeed},
    scenario::on_mesh,
    wait::{Look, seconds, wait_for},
};
use serde_json::Value;

const PAGES: [&str; 12] = [
    "/",
    "/help",
    "/pods",
    "/connections",
    "/workloads",
    "/services",
    "/policies",
    "/certs",
    "/config_dump",
    "/logging",
    "/debug/runtime",
    "/certs/chain?id=spiffe://cluster.local/ns/demo/sa/client-a",
];

fn page(cluster: &Cluster, side: Side, path: &str) -> Result<Value> {
    let response = cluster.agent(side)?.admin(path)?;
    ensure!(response.status == 200, "{path}: {response:?}");
    serde_json::from_str(&response.body).with_context(|| format!("{path}: {}", response.body))
}

fn post(cluster: &Cluster, side: Side, target: &str, headers: &str) -> Result<String> {
    let request = format!("POST {target} HTTP/1.1\r\nConnection: close\r\nContent-Length: 0\r\n{headers}\r\n");
    cluster.agent(side)?.admin_raw(&request)
}

const PORT: u16 = 7200;

fn counted(pod: &Pod, words: &[&str]) -> Command {
    let mut command = pod.command("python3");
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/counted.py")).args(words);
    command
}

fn serve(pod: &Pod) -> Result<Process> {
    pod.serve("counted", &mut counted(pod, &["serve", &PORT.to_string()]), PORT)
}

/// Connects, writes a line and waits for the end, whatever that is.
fn knock(pod: &Pod, to: SocketAddr) -> Result<()> {
    let script = "import socket,sys\ntry:\n s=socket.create_connection((sys.argv[1],int(sys.argv[2])),10)\n s.sendall(b'spoken plainly')\n \
                  print(s.recv(100))\nexcept OSError as e:\n print(e)";
    let port = to.port().to_string();
    succeed(pod.command("python3").args(["-c", script, &to.ip().to_string(), &port]), seconds(30)).map(|_| ())
}

#[test]
fn pages_show_what_is_in_force_and_no_key_and_nobody_sees_them_from_elsewhere() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let rule = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: only-a\n  namespace: {NAMESPACE}\nspec:\n  \
             selector:\n    matchLabels:\n      app: server-b\n  rules:\n  - from:\n    - source:\n        principals: \
             [\"cluster.local/ns/{NAMESPACE}/sa/client-a\"]\n    to:\n    - operation:\n        ports: [\"22\"]\n        hosts: [x]\n"
        );
        cluster.reload(|cluster| {
            let both = Side::BOTH.iter();
            both.into_iter()
                .try_for_each(|side| config::replace(&cluster.config_directory(*side).join("rule.yaml"), &rule))
        })?;
        let policies = page(cluster, Side::B, "/policies")?;
        let shown = policies["policies"].as_array().context("no policies")?;
        let name = format!("AuthorizationPolicy {NAMESPACE}/only-a");
        let only = shown.iter().find(|policy| policy["name"] == *name).with_context(|| policies.to_string())?;
        ensure!(only["file"].as_str().is_some_and(|file| file.ends_with("rule.yaml")) && only["line"] == 1, "{only}");
        ensure!(only["selects"]["count"] == 1, "{only}");
        let from = &only["rules"][0]["from"][0]["source"]["principals"][0];
        ensure!(*from == format!("cluster.local/ns/{NAMESPACE}/sa/client-a"), "{only}");
        let warnings = policies["warnings"].as_array().context("no warnings")?;
        ensure!(warnings.iter().any(|warning| warning.as_str().is_some_and(|w| w.contains("hosts"))), "{policies}");
        let dump = page(cluster, Side::B, "/config_dump")?;
        ensure!(dump["agent"]["admin"]["address"] == "127.0.0.1:15000", "{dump}");
        ensure!(
            dump["hooks"].as_array().is_some_and(|hooks| hooks.iter().all(|hook| hook["attached"] == true)),
            "{dump}"
        );
        let runtime = page(cluster, Side::B, "/debug/runtime")?;
        ensure!(runtime["tokio"]["alive_tasks"].as_u64().is_some_and(|tasks| tasks > 5), "{runtime}");

        // No page has a key. The CA's, which the agent has read, would be found.
        let key = std::fs::read_to_string(cluster.ca_directory().join("ca-key.pem"))?;
        let secret = key.lines().nth(1).context("the CA's key is empty")?.to_owned();
        for side in [Side::A, Side::B] {
            for path in PAGES {
                let response = cluster.agent(side)?.admin(path)?;
                let expected = if side == Side::B && path.starts_with("/certs/chain") { 404 } else { 200 };
                ensure!(response.status == expected, "{path}: {response:?}");
                ensure!(
                    !response.body.contains("PRIVATE KEY") && !response.body.contains(&secret),
                    "{path} shows a key"
                );
            }
            let metrics = cluster.agent(side)?.metrics()?;
            ensure!(!metrics.contains("PRIVATE KEY") && !metrics.contains(&secret), "the metrics show a key");
        }

        // From the other node, and from a pod of its own, nothing answers.
        for (from, to) in [(cluster.node(Side::A).netns, Side::B), (cluster.pod("outside")?.place.netns, Side::A)] {
            let address = SocketAddr::new(network::link_address(to).into(), 15020);
            ensure!(http::get(&from, address, "/metrics")?.status == 200, "the node cannot be reached at all");
            let address = SocketAddr::new(network::link_address(to).into(), 15000);
            ensure!(http::get(&from, address, "/pods").is_err(), "{address} answers others");
        }
        let answer = cluster
            .agent(Side::A)?
            .admin_raw("GET /config_dump HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n")?;
        ensure!(answer.starts_with("HTTP/1.1 403") && !answer.contains("trustDomain"), "{answer}");
        Ok(())
    })
}

#[test]
fn what_is_logged_changes_while_the_agent_runs_and_kernel_programs_are_heard_too() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let client = cluster.pod("client-a")?;
        let link_local = "import socket\ns=socket.socket(socket.AF_INET6)\ntry:\n s.connect(('fe80::1',80,0,1))\nexcept OSError as \
                          e:\n print(e)";
        let connect = || succeed(client.command("python3").args(["-c", link_local]), seconds(20));
        let words = "refused a connection to an IPv6 link-local address";
        let counted = || -> Result<f64> {
            let all = cluster.agent(Side::A)?.exposition()?;
            Ok(all.sum("marline_capture_refusals_total", &[("reason", "outbound_refused_link_local")]))
        };
        connect()?;
        ensure!(counted()? == 1.0, "it was refused {} times", counted()?);
        let here = "Host: 127.0.0.1:15000\r\n";
        let refused = post(cluster, Side::A, "/logging?level=loud", here)?;
        ensure!(refused.starts_with("HTTP/1.1 400") && refused.contains("loud"), "{refused}");
        let foreign = post(cluster, Side::A, "/logging?level=trace", "Host: evil.example\r\n")?;
        ensure!(foreign.starts_with("HTTP/1.1 403"), "{foreign}");
        let set = post(cluster, Side::A, "/logging?level=ebpf=debug", here)?;
        ensure!(set.starts_with("HTTP/1.1 200") && set.ends_with("ebpf=debug,info\n"), "{set}");
        let agent = cluster.agent(Side::A)?;
        let before =
            agent.wait_log("that its levels were changed", 0, |log| log.contains("what is logged was changed"))?;
        ensure!(!before.contains(words), "it was said at `info`: {before}");
        connect()?;
        let said = agent.wait_log("what its kernel program did", 0, |log| log.contains(words))?;
        let line = said.lines().find(|line| line.contains(words)).unwrap_or_default();
        ensure!(line.contains("DEBUG") && line.contains("ebpf"), "{line}");
        let reset = post(cluster, Side::A, "/logging?reset", here)?;
        ensure!(reset.ends_with("\r\n\r\ninfo\n"), "{reset}");
        let shown = agent.admin("/logging")?;
        ensure!(shown.body == "info\n", "{shown:?}");
        Ok(())
    })
}

#[test]
fn each_ending_has_its_flag_and_its_words_in_log_and_metrics() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let _serving = serve(&server)?;
        let to = |port| server.socket(Family::V4, port);
        let rule = format!(
            "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata:\n  name: not-81\n  namespace: {NAMESPACE}\nspec:\n  \
             action: DENY\n  rules:\n  - from:\n    - source:\n        namespaces: [{NAMESPACE}]\n    to:\n    - operation:\n        ports: [\"81\"]\n"
        );
        cluster.reload(|cluster| {
            Side::BOTH
                .iter()
                .try_for_each(|side| config::replace(&cluster.config_directory(*side).join("rule.yaml"), &rule))
        })?;
        // A port where nothing listens; one that policy forbids; plaintext under STRICT.
        knock(&client, to(82))?;
        knock(&client, to(81))?;
        knock(&outside, to(PORT))?;
        let table = [
            // seen by, from, port, reason, flags
            (Side::B, &client, 82, "refused", "UF"),
            (Side::A, &client, 82, "peer_alert", "UC"),
            (Side::B, &client, 81, "policy", "UAEX"),
            (Side::A, &client, 81, "peer_alert", "UC"),
            (Side::B, &outside, PORT, "plaintext_under_strict", "NR"),
        ];
        for (side, from, port, reason, flags) in table {
            let agent = cluster.agent(side)?;
            let found = agent.wait_entries(&format!("port {port}"), 0, 1, |entry| entry.connects(from, to(port)))?;
            let told: Vec<_> = found.iter().map(|entry| (entry.reason.as_deref(), &*entry.response_flags)).collect();
            ensure!(told.contains(&(Some(reason), flags)), "node {}, port {port}: {told:?}", side.letter());
            let words = found.iter().filter_map(|entry| entry.close.as_deref());
            ensure!(words.clone().all(|words| words.len() > 10), "{found:?}");
            let all = agent.exposition()?;
            let closed = all.sum("istio_tcp_connections_closed_total", &[("response_flags", flags)]);
            ensure!(closed >= 1.0, "node {}: no connection closed with {flags}", side.letter());
        }
        let all = cluster.agent(Side::B)?.exposition()?;
        let policy = format!("AuthorizationPolicy {NAMESPACE}/not-81 rules[0]");
        let denied = all.sum("marline_policy_denials_total", &[("policy", &policy), ("reporter", "destination")]);
        ensure!(
            denied == 1.0,
            "{denied} denials by {policy}: {:?}",
            all.series("marline_policy_denials_total", &[]).collect::<Vec<_>>()
        );
        let by = cluster.agent(Side::B)?.entries()?.into_iter().find(|entry| entry.reason.as_deref() == Some("policy"));
        ensure!(by.as_ref().and_then(|entry| entry.policy.as_deref()) == Some(&*policy), "{by:?}");
        let opened = all.sum("istio_tcp_connections_opened_total", &[]);
        ensure!(opened == all.sum("istio_tcp_connections_closed_total", &[]), "what was refused is open: {opened}");
        Ok(())
    })
}

#[test]
fn a_share_of_the_lines_is_written_and_the_rest_is_counted() -> Result<()> {
    let extra = vec!["    sample: 0%".to_owned(), "    filter:\n      directions: [inbound]".to_owned()];
    on_mesh(&ClusterSpec { extra, ..ClusterSpec::pairs(Mode::Strict) }, |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _serving = serve(&server)?;
        let (address, port) = (server.v4.to_string(), PORT.to_string());
        succeed(&mut counted(&client, &["call", &address, &port, "2"]), seconds(30))?;
        knock(&client, server.socket(Family::V4, 82))?;
        let lines = |side: Side, outcome: &str| -> Result<f64> {
            Ok(cluster.agent(side)?.exposition()?.sum("marline_access_log_lines_total", &[("outcome", outcome)]))
        };
        wait_for("all three to be counted on both nodes", seconds(20), || {
            let a = [lines(Side::A, "written")?, lines(Side::A, "sampled_out")?, lines(Side::A, "filtered")?];
            let b = [lines(Side::B, "written")?, lines(Side::B, "sampled_out")?, lines(Side::B, "filtered")?];
            let done = a == [0.0, 0.0, 3.0] && b == [1.0, 2.0, 0.0];
            Ok(if done { Look::Done(()) } else { Look::NotYet(format!("{a:?} {b:?}")) })
        })?;
        let written = cluster.agent(Side::B)?.wait_entries("what failed", 0, 1, |_| true)?;
        ensure!(written.len() == 1 && written[0].reason.as_deref() == Some("refused"), "{written:?}");
        Ok(())
    })
}

#[test]
fn an_agent_whose_hook_was_taken_away_is_not_ready_and_names_it() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let links = |side| remains::pins(&network::node_name(cluster.name(), side)).join("links");
        let not_ready = |side: Side, hook: &str, why: &str| -> Result<()> {
            let agent = cluster.agent(side)?;
            wait_for(format!("agent {} to miss {hook}", side.letter()), seconds(20), || {
                let said = agent.readiness()?;
                let named = said.status == 503 && said.body.contains(hook) && said.body.contains(why);
                Ok(if named { Look::Done(()) } else { Look::NotYet(format!("{said:?}")) })
            })?;
            let all = agent.exposition()?;
            ensure!(all.sum("marline_ready", &[]) == 0.0, "the metrics call it ready");
            ensure!(all.sum("marline_capture_hook_attached", &[("hook", hook)]) == 0.0, "{hook} counts as attached");
            agent.wait_log("which hook it misses", 0, |log| log.contains("capture is not effective")).map(|_| ())
        };
        let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/detach.py");
        let mut detach = Command::new("python3");
        succeed(detach.arg(program).arg(links(Side::A).join("connect4")), seconds(20))?;
        not_ready(Side::A, "connect4", "has detached it")?;
        let links_b = links(Side::B);
        let inbound = std::fs::read_dir(&links_b)?.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let inbound = inbound.into_iter().find(|name| name.starts_with("inbound-")).context("no inbound hook")?;
        std::fs::remove_file(links_b.join(&inbound))?;
        not_ready(Side::B, "inbound", "is gone")?;
        // A new agent attaches all again.
        cluster.start_agent(Side::A)?;
        let all = cluster.agent(Side::A)?.exposition()?;
        ensure!(
            all.sum("marline_ready", &[]) == 1.0
                && all.sum("marline_capture_hook_attached", &[("hook", "connect4")]) == 1.0
        );
        Ok(())
    })
}
