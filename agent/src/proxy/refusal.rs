//! Why a captured connection goes no further, in one type for all stages: the label it is counted by and the words it is logged with.

use std::{io, net::IpAddr};

use super::{authorize::Denied, handshake::HandshakeError, offload::OffloadError};
use crate::{
    bpf::BpfError,
    identity::trust::Withdrawn,
    tls::{config::TlsError, verifier},
};

#[derive(Debug, thiserror::Error)]
pub enum Refusal {
    #[error("the connection was not redirected by the kernel: a program connected to the agent's listener itself")]
    NotCaptured,
    #[error("capture")]
    Capture(#[from] BpfError),
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("the peer's certificate was good when it was shown, and is not any more: {0}")]
    Withdrawn(Withdrawn),
    #[error("no certificate for {0} yet")]
    NoSvid(crate::identity::SpiffeId),
    #[error("the TLS configuration")]
    Tls(#[from] TlsError),
    #[error("{}", explain(.0))]
    Handshake(HandshakeError),
    #[error(transparent)]
    Offload(#[from] OffloadError),
    #[error("the service {host} has no port {port}")]
    NoPort { host: String, port: u16 },
    #[error("the service {host} has no endpoint for port {port}")]
    NoEndpoint { host: String, port: u16 },
    #[error("a pod is said to be at {0}, and nothing was told of it: whether it is in the mesh is not known")]
    NotTold(IpAddr),
    #[error("the pod has the {limit} connections to {host} that a DestinationRule allows it")]
    TooMany { host: String, limit: usize },
    #[error("the destination refuses")]
    Refused(#[source] io::Error),
    #[error("the destination cannot be reached")]
    Unreachable(#[source] io::Error),
    #[error("the client's connection")]
    Client(#[source] io::Error),
}

impl Refusal {
    pub fn connecting(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused(error),
            _ => Self::Unreachable(error),
        }
    }

    pub fn reason(&self) -> &'static str {
        match self {
            Self::NotCaptured => "not_captured",
            Self::Capture(_) => "capture",
            Self::Denied(Denied::Policy(_)) => "policy",
            Self::Denied(Denied::PlaintextUnderStrict) => "plaintext_under_strict",
            Self::Withdrawn(withdrawn) => withdrawn.label(),
            Self::NoSvid(_) => "no_svid",
            Self::Tls(_) => "tls_config",
            Self::Handshake(error) => handshake_reason(error),
            Self::Offload(OffloadError::Demanded { .. }) => "ktls_required",
            Self::Offload(_) => "offload",
            Self::NoPort { .. } => "no_port",
            Self::NoEndpoint { .. } => "no_endpoint",
            Self::NotTold(_) => "pod_not_told",
            Self::TooMany { .. } => "max_connections",
            Self::Refused(_) => "refused",
            Self::Unreachable(_) => "unreachable",
            Self::Client(_) => "client",
        }
    }
}

pub fn handshake_reason(error: &HandshakeError) -> &'static str {
    match error {
        HandshakeError::Tls(error) => verifier::explain(error).reason.label(),
        HandshakeError::NotTls(_) => "not_tls",
        HandshakeError::Cut => "truncated",
        HandshakeError::Io(_) => "io",
        HandshakeError::Trailing => "protocol",
        HandshakeError::Peer(_) => "not_an_svid",
        HandshakeError::TimedOut(_) => "timeout",
    }
}

fn explain(error: &HandshakeError) -> String {
    match error {
        HandshakeError::Tls(error) => format!("handshake: {}", verifier::explain(error).text),
        HandshakeError::Io(cause) => format!("handshake: {error}: {cause}"),
        HandshakeError::Peer(cause) => format!("handshake: {error}: {cause}"),
        _ => format!("handshake: {error}"),
    }
}
