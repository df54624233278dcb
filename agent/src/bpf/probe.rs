//! The outbound probe: a process that connects from where a pod's programs do, in their cgroup and their network namespace.
//!
//! `marline internal-probe` runs it; [`super::selftest`] starts it and judges. It is a process because a cgroup is left and
//! entered by whole processes.
use std::{
    io,
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use crate::sys::{cgroup, netns::Netns};

/// How long the probe waits for its connection, in all.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Clone, Debug, PartialEq, Eq, clap::Args)]
pub struct ProbeArgs {
    /// The cgroup to move into
    #[arg(long)]
    pub cgroup: PathBuf,
    /// The network namespace to connect from
    #[arg(long)]
    pub netns: PathBuf,
    /// Where to connect: a documentation address, which nothing in the world answers
    #[arg(long)]
    pub connect: SocketAddr,
}

/// Succeeds if the connection was taken and the hooks hid by whom. Says what went wrong on stderr.
pub fn probe_main(args: &ProbeArgs) -> ExitCode {
    match probe(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(message) => {
            eprintln!("{message}");
            ExitCode::FAILURE
        }
    }
}

fn probe(args: &ProbeArgs) -> Result<(), String> {
    cgroup::enter(&args.cgroup)
        .map_err(|error| format!("cannot enter the cgroup {}: {error}", args.cgroup.display()))?;
    let netns = Netns::open(&args.netns)
        .map_err(|error| format!("cannot open the network namespace {}: {error}", args.netns.display()))?;
    let names = netns.run(|| connect(args.connect)).and_then(|result| result);
    let (peer, own) = names.map_err(|error| format!("connect to {}: {error}", args.connect))?;
    if peer != args.connect {
        return Err(format!("getpeername shows {peer} instead of {}", args.connect));
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
