//! A flow seen from everywhere: what the client program saw, and what the agents at both ends wrote of it.

use anyhow::{Result, ensure};

use crate::{
    access_log::{Direction, Entry},
    cluster::{Cluster, Family, Membership, Pod},
    traffic::Seen,
};

#[derive(Clone, Debug)]
pub struct Flow {
    pub seen: Seen,
    /// What the client's agent wrote; nothing if the client is in no mesh.
    pub outbound: Vec<Entry>,
    /// What the server's agent wrote.
    pub inbound: Vec<Entry>,
}

impl Flow {
    /// Everything that was written.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.outbound.iter().chain(&self.inbound)
    }
}

/// Where a flow goes, and how many connections it takes.
#[derive(Clone, Copy, Debug)]
pub struct Route<'a> {
    pub client: &'a Pod,
    pub server: &'a Pod,
    pub family: Family,
    pub connections: usize,
}

/// Runs a client program and waits until the agents have accounted for its connections.
pub fn observe(cluster: &Cluster, route: Route<'_>, run: impl FnOnce() -> Result<Seen>) -> Result<Flow> {
    let before = Before::now(cluster, route)?;
    let seen = run()?;
    let (outbound, inbound) = before.entries(cluster, seen.port)?;
    Ok(Flow { seen, outbound, inbound })
}

/// How long the access logs were before a flow.
pub struct Before<'a> {
    route: Route<'a>,
    outbound: usize,
    inbound: usize,
}

impl<'a> Before<'a> {
    pub fn now(cluster: &Cluster, route: Route<'a>) -> Result<Self> {
        let length = |pod: &Pod| -> Result<usize> { Ok(cluster.agent(pod.side)?.entries()?.len()) };
        Ok(Self { route, outbound: length(route.client)?, inbound: length(route.server)? })
    }

    /// The entries about connections to the port since then, of the client's and of the server's agent.
    pub fn entries(&self, cluster: &Cluster, port: u16) -> Result<(Vec<Entry>, Vec<Entry>)> {
        let Route { client, server, family, connections } = self.route;
        let to = server.socket(family, port);
        let written = |pod: &Pod, since: usize, direction: Direction| -> Result<Vec<Entry>> {
            if pod.membership != Membership::Mesh {
                return Ok(Vec::new());
            }
            let what = format!("{} to {to}", client.name);
            let entries = cluster.agent(pod.side)?.wait_entries(&what, since, connections, |entry| {
                entry.direction == direction && entry.connects(client, to)
            })?;
            ensure!(entries.len() == connections, "{what}: {connections} entries expected, {} written", entries.len());
            Ok(entries)
        };
        Ok((written(client, self.outbound, Direction::Outbound)?, written(server, self.inbound, Direction::Inbound)?))
    }
}
