//! Shuts a node of a cluster out: first its ledger says so, and from there on no service hands it a certificate; then those in the ledger
//! go on the revocation list, which is in the ConfigMap with the roots. Any number of services may run meanwhile.

use std::{
    collections::BTreeMap,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::{
    Cluster, Fault, TRIES,
    authority::{LISTS, object, read},
    book::{self, Book, Certificate},
    get, put,
};
use crate::{
    ca::{CaError, revoke::Outcome},
    identity::{Ca, IdentityError},
};

/// Beside the lists: the second in which each certificate on ours expires, by its serial number.
const EXPIRIES: &str = "ca-crl-expiries.json";
/// The last second that a date can be written of.
const YEAR_9999: u64 = 253_402_300_799;

/// May be repeated, and is to be if it fails after the first step.
pub async fn revoke(cluster: &Cluster, node: &str) -> Result<Outcome, CaError> {
    let now = SystemTime::now();
    let ledger = |fault| failed(format!("the ledger of node {node}"), fault);
    let (changed, known, certificates) = book::change(cluster, node, |book| {
        let (changed, known) = (book.shut_out.is_none(), !book.certificates.is_empty());
        book.forget_expired(now);
        book.shut_out.get_or_insert_with(|| humantime::format_rfc3339_seconds(now).to_string());
        let certificates: Vec<Certificate> = book.certificates.values().flatten().cloned().collect();
        ((changed, known, certificates), changed)
    })
    .await
    .map_err(ledger)?;

    let secret = &cluster.names.secret;
    let absent = || CaError::Kubernetes { what: format!("there is no Secret {secret}"), source: None };
    let kept = get(&cluster.secrets, secret).await.map_err(|fault| failed(format!("Secret {secret}"), fault))?;
    let ca = read(cluster, &kept.ok_or_else(absent)?)?;
    let signer = ca.key_fingerprint();
    let (ours, others): (Vec<_>, Vec<_>) =
        certificates.into_iter().partition(|certificate| Book::is_signed_by(certificate, &signer));
    let list = if ours.is_empty() { None } else { listed(cluster, &ca, &ours).await? };
    let last = others.iter().map(|certificate| certificate.1).max();
    // A ledger that somebody has written over may name any second; one that has no date is not told.
    let until = last.filter(|end| *end < YEAR_9999).and_then(at);
    Ok(Outcome {
        changed,
        known,
        list,
        other_signer: others.len(),
        other_until: until.map(|end| humantime::format_rfc3339_seconds(end).to_string()),
        unreadable: 0,
        first_unreadable: None,
    })
}

/// Lets `node` have certificates again. False if it was not shut out.
pub async fn undo(cluster: &Cluster, node: &str) -> Result<bool, CaError> {
    let changed = book::change(cluster, node, |book| {
        let was = book.shut_out.take().is_some();
        (was, was)
    });
    changed.await.map_err(|fault| failed(format!("the ledger of node {node}"), fault))
}

/// Puts certificates on the list, on top of whatever is there by then and has not expired.
async fn listed(cluster: &Cluster, ca: &Ca, certificates: &[Certificate]) -> Result<Option<(u64, usize)>, CaError> {
    let name = &cluster.names.root_config_map;
    let wrong = |fault| failed(format!("ConfigMap {name}"), fault);
    let serials: Vec<String> = certificates.iter().map(|certificate| certificate.0.clone()).collect();
    for _ in 0..TRIES {
        let mut found = get(&cluster.config_maps, name).await.map_err(wrong)?.unwrap_or_else(|| object(name));
        let data = found.data.get_or_insert_default();
        let lists = data.get(LISTS).map(String::as_bytes).unwrap_or_default();
        // Without it entries stay, and that is all.
        let ends = data.get(EXPIRIES).and_then(|text| serde_json::from_str(text).ok());
        let mut ends: BTreeMap<String, u64> = ends.unwrap_or_default();
        ends.extend(certificates.iter().map(|certificate| (certificate.0.clone(), certificate.1)));
        let expiry = |(serial, end): (&String, &u64)| Some((serial.clone(), at(*end)?));
        let revoked = ca.revoke(lists, &serials, &ends.iter().filter_map(expiry).collect()).map_err(|what| {
            let path = std::path::Path::new("ConfigMap").join(name).join(LISTS);
            CaError::Identity(IdentityError::File { path, what })
        })?;
        if revoked.added == 0 {
            return Ok(None);
        }
        ends.retain(|serial, _| revoked.serials.contains(serial));
        let ends = serde_json::to_string(&ends).map_err(|error| wrong(Fault::Other(error.to_string())))?;
        data.insert(LISTS.to_owned(), revoked.pem);
        data.insert(EXPIRIES.to_owned(), ends);
        match put(&cluster.config_maps, name, &found).await {
            Ok(()) => return Ok(Some((revoked.number, revoked.added))),
            Err(Fault::Conflict) => {}
            Err(fault) => return Err(wrong(fault)),
        }
    }
    Err(wrong(Fault::Conflict))
}

fn at(second: u64) -> Option<SystemTime> {
    UNIX_EPOCH.checked_add(Duration::from_secs(second))
}

fn failed(what: String, fault: Fault) -> CaError {
    CaError::Kubernetes { what, source: Some(Box::new(fault)) }
}
