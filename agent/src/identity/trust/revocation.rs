//! Certificate revocation lists (RFC 5280, section 5): which certificates a CA has taken back.
//!
//! A list counts for the key that signed it, and not for the name it carries: CAs that follow each other are called alike. What a list
//! says holds for as long as the list is there, also when a newer one is overdue; a CA without a list has revoked nothing.

use std::{
    sync::OnceLock,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, SubjectPublicKeyInfoDer};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};

use super::voucher::{Key, same_key};

/// One list.
#[derive(Debug)]
pub struct RevocationList {
    parsed: webpki::CertRevocationList<'static>,
    /// What the signature is over, and the signature.
    signed: Vec<u8>,
    signature: Vec<u8>,
    /// The key that signed it: known from the start if it is that of a CA of ours, else found when a peer shows its CA.
    signer: OnceLock<[u8; 32]>,
    pub issuer: String,
    pub next_update: Option<SystemTime>,
}

impl RevocationList {
    /// Reads a list and finds who signed it among `known` certificates. A list in the name of one of them that none of them has signed is
    /// refused, because it would be there in vain; one of a CA that is not known here is kept until a peer shows that CA.
    pub fn read(der: &CertificateRevocationListDer<'_>, known: &[CertificateDer<'_>]) -> Result<Self, String> {
        // Knows all forms in which a list could mean something else than it says: partial, indirect and delta lists are refused.
        let parsed = webpki::OwnedCertRevocationList::from_der(der)
            .map_err(|error| format!("a revocation list that cannot be used: {error}"))?;
        let (_, list) = CertificateRevocationList::from_der(der)
            .map_err(|error| format!("a revocation list that cannot be read: {error}"))?;
        let issuer = list.tbs_cert_list.issuer.to_string();
        let since = |time: i64| Some(UNIX_EPOCH + Duration::from_secs(u64::try_from(time).ok()?));
        let read = Self {
            parsed: parsed.into(),
            signed: list.tbs_cert_list.as_ref().to_vec(),
            signature: list.signature_value.data.to_vec(),
            signer: OnceLock::new(),
            next_update: list.tbs_cert_list.next_update.and_then(|time| since(time.timestamp())),
            issuer,
        };
        let mut namesake = false;
        for der in known {
            let Ok((_, certificate)) = X509Certificate::from_der(der) else { continue };
            if certificate.subject().as_raw() != list.tbs_cert_list.issuer.as_raw() {
                continue;
            }
            namesake = true;
            let key = Key::new(certificate.public_key().raw);
            if !read.is_signed_by(&key) {
                continue;
            }
            let usage = certificate.key_usage().ok().flatten();
            if usage.is_some_and(|usage| !usage.value.crl_sign()) {
                return Err(format!("{} may not sign revocation lists (key usage), and has signed one", read.issuer));
            }
            return Ok(read);
        }
        match namesake {
            true => Err(format!(
                "the revocation list of {} is signed by none of the CAs of that name that are trusted here: remove it, or correct it",
                read.issuer
            )),
            false => Ok(read),
        }
    }

    /// Whether the CA that signed it is known.
    pub fn is_of_known_ca(&self) -> bool {
        self.signer.get().is_some()
    }

    /// Whether the key of this certificate signed it.
    pub fn is_signed_by_key_of(&self, certificate: &CertificateDer<'_>) -> bool {
        X509Certificate::from_der(certificate)
            .is_ok_and(|(_, certificate)| self.is_signed_by(&Key::new(certificate.public_key().raw)))
    }

    /// Whether a newer one should be there.
    pub fn is_stale(&self, now: SystemTime) -> bool {
        self.next_update.is_some_and(|next| next <= now)
    }

    pub(super) fn revokes(&self, serial: &[u8], issuer: &Key) -> bool {
        // An error would be one in the list, and that was read as a whole.
        matches!(self.parsed.find_serial(serial), Ok(Some(_))) && self.is_signed_by(issuer)
    }

    fn is_signed_by(&self, key: &Key) -> bool {
        if let Some(signer) = self.signer.get() {
            return *signer == key.fingerprint;
        }
        // Nobody can tell, of a connection that a predecessor has made and a list whose CA is not known: better one reset too many.
        let Some(spki) = &key.spki else { return true };
        let spki = SubjectPublicKeyInfoDer::from(&**spki);
        let Ok(entity) = webpki::RawPublicKeyEntity::try_from(&spki) else { return false };
        let mut algorithms = webpki::ALL_VERIFICATION_ALGS.iter();
        // The algorithm is named within what is signed: that the signature is good under one of ours is all that matters.
        let good =
            algorithms.any(|algorithm| entity.verify_signature(*algorithm, &self.signed, &self.signature).is_ok());
        if good && same_key(&spki, key) {
            let _ = self.signer.set(key.fingerprint);
        }
        good
    }
}
