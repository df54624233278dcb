//! Counters and gauges in OpenMetrics form. Names are Istio's where Istio has one, else `marline_`. Serving them is
//! `admin`'s; the kernel program's counters are read when asked for.

use std::sync::atomic::AtomicU64;

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
    },
    registry::{Registry, Unit},
};

use crate::words::{Direction, Mode, Path};

type Labels<const N: usize> = [(&'static str, &'static str); N];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

/// What is counted elsewhere and asked for when the metrics are read.
pub struct Others<'a> {
    pub capture_events: &'a [(&'static str, u64)],
    pub map_entries: &'a [(&'static str, u64)],
    pub log_lines_dropped: u64,
    /// By identity, seconds to their end: less than nothing when that has passed.
    pub certificates: &'a [(String, i64)],
    /// Revocation lists whose next update is overdue.
    pub stale_lists: usize,
}

pub struct Metrics {
    registry: Registry,
    opened: Family<Labels<1>, Counter>,
    closed: Family<Labels<4>, Counter>,
    sent: Family<Labels<2>, Counter>,
    received: Family<Labels<2>, Counter>,
    carried: Family<Labels<5>, Counter>,
    handshakes: Family<Labels<3>, Counter>,
    handshake_seconds: Histogram,
    reloads: Family<Labels<1>, Counter>,
    trust_reloads: Family<Labels<1>, Counter>,
    trust_withdrawn: Family<Labels<2>, Counter>,
    pub live: Gauge,
    pub pods: Family<Labels<1>, Gauge<i64>>,
    pub kernel: Family<Labels<3>, Gauge<u64, AtomicU64>>,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let (opened, closed, sent, received) = <(Family<_, _>, Family<_, _>, Family<_, _>, Family<_, _>)>::default();
        let (carried, handshakes, reloads, pods, kernel) =
            <(Family<_, _>, Family<_, _>, Family<_, _>, Family<_, _>, Family<_, _>)>::default();
        let (trust_reloads, trust_withdrawn) = <(Family<_, _>, Family<_, _>)>::default();
        let handshake_seconds = Histogram::new(exponential_buckets(0.000_5, 2.0, 14));
        let live = Gauge::default();
        let build: Family<Build, Gauge> = Family::default();
        build.get_or_create(&Build { version: env!("CARGO_PKG_VERSION") }).set(1);

        registry.register("istio_tcp_connections_opened", "Connections captured", opened.clone());
        registry.register("istio_tcp_connections_closed", "Connections ended, by verdict and reason", closed.clone());
        registry.register("istio_tcp_sent_bytes", "Application bytes sent to the peer", sent.clone());
        registry.register("istio_tcp_received_bytes", "Application bytes received from the peer", received.clone());
        registry.register(
            "marline_connections_carried",
            "Connections by who keeps their records and by the path of their bytes",
            carried.clone(),
        );
        registry.register("marline_handshakes", "TLS handshakes by result and reason", handshakes.clone());
        registry.register_with_unit(
            "marline_handshake_duration",
            "Time a successful handshake took",
            Unit::Seconds,
            handshake_seconds.clone(),
        );
        registry.register("marline_config_reloads", "Configuration reloads by result", reloads.clone());
        registry.register(
            "marline_trust_reloads",
            "Changes of the CA's directory and of the files of trust, by result",
            trust_reloads.clone(),
        );
        registry.register(
            "marline_trust_revoked_connections",
            "Live connections that were reset because nobody vouches for their peer any more",
            trust_withdrawn.clone(),
        );
        registry.register("marline_connections_live", "Connections that are open now", live.clone());
        registry.register("marline_pods", "Local pods by state", pods.clone());
        registry.register("marline_kernel", "What this kernel was seen to do, as labels", kernel.clone());
        registry.register("marline_build", "Build information, as labels", build);
        Self {
            registry,
            opened,
            closed,
            sent,
            received,
            carried,
            handshakes,
            handshake_seconds,
            reloads,
            trust_reloads,
            trust_withdrawn,
            live,
            pods,
            kernel,
        }
    }

    pub fn opened(&self, direction: Direction) {
        self.opened.get_or_create(&[reporter(direction)]).inc();
        self.live.inc();
    }

    pub fn closed(
        &self,
        direction: Direction,
        mode: Option<Mode>,
        verdict: &'static str,
        reason: Option<&'static str>,
        sent: u64,
        received: u64,
    ) {
        self.live.dec();
        let policy = security_policy(mode);
        self.closed
            .get_or_create(&[reporter(direction), policy, ("verdict", verdict), ("reason", reason.unwrap_or("none"))])
            .inc();
        self.sent.get_or_create(&[reporter(direction), policy]).inc_by(sent);
        self.received.get_or_create(&[reporter(direction), policy]).inc_by(received);
    }

    /// `why` is the reason for which a proxied connection is not direct.
    pub fn carried(
        &self,
        direction: Direction,
        mode: Mode,
        records: &'static str,
        path: Path,
        why: Option<&'static str>,
    ) {
        let labels = [
            reporter(direction),
            security_policy(Some(mode)),
            ("records", records),
            ("path", path.as_str()),
            ("path_reason", why.unwrap_or("none")),
        ];
        self.carried.get_or_create(&labels).inc();
    }

    pub fn handshake(&self, direction: Direction, result: Result<std::time::Duration, &'static str>) {
        let (outcome, reason) = match result {
            Ok(took) => {
                self.handshake_seconds.observe(took.as_secs_f64());
                ("ok", "none")
            }
            Err(reason) => ("failed", reason),
        };
        self.handshakes.get_or_create(&[reporter(direction), ("result", outcome), ("reason", reason)]).inc();
    }

    pub fn reloaded(&self, accepted: bool) {
        self.reloads.get_or_create(&[("result", if accepted { "accepted" } else { "rejected" })]).inc();
    }

    pub fn trust_reloaded(&self, accepted: bool) {
        self.trust_reloads.get_or_create(&[("result", if accepted { "accepted" } else { "rejected" })]).inc();
    }

    pub fn trust_withdrawn(&self, direction: Direction, reason: &'static str) {
        self.trust_withdrawn.get_or_create(&[reporter(direction), ("reason", reason)]).inc();
    }

    /// The whole exposition, with what others count.
    pub fn render(&self, others: &Others<'_>) -> String {
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        // The kernel counts these itself; they go before the end mark that `encode` has written.
        let mut events = String::from(
            "# HELP marline_capture_events What the kernel program did, by event.\n# TYPE marline_capture_events counter\n",
        );
        for (event, count) in others.capture_events {
            events.push_str(&format!("marline_capture_events_total{{event=\"{event}\"}} {count}\n"));
        }
        events.push_str("# HELP marline_access_log_dropped Access log lines that nobody took in time.\n");
        events.push_str("# TYPE marline_access_log_dropped counter\n");
        events.push_str(&format!("marline_access_log_dropped_total {}\n", others.log_lines_dropped));
        events.push_str(
            "# HELP marline_capture_map_entries Entries in the maps that the kernel program and the agent share.\n",
        );
        events.push_str("# TYPE marline_capture_map_entries gauge\n");
        for (map, entries) in others.map_entries {
            events.push_str(&format!("marline_capture_map_entries{{map=\"{map}\"}} {entries}\n"));
        }
        events.push_str(
            "# HELP marline_certificate_expiry_seconds Time to the end of each certificate of a local workload.\n",
        );
        events.push_str(
            "# TYPE marline_certificate_expiry_seconds gauge\n# UNIT marline_certificate_expiry_seconds seconds\n",
        );
        for (identity, seconds) in others.certificates {
            // What a SPIFFE ID is made of needs no escape.
            events.push_str(&format!("marline_certificate_expiry_seconds{{identity=\"{identity}\"}} {seconds}\n"));
        }
        events.push_str("# HELP marline_trust_overdue_lists Revocation lists whose next update has passed.\n");
        events.push_str(&format!(
            "# TYPE marline_trust_overdue_lists gauge\nmarline_trust_overdue_lists {}\n",
            others.stale_lists
        ));
        match text.rfind("# EOF") {
            Some(end) => text.insert_str(end, &events),
            None => text.push_str(&events),
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Istio's label: the source's side reports outbound connections, the destination's inbound ones.
fn reporter(direction: Direction) -> (&'static str, &'static str) {
    ("reporter", if direction == Direction::Outbound { "source" } else { "destination" })
}

fn security_policy(mode: Option<Mode>) -> (&'static str, &'static str) {
    let value = match mode {
        Some(Mode::Mtls) => "mutual_tls",
        Some(Mode::Plaintext) => "none",
        None => "unknown",
    };
    ("connection_security_policy", value)
}
