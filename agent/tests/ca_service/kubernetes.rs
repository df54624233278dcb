//! Callers by tokens of Kubernetes service accounts, with what a real API server has answered (`kubernetes/*.json`).

use std::{
    fs,
    net::SocketAddr,
    sync::{Arc, Mutex},
};

use axum::{
    Router,
    body::Bytes,
    extract::State,
    http::{HeaderMap, Method, StatusCode, Uri},
};
use marline::identity::{Ca, TrustDomain};
use rustls::ServerConfig;
use serde_json::Value;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Notify, Semaphore},
};
use tokio_rustls::{TlsAcceptor, server::TlsStream};
use tonic::Code;

use crate::bed::*;

const OWN_TOKEN: &str = "the-service's-own";
pub const SLEEP: &str = "spiffe://cluster.local/ns/foo/sa/sleep";

/// An API server that knows the recorded requests and answers them as it was recorded.
pub struct ApiServer {
    pub address: SocketAddr,
    pub state: Arc<ApiState>,
}

pub struct ApiState {
    /// What is answered to everything, if it is not what was recorded for it.
    instead: Mutex<Option<&'static str>>,
    /// One permit lets one answer out.
    pub gate: Semaphore,
    pub arrived: Notify,
}

fn recorded(name: &str) -> Value {
    let path = format!("{}/tests/ca_service/kubernetes/{name}.json", env!("CARGO_MANIFEST_DIR"));
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

/// The token that the recorded review is of.
pub fn pods_token() -> String {
    recorded("tokenreview-ok")["request"]["body"]["spec"]["token"].as_str().unwrap().to_owned()
}

impl ApiServer {
    /// Starts one whose files for clients are in the bed.
    pub async fn start(bed: &Bed) -> Self {
        let (listener, address) = TlsListener::start(bed).await;
        let state = Arc::new(ApiState {
            instead: Mutex::new(None),
            gate: Semaphore::new(Semaphore::MAX_PERMITS / 2),
            arrived: Notify::new(),
        });
        let router = Router::new().fallback(answer).with_state(Arc::clone(&state));
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { address, state }
    }

    /// The spec's part for it.
    pub fn authentication(&self, agents: &str, audience: &str) -> String {
        format!(
            "authentication: {{audience: {audience}, kubernetes: {{agents: [{agents}], server: {{address: \"https://{}\", rootCert: api/root-cert.pem, tokenFile: api-token}}}}}}",
            self.address
        )
    }

    fn answer_with(&self, name: &'static str) {
        *self.state.instead.lock().unwrap() = Some(name);
    }
}

async fn answer(
    State(state): State<Arc<ApiState>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> (StatusCode, [(&'static str, &'static str); 1], String) {
    state.arrived.notify_one();
    state.gate.acquire().await.unwrap().forget();
    let body: Value = serde_json::from_slice(&body).unwrap();
    assert_eq!((method, uri.path()), (Method::POST, "/apis/authentication.k8s.io/v1/tokenreviews"));
    let instead = *state.instead.lock().unwrap();
    let own = headers["authorization"] == format!("Bearer {OWN_TOKEN}");
    let names = match instead {
        Some(name) => vec![name],
        None if !own => vec!["401-bad-token"],
        None => vec!["tokenreview-ok", "tokenreview-garbage", "tokenreview-wrong-audience"],
    };
    let mut exchanges = names.into_iter().map(recorded);
    let found = match instead.is_some() || !own {
        true => exchanges.next(),
        false => exchanges.find(|exchange| {
            let request = &exchange["request"]["body"];
            ["apiVersion", "kind", "spec"].iter().all(|field| request[field] == body[field])
        }),
    };
    let response = &found.expect("a request that was not recorded")["response"];
    let status = StatusCode::from_u16(response["status"].as_u64().unwrap().try_into().unwrap()).unwrap();
    (status, [("content-type", "application/json")], response["body"].to_string())
}

/// HTTPS as an API server has it.
pub struct TlsListener {
    tcp: TcpListener,
    acceptor: TlsAcceptor,
}

impl TlsListener {
    /// Its root, and the token of those who may ask, are in the bed from then on.
    pub async fn start(bed: &Bed) -> (Self, SocketAddr) {
        Ca::init(&bed.path("api"), &TrustDomain::default()).unwrap();
        bed.write("api-token", OWN_TOKEN);
        let ca = Ca::open(&bed.path("api")).unwrap();
        let (key, _) = ca.issue_server(&["127.0.0.1".to_owned()], std::time::Duration::from_secs(3600)).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(rustls::sign::SingleCertAndKey::from(key)));
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        (Self { tcp, acceptor: TlsAcceptor::from(Arc::new(config)) }, address)
    }
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

    fn local_addr(&self) -> std::io::Result<Self::Addr> {
        self.tcp.local_addr()
    }
}

/// A service whose callers are reviewed by such a server.
pub async fn started(agents: &str, audience: &str) -> (Bed, ApiServer) {
    let mut bed = Bed::files("");
    let server = ApiServer::start(&bed).await;
    bed.configure("127.0.0.1:0", &server.authentication(agents, audience));
    bed.write("nodes.yaml", &NODES.replace("[shop/web, shop/db]", "[foo/sleep, shop/web]"));
    bed.run().await;
    (bed, server)
}

#[tokio::test]
async fn a_workload_gets_its_own_certificate_and_no_other() {
    let (bed, _server) = started("marline-system/marline", "marline-ca").await;
    let token = pods_token();
    let (_, csr) = new_csr(SLEEP);
    let mut client = bed.client().await;
    for impersonated in [None, Some(SLEEP)] {
        let chain = send(&mut client, &token, impersonated, &csr, 60).await.unwrap();
        let trust = Arc::into_inner(bed.ca().trust(&TrustDomain::default())).unwrap();
        assert_eq!(verified(trust, &chain).unwrap().to_string(), SLEEP);
        let line = bed.ledger().pop().unwrap();
        assert_eq!((&line["node"], &line["caller"]), (&"node-a".into(), &"system:serviceaccount:foo:sleep".into()));
    }
    // It runs on that node, and its pod is not its agent.
    refused(bed.ask(&token, WEB).await, Code::PermissionDenied, "foo/sleep may have its own certificate alone");
    let (_, named) = new_csr(WEB);
    let result = send(&mut client, &token, None, &named, 60).await;
    refused(result, Code::InvalidArgument, "it names spiffe://cluster.local/ns/shop/sa/web");
    assert!(!fs::read_to_string(bed.path("state/ledger.jsonl")).unwrap().contains(&token[..40]), "no secret is noted");
}

#[tokio::test]
async fn an_agents_pod_gets_those_of_its_node() {
    let (bed, _server) = started("foo/sleep", "marline-ca").await;
    let token = pods_token();
    assert!(bed.ask(&token, WEB).await.is_ok());
    refused(bed.ask(&token, API).await, Code::PermissionDenied, "node node-a runs no workload of shop/api");
    let (_, csr) = new_csr(WEB);
    let result = send(&mut bed.client().await, &token, None, &csr, 60).await;
    refused(result, Code::InvalidArgument, "ImpersonatedIdentity is missing");
}

#[tokio::test]
async fn what_the_api_server_does_not_take_is_refused_with_its_reason() {
    let (bed, _server) = started("foo/sleep", "marline-ca").await;
    refused(bed.ask("garbage", WEB).await, Code::Unauthenticated, "invalid bearer token");
    bed.noted("unauthenticated", "invalid bearer token");
    let (bed, _server) = started("foo/sleep", "someone-else").await;
    let result = bed.ask(&pods_token(), WEB).await;
    refused(result, Code::Unauthenticated, "is invalid for the target audiences");
}

#[tokio::test]
async fn an_api_server_that_cannot_be_asked_is_the_services_fault_and_not_the_callers() {
    let (bed, server) = started("foo/sleep", "marline-ca").await;
    let token = pods_token();
    for name in ["401-bad-token", "403-anonymous"] {
        server.answer_with(name);
        refused(bed.ask(&token, WEB).await, Code::Unavailable, "the API server could not be asked");
        bed.noted("unavailable", "could not be asked");
    }
    *server.state.instead.lock().unwrap() = None;
    assert!(bed.ask(&token, WEB).await.is_ok(), "and then it can");

    let mut away = Bed::files("");
    let server = ApiServer::start(&away).await;
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let extra =
        server.authentication("foo/sleep", "marline-ca").replace(&server.address.to_string(), &nobody.to_string());
    away.configure("127.0.0.1:0", &extra);
    away.run().await;
    refused(away.ask(&token, WEB).await, Code::Unavailable, "the API server could not be asked");
}

#[tokio::test]
async fn tokens_of_a_file_and_of_a_cluster_go_together() {
    let mut bed = Bed::files("");
    let server = ApiServer::start(&bed).await;
    let extra = server.authentication("foo/sleep", "marline-ca");
    bed.configure("127.0.0.1:0", &extra.replace("kubernetes:", "tokens: tokens.yaml, kubernetes:"));
    bed.run().await;
    assert!(bed.ask(TOKEN_B, API).await.is_ok());
    assert!(bed.ask(&pods_token(), WEB).await.is_ok());
    refused(bed.ask("garbage", WEB).await, Code::Unauthenticated, "invalid bearer token");
}

#[tokio::test]
async fn a_pod_that_asks_too_often_keeps_its_nodes_agent_from_nothing() {
    let mut bed = Bed::files("");
    let server = ApiServer::start(&bed).await;
    let extra = server.authentication("a/a", "marline-ca").replace("kubernetes:", "tokens: tokens.yaml, kubernetes:");
    bed.configure("127.0.0.1:0", &format!("{extra}\n  limits: {{perNode: {{perMinute: 1, burst: 2}}}}"));
    bed.run().await;
    for _ in 0..2 {
        assert!(bed.ask(&pods_token(), SLEEP).await.is_ok());
    }
    refused(bed.ask(&pods_token(), SLEEP).await, Code::ResourceExhausted, "foo/sleep on node node-a asks more often");
    assert!(bed.ask(TOKEN_A, WEB).await.is_ok());
}

#[tokio::test]
async fn an_address_whose_tokens_fail_over_and_over_asks_the_api_server_no_more() {
    let (bed, _server) = started("foo/sleep", "marline-ca").await;
    let (_, csr) = new_csr(WEB);
    let mut client = bed.client().await;
    for _ in 0..60 {
        let result = send(&mut client, "garbage", Some(WEB), &csr, 60).await;
        refused(result, Code::Unauthenticated, "invalid bearer token");
    }
    // One more a second counts.
    until("the address has used up its failures", async || {
        let status = send(&mut client, "garbage", Some(WEB), &csr, 60).await.unwrap_err();
        status.code() == Code::ResourceExhausted && status.message().contains("came from 127.0.0.1")
    })
    .await;
    let mut elsewhere = bed.client_from("127.0.0.2".parse().unwrap()).await;
    assert!(send(&mut elsewhere, &pods_token(), Some(WEB), &csr, 60).await.is_ok());
}

#[tokio::test]
async fn a_files_token_that_is_not_known_any_more_is_not_shown_to_the_api_server() {
    let (bed, server) = started("foo/sleep", "marline-ca").await;
    // Whatever comes to it is answered with this.
    server.answer_with("403-anonymous");
    refused(bed.ask("marline-0123456789", WEB).await, Code::Unauthenticated, "not known here");
}
