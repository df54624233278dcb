//! The proxies that Marline is measured beside: that they carry what they are said to, and that a bed in which they do not is noticed.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    bench::{Order, Work},
    capture::LinkCapture,
    cluster::{Cluster, ClusterSpec, Family, Membership, PodSpec, Side},
    config::Mode,
    external,
    process::{Process, output},
    scenario::on_network,
    sidecar::{Layer, Pair, Roles},
    wait::seconds,
};

const PORT: u16 = 7000;

fn spec() -> ClusterSpec {
    let pods = vec![
        PodSpec::new("client", Side::A, Membership::Unknown),
        PodSpec::new("server", Side::B, Membership::Unknown),
    ];
    ClusterSpec { pods, ..ClusterSpec::pairs(Mode::Strict) }
}

fn envoy() -> Option<PathBuf> {
    let program = env::var_os("MARLINE_ENVOY").map(PathBuf::from).filter(|program| program.is_file());
    if program.is_none() {
        println!("SKIPPED: MARLINE_ENVOY names no program: there is no Envoy to measure beside");
    }
    program
}

fn roles(cluster: &Cluster) -> Result<Roles> {
    Ok(Roles::new(cluster.pod("client")?, cluster.pod("server")?, PORT))
}

fn load() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_bench_load"))
}

fn serve(roles: &Roles) -> Result<Process> {
    let mut command = roles.server.command(load());
    roles.server.serve("bench_load", command.arg("serve").arg(format!("[::]:{PORT}")), PORT)
}

/// What the benchmark's client does, with what it says if it fails.
fn work(roles: &Roles, http: bool, work: Work) -> Result<()> {
    work_over(roles, Family::V4, http, work)
}

fn work_over(roles: &Roles, family: Family, http: bool, work: Work) -> Result<()> {
    let address = roles.server.socket(family, PORT);
    let order = serde_json::to_string(&Order { address, work, http, watch: [].into(), trace: false })?;
    let run = output(roles.client.command(load()).arg("run").arg(order), seconds(30))?;
    ensure!(run.status.success(), "{}", String::from_utf8_lossy(&run.stderr));
    Ok(())
}

const FEW: Work = Work::Connect { count: 10, at_once: 2 };
const WORKS: [Work; 3] = [FEW, Work::Exchanges { count: 20 }, Work::Bulk { bytes: 3_000_000, streams: 2 }];

#[test]
fn sidecars_carry_all_connections_and_nothing_but_tls_is_on_the_wire() -> Result<()> {
    let Some(program) = envoy() else { return Ok(()) };
    for layer in [Layer::Tcp, Layer::Http] {
        on_network(&spec(), |cluster| {
            let roles = roles(cluster)?;
            let _server = serve(&roles)?;
            let pair = Pair::start(&program, cluster, layer, &roles)?;
            ensure!(pair.carried(Duration::ZERO).is_err(), "nothing was carried, and that was taken for well");
            let mut capture = LinkCapture::start(cluster, &["xxxxxxxxxxxxxxxx"])?;
            for piece in WORKS {
                work(&roles, layer == Layer::Http, piece).with_context(|| pair.report())?;
            }
            let (carried, wire) = (pair.carried(seconds(5))?, capture.wire()?);
            // Those that warm up are connections as well, and bulk has one of its own for that.
            ensure!(carried.connections == 5 + 10 + 1 + (1 + 2), "{carried:?}");
            ensure!(carried.version == "TLSv1.3", "{carried:?}");
            ensure!(wire.tls13_handshakes() as u64 == carried.between, "{carried:?}, {:?}", wire.streams);
            ensure!(wire.not_tls() == 0 && wire.hits("xxxxxxxxxxxxxxxx") == 0, "{:?}", wire.streams);
            ensure!(work_over(&roles, Family::V6, layer == Layer::Http, FEW).is_err(), "IPv6 passed the sidecars by");
            Ok(())
        })?;
    }
    Ok(())
}

#[test]
fn a_sidecar_refuses_another_identity_and_connections_that_pass_it_by_are_noticed() -> Result<()> {
    let Some(program) = envoy() else { return Ok(()) };
    on_network(&spec(), |cluster| {
        let mut roles = roles(cluster)?;
        let _server = serve(&roles)?;
        let right = roles.shown.clone();
        roles.shown = format!("{right}-not");
        let pair = Pair::start(&program, cluster, Layer::Tcp, &roles)?;
        ensure!(work(&roles, false, FEW).is_err(), "another identity was let in");
        let [_, server] = pair.statistics("ssl.fail_verify_san")?;
        ensure!(
            server.values().any(|count| *count > 0),
            "it was not refused for its name: {server:?}\n{}",
            pair.report()
        );
        let fault = pair.carried(Duration::ZERO).map(|carried| format!("{carried:?}"));
        ensure!(fault.is_err(), "refused connections were taken for well: {fault:?}");
        Ok(())
    })?;
    on_network(&spec(), |cluster| {
        let roles = roles(cluster)?;
        let _server = serve(&roles)?;
        let pair = Pair::start(&program, cluster, Layer::Tcp, &roles)?;
        work(&roles, false, FEW).with_context(|| pair.report())?;
        pair.carried(seconds(5))?;
        for pod in [&roles.client, &roles.server] {
            pod.succeed("nft", &["flush", "ruleset"], seconds(10))?;
        }
        work(&roles, false, FEW).context("without rules it is a plain network")?;
        let fault = pair.carried(Duration::ZERO).err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(fault.contains("the kernel has counted"), "plaintext was taken for well: {fault}");
        Ok(())
    })
}

#[test]
fn another_proxy_is_put_beside_by_a_command_and_one_that_does_nothing_is_refused() -> Result<()> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../xtask/bench/external/haproxy.sh");
    ensure!(Command::new("haproxy").arg("-v").output().is_ok(), "there is no haproxy; way out: cargo xtask test");
    on_network(&spec(), |cluster| {
        let roles = roles(cluster)?;
        let _server = serve(&roles)?;
        let start = |command: &str| external::Pair::start("other", command, cluster, &roles);
        let fault = start("echo its own words; exit 3").err().map(|error| format!("{error:#}")).unwrap_or_default();
        ensure!(fault.contains("its own words") && fault.contains("exit 3"), "{fault}");
        let mut idle = start("touch \"$MARLINE_READY\"; exec sleep 600")?;
        let fault = idle.probe(cluster, || work(&roles, false, FEW)).err().map(|error| format!("{error:#}"));
        ensure!(
            fault.as_ref().is_some_and(|fault| fault.contains("no TLS")),
            "plaintext was taken for well: {fault:?}"
        );
        drop(idle);
        let mut haproxy = start(&format!("exec sh {}", script.display()))?;
        let handshakes = haproxy.probe(cluster, || work(&roles, false, FEW))?;
        ensure!(handshakes == 15, "{handshakes} handshakes, {}", haproxy.report());
        work(&roles, false, Work::Bulk { bytes: 3_000_000, streams: 2 }).with_context(|| haproxy.report())
    })
}
