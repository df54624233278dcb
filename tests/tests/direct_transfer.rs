//! The promise of `transfer_matrix`, kept by whole programs on a real mesh: whatever one writes the other reads, byte for byte, and ends are
//! passed on as ends, whichever of the two has the connection in its own hands.
//!
//! A row is one connection of `programs/transfer.py`, on a port of its own; what its words mean is told there.

use std::{path::PathBuf, process::Command};

use anyhow::{Result, ensure};
use marline_tests::{
    amount::{amount, or_long},
    cluster::Family,
    direct::{Count, Route, Stage, Way, Ways, on_direct_mesh},
    process::output,
    wait::seconds,
};
use proptest::{
    prelude::*,
    strategy::ValueTree,
    test_runner::{Config, RngAlgorithm, TestRng, TestRunner},
};
use serde::Serialize;

const PYTHON: &str = "/usr/bin/python3";
const FIRST_PORT: u16 = 7000;

/// A pod without the filter is proxied for this reason.
const BARE: &str = "no_filter";

/// How bytes are moved: by which calls, so many at once, with a pause after so many.
#[derive(Clone, Copy, Debug, Serialize)]
struct Manner(&'static str, usize, usize);

const WRITE: Manner = Manner("send", 1 << 16, 0);
const READ: Manner = Manner("receive", 1 << 16, 0);
const SLOW_WRITE: Manner = Manner("send", 3001, 20_000);
const SLOW_READ: Manner = Manner("receive", 3001, 20_000);

/// A row of the matrix.
#[derive(Clone, Debug, Serialize)]
struct Row {
    port: u16,
    families: Vec<u8>,
    up: usize,
    down: usize,
    write: Manner,
    read: Manner,
    ending: &'static str,
    greeted: bool,
    blocking: bool,
    send_buffer: Option<usize>,
    receive_buffer: Option<usize>,
}

/// So many bytes both ways at once.
fn row(up: usize, down: usize) -> Row {
    Row {
        port: 0,
        families: Vec::new(),
        up,
        down,
        write: WRITE,
        read: READ,
        ending: "both",
        greeted: true,
        blocking: true,
        send_buffer: None,
        receive_buffer: None,
    }
}

#[test]
fn between_two_programs_that_hold_the_connection() -> Result<()> {
    on_direct_mesh(|stage| matrix(stage, Ways::DIRECT))
}

#[test]
fn between_a_program_that_holds_the_connection_and_an_agent_for_the_server() -> Result<()> {
    on_direct_mesh(|stage| {
        let bare = stage.cluster.pod("server-b")?;
        matrix(&stage.between(&stage.client, &bare), Ways::client_only(BARE))
    })
}

#[test]
fn between_an_agent_for_the_client_and_a_program_that_holds_the_connection() -> Result<()> {
    on_direct_mesh(|stage| {
        let bare = stage.cluster.pod("client-a")?;
        matrix(&stage.between(&bare, &stage.server), Ways::server_only(BARE))
    })
}

fn all_rows() -> Vec<Row> {
    let mut rows = sizes();
    rows.extend(paces());
    rows.extend(calls());
    rows.extend(endings());
    rows.extend(mixes());
    for (at, (row, port)) in rows.iter_mut().zip(FIRST_PORT..).enumerate() {
        row.port = port;
        // Emulated, each is called over one of the families.
        row.families = amount(vec![4, 6], vec![if at % 2 == 0 { 4 } else { 6 }]);
    }
    rows
}

/// Every size around those of records and buffers.
fn sizes() -> Vec<Row> {
    let most = or_long(amount(16 << 20, 3 << 20), amount(256 << 20, 32 << 20));
    let sizes = [0, 1, 2, 16_383, 16_384, 16_385, 65_535, 65_536, 65_537, 1_000_003, most];
    let mut rows: Vec<Row> = sizes.map(|size| row(size, size / 2 + 1)).to_vec();
    // At once, so that an end may come before the server's agent has given the connection away.
    rows.extend([0, 1, 16_384].map(|size| Row { greeted: false, ..row(size, size) }));
    rows.push(Row { greeted: false, ..row(amount(1_000_003, 300_003), 0) });
    rows
}

/// Small buffers, slow readers, slow writers, the smallest and the largest writes.
fn paces() -> Vec<Row> {
    let (many, few) = (or_long(amount(1_000_000, 60_000), amount(10_000_000, 600_000)), amount(20_000, 10_000));
    let buffers = [(Some(4096), None, many), (Some(4096), Some(1 << 16), many), (Some(2048), Some(2048), few)];
    let manners = [(WRITE, READ), (WRITE, SLOW_READ), (SLOW_WRITE, READ)];
    let mut rows = Vec::new();
    for (send_buffer, receive_buffer, size) in buffers {
        for (write, read) in manners {
            rows.push(Row { send_buffer, receive_buffer, write, read, ..row(size, size / 3) });
        }
    }
    let (ones, whole) = (amount(5000, 500), amount(12 << 20, 1 << 20));
    rows.push(Row { write: Manner("send", 1, 0), ..row(ones, ones) });
    rows.push(Row { write: Manner("send", 1, 0), read: Manner("receive", 1, 0), ..row(ones, ones) });
    rows.push(Row { write: Manner("send", whole, 0), read: Manner("receive", whole, 0), ..row(whole, whole / 2) });
    rows
}

/// Every call that moves bytes, on sockets that block and on such that do not.
fn calls() -> Vec<Row> {
    let size = or_long(amount(1_500_001, 200_001), amount(30_000_001, 3_000_001));
    let mut rows = Vec::new();
    for blocking in [true, false] {
        for how in ["send", "more", "scattered", "sendfile", "splice"] {
            rows.push(Row { write: Manner(how, 100_000, 0), blocking, ..row(size, size / 2) });
        }
        for how in ["receive", "scattered", "peek", "splice"] {
            rows.push(Row { read: Manner(how, 30_000, 0), blocking, ..row(size, size / 2) });
        }
    }
    rows.push(Row { read: Manner("whole", 50_000, 0), ..row(size, size / 2) });
    rows.push(Row { write: Manner("sendfile", size, 0), read: Manner("splice", 1 << 20, 0), ..row(size, size / 2) });
    rows
}

/// Half-closed, read late, closed with everything on its way, reset.
fn endings() -> Vec<Row> {
    let (question, answer) = (100_000, amount(3_000_000, 300_000));
    let ending = |ending: &'static str, up: usize, down: usize| Row { ending, ..row(up, down) };
    let mut rows = vec![ending("client-first", question, answer), ending("server-first", answer, question)];
    // Less than what the buffers on the way hold, so that the writer can close while nothing is read.
    let small = |row: Row| Row { send_buffer: Some(8192), receive_buffer: Some(8192), ..row };
    rows.extend([small(ending("client-late", 20_000, 0)), small(ending("server-late", 0, 20_000))]);
    for blocking in [true, false] {
        for (name, up, down) in [("client-closes", answer, 0), ("server-closes", 0, answer)] {
            let closes = Row { blocking, ..ending(name, up, down) };
            rows.push(closes.clone());
            // A record that TCP has room for a part of only, when it is closed.
            rows.push(Row { send_buffer: Some(1 << 16), read: SLOW_READ, ..closes });
        }
    }
    // What kernel TLS has taken last is a record of which TCP has a part only: without help it would be lost, in about every second try.
    for turn in 0..or_long(amount(2, 6), 40) {
        let all = amount(8 << 20, 1 << 20);
        for (name, up, down) in [
            ("client-fills-and-closes", all, 0),
            ("server-fills-and-closes", 0, all),
            ("client-fills-and-shuts", all, 0),
            ("server-fills-and-shuts", 0, all),
        ] {
            let write = Manner("send", [5_000, 20_000, 1 << 16][turn % 3], 0);
            rows.push(Row { write, blocking: false, send_buffer: Some(1 << 16), ..ending(name, up, down) });
        }
    }
    for size in [6, 50_000] {
        for (name, up, down) in [
            ("client-resets", size, 0),
            ("server-resets", 0, size),
            ("client-half-resets", size, 0),
            ("server-half-resets", 0, size),
        ] {
            rows.push(ending(name, up, down));
        }
    }
    rows
}

/// Any mix of sizes, buffers and manners; the same ones each time, as the failure of one is to be seen again.
fn mixes() -> Vec<Row> {
    let most: usize = or_long(amount(2_000_000, 150_000), amount(20_000_000, 1_500_000));
    let buffers = || proptest::option::of(32_000_usize..200_000);
    let manner = || (1_000_usize..100_000, prop_oneof![Just(0), 50_000_usize..500_000]);
    let cases = (0..most, 0..most, buffers(), buffers(), manner(), manner(), any::<bool>());
    let rng = TestRng::deterministic_rng(RngAlgorithm::ChaCha);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    let count = or_long(amount(12, 4), amount(100, 30));
    // A strategy of ranges always has a value.
    let drawn = (0..count).filter_map(|_| cases.new_tree(&mut runner).ok());
    drawn
        .map(|tree| {
            let (up, down, send_buffer, receive_buffer, write, read, blocking) = tree.current();
            let (write, read) = (Manner("send", write.0, write.1), Manner("receive", read.0, read.1));
            Row { write, read, blocking, send_buffer, receive_buffer, ..row(up, down) }
        })
        .collect()
}

/// Runs all rows between the two pods, and asks both agents for the way that each has taken.
fn matrix(stage: &Stage<'_>, ways: Ways) -> Result<()> {
    let rows = all_rows();
    let (plan, patience) = (serde_json::to_string(&rows)?, seconds(or_long(20, 100)).as_secs().to_string());
    let mut command = stage.server.command(PYTHON);
    let server = stage.server.serve("transfer", script(&mut command, &["serve", &patience, &plan]), FIRST_PORT)?;
    stage.wait_said(&server, "listening")?;
    let before = stage.now()?;
    let (v4, v6) = (stage.server.v4.to_string(), stage.server.v6.to_string());
    let mut command = stage.client.command(PYTHON);
    let output = output(script(&mut command, &["call", &patience, &plan, &v4, &v6]), seconds(or_long(100, 1_000)))?;
    let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
    // One look shall tell all that is wrong.
    let mut wrong: Vec<String> = Vec::new();
    for row in &rows {
        for family in Family::BOTH.into_iter().filter(|family| row.families.contains(&number(*family))) {
            let good = format!("{} {} ok", row.port, number(family));
            // Of what went wrong at the client, nobody else need be asked.
            if !said.lines().any(|line| line == good) {
                wrong.push(format!("{row:?} over {}", family.as_str()));
                continue;
            }
            let judged = stage
                .wait_said(&server, &format!("{good}\n"))
                .and_then(|()| judge(stage, row, family, ways, before))
                .and_then(|()| all_came(row, family, &[said.as_str(), &server.log()]));
            if let Err(error) = judged {
                wrong.push(format!("{row:?} over {}: {error:#}", family.as_str()));
            }
        }
    }
    let told = |text: &str| text.lines().filter(|line| !line.ends_with(" ok")).collect::<Vec<_>>().join("\n");
    let well = output.status.success() && wrong.is_empty() && !server.log().contains("WRONG");
    ensure!(
        well,
        "{}\n--- the client ended with {}, and said\n{}\n--- the server said\n{}",
        wrong.join("\n"),
        output.status,
        told(&said),
        told(&server.log())
    );
    Ok(())
}

/// The way of a row's connection, by both agents' word.
fn judge(stage: &Stage<'_>, row: &Row, family: Family, ways: Ways, before: (usize, usize)) -> Result<()> {
    // The kernel takes no keys for a connection that has been ended by the other side already.
    let server = if row.greeted || ways.server != Way::Direct { ways.server } else { Way::Either };
    let route = Route {
        client: &stage.client,
        server: &stage.server,
        family,
        port: row.port,
        connections: Count::Exactly(1),
        ways: Ways { client: ways.client, server },
        counted: !row.ending.contains("reset"),
    };
    stage.taken(before, route).map(drop)
}

/// Where a program sends as much as it can, the other has got as much.
fn all_came(row: &Row, family: Family, logs: &[&str]) -> Result<()> {
    let told = |word: &str| {
        let prefix = format!("{} {} {word} ", row.port, number(family));
        logs.iter().flat_map(|log| log.lines()).find_map(|line| line.strip_prefix(&prefix)?.parse::<usize>().ok())
    };
    let (sent, got) = (told("sent"), told("got"));
    ensure!(sent.is_some() == row.ending.contains("fills"), "nobody said how much was sent");
    ensure!(sent == got, "{sent:?} bytes were sent, and {got:?} came");
    Ok(())
}

fn script<'a>(command: &'a mut Command, words: &[&str]) -> &'a mut Command {
    let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/transfer.py");
    command.arg("-B").arg(program).args(words)
}

fn number(family: Family) -> u8 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}
