//! A list of revoked certificates, as a mesh's CA would sign it.

use std::{fs, path::Path, time::SystemTime};

use anyhow::Result;
use marline_tests::wait::seconds;
use rcgen::{CertificateRevocationListParams, Issuer, KeyIdMethod, KeyPair, RevokedCertParams, SerialNumber};

/// With one serial number, by the CA of a directory.
pub(crate) fn list(ca: &Path, serial: &str) -> Result<String> {
    let read = |name: &str| fs::read_to_string(ca.join(name));
    let issuer = Issuer::from_ca_cert_pem(&read("ca-cert.pem")?, KeyPair::from_pem(&read("ca-key.pem")?)?)?;
    let digits = (0..serial.len()).step_by(2).map(|at| Ok(u8::from_str_radix(&serial[at..at + 2], 16)?));
    let now = SystemTime::now();
    let params = CertificateRevocationListParams {
        this_update: now.into(),
        next_update: (now + seconds(3_600)).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: vec![RevokedCertParams {
            serial_number: SerialNumber::from_slice(&digits.collect::<Result<Vec<u8>>>()?),
            revocation_time: now.into(),
            reason_code: None,
            invalidity_date: None,
        }],
        key_identifier_method: KeyIdMethod::Sha256,
    };
    Ok(params.signed_by(&issuer)?.pem()?)
}
