//! The embedded CA: what it makes is what X.509-SVID asks for, and what it is given must be fit to sign.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use marline::{
    identity::{Ca, IdentityError, SpiffeId, Svid, TrustDomain},
    tls::{
        config::{Learned, peer_id},
        verifier::MeshClient,
    },
};
use rcgen::{
    BasicConstraints, Certificate, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{pki_types::UnixTime, server::danger::ClientCertVerifier as _};
use x509_parser::prelude::{FromDer as _, GeneralName, X509Certificate};

const DAY: Duration = Duration::from_secs(86_400);

fn trust_domain() -> TrustDomain {
    TrustDomain::parse("cluster.local").unwrap()
}

fn web() -> SpiffeId {
    SpiffeId::new(&trust_domain(), "shop", "web").unwrap()
}

fn embedded() -> (tempfile::TempDir, Ca) {
    let dir = tempfile::tempdir().unwrap();
    Ca::init(dir.path(), &trust_domain()).unwrap();
    let ca = Ca::open(dir.path()).unwrap();
    (dir, ca)
}

/// Whether a server of the mesh would take it.
fn verifies(ca: &Ca, svid: &Svid) -> bool {
    let (leaf, intermediates) = svid.key.cert.split_first().unwrap();
    MeshClient::new(ca.trust(&trust_domain()), Learned::default())
        .verify_client_cert(leaf, intermediates, UnixTime::now())
        .is_ok()
}

#[test]
fn an_issued_certificate_meets_each_clause_of_x509_svid() {
    let (_dir, ca) = embedded();
    let svid = ca.issue(&web(), DAY).unwrap();
    let (rest, leaf) = X509Certificate::from_der(&svid.key.cert[0]).unwrap();
    assert!(rest.is_empty());
    // 2: exactly one URI SAN, the SPIFFE ID; other names none.
    let names = leaf.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [GeneralName::URI("spiffe://cluster.local/ns/shop/sa/web")]);
    // RFC 5280 4.2.1.6: with an empty subject the SAN is critical.
    assert_eq!(leaf.subject().iter().count(), 0);
    assert!(names.critical);
    // 4.1: basic constraints: not a CA.
    let constraints = leaf.basic_constraints().unwrap().unwrap();
    assert!(!constraints.value.ca && constraints.value.path_len_constraint.is_none() && constraints.critical);
    // 4.3: key usage critical, digitalSignature set, keyCertSign and cRLSign not.
    let usage = leaf.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.digital_signature());
    assert!(!usage.value.key_cert_sign() && !usage.value.crl_sign());
    assert_eq!(usage.value.flags, 1, "nothing but digitalSignature");
    // 4.4: extended key usage: both ends of TLS.
    let extended = leaf.extended_key_usage().unwrap().unwrap();
    assert!(extended.value.server_auth && extended.value.client_auth && !extended.value.any);
    // RFC 5280: version 3, a positive serial of at most 20 octets, a P-256 key, the issuer's key identified.
    assert_eq!(leaf.version().0, 2);
    assert!(leaf.raw_serial().len() <= 20 && leaf.raw_serial()[0] & 0x80 == 0);
    let algorithm = &leaf.public_key().algorithm;
    assert_eq!(algorithm.algorithm.to_id_string(), "1.2.840.10045.2.1");
    assert_eq!(algorithm.parameters.as_ref().unwrap().as_oid().unwrap().to_id_string(), "1.2.840.10045.3.1.7");
    assert!(leaf.extensions().iter().any(|extension| extension.oid.to_id_string() == "2.5.29.35"));
    // What we say about it is what it says itself.
    assert_eq!(peer_id(&svid.key.cert).unwrap(), web());
    assert_eq!(svid.serial, leaf.raw_serial().iter().map(|byte| format!("{byte:02X}")).collect::<String>());
    let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap().as_secs() as i64;
    assert_eq!(seconds(svid.not_before), leaf.validity().not_before.timestamp());
    assert_eq!(seconds(svid.not_after), leaf.validity().not_after.timestamp());
    svid.key.keys_match().unwrap();
}

#[test]
fn the_root_is_a_ca_of_its_trust_domain_for_ten_years() {
    let (dir, ca) = embedded();
    let pem = fs::read(dir.path().join("root-cert.pem")).unwrap();
    let (_, pem) = x509_parser::pem::parse_x509_pem(&pem).unwrap();
    let root = pem.parse_x509().unwrap();
    assert!(root.basic_constraints().unwrap().unwrap().value.ca);
    let usage = root.key_usage().unwrap().unwrap();
    assert!(
        usage.critical && usage.value.key_cert_sign() && usage.value.crl_sign() && !usage.value.digital_signature()
    );
    let names = root.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [GeneralName::URI("spiffe://cluster.local")]);
    assert_eq!(ca.trust_domain(), Some(&trust_domain()));
    let years = ca.not_after().duration_since(SystemTime::now()).unwrap().as_secs() / (365 * 86_400);
    assert_eq!(years, 9, "ten, less the moment that has passed");
}

#[test]
fn lives_are_as_asked_with_an_allowance_for_clocks_behind() {
    let (_dir, ca) = embedded();
    let now = SystemTime::now();
    let svid = ca.issue(&web(), DAY).unwrap();
    let life = svid.not_after.duration_since(now).unwrap();
    assert!(life <= DAY && life > DAY - Duration::from_secs(5), "{life:?}");
    let behind = now.duration_since(svid.not_before).unwrap();
    assert!(behind >= Duration::from_secs(299) && behind < Duration::from_secs(310), "{behind:?}");
    assert!(matches!(ca.issue(&web(), Duration::from_secs(1)), Err(IdentityError::Lifetime(_))));
    assert!(verifies(&ca, &ca.issue(&web(), Duration::from_secs(2)).unwrap()));
    assert_eq!(ca.issue(&web(), 20 * 365 * DAY).unwrap().not_after, ca.not_after(), "never beyond the CA's own end");
}

#[test]
fn serials_and_keys_are_new_each_time() {
    let (_dir, ca) = embedded();
    let (a, b) = (ca.issue(&web(), DAY).unwrap(), ca.issue(&web(), DAY).unwrap());
    assert_ne!(a.serial, b.serial);
    assert_ne!(a.key.key.public_key(), b.key.key.public_key());
}

#[test]
fn an_identity_of_another_trust_domain_is_not_vouched_for() {
    let (_dir, ca) = embedded();
    let foreign = SpiffeId::new(&TrustDomain::parse("other.org").unwrap(), "shop", "web").unwrap();
    assert!(matches!(ca.issue(&foreign, DAY), Err(IdentityError::ForeignTrustDomain { .. })));
    ca.require_trust_domain(&trust_domain()).unwrap();
    let refusal = ca.require_trust_domain(foreign.trust_domain()).unwrap_err().to_string();
    assert!(refusal.contains("cluster.local") && refusal.contains("other.org"), "{refusal}");
    company(|_| {}).open().unwrap().require_trust_domain(foreign.trust_domain()).unwrap();
}

#[test]
fn init_protects_the_key_and_overwrites_nothing() {
    let (dir, ca) = embedded();
    let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode("ca-key.pem"), 0o600);
    assert!(matches!(Ca::init(dir.path(), &trust_domain()), Err(IdentityError::Exists(_))));
    assert!(verifies(&Ca::open(dir.path()).unwrap(), &ca.issue(&web(), DAY).unwrap()), "it is the same CA still");
    for name in ["ca-cert.pem", "ca-key.pem", "root-cert.pem", "cert-chain.pem"] {
        let partly = tempfile::tempdir().unwrap();
        // Also a dangling link is something that is there.
        std::os::unix::fs::symlink("nowhere", partly.path().join(name)).unwrap();
        assert!(matches!(Ca::init(partly.path(), &trust_domain()), Err(IdentityError::Exists(_))), "{name}");
        assert_eq!(fs::read_dir(partly.path()).unwrap().count(), 1, "nothing was written beside {name}");
    }
    let deep = dir.path().join("a/b");
    Ca::init(&deep, &trust_domain()).unwrap();
    assert_eq!(fs::metadata(&deep).unwrap().permissions().mode() & 0o777, 0o700);
}

#[test]
fn no_secret_shows_when_a_ca_or_an_svid_is_printed() {
    let (dir, ca) = embedded();
    let key = fs::read_to_string(dir.path().join("ca-key.pem")).unwrap();
    let der = KeyPair::from_pem(&key).unwrap().serialize_der();
    let scalar = der[36..68].iter().map(|byte| byte.to_string()).collect::<Vec<_>>().join(", ");
    let shown = format!("{ca:?} {:?}", ca.issue(&web(), DAY).unwrap());
    assert!(!shown.contains(&scalar) && !shown.contains("PRIVATE"), "{shown}");
}

/// A root and an intermediate as a company has them, in Istio's files.
struct Company {
    dir: tempfile::TempDir,
    root: Certificate,
    intermediate: Certificate,
}

fn ca_params(name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params
}

fn company(change: impl FnOnce(&mut CertificateParams)) -> Company {
    let root_key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P384_SHA384).unwrap();
    let root_params = ca_params("Company root");
    let root = root_params.self_signed(&root_key).unwrap();
    let issuer = Issuer::new(root_params, root_key);
    let key = KeyPair::generate().unwrap();
    let mut params = ca_params("Company mesh");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    change(&mut params);
    let intermediate = params.signed_by(&key, &issuer).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let company = Company { dir, root, intermediate };
    company.write("ca-cert.pem", &company.intermediate.pem());
    company.write("ca-key.pem", &key.serialize_pem());
    company.write("root-cert.pem", &company.root.pem());
    company.write("cert-chain.pem", &format!("{}{}", company.intermediate.pem(), company.root.pem()));
    company
}

impl Company {
    fn write(&self, name: &str, text: &str) {
        fs::write(self.dir.path().join(name), text).unwrap();
    }

    fn open(&self) -> Result<Ca, IdentityError> {
        Ca::open(self.dir.path())
    }

    fn refusal(&self) -> String {
        self.open().map(|_| "it was taken").unwrap_err().to_string()
    }
}

#[test]
fn an_intermediate_from_istios_files_signs_and_goes_along_without_the_root() {
    let company = company(|_| {});
    let chains = [
        format!("{}{}", company.intermediate.pem(), company.root.pem()),
        company.intermediate.pem(),
        company.root.pem(),
        String::new(),
    ];
    for chain in chains {
        company.write("cert-chain.pem", &chain);
        let ca = company.open().unwrap();
        assert_eq!(ca.trust_domain(), None, "Istio's files name no trust domain");
        let svid = ca.issue(&web(), DAY).unwrap();
        assert_eq!(svid.key.cert[1..], [company.intermediate.der().clone()]);
        assert!(verifies(&ca, &svid));
    }
    fs::remove_file(company.dir.path().join("cert-chain.pem")).unwrap();
    assert!(verifies(&company.open().unwrap(), &company.open().unwrap().issue(&web(), DAY).unwrap()));
}

#[test]
fn no_certificate_outlives_what_is_above_it_in_the_chain() {
    let company = company(|_| {});
    let mut upper = ca_params("Company between");
    upper.not_after = (SystemTime::now() + DAY).into();
    let upper = upper.self_signed(&KeyPair::generate().unwrap()).unwrap();
    company.write("cert-chain.pem", &format!("{}{}", company.intermediate.pem(), upper.pem()));
    let svid = company.open().unwrap().issue(&web(), 5 * DAY).unwrap();
    assert!(svid.not_after <= SystemTime::now() + DAY);
}

#[test]
fn two_roots_are_both_trusted_as_a_rotation_needs() {
    let (old, new) = (company(|_| {}), company(|_| {}));
    new.write("root-cert.pem", &format!("{}{}", old.root.pem(), new.root.pem()));
    let (old_ca, new_ca) = (old.open().unwrap(), new.open().unwrap());
    assert_eq!(new_ca.roots().len(), 2);
    assert!(verifies(&new_ca, &old_ca.issue(&web(), DAY).unwrap()));
    assert!(verifies(&new_ca, &new_ca.issue(&web(), DAY).unwrap()));
    assert!(!verifies(&old_ca, &new_ca.issue(&web(), DAY).unwrap()));
}

#[test]
fn a_key_in_openssls_older_form_is_read() {
    // `openssl ecparam -genkey` writes the parameters before the key.
    let company = company(|_| {});
    let key = fs::read_to_string(company.dir.path().join("ca-key.pem")).unwrap();
    company.write(
        "ca-key.pem",
        &format!("-----BEGIN EC PARAMETERS-----\nBggqhkjOPQMBBw==\n-----END EC PARAMETERS-----\n{key}"),
    );
    company.open().unwrap();
}

#[test]
fn a_ca_that_cannot_vouch_for_workloads_is_refused_with_the_reason() {
    type Break = fn(&Company);
    let cases: [(&str, Break); 9] = [
        ("cannot read", |c| fs::remove_file(c.dir.path().join("ca-cert.pem")).unwrap()),
        ("cannot read", |c| fs::remove_file(c.dir.path().join("root-cert.pem")).unwrap()),
        ("ca-cert.pem: holds no certificate", |c| c.write("ca-cert.pem", "hello")),
        ("root-cert.pem: holds no certificate", |c| c.write("root-cert.pem", "")),
        ("ca-key.pem: holds no private key", |c| c.write("ca-key.pem", "hello")),
        ("without a passphrase", |c| {
            c.write("ca-key.pem", "-----BEGIN ENCRYPTED PRIVATE KEY-----\nAAAA\n-----END ENCRYPTED PRIVATE KEY-----\n");
        }),
        ("does not belong to the certificate", |c| {
            c.write("ca-key.pem", &KeyPair::generate().unwrap().serialize_pem())
        }),
        ("what it signs does not verify against root-cert.pem", |c| {
            c.write("root-cert.pem", &company(|_| {}).root.pem())
        }),
        ("not PEM", |c| c.write("cert-chain.pem", "-----BEGIN CERTIFICATE-----\n!\n-----END CERTIFICATE-----\n")),
    ];
    for (says, break_it) in cases {
        let company = company(|_| {});
        break_it(&company);
        let refusal = company.refusal();
        assert!(refusal.contains(says), "{refusal:?} does not say {says:?}");
    }
    type Change = fn(&mut CertificateParams);
    let certificates: [(&str, Change); 7] = [
        ("RequiredEkuNotFound", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth]),
        ("RequiredEkuNotFound", |p| p.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]),
        ("not one of a CA", |p| p.is_ca = IsCa::ExplicitNoCa),
        ("does not allow it to sign", |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature]),
        ("expired", |p| p.not_after = (SystemTime::now() - DAY).into()),
        ("CertNotValidYet", |p| p.not_before = (SystemTime::now() + DAY).into()),
        ("more than one trust domain", |p| {
            p.subject_alt_names =
                ["spiffe://a.org", "spiffe://b.org"].map(|uri| SanType::URI(uri.try_into().unwrap())).to_vec();
        }),
    ];
    for (says, change) in certificates {
        let refusal = company(change).refusal();
        assert!(refusal.contains(says), "{refusal:?} does not say {says:?}");
    }
}

#[test]
fn a_root_of_another_trust_domain_is_refused() {
    let (dir, _) = embedded();
    let other = tempfile::tempdir().unwrap();
    Ca::init(other.path(), &TrustDomain::parse("other.org").unwrap()).unwrap();
    let both = [dir.path(), other.path()].map(|dir: &Path| fs::read_to_string(dir.join("root-cert.pem")).unwrap());
    fs::write(dir.path().join("root-cert.pem"), both.concat()).unwrap();
    let refusal = Ca::open(dir.path()).map(|_| "it was taken").unwrap_err().to_string();
    assert!(refusal.contains("a root of trust domain other.org"), "{refusal}");
}
