//! Whose word counts: a root vouches for its own trust domain alone, aliases mean the same mesh, and what was revoked or lost its root is
//! not believed any more. X.509-SVID's clauses for signing certificates are here, too.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, SystemTime},
};

use marline::{
    control::trust::load,
    identity::{
        Ca, LiveCa, Manager, ManagerSettings, SpiffeId, Svid, Trust, TrustDomain, TrustDomains, TrustFiles, TrustStore,
        trust::Role,
    },
    tls::{
        config::{Accept, Learned, Offer, Parameters, client_config_with, server_config_with},
        verifier::{ExpectServer, MeshClient, Reason, explain},
    },
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, DnType, GeneralSubtree,
    IsCa, Issuer, KeyIdMethod, KeyPair, KeyUsagePurpose, NameConstraints, RevokedCertParams, SanType, SerialNumber,
};
use rustls::{
    client::danger::ServerCertVerifier as _,
    pki_types::{CertificateDer, ServerName, UnixTime},
    server::danger::ClientCertVerifier as _,
};

const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3_600);

fn domain(name: &str) -> TrustDomain {
    TrustDomain::parse(name).unwrap()
}

struct Mesh {
    dir: tempfile::TempDir,
    ca: Ca,
    name: TrustDomain,
}

impl Mesh {
    fn of(name: &str) -> Self {
        let (dir, name) = (tempfile::tempdir().unwrap(), domain(name));
        Ca::init(dir.path(), &name).unwrap();
        Self { ca: Ca::open(dir.path()).unwrap(), dir, name }
    }

    fn svid(&self, account: &str) -> Svid {
        self.ca.issue(&SpiffeId::new(&self.name, "shop", account).unwrap(), HOUR).unwrap()
    }

    /// What this CA's key signs, whatever the CA itself would refuse.
    fn signer(&self) -> Issuer<'static, KeyPair> {
        let key = KeyPair::from_pem(&self.read("ca-key.pem")).unwrap();
        Issuer::from_ca_cert_pem(&self.read("ca-cert.pem"), key).unwrap()
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap()
    }

    /// Signed by this mesh, in the name of another one.
    fn forged(&self, id: &str) -> Vec<CertificateDer<'static>> {
        vec![leaf(id).signed_by(&KeyPair::generate().unwrap(), &self.signer()).unwrap().der().clone()]
    }
}

fn leaf(id: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.not_before = (SystemTime::now() - HOUR).into();
    params.not_after = (SystemTime::now() + HOUR).into();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params
}

fn chain(svid: &Svid) -> Vec<CertificateDer<'static>> {
    svid.key.cert.clone()
}

/// What a server makes of a client with this chain.
fn server_sees(trust: &Arc<Trust>, chain: &[CertificateDer<'static>]) -> Result<(), Reason> {
    let (leaf, intermediates) = chain.split_first().unwrap();
    let verifier = MeshClient::new(trust.clone(), Learned::default());
    verifier.verify_client_cert(leaf, intermediates, UnixTime::now()).map(drop).map_err(|error| explain(&error).reason)
}

/// What a client makes of a server with this chain, if it expects `expect`.
fn client_sees(trust: &Arc<Trust>, expect: &str, chain: &[CertificateDer<'static>]) -> Result<(), Reason> {
    let (leaf, intermediates) = chain.split_first().unwrap();
    let verifier = ExpectServer::new(trust.clone(), vec![expect.parse().unwrap()], Learned::default());
    let name = ServerName::try_from("any.example").unwrap();
    verifier
        .verify_server_cert(leaf, intermediates, &name, &[], UnixTime::now())
        .map(drop)
        .map_err(|error| explain(&error).reason)
}

#[test]
fn a_federated_root_vouches_for_its_own_trust_domain_and_for_no_other() {
    let (ours, theirs, third) = (Mesh::of("cluster.local"), Mesh::of("other.org"), Mesh::of("third.org"));
    let trust = Trust::new(&ours.name, ours.ca.roots())
        .federated(theirs.name.clone(), theirs.ca.roots())
        .federated(third.name.clone(), third.ca.roots());
    let trust = Arc::new(trust);
    assert_eq!(server_sees(&trust, &chain(&ours.svid("web"))), Ok(()));
    assert_eq!(server_sees(&trust, &chain(&theirs.svid("web"))), Ok(()));
    for (signer, claims) in [
        (&theirs, "spiffe://cluster.local/ns/shop/sa/web"),
        (&theirs, "spiffe://third.org/ns/shop/sa/web"),
        (&ours, "spiffe://other.org/ns/shop/sa/web"),
    ] {
        let forged = signer.forged(claims);
        assert_eq!(server_sees(&trust, &forged), Err(Reason::UnknownCa), "{} for {claims}", signer.name);
        assert_eq!(client_sees(&trust, claims, &forged), Err(Reason::UnknownCa), "{} for {claims}", signer.name);
    }
    let nobody = ours.forged("spiffe://nobody.org/ns/shop/sa/web");
    assert_eq!(server_sees(&trust, &nobody), Err(Reason::ForeignTrustDomain));
    let expected = "spiffe://cluster.local/ns/shop/sa/web";
    assert_eq!(client_sees(&trust, expected, &chain(&theirs.svid("web"))), Err(Reason::WrongIdentity));
}

#[test]
fn a_workload_of_an_alias_is_the_one_of_that_name_here() {
    let ours = Mesh::of("cluster.local");
    let domains = TrustDomains::new(ours.name.clone(), [domain("old.example")]);
    let trust = Arc::new(Trust::new(domains.clone(), ours.ca.roots()));
    let web = ours.forged("spiffe://old.example/ns/shop/sa/web");
    assert_eq!(server_sees(&trust, &web), Ok(()));
    assert_eq!(client_sees(&trust, "spiffe://cluster.local/ns/shop/sa/web", &web), Ok(()));
    assert_eq!(client_sees(&trust, "spiffe://cluster.local/ns/shop/sa/db", &web), Err(Reason::WrongIdentity));
    assert_eq!(client_sees(&trust, "spiffe://cluster.local/ns/bank/sa/web", &web), Err(Reason::WrongIdentity));
    // With a bundle of its own it is that one's to vouch for.
    let theirs = Mesh::of("old.example");
    let trust = Arc::new(Trust::new(domains, ours.ca.roots()).federated(theirs.name.clone(), theirs.ca.roots()));
    assert_eq!(server_sees(&trust, &web), Err(Reason::UnknownCa));
    assert_eq!(client_sees(&trust, "spiffe://cluster.local/ns/shop/sa/web", &chain(&theirs.svid("web"))), Ok(()));
}

/// A list that the CA in `mesh` has signed, due in `hours`.
fn list(mesh: &Mesh, serials: &[&str], hours: i64) -> String {
    let now = SystemTime::now();
    let at = |hours: i64| match u64::try_from(hours) {
        Ok(later) => now + HOUR * u32::try_from(later).unwrap(),
        Err(_) => now - HOUR * u32::try_from(-hours).unwrap(),
    };
    let bytes = |serial: &str| -> Vec<u8> {
        (0..serial.len()).step_by(2).map(|at| u8::from_str_radix(&serial[at..at + 2], 16).unwrap()).collect()
    };
    let revoked = |serial: &&str| RevokedCertParams {
        serial_number: SerialNumber::from_slice(&bytes(serial)),
        revocation_time: at(-3).into(),
        reason_code: None,
        invalidity_date: None,
    };
    let params = CertificateRevocationListParams {
        this_update: at(-3).into(),
        next_update: at(hours).into(),
        crl_number: SerialNumber::from(1),
        issuing_distribution_point: None,
        revoked_certs: serials.iter().map(revoked).collect(),
        key_identifier_method: KeyIdMethod::Sha256,
    };
    params.signed_by(&mesh.signer()).unwrap().pem().unwrap()
}

fn files(mesh: &Mesh) -> TrustFiles {
    TrustFiles { domains: (&mesh.name).into(), ..TrustFiles::default() }
}

fn loaded(mesh: &Mesh) -> Result<Arc<Trust>, String> {
    load(mesh.dir.path(), &files(mesh)).map(|(_, trust)| Arc::new(trust)).map_err(|error| error.to_string())
}

fn voucher(trust: &Trust, svid: &Svid) -> marline::identity::trust::Voucher {
    let (leaf, intermediates) = svid.key.cert.split_first().unwrap();
    let usage = webpki::KeyUsage::client_auth();
    trust.verify(svid.id.trust_domain(), leaf, intermediates, UnixTime::now(), usage).unwrap()
}

#[test]
fn a_revoked_certificate_is_refused_and_its_live_connections_are_too_also_by_an_overdue_list() {
    let mesh = Mesh::of("cluster.local");
    let (good, bad) = (mesh.svid("good"), mesh.svid("bad"));
    let before = loaded(&mesh).unwrap();
    let (of_good, of_bad) = (voucher(&before, &good), voucher(&before, &bad));
    for hours in [24, -1] {
        fs::write(mesh.dir.path().join("ca-crl.pem"), list(&mesh, &[&bad.serial], hours)).unwrap();
        let trust = loaded(&mesh).unwrap();
        assert_eq!(trust.revoked()[0].is_stale(SystemTime::now()), hours < 0);
        assert_eq!(server_sees(&trust, &chain(&bad)), Err(Reason::Revoked), "due in {hours} hours");
        assert_eq!(server_sees(&trust, &chain(&good)), Ok(()), "due in {hours} hours");
        assert!(trust.stands(&mesh.name, &of_good).is_ok());
        assert!(trust.stands(&mesh.name, &of_bad).unwrap_err().reason().contains("revoked"));
        let kept = serde_json::to_string(&of_bad.kept()).unwrap();
        let restored = serde_json::from_str::<marline::identity::trust::KeptVoucher>(&kept).unwrap().restore().unwrap();
        assert!(trust.stands(&mesh.name, &restored).is_err(), "a successor judges it, too");
    }
    // A list of a CA that is not known here: of what a predecessor has made, nobody can say that it does not mean that.
    let (other, kept) = (Mesh::of("other.org"), of_bad.kept().restore().unwrap());
    fs::write(mesh.dir.path().join("ca-crl.pem"), list(&other, &[&bad.serial], 24)).unwrap();
    let trust = loaded(&mesh).unwrap();
    assert!(trust.stands(&mesh.name, &of_bad).is_ok() && trust.stands(&mesh.name, &kept).is_err());
    assert!(trust.stands(&mesh.name, &of_good.kept().restore().unwrap()).is_ok());
    fs::write(mesh.dir.path().join("ca-crl.pem"), "").unwrap();
    assert_eq!(server_sees(&loaded(&mesh).unwrap(), &chain(&bad)), Ok(()), "an emptied file revokes nothing");
}

#[test]
fn a_list_that_nobody_has_signed_and_one_that_is_none_are_refused() {
    let (mesh, namesake) = (Mesh::of("cluster.local"), Mesh::of("cluster.local"));
    let file = mesh.dir.path().join("ca-crl.pem");
    fs::write(&file, list(&namesake, &["01"], 24)).unwrap();
    let refusal = loaded(&mesh).unwrap_err();
    assert!(refusal.contains("ca-crl.pem") && refusal.contains("signed by none"), "{refusal}");
    fs::write(&file, "hello").unwrap();
    let refusal = loaded(&mesh).unwrap_err();
    assert!(refusal.contains("holds no revocation list"), "{refusal}");
    fs::remove_file(&file).unwrap();
    let missing = TrustFiles { crl: Some("/nowhere/crl.pem".into()), ..files(&mesh) };
    assert!(load(mesh.dir.path(), &missing).unwrap_err().to_string().contains("/nowhere/crl.pem"));
    // One of a CA that is not known is kept for when a peer shows that CA.
    fs::write(&file, list(&Mesh::of("other.org"), &["01"], 24)).unwrap();
    assert!(!loaded(&mesh).unwrap().revoked()[0].is_of_known_ca());
}

#[test]
fn what_was_believed_by_a_root_that_is_gone_does_not_stand_and_its_peer_is_refused() {
    let (old, new) = (Mesh::of("cluster.local"), Mesh::of("cluster.local"));
    let (of_old, of_new) = (old.svid("web"), new.svid("web"));
    let both = new.read("root-cert.pem") + &old.read("root-cert.pem");
    fs::write(old.dir.path().join("root-cert.pem"), both).unwrap();
    let trust = loaded(&old).unwrap();
    let (from_old, from_new) = (voucher(&trust, &of_old), voucher(&trust, &of_new));
    let after = Arc::new(Trust::new(&new.name, new.ca.roots()));
    assert!(after.stands(&new.name, &from_new).is_ok());
    assert!(after.stands(&new.name, &from_old).unwrap_err().reason().contains("root"));
    assert_eq!(server_sees(&after, &chain(&of_old)), Err(Reason::UnknownCa));
    assert_eq!(client_sees(&after, "spiffe://cluster.local/ns/shop/sa/web", &chain(&of_old)), Err(Reason::UnknownCa));
}

#[test]
fn a_chain_that_was_verified_once_is_verified_anew_by_whatever_could_change_the_verdict() {
    let (ours, theirs) = (Mesh::of("cluster.local"), Mesh::of("other.org"));
    let trust = || Trust::new(&ours.name, ours.ca.roots()).federated(theirs.name.clone(), theirs.ca.roots());
    let first = trust();
    let mut params = leaf("spiffe://cluster.local/ns/shop/sa/web");
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let signed = params.signed_by(&KeyPair::generate().unwrap(), &ours.signer()).unwrap().der().clone();
    let verify = |trust: &Trust, domain: &TrustDomain, leaf: &CertificateDer<'_>, now: UnixTime, role| {
        trust.verify_peer(domain, leaf, &[], now, role)
    };
    let now = UnixTime::now();
    let at = |seconds: i64| UnixTime::since_unix_epoch(Duration::from_secs(now.as_secs().strict_add_signed(seconds)));
    let once = verify(&first, &ours.name, &signed, now, Role::Client).unwrap();
    assert_eq!(verify(&first, &ours.name, &signed, now, Role::Client).unwrap(), once);

    // The times are those of `leaf`: an hour before and after it was made, to the second.
    for (seconds, good) in [(3_500, true), (3_700, false), (-3_500, true), (-3_700, false)] {
        for trust in [&first, &trust()] {
            let verdict = verify(trust, &ours.name, &signed, at(seconds), Role::Client);
            assert_eq!(verdict.is_ok(), good, "{seconds} s from now: {verdict:?}");
        }
    }
    let refused = verify(&first, &ours.name, &signed, now, Role::Server);
    assert!(refused.is_err(), "a client's certificate is no server's: {refused:?}");
    assert!(verify(&first, &theirs.name, &signed, now, Role::Client).is_err(), "another domain's root is asked");
    for at in (0..signed.len()).step_by(7) {
        let mut other = signed.to_vec();
        other[at] ^= 1;
        let verdict = verify(&first, &ours.name, &other.into(), now, Role::Client);
        assert!(verdict.is_err(), "byte {at} is another: {verdict:?}");
    }
    let without_root = Trust::new(&ours.name, theirs.ca.roots());
    assert!(verify(&without_root, &ours.name, &signed, now, Role::Client).is_err());
    let verified = trust();
    verify(&verified, &ours.name, &signed, now, Role::Client).unwrap();
    let stranger = Mesh::of("cluster.local");
    let taken = verified.federated(ours.name.clone(), stranger.ca.roots());
    assert!(
        verify(&taken, &ours.name, &signed, now, Role::Client).is_ok(),
        "of our own domain our own roots are asked"
    );
}

#[test]
fn an_intermediate_signs_under_its_root_and_allows_none_below_it() {
    let mesh = Mesh::of("cluster.local");
    let (below, further) = (mesh.dir.path().join("below"), mesh.dir.path().join("further"));
    mesh.ca.init_intermediate(mesh.dir.path(), &below, &mesh.name).unwrap();
    let ca = Ca::open(&below).unwrap();
    // X.509-SVID 3.2, 4.1, 4.3 and RFC 5280, 4.2.1.1: of what our own CA makes.
    let der = ca.certificates()[0].clone();
    let (_, made) = x509_parser::parse_x509_certificate(&der).unwrap();
    let names = made.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names, [x509_parser::prelude::GeneralName::URI("spiffe://cluster.local")]);
    let constraints = made.basic_constraints().unwrap().unwrap();
    assert!(constraints.critical && constraints.value.ca && constraints.value.path_len_constraint == Some(0));
    let usage = made.key_usage().unwrap().unwrap();
    assert!(
        usage.critical && usage.value.key_cert_sign() && usage.value.crl_sign() && !usage.value.digital_signature()
    );
    assert!(
        made.validity().not_after.timestamp()
            <= i64::try_from(mesh.ca.not_after().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()).unwrap()
    );
    let svid = ca.issue(&SpiffeId::new(&mesh.name, "shop", "web").unwrap(), HOUR).unwrap();
    assert_eq!(svid.key.cert.len(), 2, "the intermediate goes along");
    assert_eq!(server_sees(&mesh.ca.trust(&mesh.name), &chain(&svid)), Ok(()));
    assert!(!mesh.ca.signs_like(&ca));
    let refusal = ca.init_intermediate(&below, &further, &mesh.name).unwrap_err().to_string();
    assert!(refusal.contains("PathLen"), "{refusal}");
    assert_eq!(fs::read_dir(&further).unwrap().count(), 0, "nothing is left of it");
    assert!(mesh.ca.init_intermediate(mesh.dir.path(), &below, &mesh.name).is_err(), "never overwritten");
}

/// An intermediate that is as it should be but for `change`.
fn between(mesh: &Mesh, change: impl FnOnce(&mut CertificateParams)) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "between");
    params.subject_alt_names = vec![SanType::URI(format!("spiffe://{}", mesh.name).try_into().unwrap())];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    change(&mut params);
    params
}

/// A leaf under one.
fn under(mesh: &Mesh, change: impl FnOnce(&mut CertificateParams)) -> Vec<CertificateDer<'static>> {
    let (params, key) = (between(mesh, change), KeyPair::generate().unwrap());
    let between = params.signed_by(&key, &mesh.signer()).unwrap();
    let id = format!("spiffe://{}/ns/shop/sa/web", mesh.name);
    let leaf = leaf(&id).signed_by(&KeyPair::generate().unwrap(), &Issuer::new(params, key)).unwrap();
    vec![leaf.der().clone(), between.der().clone()]
}

/// SPIFFE's X509-SVID, sections 3.2 and 4, for what stands above a leaf.
#[test]
fn a_signing_certificate_is_held_to_each_clause_of_x509_svid() {
    type Change = fn(&mut CertificateParams);
    let cases: [(&str, Change, Result<(), Reason>); 9] = [
        ("as it should be", |_| {}, Ok(())),
        ("3.2: it need not have a SPIFFE ID", |p| p.subject_alt_names.clear(), Ok(())),
        (
            "3.2: its SPIFFE ID has no path",
            |p| p.subject_alt_names = vec![SanType::URI("spiffe://cluster.local/ns/a/sa/b".try_into().unwrap())],
            Err(Reason::NotAnSvid),
        ),
        (
            "3.2: its SPIFFE ID is of the trust domain that it signs for, as one root may stand above several meshes",
            |p| p.subject_alt_names = vec![SanType::URI("spiffe://other.org".try_into().unwrap())],
            Err(Reason::NotAnSvid),
        ),
        ("4.1: cA is true", |p| p.is_ca = IsCa::ExplicitNoCa, Err(Reason::NotAnSvid)),
        ("4.1: a path length may be unlimited", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), Ok(())),
        (
            "4.2: URI name constraints that the library does not know are refused",
            |p| {
                let domain = CustomExtension::from_oid_content(
                    &[2, 5, 29, 30],
                    // permittedSubtrees: uniformResourceIdentifier "other.org"
                    [&[0x30, 0x0f, 0xa0, 0x0d, 0x30, 0x0b, 0x86, 0x09][..], b"other.org"].concat(),
                );
                p.custom_extensions.push(domain);
            },
            Err(Reason::NotAnSvid),
        ),
        (
            "4.2: constraints on other names do not matter",
            |p| {
                let permitted_subtrees = vec![GeneralSubtree::DnsName("example.org".into())];
                p.name_constraints = Some(NameConstraints { permitted_subtrees, excluded_subtrees: Vec::new() });
            },
            Ok(()),
        ),
        ("4.3: keyCertSign is set", |p| p.key_usages = vec![KeyUsagePurpose::DigitalSignature], Err(Reason::NotAnSvid)),
    ];
    let mesh = Mesh::of("cluster.local");
    let trust = mesh.ca.trust(&mesh.name);
    for (clause, change, expected) in cases {
        assert_eq!(server_sees(&trust, &under(&mesh, change)), expected, "{clause}");
    }
}

#[tokio::test]
async fn files_that_do_not_prove_themselves_are_refused_and_good_ones_take_their_place() {
    use marline::control::{
        files::WatchSettings,
        trust::{Followed, LastRefusal, Origin, watch},
    };
    let (mesh, next) = (Mesh::of("cluster.local"), Mesh::of("cluster.local"));
    let (ca, trust) = load(mesh.dir.path(), &files(&mesh)).unwrap();
    let (ca, store) = (LiveCa::new(ca), TrustStore::new(trust));
    let identities = Manager::new(ca.clone(), store.clone(), ManagerSettings { leaf_lifetime: HOUR });
    let id = SpiffeId::new(&mesh.name, "shop", "web").unwrap();
    identities.retain(&[id.clone()].into());
    let metrics = Arc::new(marline::metrics::Metrics::new());
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let followed = Followed {
        origin: Origin::Directory { dir: mesh.dir.path().to_owned(), ca },
        files: files(&mesh),
        identities: identities.clone(),
        metrics: metrics.clone(),
        refusal: LastRefusal::default(),
    };
    let settings = WatchSettings { quiet: Duration::from_millis(20), poll: Duration::from_millis(100) };
    let following = tokio::spawn(watch(followed, settings, stopped.clone()));
    let managing = tokio::spawn({
        let identities = identities.clone();
        async move { identities.run(stopped).await }
    });
    let counted = |accepted: u32, rejected: u32| {
        let metrics = metrics.clone();
        async move {
            let count = |text: &str, result: &str, wanted: u32| {
                wanted == 0 || text.contains(&format!("marline_trust_reloads_total{{result=\"{result}\"}} {wanted}"))
            };
            let told = async {
                loop {
                    let text = metrics.render(Default::default());
                    if count(&text, "accepted", accepted) && count(&text, "rejected", rejected) {
                        return;
                    }
                    tokio::time::sleep(Duration::from_millis(10)).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), told).await.unwrap();
        }
    };
    counted(1, 0).await;
    tokio::time::timeout(Duration::from_secs(20), identities.until_held(&id)).await.unwrap();
    let first = identities.svid(&id).unwrap().serial.clone();
    let copy = |name: &str, to: &Path| fs::write(to.join(name), next.read(name)).unwrap();
    copy("ca-cert.pem", mesh.dir.path());
    counted(1, 1).await;
    assert_eq!(identities.svid(&id).unwrap().serial, first, "half of a set changes nothing");
    let before = store.load();
    for name in ["ca-key.pem", "root-cert.pem", "cert-chain.pem"] {
        copy(name, mesh.dir.path());
    }
    let renewed = async {
        while identities.svid(&id).is_none_or(|svid| server_sees(&next.ca.trust(&next.name), &chain(&svid)).is_err()) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), renewed).await.unwrap();
    assert!(!Arc::ptr_eq(&before, &store.load()));

    // What is wrong need not be in the files: this signer is of a clock that is ahead.
    let (key, ahead) =
        (KeyPair::generate().unwrap(), between(&next, |p| p.not_before = (SystemTime::now() + 3 * SECOND).into()));
    let certificate = ahead.signed_by(&key, &next.signer()).unwrap().pem();
    for (name, text) in
        [("ca-key.pem", &key.serialize_pem()), ("ca-cert.pem", &certificate), ("cert-chain.pem", &certificate)]
    {
        fs::write(mesh.dir.path().join(name), text).unwrap();
    }
    let written = std::time::Instant::now();
    let by_ahead = async {
        let signer = |svid: &Svid| svid.key.cert.len() == 2;
        while identities.svid(&id).is_none_or(|svid| !signer(&svid)) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), by_ahead).await.unwrap();
    assert!(written.elapsed() >= SECOND, "a signer of the future was believed");
    let info = identities.list().remove(0);
    assert!(!info.signer_replaced && info.valid, "{info:?}");
    let pem = identities.chain_pem(&id).unwrap();
    assert!(pem.starts_with("-----BEGIN CERTIFICATE-----\n") && !pem.contains("PRIVATE"), "{pem}");
    stop.send(true).unwrap();
    following.await.unwrap();
    managing.await.unwrap();
}

#[test]
fn where_only_post_quantum_key_exchange_is_allowed_a_peer_without_it_is_refused_with_the_reason() {
    let mesh = Mesh::of("cluster.local");
    let (web, trust) = (mesh.svid("web"), mesh.ca.trust(&mesh.name));
    let only = Parameters { pqc_only: true, ..Parameters::default() };
    let (expect, learned) = ([web.id.clone()], Learned::default);
    let client = client_config_with(only, &web, trust.clone(), &expect, Offer::Proxied, learned()).unwrap();
    let server = server_config_with(only, &web, trust.clone(), Accept::Plain, learned()).unwrap();
    let groups = |provider: &rustls::crypto::CryptoProvider| -> Vec<_> {
        provider.kx_groups.iter().map(|group| group.name()).collect()
    };
    assert_eq!(groups(client.crypto_provider()), [rustls::NamedGroup::X25519MLKEM768]);
    assert_eq!(groups(server.crypto_provider()), [rustls::NamedGroup::X25519MLKEM768]);

    // A client of yesterday.
    let mut old = (**client.crypto_provider()).clone();
    old.kx_groups = vec![rustls::crypto::aws_lc_rs::kx_group::X25519];
    let mut config = rustls::ClientConfig::builder_with_provider(Arc::new(old))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(mesh.ca.roots())
        .with_no_client_auth();
    config.alpn_protocols = vec![b"istio".to_vec()];
    let name = ServerName::try_from("any.example").unwrap();
    let mut client = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
    let mut server = rustls::ServerConnection::new(server).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    server.read_tls(&mut bytes.as_slice()).unwrap();
    let failure = explain(&server.process_new_packets().unwrap_err());
    assert_eq!(failure.reason, Reason::NothingInCommon);
    assert!(failure.text.contains("X25519MLKEM768") && failure.text.contains("pqcOnly"), "{failure}");
    let mut answer = Vec::new();
    server.write_tls(&mut answer).unwrap();
    client.read_tls(&mut answer.as_slice()).unwrap();
    let told = explain(&client.process_new_packets().unwrap_err());
    assert!(told.text.contains("key exchange"), "{told}");
}
