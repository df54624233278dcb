//! `marline cni`: called by a container runtime it is the plugin; typed by a person, or run in a container of the DaemonSet, it installs
//! the plugin and takes it away.

use std::{env, path::PathBuf, process::ExitCode};

use clap::Subcommand;

use super::{WRONG_CONFIGURATION, app, failed, told_to_end};
use crate::{
    cni::{self, chain, install},
    words::with_causes,
};

#[derive(clap::Args)]
#[command(after_long_help = "\
Without a command it is the CNI plugin: a container runtime calls it, with CNI_COMMAND in the environment and its configuration on standard
input. So does a file with the name marline-cni.

  marline cni install --watch                # in the DaemonSet: stays, and puts the plugin back when the CNI rewrites its file
  marline cni uninstall                      # what was there before is there again")]
pub(super) struct Args {
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Copy this program into the directory of plugins, and put it at the end of the chain of the CNI configuration that counts: the first by its
    /// name
    Install {
        #[command(flatten)]
        place: Place,
        /// Where the agent of this node listens, as seen from the node
        #[arg(long, value_name = "PATH", default_value = cni::SOCKET)]
        socket: PathBuf,
        /// For so many seconds a pod's start may wait until the pod is captured
        #[arg(long, value_name = "SECONDS", default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=110))]
        timeout: u64,
        /// Stay, and put the plugin back whenever it is missing, until SIGTERM, which leaves it installed
        #[arg(long)]
        watch: bool,
    },
    /// Take the plugin out of every CNI configuration, and its file away
    Uninstall {
        #[command(flatten)]
        place: Place,
        /// Leave the plugin's file: runtimes that remember a pod's configuration call it once more when the pod ends
        #[arg(long)]
        keep_plugin: bool,
    },
}

#[derive(clap::Args)]
struct Place {
    /// The node's CNI configurations
    #[arg(long, value_name = "DIR", default_value = "/etc/cni/net.d")]
    cni_conf_dir: PathBuf,
    /// The node's CNI plugins
    #[arg(long, value_name = "DIR", default_value = "/opt/cni/bin")]
    cni_bin_dir: PathBuf,
}

impl From<Place> for install::Place {
    fn from(place: Place) -> Self {
        Self { configurations: place.cni_conf_dir, binaries: place.cni_bin_dir }
    }
}

/// As the plugin, if this program has its name: a runtime calls it so, without arguments.
pub(super) fn called() -> Option<ExitCode> {
    let name = env::args_os().next().map(PathBuf::from)?;
    (name.file_name()? == cni::NAME).then(cni::plugin::main)
}

/// `marline cni` without a command. Its standard output is the runtime's, and its log nobody's.
pub(super) fn plugin() -> ExitCode {
    if env::var_os("CNI_COMMAND").is_some() {
        return cni::plugin::main();
    }
    eprintln!(
        "marline: CNI_COMMAND is not set: a container runtime calls `marline cni` as a CNI plugin; people type `marline cni \
         install` or `marline cni uninstall`"
    );
    ExitCode::from(WRONG_CONFIGURATION)
}

/// Whether the plugin is what is asked for.
pub(super) fn is_plugin(args: &Args) -> bool {
    args.command.is_none()
}

pub(super) fn run(args: Args) -> ExitCode {
    match args.command {
        None => plugin(),
        Some(Command::Install { place, socket, timeout, watch }) => {
            let entry = chain::entry(&socket.to_string_lossy(), timeout);
            match if watch { stay(&place.into(), &entry) } else { once(&place.into(), &entry) } {
                Ok(()) => ExitCode::SUCCESS,
                Err(why) => failed(&why),
            }
        }
        Some(Command::Uninstall { place, keep_plugin }) => match install::uninstall(&place.into(), keep_plugin) {
            Ok(changed) => {
                for file in changed {
                    println!("{} is without Marline's plugin", file.display());
                }
                ExitCode::SUCCESS
            }
            Err(error) => failed(&with_causes(&error)),
        },
    }
}

fn once(place: &install::Place, entry: &str) -> Result<(), String> {
    let file = install::install(place, entry).map_err(|error| with_causes(&error))?;
    println!("{} ends with {}: pods that start from now on are captured first", file.display(), cni::NAME);
    Ok(())
}

fn stay(place: &install::Place, entry: &str) -> Result<(), String> {
    let runtime = app::runtime().map_err(|error| with_causes(&error))?;
    runtime.block_on(async {
        tokio::select! {
            biased;
            ended = told_to_end() => ended,
            ended = install::watch(place, entry) => ended.map_err(|error| with_causes(&error)),
        }
    })
}
