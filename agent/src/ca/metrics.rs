//! What the CA service counts, in Prometheus's words. `status` shows it.

use std::time::{SystemTime, UNIX_EPOCH};

use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, family::Family, gauge::Gauge},
    registry::Registry,
};

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
        metrics.registry.register("connections", "Connections, by what became of them", connections);
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

    pub fn render(&self, ca: &Ca) -> String {
        let seconds = |time: SystemTime| time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let left = i128::from(seconds(ca.not_after())) - i128::from(seconds(SystemTime::now()));
        self.ca_expiry.set(i64::try_from(left).unwrap_or(i64::MAX));
        let mut text = String::new();
        // Writing to a text does not fail.
        let _ = encode(&mut text, &self.registry);
        text
    }
}
