//! Of a signing request the key is taken and nothing else, and only from who holds it.

use std::{
    fs,
    time::{Duration, SystemTime},
};

use marline::{
    ca::csr,
    identity::{Ca, SpiffeId, TrustDomain},
};
use proptest::{prelude::*, test_runner::TestRunner};
use rcgen::{KeyPair, PKCS_ECDSA_P384_SHA384, PublicKeyData as _};
use tonic::Code;

use crate::bed::*;

fn fixture(name: &str) -> String {
    fs::read_to_string(format!("{}/tests/ca_service/csrs/{name}.pem", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[tokio::test]
async fn an_allowed_identity_gets_a_certificate_that_a_peer_takes() {
    let bed = Bed::start("").await;
    let mut client = bed.client().await;
    for key in [KeyPair::generate().unwrap(), KeyPair::generate_for(&PKCS_ECDSA_P384_SHA384).unwrap()] {
        let chain = send(&mut client, TOKEN_A, Some(WEB), &csr_for(&key, WEB), 3600).await.unwrap();
        assert_eq!(chain.len(), 2, "the leaf, and the root that signed it");
        let trust = bed.ca().trust(&TrustDomain::default());
        assert_eq!(verified(std::sync::Arc::into_inner(trust).unwrap(), &chain).unwrap().to_string(), WEB);
        with_leaf(&chain, |leaf| {
            assert_eq!(leaf.public_key().raw, key.subject_public_key_info());
            assert_eq!(leaf.subject().iter().count(), 0);
            assert!(!leaf.is_ca());
        });
        let root = fs::read_to_string(bed.path("ca/root-cert.pem")).unwrap();
        assert_eq!(der(&chain[1]), der(&root));
        let line = bed.ledger().pop().unwrap();
        assert_eq!(
            (&line["outcome"], &line["node"], &line["caller"], &line["identity"], &line["serial"]),
            (&"issued".into(), &"node-a".into(), &"node/node-a".into(), &WEB.into(), &serial(&chain).into()),
        );
        assert_eq!(humantime::parse_rfc3339(line["not_after"].as_str().unwrap()).unwrap(), not_after(&chain),);
        assert!(line["peer"].as_str().unwrap().starts_with("127.0.0.1:"), "{line}");
        assert!(humantime::parse_rfc3339(line["time"].as_str().unwrap()).unwrap() <= SystemTime::now());
    }
}

#[tokio::test]
async fn an_intermediate_sends_itself_along_and_the_root_comes_last() {
    let mut bed = Bed::files("");
    fs::rename(bed.path("ca"), bed.path("above")).unwrap();
    Ca::open(&bed.path("above"))
        .unwrap()
        .init_intermediate(&bed.path("above"), &bed.path("ca"), &TrustDomain::default())
        .unwrap();
    bed.run().await;
    let chain = bed.ask(TOKEN_A, WEB).await.unwrap();
    assert_eq!(chain.len(), 3);
    assert!(chain.iter().all(|pem| der(pem).len() == 1));
    assert_eq!(der(&chain[2]), der(&fs::read_to_string(bed.path("above/root-cert.pem")).unwrap()));
    let trust = std::sync::Arc::into_inner(bed.ca().trust(&TrustDomain::default())).unwrap();
    assert_eq!(verified(trust, &chain).unwrap().to_string(), WEB);
}

#[tokio::test]
async fn what_other_tools_put_into_a_request_by_themselves_is_no_reason_to_refuse_it_and_is_not_taken() {
    let bed = Bed::start("").await;
    let mut client = bed.client().await;
    for name in ["p256", "p384-no-san", "p256-usual-extensions", "subject-of-another"] {
        let chain = send(&mut client, TOKEN_A, Some(WEB), &fixture(name), 3600).await.unwrap();
        let trust = std::sync::Arc::into_inner(bed.ca().trust(&TrustDomain::default())).unwrap();
        assert_eq!(verified(trust, &chain).unwrap().to_string(), WEB, "{name}");
        with_leaf(&chain, |leaf| {
            assert_eq!(leaf.subject().iter().count(), 0, "{name}");
            assert_eq!(leaf.key_usage().unwrap().unwrap().value.flags, 1, "{name}: nothing but digitalSignature");
        });
    }
}

#[tokio::test]
async fn hostile_requests_are_refused_each_for_its_own_reason() {
    let bed = Bed::start("").await;
    let mut client = bed.client().await;
    for (name, reason) in [
        ("rsa1024", "an RSA key of 1024 bits is not taken; send the public key of a P-256 or P-384 pair"),
        ("rsa2048", "an RSA key of 2048 bits"),
        ("ed25519", "keys of the kind 1.3.101.112"),
        ("p521", "keys on the curve 1.3.132.0.35"),
        ("secp256k1", "keys on the curve 1.3.132.0.10"),
        ("explicit-curve", "an elliptic curve that is not named"),
        ("ca-true", "it asks for a CA"),
        ("cert-sign", "it asks for a CA"),
        ("dns-san", "DNSName(web.shop.svc) is no SPIFFE ID"),
        ("ip-san", "is no SPIFFE ID"),
        ("two-uris", "there are 2 names"),
        ("uri-and-dns", "there are 2 names"),
        ("many-sans", "there are 120 names"),
        ("https-uri", "is not a SPIFFE ID"),
        ("other-identity", "it names spiffe://cluster.local/ns/shop/sa/db, and the certificate would be for"),
        ("name-constraints", "the extension 2.5.29.30"),
        ("policies", "the extension 2.5.29.32"),
        ("any-usage", "the extension 2.5.29.37"),
        ("code-signing", "the extension 2.5.29.37"),
        ("challenge-password", "the attribute 1.2.840.113549.1.9.7"),
    ] {
        let result = send(&mut client, TOKEN_A, Some(WEB), &fixture(name), 3600).await;
        refused(result, Code::InvalidArgument, reason);
        let line = bed.noted("invalid_argument", reason);
        assert_eq!((&line["identity"], &line["serial"]), (&WEB.into(), &serde_json::Value::Null), "{name}");
    }
}

#[tokio::test]
async fn what_is_no_request_is_refused() {
    let bed = Bed::start("").await;
    let mut client = bed.client().await;
    let good = fixture("p256");
    let block = pem::parse(&good).unwrap();
    let encoded = |tag: &str, der: Vec<u8>| pem::encode(&pem::Pem::new(tag, der));
    let longer = [block.contents(), &[0]].concat();
    let cut = block.contents()[..block.contents().len() - 1].to_vec();
    for (csr, reason) in [
        (String::new(), "0 PEM blocks"),
        ("hello".to_owned(), "0 PEM blocks"),
        (good.replace("CERTIFICATE REQUEST", "CERTIFICATE"), "of another kind"),
        (format!("{good}{good}"), "2 PEM blocks"),
        (good.replace("MII", "!!!").replace("MIH", "!!!"), "PKCS#10"),
        (encoded("CERTIFICATE REQUEST", longer), "bytes follow"),
        (encoded("CERTIFICATE REQUEST", cut), "PKCS#10"),
        (encoded("CERTIFICATE REQUEST", vec![0x30; 3000]), "PKCS#10"),
        (format!("{good}{}", " ".repeat(16 << 10)), "never longer than"),
    ] {
        refused(send(&mut client, TOKEN_A, Some(WEB), &csr, 3600).await, Code::InvalidArgument, reason);
        bed.noted("invalid_argument", reason);
    }
    // More than the service reads at all.
    let giant = format!("{good}{}", " ".repeat(70 << 10));
    refused(send(&mut client, TOKEN_A, Some(WEB), &giant, 3600).await, Code::OutOfRange, "message");
    assert!(send(&mut client, TOKEN_A, Some(WEB), &good, 3600).await.is_ok(), "the service goes on");
}

#[tokio::test]
async fn a_key_that_its_sender_does_not_hold_is_not_certified() {
    let bed = Bed::start("").await;
    let mut client = bed.client().await;
    // The key of one request in another, which its own key has signed.
    let (victim, _) = new_csr(WEB);
    let (thief, csr) = new_csr(WEB);
    let mut der = pem::parse(&csr).unwrap().into_contents();
    let (theirs, own) = (thief.public_key_raw(), victim.public_key_raw());
    let at = der.windows(theirs.len()).position(|window| window == theirs).unwrap();
    der[at..at + own.len()].copy_from_slice(own);
    let forged = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der));
    let result = send(&mut client, TOKEN_A, Some(WEB), &forged, 3600).await;
    refused(result, Code::InvalidArgument, "signature was not made with the key in it");
    bed.noted("invalid_argument", "signature");
}

#[tokio::test]
async fn lives_are_as_asked_within_bounds() {
    let bed = Bed::start("certificates: {maxLifetime: 2h}").await;
    let mut client = bed.client().await;
    let (_, csr) = new_csr(WEB);
    for (asked, given) in [(2, 2), (60, 60), (0, 7200), (7201, 7200), (i64::MAX, 7200)] {
        let now = SystemTime::now();
        let chain = send(&mut client, TOKEN_A, Some(WEB), &csr, asked).await.unwrap();
        let life = not_after(&chain).duration_since(now).unwrap_or_default();
        assert!(life <= Duration::from_secs(given) + Duration::from_secs(5), "{asked}: {life:?}");
        assert!(life + Duration::from_secs(5) > Duration::from_secs(given), "{asked}: {life:?}");
    }
    for asked in [1, -1, i64::MIN] {
        let result = send(&mut client, TOKEN_A, Some(WEB), &csr, asked).await;
        refused(result, Code::InvalidArgument, "validity_duration");
    }
    let ca = bed.ca();
    let (key, _) = new_csr(WEB);
    let years = Duration::from_secs(20 * 365 * 86_400);
    for life in [years, Duration::MAX] {
        let signed = ca.certify(&WEB.parse().unwrap(), &key.subject_public_key_info(), life).unwrap();
        assert_eq!(signed.not_after, ca.not_after(), "never beyond the CA's own end");
    }
}

/// Somewhere in a request something is changed, put in or taken out.
#[derive(Clone, Debug)]
enum Change {
    Flip(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Insert(prop::sample::Index, Vec<u8>),
    Remove(prop::sample::Index, usize),
    Copy(prop::sample::Index, prop::sample::Index, usize),
}

fn changes() -> impl Strategy<Value = Vec<Change>> {
    let index = any::<prop::sample::Index>;
    let change = prop_oneof![
        8 => (index(), 1..=255u8).prop_map(|(at, mask)| Change::Flip(at, mask)),
        1 => index().prop_map(Change::Cut),
        2 => (index(), prop::collection::vec(any::<u8>(), 1..20)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        2 => (index(), 1..20usize).prop_map(|(at, count)| Change::Remove(at, count)),
        2 => (index(), index(), 1..40usize).prop_map(|(from, to, count)| Change::Copy(from, to, count)),
    ];
    prop::collection::vec(change, 1..4)
}

fn changed(mut der: Vec<u8>, changes: &[Change]) -> Vec<u8> {
    for change in changes {
        if der.is_empty() {
            break;
        }
        let length = der.len();
        match change {
            Change::Flip(at, mask) => der[at.index(length)] ^= mask,
            Change::Cut(at) => der.truncate(at.index(length)),
            Change::Insert(at, bytes) => drop(der.splice(at.index(length)..at.index(length), bytes.iter().copied())),
            Change::Remove(at, count) => drop(der.drain(at.index(length)..(at.index(length) + count).min(length))),
            Change::Copy(from, to, count) => {
                let (from, to) = (from.index(length), to.index(length));
                let count = (*count).min(length - from).min(length - to);
                der.copy_within(from..from + count, to);
            }
        }
    }
    der
}

/// If it is taken at all, it is for the key that was in the good one, and names nobody else.
fn judge(pem: &str, key: &[u8], ca: &Ca, id: &SpiffeId) -> Result<bool, TestCaseError> {
    let Ok(csr) = csr::read(pem) else { return Ok(false) };
    prop_assert_eq!(&csr.public_key, &key);
    prop_assert!(csr.is_for(id).is_ok());
    let signed = ca.certify(id, &csr.public_key, Duration::from_secs(60)).unwrap();
    let (_, leaf) =
        <x509_parser::prelude::X509Certificate<'_> as x509_parser::prelude::FromDer<'_, _>>::from_der(&signed.chain[0])
            .unwrap();
    prop_assert_eq!(leaf.public_key().raw, key);
    Ok(true)
}

#[test]
fn a_request_that_was_tampered_with_makes_no_certificate_for_another_key_or_name_and_no_panic() {
    let dir = tempfile::tempdir().unwrap();
    Ca::init(dir.path(), &TrustDomain::default()).unwrap();
    let ca = Ca::open(dir.path()).unwrap();
    let id: SpiffeId = WEB.parse().unwrap();
    let (key, csr) = new_csr(WEB);
    let key = key.subject_public_key_info();
    assert!(judge(&csr, &key, &ca, &id).unwrap(), "the good one is good");
    let good = pem::parse(&csr).unwrap().into_contents();
    let mut runner = TestRunner::new(ProptestConfig::with_cases(4000));
    let in_der = runner.run(&changes(), |changes| {
        let der = changed(good.clone(), &changes);
        judge(&pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der)), &key, &ca, &id).map(drop)
    });
    in_der.unwrap();
    let in_text = runner.run(&changes(), |changes| {
        let text = changed(csr.clone().into_bytes(), &changes);
        judge(&String::from_utf8_lossy(&text), &key, &ca, &id).map(drop)
    });
    in_text.unwrap();
    runner.run(&"\\PC{0,200}", |text| judge(&text, &key, &ca, &id).map(drop)).unwrap();
}
