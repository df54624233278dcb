//! What a workload's certificate is, by the clauses of the X.509-SVID standard. Who signed it, and whether that counts, is `identity::trust`'s
//! to say.

use std::time::{Duration, SystemTime};

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::{IdError, SpiffeId, hex};

/// From when to when a certificate is good, and its serial number as it is written everywhere.
#[derive(Clone, Debug)]
pub struct Validity {
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    pub serial: String,
}

impl Validity {
    pub fn of(certificate: &X509Certificate<'_>) -> Self {
        let time = |seconds: i64| {
            let since = Duration::from_secs(u64::try_from(seconds).unwrap_or_default());
            SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH)
        };
        let validity = certificate.validity();
        Self {
            not_before: time(validity.not_before.timestamp()),
            not_after: time(validity.not_after.timestamp()),
            serial: hex::upper(certificate.raw_serial()),
        }
    }
}

/// Which clause of the X.509-SVID standard a certificate fails.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SvidFault {
    #[error("it cannot be read")]
    Unreadable,
    #[error("it names no URI, so no identity")]
    NoUri,
    #[error("it names {0} URIs, a workload's certificate names exactly one")]
    ManyUris(usize),
    #[error(transparent)]
    Uri(IdError),
    #[error("it is the certificate of a CA")]
    IsCa,
    #[error("its key may sign certificates or revocation lists")]
    MaySign,
    #[error("its key may not be used for signatures (key usage), and so not for TLS")]
    MayNotSpeak,
    #[error("it has no subject, and its names are not marked critical")]
    NamesNotCritical,
    #[error("{0}")]
    Other(String),
}

/// The identity that a leaf certificate names, if it is a leaf as X.509-SVID wants them: exactly one URI, no CA, and
/// no right to sign. Says nothing about who signed it.
pub fn svid_identity(leaf: &CertificateDer<'_>) -> Result<SpiffeId, SvidFault> {
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| SvidFault::Unreadable)?;
    // The parser's own `is_ca` reads a broken or repeated extension as "no": ask for the extension and its errors.
    let constraints = certificate.basic_constraints().map_err(|_| SvidFault::Unreadable)?;
    if constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(SvidFault::IsCa);
    }
    let usage = certificate.key_usage().map_err(|_| SvidFault::Unreadable)?;
    if usage.as_ref().is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign()) {
        return Err(SvidFault::MaySign);
    }
    // X.509-SVID, section 4.3; RFC 8446, section 4.4.2.2, of TLS.
    if usage.is_some_and(|usage| !usage.value.digital_signature()) {
        return Err(SvidFault::MayNotSpeak);
    }
    let names = certificate.subject_alternative_name().map_err(|_| SvidFault::Unreadable)?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris.as_slice() {
        [] => Err(SvidFault::NoUri),
        // X.509-SVID, section 3.1.
        [_] if certificate.subject().iter().next().is_none() && names.is_some_and(|names| !names.critical) => {
            Err(SvidFault::NamesNotCritical)
        }
        [uri] => uri.parse().map_err(SvidFault::Uri),
        many => Err(SvidFault::ManyUris(many.len())),
    }
}
