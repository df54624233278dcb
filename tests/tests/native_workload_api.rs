//! Two nodes whose certificates and trust come from a SPIFFE Workload API: what it tells, and tells anew, is what their pods' connections
//! have, and what it takes back is not used any more.

#[path = "../../agent/tests/support/spire.rs"]
mod spire;

use anyhow::{Context, Result, ensure};
use marline::identity::{SpiffeId, wire::spiffe::X509SvidResponse};
use marline_tests::{
    agent::Certificate,
    cluster::{Cluster, ClusterSpec},
    config::Mode,
    rotation::{call, knock, knocked, more_knocks, serve},
    scenario::on_network,
    wait::{Look, seconds, wait_for},
};
use spire::{Authority, telling};
use tokio::sync::watch;

const PODS: [&str; 4] = ["client-a", "server-a", "client-b", "server-b"];

fn all(of: &Authority) -> X509SvidResponse {
    let id = |pod: &str| SpiffeId::new(&of.domain, "demo", pod).map(|id| id.to_string()).unwrap_or_default();
    telling(PODS.iter().map(|pod| of.named(&id(pod))).collect())
}

fn certificates(cluster: &Cluster) -> Result<Vec<Certificate>> {
    Ok(cluster.agents().map(|agent| agent.certificates()).collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

fn renewed(cluster: &Cluster, before: &[Certificate]) -> Result<()> {
    wait_for("other certificates", seconds(20), || {
        let now = certificates(cluster)?;
        let old = now.iter().filter(|one| before.iter().any(|before| before.serial == one.serial)).count();
        Ok(if old == 0 { Look::Done(()) } else { Look::NotYet(format!("{old} are the old ones")) })
    })
}

#[test]
fn what_the_workload_api_tells_is_what_connections_have() -> Result<()> {
    let runtime = tokio::runtime::Runtime::new()?;
    let place = tempfile::tempdir()?;
    let socket = place.path().join("agent.sock");
    let (first, next) = (Authority::of("cluster.local"), Authority::of("cluster.local"));
    let (tell, told) = watch::channel(Ok(all(&first)));
    let certificates_from = vec![format!("workloadApi: unix://{}", socket.display())];
    let spec = ClusterSpec { certificates: Some(certificates_from), ..ClusterSpec::pairs(Mode::Strict) };
    on_network(&spec, |cluster| {
        // Agents start without it, their pods closed; it comes, and they are served.
        for side in marline_tests::cluster::Side::BOTH {
            cluster.launch_agent(side)?;
        }
        let serving = runtime.spawn(async move { spire::serve(&socket, told).await });
        cluster.agents_ready()?;
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _served = serve(&server)?;
        let old = call(&client, &server, "old")?;
        let load = knock(&client, &server, "load")?;
        let held = certificates(cluster)?;
        ensure!(held.len() == PODS.len() && held.iter().all(|one| one.source.starts_with("unix:/")), "{held:?}");

        // Both roots first, then the next one signs, then the first one goes: as SPIRE rotates.
        let both = [first.bundle(), next.bundle()].concat();
        for (of, bundle) in [(&first, both.clone()), (&next, both), (&next, next.bundle())] {
            let before = certificates(cluster)?;
            let mut message = all(of);
            message.svids.iter_mut().for_each(|svid| svid.bundle.clone_from(&bundle));
            let _ = tell.send_replace(Ok(message));
            renewed(cluster, &before)?;
            more_knocks(&load, 20)?;
        }
        wait_for("the connection of the first root to be reset", seconds(20), || {
            let log = old.log();
            Ok(if log.contains("ended") { Look::Done(()) } else { Look::NotYet(log.lines().count().to_string()) })
        })?;
        let (connections, failures) = knocked(&load)?;
        ensure!(connections > 60 && failures == 0, "{failures} of {connections} failed:\n{}", load.log());

        // The server's registration entry is deleted.
        let mut message = all(&next);
        message.svids.retain(|svid| !svid.spiffe_id.ends_with("server-b"));
        let _ = tell.send_replace(Ok(message));
        let said = wait_for("the certificate to be dropped", seconds(20), || {
            let now = certificates(cluster)?;
            let one = now.iter().find(|one| one.id.ends_with("server-b")).context("server-b")?;
            Ok(match (&one.serial, &one.last_error) {
                (None, Some(said)) => Look::Done(said.clone()),
                _ => Look::NotYet(format!("{one:?}")),
            })
        })?;
        ensure!(said.contains("no registration entry"), "{said}");
        let refused = knock(&client, &server, "refused")?;
        wait_for("connections to be refused", seconds(20), || {
            let failed = refused.log().matches("failed").count();
            Ok(if failed > 5 { Look::Done(()) } else { Look::NotYet(format!("{failed} failed")) })
        })?;
        let (connections, failures) = knocked(&refused)?;
        ensure!(connections == failures, "{} came through without a certificate", connections - failures);
        serving.abort();
        Ok(())
    })
}
