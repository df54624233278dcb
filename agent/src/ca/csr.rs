//! Reads a certificate signing request (PKCS#10) for the one thing that is taken of it, a public key whose private half its sender has
//! shown to hold. Whatever else a request asks for is either nothing or a reason to refuse it: it shall not be answered with less than it
//! asked for, in silence. Which identity the certificate will have is not the request's to say.

use rustls::pki_types::SubjectPublicKeyInfoDer;
use x509_parser::{
    asn1_rs::Tag,
    certification_request::X509CertificationRequest,
    cri_attributes::ParsedCriAttribute,
    extensions::{GeneralName, ParsedExtension, X509Extension},
    prelude::FromDer as _,
    public_key::PublicKey,
    x509::{SubjectPublicKeyInfo, X509Version},
};

use crate::identity::SpiffeId;

/// A request for a P-384 key and the longest identity has 4 KiB.
const LONGEST: usize = 16 << 10;

const EC: &str = "1.2.840.10045.2.1";
const P256: &str = "1.2.840.10045.3.1.7";
const P384: &str = "1.3.132.0.34";

/// A public key, and the identity that stands beside it, if one does.
#[derive(Debug)]
pub struct Csr {
    /// SubjectPublicKeyInfo in DER.
    pub public_key: Vec<u8>,
    named: Option<SpiffeId>,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum CsrError {
    #[error("csr: it has {0} bytes, and a request for a certificate is never longer than {LONGEST}")]
    TooLong(usize),
    #[error("csr: it is not one PKCS#10 request in PEM (CERTIFICATE REQUEST): {0}")]
    Malformed(String),
    #[error("csr: {0}; send the public key of a P-256 or P-384 pair")]
    Key(String),
    #[error("csr: its signature was not made with the key in it, so that key is not shown to be yours")]
    Signature,
    #[error(
        "csr: it asks for a CA (basic constraints); only certificates of workloads are signed here, leave that out"
    )]
    Authority,
    #[error("csr: it asks for {0}, which no workload's certificate has; leave that out")]
    Extension(String),
    #[error("csr: subjectAltName: {0}; leave it out, or let it be the one SPIFFE ID that the certificate is for")]
    Names(String),
}

/// Reads a request and checks all that can be checked without knowing whom it is for.
pub fn read(pem: &str) -> Result<Csr, CsrError> {
    if pem.len() > LONGEST {
        return Err(CsrError::TooLong(pem.len()));
    }
    let malformed = |what: &str| CsrError::Malformed(what.to_owned());
    let blocks = pem::parse_many(pem).map_err(|error| CsrError::Malformed(error.to_string()))?;
    let [block] = blocks.as_slice() else {
        return Err(CsrError::Malformed(format!("it has {} PEM blocks", blocks.len())));
    };
    if !matches!(block.tag(), "CERTIFICATE REQUEST" | "NEW CERTIFICATE REQUEST") {
        return Err(malformed("the PEM block is of another kind"));
    }
    let (rest, request) =
        X509CertificationRequest::from_der(block.contents()).map_err(|error| CsrError::Malformed(error.to_string()))?;
    if !rest.is_empty() {
        return Err(malformed("bytes follow the request"));
    }
    let info = &request.certification_request_info;
    if info.version != X509Version::V1 {
        return Err(malformed("its version is not 1"));
    }
    check_key(&info.subject_pki)?;
    check_signature(info.subject_pki.raw, info.raw, &request.signature_value.data)?;

    let mut extensions: Vec<X509Extension<'_>> = Vec::new();
    let mut asked = false;
    for attribute in info.attributes() {
        match attribute.parsed_attribute() {
            ParsedCriAttribute::ExtensionRequest(request) if !asked => {
                asked = true;
                extensions.extend(request.extensions.iter().cloned());
            }
            ParsedCriAttribute::ExtensionRequest(_) => return Err(malformed("it asks for extensions twice")),
            _ => return Err(CsrError::Extension(format!("the attribute {}", attribute.oid))),
        }
    }
    let named = check_extensions(&extensions)?;
    Ok(Csr { public_key: info.subject_pki.raw.to_vec(), named })
}

impl Csr {
    /// Fails if the request names somebody else.
    pub fn is_for(&self, id: &SpiffeId) -> Result<(), CsrError> {
        match &self.named {
            Some(named) if named != id => {
                Err(CsrError::Names(format!("it names {named}, and the certificate would be for {id}")))
            }
            _ => Ok(()),
        }
    }
}

fn check_key(key: &SubjectPublicKeyInfo<'_>) -> Result<(), CsrError> {
    if key.algorithm.algorithm.to_id_string() != EC {
        return Err(CsrError::Key(match key.parsed() {
            Ok(PublicKey::RSA(rsa)) => format!("an RSA key of {} bits is not taken", rsa.key_size()),
            _ => format!("keys of the kind {} are not taken", key.algorithm.algorithm),
        }));
    }
    let parameters = key.algorithm.parameters.as_ref().filter(|parameters| parameters.tag() == Tag::Oid);
    let curve = parameters.and_then(|parameters| parameters.as_oid().ok());
    match curve.map(|curve| curve.to_id_string()).as_deref() {
        Some(P256 | P384) if key.subject_public_key.unused_bits == 0 => Ok(()),
        Some(other) => Err(CsrError::Key(format!("keys on the curve {other} are not taken"))),
        None => Err(CsrError::Key("an elliptic curve that is not named is not taken".to_owned())),
    }
}

fn check_signature(key: &[u8], signed: &[u8], signature: &[u8]) -> Result<(), CsrError> {
    let key = SubjectPublicKeyInfoDer::from(key);
    let entity = webpki::RawPublicKeyEntity::try_from(&key)
        .map_err(|_| CsrError::Key("the public key cannot be read".to_owned()))?;
    let algorithms = [
        webpki::aws_lc_rs::ECDSA_P256_SHA256,
        webpki::aws_lc_rs::ECDSA_P384_SHA384,
        webpki::aws_lc_rs::ECDSA_P256_SHA384,
        webpki::aws_lc_rs::ECDSA_P384_SHA256,
    ];
    match algorithms.iter().any(|algorithm| entity.verify_signature(*algorithm, signed, signature).is_ok()) {
        true => Ok(()),
        false => Err(CsrError::Signature),
    }
}

/// What libraries put into every request may stand in it; what would make the certificate another one may not.
fn check_extensions(extensions: &[X509Extension<'_>]) -> Result<Option<SpiffeId>, CsrError> {
    let mut named = None;
    for (n, extension) in extensions.iter().enumerate() {
        let other = || CsrError::Extension(format!("the extension {}", extension.oid));
        if extensions.iter().take(n).any(|earlier| earlier.oid == extension.oid) {
            return Err(CsrError::Malformed(format!("it asks for the extension {} twice", extension.oid)));
        }
        match extension.parsed_extension() {
            ParsedExtension::SubjectAlternativeName(names) => named = Some(one_identity(&names.general_names)?),
            ParsedExtension::BasicConstraints(constraints) if constraints.ca => return Err(CsrError::Authority),
            ParsedExtension::BasicConstraints(_) => {}
            ParsedExtension::KeyUsage(usage) if usage.key_cert_sign() || usage.crl_sign() => {
                return Err(CsrError::Authority);
            }
            ParsedExtension::KeyUsage(_) => {}
            ParsedExtension::ExtendedKeyUsage(usage) => {
                let more = usage.any
                    || usage.code_signing
                    || usage.email_protection
                    || usage.time_stamping
                    || usage.ocsp_signing
                    || !usage.other.is_empty();
                if more {
                    return Err(other());
                }
            }
            _ => return Err(other()),
        }
    }
    Ok(named)
}

fn one_identity(names: &[GeneralName<'_>]) -> Result<SpiffeId, CsrError> {
    match names {
        [GeneralName::URI(uri)] => {
            uri.parse().map_err(|error: crate::identity::IdError| CsrError::Names(error.to_string()))
        }
        [other] => Err(CsrError::Names(format!("{other} is no SPIFFE ID"))),
        names => Err(CsrError::Names(format!("there are {} names", names.len()))),
    }
}
