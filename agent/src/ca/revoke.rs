//! Shuts a node out: no more certificates for it, and those that it has are put on the CA's revocation list. It works on the files alone,
//! whether a service runs or not. For a cluster's services this is `cluster::revoke`.

use std::{fs, io, time::SystemTime};

use super::{
    CaError,
    ledger::{self, entry::Entry},
    shut_out,
};
use crate::{
    config::CaFiles,
    identity::{Ca, IdentityError, ca::Expiries},
};

/// What was done.
#[derive(Debug)]
pub struct Outcome {
    /// Whether it was not done already.
    pub changed: bool,
    /// Whether the node ever had a certificate.
    pub known: bool,
    /// The number of the new list, and the certificates that were added to it.
    pub list: Option<(u64, usize)>,
    /// Certificates that count still and that another key has signed than the CA has now.
    pub other_signer: usize,
    /// When the last of these expires.
    pub other_until: Option<String>,
    /// Lines of the ledger that cannot be read, or that name no serial, and where the first one is.
    pub unreadable: usize,
    pub first_unreadable: Option<String>,
}

impl Outcome {
    /// Whether none of the node's certificates can count still.
    pub fn is_whole(&self) -> bool {
        self.other_signer == 0 && self.unreadable == 0
    }
}

/// Shuts `node` out. May be repeated, and is to be if it fails after the first step.
pub fn revoke(config: &CaFiles, node: &str) -> Result<Outcome, CaError> {
    let now = SystemTime::now();
    let _lock = ledger::file::lock(&config.state)?;
    // First: from here on there are no more certificates to be listed.
    let mut nodes = shut_out::read(&config.state)?;
    let changed = !nodes.contains_key(node);
    if changed {
        nodes.insert(node.to_owned(), humantime::format_rfc3339_seconds(now).to_string());
        shut_out::write(&config.state, &nodes)?;
    }
    let ca = Ca::open(&config.ca).map_err(CaError::Identity)?;
    let signer = ca.key_fingerprint();
    let lists = match fs::read(&config.crl) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        read => read.map_err(CaError::io("read", &config.crl)),
    };
    // What is wrong with it is told when there is something to add.
    let listed = lists.as_ref().ok().and_then(|lists| ca.listed(lists).ok()).unwrap_or_default();
    let is_listed = |entry: &Entry| {
        entry.signer.as_ref() == Some(&signer) && entry.serial.as_ref().is_some_and(|serial| listed.contains(serial))
    };
    let is_nodes = |entry: &Entry| entry.certificate_for() == Some(node);
    let read = ledger::file::read(&config.state, |entry| is_nodes(entry) || is_listed(entry))?;
    let expiry = |entry: &Entry| Some((entry.serial.clone()?, entry.expires()?));
    let expiries: Expiries = read.entries.iter().filter(|entry| is_listed(entry)).filter_map(expiry).collect();
    let of_node: Vec<_> = read.entries.into_iter().filter(is_nodes).collect();
    let known = !of_node.is_empty();
    let (ours, others): (Vec<_>, Vec<_>) = of_node
        .into_iter()
        .filter(|entry| entry.counts_at(now))
        .partition(|entry| entry.signer.as_deref() == Some(&*signer));
    let nameless = ours.iter().filter(|entry| entry.serial.is_none()).count();
    let serials: Vec<String> = ours.into_iter().filter_map(|entry| entry.serial).collect();
    let mut list = None;
    if !serials.is_empty() {
        let revoked = ca
            .revoke(&lists?, &serials, &expiries)
            .map_err(|what| CaError::Identity(IdentityError::File { path: config.crl.clone(), what }))?;
        if revoked.added > 0 {
            shut_out::replace(&config.crl, revoked.pem.as_bytes(), 0o644).map_err(CaError::io("write", &config.crl))?;
        }
        list = Some((revoked.number, revoked.added)).filter(|(_, added)| *added > 0);
    }
    Ok(Outcome {
        changed,
        known,
        list,
        other_signer: others.len(),
        other_until: others.into_iter().filter_map(|entry| entry.not_after).max(),
        unreadable: read.unreadable + nameless,
        first_unreadable: read.first_unreadable,
    })
}

/// Lets `node` have certificates again. What was listed stays listed: a key that was taken back is not given again. False if it was not
/// shut out.
pub fn undo(config: &CaFiles, node: &str) -> Result<bool, CaError> {
    let _lock = ledger::file::lock(&config.state)?;
    let mut nodes = shut_out::read(&config.state)?;
    let was = nodes.remove(node).is_some();
    if was {
        shut_out::write(&config.state, &nodes)?;
    }
    Ok(was)
}
