//! The outbound probe: a process that connects from where pods' programs do, in their cgroup and each pod's network namespace.
//!
//! `marline internal-probe` runs it; [`super::prober`] starts it and asks, [`super::selftest`] judges. It is a process because a cgroup is left and
//! entered by whole processes, and one for many pods because starting a process costs more than all that it does.
use std::{
    io::{self, BufRead, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::sys::{cgroup, netns::Netns};

/// How long the probe waits for each connection, in all.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct ProbeArgs {
    /// The cgroup to move into
    #[arg(long)]
    pub cgroup: PathBuf,
}

/// A line of standard input.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Request {
    /// The network namespace to connect from.
    pub netns: PathBuf,
    /// Where to connect: a documentation address, which nothing in the world answers.
    pub connect: SocketAddr,
}

/// Begins a line of standard output that is an answer; the rest is what went wrong, or empty.
pub const ANSWER: &str = "probe: ";

/// Answers until its input ends. An answer is good if the connection was taken and the hooks hid by whom.
pub fn probe_main(args: &ProbeArgs) -> ExitCode {
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &ProbeArgs) -> Result<(), String> {
    cgroup::enter(&args.cgroup)
        .map_err(|error| format!("cannot enter the cgroup {}: {error}", args.cgroup.display()))?;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| format!("standard input: {error}"))?;
        let asked = serde_json::from_str(&line).map_err(|error| format!("not a request: {error}"))?;
        let wrong = probe(&asked).err().unwrap_or_default().replace('\n', " ");
        writeln!(io::stdout(), "{ANSWER}{wrong}").map_err(|error| format!("standard output: {error}"))?;
    }
    Ok(())
}

fn probe(asked: &Request) -> Result<(), String> {
    let netns = Netns::open(&asked.netns)
        .map_err(|error| format!("cannot open the network namespace {}: {error}", asked.netns.display()))?;
    let names = netns.run(|| connect(asked.connect)).and_then(|result| result);
    let (peer, own) = names.map_err(|error| format!("connect to {}: {error}", asked.connect))?;
    if peer != asked.connect {
        return Err(format!("getpeername shows {peer} instead of {}", asked.connect));
    }
    if own.ip().is_loopback() {
        return Err(format!("getsockname shows the loopback address {own}"));
    }
    Ok(())
}

fn connect(to: SocketAddr) -> io::Result<(SocketAddr, SocketAddr)> {
    let stream = TcpStream::connect_timeout(&to, PATIENCE)?;
    Ok((stream.peer_addr()?, stream.local_addr()?))
}
