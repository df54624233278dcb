//! What the kernel programs have to say, into the agent's own log under the target `ebpf`.
//!
//! The reader must live as long as programs may be loaded: they refer to its map.
use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::{io::Interest, io::unix::AsyncFd, runtime::Handle, task::AbortHandle};
use tracing::{Level, debug, enabled, error, info, trace, warn};

use super::error::BpfError;

/// Which statements the kernel programs carry out at all. That is fixed when they are loaded, and the log's level may be changed after; at
/// `debug` they tell of refused connections only, so nothing is lost for those that are not.
pub(super) fn level() -> u8 {
    aya_log::Level::Debug as u8
}

/// Reads until the runtime ends or the handle is dropped.
#[derive(Debug)]
pub(super) struct LogReader(AbortHandle);

impl LogReader {
    pub(super) fn start(ebpf: &mut Ebpf) -> Result<Self, BpfError> {
        let runtime = Handle::try_current().map_err(|_| BpfError::NoRuntime)?;
        let reader = EbpfLogger::init_with_logger(ebpf, ToTracing).map_err(BpfError::Log)?;
        #[expect(
            deprecated,
            reason = "its successor is unsafe to call; the reader does give one descriptor, its own, for life"
        )]
        let reader = AsyncFd::with_interest(reader, Interest::READABLE);
        let mut reader = reader.map_err(BpfError::file("cannot poll", "the log of the kernel programs"))?;
        let task = runtime.spawn(async move {
            while let Ok(mut ready) = reader.readable_mut().await {
                ready.get_inner_mut().flush();
                ready.clear_ready();
            }
        });
        Ok(Self(task.abort_handle()))
    }
}

impl Drop for LogReader {
    fn drop(&mut self) {
        self.0.abort();
    }
}

struct ToTracing;

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
