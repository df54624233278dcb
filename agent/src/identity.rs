//! Who a workload is: trust domains and SPIFFE IDs, parsed strictly, and the errors of this room.
//!
//! Certificates are made by `identity::ca` and kept fresh by `identity::manager`; whose word counts is `identity::trust`'s; whether a
//! peer may hold an identity is decided by `tls::verifier`, what it may then do by `policy`.

pub mod ca;
pub mod hex;
mod leaf;
pub mod live;
pub mod manager;
pub mod remote;
pub mod trust;
pub mod wire;
pub mod workload_api;

use std::{
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rustls::sign::CertifiedKey;
use serde::{Serialize, Serializer};

pub use ca::Ca;
pub use leaf::{SvidFault, Validity, svid_identity};
pub use live::LiveCa;
pub(crate) use manager::pem as as_pem;
pub use manager::{CertState, Manager, ManagerSettings, SvidInfo};
pub use trust::{Trust, TrustDomains, TrustFiles, TrustStore};

/// The longest SPIFFE ID that every implementation must accept (SPIFFE-ID, section 2.3), and the longest we do.
const MAX_ID: usize = 2048;
const MAX_TRUST_DOMAIN: usize = 255;

/// A SPIFFE trust domain such as `cluster.local`: lower case, never empty.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct TrustDomain(Arc<str>);

impl TrustDomain {
    /// Takes a bare trust domain name. The character set is that of the SPIFFE-ID standard, section 2.1.
    pub fn parse(text: &str) -> Result<Self, IdError> {
        if text.is_empty() {
            return Err(IdError::EmptyTrustDomain);
        }
        if text.len() > MAX_TRUST_DOMAIN {
            return Err(IdError::TooLong { what: "trust domain", limit: MAX_TRUST_DOMAIN });
        }
        match text.chars().find(|c| !matches!(c, 'a'..='z' | '0'..='9' | '.' | '-' | '_')) {
            Some(bad) => Err(IdError::TrustDomainCharacter { text: text.to_owned(), bad }),
            None => Ok(Self(text.into())),
        }
    }

    /// Takes `spiffe://TRUST_DOMAIN`, the name that a signing certificate carries.
    pub fn parse_uri(uri: &str) -> Result<Self, IdError> {
        let rest = uri.strip_prefix("spiffe://").ok_or_else(|| IdError::Scheme { uri: uri.to_owned() })?;
        Self::parse(rest)
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Istio's own.
impl Default for TrustDomain {
    fn default() -> Self {
        Self("cluster.local".into())
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for TrustDomain {
    type Err = IdError;

    fn from_str(text: &str) -> Result<Self, IdError> {
        Self::parse(text)
    }
}

impl Serialize for TrustDomain {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

/// The identity of a workload in Istio's form: `spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT`.
///
/// A SPIFFE ID of any other form does not name a workload of this mesh and does not parse.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SpiffeId {
    trust_domain: TrustDomain,
    namespace: Arc<str>,
    service_account: Arc<str>,
}

impl SpiffeId {
    pub fn new(trust_domain: &TrustDomain, namespace: &str, service_account: &str) -> Result<Self, IdError> {
        check_segment("namespace", namespace)?;
        check_segment("service account", service_account)?;
        let length = "spiffe:///ns//sa/".len() + trust_domain.0.len() + namespace.len() + service_account.len();
        if length > MAX_ID {
            return Err(IdError::TooLong { what: "SPIFFE ID", limit: MAX_ID });
        }
        Ok(Self {
            trust_domain: trust_domain.clone(),
            namespace: namespace.into(),
            service_account: service_account.into(),
        })
    }

    pub fn trust_domain(&self) -> &TrustDomain {
        &self.trust_domain
    }

    /// Of the same name in another trust domain.
    fn in_domain(&self, trust_domain: &TrustDomain) -> Self {
        Self { trust_domain: trust_domain.clone(), ..self.clone() }
    }

    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    pub fn service_account(&self) -> &str {
        &self.service_account
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "spiffe://{}/ns/{}/sa/{}", self.trust_domain, self.namespace, self.service_account)
    }
}

impl FromStr for SpiffeId {
    type Err = IdError;

    fn from_str(uri: &str) -> Result<Self, IdError> {
        if uri.len() > MAX_ID {
            return Err(IdError::TooLong { what: "SPIFFE ID", limit: MAX_ID });
        }
        let rest = uri.strip_prefix("spiffe://").ok_or_else(|| IdError::Scheme { uri: uri.to_owned() })?;
        let mut parts = rest.split('/');
        let trust_domain = TrustDomain::parse(parts.next().unwrap_or_default())?;
        match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
            (Some("ns"), Some(namespace), Some("sa"), Some(account), None) => {
                Self::new(&trust_domain, namespace, account)
            }
            _ => Err(IdError::NotAWorkload { uri: uri.to_owned() }),
        }
    }
}

impl Serialize for SpiffeId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// A workload's certificate chain and private key, and what must be known about them without parsing them again.
#[derive(Clone, Debug)]
pub struct Svid {
    pub id: SpiffeId,
    pub key: Arc<CertifiedKey>,
    pub not_before: SystemTime,
    pub not_after: SystemTime,
    /// Hexadecimal, as `openssl x509 -serial` prints it.
    pub serial: String,
}

impl Svid {
    pub fn is_valid_at(&self, now: SystemTime) -> bool {
        self.not_before <= now && now < self.not_after
    }
}

/// Why a text is not the identity it claims to be.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum IdError {
    #[error("the trust domain is empty")]
    EmptyTrustDomain,
    #[error("trust domain {text:?} holds {bad:?}: only a-z, 0-9, '.', '-' and '_' are allowed")]
    TrustDomainCharacter { text: String, bad: char },
    #[error("the {what} is longer than {limit} bytes")]
    TooLong { what: &'static str, limit: usize },
    #[error("{uri:?} is not a SPIFFE ID: it does not begin with spiffe://")]
    Scheme { uri: String },
    #[error(
        "{uri:?} is not the identity of a workload: expected spiffe://TRUST_DOMAIN/ns/NAMESPACE/sa/SERVICE_ACCOUNT"
    )]
    NotAWorkload { uri: String },
    #[error(
        "the {what} {text:?} cannot be part of a SPIFFE ID: it must be made of a-z, A-Z, 0-9, '.', '-' and '_' and be neither empty nor \".\" nor \"..\""
    )]
    Segment { what: &'static str, text: String },
}

/// What goes wrong when certificates are made or loaded.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    #[error("{} exists already: a CA is never overwritten, move it away or choose another directory", .0.display())]
    Exists(PathBuf),
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{}: {what}", path.display())]
    File { path: PathBuf, what: String },
    #[error("the CA in {} cannot vouch for workloads: {what}", dir.display())]
    Unusable { dir: PathBuf, what: String },
    #[error("{id} is not in the CA's trust domain, {trust_domain}")]
    ForeignTrustDomain { id: SpiffeId, trust_domain: TrustDomain },
    #[error("the CA is of trust domain {ca}, the configuration (spec.trustDomain) says {wanted}: correct one of them")]
    OtherTrustDomain { ca: TrustDomain, wanted: TrustDomain },
    #[error("the CA's certificate expired {} ago", humantime(*.0))]
    CaExpired(Duration),
    #[error("a certificate life of {} is shorter than the shortest that makes sense, 2 seconds", humantime(*.0))]
    Lifetime(Duration),
    #[error("a CA for trying things out could not be made: {0}")]
    Ephemeral(String),
    #[error("making a certificate failed")]
    Rcgen(#[from] rcgen::Error),
    #[error("the new private key is not usable for TLS")]
    Key(#[from] rustls::Error),
    #[error(transparent)]
    Id(#[from] IdError),
    #[error("the token for the CA at {address}, {}, cannot be read", path.display())]
    Token { address: Arc<str>, path: PathBuf, source: io::Error },
    #[error("a revocation list that was supplied: {what}")]
    Revocation { what: String },
    #[error("the CA at {address} {what}")]
    Remote { address: Arc<str>, what: String },
    #[error("{socket} has no certificate for {id}: {what}")]
    NotSupplied { socket: Arc<str>, id: SpiffeId, what: String, withdrawn: bool },
}

impl IdentityError {
    /// Whether a certificate that was had before must not be used any more.
    fn withdraws(&self) -> bool {
        matches!(self, Self::NotSupplied { withdrawn: true, .. })
    }

    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }

    fn file(path: &Path, what: impl Into<String>) -> Self {
        Self::File { path: path.to_owned(), what: what.into() }
    }
}

/// A duration as a person says it, with the two largest units that are not zero: `2d 3h`, `1m 5s`, `250ms`.
pub(crate) fn humantime(duration: Duration) -> String {
    let seconds = duration.as_secs();
    if seconds == 0 {
        return format!("{}ms", duration.subsec_millis());
    }
    let units = [("d", seconds / 86_400), ("h", seconds / 3_600 % 24), ("m", seconds / 60 % 60), ("s", seconds % 60)];
    let parts: Vec<String> =
        units.iter().filter(|(_, n)| *n > 0).take(2).map(|(unit, n)| format!("{n}{unit}")).collect();
    parts.join(" ")
}

fn check_segment(what: &'static str, text: &str) -> Result<(), IdError> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    if text.is_empty() || text == "." || text == ".." || !text.chars().all(allowed) {
        return Err(IdError::Segment { what, text: text.to_owned() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_an_id_displays_parses_to_the_same_id(
            domain in "[a-z0-9._-]{1,255}", namespace in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,200}", account in "[a-zA-Z0-9_-][a-zA-Z0-9._-]{0,200}",
        ) {
            let id = SpiffeId::new(&TrustDomain::parse(&domain).unwrap(), &namespace, &account).unwrap();
            let back: SpiffeId = id.to_string().parse().unwrap();
            prop_assert_eq!(&back, &id);
            prop_assert_eq!((back.trust_domain().as_str(), back.namespace(), back.service_account()), (&*domain, &*namespace, &*account));
        }

        #[test]
        fn any_text_that_parses_displays_as_itself(text in "(spiffe://)?[a-zA-Z0-9./_%?#:@-]{0,60}|spiffe://td(/[a-z.]{0,4}){0,6}|\\PC*") {
            if let Ok(id) = text.parse::<SpiffeId>() {
                prop_assert_eq!(id.to_string(), text);
            }
        }
    }

    #[test]
    fn ids_that_do_not_name_a_workload_are_refused() {
        for text in [
            "",
            "spiffe://",
            "spiffe://cluster.local",
            "spiffe://cluster.local/",
            "spiffe:///ns/a/sa/b",
            "spiffe://cluster.local/ns/a",
            "spiffe://cluster.local/ns/a/sa",
            "spiffe://cluster.local/ns/a/sa/",
            "spiffe://cluster.local/ns//sa/b",
            "spiffe://cluster.local/ns/a/sa/b/",
            "spiffe://cluster.local/ns/a/sa/b/c",
            "spiffe://cluster.local/ns/../sa/b",
            "spiffe://cluster.local/ns/a/sa/.",
            "spiffe://cluster.local/sa/a/ns/b",
            "spiffe://cluster.local/NS/a/sa/b",
            "spiffe://Cluster.local/ns/a/sa/b",
            "spiffe://cluster.local:443/ns/a/sa/b",
            "spiffe://user@cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b?c",
            "spiffe://cluster.local/ns/a/sa/b#c",
            "spiffe://cluster.local/ns/a%2f/sa/b",
            "spiffe://cluster.local/ns/ä/sa/b",
            "SPIFFE://cluster.local/ns/a/sa/b",
            "https://cluster.local/ns/a/sa/b",
            " spiffe://cluster.local/ns/a/sa/b",
            "spiffe://cluster.local/ns/a/sa/b\0",
        ] {
            assert!(text.parse::<SpiffeId>().is_err(), "{text:?} was taken for a workload");
        }
    }

    #[test]
    fn an_id_longer_than_the_standard_allows_is_refused() {
        let domain = TrustDomain::parse("cluster.local").unwrap();
        let fits = MAX_ID - "spiffe://cluster.local/ns/a/sa/".len();
        assert!(SpiffeId::new(&domain, "a", &"b".repeat(fits)).is_ok());
        assert!(SpiffeId::new(&domain, "a", &"b".repeat(fits + 1)).is_err());
        assert!(format!("spiffe://cluster.local/ns/a/sa/{}", "b".repeat(fits + 1)).parse::<SpiffeId>().is_err());
    }

    #[test]
    fn the_default_trust_domain_is_istios_and_parses() {
        assert_eq!(TrustDomain::parse("cluster.local").unwrap(), TrustDomain::default());
    }

    #[test]
    fn durations_read_as_people_say_them() {
        let cases = [(0, "0ms"), (59, "59s"), (65, "1m 5s"), (3_600, "1h"), (86_400 + 61, "1d 1m")];
        for (seconds, text) in cases {
            assert_eq!(humantime(Duration::from_secs(seconds)), text);
        }
    }
}
