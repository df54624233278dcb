//! One message of the Workload API, read and checked. A certificate that is no good is left out, with the reason; roots or lists that are
//! no good make the whole message void, because half of them would be another trust than the one that was meant.

use std::sync::Arc;

use rustls::{
    RootCertStore,
    crypto::aws_lc_rs::sign::any_supported_type,
    pki_types::{CertificateDer, CertificateRevocationListDer, PrivateKeyDer, PrivatePkcs8KeyDer},
    sign::CertifiedKey,
};
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::Zeroize as _;

use super::Svids;
use crate::identity::{
    SpiffeId, Svid, TrustDomain, Validity, svid_identity,
    trust::{RevocationList, files::Supplied},
    wire::spiffe::{X509Svid, X509SvidResponse},
};

#[derive(Debug)]
pub(super) struct Update {
    pub svids: Svids,
    /// Certificates that are not used, and why.
    pub refused: Vec<String>,
    own: Arc<RootCertStore>,
    federated: Vec<(TrustDomain, RootCertStore)>,
    known: Vec<CertificateDer<'static>>,
    lists: Vec<CertificateRevocationListDer<'static>>,
}

impl Update {
    pub fn read(message: X509SvidResponse, own: &TrustDomain) -> Result<Self, String> {
        let mut update = Self {
            svids: Svids::new(),
            refused: Vec::new(),
            own: Arc::new(RootCertStore::empty()),
            federated: Vec::new(),
            known: Vec::new(),
            lists: message.crl.into_iter().map(CertificateRevocationListDer::from).collect(),
        };
        let mut bundle: Option<Vec<u8>> = None;
        for mut svid in message.svids {
            let told = std::mem::take(&mut svid.bundle);
            let (name, read) = (svid.spiffe_id.clone(), read_svid(svid, own));
            match read {
                Ok((id, _)) if update.svids.contains_key(&id) => {
                    update.refused.push(format!("{id}: there is another one before it"));
                }
                Ok((id, read)) => {
                    update.svids.insert(id, read);
                }
                Err(what) => update.refused.push(format!("{name:?}: {what}")),
            }
            if !is_of(&name, own) {
                continue;
            }
            match &bundle {
                Some(before) if *before != told => return Err(format!("two different bundles of {own}")),
                _ => bundle = Some(told),
            }
        }
        let bundle = bundle.ok_or_else(|| {
            format!("it holds nothing of trust domain {own} (spec.trustDomain): is that the name of SPIRE's?")
        })?;
        update.own = Arc::new(update.roots(&bundle).map_err(|what| format!("the bundle of {own}: {what}"))?);
        for (name, bundle) in message.federated_bundles {
            let domain = TrustDomain::parse(name.strip_prefix("spiffe://").unwrap_or(&name))
                .map_err(|error| format!("a federated bundle: {error}"))?;
            if domain == *own {
                return Err(format!("{own} among the federated bundles: it is our own"));
            }
            // Policies that name it mean this mesh, whatever its name.
            if domain == TrustDomain::default() {
                update.refused.push(format!("the bundle of {domain}: policies that name it mean this mesh"));
                continue;
            }
            let roots = update.roots(&bundle).map_err(|what| format!("the bundle of {domain}: {what}"))?;
            update.federated.push((domain, roots));
        }
        for list in &update.lists {
            RevocationList::read(list, &update.known).map_err(|what| format!("a revocation list: {what}"))?;
        }
        Ok(update)
    }

    pub fn supplied(&self) -> Supplied {
        Supplied {
            own: Arc::clone(&self.own),
            known: self.known.clone(),
            federated: self.federated.clone(),
            lists: self.lists.clone(),
            beside: None,
        }
    }

    fn roots(&mut self, bundle: &[u8]) -> Result<RootCertStore, String> {
        let mut roots = RootCertStore::empty();
        for (der, _) in certificates(bundle)? {
            roots.add(der.clone()).map_err(|error| format!("not usable as a root: {error}"))?;
            self.known.push(der);
        }
        if roots.is_empty() {
            return Err("it holds no root".to_owned());
        }
        Ok(roots)
    }
}

fn is_of(id: &str, domain: &TrustDomain) -> bool {
    let rest = id.strip_prefix("spiffe://").unwrap_or_default();
    rest.split('/').next() == Some(domain.as_str())
}

fn read_svid(svid: X509Svid, own: &TrustDomain) -> Result<(SpiffeId, Svid), String> {
    let mut der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(svid.x509_svid_key));
    let key = any_supported_type(&der);
    der.zeroize();
    let chain = certificates(&svid.x509_svid)?;
    let (leaf, validity) = chain.first().ok_or("there is no certificate")?;
    let id = svid_identity(leaf).map_err(|fault| fault.to_string())?;
    if id.to_string() != svid.spiffe_id {
        return Err(format!("the certificate is of {id}"));
    }
    if id.trust_domain() != own {
        return Err(format!("it is not of this mesh's trust domain, {own}"));
    }
    let Validity { not_before, not_after, serial } = validity.clone();
    let key = key.map_err(|error| format!("its key cannot be used: {error}"))?;
    let key = CertifiedKey::new(chain.into_iter().map(|(der, _)| der).collect(), key);
    key.keys_match().map_err(|error| format!("its key is another's: {error}"))?;
    Ok((id.clone(), Svid { id, key: Arc::new(key), not_before, not_after, serial }))
}

/// Certificates in DER, one after the other, with nothing between or behind.
fn certificates(mut der: &[u8]) -> Result<Vec<(CertificateDer<'static>, Validity)>, String> {
    let mut all = Vec::new();
    while !der.is_empty() {
        let (rest, parsed) =
            X509Certificate::from_der(der).map_err(|error| format!("not a certificate in DER: {error}"))?;
        let length = der.len().checked_sub(rest.len()).filter(|length| *length > 0).ok_or("not DER")?;
        let one = der.get(..length).ok_or("not DER")?;
        all.push((CertificateDer::from(one.to_vec()), Validity::of(&parsed)));
        der = rest;
    }
    Ok(all)
}
