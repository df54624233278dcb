//! A connection as `/connections` and `/connections/ended` tell it, in the one shape that `--json` prints. Fields are added, not renamed.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use super::super::client::{Client, ClientError};
use crate::words::{Direction, Endpoint, TlsFacts};

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(in crate::cli) struct Connection {
    /// Of this agent's life.
    pub(in crate::cli) id: u64,
    pub(in crate::cli) direction: Direction,
    /// How long it lives or lived.
    pub(in crate::cli) age_ms: u64,
    pub(in crate::cli) source: Endpoint,
    pub(in crate::cli) destination: Endpoint,
    pub(in crate::cli) service: Option<String>,
    /// `mtls` or `plaintext`; none until that is decided.
    pub(in crate::cli) mode: Option<String>,
    /// `ktls`, `userspace` or `plaintext`.
    pub(in crate::cli) records: Option<String>,
    /// `direct` or `proxied`.
    pub(in crate::cli) path: Option<String>,
    pub(in crate::cli) path_reason: Option<String>,
    pub(in crate::cli) tls: Option<TlsFacts>,
    pub(in crate::cli) policy: Option<String>,
    pub(in crate::cli) bytes_sent: u64,
    pub(in crate::cli) bytes_received: u64,
    /// The agent's own socket towards the other node: its address and the peer's. None where the application holds the connection.
    pub(in crate::cli) wire: Option<[SocketAddr; 2]>,
    /// Of one that has ended: `allowed` or `refused`.
    pub(in crate::cli) verdict: Option<String>,
    /// Why, in a word.
    pub(in crate::cli) reason: Option<String>,
    /// How it ended, in words.
    pub(in crate::cli) close: Option<String>,
}

/// As the agent writes it.
#[derive(Deserialize)]
struct Told {
    id: u64,
    direction: Direction,
    #[serde(alias = "duration_ms")]
    age_ms: u64,
    bytes_sent: u64,
    bytes_received: u64,
    facts: Facts,
    wire: Option<[SocketAddr; 2]>,
    verdict: Option<String>,
    reason: Option<String>,
    close: Option<String>,
}

#[derive(Deserialize)]
struct Facts {
    source: Endpoint,
    destination: Endpoint,
    service: Option<String>,
    mode: Option<String>,
    records: Option<String>,
    path: Option<String>,
    path_reason: Option<String>,
    tls: Option<TlsFacts>,
    policy: Option<String>,
}

/// Asking for them.
pub(in crate::cli) struct Fetched;

impl Fetched {
    /// Those that live, the oldest first.
    pub(in crate::cli) fn live(client: &Client) -> Result<Vec<Connection>, ClientError> {
        let mut all: Vec<Connection> = client.json::<Vec<Told>>("/connections")?.into_iter().map(Told::flat).collect();
        all.sort_by_key(|one| one.id);
        Ok(all)
    }

    /// The last that have ended, in the order of their ends.
    pub(in crate::cli) fn ended(client: &Client) -> Result<Vec<Connection>, ClientError> {
        Ok(client.json::<Vec<Told>>("/connections/ended")?.into_iter().map(Told::flat).collect())
    }
}

impl Connection {
    /// Whom the other end's certificate has proved.
    pub(in crate::cli) fn peer(&self) -> Option<&str> {
        let end = match self.direction {
            Direction::Outbound => &self.destination,
            Direction::Inbound => &self.source,
        };
        // Without a handshake it is only what is expected.
        end.identity.as_deref().filter(|_| self.tls.is_some())
    }
}

impl Told {
    fn flat(self) -> Connection {
        let Facts { source, destination, service, mode, records, path, path_reason, tls, policy } = self.facts;
        Connection {
            id: self.id,
            direction: self.direction,
            age_ms: self.age_ms,
            source,
            destination,
            service,
            mode,
            records,
            path,
            path_reason,
            tls,
            policy,
            bytes_sent: self.bytes_sent,
            bytes_received: self.bytes_received,
            wire: self.wire,
            verdict: self.verdict,
            reason: self.reason,
            close: self.close,
        }
    }
}

/// `NAMESPACE/NAME@ADDRESS:PORT`, as far as it is known.
pub(in crate::cli) fn end(end: &Endpoint) -> String {
    let address = end.address.map_or_else(|| "?".to_owned(), |address| address.to_string());
    match (&end.namespace, &end.workload) {
        (Some(namespace), Some(workload)) => format!("{namespace}/{workload}@{address}"),
        _ => address,
    }
}

#[cfg(test)]
pub(in crate::cli) mod tests {
    use super::*;

    pub(in crate::cli) fn sample() -> Connection {
        let told: Told = serde_json::from_value(serde_json::json!({
            "id": 3, "direction": "outbound", "age_ms": 1500, "bytes_sent": 10, "bytes_received": 20, "wire": null,
            "facts": {
                "source": {"address": "10.0.0.1:40000", "workload": "client", "namespace": "demo",
                           "identity": "spiffe://cluster.local/ns/demo/sa/client"},
                "destination": {"address": "10.0.0.2:80", "workload": "server", "namespace": "demo",
                                "identity": "spiffe://cluster.local/ns/demo/sa/server"},
                "mode": "mtls", "records": "ktls", "pump": "splice", "path": "proxied", "path_reason": "no_filter",
                "tls": {"cipher": "TLS13_AES_128_GCM_SHA256", "group": "X25519MLKEM768", "alpn": "marline"},
                "policy": null
            }
        }))
        .unwrap();
        told.flat()
    }

    #[test]
    fn a_peer_is_proved_by_a_handshake_alone() {
        let mut one = sample();
        assert_eq!(one.peer(), Some("spiffe://cluster.local/ns/demo/sa/server"));
        one.tls = None;
        assert_eq!(one.peer(), None);
    }
}
