//! Whom this mesh trusts to vouch for identities: the roots of each trust domain, the names that our own domain goes by, and what
//! was revoked. One immutable value, swapped as a whole; `TrustStore` holds the present one and tells of the next.
//!
//! Reading the files is `trust::files`'s, revocation lists are `trust::revocation`'s; that a leaf is a workload's, and who may be
//! at the other end of a connection, is `tls::verifier`'s to say.

pub mod files;
mod known;
pub mod refusal;
mod revocation;
mod voucher;

use std::{collections::BTreeMap, fmt, sync::Arc};

use arc_swap::ArcSwap;
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, UnixTime},
};
use tokio::sync::watch;

use self::known::{Known, Shown, Span};
use super::{SpiffeId, TrustDomain};

pub use files::TrustFiles;
pub use known::Role;
pub use revocation::RevocationList;
pub use voucher::{KeptVoucher, Voucher, Withdrawn};

/// Our own trust domain, and the others that mean the same mesh (Istio's `meshConfig.trustDomainAliases`): a workload of an alias is
/// taken for the one of that namespace and service account here.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct TrustDomains {
    own: TrustDomain,
    aliases: Arc<[TrustDomain]>,
}

impl TrustDomains {
    pub fn new(own: TrustDomain, aliases: impl IntoIterator<Item = TrustDomain>) -> Self {
        Self { own, aliases: aliases.into_iter().collect() }
    }

    pub fn own(&self) -> &TrustDomain {
        &self.own
    }

    pub fn aliases(&self) -> &[TrustDomain] {
        &self.aliases
    }

    /// Our own first, then the aliases as they are written.
    pub fn iter(&self) -> impl Iterator<Item = &TrustDomain> {
        std::iter::once(&self.own).chain(self.aliases.iter())
    }

    pub fn contains(&self, domain: &TrustDomain) -> bool {
        self.iter().any(|known| known == domain)
    }

    /// The identity as it is called here, if it is one of this mesh.
    pub fn canonical(&self, id: &SpiffeId) -> SpiffeId {
        match self.contains(id.trust_domain()) {
            true => id.in_domain(&self.own),
            false => id.clone(),
        }
    }

    /// Whether both name the same workload.
    pub fn same(&self, a: &SpiffeId, b: &SpiffeId) -> bool {
        a == b
            || a.namespace() == b.namespace()
                && a.service_account() == b.service_account()
                && self.contains(a.trust_domain())
                && self.contains(b.trust_domain())
    }
}

impl From<TrustDomain> for TrustDomains {
    fn from(own: TrustDomain) -> Self {
        Self::new(own, [])
    }
}

impl From<&TrustDomain> for TrustDomains {
    fn from(own: &TrustDomain) -> Self {
        own.clone().into()
    }
}

impl From<&Self> for TrustDomains {
    fn from(domains: &Self) -> Self {
        domains.clone()
    }
}

/// Names as they are told to people: `cluster.local, old.example`.
impl fmt::Display for TrustDomains {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.own.0)?;
        self.aliases.iter().try_for_each(|alias| write!(f, ", {alias}"))
    }
}

/// Who is believed, at one moment.
#[derive(Debug)]
pub struct Trust {
    domains: TrustDomains,
    own: Arc<RootCertStore>,
    federated: BTreeMap<TrustDomain, Arc<RootCertStore>>,
    revoked: Vec<RevocationList>,
    known: Known,
}

impl Trust {
    /// Our own roots alone. They vouch for the aliases, too.
    pub fn new(domains: impl Into<TrustDomains>, own: Arc<RootCertStore>) -> Self {
        Self { domains: domains.into(), own, federated: BTreeMap::new(), revoked: Vec::new(), known: Known::default() }
    }

    /// Believes `roots` about `domain`, and about nothing else. Of an alias with a bundle of its own, our roots are not believed.
    pub fn federated(mut self, domain: TrustDomain, roots: Arc<RootCertStore>) -> Self {
        self.federated.insert(domain, roots);
        self.known = Known::default();
        self
    }

    pub fn revoking(mut self, lists: Vec<RevocationList>) -> Self {
        self.revoked = lists;
        self.known = Known::default();
        self
    }

    pub fn domains(&self) -> &TrustDomains {
        &self.domains
    }

    pub fn revoked(&self) -> &[RevocationList] {
        &self.revoked
    }

    /// The roots that may vouch for identities of a trust domain.
    pub fn bundle(&self, domain: &TrustDomain) -> Option<&Arc<RootCertStore>> {
        let ours = || self.domains.contains(domain).then_some(&self.own);
        match self.federated.get(domain) {
            Some(roots) if domain != self.domains.own() => Some(roots),
            _ => ours(),
        }
    }

    /// Every trust domain that somebody is believed about, with the number of its roots.
    pub fn bundles(&self) -> impl Iterator<Item = (&TrustDomain, usize)> {
        let aliases_of_ours = self.domains.iter().filter(|domain| !self.federated.contains_key(*domain));
        let ours = aliases_of_ours.map(|domain| (domain, self.own.len()));
        ours.chain(self.federated.iter().map(|(domain, roots)| (domain, roots.len())))
    }

    /// Verifies that a chain ends at a root of the bundle of `domain`, which must be the one that its leaf names: a root of another
    /// domain proves nothing about it. `UnknownIssuer` if nobody is believed about it.
    pub fn verify(
        &self,
        domain: &TrustDomain,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: webpki::KeyUsage,
    ) -> Result<Voucher, webpki::Error> {
        self.verified(domain, leaf, intermediates, now, usage).map(|(voucher, _)| voucher)
    }

    /// The same of a peer's chain, which may have been verified before.
    pub fn verify_peer(
        &self,
        domain: &TrustDomain,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        role: Role,
    ) -> Result<Voucher, webpki::Error> {
        let shown = Shown::new(domain, leaf, intermediates, role);
        if let Some(voucher) = shown.as_ref().and_then(|shown| self.known.get(shown, now)) {
            return Ok(voucher);
        }
        let (voucher, span) = self.verified(domain, leaf, intermediates, now, role.usage())?;
        if let (Some(shown), Some(span)) = (shown, span) {
            self.known.insert(shown, span, voucher.clone());
        }
        Ok(voucher)
    }

    /// Who vouches, and for how long.
    fn verified(
        &self,
        domain: &TrustDomain,
        leaf: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
        usage: webpki::KeyUsage,
    ) -> Result<(Voucher, Option<Span>), webpki::Error> {
        let roots = self.bundle(domain).ok_or(webpki::Error::UnknownIssuer)?;
        let end_entity = webpki::EndEntityCert::try_from(leaf)?;
        let check = |path: &webpki::VerifiedPath<'_>| {
            voucher::check_signers(path, domain, &self.domains)?;
            self.check_revoked(&Voucher::of(path))
        };
        let algorithms = webpki::ALL_VERIFICATION_ALGS;
        let path =
            end_entity.verify_for_usage(algorithms, &roots.roots, intermediates, now, usage, None, Some(&check))?;
        let above: Vec<_> = path.intermediate_certificates().map(webpki::Cert::der).collect();
        let span = Span::of(std::iter::once(leaf.as_ref()).chain(above.iter().map(AsRef::as_ref)));
        Ok((Voucher::of(&path), span))
    }

    /// Whether a chain that was verified once would be today. Nothing is known of one without a voucher but the trust domain.
    pub fn stands(&self, domain: &TrustDomain, voucher: &Voucher) -> Result<(), Withdrawn> {
        let roots = self.bundle(domain).ok_or(Withdrawn::TrustDomain)?;
        if !voucher.ends_at(roots) {
            return Err(Withdrawn::Root);
        }
        self.check_revoked(voucher).map_err(|_| Withdrawn::Certificate)
    }

    fn check_revoked(&self, voucher: &Voucher) -> Result<(), webpki::Error> {
        let listed =
            voucher.links().any(|(serial, issuer)| self.revoked.iter().any(|list| list.revokes(serial, issuer)));
        if listed { Err(webpki::Error::CertRevoked) } else { Ok(()) }
    }
}

/// The present `Trust`. A clone is another handle on the same one.
#[derive(Clone, Debug)]
pub struct TrustStore {
    current: Arc<ArcSwap<Trust>>,
    changes: Arc<watch::Sender<u64>>,
}

impl TrustStore {
    pub fn new(trust: Trust) -> Self {
        Self { current: Arc::new(ArcSwap::from_pointee(trust)), changes: Arc::new(watch::Sender::new(1)) }
    }

    pub fn load(&self) -> Arc<Trust> {
        self.current.load_full()
    }

    /// Swaps, and then tells the subscribers: whoever hears of a change finds it.
    pub fn replace(&self, next: Trust) {
        self.changes.send_modify(|count| {
            self.current.store(Arc::new(next));
            *count += 1;
        });
    }

    pub fn subscribe(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }
}
