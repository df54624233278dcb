//! A mesh with direct paths, and the question that every scenario on it asks of both agents: which way did each connection take?
//!
//! `MARLINE_TEST_DIRECT=off` runs the same scenarios without filters and keepers, with everything expected to be proxied: so it
//! shows whether a failure is the direct path's or the program's.

use std::env;

use anyhow::{Result, ensure};

use crate::{
    access_log::{Direction, Entry, Records},
    agent,
    cluster::{Cluster, ClusterSpec, Direct, Family, Pod},
    config::Mode,
    scenario::on_mesh,
    wait::seconds,
};

/// Which way an end's bytes went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Through the program's own socket.
    Direct,
    /// Through the agent, for this reason in the words of the access log.
    Proxied(&'static str),
    /// Whichever, by what comes first.
    Either,
}

/// The ways of a connection's two ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ways {
    pub client: Way,
    pub server: Way,
}

impl Ways {
    pub const DIRECT: Self = Self { client: Way::Direct, server: Way::Direct };

    /// Direct at the client alone; the server is proxied for this reason.
    #[must_use]
    pub const fn client_only(reason: &'static str) -> Self {
        Self { client: Way::Direct, server: Way::Proxied(reason) }
    }

    /// Direct at the server alone; the client is proxied for this reason.
    #[must_use]
    pub const fn server_only(reason: &'static str) -> Self {
        Self { client: Way::Proxied(reason), server: Way::Direct }
    }

    /// Both ends proxied, each for its reason.
    #[must_use]
    pub const fn proxied(client: &'static str, server: &'static str) -> Self {
        Self { client: Way::Proxied(client), server: Way::Proxied(server) }
    }
}

/// How many connections a flow takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Count {
    Exactly(usize),
    /// Where a program decides: at least so many.
    AtLeast(usize),
}

/// A flow of which both agents are asked.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    pub client: &'a Pod,
    pub server: &'a Pod,
    pub family: Family,
    pub port: u16,
    pub connections: Count,
    pub ways: Ways,
    /// Whether both agents must have counted the same bytes: not where a program cuts what is still on its way.
    pub counted: bool,
}

/// What the agents wrote of one flow.
#[derive(Clone, Debug)]
pub struct Taken {
    pub outbound: Vec<Entry>,
    pub inbound: Vec<Entry>,
}

/// A two-node mesh with `client-a` on node a and `server-b` on node b, both filtered.
pub struct Stage<'a> {
    pub cluster: &'a Cluster,
    pub client: Pod,
    pub server: Pod,
    paths: Paths,
}

/// What is to be expected of the mesh as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Paths {
    On,
    /// The kernel's records are not up to it: keepers and filters are there, and everything is proxied.
    Useless,
    Off,
}

/// Makes a mesh in STRICT mode that has direct paths, and runs the scenario on it; skips it where this kernel is not up to them.
pub fn where_direct_works(direct: Direct, scenario: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
    if agent::kernel_keeps_records()? && !agent::kernel_splices()? {
        say_skipped();
        return Ok(());
    }
    let mut spec = ClusterSpec::pairs(Mode::Strict);
    spec.program = Some(agent::binary_for_direct()?);
    spec.direct = Some(direct);
    on_mesh(&spec, scenario)
}

fn say_skipped() {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("direct");
    println!("SKIPPED: {name}: this kernel's records are not up to direct connections");
}

/// Makes the mesh in STRICT mode, and runs the scenario on it.
pub fn on_direct_mesh(scenario: impl FnOnce(&Stage<'_>) -> Result<()>) -> Result<()> {
    let mut spec = ClusterSpec::pairs(Mode::Strict);
    let paths = match env::var("MARLINE_TEST_DIRECT").as_deref() {
        Ok("off") => Paths::Off,
        asked if agent::kernel_keeps_records()? && !agent::kernel_splices()? => {
            if asked != Ok("useless") {
                say_skipped();
                return Ok(());
            }
            Paths::Useless
        }
        _ => Paths::On,
    };
    if paths != Paths::Off {
        spec.program = Some(agent::binary_for_direct()?);
        spec.direct = Some(Direct::default());
    }
    on_mesh(&spec, |cluster| {
        let (client, server) = (cluster.filtered("client-a")?, cluster.filtered("server-b")?);
        scenario(&Stage { cluster, client, server, paths })
    })
}

impl<'a> Stage<'a> {
    /// The same mesh with other pods at the ends.
    #[must_use]
    pub fn between(&self, client: &Pod, server: &Pod) -> Stage<'a> {
        Stage { cluster: self.cluster, client: client.clone(), server: server.clone(), paths: self.paths }
    }

    /// From the client to the server, both ends direct, so many connections.
    #[must_use]
    pub fn route(&self, family: Family, port: u16, connections: usize) -> Route<'_> {
        let (client, server) = (&self.client, &self.server);
        Route {
            client,
            server,
            family,
            port,
            connections: Count::Exactly(connections),
            ways: Ways::DIRECT,
            counted: true,
        }
    }

    /// Runs a client, and then asks both agents.
    pub fn flow<T>(&self, route: Route<'_>, run: impl FnOnce() -> Result<T>) -> Result<(T, Taken)> {
        let before = self.now()?;
        let seen = run()?;
        Ok((seen, self.taken(before, route)?))
    }

    /// How long the access logs are: of the client's agent, and of the server's.
    pub fn now(&self) -> Result<(usize, usize)> {
        let length = |pod: &Pod| -> Result<usize> { Ok(self.cluster.agent(pod.side)?.entries()?.len()) };
        Ok((length(&self.client)?, length(&self.server)?))
    }

    /// Waits until both agents have accounted for the flow's connections, which must have gone as the route tells.
    pub fn taken(&self, (outbound, inbound): (usize, usize), route: Route<'_>) -> Result<Taken> {
        let Route { client, server, family, port, connections, ways, counted } = route;
        let to = server.socket(family, port);
        let what = format!("{} to {to}", client.name);
        let written = |pod: &Pod, skip: usize, direction: Direction, way: Way| -> Result<Vec<Entry>> {
            let least = match connections {
                Count::Exactly(count) | Count::AtLeast(count) => count,
            };
            let entries = self
                .cluster
                .agent(pod.side)?
                .wait_entries(&what, skip, least, |entry| entry.direction == direction && entry.connects(client, to))?;
            let good = !matches!(connections, Count::Exactly(count) if count != entries.len());
            ensure!(good, "{what}: {connections:?} expected, {} written", entries.len());
            entries.iter().try_for_each(|entry| self.check(entry, way, client, server))?;
            Ok(entries)
        };
        let outbound = written(client, outbound, Direction::Outbound, ways.client)?;
        let inbound = written(server, inbound, Direction::Inbound, ways.server)?;
        if counted {
            check_counts(&what, &outbound, &inbound)?;
        }
        Ok(Taken { outbound, inbound })
    }

    fn check(&self, entry: &Entry, way: Way, client: &Pod, server: &Pod) -> Result<()> {
        let proven = entry.source.identity.as_ref() == Some(&client.identity())
            && entry.destination.identity.as_ref() == Some(&server.identity());
        let path = (entry.path.as_deref(), entry.path_reason.as_deref());
        let taken = match (self.paths, way) {
            // What an agent without a keeper gives as its reason is not asked.
            (Paths::Off, _) => path.0 == Some("proxied"),
            (Paths::On, Way::Either) => true,
            (Paths::Useless, Way::Direct) => path == (Some("proxied"), Some("kernel")),
            (Paths::Useless, Way::Proxied(_) | Way::Either) => path.0 == Some("proxied"),
            (Paths::On, Way::Direct) => path == (Some("direct"), None) && is_sealed(entry)?,
            (Paths::On, Way::Proxied(reason)) => path == (Some("proxied"), Some(reason)),
        };
        let good = entry.ended_by_programs() && proven && taken;
        ensure!(good, "expected to be {way:?}, by the programs' ends, with the pods' identities: {entry:?}");
        Ok(())
    }

    /// Waits until a program has said something in its log.
    pub fn wait_said(&self, process: &crate::process::Process, text: &str) -> Result<()> {
        crate::wait::wait_for(format!("{} to say {text}", process.name()), seconds(20), || {
            let said = process.log();
            Ok(if said.contains(text) { crate::wait::Look::Done(()) } else { crate::wait::Look::NotYet(said) })
        })
    }
}

/// Where the kernel keeps records, a direct connection's are its own.
fn is_sealed(entry: &Entry) -> Result<bool> {
    Ok(entry.records == Records::Ktls || !agent::kernel_keeps_records()?)
}

/// What one end's agent has counted as sent has come at the other.
fn check_counts(what: &str, outbound: &[Entry], inbound: &[Entry]) -> Result<()> {
    // A direct end's counts are those of records.
    let alike = |entry: &Entry| entry.path.as_deref() == outbound.first().and_then(|first| first.path.as_deref());
    if !outbound.iter().chain(inbound).all(alike) {
        return Ok(());
    }
    // TCP's end is one number, too. Where it came with the last bytes, kernel TLS takes it with them, and reads without TLS always do: what
    // is left to read of a closed socket then does not tell whether it is in the count.
    let ends = outbound.len() as u64;
    let same = |sent: u64, came: u64| (sent..=sent + ends).contains(&came);
    let sum = |entries: &[Entry], count: fn(&Entry) -> u64| -> u64 { entries.iter().map(count).sum() };
    let there = (sum(outbound, |entry| entry.bytes_sent), sum(inbound, |entry| entry.bytes_received));
    let back = (sum(inbound, |entry| entry.bytes_sent), sum(outbound, |entry| entry.bytes_received));
    ensure!(same(there.0, there.1), "{what}: {} bytes were sent there, and {} came", there.0, there.1);
    ensure!(same(back.0, back.1), "{what}: {} bytes were sent back, and {} came", back.0, back.1);
    Ok(())
}
