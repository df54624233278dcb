//! An Envoy that is configured as Istio configures the sidecar of a pod: mTLS with SPIFFE IDs for the pod's own TCP server, and towards one
//! other. (istio/istio pilot/pkg/networking/core: `listener_inbound.go`, `cluster_tls.go`; the ALPN names are those of
//! pilot/pkg/networking/util/util.go: `ALPNInMeshWithMxc`, `ALPNDownstreamWithMxc`.) Sidecars that all of a pod's connections are redirected
//! to are `sidecar`, which is made of the same parts.

use std::{fs, net::SocketAddr, path::Path};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::{cluster::Pod, process::Process};

pub struct Envoy {
    pub process: Process,
}

/// A certificate chain and its key, in PEM, and the roots that others' are checked against.
#[derive(Clone, Copy, Debug)]
pub struct Identity<'a> {
    pub chain: &'a Path,
    pub key: &'a Path,
    pub roots: &'a Path,
}

/// What it does for its pod.
#[derive(Clone, Debug)]
pub struct Sidecar<'a> {
    pub identity: Identity<'a>,
    /// The pod's own server, and who may call it.
    pub application: SocketAddr,
    pub callers: &'a str,
    /// Another pod's server at both of its addresses, its port and host, and who must answer there.
    pub upstreams: [SocketAddr; 2],
    pub host: &'a str,
    pub answers: &'a str,
}

impl Envoy {
    /// Where the pod's server is called with mTLS.
    pub const INBOUND: u16 = 15006;
    /// Where the pod calls the other server in plaintext, by each of its addresses.
    pub const OUTBOUND: [u16; 2] = [15001, 15002];

    /// `program` is where xtask has put it: Debian has none.
    pub fn start(program: &Path, pod: &Pod, sidecar: &Sidecar<'_>) -> Result<Self> {
        let file = pod.directory.join("envoy.json");
        let text = serde_json::to_vec_pretty(&configuration(sidecar))?;
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        let mut command = pod.command(program);
        command.args(["--disable-hot-restart", "--concurrency", "1", "--log-level", "warning", "-c"]).arg(&file);
        let mut process = pod.serve("envoy", &mut command, Self::INBOUND)?;
        for port in Self::OUTBOUND {
            process.listens(&pod.place.netns, port)?;
        }
        Ok(Self { process })
    }
}

fn configuration(sidecar: &Sidecar<'_>) -> Value {
    let mut clusters = vec![cluster("inbound", sidecar.application, None)];
    let mut listeners = vec![inbound(sidecar)];
    for (number, (upstream, port)) in sidecar.upstreams.into_iter().zip(Envoy::OUTBOUND).enumerate() {
        let name = format!("outbound-{number}");
        clusters.push(cluster(&name, upstream, Some(sidecar)));
        let chain = json!([{ "filters": [tcp_proxy(&name)] }]);
        listeners
            .push(json!({ "name": name, "address": address(([127, 0, 0, 1], port).into()), "filter_chains": chain }));
    }
    json!({ "static_resources": { "listeners": listeners, "clusters": clusters } })
}

/// Only what offers the mesh's own protocols is taken, as under STRICT.
fn inbound(sidecar: &Sidecar<'_>) -> Value {
    json!({
        "name": "virtualInbound",
        "address": { "socket_address": { "address": "::", "port_value": Envoy::INBOUND, "ipv4_compat": true } },
        "listener_filters": [{
            "name": "envoy.filters.listener.tls_inspector",
            "typed_config": typed("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"),
        }],
        "filter_chains": [{
            "filter_chain_match": { "transport_protocol": "tls", "application_protocols": ["istio-peer-exchange", "istio"] },
            "transport_socket": {
                "name": "envoy.transport_sockets.tls",
                "typed_config": {
                    "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext",
                    "require_client_certificate": true,
                    "common_tls_context": tls(sidecar.identity, sidecar.callers, &["istio-peer-exchange", "h2", "http/1.1"]),
                },
            },
            "filters": [tcp_proxy("inbound")],
        }],
    })
}

fn cluster(name: &str, to: SocketAddr, mtls: Option<&Sidecar<'_>>) -> Value {
    let endpoint = json!({ "endpoint": { "address": address(to) } });
    let mut cluster = json!({
        "name": name,
        "type": "STATIC",
        "connect_timeout": "10s",
        "load_assignment": { "cluster_name": name, "endpoints": [{ "lb_endpoints": [endpoint] }] },
    });
    if let (Some(sidecar), Some(cluster)) = (mtls, cluster.as_object_mut()) {
        let context = json!({
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": format!("outbound_.{}_._.{}", to.port(), sidecar.host),
            "common_tls_context": tls(sidecar.identity, sidecar.answers, &["istio-peer-exchange", "istio"]),
        });
        let socket = json!({ "name": "envoy.transport_sockets.tls", "typed_config": context });
        cluster.insert("transport_socket".to_owned(), socket);
    }
    cluster
}

pub(crate) fn tls(identity: Identity<'_>, peer: &str, protocols: &[&str]) -> Value {
    json!({
        "tls_params": { "tls_minimum_protocol_version": "TLSv1_2", "tls_maximum_protocol_version": "TLSv1_3" },
        "alpn_protocols": protocols,
        "tls_certificates": [{
            "certificate_chain": { "filename": identity.chain },
            "private_key": { "filename": identity.key },
        }],
        "validation_context": {
            "trusted_ca": { "filename": identity.roots },
            "match_typed_subject_alt_names": [{ "san_type": "URI", "matcher": { "exact": peer } }],
        },
    })
}

pub(crate) fn tcp_proxy(cluster: &str) -> Value {
    json!({
        "name": "envoy.filters.network.tcp_proxy",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            "stat_prefix": cluster,
            "cluster": cluster,
        },
    })
}

pub(crate) fn address(of: SocketAddr) -> Value {
    json!({ "socket_address": { "address": of.ip().to_string(), "port_value": of.port() } })
}

pub(crate) fn typed(name: &str) -> Value {
    json!({ "@type": format!("type.googleapis.com/{name}") })
}

/// The same with fields.
pub(crate) fn typed_with(name: &str, mut fields: Value) -> Value {
    if let Some(fields) = fields.as_object_mut() {
        fields.insert("@type".to_owned(), format!("type.googleapis.com/{name}").into());
    }
    fields
}
