//! Many connections leave nothing behind: no descriptors, no entries in the kernel's maps, no memory that grows with them.

use anyhow::{Result, ensure};
use marline_tests::{
    agent::Agent,
    cluster::{Cluster, ClusterSpec, Family, Side},
    config::Mode,
    scenario::on_mesh,
    wait::{Look, seconds, wait_for},
};

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const PORT: u16 = 7000;

/// In the VM every instruction is emulated.
fn connections() -> u32 {
    if std::env::var("MARLINE_TEST_ENV").is_ok_and(|env| env == "vm") { 300 } else { 10_000 }
}

#[derive(Debug, PartialEq)]
struct Held {
    descriptors: usize,
    live: u64,
    /// Of the maps that connections have entries in.
    entries: u64,
}

fn held(agent: &Agent) -> Result<Held> {
    let text = agent.metrics()?;
    let value = |series: &str| -> u64 {
        let line = text.lines().find_map(|line| line.strip_prefix(series));
        line.and_then(|value| value.trim().parse().ok()).unwrap_or(u64::MAX)
    };
    let map = |name: &str| value(&format!("marline_capture_map_entries{{map=\"{name}\"}} "));
    Ok(Held {
        descriptors: agent.descriptors()?,
        live: value("marline_connections_live "),
        entries: map("origins").saturating_add(map("clients")),
    })
}

/// A round of connections, from start to the last trace of it gone.
fn round(cluster: &Cluster, count: u32) -> Result<()> {
    let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
    let address = server.socket(Family::V4, PORT).to_string();
    let said = client.succeed(TALKER, &["many", &address, &count.to_string(), "32"], seconds(240))?;
    ensure!(said.trim() == format!("{count} echoes"), "{said}");
    Ok(())
}

#[test]
fn ten_thousand_connections_leave_no_descriptor_no_map_entry_and_no_memory() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let server = cluster.pod("server-b")?;
        let _echo = server.serve("echo", server.command(TALKER).args(["echo", &PORT.to_string()]), PORT)?;
        // What the first connections make stays: threads, pools, allocator arenas.
        round(cluster, connections() / 10)?;
        let (mut before, mut memory) = (Vec::new(), Vec::new());
        for side in Side::BOTH {
            let agent = cluster.agent(side)?;
            before.push(settled(agent, None)?);
            memory.push(agent.resident()?);
        }
        round(cluster, connections())?;
        for (side, (before, memory)) in Side::BOTH.into_iter().zip(before.into_iter().zip(memory)) {
            let agent = cluster.agent(side)?;
            let after = settled(agent, Some(&before))?;
            ensure!(after.entries == 0 && after.live == 0, "node {}: {after:?}", side.letter());
            let grown = agent.resident()?.saturating_sub(memory);
            ensure!(grown < 16 << 10, "node {}: memory grew by {grown} KiB over {memory} KiB", side.letter());
        }
        Ok(())
    })
}

/// Waits until connections that are closing have closed: nothing is live, and no more descriptors are open than `before`.
fn settled(agent: &Agent, before: Option<&Held>) -> Result<Held> {
    wait_for(format!("node {} to let go of all connections", agent.side().letter()), seconds(30), || {
        let now = held(agent)?;
        let few = before.is_none_or(|before| now.descriptors <= before.descriptors + 2);
        Ok(if now.live == 0 && now.entries == 0 && few {
            Look::Done(now)
        } else {
            Look::NotYet(format!("{now:?}, before {before:?}"))
        })
    })
}
