//! The access log: one line per connection, as JSON or as text, to a file or to standard output. What is in a line is gathered
//! by `proxy::account`.

use std::{
    fs::OpenOptions,
    io::{self, Write},
    net::SocketAddr,
    path::Path as FilePath,
    sync::Arc,
    time::SystemTime,
};

use serde::{Serialize, Serializer};
use tracing_appender::non_blocking::{NonBlocking, WorkerGuard};

use crate::words::{Direction, Endpoint, Mode, Path, PumpKind, TlsFacts};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    #[default]
    Json,
    Text,
}

/// One connection. Bytes are the application's, `sent` from the connection's source side of this agent to the wire's.
#[derive(Serialize)]
pub struct Record<'a> {
    #[serde(serialize_with = "rfc3339")]
    pub time: SystemTime,
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
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub duration_ms: u64,
    pub tls: Option<&'a TlsFacts>,
}

/// Lines are written by a thread of their own: whoever does not read the log stops no connection. What does not fit into 128,000
/// lines of backlog is dropped and counted.
#[derive(Clone)]
pub struct AccessLog {
    writer: NonBlocking,
    format: Format,
    /// Writes what is left when the last clone goes.
    _flush: Arc<WorkerGuard>,
}

impl AccessLog {
    pub fn open(path: &FilePath, format: Format) -> io::Result<Self> {
        let (writer, guard) = if path == FilePath::new("-") {
            tracing_appender::non_blocking(io::stdout())
        } else {
            tracing_appender::non_blocking(OpenOptions::new().create(true).append(true).open(path)?)
        };
        Ok(Self { writer, format, _flush: Arc::new(guard) })
    }

    pub fn write(&self, record: &Record<'_>) {
        let mut line = match self.format {
            Format::Json => match serde_json::to_vec(record) {
                Ok(line) => line,
                Err(error) => return tracing::error!(%error, "an access record could not be written as JSON"),
            },
            Format::Text => text(record).into_bytes(),
        };
        line.push(b'\n');
        if let Err(error) = self.writer.clone().write_all(&line) {
            tracing::error!(%error, "an access record was lost");
        }
    }

    /// Lines that were dropped.
    pub fn dropped(&self) -> u64 {
        self.writer.error_counter().dropped_lines() as u64
    }
}

fn text(record: &Record<'_>) -> String {
    let end = |end: &Endpoint| {
        let address = end.address.as_ref().map_or_else(|| "-".to_owned(), SocketAddr::to_string);
        format!("{address} {}", end.identity.as_deref().unwrap_or("-"))
    };
    format!(
        "{} {} {} -> {} {} {} {} {} sent={} received={} {}ms {} {}",
        timestamp(record.time),
        record.direction.as_str(),
        end(record.source),
        end(record.destination),
        record.records,
        record.path.map_or("-", Path::as_str),
        record.verdict,
        record.reason.unwrap_or("-"),
        record.bytes_sent,
        record.bytes_received,
        record.duration_ms,
        record
            .tls
            .map_or_else(|| "-".to_owned(), |tls| format!("{}/{}", tls.cipher, tls.group.as_deref().unwrap_or("-"))),
        record.close,
    )
}

fn rfc3339<S: Serializer>(time: &SystemTime, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_str(&timestamp(*time))
}

fn timestamp(time: SystemTime) -> String {
    humantime::format_rfc3339_millis(time).to_string()
}
