//! What the agent shows over HTTP: readiness, metrics, and on loopback what it knows and does now. It changes nothing.

use std::{io, net::SocketAddr, sync::Arc, sync::atomic::Ordering};

use axum::{Json, Router, extract::State, http::StatusCode, response::IntoResponse, routing::get};
use serde_json::{Value, json};
use tokio::{net::TcpListener, task::JoinSet};

use crate::{
    config::AgentConfig,
    metrics::{Metrics, Others},
    proxy::{PodState, PodStatus, Proxy, account::with_causes},
};

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("{field}: cannot listen on {address}; choose another address or stop what holds it")]
    Listen { field: &'static str, address: SocketAddr, source: io::Error },
    #[error("serving {field}")]
    Serve { field: &'static str, source: io::Error },
}

#[derive(Clone)]
struct Shown {
    proxy: Proxy,
    metrics: Arc<Metrics>,
}

/// Starts the three servers. Port 0 takes any free one; the log tells which.
pub async fn serve(
    agent: &AgentConfig,
    proxy: &Proxy,
    metrics: &Arc<Metrics>,
) -> Result<JoinSet<Result<(), AdminError>>, AdminError> {
    let shown = Shown { proxy: proxy.clone(), metrics: metrics.clone() };
    let admin = Router::new()
        .route("/pods", get(pods))
        .route("/connections", get(connections))
        .route("/workloads", get(workloads))
        .route("/certs", get(certs));
    let metrics = Router::new().route("/metrics", get(render));
    let readiness = Router::new().route("/readyz", get(readyz)).route("/livez", get(|| async { "alive\n" }));
    let mut servers = JoinSet::new();
    for (field, address, router) in [
        ("spec.admin.address", agent.admin, admin),
        ("spec.metrics.address", agent.metrics, metrics),
        ("spec.readiness.address", agent.readiness, readiness),
    ] {
        let listen = |source| AdminError::Listen { field, address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        tracing::info!(address = %listener.local_addr().map_err(listen)?, "{field}");
        let router = router.with_state(shown.clone());
        servers.spawn(async move {
            axum::serve(listener, router).await.map_err(|source| AdminError::Serve { field, source })
        });
    }
    Ok(servers)
}

async fn readyz(State(shown): State<Shown>) -> impl IntoResponse {
    match shown.proxy.ready() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

async fn render(State(shown): State<Shown>) -> impl IntoResponse {
    let ctx = shown.proxy.context();
    let capture = ctx.capture.counters().unwrap_or_else(|error| {
        tracing::error!("the kernel program's counters cannot be read: {}", with_causes(&error));
        Vec::new()
    });
    let pods = shown.proxy.pods();
    for (label, state) in [("ready", PodState::Ready), ("refused", PodState::Refused)] {
        let count = pods.iter().filter(|pod| pod.state == state).count();
        shown.metrics.pods.get_or_create(&[("state", label)]).set(i64::try_from(count).unwrap_or(i64::MAX));
    }
    let content_type = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    let others = Others {
        capture_events: &capture,
        map_entries: &ctx.capture.occupancy(),
        log_lines_dropped: ctx.log.dropped(),
    };
    (content_type, shown.metrics.render(&others))
}

async fn pods(State(shown): State<Shown>) -> Json<Vec<PodStatus>> {
    Json(shown.proxy.pods())
}

async fn certs(State(shown): State<Shown>) -> Json<Value> {
    Json(json!(shown.proxy.context().identities.list()))
}

async fn workloads(State(shown): State<Shown>) -> Json<Value> {
    let snapshot = shown.proxy.context().state.load();
    let workloads: Vec<_> = snapshot
        .workloads()
        .iter()
        .map(|workload| {
            json!({
                "namespace": workload.namespace, "name": workload.name, "identity": workload.id.to_string(),
                "addresses": workload.addresses, "in_mesh": workload.in_mesh,
            })
        })
        .collect();
    Json(
        json!({ "generation": snapshot.generation, "mode": snapshot.policies.authentication.mesh_mode(), "workloads": workloads }),
    )
}

async fn connections(State(shown): State<Shown>) -> Json<Vec<Value>> {
    let live = shown.proxy.context().connections.all();
    Json(
        live.iter()
            .map(|live| {
                json!({
                    "id": live.id,
                    "direction": live.direction,
                    "age_ms": u64::try_from(live.started.elapsed().as_millis()).unwrap_or(u64::MAX),
                    "bytes_sent": live.moved.sent.load(Ordering::Relaxed),
                    "bytes_received": live.moved.received.load(Ordering::Relaxed),
                    "facts": live.facts(),
                })
            })
            .collect(),
    )
}
