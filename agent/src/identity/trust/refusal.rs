//! Why a chain is not believed, as TLS tells the other end.

use rustls::CertificateError;

/// Those for which TLS has an alert of its own, so that the other end learns them too. The others come back.
pub fn with_alert(error: webpki::Error) -> Result<CertificateError, webpki::Error> {
    use webpki::Error as E;
    Ok(match error {
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        // A signature that does not fit is a CA with the name of one of ours and another key: Istio's CAs are all
        // called alike, so this is the usual face of an unknown CA.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => CertificateError::UnknownIssuer,
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertRevoked => CertificateError::Revoked,
        other => return Err(other),
    })
}
