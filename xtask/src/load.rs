//! `cargo xtask load`: builds the agent and becomes it, on this host. Building is left to `build`.

use std::{os::unix::process::CommandExt, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use crate::{
    build,
    step::{self, describe},
};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Builds what changed and runs `marline agent --config DIR` in the foreground, as this user (the agent needs root). Ctrl-C ends it;
captured pods then stay closed rather than open, until the next agent takes them over.

  cargo xtask load --config /etc/marline
  RUST_LOG=debug cargo xtask load --config ./mesh -- --help")]
pub(crate) struct Args {
    /// Folder with the agent's configuration
    #[arg(long, value_name = "DIR")]
    config: PathBuf,
    /// Build with optimisations
    #[arg(long)]
    release: bool,
    /// Further arguments for the agent
    #[arg(last = true)]
    arguments: Vec<String>,
}

/// Returns only if it cannot become the agent.
pub(crate) fn run(args: &Args) -> Result<()> {
    let agent = build::agent(args.release)?;
    let mut command = Command::new(&agent);
    command.args(["agent", "--config"]).arg(&args.config).args(&args.arguments);
    step::say(&format!("running {}", describe(&command)));
    Err(command.exec()).with_context(|| format!("cannot run {}", agent.display()))
}
