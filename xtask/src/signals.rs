//! Ctrl-C and its kin, held back so that what was started can be ended first. What to end is left to whoever waits.

use std::fmt;

use anyhow::{Context, Result};
use nix::sys::{
    signal::{SigSet, SigmaskHow, Signal},
    signalfd::{SfdFlags, SignalFd},
};

/// While this lives, SIGINT, SIGTERM and SIGHUP do not kill this process but are reported by `pending`.
/// Take it before starting threads: they inherit it. Children start with a clean mask.
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
