//! Runs one test binary: relays its output as it comes, counts, and ends it when its time is up.

use std::{
    io::{BufRead, BufReader, Read, Write, stdout},
    os::unix::process::{CommandExt, ExitStatusExt},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc::{self, RecvTimeoutError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use super::{
    suite::{Kind, Suite},
    tally::Tally,
};
use crate::signals::{Interrupted, Signals};

/// What a suite did, and how long it took.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Report {
    pub suite: String,
    pub kernel: String,
    pub tally: Tally,
    pub seconds: u64,
}

/// How to run suites.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Settings {
    /// As it is shown in the table.
    pub kernel: String,
    pub filter: Option<String>,
    pub timeout: Duration,
    pub env: Vec<(String, String)>,
}

/// Runs the suite. A failed test is part of the report; an error means that it could not be run at all, or was interrupted.
pub(crate) fn run(suite: &Suite, settings: &Settings) -> Result<Report> {
    run_into(suite, settings, stdout())
}

fn run_into(suite: &Suite, settings: &Settings, show: impl Write + Send + 'static) -> Result<Report> {
    let started = Instant::now();
    let signals = Signals::take()?;
    let mut command = Command::new(&suite.binary);
    command.current_dir(&suite.cwd).envs(settings.env.iter().cloned());
    command.args(settings.filter.iter()).arg("--show-output");
    if suite.kind != Kind::Unit {
        // Scenarios share the kernel's namespaces, ports and counters.
        command.arg("--test-threads=1");
    }
    // A group of its own: when time is up, what the tests started ends with them.
    command.stdin(Stdio::null()).stdout(Stdio::piped()).process_group(0);
    let mut child = signals.spawn(&mut command).with_context(|| format!("cannot start {}", suite.binary.display()))?;
    let lines = lines(child.stdout.take().context("the test has no standard output")?, show);
    let mut tally = Tally::default();
    let end = started + settings.timeout;
    let how = loop {
        match lines.recv_timeout(Duration::from_millis(100)) {
            Ok(Some(line)) => {
                tally.line(&line);
                continue;
            }
            Ok(None) | Err(RecvTimeoutError::Disconnected) => {
                break unusual(&child.wait().context("cannot wait for the test")?);
            }
            Err(RecvTimeoutError::Timeout) => {}
        }
        if let Some(signal) = signals.pending() {
            finish(&mut child);
            return Err(Interrupted(signal).into());
        }
        // A child that it left behind may keep the pipe open.
        if let Some(status) = child.try_wait().context("cannot wait for the test")?
            && let Err(RecvTimeoutError::Timeout) = lines.recv_timeout(Duration::from_secs(1))
        {
            break unusual(&status);
        }
        if Instant::now() > end {
            break Some(format!("stopped after {} s", settings.timeout.as_secs()));
        }
    };
    finish(&mut child);
    tally.close(how.as_deref());
    Ok(Report {
        suite: suite.name.clone(),
        kernel: settings.kernel.clone(),
        tally,
        seconds: started.elapsed().as_secs(),
    })
}

/// Names of the tests in a suite.
pub(crate) fn list(suite: &Suite, filter: Option<&str>) -> Result<Vec<String>> {
    let mut command = Command::new(&suite.binary);
    command.current_dir(&suite.cwd).args(["--list", "--format", "terse"]).args(filter);
    let output = command.output().with_context(|| format!("cannot start {}", suite.binary.display()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    Ok(text.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect())
}

/// 101 is libtest's way to say that a test failed, which the tally knows already.
fn unusual(status: &ExitStatus) -> Option<String> {
    match (status.code(), status.signal()) {
        (Some(0 | 101), _) => None,
        (Some(code), _) => Some(format!("ended with exit code {code}")),
        (None, signal) => Some(format!("ended by signal {}", signal.unwrap_or_default())),
    }
}

/// Ends the whole group, whatever is left of it.
fn finish(child: &mut Child) {
    if let Ok(group) = i32::try_from(child.id()) {
        let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
    }
    let _ = child.kill();
    let _ = child.wait();
}

/// Shows the bytes at once and passes them on line by line. `None` is the end. An unfinished line is passed on too, as it grows:
/// "test name ... " without a verdict tells which test hangs.
fn lines(from: impl Read + Send + 'static, mut show: impl Write + Send + 'static) -> mpsc::Receiver<Option<String>> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut from = BufReader::new(from);
        let mut pending = Vec::new();
        while let Ok(bytes) = from.fill_buf()
            && !bytes.is_empty()
        {
            let count = bytes.len();
            let _ = show.write_all(bytes).and_then(|()| show.flush());
            pending.extend_from_slice(bytes);
            from.consume(count);
            while let Some(end) = pending.iter().position(|&byte| byte == b'\n') {
                let line: Vec<u8> = pending.drain(..=end).collect();
                let _ = sender.send(Some(String::from_utf8_lossy(&line).trim_end().to_owned()));
            }
            if pending.starts_with(b"test ") && pending.ends_with(b" ... ") {
                let _ = sender.send(Some(String::from_utf8_lossy(&pending).trim_end().to_owned()));
            }
        }
        if !pending.is_empty() {
            let _ = sender.send(Some(String::from_utf8_lossy(&pending).into_owned()));
        }
        let _ = sender.send(None);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(text: &str, seconds: u64) -> Report {
        let file = std::env::temp_dir().join(format!(
            "xtask-suite-{}-{:x}",
            std::process::id(),
            text.len() * 31 + usize::from(text.as_bytes()[9])
        ));
        std::fs::write(&file, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&file, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        let suite = Suite { name: "s".into(), binary: file.clone(), cwd: "/".into(), kind: Kind::Unit };
        let settings =
            Settings { kernel: "k".into(), filter: None, timeout: Duration::from_secs(seconds), env: Vec::new() };
        // Shown, it would be counted by whoever runs this very test.
        let report = run_into(&suite, &settings, std::io::sink()).unwrap();
        std::fs::remove_file(file).unwrap();
        report
    }

    #[test]
    fn a_suite_that_hangs_is_stopped_with_its_children_and_named() {
        let report = script("sleep 60 & printf 'test first ... ok\\ntest second ... '; sleep 60", 1);
        assert_eq!(report.tally.failed, ["(stopped after 1 s during second)"]);
        assert!(report.seconds < 10);
    }

    #[test]
    fn a_crash_is_a_failure_although_no_test_failed() {
        let report = script("printf 'test first ... ok\\ntest crash ... '; kill -SEGV $$", 20);
        assert_eq!(report.tally.failed, ["(ended by signal 11 during crash)"]);
    }

    #[test]
    fn a_child_that_is_left_behind_does_not_hold_the_suite() {
        let report = script("sleep 60 & echo 'test result: ok. 2 passed; 0 failed; 0 ignored'; exit 0", 30);
        assert_eq!((report.tally.passed, report.tally.failed.len()), (2, 0));
        assert!(report.seconds < 10);
    }
}
