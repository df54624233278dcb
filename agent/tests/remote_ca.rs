//! Certificates from a CA elsewhere: what comes back is used if it is what was asked for, and nothing else is, whatever the CA says. The CA
//! here speaks the real protocol over real TLS, and can be told to lie.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, SystemTime},
};

use marline::identity::{
    Ca, CertState, Manager, ManagerSettings, SpiffeId, Trust, TrustDomain, TrustStore,
    remote::{RemoteCa, RemoteSettings},
    wire::istio::{
        CertificateRequest, CertificateResponse, IMPERSONATED_IDENTITY,
        istio_certificate_service_server::{IstioCertificateService, IstioCertificateServiceServer},
    },
};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, SanType,
};
use rustls::pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::TempDir;
use tokio::{net::TcpListener, sync::watch, task::JoinHandle};
use tokio_rustls::TlsAcceptor;
use tonic::{Request, Response, Status};

const LIFE: Duration = Duration::from_secs(3_600);

/// What the CA does with the next request.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Does {
    Signs,
    SignsAnotherIdentity,
    SignsAnotherKey,
    SignsUnderAnotherRoot,
    SignsForTomorrow,
    SignsForYesterday,
    MakesItACa,
    NamesTwo,
    SendsNothing,
    SendsGarbage,
    SendsManyCertificates,
    Refuses(tonic::Code),
    IsSilent,
}

/// Token, cluster, the identity that was asked for, and the names in the request.
type Asked = (String, Option<String>, String, String);

struct Shared {
    does: Mutex<Does>,
    asked: Mutex<Option<Asked>>,
    requests: AtomicUsize,
    /// Most requests at once.
    busy: AtomicUsize,
    busiest: AtomicUsize,
    signer: (String, String),
    other: (String, String),
}

struct Service(Arc<Shared>);

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> Result<Response<CertificateResponse>, Status> {
        let shared = &self.0;
        shared.requests.fetch_add(1, Ordering::SeqCst);
        let busy = shared.busy.fetch_add(1, Ordering::SeqCst) + 1;
        shared.busiest.fetch_max(busy, Ordering::SeqCst);
        let does = *shared.does.lock().unwrap();
        if does == Does::IsSilent {
            std::future::pending::<()>().await;
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
        shared.busy.fetch_sub(1, Ordering::SeqCst);
        let text = |name: &str| request.metadata().get(name).map(|value| value.to_str().unwrap().to_owned());
        let told = (text("authorization").unwrap_or_default(), text("clusterid"));
        let message = request.into_inner();
        let Some(prost_types::value::Kind::StringValue(id)) =
            message.metadata.unwrap().fields[IMPERSONATED_IDENTITY].kind.clone()
        else {
            return Err(Status::invalid_argument("no identity"));
        };
        // As ztunnel writes it.
        let csr = CertificateSigningRequestParams::from_pem(&message.csr).unwrap();
        let names: Vec<_> = csr.params.subject_alt_names.clone();
        *shared.asked.lock().unwrap() = Some((told.0, told.1, id.clone(), format!("{names:?}")));
        let (signer, root) = match does {
            Does::SignsUnderAnotherRoot => (issuer(&shared.other), &shared.other.0),
            _ => (issuer(&shared.signer), &shared.signer.0),
        };
        let now = SystemTime::now();
        let day = Duration::from_secs(86_400);
        let (from, to) = match does {
            Does::SignsForTomorrow => (now + LIFE, now + day),
            Does::SignsForYesterday => (now - day, now - LIFE),
            _ => (now - Duration::from_secs(60), now + Duration::from_secs(message.validity_duration as u64)),
        };
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.not_before = from.into();
        params.not_after = to.into();
        let named = if does == Does::SignsAnotherIdentity { "spiffe://cluster.local/ns/shop/sa/admin" } else { &id };
        params.subject_alt_names = vec![SanType::URI(named.try_into().unwrap())];
        if does == Does::NamesTwo {
            params.subject_alt_names.push(SanType::URI("spiffe://cluster.local/ns/shop/sa/admin".try_into().unwrap()));
        }
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.is_ca = IsCa::ExplicitNoCa;
        if does == Does::MakesItACa {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        let leaf = match does {
            Does::SignsAnotherKey => params.signed_by(&KeyPair::generate().unwrap(), &signer).unwrap(),
            _ => params.signed_by(&csr.public_key, &signer).unwrap(),
        };
        let chain = match does {
            Does::Refuses(code) => return Err(Status::new(code, "because")),
            Does::SendsNothing => Vec::new(),
            Does::SendsGarbage => {
                vec!["-----BEGIN CERTIFICATE-----\nbm9uZQ==\n-----END CERTIFICATE-----\n".to_owned()]
            }
            Does::SendsManyCertificates => vec![leaf.pem(); 100],
            _ => vec![leaf.pem(), root.clone()],
        };
        Ok(Response::new(CertificateResponse { cert_chain: chain }))
    }
}

fn issuer((certificate, key): &(String, String)) -> Issuer<'static, KeyPair> {
    Issuer::from_ca_cert_pem(certificate, KeyPair::from_pem(key).unwrap()).unwrap()
}

/// A CA that listens, and the agent's side of it.
struct Bed {
    shared: Arc<Shared>,
    files: TempDir,
    address: SocketAddr,
    serving: JoinHandle<()>,
    manager: Manager,
    stop: watch::Sender<bool>,
}

impl Bed {
    async fn new(name: &str, life: Duration) -> Self {
        let files = tempfile::tempdir().unwrap();
        let domain = TrustDomain::default();
        let read = |dir: &str, name: &str| fs::read_to_string(files.path().join(dir).join(name)).unwrap();
        for dir in ["ca", "other"] {
            Ca::init(&files.path().join(dir), &domain).unwrap();
        }
        fs::write(files.path().join("token"), "secret-token\n").unwrap();
        let pair = |dir: &str| (read(dir, "ca-cert.pem"), read(dir, "ca-key.pem"));
        let shared = Arc::new(Shared {
            does: Mutex::new(Does::Signs),
            asked: Mutex::default(),
            requests: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            busiest: AtomicUsize::new(0),
            signer: pair("ca"),
            other: pair("other"),
        });
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let serving = tokio::spawn(serve(listener, shared.clone(), name.to_owned()));
        let trust = Trust::new(domain, Ca::open(&files.path().join("ca")).unwrap().roots());
        let trust = TrustStore::new(trust);
        let settings = RemoteSettings {
            address: address.to_string(),
            server_name: Some("ca.example".to_owned()),
            token: files.path().join("token"),
            cluster_id: Some("Kubernetes".to_owned()),
        };
        let source = RemoteCa::new(&settings, trust.clone()).unwrap();
        let manager = Manager::new(source, trust, ManagerSettings { leaf_lifetime: life });
        let (stop, stopped) = watch::channel(false);
        tokio::spawn({
            let manager = manager.clone();
            async move { manager.run(stopped).await }
        });
        Self { shared, files, address, serving, manager, stop }
    }

    fn does(&self, does: Does) {
        *self.shared.does.lock().unwrap() = does;
    }

    /// What the manager says of the first attempt that fails.
    async fn failure(&self, id: &SpiffeId) -> String {
        until("a failure", || self.manager.last_error(id)).await
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        self.serving.abort();
    }
}

async fn serve(listener: TcpListener, shared: Arc<Shared>, name: String) {
    let key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![name]).unwrap();
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    let certificate = params.signed_by(&key, &issuer(&shared.signer)).unwrap();
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let acceptor = TlsAcceptor::from(Arc::new(config));
    // Connections end with it, as with a process.
    let mut connections = tokio::task::JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let (acceptor, shared) = (acceptor.clone(), shared.clone());
        connections.spawn(async move {
            let Ok(stream) = acceptor.accept(stream).await else { return };
            let service = IstioCertificateServiceServer::new(Service(shared));
            let service = hyper_util::service::TowerToHyperService::new(service);
            let http = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
            let _ = http.serve_connection(hyper_util::rt::TokioIo::new(stream), service).await;
        });
    }
}

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), found).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap()
}

#[tokio::test]
async fn a_certificate_is_asked_for_as_ztunnel_does_and_shown_without_its_root() {
    let bed = Bed::new("ca.example", LIFE).await;
    bed.manager.retain(&[id("web")].into());
    tokio::time::timeout(Duration::from_secs(20), bed.manager.until_held(&id("web"))).await.unwrap();
    let (authorization, cluster, asked, names) = bed.shared.asked.lock().unwrap().clone().unwrap();
    assert_eq!((&*authorization, cluster.as_deref()), ("Bearer secret-token", Some("Kubernetes")));
    assert_eq!(asked, id("web").to_string());
    assert!(names.contains(&id("web").to_string()) && names.matches("URI").count() == 1, "{names}");
    let svid = bed.manager.svid(&id("web")).unwrap();
    assert_eq!((svid.key.cert.len(), svid.key.keys_match()), (1, Ok(())));
    let info = bed.manager.list().remove(0);
    assert_eq!((info.state, &*info.source), (CertState::Valid, &*bed.address.to_string()));
    let due = LIFE.as_secs() - (info.not_after.unwrap() - info.renews_at.unwrap());
    assert!((LIFE.as_secs() * 44 / 100..=LIFE.as_secs() * 56 / 100).contains(&due), "renewed after {due} s");
}

#[tokio::test]
async fn whatever_the_ca_sends_but_was_not_asked_for_is_refused_with_the_reason() {
    for (does, says) in [
        (Does::SignsAnotherIdentity, "a certificate of spiffe://cluster.local/ns/shop/sa/admin when asked"),
        (Does::SignsAnotherKey, "another key than ours"),
        (Does::SignsUnderAnotherRoot, "do not vouch for"),
        (Does::SignsForTomorrow, "not valid for another"),
        (Does::SignsForYesterday, "expired"),
        (Does::MakesItACa, "certificate of a CA"),
        (Does::NamesTwo, "names 2 URIs"),
        (Does::SendsNothing, "no certificate"),
        (Does::SendsGarbage, "no workload's certificate"),
        (Does::SendsManyCertificates, "more than 10 certificates"),
        (Does::Refuses(tonic::Code::Unauthenticated), "does not accept the token in"),
        (Does::Refuses(tonic::Code::PermissionDenied), "will not sign for spiffe://cluster.local/ns/shop/sa/web"),
        (Does::Refuses(tonic::Code::ResourceExhausted), "more to do than it takes"),
        (Does::Refuses(tonic::Code::Unimplemented), "IstioCertificateService"),
        (Does::Refuses(tonic::Code::Internal), "because"),
    ] {
        let bed = Bed::new("ca.example", LIFE).await;
        bed.does(does);
        bed.manager.retain(&[id("web")].into());
        let failure = bed.failure(&id("web")).await;
        assert!(failure.contains(says) && !failure.contains("secret-token"), "{does:?}: {failure}");
        assert!(bed.manager.svid(&id("web")).is_none(), "{does:?}: it was used");
        // And is had when the CA has come to its senses.
        bed.does(Does::Signs);
        tokio::time::timeout(Duration::from_secs(20), bed.manager.until_held(&id("web"))).await.unwrap();
    }
}

#[tokio::test]
async fn a_server_that_is_not_the_ca_gets_no_token() {
    let bed = Bed::new("somebody.example", LIFE).await;
    bed.manager.retain(&[id("web")].into());
    let failure = bed.failure(&id("web")).await;
    assert!(failure.contains("cannot be reached") && failure.contains("ca.example"), "{failure}");
    assert_eq!(bed.shared.requests.load(Ordering::SeqCst), 0);

    // The right name, under a root that is not pinned.
    let bed = Bed::new("ca.example", LIFE).await;
    let other = Ca::open(&bed.files.path().join("other")).unwrap().roots();
    bed.manager.trust_store().replace(Trust::new(TrustDomain::default(), other));
    bed.manager.retain(&[id("web")].into());
    let failure = bed.failure(&id("web")).await;
    assert!(failure.contains("cannot be reached"), "{failure}");
    assert_eq!(bed.shared.requests.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_connection_to_a_ca_that_is_not_believed_any_more_carries_no_more_tokens() {
    let bed = Bed::new("ca.example", LIFE).await;
    bed.manager.retain(&[id("web")].into());
    tokio::time::timeout(Duration::from_secs(20), bed.manager.until_held(&id("web"))).await.unwrap();
    // The connection stands; what its certificate was verified by does not count now.
    let requests = bed.shared.requests.load(Ordering::SeqCst);
    let root = |dir: &str| Ca::open(&bed.files.path().join(dir)).unwrap().roots();
    bed.manager.trust_store().replace(Trust::new(TrustDomain::default(), root("other")));
    bed.manager.retain(&[id("web"), id("db")].into());
    let failure = bed.failure(&id("db")).await;
    assert_eq!(bed.shared.requests.load(Ordering::SeqCst), requests, "{failure}");
    assert!(failure.contains("cannot be reached"), "{failure}");
    // And when it is believed again it is asked again.
    bed.manager.trust_store().replace(Trust::new(TrustDomain::default(), root("ca")));
    tokio::time::timeout(Duration::from_secs(20), bed.manager.until_held(&id("db"))).await.unwrap();
}

#[tokio::test]
async fn a_token_that_changes_is_read_anew_and_one_that_is_missing_is_named() {
    let bed = Bed::new("ca.example", LIFE).await;
    let token = bed.files.path().join("token");
    fs::remove_file(&token).unwrap();
    bed.manager.retain(&[id("web")].into());
    let failure = bed.failure(&id("web")).await;
    assert!(failure.contains(token.to_str().unwrap()), "{failure}");
    fs::write(&token, "").unwrap();
    until("the empty one", || bed.manager.last_error(&id("web")).filter(|said| said.contains("holds no token"))).await;
    fs::write(&token, "another-token").unwrap();
    tokio::time::timeout(Duration::from_secs(20), bed.manager.until_held(&id("web"))).await.unwrap();
    assert_eq!(bed.shared.asked.lock().unwrap().as_ref().unwrap().0, "Bearer another-token");
}

#[tokio::test]
async fn a_ca_that_is_away_for_more_than_half_a_life_costs_nothing_and_one_that_is_back_is_used() {
    let life = Duration::from_secs(8);
    let mut bed = Bed::new("ca.example", life).await;
    bed.manager.retain(&[id("web"), id("db")].into());
    for who in ["web", "db"] {
        tokio::time::timeout(Duration::from_secs(20), bed.manager.until_held(&id(who))).await.unwrap();
    }
    let first = bed.manager.svid(&id("web")).unwrap();
    // In the middle of a request, too: one is on its way and hears no answer.
    bed.does(Does::IsSilent);
    bed.manager.retain(&[id("web"), id("db"), id("new")].into());
    let before = bed.shared.requests.load(Ordering::SeqCst);
    until("the request", || (bed.shared.requests.load(Ordering::SeqCst) > before).then_some(())).await;
    bed.serving.abort();
    let away_since = SystemTime::now();
    until("a failed renewal", || {
        let info = bed.manager.list().into_iter().find(|info| info.id == id("web"))?;
        (info.failed_renewals > 0 && away_since.elapsed().unwrap() > life / 2).then_some(())
    })
    .await;
    let held = bed.manager.svid(&id("web")).expect("the present one is good until it expires");
    assert_eq!(held.serial, first.serial);
    bed.does(Does::Signs);
    let listener = TcpListener::bind(bed.address).await.unwrap();
    bed.serving = tokio::spawn(serve(listener, bed.shared.clone(), "ca.example".to_owned()));
    until("another certificate", || bed.manager.svid(&id("web")).filter(|svid| svid.serial != first.serial)).await;
    tokio::time::timeout(Duration::from_secs(20), bed.manager.until_held(&id("new"))).await.unwrap();
}

#[tokio::test]
async fn many_identities_are_asked_for_a_few_at_a_time() {
    let bed = Bed::new("ca.example", LIFE).await;
    bed.manager.retain(&(0..200).map(|n| id(&format!("a{n}"))).collect());
    for n in 0..200 {
        bed.manager.until_held(&id(&format!("a{n}"))).await;
    }
    assert_eq!(bed.shared.requests.load(Ordering::SeqCst), 200);
    let busiest = bed.shared.busiest.load(Ordering::SeqCst);
    assert!((2..=16).contains(&busiest), "{busiest} at once");
}

#[tokio::test]
async fn an_identity_that_left_while_it_was_asked_for_is_not_kept() {
    let bed = Bed::new("ca.example", LIFE).await;
    bed.does(Does::IsSilent);
    bed.manager.retain(&[id("web")].into());
    until("the request", || (bed.shared.requests.load(Ordering::SeqCst) > 0).then_some(())).await;
    bed.manager.retain(&[].into());
    assert!(bed.manager.list().is_empty());
    bed.does(Does::Signs);
    bed.manager.retain(&[id("web")].into());
    tokio::time::timeout(Duration::from_secs(20), bed.manager.until_held(&id("web"))).await.unwrap();
}
