//! Servers and clients by the libraries that languages bring, with both ends under the filter: Go, Node, Java NIO, Python's asyncio and its
//! threads, Perl's prefork. The programs are in `programs/`; each client compares what came back with what it sent.

use std::{env, path::PathBuf, process::Command};

use anyhow::{Result, ensure};
use marline_tests::{
    amount::{amount, families},
    cluster::{Family, Pod},
    direct::{Stage, on_direct_mesh},
    process::output,
    wait::seconds,
};

const PORT: u16 = 7000;
const PYTHON: &str = "/usr/bin/python3";

/// A server and its client, and the words of their command lines.
struct Runtime<'a> {
    program: &'a str,
    before: &'a [String],
    /// Of each connection, natively.
    size: u32,
    /// For the choice of a family in the VM.
    turn: usize,
}

/// How many connections are opened at once.
fn connections() -> usize {
    amount(10, 3)
}

#[test]
fn asyncio_servers_and_clients() -> Result<()> {
    echo(&Runtime { program: PYTHON, before: &[program("runtime_asyncio.py")], size: 100_000, turn: 0 })
}

#[test]
fn python_threads_with_keep_alive() -> Result<()> {
    echo(&Runtime { program: PYTHON, before: &[program("runtime_threads.py")], size: 50_000, turn: 1 })
}

#[test]
fn node_servers_and_clients() -> Result<()> {
    if !there("node")? {
        println!("SKIPPED: node_servers_and_clients: there is no node on this machine");
        return Ok(());
    }
    echo(&Runtime { program: "node", before: &[program("runtime.js")], size: 100_000, turn: 0 })
}

#[test]
fn java_channels_that_are_registered_before_they_connect() -> Result<()> {
    let Some(classes) = env::var_os("MARLINE_JAVA_CLASSES").map(PathBuf::from).filter(|classes| classes.is_dir())
    else {
        println!(
            "SKIPPED: java_channels_that_are_registered_before_they_connect: programs/Runtime.java is not compiled; \
             `cargo xtask test` does it"
        );
        return Ok(());
    };
    let before = ["-XX:TieredStopAtLevel=1", "-cp", &classes.to_string_lossy(), "Runtime"].map(str::to_owned);
    echo(&Runtime { program: "java", before: &before, size: 100_000, turn: 1 })
}

#[test]
fn go_servers_and_clients_with_keep_alive() -> Result<()> {
    let Some(program) = env::var_os("MARLINE_GO_PROGRAM").map(PathBuf::from).filter(|program| program.is_file()) else {
        println!(
            "SKIPPED: go_servers_and_clients_with_keep_alive: programs/runtime.go is not built; `cargo xtask test` builds it"
        );
        return Ok(());
    };
    let program = program.to_string_lossy();
    on_direct_mesh(|stage| {
        let mut command = stage.server.command(&*program);
        let server = stage.server.serve("go", command.args(["serve", &PORT.to_string()]), PORT)?;
        for family in families(0) {
            let url = format!("http://{}/", stage.server.socket(family, PORT));
            let (count, size) = (connections().to_string(), amount("50000", "10000"));
            let words = ["call", &url, &count, "5", size];
            let said = format!("exact: {count} connections");
            calls(stage, family, connections(), &said, &mut client(&stage.client, &program, &words))?;
        }
        ensure!(!server.log().contains("WRONG"), "the server said:\n{}", server.log());
        Ok(())
    })
}

#[test]
fn perl_children_that_all_block_in_accept() -> Result<()> {
    on_direct_mesh(|stage| {
        let (port, prefork) = (PORT.to_string(), program("prefork.pl"));
        let mut command = stage.server.command("perl");
        let server = stage.server.serve("prefork", command.args([&prefork, &port, "4"]), PORT)?;
        for family in families(1) {
            let address = stage.server.address(family).to_string();
            // More than there are children.
            let connections = amount(12, 6);
            let count = connections.to_string();
            let words = [&program("runtime_asyncio.py"), "call", &address, &port, &count, "20000"];
            let said = format!("exact: {count} connections");
            calls(stage, family, connections, &said, &mut client(&stage.client, PYTHON, &words))?;
        }
        ensure!(!server.log().contains("WRONG"), "the server said:\n{}", server.log());
        Ok(())
    })
}

/// The runtime's server and client, over both families.
fn echo(runtime: &Runtime<'_>) -> Result<()> {
    let Runtime { program, before, size, turn } = runtime;
    let connections = connections();
    on_direct_mesh(|stage| {
        let size = amount(*size, size / 4).to_string();
        let (port, count) = (PORT.to_string(), connections.to_string());
        let mut command = stage.server.command(program);
        let server = stage.server.serve("runtime", command.args(*before).args(["serve", &port]), PORT)?;
        for family in families(*turn) {
            let address = stage.server.address(family).to_string();
            let mut command = client(&stage.client, program, &[]);
            command.args(*before).args(["call", &address, &port, &count, &size]);
            calls(stage, family, connections, &format!("exact: {count} connections"), &mut command)?;
        }
        ensure!(!server.log().contains("WRONG"), "the server said:\n{}", server.log());
        Ok(())
    })
}

/// Runs a client to its end: it says the words, and both agents say which way its connections went.
fn calls(stage: &Stage<'_>, family: Family, connections: usize, words: &str, command: &mut Command) -> Result<()> {
    let route = stage.route(family, PORT, connections);
    let (said, _) = stage.flow(route, || {
        let output = output(command, seconds(60))?;
        let said = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        ensure!(output.status.success(), "the client ended with {}:\n{said}", output.status);
        Ok(said)
    })?;
    ensure!(said.contains(words), "{words} is not what the client said:\n{said}");
    Ok(())
}

fn client(pod: &Pod, program: &str, words: &[&str]) -> Command {
    let mut command = pod.command(program);
    command.args(words);
    command
}

fn there(program: &str) -> Result<bool> {
    Ok(output(Command::new("which").arg(program), seconds(20))?.status.success())
}

fn program(name: &str) -> String {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs").join(name).to_string_lossy().into_owned()
}
