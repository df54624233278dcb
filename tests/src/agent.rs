//! One node's agent as a program: started, waited for, asked, stopped, killed. Its words are read from its log, its
//! admin and metrics addresses and its access log, as a user would.

use std::{
    env, fs,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Command, ExitStatus},
    sync::OnceLock,
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use serde::Deserialize;

use crate::{
    access_log::{self, Entry},
    cgroup,
    cluster::{Side, remains},
    config::{Settings, TRUST_DOMAIN},
    http,
    metrics::Exposition,
    process::{Place, Process, output, succeed},
    wait::{Look, seconds, wait_for},
};

const ADMIN: u16 = 15000;
const METRICS: u16 = 15020;
const READINESS: u16 = 15021;

/// How far the agent has come with its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reloads {
    /// Grows with every change that is in force.
    pub generation: u64,
    /// Changes that were refused.
    pub rejected: u64,
}

#[derive(Deserialize)]
struct Workloads {
    generation: u64,
}

#[derive(Deserialize)]
struct Kernel {
    kernel_tls: Vec<String>,
    pump: String,
}

/// A workload's certificate as the agent lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct Certificate {
    pub id: String,
    pub serial: Option<String>,
    pub issuer: Option<String>,
    /// Whether another one signs by now.
    pub signer_replaced: bool,
    /// Where it comes from.
    pub source: String,
    pub failed_renewals: u32,
    pub last_error: Option<String>,
}

/// A pod as the agent lists it.
#[derive(Clone, Debug, Deserialize)]
pub struct PodState {
    pub namespace: String,
    pub name: String,
    pub netns: PathBuf,
    pub identity: String,
    pub state: String,
    pub reason: Option<String>,
}

/// A running (or ended) agent. One that was launched by this process is killed when dropped.
pub struct Agent {
    side: Side,
    place: Place,
    log: PathBuf,
    /// Not there if the agent was met: another process has launched it.
    process: Option<Process>,
    settings: Settings,
}

impl Agent {
    /// Starts the agent of a node in its namespace, outside of its pods' cgroup and in one of its own.
    pub fn launch(side: Side, place: Place, config: &Path, settings: Settings) -> Result<Self> {
        Self::launch_with(&[], side, place, config, settings)
    }

    /// Starts one that waits until the node's agent has ended.
    pub fn launch_waiting(side: Side, place: Place, config: &Path, settings: Settings) -> Result<Self> {
        Self::launch_with(&["--wait"], side, place, config, settings)
    }

    fn launch_with(options: &[&str], side: Side, place: Place, config: &Path, settings: Settings) -> Result<Self> {
        remains::mount_bpf()?;
        cgroup::create(&place.cgroup)?;
        let name = format!("agent {}", side.letter());
        let log = log_of(config);
        let mut command = command(&place, &settings)?;
        command.arg("agent").args(options).arg("--config").arg(config);
        let process = Some(Process::start(name, &mut command, &log)?);
        Ok(Self { side, place, log, process, settings })
    }

    /// The agent that an earlier process has launched in this place.
    #[must_use]
    pub fn meet(side: Side, place: Place, config: &Path, settings: Settings) -> Self {
        Self { side, place, log: log_of(config), process: None, settings }
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

    /// Nothing if no agent runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        cgroup::processes(&self.place.cgroup).first().copied()
    }

    /// All that it has written, its predecessors' words before.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Waits until something of what it has written after the first `skip` bytes satisfies: the log comes a moment after the deed.
    pub fn wait_log(&self, what: &str, skip: usize, satisfies: impl Fn(&str) -> bool) -> Result<String> {
        wait_for(format!("agent {} to log {what}", self.side.letter()), seconds(20), || {
            let said = self.log().get(skip..).unwrap_or_default().to_owned();
            Ok(if satisfies(&said) { Look::Done(said) } else { Look::NotYet(said) })
        })
    }

    /// What it has said about the kernel that it found.
    #[must_use]
    pub fn announcement(&self) -> String {
        let log = self.log();
        let line = log.lines().rev().find(|line| line.contains("probed the kernel")).unwrap_or_default();
        line.split_once("probed").map_or_else(String::new, |(_, rest)| format!("probed{rest}"))
    }

    /// Whether the program has been built anew since it was started.
    #[must_use]
    pub fn is_outdated(&self) -> bool {
        let exe = self.pid().and_then(|pid| fs::read_link(format!("/proc/{pid}/exe")).ok());
        exe.is_some_and(|exe| exe.to_string_lossy().ends_with(" (deleted)"))
    }

    /// Waits until every local pod is captured, tested and has its identity.
    pub fn wait_ready(&mut self) -> Result<()> {
        let node = self.side.letter();
        wait_for(format!("agent {node} to be ready"), seconds(60), || {
            if let Some(status) = self.ended()? {
                bail!("agent {node} ended ({status}) before it was ready");
            }
            Ok(match self.get(READINESS, "/readyz") {
                Ok(response) if response.status == 200 => Look::Done(()),
                Ok(response) => Look::NotYet(format!("{} {}", response.status, response.body.trim())),
                Err(error) => Look::NotYet(format!("{error:#}")),
            })
        })
    }

    /// Whether the readiness address says yes at this moment.
    pub fn is_ready(&self) -> Result<bool> {
        Ok(self.get(READINESS, "/readyz")?.status == 200)
    }

    /// The local pods as the agent sees them.
    pub fn pods(&self) -> Result<Vec<PodState>> {
        let response = self.get(ADMIN, "/pods")?;
        serde_json::from_str(&response.body).with_context(|| format!("/pods was answered with {response:?}"))
    }

    /// The certificates that it holds.
    pub fn certificates(&self) -> Result<Vec<Certificate>> {
        let response = self.get(ADMIN, "/certs")?;
        serde_json::from_str(&response.body).with_context(|| format!("/certs was answered with {response:?}"))
    }

    /// How often it has taken other files of its CA, and refused them.
    pub fn trust_reloads(&self) -> Result<(u64, u64)> {
        let metrics = self.metrics()?;
        let count = |result: &str| sum(&metrics, "marline_trust_reloads_total", &format!("result=\"{result}\"")) as u64;
        Ok((count("accepted"), count("rejected")))
    }

    /// Waits until the agent lists a local pod of this service account as ready, or no longer lists it.
    pub fn wait_pod(&self, pod: &str, there: bool) -> Result<()> {
        let what = if there { "be ready" } else { "be withdrawn" };
        wait_for(format!("the pod {pod} to {what} on node {}", self.side.letter()), seconds(30), || {
            let pods = self.pods()?;
            let found = pods.iter().find(|candidate| candidate.identity.ends_with(&format!("/sa/{pod}")));
            let done = if there { found.is_some_and(|pod| pod.state == "ready") } else { found.is_none() };
            Ok(if done { Look::Done(()) } else { Look::NotYet(format!("{pods:?}")) })
        })
    }

    /// The sum of all series of a metric, 0 if there is none yet.
    pub fn metric(&self, name: &str) -> Result<f64> {
        Ok(sum(&self.metrics()?, name, ""))
    }

    /// All metrics in their text form.
    pub fn metrics(&self) -> Result<String> {
        Ok(self.get(METRICS, "/metrics")?.body)
    }

    /// All metrics, as a strict reader finds them.
    pub fn exposition(&self) -> Result<Exposition> {
        let text = self.metrics()?;
        Exposition::parse(&text).with_context(|| format!("the metrics of agent {}", self.side.letter()))
    }

    /// The answer of its admin address.
    pub fn admin(&self, path: &str) -> Result<http::Response> {
        self.get(ADMIN, path)
    }

    /// Sends bytes to its admin address from inside the node, and gives all that comes back.
    pub fn admin_raw(&self, request: &str) -> Result<String> {
        http::raw(&self.place.netns, SocketAddr::from((Ipv4Addr::LOCALHOST, ADMIN)), request)
    }

    /// What its readiness address says.
    pub fn readiness(&self) -> Result<http::Response> {
        self.get(READINESS, "/readyz")
    }

    /// How far it has come with its configuration.
    pub fn reloads(&self) -> Result<Reloads> {
        let workloads = self.get(ADMIN, "/workloads")?;
        let workloads: Workloads = serde_json::from_str(&workloads.body)
            .with_context(|| format!("/workloads was answered with {workloads:?}"))?;
        let rejected = sum(&self.metrics()?, "marline_config_reloads_total", "result=\"rejected\"") as u64;
        Ok(Reloads { generation: workloads.generation, rejected })
    }

    /// Waits until a change since `before` is in force; that one is refused is an error.
    pub fn wait_reloaded(&self, before: Reloads) -> Result<()> {
        let node = self.side.letter();
        wait_for(format!("agent {node} to take the new configuration"), seconds(30), || {
            let now = self.reloads()?;
            if now.rejected > before.rejected {
                bail!("agent {node} refused the new configuration");
            }
            Ok(if now.generation > before.generation { Look::Done(()) } else { Look::NotYet(format!("{now:?}")) })
        })
    }

    /// Waits until it has refused a change since `before`; that it takes one is an error.
    pub fn wait_rejected(&self, before: Reloads) -> Result<()> {
        let node = self.side.letter();
        wait_for(format!("agent {node} to refuse the new configuration"), seconds(30), || {
            let now = self.reloads()?;
            if now.generation > before.generation {
                bail!("agent {node} took a configuration that it had to refuse");
            }
            Ok(if now.rejected > before.rejected { Look::Done(()) } else { Look::NotYet(format!("{now:?}")) })
        })
    }

    /// All finished connections so far.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        access_log::read(&self.settings.access_log)
    }

    /// Waits until at least `count` of the entries after the first `skip` match, and gives those that do.
    pub fn wait_entries(
        &self,
        what: &str,
        skip: usize,
        count: usize,
        matches: impl Fn(&Entry) -> bool,
    ) -> Result<Vec<Entry>> {
        let node = self.side.letter();
        wait_for(format!("{count} entries about {what} in the access log of node {node}"), seconds(30), || {
            let entries = self.entries()?;
            let later = entries.get(skip..).unwrap_or_default();
            let found: Vec<Entry> = later.iter().filter(|entry| matches(entry)).cloned().collect();
            Ok(if found.len() >= count {
                Look::Done(found)
            } else {
                Look::NotYet(format!("{} of {} new ones", found.len(), later.len()))
            })
        })
    }

    /// Open descriptors, by the kernel's count.
    pub fn descriptors(&self) -> Result<usize> {
        let directory = format!("/proc/{}/fd", self.pid().context("no agent runs")?);
        Ok(fs::read_dir(&directory).with_context(|| directory.clone())?.count())
    }

    /// Resident memory in KiB.
    pub fn resident(&self) -> Result<u64> {
        let file = format!("/proc/{}/status", self.pid().context("no agent runs")?);
        let text = fs::read_to_string(&file).with_context(|| file.clone())?;
        let line = text.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
        line.trim().trim_end_matches(" kB").parse().context("VmRSS is not a number")
    }

    /// SIGKILL: nothing is said, nothing is cleaned up.
    pub fn kill(&mut self) -> Result<()> {
        match &mut self.process {
            Some(process) => process.kill(),
            None => cgroup::remove(&self.place.cgroup),
        }
    }

    /// SIGTERM, and the status it ends with.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.process.as_mut().context("this agent was launched by another process")?.stop()
    }

    /// Waits until it ends by itself.
    pub fn wait_end(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.process.as_mut().context("this agent was launched by another process")?.wait(limit)
    }

    /// Lets it outlive this value.
    pub fn detach(self) {
        if let Some(process) = self.process {
            process.detach();
        }
    }

    /// What it ended with, in words, if it has ended.
    fn ended(&mut self) -> Result<Option<String>> {
        match &mut self.process {
            Some(process) => Ok(process.ended()?.map(|status| status.to_string())),
            None => Ok(self.pid().is_none().then(|| "some time ago".to_owned())),
        }
    }

    /// What a reader of a failure wants to see.
    #[must_use]
    pub fn report(&self) -> String {
        let access = fs::read_to_string(&self.settings.access_log).unwrap_or_default();
        let node = self.side.letter();
        format!(
            "--- log of agent {node}\n{}\n--- access log of agent {node}\n{}\n---\n",
            last_lines(&self.log(), 200),
            last_lines(&access, 50)
        )
    }

    fn get(&self, port: u16, path: &str) -> Result<http::Response> {
        http::get(&self.place.netns, SocketAddr::from((Ipv4Addr::LOCALHOST, port)), path)
    }
}

/// The agent's program: `MARLINE_BIN`, or what was built next to the program that asks.
pub fn binary() -> Result<PathBuf> {
    if let Some(path) = env::var_os("MARLINE_BIN") {
        return Ok(path.into());
    }
    let own = env::current_exe().context("asking for the path of this program")?;
    let found = own.ancestors().skip(1).take(2).map(|directory| directory.join("marline")).find(|path| path.is_file());
    found.with_context(|| format!("no program `marline` near {}; way out: cargo xtask build", own.display()))
}

/// The agent's program for direct paths: `binary` where the kernel keeps TLS records, for without that there is no direct path. Elsewhere
/// the build that uses no records at all, `MARLINE_BIN_WITHOUT_RECORDS` or the one next to the other: it shows the mechanism alone.
pub fn binary_for_direct() -> Result<PathBuf> {
    let binary = binary()?;
    if kernel_keeps_records()? {
        return Ok(binary);
    }
    if let Some(path) = env::var_os("MARLINE_BIN_WITHOUT_RECORDS") {
        return Ok(path.into());
    }
    let found = binary.with_file_name("marline-without-records");
    ensure!(found.is_file(), "there is no {}; way out: cargo xtask build", found.display());
    Ok(found)
}

/// Whether the agent finds kernel TLS here.
pub fn kernel_keeps_records() -> Result<bool> {
    Ok(!kernel()?.kernel_tls.is_empty())
}

/// Whether the agent finds splice(2) to be sound here, and with it sendfile(2) of programs.
pub fn kernel_splices() -> Result<bool> {
    Ok(kernel()?.pump == "splice")
}

/// The agent's own answer, asked for once.
fn kernel() -> Result<&'static Kernel> {
    static ANSWER: OnceLock<Kernel> = OnceLock::new();
    if let Some(answer) = ANSWER.get() {
        return Ok(answer);
    }
    let text = succeed(Command::new(binary()?).args(["kernel", "--json"]), seconds(60))?;
    let kernel: Kernel = serde_json::from_str(&text).with_context(|| format!("`marline kernel` said {text}"))?;
    Ok(ANSWER.get_or_init(|| kernel))
}

/// Makes the authority that both nodes share, once.
pub fn init_ca(settings: &Settings) -> Result<()> {
    if settings.ca.join("ca-key.pem").exists() {
        return Ok(());
    }
    let mut command = Command::new(settings.binary()?);
    command.args(["ca", "init"]).arg(&settings.ca).args(["--trust-domain", TRUST_DOMAIN]);
    succeed(&mut command, seconds(20)).map(|_| ()).context("making the certificate authority")
}

/// What `marline check-config` says of a directory.
pub fn check_config(directory: &Path) -> Result<std::process::Output> {
    output(Command::new(binary()?).arg("check-config").arg(directory), seconds(20))
}

/// The agent's program in its place, for a command to be added.
fn command(place: &Place, settings: &Settings) -> Result<Command> {
    let Some((maker, container)) = &settings.container else {
        return Ok(place.command(settings.binary()?));
    };
    // Does not fork: the agent is alone in its cgroup.
    let mut command = place.command(maker);
    command.arg(serde_json::to_string(container)?).arg(settings.binary()?);
    Ok(command)
}

fn log_of(config: &Path) -> PathBuf {
    config.with_file_name("agent.log")
}

/// The sum of a metric's series that carry the label; `label` empty for all.
fn sum(text: &str, name: &str, label: &str) -> f64 {
    let series = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = if let Some(rest) = rest.strip_prefix('{') {
            let (labels, value) = rest.split_once('}')?;
            labels.contains(label).then_some(value)?
        } else {
            (label.is_empty() && rest.starts_with(' ')).then_some(rest)?
        };
        value.split_whitespace().next()?.parse::<f64>().ok()
    });
    series.sum()
}

fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# TYPE marline_x counter\nmarline_x_total{outcome=\"accepted\",y=\"1\"} 2\n\
                        marline_x_total{outcome=\"accepted\",y=\"2\"} 3\nmarline_x_total{outcome=\"rejected\"} 7\n\
                        marline_x_total_other 100\nmarline_y 4\n";

    #[test]
    fn series_of_one_metric_are_summed_by_label() {
        assert_eq!(sum(TEXT, "marline_x_total", ""), 12.0);
        assert_eq!(sum(TEXT, "marline_x_total", "outcome=\"accepted\""), 5.0);
        assert_eq!(sum(TEXT, "marline_y", ""), 4.0);
        assert_eq!(sum(TEXT, "marline_z", ""), 0.0);
    }
}
