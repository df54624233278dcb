//! What the agent shows over HTTP: readiness, metrics, and on loopback what it knows and does now. All that can be changed is what is
//! logged.

pub mod status;

use std::{io, net::SocketAddr, sync::Arc};

use axum::{
    Json, Router,
    extract::{RawQuery, Request, State},
    http::{StatusCode, header::ALLOW},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::{MethodRouter, get},
};
use serde_json::Value;
use tokio::{
    net::TcpListener,
    task::{JoinSet, spawn_blocking},
};

mod bounded;
mod guard;
mod query;

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
    fn services(&self) -> Value;
    fn policies(&self) -> Value;
    fn certs(&self) -> Value;
    /// The chain that peers are shown for an identity, in PEM.
    fn chain(&self, id: &str) -> Option<String>;
    /// All that is in force.
    fn config_dump(&self) -> Value;
    /// The process as it runs: tasks, memory, descriptors.
    fn runtime(&self) -> Value;
    /// What is logged now.
    fn logging(&self) -> Result<String, String>;
    /// Adds levels, or takes back what was added where none are given. An error names what is wrong with them.
    fn set_logging(&self, levels: Option<&str>) -> Result<String, String>;
}

type Shown = Arc<dyn View>;

/// What the admin address has: path, and what it shows.
const ENDPOINTS: [(&str, &str); 14] = [
    ("/status", "how this node is, part by part; `marline status` judges it"),
    ("/pods", "the pods of this node, and why those that are refused are"),
    ("/connections", "the connections that are open now"),
    ("/connections/ended", "the last that have ended, and how"),
    (
        "/explain?source=WHO&destination=WHO:PORT",
        "what becomes of a connection by what is in force; &plaintext for a source that speaks it",
    ),
    ("/workloads", "the workloads of the mesh"),
    ("/services", "the services, and the endpoints behind them"),
    ("/policies", "the policies in force, the workloads that they select, and warnings"),
    ("/certs", "the certificates of this node's workloads; never a key"),
    ("/certs/chain?id=SPIFFE_ID", "the chain of one, in PEM"),
    ("/config_dump", "all that is in force, and the files and lines where it was read"),
    (
        "/logging",
        "what is logged; POST /logging?level=LEVEL or ?level=TARGET=LEVEL,... adds to it, POST /logging?reset takes it back",
    ),
    ("/debug/runtime", "tasks, threads, memory and descriptors of the agent"),
    ("/help", "this list"),
];

/// Starts the three servers. Port 0 takes any free one; the log tells which.
pub async fn serve(agent: &AgentConfig, shown: &Shown) -> Result<JoinSet<Result<(), AdminError>>, AdminError> {
    let expositions = bounded::Expositions::default();
    let render = move |State(shown): State<Shown>| {
        let expositions = expositions.clone();
        async move { expositions.answer(move || shown.metrics()).await }
    };
    let metrics = Router::new().route("/metrics", get(render));
    let readiness = Router::new().route("/readyz", get(readyz)).route("/livez", get(|| async { "alive\n" }));
    let mut servers = JoinSet::new();
    for (field, address, router) in [
        ("spec.admin.address", agent.admin, admin()),
        ("spec.metrics.address", agent.metrics, metrics),
        ("spec.readiness.address", agent.readiness, readiness),
    ] {
        let listen = |source| AdminError::Listen { field, address, source };
        let listener = TcpListener::bind(address).await.map_err(listen)?;
        tracing::info!(address = %listener.local_addr().map_err(listen)?, "{field}");
        let router = router.with_state(shown.clone());
        // Loopback's alone is asked by this machine alone.
        let bounded = field != "spec.admin.address";
        servers.spawn(async move {
            let served =
                if bounded { bounded::serve(listener, router).await } else { axum::serve(listener, router).await };
            served.map_err(|source| AdminError::Serve { field, source })
        });
    }
    Ok(servers)
}

fn admin() -> Router<Shown> {
    Router::new()
        .route("/", get(async || help()))
        .route("/help", get(async || help()))
        .route("/pods", json(|shown| shown.pods()))
        .route("/status", json(|shown| shown.status()))
        .route("/connections", json(|shown| shown.connections()))
        .route("/connections/ended", json(|shown| shown.ended()))
        .route("/explain", get(explain))
        .route("/workloads", json(|shown| shown.workloads()))
        .route("/services", json(|shown| shown.services()))
        .route("/policies", json(|shown| shown.policies()))
        .route("/certs", json(|shown| shown.certs()))
        .route("/certs/chain", get(chain))
        .route("/config_dump", json(|shown| shown.config_dump()))
        .route("/debug/runtime", json(|shown| shown.runtime()))
        .route("/logging", get(logging).post(set_logging).put(set_logging))
        .fallback(async || (StatusCode::NOT_FOUND, format!("there is no such page\n\n{}", help())))
        .layer(middleware::from_fn(only_from_here))
}

fn help() -> String {
    let width = ENDPOINTS.iter().map(|(path, _)| path.len()).max().unwrap_or_default();
    ENDPOINTS.iter().map(|(path, what)| format!("{path:<width$}  {what}\n")).collect()
}

/// A large mesh takes a moment to be written down: not on a thread that moves bytes.
fn json(show: fn(&dyn View) -> Value) -> MethodRouter<Shown> {
    get(async move |State(shown): State<Shown>| match spawn_blocking(move || show(&*shown)).await {
        Ok(value) => Json(value).into_response(),
        Err(error) => gone(&error),
    })
}

fn gone(error: &tokio::task::JoinError) -> Response {
    tracing::error!(%error, "what was asked for could not be shown");
    (StatusCode::INTERNAL_SERVER_ERROR, "it could not be shown; the agent's log says why\n").into_response()
}

/// The address is loopback's, but a browser on this machine can be made to ask it by any page of the web.
async fn only_from_here(request: Request, next: Next) -> Response {
    match guard::check(request.method(), request.headers(), request.uri()) {
        Ok(()) => next.run(request).await,
        Err(why) => (StatusCode::FORBIDDEN, format!("{why}\n")).into_response(),
    }
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

async fn logging(State(shown): State<Shown>, RawQuery(query): RawQuery) -> Response {
    if query.is_some() {
        let text =
            "levels are changed by POST or PUT, as in curl -X POST 'http://127.0.0.1:15000/logging?level=debug'\n";
        return (StatusCode::METHOD_NOT_ALLOWED, [(ALLOW, "POST, PUT")], text).into_response();
    }
    told(shown.logging(), StatusCode::INTERNAL_SERVER_ERROR)
}

async fn set_logging(State(shown): State<Shown>, RawQuery(query): RawQuery) -> Response {
    match query::logging(query.as_deref().unwrap_or_default()) {
        Ok(query::Logging::Show) => told(shown.logging(), StatusCode::INTERNAL_SERVER_ERROR),
        Ok(query::Logging::Reset) => told(shown.set_logging(None), StatusCode::INTERNAL_SERVER_ERROR),
        Ok(query::Logging::Add(levels)) => told(shown.set_logging(Some(&levels)), StatusCode::BAD_REQUEST),
        Err(why) => (StatusCode::BAD_REQUEST, format!("{why}\n")).into_response(),
    }
}

fn told(levels: Result<String, String>, otherwise: StatusCode) -> Response {
    match levels {
        Ok(levels) => format!("{levels}\n").into_response(),
        Err(why) => (otherwise, format!("{why}\n")).into_response(),
    }
}
