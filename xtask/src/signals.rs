//! Ctrl-C and its kin, held back so that what was started can be ended first. What to end is left to whoever waits.

use std::{
    fmt, io,
    process::{Child, Command},
};

use anyhow::{Context, Result};
use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
    signalfd::{SfdFlags, SignalFd},
};

/// While this lives, SIGINT, SIGTERM and SIGHUP do not kill this process but are reported by `pending`.
/// Take it before starting threads: they inherit it. Children would as well, and never hear a SIGTERM: start them with `spawn`.
pub(crate) struct Signals {
    old: SigSet,
    fd: SignalFd,
}

/// The error of whoever stopped because of a signal; `main` makes the exit code of a shell from it.
#[derive(Debug)]
pub(crate) struct Interrupted(pub Signal);

impl fmt::Display for Interrupted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "interrupted by {}", self.0)
    }
}

impl std::error::Error for Interrupted {}

impl Signals {
    pub(crate) fn take() -> Result<Self> {
        let mut set = SigSet::empty();
        for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
            set.add(signal);
        }
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        let fd = SignalFd::with_flags(&set, flags).context("cannot watch for signals")?;
        let old = set.thread_swap_mask(SigmaskHow::SIG_BLOCK).context("cannot hold signals back")?;
        Ok(Self { old, fd })
    }

    /// Starts a child that hears signals as it would without us. For a moment so do we: a signal then kills us as it used to.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        let held = self.old.thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
        let child = command.spawn();
        held.thread_set_mask()?;
        child
    }

    /// The signal that came since the last look.
    pub(crate) fn pending(&self) -> Option<Signal> {
        let info = self.fd.read_signal().ok().flatten()?;
        Signal::try_from(i32::try_from(info.ssi_signo).ok()?).ok()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        let _ = self.old.thread_set_mask();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn children_hear_what_is_held_back_here() {
        let blocked = |child: Child| String::from_utf8(child.wait_with_output().unwrap().stdout).unwrap();
        let ask = || {
            let mut command = Command::new("grep");
            command.args(["SigBlk", "/proc/self/status"]).stdout(Stdio::piped());
            command
        };
        let before = blocked(ask().spawn().unwrap());
        let signals = Signals::take().unwrap();
        assert_eq!(blocked(signals.spawn(&mut ask()).unwrap()), before);
        // Otherwise this test proves nothing.
        assert_ne!(blocked(ask().spawn().unwrap()), before);
    }

    #[test]
    fn a_signal_that_is_held_back_is_told_once() {
        let signals = Signals::take().unwrap();
        assert_eq!(signals.pending(), None);
        nix::sys::signal::raise(Signal::SIGHUP).unwrap();
        assert_eq!(signals.pending(), Some(Signal::SIGHUP));
        assert_eq!(signals.pending(), None);
    }
}
