//! Every way to accept, to connect and to move bytes that programs know, with both ends under the filter: what they are shown is what
//! the kernel shows without a mesh, and the connection went directly, but where that cannot be.
//!
//! One row of the table is a client of `programs/call.py` and a server of `programs/serve.py`, on a port of its own.

use std::{collections::BTreeSet, fmt::Write as _, path::PathBuf};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    access_log::Entry,
    cluster::Family,
    direct::{Count, Route, Stage, Way, Ways, on_direct_mesh},
    process::{Process, output},
    wait::seconds,
};

const PYTHON: &str = "/usr/bin/python3";
const FIRST_PORT: u16 = 7000;

/// Direct at the client; at the server it depends on what comes first.
const EITHER: Ways = Ways { client: Way::Direct, server: Way::Either };
/// The reasons to be proxied of a call that the filter does not hold, and of a pod without a filter.
const UNHEARD: &str = "not_notified";
const BARE: &str = "no_filter";

/// A row: the client, the server, the connections over each family that this takes, and their ways.
struct Row {
    client: &'static str,
    server: &'static str,
    v4: usize,
    v6: usize,
    ways: Ways,
}

const fn row(client: &'static str, server: &'static str) -> Row {
    times(client, server, 1)
}

const fn times(client: &'static str, server: &'static str, count: usize) -> Row {
    Row { client, server, v4: count, v6: count, ways: Ways::DIRECT }
}

const fn way(client: &'static str, server: &'static str, ways: Ways) -> Row {
    Row { client, server, v4: 1, v6: 1, ways }
}

#[test]
fn every_way_to_accept_is_as_without_a_mesh() -> Result<()> {
    rows(&[
        row("plain", "plain"),
        row("plain", "two-families"),
        Row { v6: 0, ..row("plain", "v4") },
        Row { v4: 0, ..row("plain", "v6") },
        times("four-times", "bare-accept", 4),
        times("four-times", "accept4-flags", 4),
        row("plain", "mistakes"),
        row("plain", "timeout"),
        // While a signal comes, it is the kernel that accepts.
        way("plain", "interrupted", EITHER),
        row("plain", "inherit"),
        row("plain", "elsewhere"),
        row("plain", "many-listeners"),
        times("threads", "late", 12),
        row("plain", "select"),
        row("plain", "poll"),
        row("plain", "epoll-level"),
        row("plain", "epoll-edge"),
        times("burst", "epoll-edge", 12),
        row("plain", "dup"),
        way("plain", "io-uring", Ways::client_only(UNHEARD)),
    ])
}

#[test]
fn listeners_and_connections_may_be_shared_and_passed_between_processes() -> Result<()> {
    rows(&[
        times("threads", "fork", 12),
        times("threads", "prefork", 12),
        times("threads", "prefork-epoll", 12),
        times("threads", "threads", 12),
        times("threads", "reuseport", 12),
        row("plain", "exec"),
        row("plain", "pass-connection"),
        row("plain", "pass-listener"),
    ])
}

#[test]
fn every_way_to_connect_is_as_without_a_mesh() -> Result<()> {
    rows(&[
        row("poll", "fork"),
        row("select", "fork"),
        row("epoll-level", "fork"),
        row("epoll-edge", "fork"),
        row("timeout", "fork"),
        row("send-timeout", "fork"),
        row("bound", "fork"),
        row("mapped", "fork"),
        row("signals", "fork"),
        row("mistakes", "fork"),
        row("options", "fork"),
        times("threads", "fork", 12),
        times("burst", "fork", 12),
        row("fork", "fork"),
        row("pass", "fork"),
        row("exec", "fork"),
        row("dup", "fork"),
        way("io-uring", "fork", Ways::server_only(UNHEARD)),
        way("fast-open", "fork", Ways::server_only(UNHEARD)),
        way("zerocopy", "fork", Ways::server_only("socket_option")),
    ])
}

#[test]
fn every_way_to_move_bytes_and_to_end_is_as_without_a_mesh() -> Result<()> {
    rows(&[
        row("plain", "sendfile"),
        row("plain", "peek"),
        row("plain", "lowat"),
        row("plain", "scattered"),
        row("plain", "splice"),
        row("plain", "idle"),
        row("plain", "linger"),
        row("listens-first", "speaks-first"),
        row("waits-for-banner", "banner"),
        row("closes-at-once", "takes-all"),
        row("linger", "takes-all"),
        row("is-reset", "reset"),
        row("resets", "is-reset"),
        row("sendfile", "fork"),
        row("splice", "fork"),
        row("small-writes", "fork"),
        row("more", "fork"),
        row("peek", "fork"),
        row("wait-all", "fork"),
        row("small-buffers", "fork"),
        // The kernel takes no keys for a connection that has been ended by the other side already.
        way("little", "fork", EITHER),
        row("silent", "fork"),
        row("ping-pong", "fork"),
    ])
}

#[test]
fn an_end_without_the_filter_is_proxied_and_the_other_is_direct() -> Result<()> {
    on_direct_mesh(|stage| {
        let (bare_client, bare_server) = (stage.cluster.pod("client-a")?, stage.cluster.pod("server-b")?);
        for (client, server, ways) in [
            (&stage.client, &bare_server, Ways::client_only(BARE)),
            (&bare_client, &stage.server, Ways::server_only(BARE)),
            (&bare_client, &bare_server, Ways::proxied(BARE, BARE)),
            (&stage.client, &stage.server, Ways::DIRECT),
        ] {
            let rows = [
                way("plain", "fork", ways),
                way("listens-first", "speaks-first", ways),
                way("closes-at-once", "takes-all", ways),
                way("is-reset", "reset", ways),
                way("resets", "is-reset", ways),
                way("ping-pong", "fork", ways),
            ];
            run(&stage.between(client, server), &rows)?;
        }
        Ok(())
    })
}

#[test]
fn what_nobody_listens_for_is_refused() -> Result<()> {
    on_direct_mesh(|stage| {
        let (good, said) = call(stage, &format!("refused={FIRST_PORT}"))?;
        ensure!(good && said.matches(" ok").count() == 2, "{said}");
        Ok(())
    })
}

fn rows(rows: &[Row]) -> Result<()> {
    on_direct_mesh(|stage| run(stage, rows))
}

/// Starts all servers, lets all clients call one after the other, and compares what the four sides of each row say.
fn run(stage: &Stage<'_>, rows: &[Row]) -> Result<()> {
    let numbered: Vec<(u16, &Row)> = (FIRST_PORT..).zip(rows).collect();
    let servers = serve(stage, &numbered)?;
    let before = stage.now()?;
    let mut calls = String::new();
    for (port, row) in &numbered {
        // One with a family that nobody listens on is left out of the calls over it.
        let families = match (row.v4, row.v6) {
            (_, 0) => "/4",
            (0, _) => "/6",
            _ => "",
        };
        write!(calls, "{}={port}{families} ", row.client)?;
    }
    let (good, said) = call(stage, calls.trim_end())?;
    let served = servers.log();
    // One look shall tell all that is wrong.
    let mut wrong = String::new();
    for (port, row) in numbered {
        for (family, connections) in [(Family::V4, row.v4), (Family::V6, row.v6)] {
            let route = Route {
                client: &stage.client,
                server: &stage.server,
                family,
                port,
                connections: Count::Exactly(connections),
                ways: row.ways,
                counted: !row.client.contains("reset"),
            };
            // Of what went wrong at a program, the agents need not be asked.
            let number = if family == Family::V4 { 4 } else { 6 };
            if connections == 0 || !said.contains(&format!("\n{port} {number} ok")) {
                continue;
            }
            if let Err(error) = judge(stage, row, route, before, &said, &served) {
                writeln!(wrong, "{} to {} over {}: {error:#}", row.client, row.server, family.as_str())?;
            }
        }
    }
    let well = good && wrong.is_empty() && !served.contains("WRONG");
    ensure!(well, "{wrong}--- the clients said\n{said}\n--- the servers said\n{served}");
    Ok(())
}

/// Compares what the four sides of a row say of where its connections came from.
fn judge(
    stage: &Stage<'_>,
    row: &Row,
    route: Route<'_>,
    before: (usize, usize),
    said: &str,
    served: &str,
) -> Result<()> {
    let taken = stage.taken(before, route)?;
    let (ours, theirs) = (ports(&taken.outbound), ports(&taken.inbound));
    let own = clients_ports(said, route.port, route.family);
    ensure!(ours == own, "agent a says that it came from {ours:?}, the client from {own:?}");
    let shown = servers_peers(served, row.server, &client_of(stage, row, route.family));
    let right = theirs.iter().all(|port| shown.contains(port));
    ensure!(right, "agent b says that it came from {theirs:?}, the server was shown {shown:?}");
    // An agent that connects for a program uses a port of its own.
    let one = taken.outbound.iter().any(|entry| entry.path.as_deref() != Some("direct")) || ours == theirs;
    ensure!(one, "from {ours:?} by agent a, from {theirs:?} by agent b");
    Ok(())
}

fn serve(stage: &Stage<'_>, rows: &[(u16, &Row)]) -> Result<Process> {
    let mut command = stage.server.command(PYTHON);
    command.arg("-B").arg(program("serve.py")).args(rows.iter().map(|(port, row)| format!("{}={port}", row.server)));
    let (first, _) = rows.first().context("no row")?;
    let log = format!("serve-{}", stage.now()?.1);
    let mut servers = stage.server.serve(&log, &mut command, *first)?;
    for (port, _) in rows {
        servers.listens(&stage.server.place.netns, *port)?;
    }
    Ok(servers)
}

/// Runs clients to their end: whether all went well, and what they said.
fn call(stage: &Stage<'_>, calls: &str) -> Result<(bool, String)> {
    let (client, server) = (&stage.client, &stage.server);
    let mut command = client.command(PYTHON);
    command.arg("-B").arg(program("call.py"));
    command.args(["--from", &client.v4.to_string(), &client.v6.to_string()]);
    command.args(["--to", &server.v4.to_string(), &server.v6.to_string()]).args(calls.split_whitespace());
    let output = output(&mut command, seconds(60))?;
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    Ok((output.status.success(), said))
}

/// The ports of the client's ends, as an agent wrote them.
fn ports(entries: &[Entry]) -> BTreeSet<u16> {
    entries.iter().filter_map(|entry| entry.source.address).map(|end| end.port()).collect()
}

/// The ports that a row's client had, by its own account.
fn clients_ports(said: &str, port: u16, family: Family) -> BTreeSet<u16> {
    let number = if family == Family::V4 { 4 } else { 6 };
    let prefix = format!("{port} {number} local ");
    said.lines().filter_map(|line| line.strip_prefix(&prefix)?.split_once(' ')?.1.parse().ok()).collect()
}

/// The client's address as this row's server is shown it: listeners for both families see IPv4 as mapped.
fn client_of(stage: &Stage<'_>, row: &Row, family: Family) -> String {
    let plain = row.server == "v4" || row.server == "two-families";
    let mapped = if family == Family::V4 && !plain { "::ffff:" } else { "" };
    format!("{mapped}{}", stage.client.address(family))
}

/// The ports at the client's address that a server was shown.
fn servers_peers(said: &str, server: &str, client: &str) -> BTreeSet<u16> {
    let prefix = format!("{server} peer {client} ");
    said.lines().filter_map(|line| line.strip_prefix(&prefix)?.parse().ok()).collect()
}

fn program(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs").join(name)
}
