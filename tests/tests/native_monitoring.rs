//! A real Prometheus scrapes real agents: it takes what they expose, its rules are sound and fire, and every query of the dashboard has an
//! answer. The files are those of deploy/monitoring.

use std::{
    collections::BTreeSet,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    cluster::{ClusterSpec, Side, network},
    config::Mode,
    http,
    process::{Process, succeed},
    scenario::on_mesh,
    wait::{Look, seconds, wait_for},
};
use serde_json::Value;

const PORT: u16 = 7300;
const PROMETHEUS: u16 = 9090;

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/monitoring").join(name)
}

/// The groups of a PrometheusRule, as Prometheus itself reads them.
fn groups() -> Result<String> {
    let text = fs::read_to_string(file("prometheusrule.yaml"))?;
    let (_, spec) = text.split_once("\nspec:\n").context("the PrometheusRule has no spec")?;
    Ok(spec.lines().map(|line| format!("{}\n", line.strip_prefix("  ").unwrap_or(line))).collect())
}

#[test]
fn every_alert_is_sound_and_fires_for_what_it_is_about() -> Result<()> {
    let directory = tempfile::tempdir()?;
    fs::write(directory.path().join("rules.yaml"), groups()?)?;
    fs::copy(file("tests.yaml"), directory.path().join("tests.yaml"))?;
    let promtool =
        |words: [&str; 3]| succeed(Command::new("promtool").current_dir(&directory).args(words), seconds(60));
    let checked = promtool(["check", "rules", "rules.yaml"])?;
    let alerts = groups()?.matches("- alert: ").count();
    ensure!(checked.contains(&format!("SUCCESS: {alerts} rules found")), "{checked}");
    let tested = promtool(["test", "rules", "tests.yaml"])?;
    ensure!(tested.contains("SUCCESS"), "{tested}");
    Ok(())
}

#[test]
fn prometheus_takes_what_agents_expose_and_each_query_of_the_dashboard_has_an_answer() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Permissive), |cluster| {
        let directory = cluster.directory().join("prometheus");
        fs::create_dir_all(&directory)?;
        fs::write(directory.join("rules.yaml"), groups()?)?;
        let targets = Side::BOTH.map(|side| format!("'{}:15020'", network::link_address(side))).join(", ");
        fs::write(
            directory.join("prometheus.yml"),
            format!(
                "global: {{scrape_interval: 1s, evaluation_interval: 1s}}\nrule_files: [rules.yaml]\nscrape_configs:\n- job_name: \
                 marline\n  honor_labels: true\n  static_configs:\n  - targets: [{targets}]\n"
            ),
        )?;
        let node = cluster.node(Side::A);
        let mut command = node.command("prometheus");
        command.arg(format!("--config.file={}", directory.join("prometheus.yml").display()));
        command.arg(format!("--storage.tsdb.path={}", directory.join("data").display()));
        command.arg(format!("--web.listen-address=127.0.0.1:{PROMETHEUS}"));
        let mut prometheus = Process::start("prometheus", &mut command, &directory.join("prometheus.log"))?;
        prometheus.listens(&node.netns, PROMETHEUS)?;
        let ask = |path: &str| -> Result<Value> {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, PROMETHEUS));
            let response = http::get(&node.netns, address, path)?;
            let value: Value = serde_json::from_str(&response.body).with_context(|| format!("{path}: {response:?}"))?;
            ensure!(value["status"] == "success", "{path}: {value}");
            Ok(value)
        };

        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let program = |pod: &marline_tests::cluster::Pod, words: &[&str]| {
            let mut command = pod.command("python3");
            command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/counted.py")).args(words);
            command
        };
        let port = PORT.to_string();
        let _serving = server.serve("counted", &mut program(&server, &["serve", &port]), PORT)?;
        let address = server.v4.to_string();
        let held = Process::start(
            "a holder",
            &mut program(&client, &["hold", &address, &port, "3"]),
            &client.directory.join("hold.log"),
        )?;
        let traffic = || -> Result<()> {
            for pod in [&client, &outside] {
                succeed(&mut program(pod, &["call", &address, &port, "8"]), seconds(60))?;
            }
            Ok(())
        };

        // The scrape itself: Prometheus refuses what is no OpenMetrics.
        wait_for("Prometheus to take both agents' metrics", seconds(30), || {
            let targets = ask("/api/v1/targets")?;
            let active = targets["data"]["activeTargets"].as_array().cloned().unwrap_or_default();
            let up = active.len() == 2 && active.iter().all(|target| target["health"] == "up");
            Ok(if up { Look::Done(()) } else { Look::NotYet(targets.to_string()) })
        })?;
        traffic()?;

        let dashboard: Value = serde_json::from_str(&fs::read_to_string(file("dashboard.json"))?)?;
        let panels = dashboard["panels"].as_array().context("a dashboard without panels")?;
        let mut queries = 0;
        for panel in panels {
            for target in panel["targets"].as_array().context("a panel without queries")? {
                let written = target["expr"].as_str().context("a query without words")?;
                let query = written.replace("$__rate_interval", "30s").replace("$namespace", ".*");
                ensure!(!query.contains('$'), "a variable that is not known here: {query}");
                wait_for(format!("an answer to {query}"), seconds(30), || {
                    traffic()?;
                    let answer = ask(&format!("/api/v1/query?query={}", escaped(&query)))?;
                    let found = answer["data"]["result"].as_array().is_some_and(|result| {
                        result.iter().any(|sample| sample["value"][1].as_str().is_some_and(|value| value != "NaN"))
                    });
                    Ok(if found { Look::Done(()) } else { Look::NotYet(answer.to_string()) })
                })?;
                queries += 1;
            }
        }
        ensure!(queries >= panels.len() && queries > 10, "{queries} queries");
        // What was not seen to happen has no series, and a wrong name would look the same: every name must be one that agents have.
        let exposed = cluster.agent(Side::A)?.metrics()?;
        let written = [fs::read_to_string(file("dashboard.json"))?, groups()?].concat();
        for name in metric_names(&written) {
            let suffixes = ["_total", "_bucket", "_sum", "_count"];
            let family = suffixes.iter().find_map(|suffix| name.strip_suffix(suffix)).unwrap_or(name);
            let known = [family, name].iter().any(|name| exposed.contains(&format!("# TYPE {name} ")));
            ensure!(known, "{name} is asked for, and no agent has it");
        }
        let rules = ask("/api/v1/rules")?;
        let all = rules["data"]["groups"][0]["rules"].as_array().context("no rules")?;
        ensure!(!all.is_empty() && all.iter().all(|rule| rule["health"] == "ok"), "{rules}");

        // The share of mTLS as the dashboard has it is that of the traffic: the client's are, the one's outside are not.
        let coverage = "sum(marline_workload_connections_total{mode=\"mtls\",reporter=\"destination\"}) / \
                        sum(marline_workload_connections_total{reporter=\"destination\"})";
        let answer = ask(&format!("/api/v1/query?query={}", escaped(coverage)))?;
        let share: f64 = answer["data"]["result"][0]["value"][1].as_str().context("no share")?.parse()?;
        ensure!(share > 0.4 && share < 0.8, "{share}");
        drop(held);
        Ok(())
    })
}

fn metric_names(text: &str) -> BTreeSet<&str> {
    let words = text.split(|letter: char| !letter.is_ascii_alphanumeric() && letter != '_');
    words.filter(|word| ["marline_", "istio_", "process_"].iter().any(|start| word.starts_with(start))).collect()
}

/// For a URL's query.
fn escaped(text: &str) -> String {
    text.bytes()
        .map(|byte| if byte.is_ascii_alphanumeric() { char::from(byte).to_string() } else { format!("%{byte:02X}") })
        .collect()
}
