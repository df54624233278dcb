//! One node's keeper as a program: it holds the seccomp listeners of the pods' programs, and outlives the agents that it hands them to.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::{
    cgroup,
    cluster::Side,
    process::{Place, Process},
    wait::{Look, seconds, wait_for},
};

/// Where programs under the filter and container runtimes send their listeners, and where the agent asks for them.
const SOCKETS: [&str; 2] = ["seccomp.sock", "keeper.sock"];

/// A running (or ended) keeper. One that was launched by this process is killed when dropped.
pub struct Keeper {
    side: Side,
    place: Place,
    log: PathBuf,
    /// Not there if the keeper was met: another process has launched it.
    process: Option<Process>,
}

impl Keeper {
    /// Starts the keeper of a node, and waits until both of its sockets are there.
    pub fn launch(side: Side, place: Place, program: &Path, directory: &Path, log: &Path) -> Result<Self> {
        cgroup::create(&place.cgroup)?;
        for socket in SOCKETS.map(|name| directory.join(name)) {
            // What a predecessor has left must not be taken for the new one's.
            match std::fs::remove_file(&socket) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    return Err(error).with_context(|| format!("removing {}", socket.display()));
                }
                _ => {}
            }
        }
        let name = format!("keeper {}", side.letter());
        let mut command = place.command(program);
        // Under emulation an agent takes a while to come back.
        command.args(["keeper", "--patience", "60s", "--dir"]).arg(directory);
        let mut process = Process::start(name.clone(), &mut command, log)?;
        wait_for(format!("{name} to be there"), seconds(20), || {
            if let Some(status) = process.ended()? {
                bail!("{name} ended ({status}) before its sockets were there:\n{}", process.log());
            }
            let missing = SOCKETS.iter().find(|socket| !directory.join(socket).exists());
            Ok(missing.map_or(Look::Done(()), |socket| Look::NotYet(format!("no {socket}"))))
        })?;
        Ok(Self { side, place, log: log.to_owned(), process: Some(process) })
    }

    /// The keeper that an earlier process has launched in this place.
    #[must_use]
    pub fn meet(side: Side, place: Place, log: &Path) -> Self {
        Self { side, place, log: log.to_owned(), process: None }
    }

    #[must_use]
    pub fn side(&self) -> Side {
        self.side
    }

    /// What it runs in, alone.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.place.cgroup
    }

    /// Nothing if no keeper runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        cgroup::processes(&self.place.cgroup).first().copied()
    }

    /// SIGKILL: the listeners that it holds are gone, and with them the direct path of the programs behind them.
    pub fn kill(&mut self) -> Result<()> {
        match &mut self.process {
            Some(process) => process.kill(),
            None => cgroup::remove(&self.place.cgroup),
        }
    }

    /// All that it has written, its predecessors' words before.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// What a reader of a failure wants to see.
    #[must_use]
    pub fn report(&self) -> String {
        format!("--- log of keeper {}\n{}\n", self.side.letter(), self.log())
    }

    /// Lets it outlive this value.
    pub fn detach(self) {
        if let Some(process) = self.process {
            process.detach();
        }
    }
}
