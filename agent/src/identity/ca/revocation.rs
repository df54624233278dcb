//! Makes a CA's revocation list (RFC 5280, section 5): what it takes back beside what it had taken back before and has not expired. Which
//! certificates these are, and when they expire, is for the caller to know; `trust::revocation` reads lists.

use std::{
    collections::{HashMap, HashSet},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber};
use rustls::pki_types::{CertificateRevocationListDer, pem::PemObject as _};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use super::{Ca, whole_seconds};
use crate::identity::{hex, trust::RevocationList};

/// Clocks differ, and not all are set.
const SKEW: Duration = Duration::from_secs(600);

/// When certificates expire, by their serial numbers as they are written everywhere.
pub type Expiries = HashMap<String, SystemTime>;

/// A file of revocation lists, rewritten.
#[derive(Debug)]
pub struct Revoked {
    /// All lists, in PEM: other CAs' as they were.
    pub pem: String,
    /// Of this CA's list.
    pub number: u64,
    /// All that are on this CA's list now.
    pub serials: HashSet<String>,
    /// How many of them were not there before.
    pub added: usize,
}

/// This CA's list as it was, and the others beside it.
#[derive(Default)]
struct Present {
    /// In PEM.
    others: String,
    number: u64,
    entries: Vec<Listed>,
}

struct Listed {
    entry: RevokedCertParams,
    /// When the list was issued that has it.
    issued: SystemTime,
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

    /// The serial numbers on this CA's list among `lists`, in PEM.
    pub fn listed(&self, lists: &[u8]) -> Result<HashSet<String>, String> {
        let entries = self.present(lists)?.entries;
        Ok(entries.iter().map(|listed| text(&listed.entry.serial_number)).collect())
    }

    /// Adds certificates by their serial numbers (hexadecimal) to this CA's list among `lists`, in PEM. What is there stays, unless it is known
    /// from `expiries` that the list has no use for it any more. The new list has been read back and is one that agents take.
    pub fn revoke(&self, lists: &[u8], serials: &[String], expiries: &Expiries) -> Result<Revoked, String> {
        self.revoke_at(lists, serials, expiries, whole_seconds(SystemTime::now()))
    }

    fn revoke_at(
        &self,
        lists: &[u8],
        serials: &[String],
        expiries: &Expiries,
        now: SystemTime,
    ) -> Result<Revoked, String> {
        let Present { others: mut pem, number: last, mut entries } = self.present(lists)?;
        entries.retain(|listed| !listed.is_over(expiries, now));
        let mut entries: Vec<RevokedCertParams> = entries.into_iter().map(|listed| listed.entry).collect();
        let mut listed: HashSet<String> = entries.iter().map(|entry| text(&entry.serial_number)).collect();
        let mut added = 0;
        for serial in serials {
            let bytes = hex::parse(serial).filter(|bytes| !bytes.is_empty());
            let serial = SerialNumber::from_slice(&bytes.ok_or_else(|| format!("{serial:?} is no serial"))?);
            if listed.insert(text(&serial)) {
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
        Ok(Revoked { pem, number, serials: listed, added })
    }

    fn present(&self, lists: &[u8]) -> Result<Present, String> {
        let mut present = Present::default();
        for list in CertificateRevocationListDer::pem_slice_iter(lists) {
            let list = list.map_err(|error| format!("not PEM: {error}"))?;
            let read = RevocationList::read(&list, &self.certificates)?;
            if !read.is_signed_by_key_of(&self.certificate) {
                present.others.push_str(&as_pem(&list));
                continue;
            }
            let (_, parsed) = CertificateRevocationList::from_der(&list).map_err(|error| error.to_string())?;
            let number = parsed.crl_number().and_then(|number| u64::try_from(number).ok());
            present.number = present.number.max(number.unwrap_or_default());
            let issued = since(parsed.last_update().timestamp());
            present.entries.extend(parsed.iter_revoked_certificates().map(|entry| {
                let entry = RevokedCertParams {
                    serial_number: SerialNumber::from_slice(entry.raw_serial()),
                    revocation_time: since(entry.revocation_date.timestamp()).into(),
                    reason_code: entry.reason_code().and_then(|(_, code)| reason(code.0)),
                    invalidity_date: None,
                };
                Listed { entry, issued }
            }));
        }
        Ok(present)
    }
}

impl Listed {
    /// Whether its certificate has expired and it has been on a list that was issued after that (RFC 5280, section 3.3). Connections outlive
    /// certificates: an agent that saw no list meanwhile finds it on that one. Without a known expiry it never is.
    fn is_over(&self, expiries: &Expiries, now: SystemTime) -> bool {
        let end = expiries.get(&text(&self.entry.serial_number));
        end.is_some_and(|end| self.issued.min(now).duration_since(*end).is_ok_and(|since| since > SKEW))
    }
}

fn as_pem(der: &[u8]) -> String {
    pem::encode_config(&pem::Pem::new("X509 CRL", der), pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
}

fn since(seconds: i64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}

/// Without the leading zeros, which some write and others do not.
fn text(number: &SerialNumber) -> String {
    let bytes = number.to_bytes();
    let zeros = bytes.iter().take_while(|byte| **byte == 0).count();
    hex::upper(bytes.get(zeros..).unwrap_or_default())
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

#[cfg(test)]
mod tests {
    use std::sync::LazyLock;

    use proptest::prelude::*;

    use super::*;
    use crate::identity::TrustDomain;

    static CA: LazyLock<Ca> = LazyLock::new(|| Ca::ephemeral(&TrustDomain::default()).unwrap());
    const MINUTE: Duration = Duration::from_secs(60);

    fn serial(n: u8) -> String {
        format!("{:032X}", 0x40_u128 << 120 | u128::from(n))
    }

    #[test]
    fn an_entry_goes_when_it_was_on_a_list_that_was_issued_after_its_certificate_had_expired() {
        let now = whole_seconds(SystemTime::now());
        let expiries = Expiries::from([(serial(0), now + MINUTE)]);
        let revoke = |lists: &str, n, at| CA.revoke_at(lists.as_bytes(), &[serial(n)], &expiries, now + at).unwrap();
        let first = revoke("", 0, Duration::ZERO);
        // Expired, and no list has told of it since then.
        let second = revoke(&first.pem, 1, 30 * MINUTE);
        assert_eq!(second.serials, [serial(0), serial(1)].into());
        let third = revoke(&second.pem, 2, 31 * MINUTE);
        assert_eq!(third.serials, [serial(1), serial(2)].into());
        assert_eq!(CA.listed(third.pem.as_bytes()).unwrap(), third.serials);
        assert!(third.number > second.number);
        // With a clock that went wrong the list before was issued in a time that has not come.
        assert_eq!(revoke(&second.pem, 2, Duration::ZERO).serials.len(), 3);
        // What is to be listed is, whatever is known of it.
        assert_eq!(revoke(&second.pem, 0, 31 * MINUTE).serials, second.serials);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn no_entry_is_dropped_whose_certificate_has_not_expired_or_of_which_that_is_not_known(
            ends in prop::collection::vec(prop::option::of(-3_000i64..3_000), 1..12),
            listed_by in prop::collection::vec(any::<bool>(), 12),
            issued_ago in 0u64..3_000,
        ) {
            let now = whole_seconds(SystemTime::now());
            let at = |seconds: i64| match seconds {
                0.. => now + Duration::from_secs(seconds.unsigned_abs()),
                _ => now - Duration::from_secs(seconds.unsigned_abs()),
            };
            let all: Vec<String> = (0..).take(ends.len()).map(serial).collect();
            let known = all.iter().zip(&ends).filter_map(|(serial, end)| Some((serial.clone(), at((*end)?))));
            let expiries: Expiries = known.collect();
            let issued = now - Duration::from_secs(issued_ago);
            // In one list, or in two of them.
            let of = |which: bool| -> Vec<String> {
                all.iter().zip(&listed_by).filter(|(_, by)| **by == which).map(|(serial, _)| serial.clone()).collect()
            };
            let nothing = Expiries::new();
            let lists = [true, false].map(|which| CA.revoke_at(b"", &of(which), &nothing, issued).unwrap().pem).concat();
            let next = CA.revoke_at(lists.as_bytes(), &[serial(99)], &expiries, now).unwrap();
            for (serial, end) in all.iter().zip(&ends) {
                let over = end.is_some_and(|end| issued > at(end) + SKEW);
                prop_assert_eq!(next.serials.contains(serial), !over, "{:?}, issued {} s ago", end, issued_ago);
            }
            prop_assert!(next.serials.contains(&serial(99)));
            prop_assert_eq!(CA.listed(next.pem.as_bytes()).unwrap(), next.serials);
        }
    }
}
