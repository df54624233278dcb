//! What is kept of a verified chain, so that it can be judged again when trust changes: each certificate's serial number with the key
//! that signed it, up to the root. It is small and mostly shared, as an agent with many connections keeps one for each.

use std::{
    fmt,
    sync::{Arc, LazyLock, Mutex, PoisonError, Weak},
};

use rustls::{
    RootCertStore,
    crypto::aws_lc_rs,
    pki_types::{SubjectPublicKeyInfoDer, TrustAnchor},
};
use serde::{Deserialize, Serialize};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

use super::TrustDomains;
use crate::identity::{TrustDomain, hex};

/// A key by its fingerprint. The key itself is not known where a predecessor of this agent has noted the fingerprint alone.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Key {
    pub fingerprint: [u8; 32],
    pub spki: Option<Box<[u8]>>,
}

impl Key {
    pub fn new(spki: &[u8]) -> Self {
        Self { fingerprint: sha256(spki), spki: Some(spki.into()) }
    }
}

/// A verified chain. All connections whose peers have the same CA share what is above the leaf.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Voucher {
    serial: Box<[u8]>,
    signers: Arc<Signers>,
}

#[derive(PartialEq, Eq, Debug)]
struct Signers {
    /// The key that signed the leaf.
    leaf: Key,
    /// Each intermediate's serial number, and the key that signed it. The last key, or the leaf's, is a root's.
    above: Vec<(Box<[u8]>, Key)>,
}

/// Why a chain that was good is not any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Withdrawn {
    TrustDomain,
    Root,
    Certificate,
}

impl Withdrawn {
    pub fn reason(self) -> &'static str {
        match self {
            Self::TrustDomain => "the peer's trust domain is not trusted any more",
            Self::Root => "the root of the peer's certificate is not trusted any more",
            Self::Certificate => "the peer's certificate, or its CA's, was revoked",
        }
    }

    /// As it is counted.
    pub fn label(self) -> &'static str {
        match self {
            Self::TrustDomain => "trust_domain",
            Self::Root => "root_removed",
            Self::Certificate => "certificate_revoked",
        }
    }
}

impl fmt::Display for Withdrawn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason())
    }
}

impl Voucher {
    pub(super) fn of(path: &webpki::VerifiedPath<'_>) -> Self {
        let anchor = Key::new(&webpki::spki_for_anchor(path.anchor()));
        let mut above: Vec<(Box<[u8]>, Key)> = Vec::new();
        let mut leaf = None;
        for intermediate in path.intermediate_certificates() {
            let key = Key::new(&intermediate.subject_public_key_info());
            match above.last_mut() {
                Some((_, signer)) => *signer = key,
                None => leaf = Some(key),
            }
            // Corrected by the next one, if there is one.
            above.push((intermediate.serial().into(), anchor.clone()));
        }
        let signers = Signers { leaf: leaf.unwrap_or(anchor), above };
        Self { serial: path.end_entity().serial().into(), signers: shared(signers) }
    }

    /// Serial numbers with the keys that signed under them, from the leaf upwards.
    pub(super) fn links(&self) -> impl Iterator<Item = (&[u8], &Key)> {
        let above = self.signers.above.iter().map(|(serial, key)| (&**serial, key));
        std::iter::once((&*self.serial, &self.signers.leaf)).chain(above)
    }

    /// Whether a key of the chain is a root's: one that was an intermediate's may have become that.
    pub(super) fn ends_at(&self, roots: &RootCertStore) -> bool {
        let of = |anchor: &TrustAnchor<'_>| sha256(&webpki::spki_for_anchor(anchor));
        let roots: Vec<_> = roots.roots.iter().map(of).collect();
        self.links().any(|(_, key)| roots.contains(&key.fingerprint))
    }

    /// How the leaf's serial number is written everywhere.
    pub fn serial(&self) -> String {
        hex::upper(&self.serial)
    }

    pub fn kept(&self) -> KeptVoucher {
        let link = |(serial, key): (&[u8], &Key)| format!("{}:{}", hex::upper(serial), hex::upper(&key.fingerprint));
        KeptVoucher(self.links().map(link).collect())
    }
}

/// A voucher as it is noted for a successor: in few bytes, so without the keys themselves.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeptVoucher(Vec<String>);

impl KeptVoucher {
    /// Nothing if it is none.
    pub fn restore(&self) -> Option<Voucher> {
        let link = |text: &String| {
            let (serial, fingerprint) = text.split_once(':')?;
            let key = Key { fingerprint: hex::parse(fingerprint)?.try_into().ok()?, spki: None };
            Some((hex::parse(serial)?.into_boxed_slice(), key))
        };
        let mut links = self.0.iter().map(link).collect::<Option<Vec<_>>>()?.into_iter();
        let (serial, leaf) = links.next()?;
        Some(Voucher { serial, signers: shared(Signers { leaf, above: links.collect() }) })
    }
}

/// One for all that are equal, for as long as there is any.
fn shared(signers: Signers) -> Arc<Signers> {
    static KNOWN: LazyLock<Mutex<Vec<Weak<Signers>>>> = LazyLock::new(Mutex::default);
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.retain(|weak| weak.strong_count() > 0);
    if let Some(same) = known.iter().filter_map(Weak::upgrade).find(|other| **other == signers) {
        return same;
    }
    let signers = Arc::new(signers);
    known.push(Arc::downgrade(&signers));
    signers
}

/// What X.509-SVID asks of signing certificates and the library does not look at: the right to sign (section 4.3), and a SPIFFE ID
/// without a path, if it has one (section 3.2), of the leaf's own trust domain: one root may stand above the CAs of several meshes.
pub(super) fn check_signers(
    path: &webpki::VerifiedPath<'_>,
    domain: &TrustDomain,
    ours: &TrustDomains,
) -> Result<(), webpki::Error> {
    for intermediate in path.intermediate_certificates() {
        let der = intermediate.der();
        let (_, certificate) = X509Certificate::from_der(&der).map_err(|_| webpki::Error::BadDer)?;
        let usage = certificate.key_usage().map_err(|_| webpki::Error::BadDer)?;
        if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
            return Err(webpki::Error::EndEntityUsedAsCa);
        }
        let names = certificate.subject_alternative_name().map_err(|_| webpki::Error::BadDer)?;
        for name in names.iter().flat_map(|names| &names.value.general_names) {
            if let GeneralName::URI(uri) = name
                && uri.starts_with("spiffe://")
            {
                match TrustDomain::parse_uri(uri) {
                    Ok(named) if named == *domain || (ours.contains(&named) && ours.contains(domain)) => {}
                    Ok(_) => return Err(webpki::Error::NameConstraintViolation),
                    // A workload's name: whoever has it is one, whatever else the certificate says.
                    Err(_) => return Err(webpki::Error::EndEntityUsedAsCa),
                }
            }
        }
    }
    Ok(())
}

fn sha256(bytes: &[u8]) -> [u8; 32] {
    // A key whose fingerprint could not be made is like no other, and so nobody's that is trusted.
    try_sha256(bytes).unwrap_or_else(rand::random)
}

pub(super) fn try_sha256(bytes: &[u8]) -> Option<[u8; 32]> {
    let suite = aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256.tls13()?;
    suite.common.hash_provider.hash(bytes).as_ref().try_into().ok()
}

pub(super) fn same_key(spki: &SubjectPublicKeyInfoDer<'_>, key: &Key) -> bool {
    sha256(spki) == key.fingerprint
}
