//! Real programs through the mesh: what they see is what they would see without it, and the wire shows TLS 1.3 alone.

use anyhow::{Result, ensure};
use marline_tests::{
    access_log::{Entry, Records, Verdict},
    capture::LinkCapture,
    cluster::{ClusterSpec, Family, Pod},
    config::Mode,
    flow::{Before, Route, observe},
    scenario::on_mesh,
    traffic::{Seen, banner::Ssh, iperf::Iperf, nginx::Nginx, redis::Redis},
};

const MARKER: &str = "marker-of-the-mesh";
const OUTSIDE: &str = "marker-from-outside";

#[test]
fn in_strict_mode_every_program_gets_its_bytes_and_the_wire_carries_tls13_only() -> Result<()> {
    programs(Mode::Strict)
}

#[test]
fn in_permissive_mode_members_of_the_mesh_still_speak_tls13_only() -> Result<()> {
    programs(Mode::Permissive)
}

/// One program's use of the mesh.
type Flow<'a> = &'a dyn Fn() -> Result<Seen>;

/// Every program over both families, from node a to node b.
fn programs(mode: Mode) -> Result<()> {
    on_mesh(&ClusterSpec::pairs(mode).without_spares(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let nginx = Nginx::start(&server, MARKER)?;
        nginx.add_file("file", 3_000_000)?;
        let (redis, iperf, ssh) =
            (Redis::start(&server, MARKER)?, Iperf::new(&server, MARKER), Ssh::start(&server, MARKER)?);
        let capture = LinkCapture::start(cluster, &[MARKER])?;
        let mut connections = 0;
        for family in Family::BOTH {
            let address = server.address(family);
            let flows: [(&str, usize, Flow<'_>); 6] = [
                ("keep-alive", 1, &|| nginx.keep_alive(&client, address)),
                ("file", 1, &|| nginx.fetch(&client, address, "file")),
                ("redis", 1, &|| redis.set_and_get(&client, address)),
                ("iperf3", 2, &|| iperf.send(&client, address, 5_000_000)),
                ("banner", 1, &|| ssh.banner(&client, address)),
                ("host key", 1, &|| ssh.host_key(&client, address)),
            ];
            for (name, count, flow) in flows {
                let name = format!("{name} over {}", family.as_str());
                let route = Route { client: &client, server: &server, family, connections: count };
                let flow = observe(cluster, route, flow)?;
                ensure!(flow.seen.exact, "{name}: {}", flow.seen.note);
                for entry in flow.entries() {
                    check(entry, &name, &client, &server)?;
                }
                connections += count;
            }
        }
        let wire = capture.finish()?;
        ensure!(wire.hits(MARKER) == 0, "the marker was seen {} times", wire.hits(MARKER));
        ensure!(wire.not_tls() == 0, "bytes that are not TLS: {:#?}", wire.streams);
        ensure!(wire.tls13_handshakes() == connections, "{connections} connections: {:#?}", wire.streams);
        ensure!(wire.streams.len() == connections && wire.holes().next().is_none(), "{:#?}", wire.streams);
        // More than a Finished alone: the client shows a certificate, too.
        ensure!(wire.streams.iter().all(|stream| stream.first_client_record().is_some_and(|size| size > 200)));
        Ok(())
    })
}

fn check(entry: &Entry, name: &str, client: &Pod, server: &Pod) -> Result<()> {
    let (source, destination) = (client.identity(), server.identity());
    // iperf3's receiver closes with bytes unread, which is a reset; everybody else closes.
    let ended = entry.reason.is_none() || name.starts_with("iperf3");
    let good = entry.ended_by_programs()
        && ended
        && matches!(entry.records, Records::Ktls | Records::Userspace)
        && entry.source.identity.as_ref() == Some(&source)
        && entry.destination.identity.as_ref() == Some(&destination);
    ensure!(good, "{name}: {entry:#?}");
    Ok(())
}

#[test]
fn a_pod_outside_reaches_permissive_and_is_refused_by_strict_at_once() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Permissive), |cluster| {
        let (outside, client, server) = (cluster.pod("outside")?, cluster.pod("client-a")?, cluster.pod("server-b")?);
        let nginx = Nginx::start(&server, OUTSIDE)?;
        for family in Family::BOTH {
            let address = server.address(family);
            if cluster.mode() != Mode::Permissive {
                cluster.change_mode(Mode::Permissive)?;
            }
            let seen = nginx.keep_alive(&outside, address)?;
            ensure!(seen.exact, "from outside: {}", seen.note);
            cluster.change_mode(Mode::Strict)?;
            let route = Route { client: &outside, server: &server, family, connections: 1 };
            let before = Before::now(cluster, route)?;
            let outcome = nginx.page(&outside, address);
            ensure!(outcome.is_err(), "STRICT let plaintext from outside in: {outcome:?}");
            let (_, refused) = before.entries(cluster, nginx.port())?;
            let good = |entry: &Entry| entry.verdict == Verdict::Refused && entry.reason.is_some();
            ensure!(refused.iter().all(good), "{refused:#?}");
            ensure!(nginx.keep_alive(&client, address)?.exact, "a member of the mesh is no longer let in");
        }
        Ok(())
    })
}

#[test]
fn with_mtls_disabled_members_speak_plaintext_and_the_log_says_so() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Disable), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let redis = Redis::start(&server, MARKER)?;
        let capture = LinkCapture::start(cluster, &[MARKER])?;
        for family in Family::BOTH {
            let route = Route { client: &client, server: &server, family, connections: 1 };
            let flow = observe(cluster, route, || redis.set_and_get(&client, server.address(family)))?;
            ensure!(flow.seen.exact && flow.entries().all(|entry| entry.records == Records::Plaintext), "{flow:#?}");
        }
        let wire = capture.finish()?;
        ensure!(wire.hits(MARKER) > 0 && wire.tls13_handshakes() == 0, "{:#?}", wire.streams);
        Ok(())
    })
}

#[test]
fn a_member_reaches_a_pod_outside_in_plaintext_and_pods_of_its_own_node_with_mtls() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, neighbour, outside) =
            (cluster.pod("client-b")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let (inner, outer) = (Redis::start(&neighbour, MARKER)?, Redis::start(&outside, MARKER)?);
        for family in Family::BOTH {
            ensure!(inner.set_and_get(&client, neighbour.address(family))?.exact, "to the neighbour");
            let agent = cluster.agent(client.side)?;
            let to = neighbour.socket(family, inner.port());
            let entries = agent.wait_entries("the neighbour", 0, 2, |entry| entry.connects(&client, to))?;
            ensure!(entries.iter().all(|entry| entry.mode.as_deref() == Some("mtls")), "{entries:#?}");
            ensure!(outer.set_and_get(&client, outside.address(family))?.exact, "to the pod outside");
            let to = outside.socket(family, outer.port());
            let entries = agent.wait_entries("the pod outside", 0, 1, |entry| entry.connects(&client, to))?;
            ensure!(entries.iter().all(|entry| entry.mode.as_deref() == Some("plaintext")), "{entries:#?}");
        }
        Ok(())
    })
}
