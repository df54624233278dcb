//! Leaf, intermediate and root are replaced while connections are made: none fails, those of the removed root are reset, and what was signed
//! under it is not believed any more.

use std::fs;

use anyhow::{Context, Result, ensure};
use marline_tests::{
    cluster::{ClusterSpec, Side},
    config::Mode,
    process::output,
    rotation::{LEAF_LIFETIME, call, rotate, serve},
    scenario::on_mesh,
    wait::{Look, seconds, wait_for},
};

#[path = "revocation/list.rs"]
mod list;

#[test]
fn everything_is_rotated_under_load_without_a_failed_connection_and_the_old_root_is_gone_for_good() -> Result<()> {
    let spec = ClusterSpec { leaf_lifetime: Some(LEAF_LIFETIME.to_owned()), ..ClusterSpec::pairs(Mode::Strict) };
    on_mesh(&spec, |cluster| {
        let outcome = rotate(cluster, |step| println!("{step}"))?;
        println!("{} connections, {} certificates", outcome.connections, outcome.certificates);
        let faults = outcome.faults();
        ensure!(faults.is_empty(), "{faults:?}");
        let reset: f64 = Side::BOTH
            .into_iter()
            .map(|side| cluster.agent(side)?.metric("marline_trust_revoked_connections_total"))
            .sum::<Result<f64>>()?;
        ensure!(reset >= 1.0, "the reset connection was not counted");
        Ok(())
    })
}

#[test]
fn an_agents_certificates_are_listed_and_its_keys_are_not() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let ask = |words: &[&str]| -> Result<(Option<i32>, String)> {
            let mut command = cluster.node(Side::A).command(cluster.program()?);
            let answer = output(command.arg("certs").args(words), seconds(20))?;
            Ok((answer.status.code(), String::from_utf8_lossy(&answer.stdout).into_owned()))
        };
        let (code, table) = ask(&[])?;
        ensure!(code == Some(0) && table.lines().count() == 3 && table.contains("valid"), "{code:?} {table}");
        let (code, json) = ask(&["--json"])?;
        let all: Vec<marline_tests::agent::Certificate> = serde_json::from_str(&json).context(json.clone())?;
        ensure!(code == Some(0) && all.len() == 2, "{json}");
        let id = all.first().context("a certificate")?.id.as_str();
        let (code, pem) = ask(&["show", id, "--pem"])?;
        ensure!(code == Some(0) && pem.starts_with("-----BEGIN CERTIFICATE-----"), "{code:?} {pem}");
        for shown in [&table, &json, &pem] {
            ensure!(!shown.contains("PRIVATE"), "{shown}");
        }
        ensure!(pem.matches("-----BEGIN").count() == pem.matches("-----BEGIN CERTIFICATE-----").count(), "{pem}");
        ensure!(!json.contains("\"key"), "{json}");
        let (code, _) = ask(&["show", "spiffe://cluster.local/ns/demo/sa/nobody", "--pem"])?;
        ensure!(code == Some(2), "for a certificate that is not held: {code:?}");
        let (code, _) = ask(&["--admin", "127.0.0.1:1"])?;
        ensure!(code == Some(2), "without an agent: {code:?}");
        Ok(())
    })
}

#[test]
fn a_live_connection_is_reset_when_its_peers_certificate_is_revoked_and_others_go_on() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, other, server) = (cluster.pod("client-a")?, cluster.pod("client-b")?, cluster.pod("server-b")?);
        let _served = serve(&server)?;
        let (revoked, spared) = (call(&client, &server, "revoked")?, call(&other, &server, "spared")?);
        let held = cluster.agent(Side::A)?.certificates()?;
        let of_client =
            held.into_iter().find(|one| one.id.ends_with("/sa/client-a")).context("client-a's certificate")?;
        let before = cluster.agent(Side::B)?.trust_reloads()?.0;
        let serial = of_client.serial.context("its serial")?;
        fs::write(cluster.ca_directory().join("ca-crl.pem"), list::list(&cluster.ca_directory(), &serial)?)?;
        wait_for("agent b to take the list", seconds(20), || {
            let now = cluster.agent(Side::B)?.trust_reloads()?.0;
            Ok(if now > before { Look::Done(()) } else { Look::NotYet(format!("{now} changes")) })
        })?;
        wait_for("the revoked connection to end", seconds(20), || {
            let log = revoked.log();
            Ok(if log.contains("ended") { Look::Done(()) } else { Look::NotYet(log.lines().count().to_string()) })
        })?;
        let so_far = spared.log().lines().count();
        wait_for("the other one to go on", seconds(20), || {
            let log = spared.log();
            ensure!(!log.contains("ended"), "it was ended, too: {log}");
            Ok(if log.lines().count() > so_far + 5 { Look::Done(()) } else { Look::NotYet("silence".to_owned()) })
        })?;
        // It was the certificate that was revoked, not the workload: that has another one, and is let in again.
        wait_for("another certificate", seconds(20), || {
            let held = cluster.agent(Side::A)?.certificates()?;
            let now = held.into_iter().find(|one| one.id == of_client.id).and_then(|one| one.serial);
            Ok(if now.as_ref().is_some_and(|now| *now != serial) {
                Look::Done(())
            } else {
                Look::NotYet(format!("{now:?}"))
            })
        })?;
        let _again = call(&client, &server, "again")?;
        let counted = cluster.agent(Side::B)?.metrics()?;
        ensure!(counted.contains("reason=\"certificate_revoked\""), "the reset connection was not counted");
        Ok(())
    })
}
