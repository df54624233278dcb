//! Handshakes in memory, with real certificates of every kind a peer should not have: each is refused, and both ends
//! can say why.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use marline::{
    identity::{Ca, SpiffeId, Svid, Trust, TrustDomain},
    tls::{
        config::{
            Accept, Learned, Offer, Parameters, client_config, peer_id, provider, server_config, server_config_with,
            server_name,
        },
        verifier::{PeerFailure, Reason, explain},
    },
};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::{
    AlertDescription, ClientConfig, ClientConnection, Connection, Error, NamedGroup, ProtocolVersion, RootCertStore,
    ServerConfig, ServerConnection, crypto::aws_lc_rs, pki_types::CertificateDer, sign::CertifiedKey,
};

const HOUR: Duration = Duration::from_secs(3_600);

/// The mesh, and a CA of its own for certificates that our own would never issue.
struct Mesh {
    _dir: tempfile::TempDir,
    ca: Ca,
    signer: Issuer<'static, KeyPair>,
    trust_domain: TrustDomain,
}

impl Mesh {
    fn new() -> Self {
        Self::of("cluster.local")
    }

    fn of(name: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let trust_domain = TrustDomain::parse(name).unwrap();
        Ca::init(dir.path(), &trust_domain).unwrap();
        let read = |name: &str| std::fs::read_to_string(dir.path().join(name)).unwrap();
        let key = KeyPair::from_pem(&read("ca-key.pem")).unwrap();
        let signer = Issuer::from_ca_cert_pem(&read("ca-cert.pem"), key).unwrap();
        Self { ca: Ca::open(dir.path()).unwrap(), _dir: dir, signer, trust_domain }
    }

    fn trust(&self) -> Arc<Trust> {
        self.ca.trust(&self.trust_domain)
    }

    fn id(&self, account: &str) -> SpiffeId {
        SpiffeId::new(&self.trust_domain, "shop", account).unwrap()
    }

    fn svid(&self, account: &str) -> Svid {
        self.ca.issue(&self.id(account), HOUR).unwrap()
    }

    /// A certificate as our CA makes them, but for what `change` changes.
    fn odd_svid(&self, account: &str, change: impl FnOnce(&mut CertificateParams)) -> Svid {
        self.signed_by(&self.signer, account, change)
    }

    fn signed_by(
        &self,
        signer: &Issuer<'_, KeyPair>,
        account: &str,
        change: impl FnOnce(&mut CertificateParams),
    ) -> Svid {
        let id = self.id(account);
        let now = SystemTime::now();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = (now - HOUR).into();
        params.not_after = (now + HOUR).into();
        params.subject_alt_names = vec![uri(&id.to_string())];
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        change(&mut params);
        let key = KeyPair::generate().unwrap();
        let leaf = params.signed_by(&key, signer).unwrap();
        let signing = aws_lc_rs::sign::any_ecdsa_type(&rustls::pki_types::PrivateKeyDer::from(key)).unwrap();
        let key = Arc::new(CertifiedKey::new(vec![leaf.der().clone()], signing));
        Svid { id, key, not_before: now - HOUR, not_after: now + HOUR, serial: "00".into() }
    }

    fn client(&self, svid: &Svid, expect: &str) -> Arc<ClientConfig> {
        client_config(svid, self.trust(), &[self.id(expect)], Offer::Proxied).unwrap()
    }

    fn server(&self, svid: &Svid) -> Arc<ServerConfig> {
        server_config(svid, self.trust(), Accept::Plain).unwrap()
    }
}

fn uri(text: &str) -> SanType {
    SanType::URI(text.try_into().unwrap())
}

/// What each end made of the handshake.
struct Outcome {
    client: Result<(), Error>,
    server: Result<(), Error>,
    client_connection: ClientConnection,
    server_connection: ServerConnection,
}

fn handshake(client: &Arc<ClientConfig>, server: &Arc<ServerConfig>) -> Outcome {
    let name = server_name(80, "web.shop.svc.cluster.local");
    let mut client_connection = ClientConnection::new(Arc::clone(client), name).unwrap();
    let mut server_connection = ServerConnection::new(Arc::clone(server)).unwrap();
    let (mut client, mut server) = (Ok(()), Ok(()));
    for _ in 0..10 {
        let to_server = outgoing(&mut client_connection);
        if server.is_ok() {
            server = feed(&mut server_connection, &to_server);
        }
        let to_client = outgoing(&mut server_connection);
        if client.is_ok() {
            client = feed(&mut client_connection, &to_client);
        }
        if to_server.is_empty() && to_client.is_empty() {
            break;
        }
    }
    Outcome { client, server, client_connection, server_connection }
}

fn outgoing<S: rustls::SideData>(
    connection: &mut impl std::ops::DerefMut<Target = rustls::ConnectionCommon<S>>,
) -> Vec<u8> {
    let mut bytes = Vec::new();
    while connection.wants_write() {
        connection.write_tls(&mut bytes).unwrap();
    }
    bytes
}

fn feed<S: rustls::SideData>(
    connection: &mut impl std::ops::DerefMut<Target = rustls::ConnectionCommon<S>>,
    mut bytes: &[u8],
) -> Result<(), Error> {
    while !bytes.is_empty() {
        connection.read_tls(&mut bytes).unwrap();
        connection.process_new_packets()?;
    }
    Ok(())
}

/// A server that presents `svid`, seen by a client that expects `web`.
fn client_meets(mesh: &Mesh, svid: &Svid) -> (PeerFailure, PeerFailure) {
    let outcome = handshake(&mesh.client(&mesh.svid("client"), "web"), &mesh.server(svid));
    assert!(!outcome.client_connection.is_handshaking() || outcome.client.is_err());
    (explain(&outcome.client.unwrap_err()), explain(&outcome.server.unwrap_err()))
}

/// A client that presents `svid`, seen by the server `web`.
fn server_meets(mesh: &Mesh, svid: &Svid) -> (PeerFailure, PeerFailure) {
    let outcome = handshake(&mesh.client(svid, "web"), &mesh.server(&mesh.svid("web")));
    (explain(&outcome.server.unwrap_err()), explain(&outcome.client.unwrap_err()))
}

#[test]
fn two_workloads_of_the_mesh_agree_on_tls13_post_quantum_and_know_each_other() {
    let mesh = Mesh::new();
    let outcome = handshake(&mesh.client(&mesh.svid("client"), "web"), &mesh.server(&mesh.svid("web")));
    outcome.client.unwrap();
    outcome.server.unwrap();
    let (client, server) = (outcome.client_connection, outcome.server_connection);
    assert!(!client.is_handshaking() && !server.is_handshaking());
    assert_eq!(client.protocol_version(), Some(ProtocolVersion::TLSv1_3));
    assert_eq!(client.negotiated_key_exchange_group().unwrap().name(), NamedGroup::X25519MLKEM768);
    assert_eq!(client.alpn_protocol(), Some(b"marline".as_slice()));
    assert_eq!(server.server_name(), Some("outbound_.80_._.web.shop.svc.cluster.local"));
    assert_eq!(peer_id(client.peer_certificates().unwrap()).unwrap(), mesh.id("web"));
    assert_eq!(peer_id(server.peer_certificates().unwrap()).unwrap(), mesh.id("client"));
    assert!(Connection::from(client).dangerous_extract_secrets().is_ok(), "the kernel needs the secrets");
    assert!(Connection::from(server).dangerous_extract_secrets().is_ok());
}

#[test]
fn the_server_notes_the_name_that_its_client_asks_for() {
    let mesh = Mesh::new();
    let learned = Learned::default();
    let server = mesh.svid("web");
    let config =
        server_config_with(Parameters::default(), &server, mesh.trust(), Accept::Plain, learned.clone()).unwrap();
    assert_eq!(learned.sni(), None);
    let outcome = handshake(&mesh.client(&mesh.svid("client"), "web"), &config);
    assert!(outcome.server.is_ok() && outcome.client.is_ok());
    assert_eq!(learned.sni(), Some("outbound_.80_._.web.shop.svc.cluster.local"));
}

#[test]
fn the_server_sends_nothing_after_the_handshake() {
    let mesh = Mesh::new();
    let mut outcome = handshake(&mesh.client(&mesh.svid("client"), "web"), &mesh.server(&mesh.svid("web")));
    outcome.client.unwrap();
    assert_eq!(outgoing(&mut outcome.server_connection), b"", "a ticket would be a record that nobody reads");
    assert_eq!(outcome.client_connection.tls13_tickets_received(), 0);
}

#[test]
fn any_of_several_expected_identities_may_answer() {
    let mesh = Mesh::new();
    let svid = mesh.svid("client");
    let config = client_config(&svid, mesh.trust(), &[mesh.id("other"), mesh.id("web")], Offer::Proxied).unwrap();
    handshake(&config, &mesh.server(&mesh.svid("web"))).client.unwrap();
}

#[test]
fn a_client_that_expects_nobody_gets_no_configuration() {
    let mesh = Mesh::new();
    assert!(client_config(&mesh.svid("client"), mesh.trust(), &[], Offer::Proxied).is_err());
}

#[test]
fn another_workloads_certificate_is_refused_and_both_are_named() {
    let mesh = Mesh::new();
    let (client, server) = client_meets(&mesh, &mesh.svid("thief"));
    assert_eq!(client.reason, Reason::WrongIdentity);
    assert_eq!(
        client.text,
        "the peer is spiffe://cluster.local/ns/shop/sa/thief, expected spiffe://cluster.local/ns/shop/sa/web"
    );
    assert_eq!(server.reason, Reason::PeerAlert);
    assert!(server.text.contains("another identity than it expects"), "{server}");
}

#[test]
fn another_trust_domain_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    // Signed by our own CA's key: only the name is foreign.
    let foreign = mesh.odd_svid("web", |params| {
        params.subject_alt_names = vec![uri("spiffe://other.org/ns/shop/sa/web")];
    });
    for (refuser, _) in [client_meets(&mesh, &foreign), server_meets(&mesh, &foreign)] {
        assert_eq!(refuser.reason, Reason::ForeignTrustDomain);
        assert_eq!(
            refuser.text,
            "the peer calls itself spiffe://other.org/ns/shop/sa/web, and nobody is trusted to vouch for that trust domain: those of this mesh are cluster.local"
        );
    }
}

#[test]
fn an_expired_certificate_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    let expired = mesh.odd_svid("web", |params| {
        params.not_before = (SystemTime::now() - 3 * HOUR).into();
        params.not_after = (SystemTime::now() - 2 * HOUR).into();
    });
    for (refuser, refused) in [client_meets(&mesh, &expired), server_meets(&mesh, &expired)] {
        assert_eq!(refuser.reason, Reason::Expired);
        assert!(refuser.text.starts_with("the peer's certificate expired 2h"), "{refuser}");
        assert!(refused.text.contains("CertificateExpired"), "{refused}");
    }
}

#[test]
fn a_certificate_of_the_future_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    let early = mesh.odd_svid("web", |params| {
        params.not_before = (SystemTime::now() + 2 * HOUR).into();
        params.not_after = (SystemTime::now() + 3 * HOUR).into();
    });
    for (refuser, _) in [client_meets(&mesh, &early), server_meets(&mesh, &early)] {
        assert_eq!(refuser.reason, Reason::NotYetValid);
        assert!(refuser.text.contains("compare the clocks"), "{refuser}");
    }
}

#[test]
fn an_unknown_ca_is_refused_by_both_sides_also_when_it_is_called_like_ours() {
    let mesh = Mesh::new();
    // `Ca::init` gives every root of a trust domain the same name, as Istio does.
    for other in [Mesh::new(), Mesh::of("other.org")] {
        let stranger = mesh.signed_by(&other.signer, "web", |_| {});
        for (refuser, refused) in [client_meets(&mesh, &stranger), server_meets(&mesh, &stranger)] {
            assert_eq!(refuser.reason, Reason::UnknownCa, "{refuser}");
            assert!(refuser.text.contains("unknown CA"), "{refuser}");
            assert!(refused.text.contains("UnknownCA"), "{refused}");
        }
    }
}

#[test]
fn a_self_signed_certificate_is_refused_by_both_sides() {
    let mesh = Mesh::new();
    let key = KeyPair::generate().unwrap();
    let itself = Issuer::new(CertificateParams::default(), key);
    let svid = mesh.signed_by(&itself, "web", |_| {});
    for (refuser, _) in [client_meets(&mesh, &svid), server_meets(&mesh, &svid)] {
        assert_eq!(refuser.reason, Reason::UnknownCa, "{refuser}");
    }
}

#[test]
fn a_client_without_a_certificate_is_refused_and_told_so() {
    let mesh = Mesh::new();
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut config = config;
    config.dangerous().set_certificate_verifier(Arc::new(marline::tls::verifier::ExpectServer::new(
        mesh.trust(),
        vec![mesh.id("web")],
        Learned::default(),
    )));
    let outcome = handshake(&Arc::new(config), &mesh.server(&mesh.svid("web")));
    let failure = explain(&outcome.server.unwrap_err());
    assert_eq!((failure.reason, failure.text.as_str()), (Reason::NoCertificate, "the peer sent no certificate"));
    let told = explain(&outcome.client.unwrap_err());
    assert_eq!(
        told.text,
        "the peer refused the handshake with the alert CertificateRequired: it got no certificate from us"
    );
}

#[test]
fn tls12_is_refused_from_clients_and_servers() {
    let mesh = Mesh::new();
    let tls12 = Arc::new(aws_lc_rs::default_provider());
    let mut old_client = ClientConfig::builder_with_provider(Arc::clone(&tls12))
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_root_certificates(mesh.ca.roots())
        .with_no_client_auth();
    old_client.alpn_protocols = vec![b"istio".to_vec()];
    let outcome = handshake(&Arc::new(old_client), &mesh.server(&mesh.svid("web")));
    let failure = explain(&outcome.server.unwrap_err());
    assert_eq!(failure.reason, Reason::TlsVersion, "{failure}");
    assert!(explain(&outcome.client.unwrap_err()).text.contains("ProtocolVersion"));

    let web = mesh.svid("web");
    let old_server = ServerConfig::builder_with_provider(tls12)
        .with_protocol_versions(&[&rustls::version::TLS12])
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(Arc::clone(&web.key))));
    let outcome = handshake(&mesh.client(&mesh.svid("client"), "web"), &Arc::new(old_server));
    // The server gives up first: it finds no version that it speaks.
    let told = explain(&outcome.client.unwrap_err());
    assert!(told.text.contains("TLS 1.3"), "{told}");
    assert_eq!(explain(&outcome.server.unwrap_err()).reason, Reason::TlsVersion);
}

#[test]
fn certificates_that_are_no_svids_are_refused_by_both_sides() {
    type Change = fn(&mut CertificateParams);
    let cases: [(&str, Change); 12] = [
        ("names no URI", |p| p.subject_alt_names.clear()),
        ("names no URI", |p| p.subject_alt_names = vec![SanType::DnsName("web.shop.svc".try_into().unwrap())]),
        ("names 2 URIs", |p| p.subject_alt_names.push(uri("spiffe://cluster.local/ns/shop/sa/admin"))),
        ("names 2 URIs", |p| p.subject_alt_names.insert(0, uri("https://example.org/"))),
        ("does not begin with spiffe://", |p| p.subject_alt_names = vec![uri("https://cluster.local/ns/shop/sa/web")]),
        ("not the identity of a workload", |p| {
            p.subject_alt_names = vec![uri("spiffe://cluster.local/ns/shop/sa/web/x")]
        }),
        ("not the identity of a workload", |p| p.subject_alt_names = vec![uri("spiffe://cluster.local")]),
        ("certificate of a CA", |p| p.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)),
        ("may sign", |p| p.key_usages.push(KeyUsagePurpose::KeyCertSign)),
        ("may sign", |p| p.key_usages.push(KeyUsagePurpose::CrlSign)),
        // 4.3
        ("may not be used for signatures", |p| p.key_usages = vec![KeyUsagePurpose::KeyAgreement]),
        // 5.2, 3.1
        ("not the identity of a workload", |p| p.subject_alt_names = vec![uri("spiffe://cluster.local/")]),
    ];
    let mesh = Mesh::new();
    for (says, change) in cases {
        let odd = mesh.odd_svid("web", |params| {
            params.distinguished_name.push(DnType::CommonName, "odd");
            change(params);
        });
        for (refuser, _) in [client_meets(&mesh, &odd), server_meets(&mesh, &odd)] {
            assert_eq!(refuser.reason, Reason::NotAnSvid, "{refuser}");
            assert!(refuser.text.contains(says), "{refuser} does not say {says:?}");
        }
    }
}

#[test]
fn a_key_for_one_end_only_does_not_serve_at_the_other() {
    let mesh = Mesh::new();
    let only = |purpose: ExtendedKeyUsagePurpose| mesh.odd_svid("web", |p| p.extended_key_usages = vec![purpose]);
    let (refuser, _) = client_meets(&mesh, &only(ExtendedKeyUsagePurpose::ClientAuth));
    assert!(refuser.text.contains("not for this end"), "{refuser}");
    let (refuser, _) = server_meets(&mesh, &only(ExtendedKeyUsagePurpose::ServerAuth));
    assert!(refuser.text.contains("not for this end"), "{refuser}");
}

#[test]
fn a_workload_cannot_vouch_for_another() {
    let mesh = Mesh::new();
    // A leaf of ours used as a CA: its key signs a certificate for `web`, and the leaf goes along as an intermediate.
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::default();
    params.subject_alt_names = vec![uri(&mesh.id("thief").to_string())];
    params.is_ca = IsCa::ExplicitNoCa;
    let leaf = params.signed_by(&key, &mesh.signer).unwrap();
    let forged = mesh.signed_by(&Issuer::new(params, key), "web", |_| {});
    let chain = [forged.key.cert.clone(), vec![leaf.der().clone()]].concat();
    let forged = Svid { key: Arc::new(CertifiedKey::new(chain, Arc::clone(&forged.key.key))), ..forged };
    for (refuser, _) in [client_meets(&mesh, &forged), server_meets(&mesh, &forged)] {
        assert_eq!(refuser.reason, Reason::NotAnSvid, "{refuser}");
        assert!(refuser.text.contains("not a CA but a workload's"), "{refuser}");
    }
}

#[test]
fn a_certificate_without_its_key_proves_nothing() {
    let mesh = Mesh::new();
    let (web, thief) = (mesh.svid("web"), mesh.svid("thief"));
    let stolen = Svid {
        id: web.id.clone(),
        key: Arc::new(CertifiedKey::new(web.key.cert.clone(), Arc::clone(&thief.key.key))),
        ..mesh.svid("web")
    };
    for (refuser, _) in [client_meets(&mesh, &stolen), server_meets(&mesh, &stolen)] {
        assert_eq!(refuser.reason, Reason::BadCertificate, "{refuser}");
    }
}

#[test]
fn a_peer_that_asks_for_another_application_protocol_is_refused() {
    let mesh = Mesh::new();
    let mut config = (*mesh.client(&mesh.svid("client"), "web")).clone();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let outcome = handshake(&Arc::new(config), &mesh.server(&mesh.svid("web")));
    assert_eq!(explain(&outcome.server.unwrap_err()).reason, Reason::NothingInCommon);
}

#[test]
fn an_istio_sidecars_protocols_are_taken() {
    let mesh = Mesh::new();
    let mut config = (*mesh.client(&mesh.svid("client"), "web")).clone();
    config.alpn_protocols = vec![b"istio-peer-exchange".to_vec(), b"istio".to_vec()];
    let outcome = handshake(&Arc::new(config), &mesh.server(&mesh.svid("web")));
    assert_eq!(outcome.server_connection.alpn_protocol(), Some(b"istio".as_slice()));
    outcome.server.unwrap();
}

#[test]
fn what_is_no_tls_is_called_so() {
    let mesh = Mesh::new();
    let web = mesh.svid("web");
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x00\x00\x00\x17\x00\x00\x00\x01",
        &[0xff; 64],
    ] {
        let mut server = ServerConnection::new(mesh.server(&web)).unwrap();
        let failure = explain(&feed(&mut server, bytes).unwrap_err());
        assert_eq!(failure.reason, Reason::NotTls, "{failure}");
    }
}

#[test]
fn every_alert_and_every_reason_has_words() {
    for code in 0..=255u8 {
        let failure = explain(&Error::AlertReceived(AlertDescription::from(code)));
        assert_eq!(failure.reason, Reason::PeerAlert);
        assert!(failure.text.starts_with("the peer refused the handshake with the alert "), "{failure}");
    }
    let labels: std::collections::BTreeSet<&str> = Reason::ALL.iter().map(|reason| reason.label()).collect();
    assert_eq!(labels.len(), Reason::ALL.len(), "labels are distinct");
    assert!(PeerFailure::not_tls(b"GET / HTTP/1.1\r\n").text.contains("GET / HTTP/1.1\\r\\n"));
    assert_eq!(PeerFailure::truncated(0).reason, Reason::Truncated);
    assert!(PeerFailure::truncated(7).text.contains("after 7 bytes"));
}

#[test]
fn a_peers_chain_without_a_leaf_has_no_identity() {
    assert!(peer_id(&[]).is_err());
    assert!(peer_id(&[CertificateDer::from(b"junk".to_vec())]).is_err());
}

#[test]
fn any_host_makes_a_server_name() {
    for host in ["web.shop.svc.cluster.local", "", "..", "a b", "ü", &"a.".repeat(200)] {
        let name = server_name(65_535, host);
        assert!(name.to_str().starts_with("outbound_.65535_._"), "{host:?} became {name:?}");
    }
}

proptest::proptest! {
    #[test]
    fn no_damage_to_a_certificate_makes_the_reader_panic(at in proptest::prelude::any::<proptest::sample::Index>(), byte in proptest::prelude::any::<u8>(), cut in proptest::prelude::any::<bool>()) {
        thread_local! { static LEAF: Vec<u8> = Mesh::new().svid("web").key.cert[0].to_vec(); }
        let mut der = LEAF.with(Clone::clone);
        let at = at.index(der.len());
        if cut { der.truncate(at) } else { der[at] = byte }
        let _ = peer_id(&[CertificateDer::from(der)]);
    }
}
