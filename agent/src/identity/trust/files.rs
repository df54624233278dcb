//! The files that trust is made from: a federated domain's bundle, revocation lists. Read as a whole, or refused as a whole with the
//! file and what is wrong with it. Noticing changes is `control::trust`'s.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject as _},
};

use super::{RevocationList, Trust, TrustDomains};
use crate::identity::{Ca, IdentityError, TrustDomain, ca};

/// Istio's name for the revocation lists of a plugged-in CA (istio/istio security/pkg/pki/ca: `ca-crl.pem` beside the other files).
pub const CA_CRL: &str = "ca-crl.pem";

/// What is to be trusted beside the CA's own roots.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct TrustFiles {
    pub domains: TrustDomains,
    /// Bundles of other trust domains: PEM.
    pub federated: Vec<(TrustDomain, PathBuf)>,
    /// More revocation lists, which must be there.
    pub crl: Option<PathBuf>,
}

/// What comes from where our own roots come from.
pub struct Supplied {
    pub own: Arc<RootCertStore>,
    /// Certificates of CAs, which revocation lists may be of.
    pub known: Vec<CertificateDer<'static>>,
    /// Bundles of other trust domains. Files go before them.
    pub federated: Vec<(TrustDomain, RootCertStore)>,
    pub lists: Vec<CertificateRevocationListDer<'static>>,
    /// A directory that may hold more lists.
    pub beside: Option<PathBuf>,
}

impl Supplied {
    /// With the roots of `ca`, and with the lists in its directory if there are any.
    pub fn by_ca(dir: &Path, ca: &Ca) -> Self {
        Self {
            own: ca.roots(),
            known: ca.certificates().to_vec(),
            federated: Vec::new(),
            lists: Vec::new(),
            beside: Some(dir.to_owned()),
        }
    }

    /// Nothing: nobody is believed, until something is told.
    pub fn nothing() -> Self {
        let own = Arc::new(RootCertStore::empty());
        Self { own, known: Vec::new(), federated: Vec::new(), lists: Vec::new(), beside: None }
    }

    /// With the roots in a file, and with the lists beside it if there are any.
    pub fn by_file(path: &Path, domain: &TrustDomain) -> Result<Self, IdentityError> {
        let (roots, known) = ca::read_roots(path, &Some(domain.clone()))?;
        let beside = path.parent().map(Path::to_owned);
        Ok(Self { own: Arc::new(roots), known, federated: Vec::new(), lists: Vec::new(), beside })
    }
}

impl TrustFiles {
    /// Reads all, with the roots of `ca`, and with the lists in its directory if there are any.
    pub fn load(&self, dir: &Path, ca: &Ca) -> Result<Trust, IdentityError> {
        self.assemble(Supplied::by_ca(dir, ca))
    }

    /// Reads all, beside what is there already.
    pub fn assemble(&self, supplied: Supplied) -> Result<Trust, IdentityError> {
        let mut known = supplied.known;
        let mut trust = Trust::new(&self.domains, supplied.own);
        for (domain, roots) in supplied.federated {
            trust = trust.federated(domain, Arc::new(roots));
        }
        for (domain, path) in &self.federated {
            let (roots, certificates) = ca::read_roots(path, &Some(domain.clone()))?;
            known.extend(certificates);
            trust = trust.federated(domain.clone(), Arc::new(roots));
        }
        let mut lists = Vec::new();
        for der in &supplied.lists {
            let what = |what| IdentityError::Revocation { what };
            lists.push(RevocationList::read(der, &known).map_err(what)?);
        }
        if let Some(beside) = supplied.beside {
            match read_lists(&beside.join(CA_CRL), &known) {
                Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                read => lists.extend(read?),
            }
        }
        if let Some(path) = &self.crl {
            lists.extend(read_lists(path, &known)?);
        }
        Ok(trust.revoking(lists))
    }

    /// Whether both say the same, whatever our own trust domain is called.
    pub fn is_like(&self, other: &Self) -> bool {
        self.domains.aliases() == other.domains.aliases() && self.federated == other.federated && self.crl == other.crl
    }

    /// Every file that is read beside the CA's own, with the lists in `beside`.
    pub fn paths(&self, beside: Option<&Path>) -> Vec<PathBuf> {
        let bundles = self.federated.iter().map(|(_, path)| path.clone());
        beside.map(|dir| dir.join(CA_CRL)).into_iter().chain(bundles).chain(self.crl.clone()).collect()
    }
}

fn read_lists(path: &Path, known: &[CertificateDer<'_>]) -> Result<Vec<RevocationList>, IdentityError> {
    let pem = fs::read(path).map_err(IdentityError::io("read", path))?;
    let lists = CertificateRevocationListDer::pem_slice_iter(&pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|error| IdentityError::file(path, format!("not PEM: {error}")))?;
    // Istio lets a file be emptied to revoke nothing any more; what is there and is no list was meant to be one.
    if lists.is_empty() && !pem.trim_ascii().is_empty() {
        return Err(IdentityError::file(path, "holds no revocation list in PEM (X509 CRL)"));
    }
    lists.iter().map(|der| RevocationList::read(der, known).map_err(|what| IdentityError::file(path, what))).collect()
}
