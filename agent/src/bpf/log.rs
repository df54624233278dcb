//! What the kernel programs have to say, into the agent's own log under the target `ebpf`.
//!
//! The reader must live as long as programs may be loaded: they refer to its map.
use std::{
    sync::{Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime,
    sync::oneshot,
};
use tracing::{Level, debug, enabled, error, info, trace, warn};

use super::error::BpfError;

/// How many lines a second are written at most of what pods and peers can make as often as they like, and of warnings.
const LINES: u32 = 200;

/// Which statements the kernel programs carry out at all. That is fixed when they are loaded, and the log's level may be changed after; at
/// `debug` they tell of refused connections only, so nothing is lost for those that are not.
pub(super) fn level() -> u8 {
    aya_log::Level::Debug as u8
}

/// Reads until it is dropped, on a thread of its own: reading ends only when the programs pause, and others can keep them from that.
#[derive(Debug)]
pub(super) struct LogReader {
    _stop: oneshot::Sender<()>,
}

impl LogReader {
    pub(super) fn start(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        let cannot = |source| BpfError::file("cannot poll", "the log of the kernel programs")(source);
        let reader = EbpfLogger::init_with_logger(ebpf, ToTracing::default()).map_err(BpfError::Log)?;
        let runtime = runtime::Builder::new_current_thread().enable_io().build().map_err(cannot)?;
        let inside = runtime.enter();
        #[expect(
            deprecated,
            reason = "its successor is unsafe to call; the reader does give one descriptor, its own, for life"
        )]
        let reader = AsyncFd::with_interest(reader, Interest::READABLE);
        let mut reader = reader.map_err(cannot)?;
        drop(inside);
        let (stop, stopped) = oneshot::channel();
        let read = async move {
            while let Ok(mut ready) = reader.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        };
        let run = move || {
            runtime.block_on(async {
                tokio::select! {
                    () = read => {}
                    _ = stopped => {}
                }
            });
        };
        thread::Builder::new().name("kernel-log".to_owned()).spawn(run).map_err(cannot)?;
        Ok(Self { _stop: stop })
    }
}

/// What is left of a second's lines.
#[derive(Debug, Default)]
struct Budget {
    since: Option<Instant>,
    written: u32,
    left_out: u64,
}

impl Budget {
    /// Whether one more line may be written; with the first of another second comes how many were left out before.
    fn take(&mut self, now: Instant) -> (bool, u64) {
        let mut before = 0;
        if self.since.is_none_or(|since| now.saturating_duration_since(since) >= Duration::from_secs(1)) {
            before = self.left_out;
            *self = Self { since: Some(now), ..Self::default() };
        }
        let may = self.written < LINES;
        if may {
            self.written += 1;
        } else {
            self.left_out += 1;
        }
        (may, before)
    }
}

/// Warnings have a budget of their own: who floods the log at `debug` does not hide them.
#[derive(Default)]
struct ToTracing {
    warnings: Mutex<Budget>,
    others: Mutex<Budget>,
}

impl log::Log for ToTracing {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        match metadata.level() {
            log::Level::Error => enabled!(target: "ebpf", Level::ERROR),
            log::Level::Warn => enabled!(target: "ebpf", Level::WARN),
            log::Level::Info => enabled!(target: "ebpf", Level::INFO),
            log::Level::Debug => enabled!(target: "ebpf", Level::DEBUG),
            log::Level::Trace => enabled!(target: "ebpf", Level::TRACE),
        }
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        let budget = if record.level() <= log::Level::Warn { &self.warnings } else { &self.others };
        let (may, left_out) = budget.lock().unwrap_or_else(PoisonError::into_inner).take(Instant::now());
        if left_out > 0 {
            warn!(target: "ebpf", left_out, "more was said by the kernel programs than is written in a second");
        }
        if !may {
            return;
        }
        match record.level() {
            log::Level::Error => error!(target: "ebpf", "{}", record.args()),
            log::Level::Warn => warn!(target: "ebpf", "{}", record.args()),
            log::Level::Info => info!(target: "ebpf", "{}", record.args()),
            log::Level::Debug => debug!(target: "ebpf", "{}", record.args()),
            log::Level::Trace => trace!(target: "ebpf", "{}", record.args()),
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_written_in_part_and_the_rest_is_counted() {
        let (mut budget, start) = (Budget::default(), Instant::now());
        let written = (0..1000).filter(|_| budget.take(start).0).count();
        assert_eq!(written, LINES as usize);
        assert_eq!(budget.take(start + Duration::from_millis(999)), (false, 0));
        assert_eq!(budget.take(start + Duration::from_secs(1)), (true, 1001 - u64::from(LINES)));
        assert_eq!(budget.take(start + Duration::from_secs(1)), (true, 0));
    }

    #[test]
    fn a_flood_of_the_rest_does_not_spend_the_warnings() {
        let log = ToTracing::default();
        for _ in 0..1000 {
            log.others.lock().unwrap().take(Instant::now());
        }
        assert!(log.warnings.lock().unwrap().take(Instant::now()).0);
    }
}
