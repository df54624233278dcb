//! The settings of `marline ca serve`: the resource of kind CaServer. The files that it names are followed and read by `ca_lists`.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    ConfigErrors, Finding,
    document::Pair,
    fields::{Fields, Unknown},
    finding::{Origin, Report},
    single,
};
use crate::identity::TrustDomain;

/// What the CA service is told about itself. Changes take a restart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaServerConfig {
    pub trust_domain: TrustDomain,
    pub keeping: Keeping,
    pub listen: SocketAddr,
    /// The host names and addresses that clients call the service by.
    pub names: Vec<String>,
    /// Where metrics and readiness are served.
    pub status: SocketAddr,
    pub max_lifetime: Duration,
    /// What tokens must be meant for.
    pub audience: String,
    /// A file of kind CaTokens.
    pub tokens: Option<PathBuf>,
    pub kubernetes: Option<KubernetesReview>,
    pub limits: CaLimits,
}

/// Where the CA's key and all that the service must remember is kept, and who knows what runs on which node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Keeping {
    /// This machine's: of one service.
    Files(CaFiles),
    /// A cluster's API server's: of any number of services.
    Cluster(CaCluster),
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaFiles {
    /// A directory in Istio's `cacerts` layout.
    pub ca: PathBuf,
    /// What the service writes: the ledger of certificates, and which nodes are shut out.
    pub state: PathBuf,
    /// Where revocation lists are written.
    pub crl: PathBuf,
    /// A file of kind CaNodes.
    pub nodes: PathBuf,
}

/// Objects in a cluster, which the service makes if they are not there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaCluster {
    pub namespace: String,
    /// The Secret with the CA's key, in Istio's `cacerts` layout.
    pub secret: String,
    /// The ConfigMap in which agents find the roots.
    pub root_config_map: String,
    /// The API server, if it is not that of the cluster in which the service runs.
    pub server: Option<ApiServer>,
}

/// Callers' tokens are reviewed by an API server.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KubernetesReview {
    /// `NAMESPACE/NAME` of the service accounts of agents, which may ask on behalf of their node's workloads.
    pub agents: Vec<(String, String)>,
    /// The API server, if it is not that of the cluster in which the service runs.
    pub server: Option<ApiServer>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ApiServer {
    pub address: String,
    pub root_cert: PathBuf,
    pub token_file: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CaLimits {
    /// Requests that a node may make, on average.
    pub per_minute: u32,
    /// How many of them at once.
    pub burst: u32,
    pub connections: u32,
    pub handshake: Duration,
}

impl Default for CaLimits {
    fn default() -> Self {
        Self { per_minute: 600, burst: 2000, connections: 1024, handshake: Duration::from_secs(10) }
    }
}

/// Reads the settings in `file`; paths in it are relative to its directory.
pub fn load_ca_server(file: &Path) -> Result<(CaServerConfig, Vec<Finding>), ConfigErrors> {
    // Of a bare name it is empty, and nothing can be watched by that.
    let dir = file.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    single::read(file, "CaServer", |origin, document, report| read(dir, origin, document, report))
}

fn read(dir: &Path, origin: &Origin, document: &[Pair], report: &mut Report) -> Option<CaServerConfig> {
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata"]);
    if !top.has("spec") {
        top.error(report, "spec", "is missing", "write spec with ca.path, listen.names, authentication and nodes");
    }
    let spec = top.fields(report, "spec");
    top.finish(report, Unknown::Error);
    let mut spec = spec?;

    let trust_domain = match spec.text(report, "trustDomain").map(TrustDomain::parse) {
        None => Some(TrustDomain::default()),
        Some(Ok(trust_domain)) => Some(trust_domain),
        Some(Err(error)) => {
            spec.error(report, "trustDomain", error.to_string(), "write a name such as cluster.local");
            None
        }
    };
    let cluster = spec.has("cluster");
    let listen = read_listen(&mut spec, report);
    let status = match spec.fields(report, "status") {
        None => None,
        Some(mut fields) => {
            let address = fields.socket(report, "address");
            fields.finish(report, Unknown::Error);
            address
        }
    };
    let max_lifetime = match spec.fields(report, "certificates") {
        None => None,
        Some(mut fields) => {
            let longest = fields.duration(report, "maxLifetime", Duration::from_secs(2));
            fields.finish(report, Unknown::Error);
            longest
        }
    };
    let Authentication { audience, tokens, kubernetes } = read_authentication(dir, &mut spec, cluster, report);
    let keeping = match cluster {
        true => {
            let server = kubernetes.as_ref().and_then(|review| review.server.clone());
            read_cluster(&mut spec, server, report).map(Keeping::Cluster)
        }
        false => read_files(dir, &mut spec, report).map(Keeping::Files),
    };
    let limits = read_limits(&mut spec, report);
    spec.finish(report, Unknown::Error);

    let (listen, names) = listen?;
    Some(CaServerConfig {
        trust_domain: trust_domain?,
        keeping: keeping?,
        listen,
        names,
        status: status.unwrap_or((Ipv4Addr::UNSPECIFIED, 15014).into()),
        max_lifetime: max_lifetime.unwrap_or(Duration::from_secs(24 * 3_600)),
        audience,
        tokens,
        kubernetes,
        limits,
    })
}

fn read_files(dir: &Path, spec: &mut Fields<'_>, report: &mut Report) -> Option<CaFiles> {
    let ca = read_ca(dir, spec, report);
    let state = spec.required(report, "state", "write the directory for the ledger of certificates; it is kept");
    let nodes =
        spec.required(report, "nodes", "write the file of kind CaNodes: which service accounts run on which node");
    let (ca, crl) = ca?;
    Some(CaFiles {
        crl: crl.unwrap_or_else(|| ca.join("ca-crl.pem")),
        ca,
        state: dir.join(state?),
        nodes: dir.join(nodes?),
    })
}

fn read_cluster(spec: &mut Fields<'_>, server: Option<ApiServer>, report: &mut Report) -> Option<CaCluster> {
    for field in ["ca", "state", "nodes"] {
        if spec.has(field) {
            let hint =
                "leave it out: with spec.cluster the API server keeps the key and the ledger, and knows the pods";
            spec.error(report, field, "is not for a CA in a cluster", hint);
        }
    }
    spec.skip(&["ca", "state", "nodes"]);
    let mut cluster = spec.fields(report, "cluster")?;
    let errors = report.errors.len();
    let mut name = |field: &'static str, default: &str| {
        let name = cluster.text(report, field).unwrap_or(default).to_owned();
        let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
        if name.is_empty() || name.len() > 253 || !name.bytes().all(known) {
            cluster.error(
                report,
                field,
                format!("{name:?} is no object's name"),
                format!("write a name such as {default}"),
            );
        }
        name
    };
    let namespace = name("namespace", "marline-system");
    let secret = name("secret", "marline-ca");
    let root_config_map = name("rootConfigMap", "marline-root");
    cluster.finish(report, Unknown::Error);
    (report.errors.len() == errors).then_some(CaCluster { namespace, secret, root_config_map, server })
}

fn read_ca(dir: &Path, spec: &mut Fields<'_>, report: &mut Report) -> Option<(PathBuf, Option<PathBuf>)> {
    let hint = "write the directory that `marline ca init DIR` made, or one with Istio's cacerts files";
    if !spec.has("ca") {
        spec.error(report, "ca.path", "is missing", hint);
    }
    let mut ca = spec.fields(report, "ca")?;
    let path = ca.required(report, "path", hint).map(|path| dir.join(path));
    let crl = ca.text(report, "crl").map(|path| dir.join(path));
    ca.finish(report, Unknown::Error);
    Some((path?, crl))
}

fn read_listen(spec: &mut Fields<'_>, report: &mut Report) -> Option<(SocketAddr, Vec<String>)> {
    let hint = "write the host names and addresses by which clients call the service, as in [\"ca.example\"]";
    if !spec.has("listen") {
        spec.error(report, "listen.names", "is missing", hint);
    }
    let mut listen = spec.fields(report, "listen")?;
    let address = listen.socket(report, "address").unwrap_or((Ipv4Addr::UNSPECIFIED, 15012).into());
    let names: Vec<String> = listen.strings(report, "names").into_iter().map(str::to_owned).collect();
    let errors = report.errors.len();
    if names.is_empty() {
        listen.error(report, "names", "is missing or empty", hint);
    }
    for name in &names {
        let dns = rustls::pki_types::DnsName::try_from(name.as_str()).is_ok();
        if !dns && name.parse::<IpAddr>().is_err() {
            listen.error(report, "names", format!("{name:?} is neither a host name nor an IP address"), hint);
        }
    }
    listen.finish(report, Unknown::Error);
    (report.errors.len() == errors).then_some((address, names))
}

struct Authentication {
    audience: String,
    tokens: Option<PathBuf>,
    kubernetes: Option<KubernetesReview>,
}

/// In a cluster, its API server knows who asks, if nothing else is said.
fn read_authentication(dir: &Path, spec: &mut Fields<'_>, cluster: bool, report: &mut Report) -> Authentication {
    let hint = "write authentication.tokens (a file of kind CaTokens), or authentication.kubernetes, or both";
    let mut read = Authentication { audience: "marline-ca".to_owned(), tokens: None, kubernetes: None };
    let mut none = true;
    if let Some(mut fields) = spec.fields(report, "authentication") {
        if let Some(audience) = fields.text(report, "audience") {
            audience.clone_into(&mut read.audience);
        }
        read.tokens = fields.text(report, "tokens").map(|path| dir.join(path));
        read.kubernetes = fields.fields(report, "kubernetes").and_then(|fields| read_kubernetes(dir, fields, report));
        none = !fields.has("tokens") && !fields.has("kubernetes");
        fields.finish(report, Unknown::Error);
    }
    if none && cluster {
        read.kubernetes = Some(KubernetesReview { agents: vec![default_agent()], server: None });
    } else if none {
        spec.error(report, "authentication", "says no way in which callers prove who they are", hint);
    }
    read
}

fn read_kubernetes(dir: &Path, mut fields: Fields<'_>, report: &mut Report) -> Option<KubernetesReview> {
    let mut agents = Vec::new();
    for account in fields.strings(report, "agents") {
        match account.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                agents.push((namespace.to_owned(), name.to_owned()));
            }
            _ => {
                let message = format!("{account:?} is no service account");
                fields.error(report, "agents", message, "write NAMESPACE/NAME, as in marline-system/marline-agent");
            }
        }
    }
    if !fields.has("agents") {
        agents.push(default_agent());
    }
    let mut sound = true;
    let server = fields.fields(report, "server").and_then(|mut server| {
        let address = server.required(report, "address", "write https://HOST:PORT of the API server");
        if address.is_some_and(|address| !address.starts_with("https://")) {
            server.error(report, "address", "is no https:// address", "write https://HOST:PORT");
        }
        let root_cert = server.required(report, "rootCert", "write a PEM file with the API server's CA");
        let token = server.required(report, "tokenFile", "write a file with a token that may create TokenReviews");
        server.finish(report, Unknown::Error);
        sound = address.is_some() && root_cert.is_some() && token.is_some();
        Some(ApiServer { address: address?.to_owned(), root_cert: dir.join(root_cert?), token_file: dir.join(token?) })
    });
    fields.finish(report, Unknown::Error);
    sound.then_some(KubernetesReview { agents, server })
}

fn default_agent() -> (String, String) {
    ("marline-system".to_owned(), "marline-agent".to_owned())
}

fn read_limits(spec: &mut Fields<'_>, report: &mut Report) -> CaLimits {
    let defaults = CaLimits::default();
    let Some(mut fields) = spec.fields(report, "limits") else { return defaults };
    let (mut per_minute, mut burst) = (None, None);
    if let Some(mut node) = fields.fields(report, "perNode") {
        per_minute = node.count(report, "perMinute");
        burst = node.count(report, "burst");
        node.finish(report, Unknown::Error);
    }
    let connections = fields.count(report, "connections");
    let handshake = fields.duration(report, "handshake", Duration::from_millis(10));
    fields.finish(report, Unknown::Error);
    CaLimits {
        per_minute: per_minute.unwrap_or(defaults.per_minute),
        burst: burst.unwrap_or(defaults.burst),
        connections: connections.unwrap_or(defaults.connections),
        handshake: handshake.unwrap_or(defaults.handshake),
    }
}
