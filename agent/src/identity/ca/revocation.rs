//! Makes a CA's revocation list (RFC 5280, section 5): what it takes back beside what it had taken back before. Which certificates these are
//! is for the caller to know; `trust::revocation` reads lists.

use std::{
    collections::HashSet,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber};
use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject as _};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use super::{Ca, whole_seconds};
use crate::identity::trust::RevocationList;

/// A file of revocation lists, rewritten.
#[derive(Debug)]
pub struct Revoked {
    /// All lists, in PEM: other CAs' as they were.
    pub pem: String,
    /// Of this CA's list.
    pub number: u64,
    pub entries: usize,
    /// Those of them that were not there before.
    pub added: usize,
}

impl Ca {
    /// Those of `lists`, in PEM, that agents take beside this CA's roots.
    pub fn lists_beside_roots(&self, lists: &[u8]) -> Result<String, String> {
        let mut pem = String::new();
        for list in CertificateRevocationListDer::pem_slice_iter(lists) {
            let list = list.map_err(|error| format!("not PEM: {error}"))?;
            if RevocationList::read(&list, self.root_certificates()).is_ok() {
                pem.push_str(&as_pem(&list));
            }
        }
        Ok(pem)
    }

    /// Adds certificates by their serial numbers (hexadecimal) to this CA's list among `lists`, in PEM. What is there stays. The new list
    /// has been read back and is one that agents take.
    pub fn revoke(&self, lists: &[u8], serials: &[String]) -> Result<Revoked, String> {
        let now = whole_seconds(SystemTime::now());
        let mut pem = String::new();
        let mut entries: Vec<RevokedCertParams> = Vec::new();
        let mut last = 0;
        for list in CertificateRevocationListDer::pem_slice_iter(lists) {
            let list = list.map_err(|error| format!("not PEM: {error}"))?;
            let read = RevocationList::read(&list, &self.certificates)?;
            if !read.is_signed_by_key_of(&self.certificate) {
                pem.push_str(&as_pem(&list));
                continue;
            }
            let (_, parsed) = CertificateRevocationList::from_der(&list).map_err(|error| error.to_string())?;
            let number = parsed.crl_number().and_then(|number| u64::try_from(number).ok());
            last = last.max(number.unwrap_or_default());
            entries.extend(parsed.iter_revoked_certificates().map(|entry| RevokedCertParams {
                serial_number: SerialNumber::from_slice(entry.raw_serial()),
                revocation_time: since(entry.revocation_date.timestamp()).into(),
                reason_code: entry.reason_code().and_then(|(_, code)| reason(code.0)),
                invalidity_date: None,
            }));
        }
        let mut listed: HashSet<Vec<u8>> = entries.iter().map(|entry| digits(&entry.serial_number)).collect();
        let mut added = 0;
        for serial in serials {
            let serial = SerialNumber::from_slice(&unhex(serial).ok_or_else(|| format!("{serial:?} is no serial"))?);
            if listed.insert(digits(&serial)) {
                added += 1;
                entries.push(RevokedCertParams {
                    serial_number: serial,
                    revocation_time: now.into(),
                    reason_code: Some(RevocationReason::KeyCompromise),
                    invalidity_date: None,
                });
            }
        }
        // Greater than all before also where the file was lost.
        let number = (last + 1).max(now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs());
        let count = entries.len();
        let list = CertificateRevocationListParams {
            this_update: now.into(),
            // It is made anew when there is something to add, not by the day: an overdue one would end the mesh of an Envoy.
            next_update: self.not_after.into(),
            crl_number: number.into(),
            issuing_distribution_point: None,
            revoked_certs: entries,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = list.signed_by(&self.issuer).map_err(|error| format!("the list cannot be signed: {error}"))?;
        RevocationList::read(list.der(), &self.certificates)?;
        pem.push_str(&as_pem(list.der()));
        Ok(Revoked { pem, number, entries: count, added })
    }
}

fn as_pem(der: &[u8]) -> String {
    pem::encode_config(&pem::Pem::new("X509 CRL", der), pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
}

fn since(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// Without the leading zeros, which some write and others do not.
fn digits(number: &SerialNumber) -> Vec<u8> {
    number.to_bytes().into_iter().skip_while(|byte| *byte == 0).collect()
}

fn reason(code: u8) -> Option<RevocationReason> {
    Some(match code {
        1 => RevocationReason::KeyCompromise,
        2 => RevocationReason::CaCompromise,
        3 => RevocationReason::AffiliationChanged,
        4 => RevocationReason::Superseded,
        5 => RevocationReason::CessationOfOperation,
        6 => RevocationReason::CertificateHold,
        8 => RevocationReason::RemoveFromCrl,
        9 => RevocationReason::PrivilegeWithdrawn,
        10 => RevocationReason::AaCompromise,
        _ => return None,
    })
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    if text.is_empty() || !text.len().is_multiple_of(2) || !text.is_ascii() {
        return None;
    }
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok()).collect()
}
