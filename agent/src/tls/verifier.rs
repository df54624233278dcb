//! Who may be at the other end: chains verified to the mesh's roots, the SPIFFE ID taken from the leaf, and every
//! refusal explained in words. What a verified identity is allowed to do is `policy`'s.

mod explain;

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible, RootCertStore,
    SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::config::provider;
use crate::identity::{IdError, SpiffeId, TrustDomain};

pub use explain::{PeerFailure, Reason, explain};

/// What is wrong with a peer beyond what the TLS library knows.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    #[error("the peer is {got}, expected {}", one_of(expected))]
    WrongIdentity { got: SpiffeId, expected: Vec<SpiffeId> },
    #[error("the peer is {got}, which is not in the trust domain {expected}")]
    ForeignTrustDomain { got: SpiffeId, expected: TrustDomain },
    #[error("the peer's certificate is not a workload's: {0}")]
    NotAnSvid(SvidFault),
    #[error("the peer sent no certificate")]
    NoCertificate,
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
    #[error("{0}")]
    Other(String),
}

impl From<PeerError> for Error {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::NoCertificate => Self::NoCertificatesPresented,
            other => Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(other)))),
        }
    }
}

/// The client's check: the server's chain ends at a root of ours and its identity is one that we meant to reach. The
/// DNS name plays no part, as addresses and names are not what the mesh trusts.
pub struct ExpectServer {
    roots: Arc<RootCertStore>,
    expected: Vec<SpiffeId>,
}

impl ExpectServer {
    pub fn new(roots: Arc<RootCertStore>, expected: Vec<SpiffeId>) -> Self {
        Self { roots, expected }
    }
}

impl ServerCertVerifier for ExpectServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        verify_chain(end_entity, intermediates, &self.roots, now, webpki::KeyUsage::server_auth())?;
        let got = svid_identity(end_entity)?;
        if self.expected.contains(&got) {
            return Ok(ServerCertVerified::assertion());
        }
        let foreign = self.expected.iter().all(|expected| expected.trust_domain() != got.trust_domain());
        Err(match self.expected.first() {
            Some(expected) if foreign => {
                PeerError::ForeignTrustDomain { got, expected: expected.trust_domain().clone() }.into()
            }
            _ => PeerError::WrongIdentity { got, expected: self.expected.clone() }.into(),
        })
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::ServerTlsVersionIsDisabledByOurConfig))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for ExpectServer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExpectServer").field("expected", &self.expected).finish_non_exhaustive()
    }
}

/// The server's check: the client's chain ends at a root of ours and its identity is one of the mesh's trust domain.
/// A client without a certificate is refused.
pub struct MeshClient {
    roots: Arc<RootCertStore>,
    trust_domain: TrustDomain,
}

impl MeshClient {
    pub fn new(roots: Arc<RootCertStore>, trust_domain: TrustDomain) -> Self {
        Self { roots, trust_domain }
    }
}

impl ClientCertVerifier for MeshClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        // Every peer has one certificate: hints would be bytes on the wire that help nobody to choose.
        &[]
    }

    fn client_auth_mandatory(&self) -> bool {
        true
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        verify_chain(end_entity, intermediates, &self.roots, now, webpki::KeyUsage::client_auth())?;
        let got = svid_identity(end_entity)?;
        if *got.trust_domain() != self.trust_domain {
            return Err(PeerError::ForeignTrustDomain { got, expected: self.trust_domain.clone() }.into());
        }
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::PeerIncompatible(PeerIncompatible::Tls12NotOfferedOrEnabled))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &provider().signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        provider().signature_verification_algorithms.supported_schemes()
    }
}

impl fmt::Debug for MeshClient {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MeshClient").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

/// The identity that a leaf certificate names, if it is a leaf as X.509-SVID wants them: exactly one URI, no CA, and
/// no right to sign. Says nothing about who signed it.
pub fn svid_identity(leaf: &CertificateDer<'_>) -> Result<SpiffeId, PeerError> {
    let fault = PeerError::NotAnSvid;
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| fault(SvidFault::Unreadable))?;
    // The parser's own `is_ca` reads a broken or repeated extension as "no": ask for the extension and its errors.
    let constraints = certificate.basic_constraints().map_err(|_| fault(SvidFault::Unreadable))?;
    if constraints.is_some_and(|constraints| constraints.value.ca) {
        return Err(fault(SvidFault::IsCa));
    }
    let usage = certificate.key_usage().map_err(|_| fault(SvidFault::Unreadable))?;
    if usage.is_some_and(|usage| usage.value.key_cert_sign() || usage.value.crl_sign()) {
        return Err(fault(SvidFault::MaySign));
    }
    let names = certificate.subject_alternative_name().map_err(|_| fault(SvidFault::Unreadable))?;
    let uris: Vec<&str> = names
        .iter()
        .flat_map(|names| &names.value.general_names)
        .filter_map(|name| if let GeneralName::URI(uri) = name { Some(*uri) } else { None })
        .collect();
    match uris.as_slice() {
        [] => Err(fault(SvidFault::NoUri)),
        [uri] => uri.parse().map_err(|error| fault(SvidFault::Uri(error))),
        many => Err(fault(SvidFault::ManyUris(many.len()))),
    }
}

fn verify_chain(
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    roots: &RootCertStore,
    now: UnixTime,
    usage: webpki::KeyUsage,
) -> Result<(), Error> {
    let algorithms = provider().signature_verification_algorithms.all;
    webpki::EndEntityCert::try_from(end_entity)
        .and_then(|leaf| {
            leaf.verify_for_usage(algorithms, &roots.roots, intermediates, now, usage, None, None).map(drop)
        })
        .map_err(chain_error)
}

/// The common cases become the errors for which TLS has an alert of its own, so that the other end learns them too.
fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    let certificate_error = match error {
        E::CertExpired { time, not_after } => CertificateError::ExpiredContext { time, not_after },
        E::CertNotValidYet { time, not_before } => CertificateError::NotValidYetContext { time, not_before },
        // A signature that does not fit is a CA with the name of one of ours and another key: Istio's CAs are all
        // called alike, so this is the usual face of an unknown CA.
        E::UnknownIssuer | E::InvalidSignatureForPublicKey => CertificateError::UnknownIssuer,
        E::BadDer | E::BadDerTime | E::TrailingData(_) => CertificateError::BadEncoding,
        E::CertRevoked => CertificateError::Revoked,
        E::EndEntityUsedAsCa => {
            let signer = "what signed it is not a CA but a workload's certificate";
            return PeerError::NotAnSvid(SvidFault::Other(signer.to_owned())).into();
        }
        E::CaUsedAsEndEntity => return PeerError::NotAnSvid(SvidFault::IsCa).into(),
        E::RequiredEkuNotFoundContext(_) => {
            return PeerError::NotAnSvid(SvidFault::Other(
                "its key is not for this end of a TLS connection".to_owned(),
            ))
            .into();
        }
        other => return PeerError::NotAnSvid(SvidFault::Other(format!("it does not verify: {other}"))).into(),
    };
    Error::InvalidCertificate(certificate_error)
}

fn one_of(ids: &[SpiffeId]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    ids.join(" or ")
}
