//! How many system calls processes make, counted by perf at the kernel's tracepoint. Counting costs time, so it has passes of its own,
//! of which nothing else is used. perf counts threads that begin or end meanwhile, too.

use std::{
    fs::{self, File, OpenOptions},
    io::{BufRead, BufReader, Write},
    os::fd::AsFd,
    path::Path,
    process::{Child, Command, Stdio},
};

use anyhow::{Context, Result, bail, ensure};
use nix::{
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        signal::{Signal, kill},
        stat::Mode,
    },
    unistd::{Pid, mkfifo},
};
use tempfile::TempDir;

const EVENT: &str = "raw_syscalls:sys_enter";

/// perf, which counts until it is asked.
pub struct Trace {
    perf: Child,
    control: File,
    answers: BufReader<File>,
    directory: TempDir,
}

impl Trace {
    /// Begins to count the calls of these processes. When this returns, each counts.
    pub fn begin(processes: &[u32]) -> Result<Self> {
        ensure!(!processes.is_empty(), "no process is there whose system calls could be counted");
        let directory = TempDir::with_prefix("marline-bench-").context("making a directory for perf")?;
        let (control, answers) = (directory.path().join("control"), directory.path().join("answers"));
        for path in [&control, &answers] {
            mkfifo(path, Mode::S_IRWXU).with_context(|| format!("making {}", path.display()))?;
        }
        // Held open both ways, so that nothing here waits for perf to open them: it may be unable to start.
        let open = |path: &Path| OpenOptions::new().read(true).write(true).open(path).context("opening perf's pipes");
        let (control_file, answers_file) = (open(&control)?, open(&answers)?);
        let list = processes.iter().map(u32::to_string).collect::<Vec<_>>().join(",");
        let perf = Command::new("perf")
            .args(["stat", "-x,", "-D", "-1", "-e", EVENT, "-p", &list])
            .arg(format!("--control=fifo:{},{}", control.display(), answers.display()))
            .arg("-o")
            .arg(directory.path().join("counted"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("said")).context("making a file for what perf says")?)
            .spawn()
            .context("starting perf")?;
        let mut trace = Self { perf, control: control_file, answers: BufReader::new(answers_file), directory };
        trace.order("enable")?;
        Ok(trace)
    }

    /// Ends the counting and returns the number of calls.
    pub fn end(mut self) -> Result<u64> {
        self.order("disable")?;
        kill(Pid::from_raw(self.perf.id().cast_signed()), Signal::SIGINT).context("ending perf")?;
        self.perf.wait().context("waiting for perf's end")?;
        let text = fs::read_to_string(self.directory.path().join("counted")).context("reading what perf counted")?;
        calls(&text).with_context(|| format!("perf did not count: {}", text.trim()))
    }

    fn order(&mut self, word: &str) -> Result<()> {
        writeln!(self.control, "{word}").with_context(|| format!("telling perf to {word}"))?;
        let answers = self.answers.get_ref();
        let mut ready = [PollFd::new(answers.as_fd(), PollFlags::POLLIN)];
        let seconds = PollTimeout::try_from(10_000_u32).unwrap_or(PollTimeout::MAX);
        if poll(&mut ready, seconds).context("waiting for perf")? == 0 {
            let said = fs::read_to_string(self.directory.path().join("said")).unwrap_or_default();
            bail!("perf did not {word} within 10 s : {}", said.trim());
        }
        let mut line = String::new();
        self.answers.read_line(&mut line).context("hearing from perf")?;
        ensure!(line.trim_matches(['\0', '\n']) == "ack", "perf answered {line:?} to {word}");
        Ok(())
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // After `end` it is gone already.
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}

/// The count in perf's CSV. Nobody having called is written as not counted, with all of the time enabled.
fn calls(text: &str) -> Option<u64> {
    let line = text.lines().find(|line| line.contains(EVENT))?;
    let count = line.split(',').next()?;
    if count == "<not counted>" { Some(0) } else { count.parse().ok() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_count_is_the_first_field_and_what_is_not_supported_is_no_count() {
        assert_eq!(calls("# started on\n\n1760,,raw_syscalls:sys_enter,17949803,100.00,,\n"), Some(1760));
        assert_eq!(calls("<not counted>,,raw_syscalls:sys_enter,0,100.00,,\n"), Some(0));
        assert_eq!(calls("<not supported>,,raw_syscalls:sys_enter,0,100.00,,\n"), None);
        assert_eq!(calls(""), None);
    }

    #[test]
    fn without_a_process_nothing_is_counted() {
        assert!(Trace::begin(&[]).is_err());
    }
}
