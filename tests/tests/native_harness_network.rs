//! The harness itself, without any agent: if plain traffic were not seen here, that nothing is seen later would prove nothing.

use std::{fs, process::Command};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    capture::LinkCapture,
    cluster::{Cluster, ClusterSpec, Family, Pod},
    config::Mode,
    netns,
    process::succeed,
    scenario::on_network,
    traffic::{Seen, banner::Ssh, iperf::Iperf, nginx::Nginx, redis::Redis},
    wait::seconds,
};

const MARKER: &str = "marker-of-the-harness";

fn network() -> ClusterSpec {
    ClusterSpec::pairs(Mode::Permissive)
}

#[test]
fn without_an_agent_every_program_is_heard_on_the_link_in_the_clear() -> Result<()> {
    on_network(&network(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let nginx = Nginx::start(&server, MARKER)?;
        nginx.add_file("file", 3_000_000)?;
        let (redis, iperf, ssh) =
            (Redis::start(&server, MARKER)?, Iperf::new(&server, MARKER), Ssh::start(&server, MARKER)?);
        for family in Family::BOTH {
            let address = server.address(family);
            let mut capture = LinkCapture::start(cluster, &[MARKER, "never-sent"])?;
            let before = capture.wire()?;
            ensure!(before.streams.is_empty(), "an idle link carries {:?}", before.streams);
            let mut hits = 0;
            let flows: [(&str, &dyn Fn() -> Result<Seen>); 5] = [
                ("keep-alive", &|| nginx.keep_alive(&client, address)),
                ("file", &|| nginx.fetch(&client, address, "file")),
                ("redis", &|| redis.set_and_get(&client, address)),
                ("iperf3", &|| iperf.send(&client, address, 5_000_000)),
                ("banner", &|| ssh.banner(&client, address)),
            ];
            for (name, flow) in flows {
                let seen = flow()?;
                ensure!(seen.exact, "{name} over {}: {}", family.as_str(), seen.note);
                let wire = capture.wire()?;
                ensure!(wire.hits(MARKER) > hits, "{name} over {} was not heard: {wire:?}", family.as_str());
                hits = wire.hits(MARKER);
            }
            ensure!(ssh.host_key(&client, address)?.exact, "the host key that arrives is another");
            let wire = capture.finish()?;
            let carried: u64 = wire.streams.iter().map(|stream| stream.bytes()).sum();
            ensure!(carried > 3_000_000 && wire.not_tls() == carried, "{} of {carried} bytes", wire.not_tls());
            ensure!(wire.to(server.socket(family, nginx.port())).count() == 2, "streams: {:?}", wire.streams);
            ensure!(wire.streams.iter().all(|stream| stream.accepted && stream.client.ip() == client.address(family)));
            ensure!(wire.tls13_handshakes() == 0 && wire.hits("never-sent") == 0);
            ensure!(wire.holes().next().is_none(), "frames are missing");
        }
        Ok(())
    })
}

#[test]
fn tls_on_the_link_is_told_by_version_and_by_the_size_of_what_the_client_shows() -> Result<()> {
    on_network(&network(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let (key, certificate) = self_signed(&server)?;
        let mut capture = LinkCapture::start(cluster, &[MARKER])?;
        for (port, version, with_certificate) in [(1, "-tls1_3", true), (2, "-tls1_3", false), (3, "-tls1_2", true)] {
            let mut command = server.command("openssl");
            command.args(["s_server", "-quiet", "-verify", "1", "-accept", &port.to_string(), version]);
            let mut peer = server.serve(
                &format!("s_server{port}"),
                command.arg("-key").arg(&key).arg("-cert").arg(&certificate),
                port,
            )?;
            let address = server.socket(Family::V6, port);
            let identity = if with_certificate { format!("-key {key} -cert {certificate}") } else { String::new() };
            let script = format!(
                "printf {MARKER} | openssl s_client -quiet -no_ign_eof -connect '{address}' {identity} {version}"
            );
            client.output("sh", &["-c", &script], seconds(20))?;
            peer.kill()?;
            let wire = capture.wire()?;
            let stream = wire.to(address).next().with_context(|| format!("no stream to {address}"))?;
            ensure!(stream.is_tls13() == (version == "-tls1_3"), "{version}: {stream:?}");
            ensure!(stream.not_tls() == 0 && wire.hits(MARKER) == 0, "{version}: {stream:?}");
            if version == "-tls1_3" {
                let first = stream.first_client_record().context("the client sent no encrypted record")?;
                ensure!((first > 200) == with_certificate, "with a certificate: {with_certificate}, record of {first}");
            }
        }
        Ok(())
    })
}

#[test]
fn a_cluster_leaves_nothing_behind_also_when_programs_are_still_running() -> Result<()> {
    let mut name = String::new();
    on_network(&network(), |cluster| {
        name = cluster.name().to_owned();
        let server = cluster.pod("server-a")?;
        let process = Nginx::start(&server, MARKER)?.process;
        process.detach();
        ensure!(traces(&name)?.len() > 5, "a cluster without traces: {:?}", traces(&name)?);
        Ok(())
    })?;
    let left = traces(&name)?;
    ensure!(left.is_empty(), "left behind: {left:?}");
    Ok(())
}

#[test]
fn a_pod_comes_and_goes_while_others_talk() -> Result<()> {
    on_network(&network(), |cluster| {
        use marline_tests::cluster::{Membership, PodSpec, Side};
        let client = cluster.pod("client-a")?;
        let guest = cluster.create_pod(&PodSpec::new("guest", Side::B, Membership::Mesh))?;
        let guest_netns = guest.place.netns.clone();
        let redis = Redis::start(&guest, MARKER)?;
        for family in Family::BOTH {
            ensure!(redis.set_and_get(&client, guest.address(family))?.exact);
        }
        cluster.remove_pod("guest")?;
        ensure!(!guest_netns.exists() && !guest.place.cgroup.exists(), "the pod is still there");
        ensure!(cluster.pod("guest").is_err());
        Ok(())
    })
}

#[test]
fn two_clusters_with_the_same_addresses_do_not_meet() -> Result<()> {
    on_network(&network(), |first| {
        let second = Cluster::create(&network())?;
        let server = first.pod("server-b")?;
        let redis = Redis::start(&server, MARKER)?;
        ensure!(redis.set_and_get(&first.pod("client-a")?, server.address(Family::V4))?.exact);
        let other = redis.set_and_get(&second.pod("client-a")?, server.address(Family::V4));
        ensure!(other.is_err(), "a pod of another cluster was reached: {other:?}");
        Ok(())
    })
}

/// What carries the cluster's name in the kernel.
fn traces(name: &str) -> Result<Vec<String>> {
    let mut traces: Vec<String> =
        netns::list().into_iter().filter(|netns| netns.starts_with(&format!("{name}-"))).collect();
    for directory in ["/sys/fs/bpf".into(), marline_tests::cgroup::mount_point()?] {
        let entries = fs::read_dir(&directory).with_context(|| directory.display().to_string())?.flatten();
        traces.extend(entries.map(|entry| entry.path().display().to_string()).filter(|path| path.contains(name)));
    }
    Ok(traces)
}

fn self_signed(pod: &Pod) -> Result<(String, String)> {
    let path = |name: &str| pod.directory.join(name).display().to_string();
    let (key, certificate) = (path("self.key"), path("self.pem"));
    let mut command = Command::new("openssl");
    command.args([
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
        "-subj",
        "/CN=self",
    ]);
    succeed(command.args(["-keyout", &key, "-out", &certificate]), seconds(20))?;
    Ok((key, certificate))
}
