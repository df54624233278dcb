//! The agent's own settings: the resource of kind AgentConfig.

use std::{
    fmt,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use super::{
    document::Pair,
    fields::{Fields, Unknown},
    finding::{Origin, Report},
};
use crate::identity::{TrustDomain, TrustDomains, TrustFiles, remote::RemoteSettings};

/// What the agent is told about itself. Changes take a restart; `changed_fields` names them.
#[derive(Clone, PartialEq, Debug)]
pub struct AgentConfig {
    pub trust_domain: TrustDomain,
    /// Whom to believe beside the CA's own roots, by which names.
    pub trust: TrustFiles,
    pub tls: TlsConfig,
    pub ca: CaConfig,
    pub capture: CaptureConfig,
    pub records: RecordsConfig,
    pub pump: PumpMode,
    pub direct: DirectConfig,
    pub spares: SpareMode,
    pub admin: SocketAddr,
    pub metrics: SocketAddr,
    pub readiness: SocketAddr,
    pub access_log: AccessLogConfig,
    pub timeouts: Timeouts,
    /// Where resources come from, if not from the directory.
    pub kubernetes: Option<KubernetesConfig>,
}

/// The API server, in place of the directory's resources.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KubernetesConfig {
    /// The node that this agent is on. If it is left out, NODE_NAME of the environment says it.
    pub node_name: Option<String>,
    /// For development outside of a cluster; in one, the pod's service account.
    pub kubeconfig: Option<PathBuf>,
    /// The cgroup2 directory that has the kubelet and nobody else, if it is not where it usually is.
    pub kubelet_cgroup: Option<PathBuf>,
    pub cni: CniConfig,
}

/// How the agent is told of pods by its CNI plugin.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CniConfig {
    /// Where the plugin asks.
    pub socket: PathBuf,
    /// Where the agent keeps what it was told.
    pub records: PathBuf,
    /// The node's CNI configurations, where the agent is to say whether the plugin is in there.
    pub configurations: Option<PathBuf>,
}

impl Default for CniConfig {
    fn default() -> Self {
        Self { socket: "/run/marline/cni.sock".into(), records: "/run/marline/pods".into(), configurations: None }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaConfig {
    pub source: CaSource,
    pub leaf_lifetime: Duration,
}

/// Where workloads' certificates come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CaSource {
    /// The embedded CA: a directory in Istio's `cacerts` layout.
    Embedded(PathBuf),
    /// A CA elsewhere, by Istio's signing API, and its roots in PEM.
    Remote(RemoteSettings, PathBuf),
    /// The Unix socket of a SPIFFE Workload API.
    WorkloadApi(PathBuf),
}

/// For people.
impl fmt::Display for CaSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Embedded(directory) => write!(f, "the CA in {}", directory.display()),
            Self::Remote(remote, _) => write!(f, "the CA at https://{}", remote.address),
            Self::WorkloadApi(socket) => write!(f, "the Workload API at unix://{}", socket.display()),
        }
    }
}

/// How keys are agreed on.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct TlsConfig {
    /// Offer and accept nothing but post-quantum key exchange.
    pub pqc_only: bool,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CaptureConfig {
    /// The cgroup2 directory that holds the pods. The agent is outside, or alone in a cgroup below.
    pub cgroup: PathBuf,
    /// A directory in a BPF file system.
    pub pin_path: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct RecordsConfig {
    pub mode: RecordsMode,
    /// Refuse a connection whose records the kernel cannot encrypt, instead of encrypting them here.
    pub require_ktls: bool,
}

/// Who encrypts.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum RecordsMode {
    #[default]
    Auto,
    Kernel,
    Userspace,
}

/// Who moves the bytes.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum PumpMode {
    #[default]
    Auto,
    Splice,
    Copy,
}

/// Connections that applications hold themselves.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirectConfig {
    pub mode: DirectMode,
    /// The directory of the keeper's sockets, if it is not where the keeper itself would make it.
    pub keeper: Option<PathBuf>,
    /// How long a non-blocking connect() may be held for a handshake.
    pub hold: Duration,
    /// How many bytes, records included, one key of AES-GCM may seal, if it is to be less than the cipher allows.
    pub key_limit: Option<u64>,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum DirectMode {
    /// Where the kernel, the pod and the peer are up to it.
    #[default]
    Auto,
    Off,
}

/// Connections that are made before an application asks for one.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum SpareMode {
    /// To places that a pod connects to again and again.
    #[default]
    Auto,
    Off,
}

#[derive(Clone, PartialEq, Debug)]
pub struct AccessLogConfig {
    /// Standard output if there is none.
    pub path: Option<PathBuf>,
    pub format: AccessLogFormat,
    /// The share of connections that ended well which are logged; all others are.
    pub sample: f64,
    pub filter: AccessLogFilter,
}

/// What is logged at all. An empty list is no condition.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct AccessLogFilter {
    pub directions: Vec<&'static str>,
    pub verdicts: Vec<&'static str>,
    pub modes: Vec<&'static str>,
    pub paths: Vec<&'static str>,
    /// Of either end.
    pub namespaces: Vec<String>,
    /// Of either end: `NAME` or `NAMESPACE/NAME`.
    pub workloads: Vec<String>,
    /// These two do not hold back what was refused or failed.
    pub min_duration: Duration,
    pub min_bytes: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub enum AccessLogFormat {
    #[default]
    Json,
    Text,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    pub connect: Duration,
    pub handshake: Duration,
    /// How long a peer may leave sent bytes unacknowledged before it is taken for dead.
    pub dead_peer: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            handshake: Duration::from_secs(10),
            dead_peer: Duration::from_secs(60),
        }
    }
}

impl AgentConfig {
    /// The fields in which `other` differs, by their names in YAML.
    pub fn changed_fields(&self, other: &Self) -> Vec<&'static str> {
        let pairs = [
            ("spec.trustDomain", self.trust_domain == other.trust_domain),
            ("spec.trust", self.trust.is_like(&other.trust)),
            ("spec.tls", self.tls == other.tls),
            ("spec.ca", self.ca.source == other.ca.source),
            ("spec.ca.leafLifetime", self.ca.leaf_lifetime == other.ca.leaf_lifetime),
            ("spec.capture.cgroup", self.capture.cgroup == other.capture.cgroup),
            ("spec.capture.pinPath", self.capture.pin_path == other.capture.pin_path),
            ("spec.records", self.records == other.records),
            ("spec.pump", self.pump == other.pump),
            ("spec.direct", self.direct == other.direct),
            ("spec.spareConnections", self.spares == other.spares),
            ("spec.admin.address", self.admin == other.admin),
            ("spec.metrics.address", self.metrics == other.metrics),
            ("spec.readiness.address", self.readiness == other.readiness),
            ("spec.accessLog", self.access_log == other.access_log),
            ("spec.timeouts", self.timeouts == other.timeouts),
            ("spec.kubernetes", self.kubernetes == other.kubernetes),
        ];
        pairs.into_iter().filter(|(_, same)| !same).map(|(name, _)| name).collect()
    }
}

/// Reads the resource. Nothing comes back if a field that has no default is missing or wrong.
pub(super) fn read(dir: &Path, origin: &Origin, document: &[Pair], report: &mut Report) -> Option<AgentConfig> {
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata", "status"]);
    if !top.has("spec") {
        top.error(report, "spec", "is missing", "write spec with at least ca.path and capture.cgroup");
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
    let trust = read_trust(dir, trust_domain.as_ref(), &mut spec, report);
    let tls = read_tls(&mut spec, report);
    let ca = read_ca(dir, &mut spec, report);
    let capture = read_capture(&mut spec, report);
    let records = read_records(&mut spec, report);
    let pumps = [("auto", PumpMode::Auto), ("splice", PumpMode::Splice), ("copy", PumpMode::Copy)];
    let pump = spec.choice(report, "pump", &pumps).unwrap_or_default();
    let direct = read_direct(&mut spec, report);
    let modes = [("auto", SpareMode::Auto), ("off", SpareMode::Off)];
    let spares = spec.choice(report, "spareConnections", &modes).unwrap_or_default();
    let admin = read_address(&mut spec, report, "admin", (Ipv4Addr::LOCALHOST, 15000));
    if !admin.ip().to_canonical().is_loopback() {
        let message = format!("{admin} can be reached from other hosts, and whoever reaches it rules the agent");
        spec.error(report, "admin", message, "write a loopback address, as in 127.0.0.1:15000 or [::1]:15000");
    }
    let metrics = read_address(&mut spec, report, "metrics", (Ipv4Addr::UNSPECIFIED, 15020));
    let readiness = read_address(&mut spec, report, "readiness", (Ipv4Addr::UNSPECIFIED, 15021));
    for (name, address, others) in [
        ("metrics", metrics, vec![("admin", admin)]),
        ("readiness", readiness, vec![("admin", admin), ("metrics", metrics)]),
    ] {
        for (other, taken) in others.into_iter().filter(|(_, taken)| *taken == address && address.port() != 0) {
            spec.error(report, name, format!("{taken} is the address of {other} too"), "give each its own port");
        }
    }
    let access_log = read_access_log(&mut spec, report);
    let timeouts = read_timeouts(&mut spec, report);
    let kubernetes = read_kubernetes(dir, &mut spec, report);
    spec.finish(report, Unknown::Error);

    Some(AgentConfig {
        trust_domain: trust_domain?,
        trust,
        tls,
        ca: ca?,
        capture: capture?,
        records,
        pump,
        direct,
        spares,
        admin,
        metrics,
        readiness,
        access_log,
        timeouts,
        kubernetes,
    })
}

fn read_kubernetes(dir: &Path, spec: &mut Fields<'_>, report: &mut Report) -> Option<KubernetesConfig> {
    let mut fields = spec.fields(report, "kubernetes")?;
    let node_name = fields.text(report, "nodeName").filter(|name| !name.is_empty()).map(str::to_owned);
    let kubeconfig = fields.text(report, "kubeconfig").map(|path| dir.join(path));
    let kubelet_cgroup = fields.text(report, "kubeletCgroup").map(|path| dir.join(path));
    let cni = read_cni(dir, &mut fields, report);
    fields.finish(report, Unknown::Error);
    Some(KubernetesConfig { node_name, kubeconfig, kubelet_cgroup, cni })
}

fn read_cni(dir: &Path, kubernetes: &mut Fields<'_>, report: &mut Report) -> CniConfig {
    let default = CniConfig::default();
    let Some(mut fields) = kubernetes.fields(report, "cni") else { return default };
    let read = CniConfig {
        socket: fields.text(report, "socket").map_or(default.socket, |path| dir.join(path)),
        records: fields.text(report, "records").map_or(default.records, |path| dir.join(path)),
        configurations: fields.text(report, "confDir").map(|path| dir.join(path)),
    };
    fields.finish(report, Unknown::Error);
    read
}

fn read_trust(dir: &Path, own: Option<&TrustDomain>, spec: &mut Fields<'_>, report: &mut Report) -> TrustFiles {
    let own = own.cloned().unwrap_or_default();
    let Some(mut fields) = spec.fields(report, "trust") else {
        return TrustFiles { domains: own.into(), ..TrustFiles::default() };
    };
    let mut aliases: Vec<TrustDomain> = Vec::new();
    for text in fields.strings(report, "aliases") {
        match TrustDomain::parse(text) {
            Err(error) => fields.error(report, "aliases", error.to_string(), "write names such as old.example"),
            Ok(alias) if alias == own => {
                let message = format!("{alias} is the mesh's own trust domain (spec.trustDomain), and no alias of it");
                fields.error(report, "aliases", message, "remove it; an alias is another name");
            }
            Ok(alias) if aliases.contains(&alias) => {
                fields.error(report, "aliases", format!("{alias} is there twice"), "write it once");
            }
            Ok(alias) => aliases.push(alias),
        }
    }
    let mut federated: Vec<(TrustDomain, PathBuf)> = Vec::new();
    for mut item in fields.items(report, "federated").unwrap_or_default() {
        let domain = item.required(report, "trustDomain", "write the name of the other trust domain");
        let bundle = item.required(report, "bundle", "write a PEM file with the roots of that trust domain");
        match domain.map(TrustDomain::parse) {
            None => {}
            Some(Err(error)) => {
                item.error(report, "trustDomain", error.to_string(), "write a name such as other.example")
            }
            Some(Ok(domain)) if domain == own => {
                let message = format!("{domain} is the mesh's own trust domain: its roots are those in spec.ca.path");
                item.error(report, "trustDomain", message, "put more roots into root-cert.pem there");
            }
            Some(Ok(domain)) if domain == TrustDomain::default() => {
                let message =
                    format!("policies that name {domain} mean this mesh, whatever its name, in Istio as here");
                item.error(report, "trustDomain", message, "give the other mesh a trust domain of its own");
            }
            Some(Ok(domain)) if federated.iter().any(|(known, _)| *known == domain) => {
                let hint = "put all its roots into one file";
                item.error(report, "trustDomain", format!("{domain} has a bundle already"), hint);
            }
            Some(Ok(domain)) => federated.extend(bundle.map(|bundle| (domain, dir.join(bundle)))),
        }
        item.finish(report, Unknown::Error);
    }
    let crl = fields.text(report, "crl").map(|path| dir.join(path));
    fields.finish(report, Unknown::Error);
    TrustFiles { domains: TrustDomains::new(own, aliases), federated, crl }
}

fn read_tls(spec: &mut Fields<'_>, report: &mut Report) -> TlsConfig {
    let Some(mut fields) = spec.fields(report, "tls") else { return TlsConfig::default() };
    let pqc_only = fields.boolean(report, "pqcOnly").unwrap_or_default();
    fields.finish(report, Unknown::Error);
    TlsConfig { pqc_only }
}

fn read_ca(dir: &Path, spec: &mut Fields<'_>, report: &mut Report) -> Option<CaConfig> {
    let hint = "write the directory that `marline ca init DIR` made, or one with Istio's cacerts files; or address and rootCert \
                of a CA elsewhere, or workloadApi of SPIRE";
    if !spec.has("ca") {
        spec.error(report, "ca.path", "is missing", hint);
    }
    let mut ca = spec.fields(report, "ca")?;
    let sources = ["path", "address", "workloadApi"];
    let chosen: Vec<&str> = sources.into_iter().filter(|key| ca.has(key)).collect();
    let source = match chosen.as_slice() {
        ["address"] => read_remote(dir, &mut ca, report),
        ["workloadApi"] => read_workload_api(&mut ca, report),
        [] | ["path"] => ca.required(report, "path", hint).map(|path| CaSource::Embedded(dir.join(path))),
        [_, second, ..] => {
            let hint = "certificates come from one place: keep path, address or workloadApi";
            ca.error(report, second, format!("is there beside {}", chosen.first().unwrap_or(&"")), hint);
            ca.skip(&sources);
            None
        }
        _ => None,
    };
    let leaf_lifetime =
        ca.duration(report, "leafLifetime", Duration::from_secs(2)).unwrap_or(Duration::from_secs(24 * 3_600));
    ca.finish(report, Unknown::Error);
    Some(CaConfig { source: source?, leaf_lifetime })
}

fn read_remote(dir: &Path, ca: &mut Fields<'_>, report: &mut Report) -> Option<CaSource> {
    let hint = "write https://HOST:PORT, such as https://istiod.istio-system.svc:15012";
    let address = ca.required(report, "address", hint).and_then(|text| {
        let address = text.strip_prefix("https://").map(|rest| rest.strip_suffix('/').unwrap_or(rest));
        let good = address.filter(|rest| {
            rest.parse::<hyper::http::uri::Authority>()
                .is_ok_and(|authority| authority.port_u16().is_some() && !authority.as_str().contains('@'))
        });
        if good.is_none() {
            let message = if text.starts_with("http://") {
                format!("{text:?} is not encrypted")
            } else {
                format!("{text:?} is not an address of a CA")
            };
            ca.error(report, "address", message, hint);
        }
        good.map(str::to_owned)
    });
    let roots =
        ca.required(report, "rootCert", "write a PEM file with the roots that vouch for the CA and its certificates");
    let token = ca.required(report, "tokenFile", "write a file with the token that the CA knows this agent by");
    let server_name = ca.text(report, "serverName").map(str::to_owned);
    let cluster_id = ca.text(report, "clusterId").map(str::to_owned);
    let settings = RemoteSettings { address: address?, server_name, token: dir.join(token?), cluster_id };
    Some(CaSource::Remote(settings, dir.join(roots?)))
}

fn read_workload_api(ca: &mut Fields<'_>, report: &mut Report) -> Option<CaSource> {
    let hint = "write unix:///PATH of the socket of SPIRE's agent";
    let text = ca.required(report, "workloadApi", hint)?;
    let path = text.strip_prefix("unix:").map(|rest| rest.strip_prefix("//").unwrap_or(rest));
    match path.filter(|path| path.starts_with('/')) {
        Some(path) => Some(CaSource::WorkloadApi(path.into())),
        None => {
            ca.error(report, "workloadApi", format!("{text:?} is not the absolute path of a Unix socket"), hint);
            None
        }
    }
}

fn read_capture(spec: &mut Fields<'_>, report: &mut Report) -> Option<CaptureConfig> {
    let hint = "write the cgroup2 directory in which the pods run, such as /sys/fs/cgroup/kubepods.slice";
    if !spec.has("capture") {
        spec.error(report, "capture.cgroup", "is missing", hint);
    }
    let mut capture = spec.fields(report, "capture")?;
    let cgroup = capture.required(report, "cgroup", hint).and_then(|path| absolute(&capture, report, "cgroup", path));
    let pin_path = capture.text(report, "pinPath").unwrap_or("/sys/fs/bpf/marline");
    let pin_path = absolute(&capture, report, "pinPath", pin_path);
    capture.finish(report, Unknown::Error);
    Some(CaptureConfig { cgroup: cgroup?, pin_path: pin_path? })
}

/// Either the mode alone, or a mapping of `mode` and `requireKtls`.
fn read_records(spec: &mut Fields<'_>, report: &mut Report) -> RecordsConfig {
    let modes = [("auto", RecordsMode::Auto), ("kernel", RecordsMode::Kernel), ("userspace", RecordsMode::Userspace)];
    let Some(node) = spec.take("records") else { return RecordsConfig::default() };
    if !matches!(node.value, super::document::Value::Map(_)) {
        return RecordsConfig { mode: spec.choice(report, "records", &modes).unwrap_or_default(), require_ktls: false };
    }
    let Some(mut records) = spec.fields(report, "records") else { return RecordsConfig::default() };
    let mode = records.choice(report, "mode", &modes).unwrap_or_default();
    let require_ktls = records.boolean(report, "requireKtls").unwrap_or_default();
    if mode == RecordsMode::Userspace && require_ktls {
        let hint = "set mode to auto or kernel, or requireKtls to false";
        records.error(report, "requireKtls", "contradicts mode userspace: no connection could be made", hint);
    }
    records.finish(report, Unknown::Error);
    RecordsConfig { mode, require_ktls }
}

fn read_direct(spec: &mut Fields<'_>, report: &mut Report) -> DirectConfig {
    let defaults =
        DirectConfig { mode: DirectMode::default(), keeper: None, hold: Duration::from_millis(20), key_limit: None };
    let Some(mut fields) = spec.fields(report, "direct") else { return defaults };
    let modes = [("auto", DirectMode::Auto), ("off", DirectMode::Off)];
    let mode = fields.choice(report, "mode", &modes).unwrap_or_default();
    let keeper = fields.text(report, "keeper").and_then(|path| absolute(&fields, report, "keeper", path));
    let hold = fields.duration(report, "hold", Duration::from_millis(1)).unwrap_or(defaults.hold);
    let key_limit = fields.quantity(report, "keyLimit");
    fields.finish(report, Unknown::Error);
    DirectConfig { mode, keeper, hold, key_limit }
}

fn read_address(spec: &mut Fields<'_>, report: &mut Report, key: &'static str, default: (Ipv4Addr, u16)) -> SocketAddr {
    let Some(mut fields) = spec.fields(report, key) else { return default.into() };
    let address = fields.socket(report, "address").unwrap_or(default.into());
    fields.finish(report, Unknown::Error);
    address
}

fn read_access_log(spec: &mut Fields<'_>, report: &mut Report) -> AccessLogConfig {
    let mut read = AccessLogConfig {
        path: None,
        format: AccessLogFormat::default(),
        sample: 1.0,
        filter: AccessLogFilter::default(),
    };
    let Some(mut fields) = spec.fields(report, "accessLog") else { return read };
    read.path = match fields.text(report, "path") {
        None | Some("-") => None,
        Some(path) => absolute(&fields, report, "path", path),
    };
    let formats = [("json", AccessLogFormat::Json), ("text", AccessLogFormat::Text)];
    read.format = fields.choice(report, "format", &formats).unwrap_or_default();
    if let Some(text) = fields.text(report, "sample") {
        match parse_share(text) {
            Some(share) => read.sample = share,
            None => {
                let message = format!("{text:?} is not a share");
                fields.error(report, "sample", message, "write it from 0% to 100%, as in 10% or 0.5%");
            }
        }
    }
    if let Some(mut filter) = fields.fields(report, "filter") {
        read.filter = AccessLogFilter {
            directions: words(&mut filter, report, "directions", &["inbound", "outbound"]),
            verdicts: words(&mut filter, report, "verdicts", &["allowed", "refused"]),
            modes: words(&mut filter, report, "modes", &["mtls", "plaintext"]),
            paths: words(&mut filter, report, "paths", &["direct", "proxied"]),
            namespaces: filter.strings(report, "namespaces").into_iter().map(str::to_owned).collect(),
            workloads: filter.strings(report, "workloads").into_iter().map(str::to_owned).collect(),
            min_duration: filter.duration(report, "minDuration", Duration::ZERO).unwrap_or_default(),
            min_bytes: filter.quantity(report, "minBytes").unwrap_or_default(),
        };
        filter.finish(report, Unknown::Error);
    }
    fields.finish(report, Unknown::Error);
    read
}

/// Some of a few words.
fn words(fields: &mut Fields<'_>, report: &mut Report, key: &'static str, known: &[&'static str]) -> Vec<&'static str> {
    let mut found = Vec::new();
    for text in fields.strings(report, key) {
        match known.iter().find(|known| **known == text) {
            Some(known) => found.push(*known),
            None => {
                let hint = format!("write one of {}", known.join(", "));
                fields.error(report, key, format!("{text:?} is not known here"), hint);
            }
        }
    }
    found
}

/// `10%` is a tenth.
fn parse_share(text: &str) -> Option<f64> {
    let percent: f64 = text.strip_suffix('%')?.trim_end().parse().ok()?;
    (0.0..=100.0).contains(&percent).then_some(percent / 100.0)
}

fn read_timeouts(spec: &mut Fields<'_>, report: &mut Report) -> Timeouts {
    let defaults = Timeouts::default();
    let Some(mut fields) = spec.fields(report, "timeouts") else { return defaults };
    let least = Duration::from_millis(10);
    let timeouts = Timeouts {
        connect: fields.duration(report, "connect", least).unwrap_or(defaults.connect),
        handshake: fields.duration(report, "handshake", least).unwrap_or(defaults.handshake),
        dead_peer: fields.duration(report, "deadPeer", Duration::from_secs(1)).unwrap_or(defaults.dead_peer),
    };
    fields.finish(report, Unknown::Error);
    timeouts
}

fn absolute(fields: &Fields<'_>, report: &mut Report, key: &str, text: &str) -> Option<PathBuf> {
    let path = Path::new(text);
    if !path.is_absolute() {
        fields.error(report, key, format!("{text:?} is not an absolute path"), "write it from the root, with a /");
        return None;
    }
    Some(path.to_owned())
}
