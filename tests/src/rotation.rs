//! Rotation of a mesh's certificates under load: leaves by themselves, then an intermediate, then the root, as a person would do it, with
//! new files in the CA's directory, put there as Kubernetes does with a Secret. Connections are made all the while, and counted.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Instant,
};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde::Serialize;

use crate::{
    agent::Certificate,
    cluster::{Cluster, Family, Pod, Side},
    config::TRUST_DOMAIN,
    process::{Process, succeed},
    wait::{Look, seconds, wait_for},
};

/// For `ClusterSpec::leaf_lifetime`: so short that leaves are renewed again and again.
pub const LEAF_LIFETIME: &str = "6s";
const PORT: u16 = 7310;
const THREADS: usize = 4;
const FILES: [&str; 4] = ["ca-key.pem", "ca-cert.pem", "root-cert.pem", "cert-chain.pem"];

/// What was done, and what came of the traffic meanwhile.
#[derive(Debug, Serialize)]
pub struct Outcome {
    pub steps: Vec<Step>,
    pub connections: u64,
    pub failures: u64,
    /// What the failed ones said, the first of them.
    pub failed: Vec<String>,
    /// Certificates that were made for workloads.
    pub certificates: u64,
    /// A connection that was made with a certificate of the old root, and lived until that was taken away.
    pub old_connection_reset: bool,
    /// One that was made with a certificate of the new root.
    pub new_connection_lives: bool,
}

#[derive(Debug, Serialize)]
pub struct Step {
    pub what: String,
    pub seconds: f64,
}

impl Outcome {
    /// What is not as it should be.
    #[must_use]
    pub fn faults(&self) -> Vec<String> {
        let mut faults = Vec::new();
        if self.failures > 0 {
            faults.push(format!("{} of {} connections failed: {:?}", self.failures, self.connections, self.failed));
        }
        if self.connections < 50 {
            faults.push(format!("only {} connections were made: this shows little", self.connections));
        }
        if !self.old_connection_reset {
            faults.push("a connection outlived the root that its peer was believed by".to_owned());
        }
        if !self.new_connection_lives {
            faults.push("a connection of the new root was ended with the old one".to_owned());
        }
        faults
    }
}

/// Rotates everything there is in a mesh whose agents run, with leaves of `LEAF_LIFETIME`.
pub fn rotate(cluster: &Cluster, mut say: impl FnMut(&str)) -> Result<Outcome> {
    let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
    let files = CaFiles::of(cluster)?;
    let _served = serve(&server)?;
    let old = call(&client, &server, "old")?;
    let load = knock(&client, &server, "knock")?;
    let mut steps = Vec::new();
    let mut step = |what: &str, work: &mut dyn FnMut() -> Result<()>| -> Result<()> {
        let began = Instant::now();
        work().with_context(|| what.to_owned())?;
        let taken = began.elapsed().as_secs_f64();
        say(&format!("{what} ({taken:.1} s)"));
        steps.push(Step { what: what.to_owned(), seconds: taken });
        Ok(())
    };

    let first = certificates(cluster)?;
    let (issued, started) = (made(cluster)?, certificates(cluster)?);
    step("every leaf was renewed by itself", &mut || {
        wait_certificates(cluster, "other serial numbers", |one| started.iter().all(|old| old.serial != one.serial))
    })?;
    let between = files.scratch("between");
    step("an intermediate under the same root signs", &mut || {
        files.marline(&["ca", "intermediate"], &[&files.scratch("first"), &between])?;
        files.put(cluster, &between)?;
        wait_certificates(cluster, "the intermediate's certificates", |one| {
            !one.signer_replaced && first.iter().all(|old| old.issuer != one.issuer)
        })
    })?;
    let (root, below) = (files.scratch("root"), files.scratch("below"));
    step("a new root is trusted beside the old one", &mut || {
        files.marline(&["ca", "init", "--trust-domain", TRUST_DOMAIN], &[&root])?;
        files.marline(&["ca", "intermediate"], &[&root, &below])?;
        let both = files.variant(&between, &[&between, &root], "between-both")?;
        files.put(cluster, &both)
    })?;
    let before = certificates(cluster)?;
    step("an intermediate of the new root signs", &mut || {
        let both = files.variant(&below, &[&between, &root], "below-both")?;
        files.put(cluster, &both)?;
        wait_certificates(cluster, "the new intermediate's certificates", |one| {
            !one.signer_replaced && before.iter().all(|old| old.issuer != one.issuer)
        })
    })?;
    let new = call(&client, &server, "new")?;
    ensure!(echoes(&old), "the connection of the beginning did not live until its root was taken away: {}", old.log());
    step("the old root is not trusted any more", &mut || files.put(cluster, &below))?;
    wait_for("the connection of the old root to be reset", seconds(20), || {
        let log = old.log();
        Ok(if log.contains("ended") { Look::Done(()) } else { Look::NotYet(tail(&log)) })
    })
    .or_else(|error| if old.log().contains("ended") { Ok(()) } else { Err(error) })?;
    more_knocks(&load, 20)?;
    let new_connection_lives = echoes(&new);
    let (connections, failures) = knocked(&load)?;
    let log = load.log();
    let failed = log.lines().filter(|line| line.starts_with("failed")).take(10).map(str::to_owned).collect();
    let (old_connection_reset, certificates) = (old.log().contains("ended"), made(cluster)?.saturating_sub(issued));
    Ok(Outcome { steps, connections, failures, failed, certificates, old_connection_reset, new_connection_lives })
}

/// Starts what `call` calls.
pub fn serve(server: &Pod) -> Result<Process> {
    server.serve("steady", steady(server).args(["serve", &PORT.to_string()]), PORT)
}

fn steady(pod: &Pod) -> Command {
    program(pod, "steady.py")
}

fn program(pod: &Pod, name: &str) -> Command {
    let mut command = pod.command("/usr/bin/python3");
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs").join(name));
    command
}

/// A connection that lives: the server has to be there (`serve`).
pub fn call(client: &Pod, server: &Pod, name: &str) -> Result<Process> {
    let mut command = steady(client);
    command.arg("call").arg(server.address(Family::V4).to_string()).arg(PORT.to_string());
    let process = Process::start(format!("call {name}"), &mut command, &client.directory.join(format!("{name}.log")))?;
    wait_for("the connection's first echo", seconds(20), || {
        let log = process.log();
        Ok(if log.contains("echoes") { Look::Done(()) } else { Look::NotYet(tail(&log)) })
    })?;
    Ok(process)
}

/// New connections all the while, until `knocked`: what `serve` serves is called.
pub fn knock(client: &Pod, server: &Pod, name: &str) -> Result<Process> {
    let mut command = program(client, "knock.py");
    command.arg(server.address(Family::V4).to_string()).args([PORT.to_string(), THREADS.to_string()]);
    Process::start(format!("knock {name}"), &mut command, &client.directory.join(format!("{name}.log")))
}

/// Waits until the load has made so many more connections, well or not.
pub fn more_knocks(load: &Process, more: u64) -> Result<()> {
    let before = counts(&load.log()).0;
    wait_for(format!("{more} more connections"), seconds(20), || {
        let now = counts(&load.log()).0;
        Ok(if now > before + more { Look::Done(()) } else { Look::NotYet(format!("{}", now - before)) })
    })
}

/// Ends the load. Connections, and how many of them failed.
pub fn knocked(load: &Process) -> Result<(u64, u64)> {
    load.signal(Signal::SIGTERM)?;
    let log = wait_for("the load to be over", seconds(30), || {
        let log = load.log();
        let over = log.lines().any(|line| line.starts_with("over "));
        Ok(if over { Look::Done(log) } else { Look::NotYet(tail(&log)) })
    })?;
    Ok(counts(&log))
}

/// Whether it goes on.
fn echoes(call: &Process) -> bool {
    let before = call.log().lines().count();
    let more = wait_for("another echo", seconds(5), || {
        let log = call.log();
        let goes_on = !log.contains("ended") && log.lines().count() > before;
        Ok(if goes_on { Look::Done(()) } else { Look::NotYet(tail(&log)) })
    });
    more.is_ok()
}

/// Connections and failures as the load has told them last.
fn counts(log: &str) -> (u64, u64) {
    let told = |line: &str| {
        let rest = line.strip_prefix("so far ").or_else(|| line.strip_prefix("over "))?;
        let (connections, failures) = rest.split_once(' ')?;
        Some((connections.parse().ok()?, failures.parse().ok()?))
    };
    log.lines().rev().find_map(told).unwrap_or_default()
}

fn tail(log: &str) -> String {
    log.lines().last().unwrap_or_default().to_owned()
}

fn certificates(cluster: &Cluster) -> Result<Vec<Certificate>> {
    let mut all = Vec::new();
    for agent in cluster.agents() {
        all.extend(agent.certificates()?);
    }
    Ok(all)
}

fn wait_certificates(cluster: &Cluster, what: &str, satisfies: impl Fn(&Certificate) -> bool) -> Result<()> {
    wait_for(format!("all certificates to have {what}"), seconds(40), || {
        let left: Vec<_> = certificates(cluster)?.into_iter().filter(|one| !satisfies(one)).collect();
        Ok(if left.is_empty() { Look::Done(()) } else { Look::NotYet(format!("{left:?}")) })
    })
}

/// Certificates that were seen to be different: what has been issued is counted by its renewals.
fn made(cluster: &Cluster) -> Result<u64> {
    let mut count = 0;
    for agent in cluster.agents() {
        count += agent.log().matches("new certificate").count() as u64;
    }
    Ok(count)
}

/// The CA's directory, which both agents follow, and others beside it for what is to come.
struct CaFiles {
    directory: PathBuf,
    beside: PathBuf,
    program: PathBuf,
}

impl CaFiles {
    /// Keeps what is there as `first`.
    fn of(cluster: &Cluster) -> Result<Self> {
        let directory = cluster.ca_directory();
        let beside = cluster.directory().join("rotation");
        let files = Self { directory, beside, program: cluster.program()? };
        let first = files.scratch("first");
        fs::create_dir_all(&first)?;
        for name in FILES {
            fs::copy(files.directory.join(name), first.join(name)).with_context(|| format!("keeping {name}"))?;
        }
        Ok(files)
    }

    fn scratch(&self, name: &str) -> PathBuf {
        self.beside.join(name)
    }

    fn marline(&self, words: &[&str], paths: &[&Path]) -> Result<()> {
        succeed(Command::new(&self.program).args(words).args(paths), seconds(20)).map(drop)
    }

    /// The CA in `of`, with the roots of several.
    fn variant(&self, of: &Path, roots: &[&Path], name: &str) -> Result<PathBuf> {
        let made = self.scratch(name);
        fs::create_dir_all(&made)?;
        for name in FILES {
            fs::copy(of.join(name), made.join(name))?;
        }
        let mut all = String::new();
        for from in roots {
            all.push_str(&fs::read_to_string(from.join("root-cert.pem"))?);
        }
        fs::write(made.join("root-cert.pem"), all)?;
        Ok(made)
    }

    /// Puts a set in place as the kubelet does: the files lead to `..data/`, and `..data` to the present set. Returns when all agents
    /// have taken it.
    fn put(&self, cluster: &Cluster, set: &Path) -> Result<()> {
        let agents: Vec<_> = cluster.agents().collect();
        let taken = |side: usize| agents.get(side).context("an agent")?.trust_reloads();
        let before = (0..agents.len()).map(taken).collect::<Result<Vec<_>>>()?;
        let fresh = self.directory.join("..data_tmp");
        std::os::unix::fs::symlink(set, &fresh)?;
        fs::rename(&fresh, self.directory.join("..data"))?;
        for name in FILES {
            let file = self.directory.join(name);
            if !file.is_symlink() {
                let link = self.directory.join(format!("..{name}"));
                std::os::unix::fs::symlink(Path::new("..data").join(name), &link)?;
                fs::rename(&link, &file)?;
            }
        }
        for (side, (accepted, _)) in before.into_iter().enumerate() {
            let node = Side::BOTH.get(side).map_or("?", |side| side.letter());
            wait_for(format!("agent {node} to take the new files"), seconds(30), || {
                let (now, _) = taken(side)?;
                Ok(if now > accepted { Look::Done(()) } else { Look::NotYet(format!("{now} taken")) })
            })?;
        }
        self.settled(cluster)
    }

    /// The first time files become links one by one, and a set in between may have been refused: the last word must be that all is taken.
    fn settled(&self, cluster: &Cluster) -> Result<()> {
        for agent in cluster.agents() {
            let log = agent.log();
            let last =
                log.lines().rev().find(|line| line.contains("trusted to vouch") || line.contains("were refused"));
            if last.is_some_and(|line| line.contains("were refused")) {
                bail!("agent {} refused the files: {}", agent.side().letter(), last.unwrap_or_default());
            }
        }
        Ok(())
    }
}
