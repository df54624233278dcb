//! The sidecars' configuration, as Istio's control plane would write it: a listener that all of the pod's connections are redirected to, which
//! hands them by their original destination to the listener of the service; and one that all connections to the pod are redirected to.
//!
//! (istio/istio pilot/pkg/networking/core: `listener.go`, `listener_inbound.go`, `cluster_tls.go`, `httproute.go`.) Istio's own build of Envoy
//! has filters that a stock one lacks (`istio.metadata_exchange`, `istio.stats`, `istio.alpn`): they are left out, and what they cost.
//! Whom a sidecar talks to is checked by its certificate: at the client as Istio does, at the server in place of an AuthorizationPolicy.

use std::net::SocketAddr;

use serde_json::{Value, json};

use super::{ADMIN, INBOUND, Layer, OUTBOUND};
use crate::{
    certificates::Files,
    traffic::envoy::{Identity, address, tcp_proxy, tls, typed, typed_with},
};

/// Names in Envoy's statistics.
pub(super) const LISTENER_OUT: &str = "outbound";
pub(super) const LISTENER_IN: &str = "virtualInbound";
pub(super) const CLUSTER_OUT: &str = "outbound_service";
pub(super) const CLUSTER_IN: &str = "inbound_application";
/// Takes what belongs to no service, and ends it: Istio's REGISTRY_ONLY.
const BLACK_HOLE: &str = "BlackHoleCluster";

/// What the sidecars are told: the client's who must answer, the server's who may call.
pub(super) struct Told<'a> {
    pub layer: Layer,
    pub own: &'a Files,
    /// The identity at the other end.
    pub peer: &'a str,
    /// The service: the server pod's address and port.
    pub service: SocketAddr,
    pub host: &'a str,
}

/// Of the client's sidecar.
pub(super) fn client(told: &Told<'_>) -> Value {
    let filter = match told.layer {
        Layer::Tcp => tcp_proxy(CLUSTER_OUT),
        Layer::Http => http(CLUSTER_OUT, &route(CLUSTER_OUT, true), json!({})),
    };
    let protocols: &[&str] = match told.layer {
        Layer::Tcp => &["istio-peer-exchange", "istio"],
        Layer::Http => &["istio-http/1.1", "istio", "http/1.1"],
    };
    let listeners = json!([
        {
            "name": "virtualOutbound",
            "stat_prefix": "virtualOutbound",
            "address": address(([0, 0, 0, 0], OUTBOUND).into()),
            "use_original_dst": true,
            "filter_chains": [{ "filters": [tcp_proxy(BLACK_HOLE)] }],
        },
        {
            "name": "service",
            "stat_prefix": LISTENER_OUT,
            "address": address(told.service),
            "bind_to_port": false,
            "traffic_direction": "OUTBOUND",
            "filter_chains": [{ "filters": [filter] }],
        },
    ]);
    let endpoint = json!({ "endpoint": { "address": address(told.service) } });
    let service = json!({
        "name": CLUSTER_OUT,
        "type": "STATIC",
        "connect_timeout": "10s",
        "lb_policy": "LEAST_REQUEST",
        "circuit_breakers": unlimited(),
        "load_assignment": { "cluster_name": CLUSTER_OUT, "endpoints": [{ "lb_endpoints": [endpoint] }] },
        "transport_socket": {
            "name": "envoy.transport_sockets.tls",
            "typed_config": typed_with("envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext", json!({
                "sni": format!("outbound_.{}_._.{}", told.service.port(), told.host),
                "common_tls_context": tls(told.identity(), told.peer, protocols),
            })),
        },
    });
    let black_hole = json!({ "name": BLACK_HOLE, "type": "STATIC", "connect_timeout": "10s" });
    whole(&listeners, &json!([service, black_hole]))
}

/// Of the server's sidecar.
pub(super) fn server(told: &Told<'_>) -> Value {
    let (filter, offered, chosen): (_, &[&str], &[&str]) = match told.layer {
        Layer::Tcp => {
            (tcp_proxy(CLUSTER_IN), &["istio-peer-exchange", "istio"], &["istio-peer-exchange", "h2", "http/1.1"])
        }
        Layer::Http => {
            let forwarded = json!({
                "forward_client_cert_details": "APPEND_FORWARD",
                "set_current_client_cert_details": { "subject": true, "dns": true, "uri": true },
                "server_name": "istio-envoy",
            });
            let offered = &["istio", "istio-http/1.0", "istio-http/1.1", "istio-h2"];
            (http(CLUSTER_IN, &route(CLUSTER_IN, false), forwarded), offered, &["h2", "http/1.1"])
        }
    };
    let listeners = json!([{
        "name": LISTENER_IN,
        "stat_prefix": LISTENER_IN,
        "address": address(([0, 0, 0, 0], INBOUND).into()),
        "traffic_direction": "INBOUND",
        "listener_filters": [
            {
                "name": "envoy.filters.listener.original_dst",
                "typed_config": typed("envoy.extensions.filters.listener.original_dst.v3.OriginalDst"),
            },
            {
                "name": "envoy.filters.listener.tls_inspector",
                "typed_config": typed("envoy.extensions.filters.listener.tls_inspector.v3.TlsInspector"),
            },
        ],
        "listener_filters_timeout": "0s",
        // No other chain: under STRICT there is none for plaintext, and here is none for other ports either.
        "filter_chains": [{
            "filter_chain_match": {
                "destination_port": told.service.port(),
                "transport_protocol": "tls",
                "application_protocols": offered,
            },
            "transport_socket": {
                "name": "envoy.transport_sockets.tls",
                "typed_config": typed_with("envoy.extensions.transport_sockets.tls.v3.DownstreamTlsContext", json!({
                    "require_client_certificate": true,
                    "common_tls_context": tls(told.identity(), told.peer, chosen),
                })),
            },
            "filters": [filter],
        }],
    }]);
    let application = json!({
        "name": CLUSTER_IN,
        "type": "ORIGINAL_DST",
        "lb_policy": "CLUSTER_PROVIDED",
        "connect_timeout": "10s",
        "cleanup_interval": "60s",
        "circuit_breakers": unlimited(),
        "upstream_bind_config": { "source_address": { "address": "127.0.0.6", "port_value": 0 } },
    });
    whole(&listeners, &json!([application]))
}

impl Told<'_> {
    fn identity(&self) -> Identity<'_> {
        Identity { chain: &self.own.chain, key: &self.own.key, roots: &self.own.roots }
    }
}

fn whole(listeners: &Value, clusters: &Value) -> Value {
    json!({
        "admin": { "address": address(([127, 0, 0, 1], ADMIN).into()) },
        "static_resources": { "listeners": listeners, "clusters": clusters },
    })
}

/// Istio lifts Envoy's limits, of which the one on connections is 1024.
fn unlimited() -> Value {
    json!({ "thresholds": [{
        "max_connections": u32::MAX,
        "max_pending_requests": u32::MAX,
        "max_requests": u32::MAX,
        "max_retries": u32::MAX,
    }] })
}

/// All requests to one cluster. Retries are the client's sidecar's matter; these are Istio's.
fn route(cluster: &str, retries: bool) -> Value {
    let mut action =
        json!({ "cluster": cluster, "timeout": "0s", "max_stream_duration": { "max_stream_duration": "0s" } });
    if let Some(fields) = action.as_object_mut().filter(|_| retries) {
        let policy = json!({
            "retry_on": "connect-failure,refused-stream,unavailable,cancelled,retriable-status-codes",
            "num_retries": 2,
            "host_selection_retry_max_attempts": "5",
            "retriable_status_codes": [503],
        });
        fields.insert("retry_policy".to_owned(), policy);
    }
    json!({
        "name": cluster,
        "validate_clusters": false,
        "virtual_hosts": [{
            "name": cluster,
            "domains": ["*"],
            "routes": [{ "match": { "prefix": "/" }, "route": action }],
        }],
    })
}

/// The filters that Istio has for each HTTP port, but for its own.
fn http(name: &str, routes: &Value, more: Value) -> Value {
    let filter = |name: &str, kind: &str| json!({ "name": name, "typed_config": typed(&format!("envoy.extensions.filters.http.{kind}")) });
    let mut manager = json!({
        "stat_prefix": name,
        "codec_type": "AUTO",
        "route_config": routes,
        "http_filters": [
            filter("envoy.filters.http.grpc_stats", "grpc_stats.v3.FilterConfig"),
            filter("envoy.filters.http.fault", "fault.v3.HTTPFault"),
            filter("envoy.filters.http.cors", "cors.v3.Cors"),
            filter("envoy.filters.http.router", "router.v3.Router"),
        ],
        "use_remote_address": false,
        "normalize_path": true,
        "stream_idle_timeout": "0s",
        "upgrade_configs": [{ "upgrade_type": "websocket" }],
    });
    if let (Some(fields), Value::Object(more)) = (manager.as_object_mut(), more) {
        fields.extend(more);
    }
    let kind = "envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager";
    json!({ "name": "envoy.filters.network.http_connection_manager", "typed_config": typed_with(kind, manager) })
}
