//! A CA that is never written down and vouches for nobody outside of this process: for what must have certificates to be tried at all, as the
//! kernel's records.

use std::{sync::Arc, time::Duration};

use rcgen::{Issuer, KeyPair};
use rustls::RootCertStore;

use super::{Ca, IdentityError, TrustDomain, parse_ca, root_params};

const LIFETIME: Duration = Duration::from_secs(3_600);

impl Ca {
    pub fn ephemeral(trust_domain: &TrustDomain) -> Result<Self, IdentityError> {
        let key = KeyPair::generate()?;
        let certificate = root_params(trust_domain, LIFETIME)?.self_signed(&key)?.der().clone();
        let mut roots = RootCertStore::empty();
        roots.add(certificate.clone())?;
        let not_after = parse_ca(&certificate).map_err(IdentityError::Ephemeral)?.not_after;
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(&certificate, key)?,
            chain: Vec::new(),
            certificates: vec![certificate.clone()],
            certificate,
            roots: Arc::new(roots),
            trust_domain: Some(trust_domain.clone()),
            not_after,
        })
    }
}
