//! An API server over HTTPS that has objects, lists them and tells watches of every change, in each node's namespace at 127.0.0.1:6443.
#![allow(dead_code, reason = "each suite uses some of it")]

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs, io,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result};
use axum::{
    Router,
    body::{Body, Bytes},
    extract::State,
    http::{Response, StatusCode, Uri},
};
use marline::identity::{Ca, TrustDomain};
use marline_tests::{cluster::Cluster, cluster::Side, netns};
use rustls::ServerConfig;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Runtime,
    sync::{mpsc, watch},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tokio_stream::wrappers::UnboundedReceiverStream;

pub const NAMESPACES: &str = "/api/v1/namespaces";
pub const PODS: &str = "/api/v1/pods";
pub const SERVICES: &str = "/api/v1/services";
pub const NODES: &str = "/api/v1/nodes";
pub const SLICES: &str = "/apis/discovery.k8s.io/v1/endpointslices";
pub const PEERS: &str = "/apis/security.istio.io/v1/peerauthentications";
pub const AUTHORIZATIONS: &str = "/apis/security.istio.io/v1/authorizationpolicies";
const KINDS: [&str; 7] = [NAMESPACES, PODS, SERVICES, NODES, SLICES, PEERS, AUTHORIZATIONS];
const PORT: u16 = 6443;

#[derive(Default)]
struct Inner {
    version: u64,
    objects: HashMap<&'static str, BTreeMap<String, Value>>,
    log: HashMap<&'static str, Vec<(u64, String)>>,
    held: HashSet<&'static str>,
}

struct Shared {
    inner: Mutex<Inner>,
    news: watch::Sender<u64>,
}

pub struct Api {
    shared: Arc<Shared>,
    _runtime: Runtime,
}

impl Api {
    /// Serves both nodes, and writes a kubeconfig into the cluster's directory.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let dir = cluster.directory();
        Ca::init(&dir.join("api"), &TrustDomain::default())?;
        let (key, _) =
            Ca::open(&dir.join("api"))?.issue_server(&["127.0.0.1".to_owned()], Duration::from_secs(3600))?;
        let tls = ServerConfig::builder()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
        let acceptor = TlsAcceptor::from(Arc::new(tls));
        let shared = Arc::new(Shared { inner: Mutex::default(), news: watch::Sender::new(0) });
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        for side in Side::BOTH {
            let bind = || std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, PORT));
            let listener = netns::inside(&cluster.node(side).netns, bind)??;
            listener.set_nonblocking(true)?;
            let _inside = runtime.enter();
            let listener = TlsListener { tcp: TcpListener::from_std(listener)?, acceptor: acceptor.clone() };
            let router = Router::new().fallback(answer).with_state(Arc::clone(&shared));
            runtime.spawn(async move { axum::serve(listener, router).await });
        }
        let kubeconfig = json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "c",
            "clusters": [{"name": "c", "cluster": {"server": format!("https://127.0.0.1:{PORT}"), "certificate-authority": "api/root-cert.pem"}}],
            "users": [{"name": "u", "user": {"token": "t"}}],
            "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        });
        fs::write(kubeconfig_of(dir), kubeconfig.to_string())?;
        let api = Self { shared, _runtime: runtime };
        for side in Side::BOTH {
            api.apply(NODES, json!({"metadata": {"name": format!("node-{}", side.letter())}}));
        }
        Ok(api)
    }

    /// Makes an object, or puts it in the place of one of its name.
    pub fn apply(&self, kind: &'static str, mut object: Value) {
        let mut inner = self.lock();
        inner.version += 1;
        let version = inner.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let key = key(&object);
        if object["metadata"]["uid"].is_null() {
            object["metadata"]["uid"] = json!(format!("uid-of-{}", key.replace('/', "-")));
        }
        let known = inner.objects.entry(kind).or_default().insert(key, object.clone());
        let event = json!({"type": if known.is_some() { "MODIFIED" } else { "ADDED" }, "object": object});
        inner.log.entry(kind).or_default().push((version, format!("{event}\n")));
        drop(inner);
        self.shared.news.send_modify(|count| *count += 1);
    }

    pub fn change(
        &self,
        kind: &'static str,
        namespace: &str,
        name: &str,
        change: impl FnOnce(&mut Value),
    ) -> Result<()> {
        let key = format!("{namespace}/{name}");
        let mut object = self.lock().objects.get(kind).and_then(|all| all.get(&key)).cloned().context(key)?;
        change(&mut object);
        self.apply(kind, object);
        Ok(())
    }

    pub fn delete(&self, kind: &'static str, namespace: &str, name: &str) {
        let mut inner = self.lock();
        let Some(mut object) = inner.objects.entry(kind).or_default().remove(&format!("{namespace}/{name}")) else {
            return;
        };
        inner.version += 1;
        let version = inner.version;
        object["metadata"]["resourceVersion"] = json!(version.to_string());
        let event = json!({"type": "DELETED", "object": object});
        inner.log.entry(kind).or_default().push((version, format!("{event}\n")));
        drop(inner);
        self.shared.news.send_modify(|count| *count += 1);
    }

    /// Watches of this kind tell nothing until it is let go.
    pub fn holds(&self, kind: &'static str) {
        self.lock().held.insert(kind);
    }

    pub fn lets_go(&self, kind: &'static str) {
        self.lock().held.remove(kind);
        self.shared.news.send_modify(|count| *count += 1);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        lock(&self.shared)
    }
}

pub fn kubeconfig_of(dir: &Path) -> std::path::PathBuf {
    dir.join("kubeconfig")
}

fn lock(shared: &Shared) -> MutexGuard<'_, Inner> {
    shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
}

fn key(object: &Value) -> String {
    let text = |field: &str| object["metadata"][field].as_str().unwrap_or_default().to_owned();
    format!("{}/{}", text("namespace"), text("name"))
}

async fn answer(State(shared): State<Arc<Shared>>, uri: Uri) -> Response<Body> {
    let query = uri.query().unwrap_or_default();
    let Some(kind) = KINDS.into_iter().find(|kind| *kind == uri.path()) else {
        let status = json!({"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404, "message": "404 page not found"});
        let mut response = Response::new(Body::from(status.to_string()));
        *response.status_mut() = StatusCode::NOT_FOUND;
        return response;
    };
    // Of nodes an agent asks for its own.
    let selected = |object: &Value| {
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        !query.contains("fieldSelector") || query.contains(&name.replace('-', "%2D"))
    };
    if !query.contains("watch=1") {
        let inner = lock(&shared);
        let items: Vec<_> =
            inner.objects.get(kind).into_iter().flat_map(|all| all.values()).filter(|it| selected(it)).collect();
        let list = json!({"metadata": {"resourceVersion": inner.version.to_string()}, "items": items});
        return Response::new(Body::from(list.to_string()));
    }
    let asked = query.split('&').find_map(|part| part.strip_prefix("resourceVersion=")?.parse::<u64>().ok());
    let (pieces, stream) = mpsc::unbounded_channel::<Result<Bytes, io::Error>>();
    tokio::spawn(async move {
        let (mut at, mut news) = (asked.unwrap_or_default(), shared.news.subscribe());
        loop {
            let more: Vec<(u64, String)> = {
                news.borrow_and_update();
                let inner = lock(&shared);
                let log = inner.log.get(kind).filter(|_| !inner.held.contains(kind)).map_or(&[][..], Vec::as_slice);
                log.iter().filter(|(version, _)| *version > at).cloned().collect()
            };
            for (version, line) in more {
                at = version;
                if pieces.send(Ok(line.into())).is_err() {
                    return;
                }
            }
            tokio::select! {
                changed = news.changed() => if changed.is_err() { return },
                () = pieces.closed() => return,
            }
        }
    });
    Response::new(Body::from_stream(UnboundedReceiverStream::new(stream)))
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
            let Ok((stream, peer)) = self.tcp.accept().await else { continue };
            if let Ok(stream) = self.acceptor.accept(stream).await {
                return (stream, peer);
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}
