//! Thousands of connections opened and closed: every one gets its bytes, and afterwards the agents hold what they held before.
//! Descriptors and memory are read from /proc, map entries from the pinned maps themselves, not from the agent's word.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use aya::maps::{HashMap, Map, MapData};
use marline_common::{Endpoint, Origin, PodEndpoint};
use marline_tests::{
    agent::Agent,
    cluster::{Cluster, ClusterSpec, Family, Side, network, remains},
    config::Mode,
    process::Process,
    scenario::on_mesh,
    wait::{Look, seconds, wait_for},
};

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const PORT: u16 = 7000;
/// What may remain in memory of ten thousand connections: arenas of the allocator, not a kilobyte for each.
const GROWTH_KIB: u64 = 6 * 1024;

const CONNECTIONS: u32 = 10_000;

#[test]
fn ten_thousand_connections_leave_no_descriptor_no_map_entry_and_no_memory_behind() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _echo = server.serve("echo", server.command(TALKER).args(["echo", &PORT.to_string()]), PORT)?;
        let churn = |count: u32| -> Result<()> {
            for family in Family::BOTH {
                let address = server.socket(family, PORT).to_string();
                let half = (count / 2).to_string();
                let output = client.output(TALKER, &["many", &address, &half, "16"], seconds(240))?;
                let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
                ensure!(said == format!("{half} echoes"), "over {}: {said}", family.as_str());
            }
            Ok(())
        };
        // A connection that lives is seen, so that none seen later means something.
        let spouting = PORT + 1;
        let mut spout =
            server.serve("spout", server.command(TALKER).args(["spout", &spouting.to_string()]), spouting)?;
        let mut command = client.command(TALKER);
        command.args(["drink", &server.socket(Family::V4, spouting).to_string()]);
        let drinker = Process::start("drinker", &mut command, &client.directory.join("drink.log"))?;
        wait_for("a living connection to be on record", seconds(20), || {
            let found = clients(&maps(cluster, cluster.agent(server.side)?))?;
            Ok(if found == 1 { Look::Done(()) } else { Look::NotYet(format!("{found} entries")) })
        })?;
        let shown = cluster.agent(server.side)?.exposition()?.sum("marline_capture_map_entries", &[("map", "clients")]);
        ensure!(shown == 1.0, "the metrics say otherwise: {shown}");
        drop(drinker);
        spout.kill()?;

        // Pools, caches and arenas reach their size first.
        churn(CONNECTIONS / 10)?;
        let before = settled(cluster, None)?;
        churn(CONNECTIONS)?;
        let after = settled(cluster, Some(&before))?;
        for (side, (before, after)) in Side::BOTH.into_iter().zip(before.into_iter().zip(after)) {
            let node = side.letter();
            println!("agent {node}: {before:?}, then {after:?}");
            ensure!(after.resident <= before.resident + GROWTH_KIB, "agent {node}: {before:?}, then {after:?}");
        }
        Ok(())
    })
}

#[derive(Clone, Copy, Debug)]
struct Held {
    descriptors: usize,
    resident: u64,
}

/// What both agents hold when no connection lives any more, no map has an entry about one, and no descriptor is left that was
/// not there before.
fn settled(cluster: &Cluster, before: Option<&[Held]>) -> Result<Vec<Held>> {
    let most = |index: usize| before.and_then(|before| before.get(index)).map_or(usize::MAX, |held| held.descriptors);
    cluster.agents().enumerate().map(|(index, agent)| idle(cluster, agent, most(index))).collect()
}

fn idle(cluster: &Cluster, agent: &Agent, most: usize) -> Result<Held> {
    let maps = maps(cluster, agent);
    wait_for(format!("agent {} to be idle, with {most} descriptors", agent.side().letter()), seconds(30), || {
        let live = agent.metric("marline_connections_live")?;
        let (origins, clients, descriptors) = (origins(&maps)?, clients(&maps)?, agent.descriptors()?);
        let seen = format!("{live} connections, {origins} origins, {clients} clients, {descriptors} descriptors");
        let idle = live == 0.0 && origins == 0 && clients == 0 && descriptors <= most;
        Ok(if idle { Look::Done(()) } else { Look::NotYet(seen) })
    })?;
    Ok(Held { descriptors: agent.descriptors()?, resident: agent.resident()? })
}

fn maps(cluster: &Cluster, agent: &Agent) -> PathBuf {
    remains::pins(&network::node_name(cluster.name(), agent.side())).join("maps")
}

/// Entries about redirected connections that nobody has accepted.
fn origins(maps: &Path) -> Result<usize> {
    let map: HashMap<_, PodEndpoint, Origin> = HashMap::try_from(Map::LruHashMap(open(maps.join("ORIGINS"))?))?;
    Ok(map.keys().count())
}

/// Entries about the true clients of accepted connections.
fn clients(maps: &Path) -> Result<usize> {
    let map: HashMap<_, PodEndpoint, Endpoint> = HashMap::try_from(Map::HashMap(open(maps.join("CLIENTS"))?))?;
    Ok(map.keys().count())
}

fn open(pin: PathBuf) -> Result<MapData> {
    MapData::from_pin(&pin).with_context(|| format!("opening the map {}", pin.display()))
}
