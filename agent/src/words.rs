//! The words in which rooms speak of connections: what the stages learn, the access log writes and the metrics count. No room's
//! decisions are here.

use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    Outbound,
    Inbound,
}

impl Direction {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}

/// What the wire leg of a connection carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    Mtls,
    Plaintext,
}

impl Mode {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Mtls => "mtls",
            Self::Plaintext => "plaintext",
        }
    }
}

/// Which way a connection's bytes take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Path {
    /// The application holds the TLS connection itself; the agent is out of the way.
    Direct,
    /// Through the agent.
    Proxied,
}

impl Path {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Direct => "direct",
            Self::Proxied => "proxied",
        }
    }
}

/// The reason by which a connection is told that was let in because it was the kubelet's own, and not by a policy.
pub const KUBELET_PROBE: &str = "kubelet_probe";

/// One end, as far as it is known.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: Option<SocketAddr>,
    pub workload: Option<String>,
    pub namespace: Option<String>,
    /// The SPIFFE ID: of a peer under mTLS the one that its certificate proved.
    pub identity: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TlsFacts {
    pub cipher: String,
    pub group: Option<String>,
    pub alpn: Option<String>,
}

/// How bytes go between two sockets of which the kernel keeps the records (or none are).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PumpKind {
    Splice,
    Copy,
}

/// An error with all that caused it, on one line.
pub fn with_causes(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}
