//! What the CA service counts, and how it is shown: Prometheus metrics and readiness over HTTP.

use std::{
    io,
    sync::Arc,
    time::{SystemTime, UNIX_EPOCH},
};

use arc_swap::ArcSwap;
use axum::{Router, http::StatusCode, routing::get};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};
use tokio::{net::TcpListener, sync::watch};

use super::ledger::Ledger;
use crate::identity::Ca;

type Labels = [(&'static str, &'static str); 1];

pub struct Metrics {
    registry: Registry,
    requests: Family<Labels, Counter>,
    connections: Family<Labels, Counter>,
    reloads: Family<[(&'static str, &'static str); 2], Counter>,
    ca_expiry: Gauge,
}

impl Metrics {
    pub fn new() -> Self {
        let metrics = Self {
            registry: Registry::with_prefix("marline_ca"),
            requests: Family::default(),
            connections: Family::default(),
            reloads: Family::default(),
            ca_expiry: Gauge::default(),
        };
        let (requests, connections, reloads, expiry) =
            (metrics.requests.clone(), metrics.connections.clone(), metrics.reloads.clone(), metrics.ca_expiry.clone());
        let mut metrics = metrics;
        metrics.registry.register("requests", "Requests for certificates, by what became of them", requests);
        metrics.registry.register("connections", "Connections, by what became of their handshakes", connections);
        metrics.registry.register(
            "reloads",
            "Readings of followed files, by what is in them and their result",
            reloads,
        );
        metrics.registry.register("expiry_seconds", "The time until the CA's own certificate ends", expiry);
        metrics
    }

    pub fn request(&self, outcome: &'static str) {
        self.requests.get_or_create(&[("outcome", outcome)]).inc();
    }

    pub fn connection(&self, outcome: &'static str) {
        self.connections.get_or_create(&[("outcome", outcome)]).inc();
    }

    pub fn reloaded(&self, what: &'static str, well: bool) {
        let result = if well { "accepted" } else { "rejected" };
        self.reloads.get_or_create(&[("files", what), ("result", result)]).inc();
    }

    fn render(&self, ca: &Ca) -> String {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let left = i128::from(seconds(ca.not_after())) - i128::from(seconds(SystemTime::now()));
        self.ca_expiry.set(i64::try_from(left).unwrap_or(i64::MAX));
        let mut text = String::new();
        // Writing to a text does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}

/// Serves `/metrics`, `/readyz` and `/livez` until `shutdown` becomes true.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    ledger: Ledger,
    ca: Arc<ArcSwap<Ca>>,
    mut shutdown: watch::Receiver<bool>,
) -> io::Result<()> {
    let authority = Arc::clone(&ca);
    let ready = move || {
        let (ledger, authority) = (ledger.clone(), Arc::clone(&authority));
        async move {
            let unready = |why| Err((StatusCode::SERVICE_UNAVAILABLE, why));
            if authority.load().not_after() <= SystemTime::now() {
                return unready("the CA's certificate has expired\n");
            }
            match ledger.is_writable().await {
                true => Ok("ready\n"),
                false => unready("the ledger cannot be written: no certificate is handed out\n"),
            }
        }
    };
    let content_type = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    let render = move || {
        let text = metrics.render(&ca.load());
        async move { (content_type, text) }
    };
    let router = Router::new()
        .route("/metrics", get(render))
        .route("/readyz", get(ready))
        .route("/livez", get(|| async { "alive\n" }));
    axum::serve(listener, router)
        .with_graceful_shutdown(async move {
            let _ = shutdown.wait_for(|stop| *stop).await;
        })
        .await
}
