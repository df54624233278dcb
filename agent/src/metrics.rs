//! Counters and gauges in OpenMetrics form. Names and labels are Istio's where Istio has them, else `marline_`: what each means is in
//! docs/observability.md. Serving them is `admin`'s; what others count is gathered by `app`.

use std::{
    sync::{Arc, atomic::AtomicU64},
    time::{Duration, Instant},
};

use prometheus_client::{
    encoding::{EncodeLabelSet, text::encode},
    metrics::{
        counter::Counter,
        family::Family,
        gauge::Gauge,
        histogram::{Histogram, exponential_buckets},
        info::Info,
    },
    registry::{Registry, Unit},
};

mod flags;
mod labels;
mod others;
mod table;
mod traffic;

pub use flags::ResponseFlags;
pub use labels::{Seen, counted_as};
pub use others::{Others, Process, Source};
pub use traffic::{Open, Progress};

use crate::{
    state::Snapshot,
    words::{Direction, Mode, Path},
};
use labels::Denial;
use others::Latest;
use traffic::Traffic;

type Labels<const N: usize> = [(&'static str, &'static str); N];

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Build {
    version: &'static str,
}

pub struct Metrics {
    registry: Registry,
    traffic: Arc<Traffic>,
    others: Latest,
    ended: Family<Labels<4>, Counter>,
    carried: Family<Labels<5>, Counter>,
    handshakes: Family<Labels<3>, Counter>,
    handshake_seconds: Family<Labels<1>, Histogram>,
    spares: Family<Labels<1>, Counter>,
    reloads: Family<Labels<1>, Counter>,
    trust_reloads: Family<Labels<1>, Counter>,
    trust_withdrawn: Family<Labels<2>, Counter>,
    /// Captured, and not yet opened or refused.
    pub pending: Gauge,
    pub kernel: Family<Labels<3>, Gauge<u64, AtomicU64>>,
}

/// How a connection ended, by the labels that Istio has no place for.
#[derive(Debug, Clone, Copy)]
pub struct Ended<'a> {
    pub mode: Option<Mode>,
    pub verdict: &'static str,
    pub reason: Option<&'static str>,
    /// The policy that refused it.
    pub policy: Option<&'a str>,
}

impl Metrics {
    pub fn new() -> Self {
        let mut registry = Registry::default();
        let (ended, carried, handshakes, reloads, kernel) =
            <(Family<_, _>, Family<_, _>, Family<_, _>, Family<Labels<1>, Counter>, Family<_, _>)>::default();
        let (trust_reloads, trust_withdrawn) = <(Family<Labels<1>, Counter>, Family<_, _>)>::default();
        let handshake_seconds = Family::<Labels<1>, Histogram>::new_with_constructor(|| {
            Histogram::new(exponential_buckets(0.000_5, 2.0, 14))
        });
        // `increase()` sees nothing in a series that begins with the first rejection.
        for family in [&reloads, &trust_reloads] {
            for result in ["accepted", "rejected"] {
                drop(family.get_or_create(&[("result", result)]));
            }
        }
        let spares = Family::<Labels<1>, Counter>::default();
        let pending = Gauge::default();
        let (traffic, others) = (Arc::new(Traffic::new()), Latest::default());

        registry.register_collector(Box::new(traffic.clone()));
        registry.register(
            "marline_connections_ended",
            "Connections that ended or were refused, by verdict and reason",
            ended.clone(),
        );
        registry.register("marline_connections_pending", "Connections that are being made", pending.clone());
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
        registry.register(
            "marline_spare_connections",
            "Connections to peers that were made before an application asked for one, by what became of them",
            spares.clone(),
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
        registry.register("marline_kernel", "What this kernel was seen to do, as labels", kernel.clone());
        let build = Info::new(Build { version: env!("CARGO_PKG_VERSION") });
        registry.register("marline_build", "Build information", build);
        registry.register_collector(Box::new(others.clone()));
        Self {
            registry,
            traffic,
            others,
            ended,
            carried,
            handshakes,
            handshake_seconds,
            spares,
            reloads,
            trust_reloads,
            trust_withdrawn,
            pending,
            kernel,
        }
    }

    /// It is known who talks to whom; `established` is the mode of one whose bytes may flow now.
    pub fn opened(&self, snapshot: &Snapshot, seen: &Seen<'_>, established: Option<Mode>, since: Progress) -> Open {
        self.traffic.open(snapshot, seen, established, since)
    }

    pub fn ended(&self, direction: Direction, ended: &Ended<'_>) {
        let Ended { mode, verdict, reason, policy } = *ended;
        let labels =
            [reporter(direction), security_policy(mode), ("verdict", verdict), ("reason", reason.unwrap_or("none"))];
        self.ended.get_or_create(&labels).inc();
        if let Some(reason @ ("policy" | "plaintext_under_strict")) = reason {
            let policy = policy.unwrap_or("none").to_owned();
            self.traffic.denied(Denial { reporter: labels::reporter(direction), policy, reason });
        }
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

    pub fn handshake(&self, direction: Direction, result: Result<Duration, &'static str>) {
        let (outcome, reason) = match result {
            Ok(took) => {
                self.handshake_seconds.get_or_create(&[reporter(direction)]).observe(took.as_secs_f64());
                ("ok", "none")
            }
            Err(reason) => ("failed", reason),
        };
        self.handshakes.get_or_create(&[reporter(direction), ("result", outcome), ("reason", reason)]).inc();
    }

    pub fn spare(&self, what: &'static str, count: u64) {
        if count > 0 {
            self.spares.get_or_create(&[("event", what)]).inc_by(count);
        }
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

    /// Forgets what is counted of workloads that have left the mesh some time ago, and what is idle where room is short.
    pub fn forget(&self, now: Instant, known: &dyn Fn(&str, &str) -> bool) {
        self.traffic.forget(now, known);
    }

    /// The whole exposition, with what others count.
    pub fn render(&self, others: Others) -> String {
        self.others.set(others);
        let mut text = String::new();
        if let Err(error) = encode(&mut text, &self.registry) {
            tracing::error!(%error, "metrics could not be encoded");
        }
        text
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

fn reporter(direction: Direction) -> (&'static str, &'static str) {
    ("reporter", labels::reporter(direction))
}

fn security_policy(mode: Option<Mode>) -> (&'static str, &'static str) {
    ("connection_security_policy", labels::security_policy(mode))
}
