//! Makes an intermediate CA under another one: what signs workloads' certificates can then be replaced without the root.

use std::{fs, path::Path, time::SystemTime};

use rcgen::{BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, KeyPair, KeyUsagePurpose};
use zeroize::Zeroize as _;

use super::{
    CA_CERT, CA_KEY, CERT_CHAIN, CLOCK_SKEW, Ca, IdentityError, ROOT_CERT, ROOT_LIFETIME, TrustDomain, file_paths,
    random_serial, uri_san, write_new,
};
use crate::identity::{hex, manager::pem};

impl Ca {
    /// Writes an intermediate that this CA signs to `dir`, in Istio's layout, with the roots that are in `own`, this CA's directory. Never
    /// overwrites. It may sign workloads' certificates and no further CA (path length 0).
    pub fn init_intermediate(&self, own: &Path, dir: &Path, trust_domain: &TrustDomain) -> Result<(), IdentityError> {
        if let Some(present) = file_paths(dir).into_iter().find(|path| path.symlink_metadata().is_ok()) {
            return Err(IdentityError::Exists(present));
        }
        self.require_trust_domain(trust_domain)?;
        let now = SystemTime::now();
        let mut key = KeyPair::generate()?;
        let mut params = CertificateParams::default();
        params.not_before = (now - CLOCK_SKEW).into();
        params.not_after = (now + ROOT_LIFETIME).min(self.not_after).into();
        let serial = random_serial();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
        // CAs that follow each other shall be told apart by people, too.
        let number: String = hex::lower(&serial.to_bytes()).chars().take(8).collect();
        params.distinguished_name.push(DnType::CommonName, format!("Marline intermediate {number}"));
        params.serial_number = Some(serial);
        params.subject_alt_names = vec![uri_san(format!("spiffe://{trust_domain}"))?];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &self.issuer)?.pem();
        let mut key_pem = key.serialize_pem();
        key.zeroize();

        let roots = fs::read_to_string(own.join(ROOT_CERT)).map_err(IdentityError::io("read", &own.join(ROOT_CERT)))?;
        let chain: String = std::iter::once(certificate.clone()).chain(self.chain.iter().map(|der| pem(der))).collect();
        fs::create_dir_all(dir).map_err(IdentityError::io("create the directory", dir))?;
        let written = write_new(&dir.join(CA_KEY), key_pem.as_bytes(), 0o600)
            .and_then(|()| write_new(&dir.join(CA_CERT), certificate.as_bytes(), 0o644))
            .and_then(|()| write_new(&dir.join(ROOT_CERT), roots.as_bytes(), 0o644))
            .and_then(|()| write_new(&dir.join(CERT_CHAIN), chain.as_bytes(), 0o644))
            // A CA above may allow none below it.
            .and_then(|()| Self::open(dir).map(drop));
        key_pem.zeroize();
        // Half a CA is none, and would stand in the way of the next try.
        written.inspect_err(|_| file_paths(dir).iter().for_each(|path| drop(fs::remove_file(path))))
    }
}
