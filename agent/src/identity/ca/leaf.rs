//! What a CA signs: X.509-SVIDs, for keys that are made here and exist in memory only or for public keys that somebody else has proved to
//! hold, and the certificate that a CA service shows of itself. Who may have one is for the caller to know.

use std::{
    net::IpAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{
    CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SubjectPublicKeyInfo,
};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use zeroize::Zeroize as _;

use super::{CLOCK_SKEW, Ca, SHORTEST_LEAF, random_serial, uri_san, whole_seconds};
use crate::identity::{IdentityError, SpiffeId, Svid, hex};

/// A certificate without its key.
#[derive(Clone, Debug)]
pub struct Signed {
    /// The leaf and the intermediates, nearest first.
    pub chain: Vec<CertificateDer<'static>>,
    /// Hexadecimal, as in `Svid`.
    pub serial: String,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
}

impl Ca {
    /// Makes a key and a certificate for `id`. The certificate never outlives the CA's own.
    pub fn issue(&self, id: &SpiffeId, lifetime: Duration) -> Result<Svid, IdentityError> {
        let (signed, key) = self.with_new_key(|key| self.sign_workload(id, key, lifetime))?;
        Ok(Svid {
            id: id.clone(),
            not_before: signed.not_before,
            not_after: signed.not_after,
            serial: signed.serial,
            key: Arc::new(CertifiedKey::new(signed.chain, key)),
        })
    }

    /// Makes a certificate for `id` and a public key (SubjectPublicKeyInfo in DER), of which nothing else is taken.
    pub fn certify(&self, id: &SpiffeId, public_key: &[u8], lifetime: Duration) -> Result<Signed, IdentityError> {
        self.sign_workload(id, &SubjectPublicKeyInfo::from_der(public_key)?, lifetime)
    }

    /// Makes a key and a certificate for a server that goes by these names. It names no workload, so no peer of the mesh takes it for one.
    pub fn issue_server(
        &self,
        names: &[String],
        lifetime: Duration,
    ) -> Result<(CertifiedKey, SystemTime), IdentityError> {
        let name = |name: &String| match name.parse::<IpAddr>() {
            Ok(address) => Ok(SanType::IpAddress(address)),
            Err(_) => Ok(SanType::DnsName(name.as_str().try_into()?)),
        };
        let names = names.iter().map(name).collect::<Result<Vec<_>, IdentityError>>()?;
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let (signed, key) = self.with_new_key(|key| self.sign(names, usages, key, lifetime))?;
        Ok((CertifiedKey::new(signed.chain, key), signed.not_after))
    }

    fn with_new_key(
        &self,
        sign: impl FnOnce(&KeyPair) -> Result<Signed, IdentityError>,
    ) -> Result<(Signed, Arc<dyn rustls::sign::SigningKey>), IdentityError> {
        let mut key = KeyPair::generate()?;
        let signed = sign(&key);
        let mut der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialized_der().to_vec()));
        key.zeroize();
        let signing_key = any_ecdsa_type(&der);
        der.zeroize();
        Ok((signed?, signing_key?))
    }

    fn sign_workload(
        &self,
        id: &SpiffeId,
        key: &impl PublicKeyData,
        lifetime: Duration,
    ) -> Result<Signed, IdentityError> {
        if let Some(trust_domain) = &self.trust_domain
            && trust_domain != id.trust_domain()
        {
            return Err(IdentityError::ForeignTrustDomain { id: id.clone(), trust_domain: trust_domain.clone() });
        }
        let usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        self.sign(vec![uri_san(id.to_string())?], usages, key, lifetime)
    }

    fn sign(
        &self,
        names: Vec<SanType>,
        usages: Vec<ExtendedKeyUsagePurpose>,
        key: &impl PublicKeyData,
        lifetime: Duration,
    ) -> Result<Signed, IdentityError> {
        if lifetime < SHORTEST_LEAF {
            return Err(IdentityError::Lifetime(lifetime));
        }
        let now = whole_seconds(SystemTime::now());
        if let Ok(ago) = now.duration_since(self.not_after) {
            return Err(IdentityError::CaExpired(ago));
        }
        let not_before = now - CLOCK_SKEW;
        let not_after = now.checked_add(lifetime).map_or(self.not_after, |end| whole_seconds(end).min(self.not_after));
        let serial = random_serial();

        // Each line is a clause of the X.509-SVID standard, sections 2 to 4 and appendix A; see the test beside it.
        let mut params = CertificateParams::default();
        params.not_before = not_before.into();
        params.not_after = not_after.into();
        params.serial_number = Some(serial.clone());
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = names;
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = usages;
        params.use_authority_key_identifier_extension = true;
        let leaf = params.signed_by(key, &self.issuer)?;
        Ok(Signed {
            chain: std::iter::once(leaf.der().clone()).chain(self.chain.iter().cloned()).collect(),
            serial: hex::upper(&serial.to_bytes()),
            not_before,
            not_after,
        })
    }
}
