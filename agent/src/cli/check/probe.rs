//! The probe of `marline check`: a process that connects from where a pod's programs do, in the pods' cgroup and the pod's network namespace,
//! and tells what becomes of the connection, one line of JSON for each event. It is a process because a cgroup is left and entered by
//! whole processes. What the events mean is left to `check`.

use std::{
    io,
    io::{Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::AsFd as _,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use serde::{Deserialize, Serialize};

use crate::sys::{cgroup::enter, netns::Netns};

const PATIENCE: Duration = Duration::from_secs(15);

#[derive(Clone, Debug, clap::Args)]
pub(in crate::cli) struct CheckProbeArgs {
    /// The cgroup to move into
    #[arg(long)]
    pub(super) cgroup: Option<PathBuf>,
    /// The network namespace to connect from
    #[arg(long)]
    pub(super) netns: PathBuf,
    #[arg(long)]
    pub(super) connect: SocketAddr,
    /// What to send when connected
    #[arg(long, allow_hyphen_values = true)]
    pub(super) send: Option<String>,
}

/// What has become of the connection.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Event {
    /// The probe's own troubles.
    Unable(String),
    Connected {
        local: SocketAddr,
        peer: SocketAddr,
    },
    Failed {
        text: String,
        refused: bool,
    },
    Received(usize),
    /// The other end has closed in order.
    Ended,
    Reset(String),
}

/// Until standard input ends, or the connection does.
pub(in crate::cli) fn main(args: &CheckProbeArgs) -> ExitCode {
    match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tell(&Event::Unable(error));
            ExitCode::FAILURE
        }
    }
}

fn run(args: &CheckProbeArgs) -> Result<(), String> {
    if let Some(cgroup) = &args.cgroup {
        enter(cgroup).map_err(|error| format!("cannot enter the cgroup {}: {error}", cgroup.display()))?;
    }
    let netns = Netns::open(&args.netns)
        .map_err(|error| format!("cannot open the network namespace {}: {error}", args.netns.display()))?;
    let connected = netns.run(|| {
        let stream = TcpStream::connect_timeout(&args.connect, PATIENCE)?;
        Ok::<_, io::Error>((stream.local_addr()?, stream.peer_addr()?, stream))
    });
    let connected =
        connected.map_err(|error| format!("cannot enter the network namespace {}: {error}", args.netns.display()))?;
    let (local, peer, mut stream) = match connected {
        Ok(connected) => connected,
        Err(error) => {
            let refused = error.kind() == io::ErrorKind::ConnectionRefused;
            tell(&Event::Failed { text: error.to_string(), refused });
            return Ok(());
        }
    };
    tell(&Event::Connected { local, peer });
    if let Some(text) = &args.send
        && let Err(error) = stream.write_all(text.as_bytes())
    {
        tell(&Event::Reset(error.to_string()));
        return Ok(());
    }
    let (stdin, mut buffer) = (io::stdin(), [0; 16 << 10]);
    loop {
        let mut waiting =
            [PollFd::new(stdin.as_fd(), PollFlags::POLLIN), PollFd::new(stream.as_fd(), PollFlags::POLLIN)];
        match poll(&mut waiting, PollTimeout::NONE) {
            Err(nix::errno::Errno::EINTR) => continue,
            other => other.map_err(|errno| format!("poll: {errno}"))?,
        };
        let [told, came] = waiting.map(|one| one.any().unwrap_or(true));
        if told {
            return Ok(());
        }
        if came {
            match (&stream).read(&mut buffer) {
                Ok(0) => {
                    tell(&Event::Ended);
                    return Ok(());
                }
                Ok(count) => tell(&Event::Received(count)),
                Err(error) => {
                    tell(&Event::Reset(error.to_string()));
                    return Ok(());
                }
            }
        }
    }
}

fn tell(event: &Event) {
    let mut out = io::stdout().lock();
    // Who started the probe may be gone; then it has nobody to tell.
    let _ = writeln!(out, "{}", serde_json::json!(event)).and_then(|()| out.flush());
}
