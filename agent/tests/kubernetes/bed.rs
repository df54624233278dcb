//! An API server that answers what was recorded and does what it is told, and an agent's source that follows it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    fs, io,
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State as Shared,
    http::{HeaderMap, Response, StatusCode, Uri},
};
use marline::{
    config::{CniConfig, KubernetesConfig},
    control::kubernetes::{Health, Places, Report, Settings, Source},
    identity::{Ca, TrustDomain, TrustDomains},
    policy::Policies,
    state::{Snapshot, State},
};
use rustls::ServerConfig;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{mpsc, watch},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::UnboundedReceiverStream;

pub const LONG: Duration = Duration::from_secs(20);
pub const PODS: &str = "/api/v1/pods";
pub const NAMESPACES: &str = "/api/v1/namespaces";
pub const NODES: &str = "/api/v1/nodes";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const PEERS: &str = "/apis/security.istio.io/v1/peerauthentications";
pub const AUTHORIZATIONS: &str = "/apis/security.istio.io/v1/authorizationpolicies";
const TOKEN: &str = "the-agent's";

pub fn recorded(name: &str) -> Value {
    let path = format!("{}/tests/kubernetes/recorded/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The events of a recorded watch, as they are on the wire.
pub fn events(name: &str) -> Vec<String> {
    recorded(name)["response"]["events"].as_array().unwrap().iter().map(|event| format!("{event}\n")).collect()
}

type Pieces = mpsc::UnboundedSender<Result<Bytes, io::Error>>;

/// What is answered to one request.
#[derive(Clone)]
pub enum Answer {
    Said(u16, String),
    /// A stream of these pieces, which ends in order or is cut.
    Stream(Vec<String>, bool),
}

impl Answer {
    pub fn recorded(name: &str) -> Self {
        let response = &recorded(name)["response"];
        match response["events"].as_array() {
            Some(_) => Self::Stream(events(name), false),
            None => {
                let status = response["status"].as_u64().unwrap().try_into().unwrap();
                let body = &response["body"];
                Self::Said(status, body.as_str().map_or_else(|| body.to_string(), str::to_owned))
            }
        }
    }

    pub fn list(items: Vec<Value>, version: u64) -> Self {
        Self::Said(200, json!({"metadata": {"resourceVersion": version.to_string()}, "items": items}).to_string())
    }
}

#[derive(Default)]
struct Inner {
    lists: HashMap<String, Answer>,
    once: HashMap<String, VecDeque<Answer>>,
    held: HashSet<String>,
    open: HashMap<String, Vec<Pieces>>,
    asked: Vec<String>,
    /// What was taken as an answer, by key.
    accepted: HashMap<String, HashSet<String>>,
}

/// Answers everybody who has the token.
pub struct ApiServer {
    pub address: SocketAddr,
    inner: Mutex<Inner>,
    /// Tells of every request, and of everything that is let go.
    news: watch::Sender<u64>,
}

impl ApiServer {
    /// With all lists that were recorded. The key of a watch is its path and `#watch`, that of a second page its path and `#more`.
    async fn start(dir: &std::path::Path) -> Arc<Self> {
        Ca::init(&dir.join("api"), &TrustDomain::default()).unwrap();
        let ca = Ca::open(&dir.join("api")).unwrap();
        let (key, _) = ca.issue_server(&["127.0.0.1".to_owned()], Duration::from_secs(3600)).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let server = Arc::new(Self { address, inner: Mutex::default(), news: watch::Sender::new(0) });
        for name in ["namespaces", "pods", "services", "endpointslices", "nodes", "peerauthentications"] {
            server.lists_recorded(name);
        }
        for name in ["authorizationpolicies", "destinationrules"] {
            server.lists_recorded(name);
        }
        let router = Router::new().fallback(answer).with_state(Arc::clone(&server));
        let listener = TlsListener { tcp, acceptor: TlsAcceptor::from(Arc::new(config)) };
        tokio::spawn(async move { axum::serve(listener, router).await });
        server
    }

    fn lists_recorded(&self, name: &str) {
        let exchange = format!("list-{name}");
        let path = recorded(&exchange)["request"]["path"].as_str().unwrap().to_owned();
        self.lists(&path, Answer::recorded(&exchange));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap()
    }

    fn tell(&self) {
        self.news.send_modify(|count| *count += 1);
    }

    /// From now on.
    pub fn lists(&self, path: &str, answer: Answer) {
        self.lock().lists.insert(path.to_owned(), answer);
    }

    pub fn unlists(&self, path: &str) {
        self.lock().lists.remove(path);
    }

    /// To the next request alone.
    pub fn answers_once(&self, key: &str, answer: Answer) {
        self.lock().once.entry(key.to_owned()).or_default().push_back(answer);
    }

    /// Keeps answers back until they are let go.
    pub fn holds(&self, key: &str) {
        self.lock().held.insert(key.to_owned());
    }

    pub fn lets_go(&self, key: &str) {
        self.lock().held.remove(key);
        self.tell();
    }

    /// Sends to all watches of a path that are open.
    pub fn sends(&self, path: &str, text: &str) {
        let inner = self.lock();
        let open = inner.open.get(path).expect("nobody watches");
        let sent = open.iter().filter(|watch| watch.send(Ok(Bytes::from(text.to_owned()))).is_ok()).count();
        assert_ne!(sent, 0, "nobody watches {path}");
    }

    /// Ends all watches of a path, in order or in the middle.
    pub fn ends(&self, path: &str, cut: bool) {
        for watch in self.lock().open.remove(path).unwrap_or_default() {
            if cut {
                drop(watch.send(Err(io::Error::other("cut"))));
            }
        }
    }

    /// All requests so far that begin so.
    pub fn asked(&self, begins: &str) -> Vec<String> {
        self.lock().asked.iter().filter(|asked| asked.starts_with(begins)).cloned().collect()
    }

    /// All that was ever named as acceptable in an answer to this.
    pub fn accepted(&self, key: &str) -> Vec<String> {
        let mut all: Vec<_> = self.lock().accepted.get(key).into_iter().flatten().cloned().collect();
        all.sort();
        all
    }

    /// Waits until so many requests that begin so have come.
    pub async fn was_asked(&self, begins: &str, times: usize) {
        let mut news = self.news.subscribe();
        let enough = news.wait_for(|_| self.asked(begins).len() >= times);
        if timeout(LONG, enough).await.is_err() {
            panic!("was not asked {times} times for {begins}: {:?}", self.lock().asked);
        }
    }

    /// Waits until somebody watches.
    pub async fn is_watched(&self, path: &str) {
        let mut news = self.news.subscribe();
        let watched = |_: &u64| self.lock().open.get(path).is_some_and(|open| open.iter().any(|one| !one.is_closed()));
        timeout(LONG, news.wait_for(watched)).await.expect("nobody watches").unwrap();
    }
}

async fn answer(Shared(server): Shared<Arc<ApiServer>>, uri: Uri, headers: HeaderMap) -> Response<Body> {
    let query = uri.query().unwrap_or_default();
    let watched = query.contains("watch=1");
    let more = if query.contains("continue=") { "#more" } else { "" };
    let key = if watched { format!("{}#watch", uri.path()) } else { format!("{}{more}", uri.path()) };
    let mut news = server.news.subscribe();
    server.lock().asked.push(format!("{key}?{query}"));
    let accept = headers["accept"].to_str().unwrap().to_owned();
    server.lock().accepted.entry(key.clone()).or_default().insert(accept);
    server.tell();
    news.wait_for(|_| !server.lock().held.contains(&key)).await.unwrap();
    if headers["authorization"] != format!("Bearer {TOKEN}") {
        return said(&Answer::recorded("401-bad-token"));
    }
    let once = server.lock().once.get_mut(&key).and_then(VecDeque::pop_front);
    let known = once.or_else(|| server.lock().lists.get(&key).cloned());
    match known {
        Some(answer) => said(&answer),
        None if watched => {
            let (pieces, stream) = mpsc::unbounded_channel();
            server.lock().open.entry(uri.path().to_owned()).or_default().push(pieces);
            server.tell();
            Response::new(Body::from_stream(UnboundedReceiverStream::new(stream)))
        }
        None => said(&Answer::recorded("404-crd-absent")),
    }
}

fn said(answer: &Answer) -> Response<Body> {
    match answer {
        Answer::Said(status, body) => {
            let mut response = Response::new(Body::from(body.clone()));
            *response.status_mut() = StatusCode::from_u16(*status).unwrap();
            response
        }
        Answer::Stream(pieces, cut) => {
            let pieces = pieces.iter().map(|piece| Ok(Bytes::from(piece.clone())));
            let end = cut.then(|| Err(io::Error::other("cut")));
            let all: Vec<_> = pieces.chain(end).collect();
            Response::new(Body::from_stream(tokio_stream::iter(all)))
        }
    }
}

struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl axum::serve::Listener for TlsListener {
    type Io = TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let (stream, peer) = self.tcp.accept().await.unwrap();
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}

/// An agent's source, and the state that it keeps.
pub struct Bed {
    pub api: Arc<ApiServer>,
    pub state: State,
    pub health: Health,
    pub places: Places,
    pub config: KubernetesConfig,
    _dir: tempfile::TempDir,
    _stop: watch::Sender<bool>,
}

impl Bed {
    /// With a server that was made ready for it, on node-a.
    pub async fn start(prepare: impl FnOnce(&ApiServer)) -> Self {
        Self::with(TOKEN, |_| {}, prepare).await
    }

    pub async fn with_token(token: &str, prepare: impl FnOnce(&ApiServer)) -> Self {
        Self::with(token, |_| {}, prepare).await
    }

    pub async fn with_settings(set: impl FnOnce(&mut Settings), prepare: impl FnOnce(&ApiServer)) -> Self {
        Self::with(TOKEN, set, prepare).await
    }

    async fn with(token: &str, set: impl FnOnce(&mut Settings), prepare: impl FnOnce(&ApiServer)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let api = ApiServer::start(dir.path()).await;
        prepare(&api);
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("https://{}", api.address), "certificate-authority": "api/root-cert.pem"}}],
            "users": [{"name": "u", "user": {"token": token}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        fs::write(dir.path().join("kubeconfig"), kubeconfig.to_string()).unwrap();
        let config = KubernetesConfig {
            node_name: Some("node-a".into()),
            kubeconfig: Some(dir.path().join("kubeconfig")),
            kubelet_cgroup: None,
            cni: CniConfig::default(),
        };
        let mut source = Source::open(&config, TrustDomains::default()).await.unwrap();
        source.settings = Settings {
            backoff: Duration::from_millis(20),
            longest_backoff: Duration::from_millis(100),
            absent: Duration::from_millis(100),
            quiet: Duration::from_millis(1),
            ..Settings::default()
        };
        set(&mut source.settings);
        let empty = Snapshot::new(Policies::default(), TrustDomains::default(), Vec::new(), Vec::new());
        let (state, (stop, stopped)) = (State::new(empty), watch::channel(false));
        let (health, places) = (source.health.clone(), source.places.clone());
        tokio::spawn(source.run(state.clone(), stopped));
        Self { api, state, health, places, config, _dir: dir, _stop: stop }
    }

    /// Started, and the cluster is known.
    pub async fn ready(prepare: impl FnOnce(&ApiServer)) -> Self {
        let bed = Self::start(prepare).await;
        bed.is_ready().await;
        bed
    }

    pub async fn is_ready(&self) {
        if timeout(LONG, self.health.ready().wait_for(|ready| *ready)).await.is_err() {
            panic!("the cluster is not known: {:?}", self.health.report());
        }
    }

    /// Waits for a snapshot of which this is true.
    pub async fn knows(&self, what: &str, is_true: impl Fn(&Snapshot) -> bool) {
        let mut generations = self.state.subscribe();
        let known = generations.wait_for(|_| is_true(&self.state.load()));
        if timeout(LONG, known).await.is_err() {
            panic!("not known: {what}: {:?}", workloads(&self.state.load()));
        }
    }

    /// Waits until this is told of the source.
    pub async fn tells(&self, what: &str, is_true: impl Fn(&Report) -> bool) -> Report {
        let told = async {
            loop {
                let report = self.health.report();
                if is_true(&report) {
                    return report;
                }
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
        };
        match timeout(LONG, told).await {
            Ok(report) => report,
            Err(_) => panic!("not told: {what}: {:?}", self.health.report()),
        }
    }
}

/// `NAMESPACE/NAME` of all workloads.
pub fn workloads(snapshot: &Snapshot) -> Vec<String> {
    snapshot.workloads().iter().map(|workload| workload.to_string()).collect()
}

pub fn endpoints(snapshot: &Snapshot, host: &str, port: u16) -> Vec<String> {
    let service = snapshot.service_of_host(host).expect(host);
    service.ports[&port].iter().map(|endpoint| endpoint.address.to_string()).collect()
}

/// A pod of the recorded list, changed.
pub fn pod(name: &str, change: impl FnOnce(&mut Value)) -> Value {
    let list = recorded("list-pods");
    let items = list["response"]["body"]["items"].as_array().unwrap().clone();
    let of_foo = |item: &Value| item["metadata"]["namespace"] == "foo" && item["metadata"]["name"] == "sleep-a";
    let mut pod = items.into_iter().find(of_foo).unwrap();
    pod["metadata"]["name"] = json!(name);
    pod["metadata"]["uid"] = json!(format!("uid-of-{name}"));
    change(&mut pod);
    pod
}

/// The same as an event, with another version and address.
pub fn pod_event(kind: &str, name: &str, version: u64, address: &str) -> String {
    let object = pod(name, |pod| {
        pod["metadata"]["resourceVersion"] = json!(version.to_string());
        pod["status"]["podIP"] = json!(address);
        pod["status"]["podIPs"] = json!([{"ip": address}]);
    });
    format!("{}\n", json!({"type": kind, "object": object}))
}
