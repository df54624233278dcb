//! The agent's access log as a reader finds it: JSON lines, one per finished connection.
//!
//! Written from the documented format, not shared with the agent: a change of the format shows here.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use serde::Deserialize;

use crate::cluster::{Family, Pod};

#[derive(Clone, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Inbound,
    Outbound,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq, PartialOrd, Ord)]
#[serde(rename_all = "lowercase")]
pub enum Records {
    Ktls,
    Userspace,
    Plaintext,
    /// A build without records on direct connections: for tests of the mechanism alone.
    #[serde(rename = "without-records")]
    Without,
    None,
}

#[derive(Clone, Copy, Debug, Deserialize, PartialEq, Eq)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Allowed,
    Refused,
}

/// One end of a connection as the agent knew it.
#[derive(Clone, Debug, Deserialize)]
pub struct End {
    pub address: Option<SocketAddr>,
    pub workload: Option<String>,
    pub namespace: Option<String>,
    pub identity: Option<String>,
}

/// One finished connection.
#[derive(Clone, Debug, Deserialize)]
pub struct Entry {
    pub time: serde_json::Value,
    pub direction: Direction,
    pub source: End,
    pub destination: End,
    /// The host of the service that the program connected to.
    pub service: Option<String>,
    pub mode: Option<String>,
    pub records: Records,
    pub pump: Option<String>,
    /// `direct` if the bytes went through the program's own socket, `proxied` if they went through the agent.
    pub path: Option<String>,
    /// Why it is not direct.
    pub path_reason: Option<String>,
    pub verdict: Verdict,
    pub reason: Option<String>,
    pub policy: Option<String>,
    pub close: Option<String>,
    /// In Envoy's letters.
    #[serde(default)]
    pub response_flags: String,
    pub bytes_sent: u64,
    pub bytes_received: u64,
    pub duration_ms: serde_json::Value,
    pub tls: Option<Tls>,
}

#[derive(Clone, Debug, Deserialize)]
pub struct Tls {
    pub cipher: Option<String>,
    pub group: Option<String>,
    pub alpn: Option<String>,
}

impl Entry {
    /// Whether the connection goes from a pod to an address and port, whatever its source port.
    #[must_use]
    pub fn connects(&self, from: &Pod, to: SocketAddr) -> bool {
        let family = if to.is_ipv4() { Family::V4 } else { Family::V6 };
        self.source.address.is_some_and(|address| address.ip() == from.address(family))
            && self.destination.address == Some(to)
    }

    /// Whether it came to its end as the programs wanted it, be that a close or one's own reset.
    #[must_use]
    pub fn ended_by_programs(&self) -> bool {
        self.verdict == Verdict::Allowed
            && matches!(self.reason.as_deref(), None | Some("application_reset" | "peer_reset"))
    }
}

/// All entries of a log. A last line without an end is one that is being written.
pub fn read(path: &Path) -> Result<Vec<Entry>> {
    let text = match fs::read_to_string(path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("reading the access log {}", path.display())),
    };
    parse(&text).with_context(|| format!("the access log {}", path.display()))
}

fn parse(text: &str) -> Result<Vec<Entry>> {
    let whole = text.rfind('\n').map_or("", |end| &text[..end]);
    let lines = whole.lines().filter(|line| !line.trim().is_empty());
    lines
        .map(|line| serde_json::from_str(line).with_context(|| format!("a line that is not an entry: {line}")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINE: &str = r#"{"time":"2026-01-01T00:00:00Z","direction":"outbound",
        "source":{"address":"10.77.1.10:40000","workload":"client-a","namespace":"demo","identity":"spiffe://cluster.local/ns/demo/sa/client-a"},
        "destination":{"address":"[fd77:0:0:2::b]:80","workload":"server-b","namespace":"demo","identity":null},
        "mode":"mtls","records":"ktls","pump":"splice","verdict":"allowed","reason":null,"close":"clean","bytes_sent":7,
        "bytes_received":9,"duration_ms":3,"tls":{"cipher":"TLS13_AES_128_GCM_SHA256","group":"X25519","alpn":"marline"}}"#;

    #[test]
    fn an_entry_of_the_documented_format_is_read() -> Result<()> {
        let entries = parse(&format!("{}\n{{\"half", LINE.replace('\n', " ")))?;
        assert_eq!(entries.len(), 1);
        assert_eq!(entries[0].destination.address, Some("[fd77:0:0:2::b]:80".parse()?));
        assert_eq!((entries[0].records, entries[0].bytes_received), (Records::Ktls, 9));
        Ok(())
    }

    #[test]
    fn a_line_of_another_format_is_an_error_not_a_missing_entry() {
        assert!(parse("{\"direction\":\"sideways\"}\n").is_err());
    }
}
