//! Connections that are made before they are asked for: a program gets one and does not know it, its server hears of none that nobody came
//! for, policy has its word when a program comes and not before, and they leave nothing behind.

use std::{fs, path::PathBuf, process::Command};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    access_log::{Entry, Records},
    agent::{Agent, kernel_keeps_records},
    cluster::{Cluster, ClusterSpec, Pod, Side},
    config::{Mode, NAMESPACE, replace},
    process::{Process, succeed},
    scenario::{on_mesh, on_network},
    wait::{Look, seconds, wait_for},
};

#[path = "revocation/list.rs"]
mod list;

const PORT: u16 = 7350;

fn program(pod: &Pod, words: &[&str]) -> Command {
    let mut command = pod.command("python3");
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/spares.py")).args(words);
    command
}

fn serve(pod: &Pod) -> Result<Process> {
    pod.serve("spares", &mut program(pod, &["serve", &PORT.to_string()]), PORT)
}

/// The greetings: which of the server's connections each was, and who had called.
fn call(from: &Pod, to: &Pod, count: usize) -> Result<Vec<(usize, String)>> {
    let said =
        succeed(&mut program(from, &["call", &to.v4.to_string(), &PORT.to_string(), &count.to_string()]), seconds(60))?;
    let greeting = |line: &str| {
        let (number, who) = line.strip_prefix("greeted ")?.split_once(' ')?;
        Some((number.parse().ok()?, who.to_owned()))
    };
    let greetings: Vec<_> = said.lines().filter_map(greeting).collect();
    ensure!(greetings.len() == count, "{said}");
    Ok(greetings)
}

fn spares(agent: &Agent, event: &str) -> Result<f64> {
    Ok(agent.exposition()?.sum("marline_spare_connections_total", &[("event", event)]))
}

/// Calls until one is there that nobody has come for.
fn warm(cluster: &Cluster, from: &Pod, to: &Pod) -> Result<usize> {
    let (agent, before) = (cluster.agent(from.side)?, spares(cluster.agent(from.side)?, "made")?);
    let calls = call(from, to, 2)?.len();
    wait_for("a connection to be made before it is asked for", seconds(20), || {
        let made = spares(agent, "made")? - before;
        Ok(if made > 0.0 { Look::Done(()) } else { Look::NotYet(format!("{made} made")) })
    })?;
    Ok(calls)
}

#[test]
fn a_program_gets_one_that_was_ready_and_its_server_hears_of_no_other() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _serving = serve(&server)?;
        let first = warm(cluster, &client, &server)?;
        let agent = cluster.agent(Side::A)?;
        let greetings = call(&client, &server, 20)?;
        let used = spares(agent, "used")?;
        ensure!(used >= 1.0, "none of 20 connections found one that was ready");
        for (index, (number, who)) in greetings.iter().enumerate() {
            // What nobody had come for would have a number of its own.
            ensure!(*number == first + index + 1, "connection {index} was the server's {number}: {greetings:?}");
            ensure!(*who == client.v4.to_string(), "the server sees {who}");
        }
        for side in [Side::A, Side::B] {
            let agent = cluster.agent(side)?;
            let mtls = |entry: &Entry| entry.mode.as_deref() == Some("mtls");
            agent.wait_entries("connections by mTLS", 0, first + 20, mtls)?;
            let all = agent.entries()?.len();
            ensure!(all == first + 20, "{side:?} has logged {all} connections");
        }
        Ok(())
    })
}

/// Changes the configuration of one node's agent, which is to be started with it.
fn configure(cluster: &Cluster, side: Side, change: impl FnOnce(String) -> String) -> Result<()> {
    let file = cluster.config_directory(side).join("agent.yaml");
    replace(&file, &change(fs::read_to_string(&file)?))
}

/// Of two calls one has written before its agent knows of it.
#[test]
fn one_end_may_have_its_records_in_the_kernel_and_the_other_in_its_agent() -> Result<()> {
    for side in Side::BOTH {
        on_network(&ClusterSpec::pairs(Mode::Strict), |cluster| {
            configure(cluster, side, |text| text + "  records: userspace\n")?;
            cluster.start_agents()?;
            let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
            let _serving = serve(&server)?;
            let first = warm(cluster, &client, &server)?;
            call(&client, &server, 6)?;
            let used = spares(cluster.agent(Side::A)?, "used")?;
            ensure!(used >= 1.0, "none of 6 connections found one that was ready");
            for at in Side::BOTH {
                let kernel = at != side && kernel_keeps_records()?;
                let records = if kernel { Records::Ktls } else { Records::Userspace };
                let agent = cluster.agent(at)?;
                agent.wait_entries("all connections", 0, first + 6, |entry: &Entry| entry.records == records)?;
            }
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn what_was_ready_before_its_clients_certificate_was_revoked_reaches_no_application() -> Result<()> {
    on_network(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        // The list is to reach one agent and not the other, which would not use what it has.
        cluster.launch_agent(Side::A)?;
        let (ca, own) = (cluster.ca_directory(), cluster.directory().join("ca-b"));
        fs::create_dir(&own)?;
        for file in fs::read_dir(&ca)? {
            let file = file?;
            fs::copy(file.path(), own.join(file.file_name()))?;
        }
        let (from, to) = (format!("path: {}\n", ca.display()), format!("path: {}\n", own.display()));
        configure(cluster, Side::B, |text| text.replace(&from, &to))?;
        cluster.launch_agent(Side::B)?;
        cluster.agents_ready()?;
        let (client, other, server) = (cluster.pod("client-a")?, cluster.pod("client-b")?, cluster.pod("server-b")?);
        let _serving = serve(&server)?;
        let first = warm(cluster, &client, &server)?;
        let (agent, servers) = (cluster.agent(Side::A)?, cluster.agent(Side::B)?);
        let held = agent.certificates()?.into_iter().find(|one| one.id.ends_with("/sa/client-a"));
        let serial = held.and_then(|one| one.serial).context("client-a's certificate")?;
        let (used, before) = (spares(agent, "used")?, servers.trust_reloads()?.0);
        fs::write(own.join("ca-crl.pem"), list::list(&own, &serial)?)?;
        wait_for("agent b to take the list", seconds(20), || {
            let now = servers.trust_reloads()?.0;
            Ok(if now > before { Look::Done(()) } else { Look::NotYet(format!("{now} changes")) })
        })?;
        ensure!(call(&client, &server, 1).is_err(), "it was let in");
        let now = spares(agent, "used")?;
        ensure!(now > used, "the connection that was refused was not one that was ready: {used} and {now}");
        let refused = |entry: &Entry| entry.reason.as_deref() == Some("certificate_revoked");
        servers.wait_entries("the refusal", 0, 1, refused)?;
        let counted = servers.exposition()?.sum("marline_trust_revoked_connections_total", &[]);
        ensure!(counted >= 1.0, "it was not counted");
        let greetings = call(&other, &server, 1)?;
        ensure!(greetings.iter().all(|(number, _)| *number == first + 1), "the server heard of it: {greetings:?}");
        Ok(())
    })
}

#[test]
fn what_was_ready_before_a_rule_came_is_denied_by_it() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _serving = serve(&server)?;
        warm(cluster, &client, &server)?;
        let used = spares(cluster.agent(Side::A)?, "used")?;
        cluster.reload(|cluster| {
            let rule = format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: nobody, namespace: {NAMESPACE}}}\nspec: {{}}\n"
            );
            for side in [Side::A, Side::B] {
                std::fs::write(cluster.config_directory(side).join("nobody.yaml"), &rule)?;
            }
            Ok(())
        })?;
        ensure!(call(&client, &server, 1).is_err(), "it was let in");
        let now = spares(cluster.agent(Side::A)?, "used")?;
        ensure!(now > used, "the connection that was denied was not one that was ready: {used} and {now}");
        let denied = |entry: &Entry| entry.reason.as_deref() == Some("policy");
        cluster.agent(Side::B)?.wait_entries("the denial", 0, 1, denied)?;
        Ok(())
    })
}

#[test]
fn after_its_peers_agent_has_died_none_is_used_and_calls_go_on() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _serving = serve(&server)?;
        warm(cluster, &client, &server)?;
        cluster.agent_mut(Side::B)?.kill()?;
        cluster.start_agent(Side::B)?;
        let greetings = call(&client, &server, 3)?;
        ensure!(greetings.len() == 3, "{greetings:?}");
        Ok(())
    })
}

#[test]
fn those_that_nobody_comes_for_go_at_both_ends() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _serving = serve(&server)?;
        warm(cluster, &client, &server)?;
        wait_for("all connections between the nodes to go", seconds(40), || {
            let established = |pod: &Pod| -> Result<usize> {
                let listed = pod.succeed("ss", &["-Htn", "state", "established"], seconds(10))?;
                Ok(listed.lines().filter(|line| line.contains(&server.v4.to_string())).count())
            };
            let left = (established(&client)?, established(&server)?);
            Ok(if left == (0, 0) { Look::Done(()) } else { Look::NotYet(format!("{left:?} are there")) })
        })?;
        let agent = cluster.agent(Side::A)?;
        let (made, used, unused) = (spares(agent, "made")?, spares(agent, "used")?, spares(agent, "unused")?);
        ensure!(made == used + unused && unused >= 1.0, "{made} made, {used} used, {unused} unused");
        Ok(())
    })
}
