//! A pod with Istio's sidecar, as a client and as a server of Marline's pods, over both families: who may talk to whom is what either side's
//! certificate says, and bytes and ends arrive as they were sent.

#[path = "native_wrong_peers/certificates.rs"]
mod certificates;

use std::{env, net::SocketAddr, path::PathBuf};

use anyhow::{Context, Result, ensure};
use certificates::{Authority, When};
use marline_tests::{
    access_log::{Direction, Entry, Verdict},
    cluster::{ClusterSpec, Family, Membership, PodSpec, Side},
    config::Mode,
    flow::{Before, Flow, Route, observe},
    scenario::on_mesh,
    traffic::{
        envoy::{Envoy, Identity, Sidecar},
        nginx::Nginx,
    },
};

const MARKER: &str = "marker-behind-a-sidecar";
const FILE: &str = "file";
const OWN: &str = "spiffe://cluster.local/ns/demo/sa/sidecar";

fn spec() -> ClusterSpec {
    let mut spec = ClusterSpec::pairs(Mode::Strict);
    spec.pods.push(PodSpec::new("sidecar", Side::B, Membership::Impostor));
    spec
}

fn program() -> Option<PathBuf> {
    let program = env::var_os("MARLINE_ENVOY").map(PathBuf::from).filter(|program| program.is_file());
    if program.is_none() {
        println!("SKIPPED: MARLINE_ENVOY names no program: there is no Envoy to talk to");
    }
    program
}

/// What Marline's agent, which is at one end alone, says of a flow that came through as it was sent; the sidecar's pod was the other end.
fn went_well<'a>(what: &str, flow: &'a Flow) -> Result<&'a Entry> {
    ensure!(flow.seen.exact, "{what}: {}", flow.seen.note);
    let entries: Vec<&Entry> = flow.entries().collect();
    let [entry] = entries.as_slice() else { anyhow::bail!("{what}: {flow:#?}") };
    let peer = if entry.direction == Direction::Outbound { &entry.destination } else { &entry.source };
    let allowed = entry.verdict == Verdict::Allowed && entry.reason.is_none() && entry.mode.as_deref() == Some("mtls");
    ensure!(allowed && peer.identity.as_deref() == Some(OWN), "{what}: {entry:#?}");
    Ok(entry)
}

#[test]
fn istios_sidecar_and_marline_call_each_other() -> Result<()> {
    let Some(program) = program() else { return Ok(()) };
    on_mesh(&spec(), |cluster| {
        let (marline, sidecar) = (cluster.pod("server-a")?, cluster.pod("sidecar")?);
        let client = cluster.pod("client-a")?;
        let mesh = Authority::of_mesh(&cluster.directory().join("ca"))?;
        let unknown = Authority::unknown()?;
        let roots = cluster.directory().join("ca/root-cert.pem");
        let here = Nginx::start(&marline, MARKER)?;
        // What is behind the sidecar listens in its pod's own namespace, where Envoy takes it to.
        let there = Nginx::start(&sidecar, MARKER)?;
        for nginx in [&here, &there] {
            nginx.add_file(FILE, 8 << 20)?;
        }
        // One certificate that is right, and what is wrong with others. The server's agent has the word on them as a client's, and the
        // client's agent as a server's.
        let cases = [
            ("right", &mesh, When::Now, None),
            ("expired", &mesh, When::Past, Some("expired")),
            ("not-yet-valid", &mesh, When::Future, Some("not_yet_valid")),
            ("unknown-ca", &unknown, When::Now, Some("unknown_ca")),
        ];
        for (name, signer, when, reason) in cases {
            let files = signer.issue(&sidecar.directory, name, OWN, when)?;
            let envoy = Envoy::start(
                &program,
                &sidecar,
                &Sidecar {
                    identity: Identity { chain: &files.chain, key: &files.key, roots: &roots },
                    application: SocketAddr::from(([127, 0, 0, 1], there.port())),
                    callers: "spiffe://cluster.local/ns/demo/sa/client-a",
                    upstreams: Family::BOTH.map(|family| marline.socket(family, here.port())),
                    host: "server-a.demo.svc.cluster.local",
                    answers: "spiffe://cluster.local/ns/demo/sa/server-a",
                },
            )?;
            for (family, outbound) in Family::BOTH.into_iter().zip(Envoy::OUTBOUND) {
                let what = format!("{name}, {family:?}");
                let to_sidecar = Route { client: &client, server: &sidecar, family, connections: 1 };
                let address = sidecar.address(family);
                let through = there.behind(Envoy::INBOUND);
                let to_marline = Route { client: &sidecar, server: &marline, family, connections: 1 };
                let (loopback, back) = (std::net::Ipv4Addr::LOCALHOST.into(), here.behind(outbound));
                let Some(reason) = reason else {
                    for run in [&|| through.keep_alive(&client, address), &|| through.fetch(&client, address, FILE)]
                        as [&dyn Fn() -> Result<_>; 2]
                    {
                        let flow = observe(cluster, to_sidecar, run)?;
                        went_well(&what, &flow)?;
                    }
                    for run in [&|| back.keep_alive(&sidecar, loopback), &|| back.fetch(&sidecar, loopback, FILE)]
                        as [&dyn Fn() -> Result<_>; 2]
                    {
                        // What the sidecar's client saw; its connection to Marline's pod is Envoy's own.
                        let at_server = || run().map(|seen| marline_tests::traffic::Seen { port: here.port(), ..seen });
                        let flow = observe(cluster, to_marline, at_server)?;
                        let entry = went_well(&what, &flow)?;
                        let alpn = entry.tls.as_ref().and_then(|tls| tls.alpn.as_deref()).context("no ALPN")?;
                        ensure!(alpn == "istio", "{what}: {entry:#?}");
                    }
                    continue;
                };
                let before = Before::now(cluster, to_sidecar)?;
                ensure!(through.page(&client, address).is_err(), "{what}: it answered");
                let (entries, _) = before.entries(cluster, Envoy::INBOUND)?;
                ensure!(entries.iter().all(|entry| entry.reason.as_deref() == Some(reason)), "{what}: {entries:#?}");
                let before = Before::now(cluster, to_marline)?;
                ensure!(back.page(&sidecar, loopback).is_err(), "{what}: it was answered");
                let (_, entries) = before.entries(cluster, here.port())?;
                ensure!(entries.iter().all(|entry| entry.reason.as_deref() == Some(reason)), "{what}: {entries:#?}");
            }
            drop(envoy);
        }
        Ok(())
    })
}
