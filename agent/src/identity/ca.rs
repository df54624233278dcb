//! The embedded certificate authority: makes a root, or takes over an intermediate from Istio's `cacerts` files, and
//! proves that what it signs will be believed. What it signs is in the files below. Deciding which identities are needed, and when to
//! renew them, is `identity::manager`'s.

mod ephemeral;
mod intermediate;
mod leaf;
mod revocation;

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType,
    SerialNumber,
};
use rustls::{
    RootCertStore,
    pki_types::{CertificateDer, PrivateKeyDer, UnixTime, pem::PemObject as _},
};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};
use zeroize::{Zeroize as _, Zeroizing};

use super::{IdentityError, SpiffeId, Trust, TrustDomain, hex};

pub use leaf::Signed;
pub use revocation::{Expiries, Revoked};

/// Istio's names for the files of a plugged-in CA.
const CA_CERT: &str = "ca-cert.pem";
const CA_KEY: &str = "ca-key.pem";
const ROOT_CERT: &str = "root-cert.pem";
const CERT_CHAIN: &str = "cert-chain.pem";

const ROOT_LIFETIME: Duration = Duration::from_secs(10 * 365 * 86_400);
/// How far the clock of another node may be behind ours before it takes a fresh certificate for one of the future.
const CLOCK_SKEW: Duration = Duration::from_secs(5 * 60);
/// X.509 counts in seconds: anything shorter could be expired when it is made.
const SHORTEST_LEAF: Duration = Duration::from_secs(2);

/// A certificate authority, ready to sign.
pub struct Ca {
    issuer: Issuer<'static, KeyPair>,
    /// What goes on the wire behind a leaf: intermediates, nearest first, without roots.
    chain: Vec<CertificateDer<'static>>,
    /// The certificate that signs.
    certificate: CertificateDer<'static>,
    /// All of this CA: the one that signs, what is above it, the roots.
    certificates: Vec<CertificateDer<'static>>,
    roots: Arc<RootCertStore>,
    trust_domain: Option<TrustDomain>,
    not_after: SystemTime,
}

impl Ca {
    /// Makes a self-signed root for `trust_domain` and writes it to `dir` in Istio's layout. Never overwrites.
    pub fn init(dir: &Path, trust_domain: &TrustDomain) -> Result<(), IdentityError> {
        let paths = [CA_KEY, CA_CERT, ROOT_CERT, CERT_CHAIN].map(|name| dir.join(name));
        if let Some(present) = paths.iter().find(|path| path.symlink_metadata().is_ok()) {
            return Err(IdentityError::Exists(present.clone()));
        }
        let (mut key_pem, certificate) = new_root(trust_domain)?;
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(dir)
            .map_err(IdentityError::io("create the directory", dir))?;
        let [key_path, certificate_paths @ ..] = &paths;
        let mut written = write_new(key_path, key_pem.as_bytes(), 0o600);
        key_pem.zeroize();
        for (n, path) in certificate_paths.iter().enumerate() {
            if written.is_ok() {
                written = write_new(path, certificate.as_bytes(), 0o644).inspect_err(|_| {
                    // Half a CA is none, and would stand in the way of the next try.
                    paths.iter().take(n + 1).for_each(|path| drop(fs::remove_file(path)));
                });
            }
        }
        written
    }

    /// A new self-signed root, by Istio's names of files, for whoever keeps it elsewhere than in a directory.
    pub fn new_files(trust_domain: &TrustDomain) -> Result<Vec<NewFile>, IdentityError> {
        let (key_pem, certificate) = new_root(trust_domain)?;
        let file = |name| (name, Zeroizing::new(certificate.clone().into_bytes()));
        let key = (CA_KEY, Zeroizing::new(key_pem.into_bytes()));
        Ok(vec![key, file(CA_CERT), file(ROOT_CERT), file(CERT_CHAIN)])
    }

    /// Loads a CA and proves with a throw-away certificate that what it signs verifies against its own roots.
    pub fn open(dir: &Path) -> Result<Self, IdentityError> {
        Self::open_with(dir, &|path| fs::read(path))
    }

    /// The same with files that are kept elsewhere: `dir` is how that place is called, and `read` knows what is in it.
    pub fn open_with(dir: &Path, read: &Read<'_>) -> Result<Self, IdentityError> {
        let unusable = |what: String| IdentityError::Unusable { dir: dir.to_owned(), what };
        let certificate_path = dir.join(CA_CERT);
        let certificate = read_certificates(&certificate_path, read)?
            .into_iter()
            .next()
            .ok_or_else(|| IdentityError::file(&certificate_path, "holds no certificate"))?;
        let parsed = parse_ca(&certificate).map_err(|what| IdentityError::file(&certificate_path, what))?;
        let key = read_key(&dir.join(CA_KEY), read)?;
        if parsed.public_key != rcgen::PublicKeyData::subject_public_key_info(&key) {
            return Err(unusable(format!("the key in {CA_KEY} does not belong to the certificate in {CA_CERT}")));
        }

        let (roots, root_ders) = roots_of(&dir.join(ROOT_CERT), &parsed.trust_domain, read)?;
        let mut chain = match read_certificates(&dir.join(CERT_CHAIN), read) {
            Err(IdentityError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => Vec::new(),
            other => other?,
        };
        chain.retain(|der| *der != certificate && !root_ders.contains(der));
        if !root_ders.contains(&certificate) {
            chain.insert(0, certificate.clone());
        }
        // What is above the CA in the chain may end before it does.
        let mut not_after = parsed.not_after;
        for der in &chain {
            let above = parse_ca(der).map_err(|what| IdentityError::file(&dir.join(CERT_CHAIN), what))?;
            not_after = not_after.min(above.not_after);
        }
        let ca = Self {
            issuer: Issuer::from_ca_cert_der(&certificate, key)?,
            certificates: chain.iter().chain(&root_ders).cloned().collect(),
            certificate,
            chain,
            roots: Arc::new(roots),
            trust_domain: parsed.trust_domain,
            not_after,
        };
        ca.prove().map_err(unusable)?;
        Ok(ca)
    }

    pub fn roots(&self) -> Arc<RootCertStore> {
        Arc::clone(&self.roots)
    }

    /// Our own roots as all there is to trust, for workloads of `trust_domain`.
    pub fn trust(&self, trust_domain: &TrustDomain) -> Arc<Trust> {
        Arc::new(Trust::new(trust_domain, self.roots()))
    }

    pub fn certificates(&self) -> &[CertificateDer<'static>] {
        &self.certificates
    }

    /// All that are trusted: several while a root is rotated.
    pub fn root_certificates(&self) -> &[CertificateDer<'static>] {
        self.certificates.get(self.chain.len()..).unwrap_or_default()
    }

    /// Which key signs, in hexadecimal: the same for all certificates of one key.
    pub fn key_fingerprint(&self) -> String {
        let spki = rcgen::PublicKeyData::subject_public_key_info(self.issuer.key());
        hex::lower(digest(&SHA256, &spki).as_ref())
    }

    /// Whether both sign with the same certificate, and send the same along.
    pub fn signs_like(&self, other: &Self) -> bool {
        self.certificate == other.certificate && self.chain == other.chain
    }

    /// Fails if the CA's certificate names another trust domain: nothing that it signs would be taken here.
    pub fn require_trust_domain(&self, wanted: &TrustDomain) -> Result<(), IdentityError> {
        match &self.trust_domain {
            Some(own) if own != wanted => {
                Err(IdentityError::OtherTrustDomain { ca: own.clone(), wanted: wanted.clone() })
            }
            _ => Ok(()),
        }
    }

    /// The trust domain that the CA's certificate names. Istio's own CAs name none.
    pub fn trust_domain(&self) -> Option<&TrustDomain> {
        self.trust_domain.as_ref()
    }

    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    fn prove(&self) -> Result<(), String> {
        let trust_domain = self.trust_domain.clone().unwrap_or_default();
        let id = SpiffeId::new(&trust_domain, "marline", "proof").map_err(|error| error.to_string())?;
        let svid = self.issue(&id, Duration::from_secs(60)).map_err(|error| error.to_string())?;
        let (leaf, intermediates) = svid.key.cert.split_first().ok_or("it made no certificate")?;
        let leaf = webpki::EndEntityCert::try_from(leaf).map_err(|error| error.to_string())?;
        for usage in [webpki::KeyUsage::client_auth(), webpki::KeyUsage::server_auth()] {
            let (algorithms, now) = (webpki::ALL_VERIFICATION_ALGS, UnixTime::now());
            let path =
                leaf.verify_for_usage(algorithms, &self.roots.roots, intermediates, now, usage, None, None).map_err(
                    |error| format!("what it signs does not verify against {ROOT_CERT} through {CERT_CHAIN}: {error}"),
                )?;
            self.check_root_path_length(&path)?;
        }
        Ok(())
    }
}

/// What a root says of the length of its paths (RFC 5280, section 4.2.1.9) is not looked at by every implementation, ours among them, and
/// by others it is: what we make must verify everywhere.
impl Ca {
    fn check_root_path_length(&self, path: &webpki::VerifiedPath<'_>) -> Result<(), String> {
        let below = path.intermediate_certificates().count();
        let anchor = webpki::spki_for_anchor(path.anchor());
        for der in &self.certificates {
            let Ok((_, root)) = X509Certificate::from_der(der) else { continue };
            let limit = root.basic_constraints().ok().flatten().and_then(|found| found.value.path_len_constraint);
            if root.public_key().raw == &*anchor
                && let Some(limit) = limit
                && usize::try_from(limit).is_ok_and(|limit| below > limit)
            {
                return Err(format!(
                    "its root in {ROOT_CERT} allows {limit} CAs below it (path length), and there are {below}"
                ));
            }
        }
        Ok(())
    }
}

impl std::fmt::Debug for Ca {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ca").field("trust_domain", &self.trust_domain).finish_non_exhaustive()
    }
}

/// The files that a CA is read from.
pub fn file_paths(dir: &Path) -> Vec<PathBuf> {
    [CA_CERT, CA_KEY, ROOT_CERT, CERT_CHAIN].map(|name| dir.join(name)).to_vec()
}

/// What we need to know of a signing certificate.
struct ParsedCa {
    public_key: Vec<u8>,
    trust_domain: Option<TrustDomain>,
    not_after: SystemTime,
}

fn parse_ca(der: &CertificateDer<'_>) -> Result<ParsedCa, String> {
    let (_, certificate) =
        X509Certificate::from_der(der).map_err(|error| format!("not an X.509 certificate: {error}"))?;
    if !certificate.is_ca() {
        return Err("the certificate is not one of a CA (basic constraints)".to_owned());
    }
    let usage = certificate.key_usage().map_err(|error| format!("unreadable key usage: {error}"))?;
    if usage.is_some_and(|usage| !usage.value.key_cert_sign()) {
        return Err("the certificate's key usage does not allow it to sign certificates".to_owned());
    }
    let names = certificate.subject_alternative_name().map_err(|error| format!("unreadable names: {error}"))?;
    let mut trust_domain = None;
    for name in names.iter().flat_map(|names| &names.value.general_names) {
        if let GeneralName::URI(uri) = name
            && uri.starts_with("spiffe://")
        {
            let named = TrustDomain::parse_uri(uri).map_err(|error| error.to_string())?;
            if trust_domain.replace(named).is_some() {
                return Err("the certificate names more than one trust domain".to_owned());
            }
        }
    }
    let seconds = u64::try_from(certificate.validity().not_after.timestamp()).unwrap_or(0);
    Ok(ParsedCa {
        public_key: certificate.public_key().raw.to_vec(),
        trust_domain,
        not_after: UNIX_EPOCH + Duration::from_secs(seconds),
    })
}

pub(super) type Roots = (RootCertStore, Vec<CertificateDer<'static>>);

/// The name of a file that is to be made, and what belongs into it.
pub type NewFile = (&'static str, Zeroizing<Vec<u8>>);

/// What is in a file.
pub type Read<'a> = dyn Fn(&Path) -> io::Result<Vec<u8>> + 'a;

/// The roots in a file. If a trust domain is known, each must be of it, or name none.
pub(super) fn read_roots(path: &Path, trust_domain: &Option<TrustDomain>) -> Result<Roots, IdentityError> {
    roots_of(path, trust_domain, &|path| fs::read(path))
}

fn roots_of(path: &Path, trust_domain: &Option<TrustDomain>, read: &Read<'_>) -> Result<Roots, IdentityError> {
    let ders = read_certificates(path, read)?;
    let mut store = RootCertStore::empty();
    for der in &ders {
        let root = parse_ca(der).map_err(|what| IdentityError::file(path, what))?;
        if let (Some(ours), Some(theirs)) = (trust_domain, &root.trust_domain)
            && ours != theirs
        {
            let what = format!("a root of trust domain {theirs} among those of trust domain {ours}");
            return Err(IdentityError::file(path, what));
        }
        store.add(der.clone()).map_err(|error| IdentityError::file(path, format!("not usable as a root: {error}")))?;
    }
    if store.is_empty() {
        return Err(IdentityError::file(path, "holds no certificate"));
    }
    Ok((store, ders))
}

fn read_certificates(path: &Path, read: &Read<'_>) -> Result<Vec<CertificateDer<'static>>, IdentityError> {
    let pem = read(path).map_err(IdentityError::io("read", path))?;
    CertificateDer::pem_slice_iter(&pem)
        .collect::<Result<_, _>>()
        .map_err(|error| IdentityError::file(path, format!("not PEM: {error}")))
}

fn read_key(path: &Path, read: &Read<'_>) -> Result<KeyPair, IdentityError> {
    let mut pem = read(path).map_err(IdentityError::io("read", path))?;
    let key = PrivateKeyDer::from_pem_slice(&pem);
    let encrypted = pem.windows(b"ENCRYPTED".len()).any(|window| window == b"ENCRYPTED");
    pem.zeroize();
    let mut key = key.map_err(|error| match encrypted {
        true => IdentityError::file(path, "the key is encrypted: store it without a passphrase"),
        false => IdentityError::file(path, format!("holds no private key in PEM: {error}")),
    })?;
    let pair = KeyPair::try_from(&key);
    key.zeroize();
    pair.map_err(|error| IdentityError::file(path, format!("not a usable private key: {error}")))
}

/// The key and the certificate of a new root, in PEM.
fn new_root(trust_domain: &TrustDomain) -> Result<(String, String), IdentityError> {
    let mut key = KeyPair::generate()?;
    let certificate = root_params(trust_domain, ROOT_LIFETIME)?.self_signed(&key);
    let key_pem = key.serialize_pem();
    key.zeroize();
    Ok((key_pem, certificate?.pem()))
}

fn root_params(trust_domain: &TrustDomain, lifetime: Duration) -> Result<CertificateParams, IdentityError> {
    let now = SystemTime::now();
    let mut params = CertificateParams::default();
    params.not_before = (now - CLOCK_SKEW).into();
    params.not_after = (now + lifetime).into();
    params.serial_number = Some(random_serial());
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::OrganizationName, trust_domain.as_str());
    params.distinguished_name.push(DnType::CommonName, "Marline root");
    params.subject_alt_names = vec![uri_san(format!("spiffe://{trust_domain}"))?];
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Ok(params)
}

fn write_new(path: &PathBuf, bytes: &[u8], mode: u32) -> Result<(), IdentityError> {
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(mode).open(path).map_err(|source| {
            match source.kind() {
                io::ErrorKind::AlreadyExists => IdentityError::Exists(path.clone()),
                _ => IdentityError::Io { action: "create", path: path.clone(), source },
            }
        })?;
    file.write_all(bytes).and_then(|()| file.sync_all()).map_err(|error| {
        drop(fs::remove_file(path));
        IdentityError::io("write", path)(error)
    })
}

pub(super) fn uri_san(uri: String) -> Result<SanType, IdentityError> {
    Ok(SanType::URI(uri.try_into()?))
}

/// 127 random bits: positive, and within the 20 octets of RFC 5280.
fn random_serial() -> SerialNumber {
    let mut bytes: [u8; 16] = rand::random();
    bytes[0] = bytes[0] & 0x7f | 0x40;
    SerialNumber::from_slice(&bytes)
}

fn whole_seconds(time: SystemTime) -> SystemTime {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    UNIX_EPOCH + Duration::from_secs(since.as_secs())
}
