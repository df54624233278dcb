//! Chains that were verified already: peers show the same chain at each handshake, and verifying it costs a signature and two parsers each
//! time. What is remembered is remembered by one `Trust` and ends with it, so roots and revocation lists that change forget
//! everything; and it holds no longer than each certificate of the chain is good. That a chain is bad is never remembered.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
};

use rustls::pki_types::{CertificateDer, UnixTime};
use x509_parser::prelude::{FromDer as _, X509Certificate};

use super::voucher::{Voucher, try_sha256};
use crate::identity::TrustDomain;

/// Which end of a connection shows a chain: certificates are for one, for the other, or for both.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    Client,
    Server,
}

impl Role {
    pub fn usage(self) -> webpki::KeyUsage {
        match self {
            Self::Client => webpki::KeyUsage::client_auth(),
            Self::Server => webpki::KeyUsage::server_auth(),
        }
    }
}

/// Everything that the verdict depends on but the time and the `Trust`, by its hash.
#[derive(PartialEq, Eq, Hash)]
pub(super) struct Shown([u8; 32]);

impl Shown {
    pub fn new(
        domain: &TrustDomain,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        role: Role,
    ) -> Option<Self> {
        let mut text = vec![role as u8];
        // With its length, so that no two that differ are the same bytes.
        let mut add = |part: &[u8]| {
            text.extend_from_slice(&(part.len() as u64).to_le_bytes());
            text.extend_from_slice(part);
        };
        add(domain.as_str().as_bytes());
        add(leaf);
        intermediates.iter().for_each(|intermediate| add(intermediate));
        try_sha256(&text).map(Self)
    }
}

/// From the latest beginning to the earliest end in a chain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Span {
    from: u64,
    to: u64,
}

impl Span {
    /// Nothing if one of them cannot be read, or was made before 1970.
    pub fn of<'a>(certificates: impl IntoIterator<Item = &'a [u8]>) -> Option<Self> {
        let mut span = Self { from: 0, to: u64::MAX };
        for der in certificates {
            let (_, certificate) = X509Certificate::from_der(der).ok()?;
            let validity = certificate.validity();
            span.from = span.from.max(u64::try_from(validity.not_before.timestamp()).ok()?);
            span.to = span.to.min(u64::try_from(validity.not_after.timestamp()).ok()?);
        }
        Some(span)
    }

    /// As the library has it: both ends are in it (RFC 5280 section 4.1.2.5).
    fn contains(self, now: UnixTime) -> bool {
        (self.from..=self.to).contains(&now.as_secs())
    }
}

/// More peers than a node talks to; some 250 bytes each.
const MOST: usize = 4096;

#[derive(Default)]
pub(super) struct Known(Mutex<HashMap<Shown, (Span, Voucher)>>);

impl Known {
    pub fn get(&self, shown: &Shown, now: UnixTime) -> Option<Voucher> {
        let known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.get(shown).filter(|(span, _)| span.contains(now)).map(|(_, voucher)| voucher.clone())
    }

    pub fn insert(&self, shown: Shown, span: Span, voucher: Voucher) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Leaves are renewed and the old ones stay: beginning anew costs each peer one verification.
        if known.len() >= MOST {
            known.clear();
        }
        known.insert(shown, (span, voucher));
    }
}

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").finish_non_exhaustive()
    }
}
