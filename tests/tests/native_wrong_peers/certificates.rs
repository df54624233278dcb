//! Certificates for impostors: signed by the mesh's own authority or by another, right in all but one respect.

use std::{
    fs,
    path::{Path, PathBuf},
    time::{Duration, SystemTime},
};

use anyhow::{Context, Result};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};

const DAY: Duration = Duration::from_secs(86_400);

/// The file of a certificate chain, and that of its key.
#[derive(Clone, Debug)]
pub struct Files {
    pub chain: PathBuf,
    pub key: PathBuf,
}

/// Whoever signs.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    /// The signer's own certificate, sent along as an intermediate would be.
    chain: String,
}

/// When a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    Now,
    Past,
    Future,
}

impl Authority {
    /// The mesh's own, from the files that both agents read.
    pub fn of_mesh(directory: &Path) -> Result<Self> {
        let read = |name: &str| fs::read_to_string(directory.join(name)).with_context(|| name.to_owned());
        let key = KeyPair::from_pem(&read("ca-key.pem")?)?;
        Ok(Self { issuer: Issuer::from_ca_cert_pem(&read("ca-cert.pem")?, key)?, chain: read("cert-chain.pem")? })
    }

    /// One that nobody knows.
    pub fn unknown() -> Result<Self> {
        let key = KeyPair::generate()?;
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign];
        let chain = parameters.self_signed(&key)?.pem();
        Ok(Self { issuer: Issuer::new(parameters, key), chain })
    }

    /// Signs a certificate for a URI (or a DNS name, if it is none) and writes it to files of that name.
    pub fn issue(&self, directory: &Path, name: &str, subject: &str, when: When) -> Result<Files> {
        let key = KeyPair::generate()?;
        let now = SystemTime::now();
        let (from, to) = match when {
            When::Now => (now - DAY, now + DAY),
            When::Past => (now - 3 * DAY, now - DAY),
            When::Future => (now + DAY, now + 3 * DAY),
        };
        let mut parameters = CertificateParams::default();
        (parameters.not_before, parameters.not_after) = (from.into(), to.into());
        parameters.distinguished_name = DistinguishedName::new();
        parameters.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        parameters.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let san = subject.to_owned().try_into()?;
        parameters.subject_alt_names =
            vec![if subject.contains("://") { SanType::URI(san) } else { SanType::DnsName(san) }];
        let certificate = parameters.signed_by(&key, &self.issuer)?;
        let files = Files { chain: directory.join(format!("{name}.pem")), key: directory.join(format!("{name}.key")) };
        fs::write(&files.chain, certificate.pem() + &self.chain)?;
        fs::write(&files.key, key.serialize_pem())?;
        Ok(files)
    }
}
