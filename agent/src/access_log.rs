//! The access log: one line per connection, as JSON or as text, to a file or to standard output. What is in a line is gathered
//! by `proxy::account`.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    net::SocketAddr,
    path::Path as FilePath,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::SystemTime,
};

use serde::{Serialize, Serializer};
use tracing_appender::non_blocking::{NonBlocking, NonBlockingBuilder, WorkerGuard};

mod keep;

use crate::{
    config::{AccessLogConfig, AccessLogFormat},
    metrics::ResponseFlags,
    words::{Direction, Endpoint, Mode, Path, PumpKind, TlsFacts},
};
use keep::Kept;

/// One connection. Bytes are the application's, `sent` from the connection's source side of this agent to the wire's.
#[derive(Serialize)]
pub struct Record<'a> {
    /// When it began.
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
    #[serde(serialize_with = "rfc3339")]
    pub end: SystemTime,
    pub direction: Direction,
    pub source: &'a Endpoint,
    pub destination: &'a Endpoint,
    /// The service whose virtual address the application connected to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub service: Option<&'a str>,
    pub mode: Option<Mode>,
    /// `ktls`, `userspace`, `plaintext`, or `none` where it did not come so far.
    pub records: &'a str,
    pub pump: Option<PumpKind>,
    pub path: Option<Path>,
    /// Why it is not direct, where the agent does direct connections.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_reason: Option<&'a str>,
    pub verdict: &'a str,
    pub reason: Option<&'a str>,
    /// The policy, and the rule, that decided.
    pub policy: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub audit: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dry_run: Option<&'a str>,
    pub close: &'a str,
    pub response_flags: ResponseFlags,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub duration_ms: u64,
    pub tls: Option<&'a TlsFacts>,
}

/// Lines are written by a thread of their own: whoever does not read the log stops no connection. What does not fit into the
/// backlog is dropped and counted.
#[derive(Clone)]
pub struct AccessLog {
    writer: NonBlocking,
    config: Arc<AccessLogConfig>,
    counts: Arc<Counts>,
    /// Writes what is left when the last clone goes.
    _flush: Arc<WorkerGuard>,
}

/// Lines, with room for twice as many as of ten thousand connections that end at once. The room itself, 32 bytes for each, is there from the start.
const BACKLOG: usize = 1 << 15;

#[derive(Default)]
struct Counts {
    written: AtomicU64,
    sampled_out: AtomicU64,
    filtered: AtomicU64,
}

impl AccessLog {
    pub fn open(config: AccessLogConfig) -> io::Result<Self> {
        let path = config.path.as_deref().filter(|path| *path != FilePath::new("-"));
        let builder = NonBlockingBuilder::default().buffered_lines_limit(BACKLOG);
        let (writer, guard) = match path {
            None => builder.finish(io::stdout()),
            Some(path) => builder.finish(OpenOptions::new().create(true).append(true).open(path)?),
        };
        Ok(Self { writer, config: Arc::new(config), counts: Arc::default(), _flush: Arc::new(guard) })
    }

    pub fn write(&self, record: &Record<'_>) {
        let counter = match keep::judge(&self.config, record, rand::random()) {
            Kept::Written => &self.counts.written,
            Kept::SampledOut => &self.counts.sampled_out,
            Kept::Filtered => &self.counts.filtered,
        };
        counter.fetch_add(1, Ordering::Relaxed);
        if !std::ptr::eq(counter, &self.counts.written) {
            return;
        }
        let mut line = match self.config.format {
            AccessLogFormat::Json => match serde_json::to_vec(record) {
                Ok(line) => line,
                Err(error) => return tracing::error!(%error, "an access record could not be written as JSON"),
            },
            AccessLogFormat::Text => text(record).into_bytes(),
        };
        line.push(b'\n');
        if let Err(error) = self.writer.clone().write_all(&line) {
            tracing::error!(%error, "an access record was lost");
        }
    }

    /// Lines by what became of them. Those that were dropped for want of room are among those that were written.
    pub fn lines(&self) -> Vec<(&'static str, u64)> {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let dropped = self.writer.error_counter().dropped_lines() as u64;
        vec![
            ("written", read(&self.counts.written).saturating_sub(dropped)),
            ("sampled_out", read(&self.counts.sampled_out)),
            ("filtered", read(&self.counts.filtered)),
            ("dropped", dropped),
        ]
    }
}

fn text(record: &Record<'_>) -> String {
    let end = |end: &Endpoint| {
        let address = end.address.as_ref().map_or_else(|| "-".to_owned(), SocketAddr::to_string);
        format!("{address} {}", end.identity.as_deref().unwrap_or("-"))
    };
    format!(
        "{} {} {} -> {} {} {} {} {} {} sent={} received={} {}ms {} {} {}",
        timestamp(record.time),
        record.direction.as_str(),
        end(record.source),
        end(record.destination),
        record.records,
        record.path.map_or("-", Path::as_str),
        record.verdict,
        record.reason.unwrap_or("-"),
        record.response_flags,
        record.bytes_sent,
        record.bytes_received,
        record.duration_ms,
        record
            .tls
            .map_or_else(|| "-".to_owned(), |tls| format!("{}/{}", tls.cipher, tls.group.as_deref().unwrap_or("-"))),
        record.policy.unwrap_or("-"),
        record.close,
    )
}

fn rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&timestamp(*time))
}

fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
