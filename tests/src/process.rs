//! Programs that run in a place: a network namespace and a cgroup. Short ones with a deadline, long ones with a log.

use std::{
    fs::{self, File},
    io::Read,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Output, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sys::signal::{SigSet, SigmaskHow, Signal, kill, killpg},
    unistd::Pid,
};

use crate::wait::{Look, seconds, wait_for};

/// Moves itself into the cgroup ($0), enters the namespace ($1) and becomes the program: one pid from start to end.
const ENTER: &str = r#"echo 0 > "$0/cgroup.procs" || exit 126; netns="$1"; shift; exec nsenter --net="$netns" -- "$@""#;

/// The same, with the names of the mesh's pods in /etc/hosts ($2), seen by this program alone.
const ENTER_WITH_HOSTS: &str = r#"echo 0 > "$0/cgroup.procs" || exit 126; netns="$1"; hosts="$2"; shift 2
exec nsenter --net="$netns" -- unshare --mount sh -c 'mount --bind "$0" /etc/hosts && exec "$@"' "$hosts" "$@""#;

/// Where a program runs.
#[derive(Clone, Debug)]
pub struct Place {
    pub netns: PathBuf,
    pub cgroup: PathBuf,
    /// Set where programs are to run under the seccomp filter that direct paths need.
    pub filter: Option<Filter>,
}

/// How a program gets under the filter: by `marline run`, which hands the filter's listener to the keeper.
#[derive(Clone, Debug)]
pub struct Filter {
    pub marline: PathBuf,
    /// The keeper's directory.
    pub keeper: PathBuf,
}

impl Place {
    /// A command that runs `program` here; arguments are added to it as to any other.
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", ENTER]).arg(&self.cgroup).arg(&self.netns);
        self.filtered(&mut command, program.as_ref());
        command
    }

    /// A command for people: names of pods resolve.
    pub fn command_with_hosts(&self, hosts: &Path, program: impl AsRef<Path>) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", ENTER_WITH_HOSTS]).arg(&self.cgroup).arg(&self.netns).arg(hosts);
        self.filtered(&mut command, program.as_ref());
        command
    }

    fn filtered(&self, command: &mut Command, program: &Path) {
        if let Some(Filter { marline, keeper }) = &self.filter {
            command.arg(marline).args(["run", "--keeper"]).arg(keeper).arg("--");
        }
        command.arg(program);
    }
}

/// Runs a command to its end, with all that it wrote; kills it and fails when the deadline passes.
pub fn output(command: &mut Command, limit: Duration) -> Result<Output> {
    let what = describe(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(command).with_context(|| format!("starting {what}"))?;
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let waited = wait_child(&mut child, &what, limit);
    if waited.is_err() {
        // Already gone is as good as killed.
        let _ = child.kill();
        let _ = child.wait();
    }
    let join = |reader: thread::JoinHandle<Vec<u8>>| reader.join().map_err(|_| anyhow!("reading from {what} panicked"));
    match waited {
        Ok(status) => Ok(Output { status, stdout: join(stdout)?, stderr: join(stderr)? }),
        // The readers are left alone here: a grandchild may hold the pipe open beyond the deadline.
        Err(error) => Err(error),
    }
}

/// Runs a command that has to succeed and gives what it wrote to standard output.
pub fn succeed(command: &mut Command, limit: Duration) -> Result<String> {
    let output = output(command, limit)?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        bail!(
            "{} ended with {}\nstdout: {}\nstderr: {}",
            describe(command),
            output.status,
            stdout.trim(),
            stderr.trim()
        );
    }
    Ok(stdout)
}

/// Starts a child that hears all signals: it would inherit a mask from whoever holds signals back here. For a moment this thread
/// hears them, too: one that comes then ends this process as if it held none back.
pub fn spawn(command: &mut Command) -> Result<Child> {
    let held = SigSet::empty().thread_swap_mask(SigmaskHow::SIG_SETMASK).context("letting signals in")?;
    let child = command.spawn();
    held.thread_set_mask().context("holding signals back again")?;
    Ok(child?)
}

/// A program that runs until it is stopped, with its output in a file. It is killed when dropped, unless detached.
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    detached: bool,
}

impl Process {
    /// Starts a program; what it writes goes to the end of `log`.
    pub fn start(name: impl Into<String>, command: &mut Command, log: &Path) -> Result<Self> {
        let name = name.into();
        let open = || File::options().create(true).append(true).open(log).with_context(|| log.display().to_string());
        // A group of its own: an interrupt typed at the terminal is for the one who started it.
        command.stdin(Stdio::null()).stdout(open()?).stderr(open()?).process_group(0);
        let child = spawn(command).with_context(|| format!("starting {name}"))?;
        Ok(Self { name, child, log: log.to_owned(), detached: false })
    }

    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Lets it outlive this value.
    pub fn detach(mut self) {
        self.detached = true;
    }

    fn id(&self) -> Result<Pid> {
        Ok(Pid::from_raw(i32::try_from(self.pid()).context("a pid beyond 31 bits")?))
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.id()?, signal).with_context(|| format!("sending {signal} to {}", self.name))
    }

    /// Its status if it has ended.
    pub fn ended(&mut self) -> Result<Option<ExitStatus>> {
        self.child.try_wait().with_context(|| format!("asking after {}", self.name))
    }

    /// Waits for it to end by itself.
    pub fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        wait_child(&mut self.child, &self.name, limit).with_context(|| format!("log of {}:\n{}", self.name, self.log()))
    }

    /// SIGKILL to it and to the workers that it has started, and wait for it.
    pub fn kill(&mut self) -> Result<()> {
        if self.ended()?.is_none() {
            // It leads a group of its own.
            killpg(self.id()?, Signal::SIGKILL).with_context(|| format!("killing {}", self.name))?;
            self.child.wait().with_context(|| format!("waiting for {}", self.name))?;
        }
        Ok(())
    }

    /// SIGTERM, and wait for it.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        if let Some(status) = self.ended()? {
            return Ok(status);
        }
        self.signal(Signal::SIGTERM)?;
        self.wait(seconds(30))
    }

    /// Waits until something listens on the port in the namespace, or fails when the program has ended before.
    pub fn listens(&mut self, netns: &Path, port: u16) -> Result<()> {
        let name = self.name.clone();
        wait_for(format!("{name} to listen on port {port}"), seconds(20), || {
            if let Some(status) = self.ended()? {
                bail!("{name} ended ({status}) before it listened:\n{}", self.log());
            }
            let ports = crate::netns::listening(netns)?;
            Ok(if ports.contains(&port) { Look::Done(()) } else { Look::NotYet(format!("listening: {ports:?}")) })
        })
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.detached {
            // What cannot be killed here goes with the cluster's cgroup.
            let _ = self.kill();
        }
    }
}

pub(crate) fn wait_child(child: &mut Child, what: &str, limit: Duration) -> Result<ExitStatus> {
    wait_for(format!("{what} to end"), limit, || {
        Ok(child.try_wait()?.map_or_else(|| Look::NotYet("still running".into()), Look::Done))
    })
}

fn collect(source: Option<impl Read + Send + 'static>) -> thread::JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut source) = source {
            // A pipe that breaks ends the text: what was read until then is what there is.
            let _ = source.read_to_end(&mut bytes);
        }
        bytes
    })
}

/// The command without the wrapping that puts it into its place.
fn describe(command: &Command) -> String {
    let mut words: Vec<String> = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|word| word.to_string_lossy().into_owned()));
    let skip = match words.get(2).map(String::as_str) {
        Some(ENTER) => 5,
        Some(ENTER_WITH_HOSTS) => 6,
        _ => 0,
    };
    words.get(skip..).unwrap_or_default().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_beyond_its_deadline_is_killed_and_named() {
        let outcome = output(Command::new("sleep").arg("100"), Duration::from_millis(50));
        assert!(outcome.is_err_and(|error| error.to_string().contains("sleep 100")));
    }

    #[test]
    fn a_failing_command_reports_its_own_words() {
        let outcome = succeed(Command::new("sh").args(["-c", "echo the reason >&2; exit 3"]), seconds(5));
        let text = outcome.map_err(|error| error.to_string());
        assert!(text.as_ref().is_err_and(|text| text.contains("the reason") && text.contains('3')), "{text:?}");
    }
}
