//! What the agent shows over HTTP: readiness, metrics, and on loopback what it knows and does now. It changes nothing.

pub mod status;

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

use crate::{config::AgentConfig, state::explain::Question};

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
    /// The last that have ended.
    fn ended(&self) -> Value;
    fn status(&self) -> Value;
    /// What becomes of a connection, by what is in force now, or what is wrong with the question.
    fn explain(&self, question: Question<'_>) -> Result<Value, String>;
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
        .route("/connections/ended", get(async |State(shown): State<Shown>| Json(shown.ended())))
        .route("/status", get(async |State(shown): State<Shown>| Json(shown.status())))
        .route("/explain", get(explain))
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

/// `?source=WHO&destination=WHO:PORT`, and `&plaintext` for a source that speaks plaintext although it is in the mesh.
async fn explain(State(shown): State<Shown>, RawQuery(query): RawQuery) -> impl IntoResponse {
    let query = query.unwrap_or_default();
    let field = |name: &str| query.split('&').find_map(|part| part.strip_prefix(name)?.strip_prefix('='));
    let (Some(source), Some(destination)) = (field("source"), field("destination")) else {
        return (StatusCode::BAD_REQUEST, Json(Value::from("write ?source=NAMESPACE/NAME&destination=NAME:PORT")));
    };
    let plaintext = query.split('&').any(|part| part == "plaintext");
    match shown.explain(Question { source, destination, plaintext, strangers: true }) {
        Ok(answer) => (StatusCode::OK, Json(answer)),
        Err(what) => (StatusCode::NOT_FOUND, Json(Value::from(what))),
    }
}

async fn render(State(shown): State<Shown>) -> impl IntoResponse {
    let content_type = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    (content_type, shown.metrics())
}
