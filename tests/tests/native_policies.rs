//! Istio's policies through real connections: who is let in, who is not and why, and what becomes of connections that live when
//! the rules change. The tables of all decisions are the agent's own tests.

use std::fs;

use anyhow::{Context, Result, ensure};
use marline_tests::{
    access_log::{Entry, Verdict},
    cluster::{Cluster, ClusterSpec, Family, Pod, Side},
    config::{self, Mode, NAMESPACE},
    flow::{Before, Route, observe},
    process::Process,
    scenario::on_mesh,
    traffic::{Seen, banner::Ssh, nginx::Nginx},
    wait::{Look, seconds, wait_for},
};

const MARKER: &str = "marker-of-the-policies";

/// Puts the resources in force on both nodes; nothing takes all of them back.
fn enforce(cluster: &Cluster, resources: &[String]) -> Result<()> {
    cluster.reload(|cluster| {
        Side::BOTH.iter().try_for_each(|side| {
            let file = cluster.config_directory(*side).join("rules.yaml");
            match resources {
                [] => fs::remove_file(&file).context("removing the rules"),
                resources => config::replace(&file, &resources.concat()),
            }
        })
    })
}

fn resource(kind: &str, name: &str, spec: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\nspec: {{{spec}}}\n---\n"
    )
}

fn for_server(server: &Pod, name: &str, spec: &str) -> String {
    resource("AuthorizationPolicy", name, &format!("selector: {{matchLabels: {{app: {}}}}}, {spec}", server.name))
}

/// The one inbound entry of a page that must not come.
fn refused(cluster: &Cluster, nginx: &Nginx, route: Route<'_>) -> Result<Entry> {
    let before = Before::now(cluster, route)?;
    let outcome = nginx.page(route.client, route.server.address(route.family));
    ensure!(outcome.is_err(), "{} got the page: {outcome:?}", route.client.name);
    let (_, mut inbound) = before.entries(cluster, nginx.port())?;
    let entry = inbound.pop().context("no entry")?;
    ensure!(entry.verdict == Verdict::Refused, "{entry:#?}");
    Ok(entry)
}

/// A destination that refused is remembered by the client's agent for a second.
fn comes(what: &str, ask: impl Fn() -> Result<Seen>) -> Result<()> {
    wait_for(what, seconds(10), || {
        Ok(match ask() {
            Ok(seen) if seen.exact => Look::Done(()),
            Ok(seen) => Look::NotYet(seen.note),
            Err(error) => Look::NotYet(format!("{error:#}")),
        })
    })
}

fn says(entry: &Entry, reason: &str, policy: &str) -> Result<()> {
    let close = entry.close.as_deref().unwrap_or_default();
    ensure!(entry.reason.as_deref() == Some(reason) && close.contains(policy), "{entry:#?}");
    Ok(())
}

#[test]
fn rules_on_identity_address_and_port_let_in_and_refuse_by_name() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Permissive), |cluster| {
        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let (nginx, ssh) = (Nginx::start(&server, MARKER)?, Ssh::start(&server, MARKER)?);
        let (web, shell) = (nginx.port(), ssh.port());
        for family in Family::BOTH {
            let address = server.address(family);
            let route = |client| Route { client, server: &server, family, connections: 1 };
            let principal = format!("cluster.local/ns/{NAMESPACE}/sa/{}", client.name);
            let from = |source: &str| format!("rules: [{{from: [{{source: {{{source}}}}}]}}]");

            enforce(cluster, &[for_server(&server, "allow", &from(&format!("principals: [{principal}]")))])?;
            let flow = observe(cluster, route(&client), || nginx.page(&client, address))?;
            ensure!(flow.seen.exact, "an allowed principal: {}", flow.seen.note);
            ensure!(ssh.banner(&client, address)?.exact, "a server that speaks first");
            says(
                &refused(cluster, &nginx, route(&outside))?,
                "policy",
                "allowed by no rule of AuthorizationPolicy demo/allow",
            )?;

            let deny = format!("action: DENY, {}", from(&format!("principals: [{principal}]")));
            enforce(cluster, &[for_server(&server, "deny", &deny)])?;
            says(&refused(cluster, &nginx, route(&client))?, "policy", "AuthorizationPolicy demo/deny rules[0]")?;
            ensure!(nginx.page(&outside, address)?.exact, "the rule is not about plaintext");

            let deny = format!("action: DENY, {}", from(&format!("ipBlocks: [\"{}\"]", outside.address(family))));
            enforce(cluster, &[for_server(&server, "block", &deny)])?;
            says(&refused(cluster, &nginx, route(&outside))?, "policy", "AuthorizationPolicy demo/block rules[0]")?;
            comes("another address", || nginx.page(&client, address))?;

            let port = format!("rules: [{{to: [{{operation: {{ports: [\"{web}\"]}}}}]}}]");
            enforce(cluster, &[for_server(&server, "port", &port)])?;
            comes("the port that is allowed", || nginx.page(&client, address))?;
            ensure!(ssh.banner(&client, address).map_or(true, |seen| !seen.exact), "a port that is not: {shell}");
            enforce(cluster, &[])?;
            comes("the rules are gone", || ssh.banner(&client, address))?;
        }
        Ok(())
    })
}

#[test]
fn a_mode_for_one_port_is_followed_by_both_ends() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let (nginx, ssh) = (Nginx::start(&server, MARKER)?, Ssh::start(&server, MARKER)?);
        let selector = format!("selector: {{matchLabels: {{app: {}}}}}", server.name);
        let ports = format!("{selector}, portLevelMtls: {{{}: {{mode: DISABLE}}}}", nginx.port());
        enforce(cluster, &[resource("PeerAuthentication", "port", &ports)])?;
        for family in Family::BOTH {
            let address = server.address(family);
            let route = Route { client: &client, server: &server, family, connections: 1 };
            let flow = observe(cluster, route, || nginx.page(&client, address))?;
            ensure!(
                flow.seen.exact && flow.entries().all(|entry| entry.mode.as_deref() == Some("plaintext")),
                "{flow:#?}"
            );
            ensure!(nginx.page(&outside, address)?.exact, "plaintext from outside to the port that is open");
            let flow = observe(cluster, route, || ssh.banner(&client, address))?;
            ensure!(flow.seen.exact && flow.entries().all(|entry| entry.mode.as_deref() == Some("mtls")), "{flow:#?}");
            ensure!(ssh.banner(&outside, address).map_or(true, |seen| !seen.exact), "the other port is STRICT");
        }
        Ok(())
    })
}

/// A client that has read the banner, holds its connection, and ends when it ends.
fn hold(client: &Pod, server: &Pod, port: u16) -> Result<Process> {
    let address = server.address(Family::V4);
    let script = format!("exec 3<>/dev/tcp/{address}/{port}; read -r banner <&3; echo held; cat <&3 >/dev/null");
    let log = client.directory.join("holder.log");
    let holder = Process::start("holder", client.command("/bin/bash").args(["-c", &script]), &log)?;
    wait_for("the connection to be held", seconds(20), || {
        Ok(if holder.log().contains("held") { Look::Done(()) } else { Look::NotYet("no banner".into()) })
    })?;
    Ok(holder)
}

#[test]
fn a_live_connection_that_a_new_rule_forbids_is_reset_and_others_go_on() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Permissive), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let ssh = Ssh::start(&server, MARKER)?;
        let mut holder = hold(&client, &server, ssh.port())?;
        let deny = |port| format!("action: DENY, rules: [{{to: [{{operation: {{ports: [\"{port}\"]}}}}]}}]");
        enforce(cluster, &[for_server(&server, "other", &deny(1))])?;
        ensure!(holder.ended()?.is_none(), "a rule about another port ended it");
        let entries = cluster.agent(Side::B)?.entries()?.len();
        enforce(cluster, &[for_server(&server, "deny", &deny(ssh.port()))])?;
        holder.wait(seconds(20)).context("the connection lives on")?;
        let agent = cluster.agent(Side::B)?;
        let ended = agent.wait_entries("the reset connection", entries, 1, |entry| {
            entry.connects(&client, server.socket(Family::V4, ssh.port()))
        })?;
        ensure!(ended.iter().all(|entry| entry.reason.as_deref() == Some("revoked")), "{ended:#?}");
        Ok(())
    })
}
