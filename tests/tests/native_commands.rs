//! The commands that people type, on a mesh that is well: what they say, in words and as JSON, and what they end with.

#[path = "native_commands/typed.rs"]
mod typed;

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    cluster::{Cluster, ClusterSpec, Family, Pod, Side},
    config::{self, Mode, NAMESPACE},
    process::{Process, output, succeed},
    rotation::{call, serve},
    scenario::on_mesh,
    traffic::nginx::Nginx,
    wait::{Look, seconds, wait_for},
};
use typed::on;

const MARKER: &str = "marker-of-the-commands";

fn enforce(cluster: &Cluster, text: &str) -> Result<()> {
    cluster.reload(|cluster| {
        Side::BOTH
            .iter()
            .try_for_each(|side| config::replace(&cluster.config_directory(*side).join("rules.yaml"), text))
    })
}

fn deny(client: &Pod, server: &Pod) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: no-clients, namespace: {NAMESPACE}}}\nspec:\n  \
         selector: {{matchLabels: {{app: {}}}}}\n  action: DENY\n  rules: [{{from: [{{source: {{principals: \
         [cluster.local/ns/{NAMESPACE}/sa/{}]}}}}]}}]\n",
        server.name, client.name
    )
}

#[test]
fn lists_and_status_tell_what_a_healthy_node_does() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let node = on(cluster, Side::A)?;
        let status = node.types(&["status"])?;
        status.has(
            0,
            &[
                "this node is well",
                "hooks",
                "all 11 kernel programs are attached",
                "2 captured and ready",
                "mode STRICT",
            ],
        )?;
        ensure!(!status.out.contains('\x1b'), "colour where nobody looks: {}", status.out);
        let (code, value) = node.json(&["status"])?;
        ensure!(code == Some(0) && value["well"] == true && value["agent"] == true, "{value}");
        ensure!(value["status"]["configuration"]["generation"].as_u64() >= Some(1), "{value}");

        node.types(&["workloads", "-n", NAMESPACE, "--local"])?.has(0, &["client-a", "server-a", "yes", "STRICT"])?;
        let (_, workloads) = node.json(&["workloads", "-n", "nobodys"])?;
        ensure!(workloads["workloads"] == serde_json::json!([]), "{workloads}");

        let _served = serve(&server)?;
        let talk = call(&client, &server, "talk")?;
        wait_for("the connection to be listed", seconds(20), || {
            let said = node.types(&["connections", "--mtls", "-w", "client-a-v4"])?;
            let there = ["out", "client-a", "server-b", "mtls", "spiffe://cluster.local/ns/demo/sa/server-b"];
            Ok(match there.iter().all(|word| said.out.contains(word)) {
                true => Look::Done(()),
                false => Look::NotYet(said.out),
            })
        })?;
        let (_, none) = node.json(&["connections", "--plaintext"])?;
        ensure!(none == serde_json::json!([]), "{none}");
        let (_, all) = node.json(&["connections"])?;
        let one =
            all.as_array().and_then(|all| all.iter().find(|one| one["direction"] == "outbound")).context("one")?;
        for field in ["id", "age_ms", "bytes_sent", "records", "path", "tls", "wire"] {
            ensure!(!one[field].is_null(), "{field} of {one}");
        }
        node.types(&["top", "--once"])?.has(0, &["demo/client-a", "100.0% of bytes under mTLS"])?;
        let (_, top) = node.json(&["top", "--once", "--by", "workload"])?;
        ensure!(top["coverage"] == 1.0 && top["rows"][0]["connections"].as_u64() >= Some(1), "{top}");
        node.types(&["top"])?.has(1, &["needs a terminal", "--once"])?;

        let mut watch = node.place.command(&node.program);
        let log = cluster.directory().join("watch.log");
        let watch = Process::start(
            "marline connections --watch",
            watch.args(["connections", "--watch", "--interval", "50ms"]),
            &log,
        )?;
        let says = |what: &str| {
            wait_for(format!("--watch to say {what}"), seconds(20), || {
                let log = watch.log();
                Ok(if log.contains(what) { Look::Done(()) } else { Look::NotYet(log) })
            })
        };
        says("+ out")?;
        drop(talk);
        says("- out")
    })
}

#[test]
fn a_check_says_what_a_connection_is_and_what_the_wire_carries() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Permissive), |cluster| {
        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let node = on(cluster, Side::A)?;
        let nginx = Nginx::start(&server, MARKER)?;
        let _plain = Nginx::start(&outside, MARKER)?;
        let get = format!("GET /{MARKER} HTTP/1.0\r\n\r\n");
        let to = |pod: &str, port: u16| format!("{pod}:{port}");

        for family in Family::BOTH {
            let there = server.socket(family, nginx.port()).to_string();
            let (code, report) = node.json(&["check", "client-a", &there, "--send", &get])?;
            ensure!(code == Some(0) && report["well"] == true && report["mode"] == "mtls", "{report}");
            ensure!(report["proved"] == server.identity().as_str() && report["captured"] == true, "{report}");
            let wire = &report["wire"];
            ensure!(wire["encrypted"] == true && wire["marker_readable"] == false && wire["lost"] == 0, "{report}");
            ensure!(wire["sent"]["not_tls"] == 0 && wire["sent"]["application_data"].as_u64() >= Some(3), "{report}");
            ensure!(report["received"].as_u64() > Some(0), "{report}");
        }
        node.types(&["check", "demo/client-a", &to("server-b", nginx.port()), "--wait", "300ms"])?
            .has(0, &["encrypted", "application data", "OK: connected, and on the wire there is TLS alone"])?;

        // Both ends on one node: the destination's own agent is asked, too.
        node.types(&["check", "client-a", "server-a:7777"])?.has(1, &["agent there", "listening on port 7777"])?;
        node.types(&["check", "client-a", "server-b:7777"])?.has(1, &["nothing listens on port 7777", "-> "])?;

        let to_outside = outside.socket(Family::V4, 80).to_string();
        node.types(&["check", "client-a", &to_outside, "--send", &get])?.has(
            1,
            &["mode         plaintext", "NOT encrypted", "CAN BE READ", "not in the mesh", "enrol the destination"],
        )?;
        node.types(&["check", "client-a", &to_outside])?.has(1, &["NOT encrypted", "--send TEXT"])?;

        enforce(cluster, &deny(&client, &server))?;
        node.types(&["check", "client-a", &to("server-b", nginx.port())])?.has(
            1,
            &[
                "refused, as policy wants",
                "AuthorizationPolicy demo/no-clients rules[0]",
                "change that AuthorizationPolicy",
            ],
        )?;
        node.types(&["connections", "--ended", "-w", "server-b"])?.has(0, &["client-a", "END"])?;
        let there = on(cluster, Side::B)?;
        there
            .types(&["connections", "--refused"])?
            .has(0, &["refused, policy", "AuthorizationPolicy demo/no-clients"])?;

        node.types(&["check", "nobody", "server-b:80"])?.has(2, &["SOURCE nobody", "demo/client-a"])?;
        node.types(&["check", "client-b-v4", "server-b:80"])?.has(2, &["no pod of this node"])?;
        node.types(&["check", "client-a", "nobody:80"])?.has(2, &["DESTINATION nobody"])?;
        node.types(&["check", "client-a", "server-b"])?.has(2, &["write WORKLOAD:PORT"])?;

        cluster.change_mode(Mode::Strict)?;
        let netns = outside.place.netns.display().to_string();
        node.types(&["check", &netns, &to("server-b", nginx.port()), "--send", &get])?
            .has(1, &["captured     no", "mTLS is required", "enrol the source"])
    })
}

#[test]
fn top_lives_in_a_terminal_and_gives_it_back() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _served = serve(&server)?;
        let _talk = call(&client, &server, "talk")?;
        let node = on(cluster, Side::A)?;
        let socket = cluster.directory().join("tmux");
        let tmux = |words: &[&str]| -> Result<String> {
            let mut command = node.place.command("tmux");
            command.env("TERM", "xterm-256color").env("LC_ALL", "C.UTF-8").arg("-S").arg(&socket).args(words);
            succeed(&mut command, seconds(20))
        };
        let screen = || tmux(&["capture-pane", "-p", "-t", "t"]);
        let shows = |what: &str| {
            wait_for(format!("the screen to show {what:?}"), seconds(20), || {
                let now = screen()?;
                Ok(if now.contains(what) { Look::Done(now) } else { Look::NotYet(now) })
            })
        };
        let keys = |keys: &str| tmux(&["send-keys", "-t", "t", keys]).map(drop);
        let enter = |line: &str| tmux(&["send-keys", "-t", "t", line, "Enter"]).map(drop);
        let program = node.program.display().to_string();
        tmux(&["-f", "/dev/null", "new-session", "-d", "-s", "t", "-x", "150", "-y", "20", "sh"])?;
        let _ends = Ends(|| {
            let _ = tmux(&["kill-server"]);
        });
        enter(&format!(
            "echo before; {program} top --interval 200ms; echo ended-$?; stty -a | grep -o ' icanon\\| echo '"
        ))?;
        let first = shows("demo/client-a")?;
        ensure!(
            first.contains("flows, sorted by rate") && first.contains("mtls") && !first.contains("before"),
            "{first}"
        );
        keys("s")?;
        shows("sorted by total")?;
        keys("v")?;
        shows("workloads, sorted by total")?;
        keys("p")?;
        shows("PAUSED")?;
        keys("/")?;
        keys("zz")?;
        shows("0 workloads, sorted by total, filter \"zz\"")?;
        keys("Escape")?;
        shows("demo/client-a")?;
        tmux(&["resize-window", "-t", "t", "-x", "100", "-y", "12"])?;
        wait_for("the last line of the smaller screen to have the keys", seconds(20), || {
            let now = screen()?;
            let there = now.lines().count() <= 12
                && now.trim_end().lines().last().is_some_and(|line| line.starts_with("q quit"));
            Ok(if there { Look::Done(()) } else { Look::NotYet(now) })
        })?;
        keys("q")?;
        let after = shows("ended-0")?;
        // The screen of before is back, and so is the line editing of the terminal.
        ensure!(after.contains("before") && !after.contains("q quit"), "{after}");
        shows("icanon")?;
        // Killed from outside it gives the terminal back as well.
        enter(&format!("clear; {program} top; echo ended-$?; stty -a | grep -o ' icanon\\| echo '"))?;
        shows("q quit")?;
        let shell = tmux(&["display-message", "-p", "-t", "t", "#{pane_pid}"])?;
        let children = format!("/proc/{pid}/task/{pid}/children", pid = shell.trim());
        let children = fs::read_to_string(&children).with_context(|| children.clone())?;
        succeed(Command::new("kill").args(["-TERM", children.trim()]), seconds(20))?;
        let after = shows("icanon")?;
        ensure!(!after.contains("q quit"), "{after}");
        // Without an agent nothing is taken.
        enter(&format!("clear; {program} top --admin 127.0.0.1:1; echo ended-$?"))?;
        shows("ended-2").map(drop)
    })
}

#[test]
fn a_bug_report_has_everything_but_secrets() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        const SECRET: &str = "planted-5ebe2294ecd0e0f0";
        let node = on(cluster, Side::A)?;
        let server = cluster.pod("server-a")?;
        let nginx = Nginx::start(&server, MARKER)?;
        nginx.page(&cluster.pod("client-a")?, server.address(Family::V4))?;
        let config = cluster.config_directory(Side::A);
        // A warning that quotes its resource is the most that a Secret leaves in an agent's answers.
        fs::write(config.join("extra.yaml"), format!("# password: {SECRET}\n"))?;
        fs::write(
            config.join("notes.pem"),
            format!("-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n"),
        )?;
        let log = cluster.directory().join("agent.log");
        fs::write(&log, format!("kept-line\nAuthorization: Bearer {SECRET}\nAPI_TOKEN={SECRET}\n"))?;
        let key = fs::read_to_string(cluster.ca_directory().join("ca-key.pem"))?;
        let key: String = key.lines().filter(|line| !line.starts_with("-----")).collect();

        let archive = cluster.directory().join("report.tar.gz");
        let (path, log) = (archive.display().to_string(), log.display().to_string());
        let said = node.types(&["bugreport", "--output", &path, "--log-file", &log])?;
        said.has(
            0,
            &["status.json", "metrics.txt", "config/agent.yaml", "logs/agent.log", "redacted", "secrets taken out"],
        )?;
        node.types(&["bugreport", "--output", &path])?.has(1, &["exists"])?;
        ensure!(output(Command::new("stat").args(["-c", "%a", &path]), seconds(5))?.stdout == b"600\n", "its mode");

        let unpacked = cluster.directory().join("unpacked");
        fs::create_dir(&unpacked)?;
        succeed(Command::new("tar").args(["xzf", &path, "-C"]).arg(&unpacked), seconds(20))?;
        let all = succeed(
            Command::new("sh")
                .args(["-c", "cd \"$0\" && for f in $(find . -type f); do echo \"== $f\"; cat $f; done"])
                .arg(&unpacked),
            seconds(20),
        )?;
        for word in [SECRET, &key, "PRIVATE KEY-----"] {
            ensure!(!all.contains(word), "{word} is in the report");
        }
        for word in [
            "== ./marline-bugreport/MANIFEST.json",
            "kept-line",
            "istio_tcp",
            "client-a",
            "kind: AgentConfig",
            "\"checks\"",
        ] {
            ensure!(all.contains(word), "{word} is not in the report:\n{all}");
        }
        Ok(())
    })
}

#[test]
fn completions_and_manual_pages_are_of_all_commands() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        for shell in ["bash", "zsh", "fish"] {
            let said = node.types(&["completions", shell])?;
            ensure!(said.code == Some(0) && ["bugreport", "connections"].iter().all(|word| said.out.contains(word)));
        }
        let bash = node.types(&["completions", "bash"])?.out;
        let file = cluster.directory().join("marline.bash");
        fs::write(&file, bash)?;
        succeed(Command::new("bash").arg("-n").arg(&file), seconds(20))?;
        let pages = cluster.directory().join("man");
        node.types(&["man", "--dir", &pages.display().to_string()])?.has(0, &[])?;
        let page = fs::read_to_string(pages.join("marline-check.1")).context("the page of `check`")?;
        ensure!(page.contains(".TH") && page.contains("marline check shop/web"), "{page}");
        ensure!(!pages.join("marline-internal-check.1").exists(), "a page of what is hidden");
        node.types(&["check", "--help"])?.has(0, &["marline check shop/web shop/db:5432", "Exit codes"])
    })
}

/// Does it at the end, whatever the end is.
struct Ends<F: FnMut()>(F);

impl<F: FnMut()> Drop for Ends<F> {
    fn drop(&mut self) {
        (self.0)();
    }
}
