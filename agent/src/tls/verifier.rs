//! Who may be at the other end: the SPIFFE ID is taken from the leaf, the chain is verified to the roots of the trust domain that the
//! ID names, and every refusal is explained in words. Whose roots those are is `identity::trust`'s; what a verified identity is
//! allowed to do is `policy`'s.

mod explain;

use std::{fmt, sync::Arc};

use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, PeerIncompatible, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::verify_tls13_signature,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::{ClientCertVerified, ClientCertVerifier},
};

use super::config::{Learned, provider};
use crate::identity::{
    SpiffeId, SvidFault, Trust, TrustDomains, svid_identity,
    trust::{Role, refusal},
};

pub use explain::{PeerFailure, Reason, explain};

/// What is wrong with a peer beyond what the TLS library knows.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum PeerError {
    #[error("the peer is {got}, expected {}", one_of(expected))]
    WrongIdentity { got: SpiffeId, expected: Vec<SpiffeId> },
    /// Nobody here could tell whether it is who it says.
    #[error(
        "the peer calls itself {got}, and nobody is trusted to vouch for that trust domain: those of this mesh are {trusted}"
    )]
    ForeignTrustDomain { got: SpiffeId, trusted: TrustDomains },
    #[error("the peer's certificate is not a workload's: {0}")]
    NotAnSvid(#[from] SvidFault),
    #[error("the peer sent no certificate")]
    NoCertificate,
}

impl From<PeerError> for Error {
    fn from(error: PeerError) -> Self {
        match error {
            PeerError::NoCertificate => Self::NoCertificatesPresented,
            other => Self::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(other)))),
        }
    }
}

/// The client's check: the server's chain ends at a root of its trust domain and its identity is one that we meant to reach, by
/// whichever of our trust domains it is called. The DNS name plays no part, as addresses and names are not what the mesh trusts.
pub struct ExpectServer {
    trust: Arc<Trust>,
    expected: Vec<SpiffeId>,
    learned: Learned,
}

impl ExpectServer {
    pub fn new(trust: Arc<Trust>, expected: Vec<SpiffeId>, learned: Learned) -> Self {
        Self { trust, expected, learned }
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
        let got = verified(&self.trust, end_entity, intermediates, now, Role::Server, &self.learned)?;
        if self.expected.iter().any(|expected| self.trust.domains().same(expected, &got)) {
            return Ok(ServerCertVerified::assertion());
        }
        Err(PeerError::WrongIdentity { got, expected: self.expected.clone() }.into())
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

/// The server's check: the client's chain ends at a root of its trust domain, which is one that somebody is trusted to vouch for.
/// A client without a certificate is refused.
pub struct MeshClient {
    trust: Arc<Trust>,
    learned: Learned,
}

impl MeshClient {
    pub fn new(trust: Arc<Trust>, learned: Learned) -> Self {
        Self { trust, learned }
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
        verified(&self.trust, end_entity, intermediates, now, Role::Client, &self.learned)?;
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
        f.debug_struct("MeshClient").field("trust_domains", self.trust.domains()).finish_non_exhaustive()
    }
}

/// What the leaf says of itself comes first, as it names the trust domain whose roots are asked; it is believed when they agree.
fn verified(
    trust: &Trust,
    end_entity: &CertificateDer<'_>,
    intermediates: &[CertificateDer<'_>],
    now: UnixTime,
    role: Role,
    learned: &Learned,
) -> Result<SpiffeId, Error> {
    let claimed = svid_identity(end_entity).map_err(PeerError::from)?;
    if trust.bundle(claimed.trust_domain()).is_none() {
        return Err(PeerError::ForeignTrustDomain { got: claimed, trusted: trust.domains().clone() }.into());
    }
    let voucher =
        trust.verify_peer(claimed.trust_domain(), end_entity, intermediates, now, role).map_err(chain_error)?;
    learned.vouched(voucher);
    Ok(claimed)
}

/// What TLS has no alert of its own for is told in words here.
fn chain_error(error: webpki::Error) -> Error {
    use webpki::Error as E;
    let error = match refusal::with_alert(error) {
        Ok(certificate) => return Error::InvalidCertificate(certificate),
        Err(other) => other,
    };
    let fault = match error {
        E::CaUsedAsEndEntity => SvidFault::IsCa,
        E::EndEntityUsedAsCa => SvidFault::Other("what signed it is not a CA but a workload's certificate".to_owned()),
        E::RequiredEkuNotFoundContext(_) => {
            SvidFault::Other("its key is not for this end of a TLS connection".to_owned())
        }
        E::NameConstraintViolation => {
            SvidFault::Other("what signed it is of another trust domain, or may not sign for this name".to_owned())
        }
        other => SvidFault::Other(format!("it does not verify: {other}")),
    };
    PeerError::NotAnSvid(fault).into()
}

fn one_of(ids: &[SpiffeId]) -> String {
    let ids: Vec<String> = ids.iter().map(ToString::to_string).collect();
    ids.join(" or ")
}
