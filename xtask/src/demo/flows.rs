//! The flows of the demo: which program talks to which, from where, and what came of it. Whether that is good is `report`'s.

use anyhow::{Context, Result};
use marline_tests::{
    access_log::Entry,
    cluster::{Cluster, Family, Pod},
    config::Mode,
    flow::{self, Before, Flow, Route},
    traffic::{Seen, banner::Ssh, iperf::Iperf, nginx::Nginx, redis::Redis},
};

use crate::step;

/// In all payload between members of the mesh: must never be seen on the link.
pub(super) const MARKER: &str = "marline-demo-secret-payload";
/// In the payload of the pod outside: must be seen there, else the capture proves nothing.
pub(super) const OUTSIDE: &str = "marline-demo-payload-from-outside";

const PUBLIC_PORT: u16 = 8080;
const LARGE: &str = "100MB";
const LARGE_SIZE: u64 = 100_000_000;
const IPERF_SIZE: u64 = 32 << 20;

/// One flow with what is expected of it.
pub(super) struct Done {
    pub name: &'static str,
    pub family: Family,
    pub client: Pod,
    pub server: Pod,
    pub expected: Expected,
    /// What came of it: the client program's own failure is a result, too.
    pub seen: Result<Seen, String>,
    pub outbound: Vec<Entry>,
    pub inbound: Vec<Entry>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// mTLS with both identities.
    Mtls,
    /// Let in as plaintext, from an unknown peer.
    Plaintext,
    /// Not let in.
    Refused,
}

/// From where to where.
type Ends<'a> = (&'a Pod, &'a Pod);

/// Runs all flows, and changes the mode on the way. The cluster is in PERMISSIVE mode at first.
pub(super) fn run(cluster: &mut Cluster) -> Result<Vec<Done>> {
    // What runs in two of the pods may hold its connections itself; the others go through the agents as they are.
    let (client_a, server_a) = (cluster.filtered("client-a")?, cluster.pod("server-a")?);
    let (client_b, server_b) = (cluster.pod("client-b")?, cluster.filtered("server-b")?);
    let outside = cluster.pod("outside")?;

    step::say("starting nginx, redis-server and sshd in the pods");
    let nginx = Nginx::start(&server_b, MARKER)?;
    nginx.add_file(LARGE, LARGE_SIZE)?;
    // What the pod outside may read in the clear must not look like a leak.
    let public = Nginx::start_on(&server_b, PUBLIC_PORT, OUTSIDE)?;
    let redis = Redis::start(&server_a, MARKER)?;
    let iperf = Iperf::new(&server_b, MARKER);
    let ssh = Ssh::start(&server_a, MARKER)?;

    let (there, back) = ((&client_a, &server_b), (&client_b, &server_a));
    let mut done = Vec::new();
    for family in Family::BOTH {
        let (to_a, to_b) = (server_a.address(family), server_b.address(family));
        done.push(mesh(cluster, "curl, keep-alive", there, family, 1, || nginx.keep_alive(&client_a, to_b))?);
        done.push(mesh(cluster, "curl, 100 MB", there, family, 1, || nginx.fetch(&client_a, to_b, LARGE))?);
        done.push(mesh(cluster, "redis-cli", back, family, 1, || redis.set_and_get(&client_b, to_a))?);
        done.push(mesh(cluster, "iperf3", there, family, 2, || iperf.send(&client_a, to_b, IPERF_SIZE))?);
        done.push(mesh(cluster, "ssh banner", back, family, 1, || ssh.banner(&client_b, to_a))?);
    }
    let entry = (&outside, &server_b);
    for family in Family::BOTH {
        done.push(attempt(cluster, "outside, PERMISSIVE", entry, family, Expected::Plaintext, &public)?);
    }
    step::say("changing the mode to STRICT, while the agents run");
    cluster.change_mode(Mode::Strict)?;
    for family in Family::BOTH {
        let to_b = server_b.address(family);
        done.push(attempt(cluster, "outside, STRICT", entry, family, Expected::Refused, &public)?);
        done.push(mesh(cluster, "curl, STRICT", there, family, 1, || nginx.keep_alive(&client_a, to_b))?);
    }
    Ok(done)
}

/// A flow between members of the mesh. It has to succeed, or there is nothing to show.
fn mesh(
    cluster: &Cluster,
    name: &'static str,
    (client, server): Ends<'_>,
    family: Family,
    connections: usize,
    run: impl FnOnce() -> Result<Seen>,
) -> Result<Done> {
    step::say(&format!("{name} over {}", family.as_str()));
    let route = Route { client, server, family, connections };
    let flow = flow::observe(cluster, route, run).with_context(|| format!("{name} over {}", family.as_str()))?;
    let (client, server, expected) = (client.clone(), server.clone(), Expected::Mtls);
    let Flow { seen, outbound, inbound } = flow;
    Ok(Done { name, family, client, server, expected, seen: Ok(seen), outbound, inbound })
}

/// The pod outside tries to read a page. That it fails may be what is wanted.
fn attempt(
    cluster: &Cluster,
    name: &'static str,
    (client, server): Ends<'_>,
    family: Family,
    expected: Expected,
    nginx: &Nginx,
) -> Result<Done> {
    step::say(&format!("{name} over {}", family.as_str()));
    let before = Before::now(cluster, Route { client, server, family, connections: 1 })?;
    let seen = nginx.page(client, server.address(family)).map_err(|error| format!("{error:#}"));
    let written = before.entries(cluster, nginx.port());
    let (outbound, inbound) = written.with_context(|| format!("{name} over {}", family.as_str()))?;
    Ok(Done { name, family, client: client.clone(), server: server.clone(), expected, seen, outbound, inbound })
}
