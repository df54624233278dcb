//! The files that trust is made from: a federated domain's bundle, revocation lists. Read as a whole, or refused as a whole with the
//! file and what is wrong with it. Noticing changes is `control::trust`'s.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use rustls::pki_types::{CertificateDer, CertificateRevocationListDer, pem::PemObject as _};

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

impl TrustFiles {
    /// Reads all, with the roots of `ca`, and with the lists in its directory if there are any.
    pub fn load(&self, dir: &Path, ca: &Ca) -> Result<Trust, IdentityError> {
        let mut known = ca.certificates().to_vec();
        let mut trust = Trust::new(&self.domains, ca.roots());
        for (domain, path) in &self.federated {
            let (roots, certificates) = ca::read_roots(path, &Some(domain.clone()))?;
            known.extend(certificates);
            trust = trust.federated(domain.clone(), Arc::new(roots));
        }
        let beside = dir.join(CA_CRL);
        let mut lists = match read_lists(&beside, &known) {
            Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
            read => read?,
        };
        if let Some(path) = &self.crl {
            lists.extend(read_lists(path, &known)?);
        }
        Ok(trust.revoking(lists))
    }

    /// Whether both say the same, whatever our own trust domain is called.
    pub fn is_like(&self, other: &Self) -> bool {
        self.domains.aliases() == other.domains.aliases() && self.federated == other.federated && self.crl == other.crl
    }

    /// Every file that `load` reads beside the CA's own.
    pub fn paths(&self, dir: &Path) -> Vec<PathBuf> {
        let bundles = self.federated.iter().map(|(_, path)| path.clone());
        std::iter::once(dir.join(CA_CRL)).chain(bundles).chain(self.crl.clone()).collect()
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
