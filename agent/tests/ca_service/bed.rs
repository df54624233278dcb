//! A CA service with its files in a directory that is thrown away, and clients as agents are.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use aws_lc_rs::digest::{SHA256, digest};
use hyper_util::rt::TokioIo;
use marline::{
    ca::{self, Running},
    config::{self, CaFiles, CaServerConfig, Keeping},
    control::files::WatchSettings,
    identity::{
        Ca, SpiffeId, Trust, TrustDomain,
        wire::istio::{
            CertificateRequest, IMPERSONATED_IDENTITY, istio_certificate_service_client::IstioCertificateServiceClient,
        },
    },
    tls::{
        config::{Learned, peer_id},
        verifier::MeshClient,
    },
};
use prost_types::value::Kind;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, SanType};
use rustls::{
    ClientConfig, RootCertStore,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject as _},
    server::danger::ClientCertVerifier as _,
};
use serde_json::Value;
use tempfile::TempDir;
use tokio::net::TcpSocket;
use tokio_rustls::TlsConnector;
use tonic::{
    Code, Request, Status,
    transport::{Channel, Endpoint},
};
use x509_parser::prelude::{FromDer as _, X509Certificate};

pub type Client = IstioCertificateServiceClient<Channel>;

/// Tokens of the bed's two nodes. node-a runs shop/web and shop/db, node-b runs shop/api.
pub const TOKEN_A: &str = "token-of-node-a";
pub const TOKEN_B: &str = "token-of-node-b";
pub const WEB: &str = "spiffe://cluster.local/ns/shop/sa/web";
pub const DB: &str = "spiffe://cluster.local/ns/shop/sa/db";
pub const API: &str = "spiffe://cluster.local/ns/shop/sa/api";
const NAME: &str = "ca.test";
const LONG: Duration = Duration::from_secs(20);

pub const NODES: &str = "apiVersion: marline.io/v1alpha1
kind: CaNodes
spec:
  nodes:
    - {name: node-a, serviceAccounts: [shop/web, shop/db]}
    - {name: node-b, serviceAccounts: [shop/api]}
";

/// The files of a service, which may run.
pub struct Bed {
    pub dir: TempDir,
    pub running: Option<Running>,
}

impl Bed {
    /// Files alone. `extra` is more of the spec.
    pub fn files(extra: &str) -> Self {
        let bed = Self { dir: tempfile::tempdir().unwrap(), running: None };
        Ca::init(&bed.path("ca"), &TrustDomain::default()).unwrap();
        bed.write("tokens.yaml", &tokens(&[(TOKEN_A, "node-a", ""), (TOKEN_B, "node-b", "")]));
        bed.write("nodes.yaml", NODES);
        bed.configure("127.0.0.1:0", extra);
        bed
    }

    pub fn configure(&self, address: &str, extra: &str) {
        let authentication = match extra.contains("authentication:") {
            true => "",
            false => "authentication: {tokens: tokens.yaml}",
        };
        let text = format!(
            "apiVersion: marline.io/v1alpha1\nkind: CaServer\nspec:\n  ca: {{path: ca}}\n  listen: {{address: \"{address}\", names: [{NAME}, 127.0.0.1]}}\n  status: {{address: \"127.0.0.1:0\"}}\n  state: state\n  nodes: nodes.yaml\n  {authentication}\n  {extra}\n"
        );
        self.write("ca.yaml", &text);
    }

    pub async fn start(extra: &str) -> Self {
        let mut bed = Self::files(extra);
        bed.run().await;
        bed
    }

    pub async fn run(&mut self) {
        let (settings, warnings) =
            config::load_ca_server(&self.path("ca.yaml")).unwrap_or_else(|errors| panic!("{errors}"));
        assert!(warnings.is_empty());
        let watching = WatchSettings { quiet: Duration::from_millis(20), poll: Duration::from_millis(200) };
        self.running = Some(ca::start(settings, watching).await.unwrap());
    }

    /// The files that the settings name.
    pub fn kept(&self) -> CaFiles {
        kept(&config::load_ca_server(&self.path("ca.yaml")).unwrap().0)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Whole, as an editor that is careful does it.
    pub fn write(&self, name: &str, text: &str) {
        let beside = self.path("new");
        fs::write(&beside, text).unwrap();
        fs::rename(&beside, self.path(name)).unwrap();
    }

    pub fn address(&self) -> SocketAddr {
        self.running.as_ref().unwrap().address
    }

    pub fn ca(&self) -> Ca {
        Ca::open(&self.path("ca")).unwrap()
    }

    pub async fn client(&self) -> Client {
        self.client_from(Ipv4Addr::LOCALHOST.into()).await
    }

    pub async fn client_from(&self, from: IpAddr) -> Client {
        connect(self.address(), &self.path("ca/root-cert.pem"), from).await.unwrap()
    }

    /// One request over a connection of its own.
    pub async fn ask(&self, token: &str, id: &str) -> Result<Vec<String>, Status> {
        let (_, csr) = new_csr(id);
        send(&mut self.client().await, token, Some(id), &csr, 3600).await
    }

    pub fn ledger(&self) -> Vec<Value> {
        let text = fs::read_to_string(self.path("state/ledger.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    /// Also while it is being written.
    pub fn ledger_lines(&self) -> usize {
        fs::read(self.path("state/ledger.jsonl")).unwrap().iter().filter(|byte| **byte == b'\n').count()
    }

    /// The last line of the ledger is a refusal of this kind and reason.
    pub fn noted(&self, code: &str, reason: &str) -> Value {
        let last = self.ledger().pop().unwrap();
        assert_eq!((&last["outcome"], &last["code"]), (&"refused".into(), &code.into()), "{last}");
        assert!(last["reason"].as_str().unwrap().contains(reason), "{last} does not say {reason:?}");
        last
    }

    /// Waits until `count` readings of a followed file have had this result.
    pub async fn reloaded(&self, files: &str, result: &str, count: u64) {
        let line = format!("marline_ca_reloads_total{{files=\"{files}\",result=\"{result}\"}}");
        until(&format!("{line} {count}"), async || {
            let text = self.status("/metrics").await.1;
            let found = text.lines().find_map(|found| found.strip_prefix(&line)?.trim().parse::<u64>().ok());
            found.is_some_and(|found| found >= count)
        })
        .await;
    }

    pub async fn status(&self, path: &str) -> (u16, String) {
        let stream = tokio::net::TcpStream::connect(self.running.as_ref().unwrap().status).await.unwrap();
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        let request = hyper::Request::get(path).header("host", "x").body(String::new()).unwrap();
        let response = sender.send_request(request).await.unwrap();
        let status = response.status().as_u16();
        let body = http_body_util::BodyExt::collect(response.into_body()).await.unwrap().to_bytes();
        (status, String::from_utf8(body.to_vec()).unwrap())
    }
}

pub fn kept(settings: &CaServerConfig) -> CaFiles {
    match &settings.keeping {
        Keeping::Files(files) => files.clone(),
        Keeping::Cluster(_) => panic!("a cluster's"),
    }
}

/// A file of kind CaTokens: token, node, more fields.
pub fn tokens(entries: &[(&str, &str, &str)]) -> String {
    let mut text = "apiVersion: marline.io/v1alpha1\nkind: CaTokens\nspec:\n  tokens:\n".to_owned();
    for (token, node, more) in entries {
        let hash: String =
            digest(&SHA256, token.as_bytes()).as_ref().iter().map(|byte| format!("{byte:02x}")).collect();
        text.push_str(&format!("    - {{sha256: \"{hash}\", node: {node}{more}}}\n"));
    }
    text
}

/// A new P-256 key and a request for it.
pub fn new_csr(id: &str) -> (KeyPair, String) {
    let key = KeyPair::generate().unwrap();
    let csr = csr_for(&key, id);
    (key, csr)
}

/// As ztunnel makes it: a SAN and nothing else.
pub fn csr_for(key: &KeyPair, id: &str) -> String {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![SanType::URI(id.try_into().unwrap())];
    params.serialize_request(key).unwrap().pem().unwrap()
}

pub async fn connect(address: SocketAddr, root: &Path, from: IpAddr) -> Result<Client, tonic::transport::Error> {
    let mut roots = RootCertStore::empty();
    for der in CertificateDer::pem_file_iter(root).unwrap() {
        roots.add(der.unwrap()).unwrap();
    }
    let mut tls = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    tls.alpn_protocols = vec![b"h2".to_vec()];
    let connector = TlsConnector::from(Arc::new(tls));
    let service = tower::service_fn(move |_| {
        let connector = connector.clone();
        async move {
            let socket = TcpSocket::new_v4()?;
            socket.bind(SocketAddr::new(from, 0))?;
            let stream = socket.connect(address).await?;
            let stream = connector.connect(ServerName::try_from(NAME).unwrap(), stream).await?;
            Ok::<_, std::io::Error>(TokioIo::new(stream))
        }
    });
    let endpoint = Endpoint::from_static("http://ca.test").timeout(LONG);
    Ok(Client::new(endpoint.connect_with_connector(service).await?))
}

pub async fn send(
    client: &mut Client,
    token: &str,
    impersonated: Option<&str>,
    csr: &str,
    seconds: i64,
) -> Result<Vec<String>, Status> {
    let metadata = impersonated.map(|id| {
        let value = prost_types::Value { kind: Some(Kind::StringValue(id.to_owned())) };
        prost_types::Struct { fields: [(IMPERSONATED_IDENTITY.to_owned(), value)].into() }
    });
    let message = CertificateRequest { csr: csr.to_owned(), validity_duration: seconds, metadata };
    let mut request = Request::new(message);
    if !token.is_empty() {
        request.metadata_mut().insert("authorization", format!("Bearer {token}").parse().unwrap());
    }
    request.metadata_mut().insert("clusterid", "Kubernetes".parse().unwrap());
    client.create_certificate(request).await.map(|response| response.into_inner().cert_chain)
}

pub fn der(pem: &str) -> Vec<CertificateDer<'static>> {
    CertificateDer::pem_slice_iter(pem.as_bytes()).collect::<Result<_, _>>().unwrap()
}

/// Whether a server of the mesh takes the chain, as the workload that it names.
pub fn verified(trust: Trust, chain: &[String]) -> Result<SpiffeId, String> {
    let presented: Vec<_> = chain[..chain.len() - 1].iter().flat_map(|pem| der(pem)).collect();
    let (leaf, intermediates) = presented.split_first().unwrap();
    MeshClient::new(Arc::new(trust), Learned::default())
        .verify_client_cert(leaf, intermediates, UnixTime::now())
        .map_err(|error| error.to_string())?;
    peer_id(&presented).map_err(|error| format!("{error:?}"))
}

pub fn with_leaf<T>(chain: &[String], look: impl FnOnce(&X509Certificate<'_>) -> T) -> T {
    let leaf = der(&chain[0]);
    let (_, leaf) = X509Certificate::from_der(&leaf[0]).unwrap();
    look(&leaf)
}

pub fn not_after(chain: &[String]) -> SystemTime {
    let seconds = with_leaf(chain, |leaf| leaf.validity().not_after.timestamp());
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(seconds).unwrap())
}

pub fn serial(chain: &[String]) -> String {
    with_leaf(chain, |leaf| leaf.raw_serial().iter().map(|byte| format!("{byte:02X}")).collect())
}

#[track_caller]
pub fn refused<T: std::fmt::Debug>(result: Result<T, Status>, code: Code, text: &str) {
    let status = result.unwrap_err();
    assert_eq!(status.code(), code, "{status:?}");
    assert!(status.message().contains(text), "{:?} does not say {text:?}", status.message());
}

/// Waits until something is so.
pub async fn until(what: &str, mut is: impl AsyncFnMut() -> bool) {
    let start = Instant::now();
    while !is().await {
        assert!(start.elapsed() < LONG, "{what}: not within {LONG:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
