//! `marline keeper`: what people type to start it. The work is the keeper room's.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use nix::unistd::Uid;

use super::failed;
use crate::{keeper, words::with_causes};

#[derive(clap::Args)]
#[command(after_long_help = "\
The keeper holds the notify descriptors of the pods' seccomp filters, so that the agent may be stopped, replaced or killed without
the pods' calls failing: while there is no agent they wait. Start it before the agent and before the pods, restart it never: when
the keeper and the agent are both gone, the filters' calls fail with ENOSYS for good. It keeps nothing but descriptors and needs
a few hundred KiB of memory.

Files in DIR, all root's alone:
  seccomp.sock  where container runtimes (`listenerPath` of a seccomp profile) and `marline run` hand descriptors in
  keeper.sock   where the agent fetches them; of several agents the first has its turn until it ends
  keeper.lock   held by the keeper of this directory

Exit codes: 1 failed, 2 the command line is wrong; it does not end otherwise. SIGTERM ends it at once.

  marline keeper --dir /run/marline")]
pub(super) struct Args {
    /// The directory of its sockets; made if it does not exist
    #[arg(long, default_value = keeper::DIRECTORY)]
    dir: PathBuf,
    /// How long calls wait for an agent, counted from when the last one left (or the pod came); then the kernel carries them out as
    /// if there were no filter, and what the agent left captured is refused
    #[arg(long, default_value = "10s", value_parser = humantime::parse_duration)]
    patience: Duration,
}

pub(super) fn run(args: &Args) -> ExitCode {
    if !Uid::effective().is_root() {
        return failed("the keeper must run as root: it holds other processes' system calls");
    }
    match keeper::serve(&args.dir, args.patience) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed(&with_causes(&error)),
    }
}
