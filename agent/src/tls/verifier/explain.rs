//! From a TLS library's error to what a person needs to know: a reason to count by, and a sentence to read.

use std::{fmt, time::Duration};

use rustls::{
    AlertDescription, CertificateError, Error, InvalidMessage, PeerIncompatible, PeerMisbehaved, pki_types::UnixTime,
};
use serde::{Serialize, Serializer};

use super::PeerError;
use crate::identity::humantime;

/// Why there is no secured connection with a peer.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PeerFailure {
    pub reason: Reason,
    /// One sentence without a full stop, fit for a log line that names both ends elsewhere.
    pub text: String,
}

/// The kinds of failure, as metrics and access logs count them.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Reason {
    WrongIdentity,
    ForeignTrustDomain,
    NotAnSvid,
    Expired,
    NotYetValid,
    UnknownCa,
    NoCertificate,
    /// By a revocation list.
    Revoked,
    /// The certificate is broken in another way: unreadable, or not the peer's own.
    BadCertificate,
    TlsVersion,
    /// No cipher suite, key exchange or protocol name in common.
    NothingInCommon,
    /// The peer refused us; the text names its alert.
    PeerAlert,
    NotTls,
    Truncated,
    /// The peer speaks TLS and breaks its rules.
    Protocol,
    /// Our own side failed.
    Internal,
}

impl Reason {
    pub const ALL: [Self; 16] = [
        Self::WrongIdentity,
        Self::ForeignTrustDomain,
        Self::NotAnSvid,
        Self::Expired,
        Self::NotYetValid,
        Self::UnknownCa,
        Self::NoCertificate,
        Self::Revoked,
        Self::BadCertificate,
        Self::TlsVersion,
        Self::NothingInCommon,
        Self::PeerAlert,
        Self::NotTls,
        Self::Truncated,
        Self::Protocol,
        Self::Internal,
    ];

    pub fn label(self) -> &'static str {
        match self {
            Self::WrongIdentity => "wrong_identity",
            Self::ForeignTrustDomain => "foreign_trust_domain",
            Self::NotAnSvid => "not_an_svid",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::UnknownCa => "unknown_ca",
            Self::NoCertificate => "no_certificate",
            Self::Revoked => "revoked",
            Self::BadCertificate => "bad_certificate",
            Self::TlsVersion => "tls_version",
            Self::NothingInCommon => "nothing_in_common",
            Self::PeerAlert => "peer_alert",
            Self::NotTls => "not_tls",
            Self::Truncated => "truncated",
            Self::Protocol => "protocol",
            Self::Internal => "internal",
        }
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.label())
    }
}

impl PeerFailure {
    fn new(reason: Reason, text: impl Into<String>) -> Self {
        Self { reason, text: text.into() }
    }

    /// The peer closed or reset the connection before the handshake was done, after `received` bytes.
    pub fn truncated(received: usize) -> Self {
        let text = match received {
            0 => "the peer closed the connection without a word of TLS".to_owned(),
            n => format!("the peer closed the connection in mid-handshake, after {n} bytes"),
        };
        Self::new(Reason::Truncated, text)
    }

    /// What came first is no TLS record.
    pub fn not_tls(first: &[u8]) -> Self {
        let shown = first.get(..16).unwrap_or(first).escape_ascii();
        Self::new(Reason::NotTls, format!("the peer does not speak TLS: it sent \"{shown}\""))
    }
}

impl fmt::Display for PeerFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<&PeerError> for PeerFailure {
    fn from(error: &PeerError) -> Self {
        let reason = match error {
            PeerError::WrongIdentity { .. } => Reason::WrongIdentity,
            PeerError::ForeignTrustDomain { .. } => Reason::ForeignTrustDomain,
            PeerError::NotAnSvid(_) => Reason::NotAnSvid,
            PeerError::NoCertificate => Reason::NoCertificate,
        };
        Self::new(reason, error.to_string())
    }
}

/// Explains a handshake's failure.
pub fn explain(error: &Error) -> PeerFailure {
    match error {
        Error::InvalidCertificate(error) => certificate(error),
        Error::NoCertificatesPresented => (&PeerError::NoCertificate).into(),
        Error::AlertReceived(alert) => PeerFailure::new(Reason::PeerAlert, alert_text(*alert)),
        Error::PeerIncompatible(what) => incompatible(what),
        Error::NoApplicationProtocol => PeerFailure::new(
            Reason::NothingInCommon,
            "the peer asked for other application protocols (ALPN) than we take",
        ),
        Error::PeerMisbehaved(PeerMisbehaved::SelectedUnofferedApplicationProtocol) => PeerFailure::new(
            Reason::NothingInCommon,
            "the peer chose another application protocol (ALPN) than we offered",
        ),
        Error::InvalidMessage(InvalidMessage::InvalidContentType | InvalidMessage::UnknownProtocolVersion) => {
            PeerFailure::new(Reason::NotTls, "the peer does not speak TLS: it sent something that is no TLS record")
        }
        Error::InvalidMessage(_)
        | Error::InappropriateMessage { .. }
        | Error::InappropriateHandshakeMessage { .. }
        | Error::PeerMisbehaved(_)
        | Error::PeerSentOversizedRecord
        | Error::DecryptError => {
            PeerFailure::new(Reason::Protocol, format!("the peer broke the TLS protocol: {error}"))
        }
        other => PeerFailure::new(Reason::Internal, format!("TLS failed on our side: {other}")),
    }
}

fn certificate(error: &CertificateError) -> PeerFailure {
    use CertificateError as E;
    match error {
        E::Other(other) => match other.0.downcast_ref::<PeerError>() {
            Some(error) => error.into(),
            None => bad_certificate(error),
        },
        E::Expired => PeerFailure::new(Reason::Expired, "the peer's certificate has expired"),
        E::ExpiredContext { time, not_after } => PeerFailure::new(
            Reason::Expired,
            format!("the peer's certificate expired {} ago", humantime(between(*not_after, *time))),
        ),
        E::NotValidYet => PeerFailure::new(Reason::NotYetValid, "the peer's certificate is not valid yet"),
        E::NotValidYetContext { time, not_before } => PeerFailure::new(
            Reason::NotYetValid,
            format!(
                "the peer's certificate is not valid yet, it will be in {}: compare the clocks of both nodes",
                humantime(between(*time, *not_before))
            ),
        ),
        E::UnknownIssuer => PeerFailure::new(
            Reason::UnknownCa,
            "the peer's certificate was not signed by a CA of this mesh (unknown CA)",
        ),
        E::Revoked => PeerFailure::new(Reason::Revoked, "the peer's certificate, or its CA's, was revoked"),
        other => bad_certificate(other),
    }
}

fn bad_certificate(error: &CertificateError) -> PeerFailure {
    PeerFailure::new(Reason::BadCertificate, format!("the peer's certificate is not acceptable: {error}"))
}

fn incompatible(what: &PeerIncompatible) -> PeerFailure {
    use PeerIncompatible as P;
    match what {
        P::NoKxGroupsInCommon | P::NamedGroupsExtensionRequired => PeerFailure::new(
            Reason::NothingInCommon,
            "the peer and we have no key exchange in common: where spec.tls.pqcOnly is set, a peer must know X25519MLKEM768",
        ),
        P::ServerDoesNotSupportTls12Or13
        | P::ServerTlsVersionIsDisabledByOurConfig
        | P::SupportedVersionsExtensionRequired
        | P::Tls12NotOffered
        | P::Tls12NotOfferedOrEnabled => {
            PeerFailure::new(Reason::TlsVersion, "the peer does not speak TLS 1.3, the only version allowed")
        }
        other => PeerFailure::new(
            Reason::NothingInCommon,
            format!("the peer and we have no TLS parameters in common: {other:?}"),
        ),
    }
}

fn alert_text(alert: AlertDescription) -> String {
    use AlertDescription as A;
    let meaning = match alert {
        A::CertificateRequired | A::NoCertificate => "it got no certificate from us",
        A::CertificateExpired => "it holds our certificate for expired or not valid yet",
        A::UnknownCA => "it does not know the CA that signed our certificate",
        A::CertificateUnknown | A::BadCertificate | A::UnsupportedCertificate => {
            "it does not accept our certificate: another identity than it expects, perhaps"
        }
        A::CertificateRevoked => "it holds our certificate for revoked",
        A::AccessDenied => "it does not allow our identity",
        A::ProtocolVersion => "it does not speak TLS 1.3",
        A::HandshakeFailure | A::InsufficientSecurity => {
            "it has no TLS parameters in common with us: cipher suites, or key exchange (spec.tls.pqcOnly, of either end)"
        }
        A::NoApplicationProtocol => "it takes none of the application protocols (ALPN) that we offered",
        A::UnrecognisedName => "it does not serve the name that we asked for",
        A::InternalError => "it failed on its side",
        A::CloseNotify | A::UserCanceled => "it closed the connection in mid-handshake",
        _ => return format!("the peer refused the handshake with the alert {alert:?}"),
    };
    format!("the peer refused the handshake with the alert {alert:?}: {meaning}")
}

fn between(earlier: UnixTime, later: UnixTime) -> Duration {
    Duration::from_secs(later.as_secs().saturating_sub(earlier.as_secs()))
}
