//! What the agent shows over HTTP: readiness, metrics, and on loopback what it knows and does now. It changes nothing.

use std::{io, net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    extract::{RawQuery, State},
    http::StatusCode,
    response::IntoResponse,
    routing::get,
};
use serde_json::Value;
use tokio::{net::TcpListener, task::JoinSet};

use crate::config::AgentConfig;

#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    #[error("{field}: cannot listen on {address}; choose another address or stop what holds it")]
    Listen { field: &'static str, address: SocketAddr, source: io::Error },
    #[error("serving {field}")]
    Serve { field: &'static str, source: io::Error },
}

/// What there is to be shown, as `app` gathers it from the rooms.
pub trait View: Send + Sync + 'static {
    /// Why the agent is not ready, if it is not.
    fn ready(&self) -> Result<(), String>;
    fn metrics(&self) -> String;
    fn pods(&self) -> Value;
    fn connections(&self) -> Value;
    fn workloads(&self) -> Value;
    fn certs(&self) -> Value;
    /// The chain that peers are shown for an identity, in PEM.
    fn chain(&self, id: &str) -> Option<String>;
}

type Shown = Arc<dyn View>;

/// Starts the three servers. Port 0 takes any free one; the log tells which.
pub async fn serve(agent: &AgentConfig, shown: &Shown) -> Result<JoinSet<Result<(), AdminError>>, AdminError> {
    let admin = Router::new()
        .route("/pods", get(async |State(shown): State<Shown>| Json(shown.pods())))
        .route("/connections", get(async |State(shown): State<Shown>| Json(shown.connections())))
        .route("/workloads", get(async |State(shown): State<Shown>| Json(shown.workloads())))
        .route("/certs", get(async |State(shown): State<Shown>| Json(shown.certs())))
        .route("/certs/chain", get(chain));
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
    match shown.ready() {
        Ok(()) => (StatusCode::OK, "ready\n".to_owned()),
        Err(why) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
    }
}

/// `?id=SPIFFE_ID`: nothing in one has to be escaped.
async fn chain(State(shown): State<Shown>, RawQuery(query): RawQuery) -> impl IntoResponse {
    let id = query.as_deref().and_then(|query| query.strip_prefix("id=")).unwrap_or_default();
    match shown.chain(id) {
        Some(pem) => (StatusCode::OK, pem),
        None => (StatusCode::NOT_FOUND, format!("no certificate is held for {id:?}; /certs lists them\n")),
    }
}

async fn render(State(shown): State<Shown>) -> impl IntoResponse {
    let content_type = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (content_type, shown.metrics())
}
