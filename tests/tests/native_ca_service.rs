//! Two nodes whose certificates come from `marline ca serve`: they do without it for a while, get nothing that is not theirs, and what is taken
//! back from one of them ends with the other.

use std::time::Instant;

use anyhow::{Context, Result, ensure};
use marline_tests::{
    agent::Certificate,
    authority::{self, Authority},
    cluster::{Cluster, ClusterSpec, Side},
    config::Mode,
    rotation::{call, knock, knocked, serve},
    scenario::on_network,
    wait::{Look, seconds, wait_for},
};

/// Renewed after some ten seconds.
const LEAF_LIFETIME: &str = "20s";

fn spec() -> ClusterSpec {
    let (certificates, leaf_lifetime) = (Some(authority::fields()), Some(LEAF_LIFETIME.to_owned()));
    ClusterSpec { certificates, leaf_lifetime, ..ClusterSpec::pairs(Mode::Strict) }
}

fn certificates(cluster: &Cluster) -> Result<Vec<Certificate>> {
    Ok(cluster.agents().map(|agent| agent.certificates()).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

#[test]
fn a_ca_that_is_killed_for_more_than_half_of_a_leafs_life_fails_no_connection() -> Result<()> {
    on_network(&spec(), |cluster| {
        let mut authority = Authority::create(cluster)?;
        cluster.start_agents()?;
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _served = serve(&server)?;
        let load = knock(&client, &server, "load")?;
        authority.kill()?;
        let (since, held) = (Instant::now(), certificates(cluster)?);
        ensure!(held.len() == 4 && held.iter().all(|one| one.source.starts_with("10.77.0.1:")), "{held:?}");
        wait_for("renewals to fail for half of a life", seconds(30), || {
            let failed = certificates(cluster)?.iter().filter(|one| one.failed_renewals > 0).count();
            let long = since.elapsed() > std::time::Duration::from_secs(11);
            Ok(if long && failed == 4 { Look::Done(()) } else { Look::NotYet(format!("{failed} have failed")) })
        })?;
        authority.start(cluster)?;
        wait_for("every certificate to be renewed", seconds(30), || {
            let now = certificates(cluster)?;
            let old = now.iter().filter(|one| held.iter().any(|before| before.serial == one.serial)).count();
            Ok(if old == 0 { Look::Done(()) } else { Look::NotYet(format!("{old} are the old ones")) })
        })?;
        let (connections, failures) = knocked(&load)?;
        ensure!(connections > 100 && failures == 0, "{failures} of {connections} connections failed:\n{}", load.log());
        let ledger = authority.ledger()?;
        for (node, account) in [("node-a", "client-a"), ("node-b", "server-b")] {
            let line = ledger.lines().find(|line| line.contains(&format!("/sa/{account}\"")));
            ensure!(line.is_some_and(|line| line.contains(node)), "no line of {account} on {node}:\n{ledger}");
        }
        Ok(())
    })
}

#[test]
fn a_node_gets_no_identity_of_another_and_what_is_taken_back_from_it_ends_with_its_peers() -> Result<()> {
    on_network(&spec(), |cluster| {
        let authority = Authority::create(cluster)?;
        // As if client-a ran on the other node.
        authority.write_nodes(cluster, |pod| if pod == "client-a" { Some(Side::B) } else { None })?;
        cluster.launch_agent(Side::A)?;
        let refused = wait_for("client-a to be refused", seconds(20), || {
            // It was launched, and may not listen yet.
            let pods = match cluster.agent(Side::A)?.pods() {
                Ok(pods) => pods,
                Err(error) => return Ok(Look::NotYet(format!("{error:#}"))),
            };
            let found = pods.iter().find(|pod| pod.name.starts_with("client-a")).context("client-a")?;
            let said = found.reason.clone().filter(|reason| reason.contains("will not sign for"));
            Ok(said.map_or_else(|| Look::NotYet(format!("{found:?}")), Look::Done))
        })?;
        ensure!(refused.contains("spiffe://cluster.local/ns/demo/sa/client-a"), "{refused}");
        let ledger = authority.ledger()?;
        ensure!(ledger.lines().any(|line| line.contains("client-a") && line.contains("refused")), "{ledger}");
        authority.write_nodes(cluster, |_| None)?;
        cluster.start_agents()?;

        // A connection between the nodes, and then node b is shut out.
        let (client, server) = (cluster.pod("client-b")?, cluster.pod("server-a")?);
        let _served = serve(&server)?;
        let live = call(&client, &server, "live")?;
        authority.revoke(Side::B)?;
        wait_for("the connection of the node that was shut out to end", seconds(30), || {
            let log = live.log();
            Ok(if log.contains("ended") { Look::Done(()) } else { Look::NotYet(log.lines().count().to_string()) })
        })?;
        wait_for("node b to be told that it gets none", seconds(30), || {
            let held = cluster.agent(Side::B)?.certificates()?;
            let told =
                held.iter().all(|one| one.last_error.as_ref().is_some_and(|said| said.contains("will not sign")));
            Ok(if told { Look::Done(()) } else { Look::NotYet(format!("{held:?}")) })
        })?;
        let load = knock(&client, &server, "load")?;
        wait_for("new connections to fail", seconds(20), || {
            let log = load.log();
            let failed = log.matches("failed").count();
            Ok(if failed > 10 { Look::Done(()) } else { Look::NotYet(format!("{failed} failed")) })
        })?;
        let (connections, failures) = knocked(&load)?;
        ensure!(connections == failures, "{} of a node that was shut out came through", connections - failures);
        Ok(())
    })
}
