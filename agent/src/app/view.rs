//! What `admin` shows, gathered from the rooms that know it.

mod configuration;
mod policies;
mod process;
pub(super) mod source;
pub(super) mod status;

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError, atomic::Ordering},
    time::Instant,
};

use serde_json::{Value, json};

use crate::{
    admin::View,
    bpf::Hook,
    identity::SvidInfo,
    logging::Levels,
    metrics::{Metrics, Others, counted_as},
    proxy::{PodState, Proxy},
    state::explain::Question,
    words::with_causes,
};

pub(super) struct Gathered {
    proxy: Proxy,
    metrics: Arc<Metrics>,
    levels: Levels,
    about: status::About,
    started: Instant,
    /// One at a time: what is counted elsewhere is put beside the metrics and then written with them.
    rendering: Mutex<()>,
}

impl Gathered {
    pub(super) fn new(proxy: Proxy, metrics: Arc<Metrics>, levels: Levels, about: status::About) -> Self {
        Self { proxy, metrics, levels, about, started: Instant::now(), rendering: Mutex::new(()) }
    }

    /// Takes what live connections have moved until now, and lets go of what is counted of workloads that have left.
    fn catch_up(&self) {
        let ctx = self.proxy.context();
        for live in ctx.connections.all() {
            live.report();
        }
        let snapshot = ctx.state.load();
        let known: HashSet<(&str, &str)> =
            snapshot.workloads().iter().map(|workload| (workload.namespace.as_str(), counted_as(workload))).collect();
        self.metrics.forget(Instant::now(), &|namespace, workload| known.contains(&(namespace, workload)));
    }

    fn others(&self) -> Others {
        let ctx = self.proxy.context();
        let capture_events = ctx.capture.counters().unwrap_or_else(|error| {
            tracing::error!("the kernel program's counters cannot be read: {}", with_causes(&error));
            Vec::new()
        });
        let pods = self.proxy.pods();
        let pods_in = |state| pods.iter().filter(|pod| pod.state == state).count() as u64;
        let certificates = ctx.identities.list();
        let life = |info: &SvidInfo| info.not_after?.checked_sub(info.not_before?);
        let (trust, now) = (ctx.identities.trust(), std::time::SystemTime::now());
        let asked = ctx.identities.counters();
        Others {
            lifetimes: certificates.iter().filter_map(|info| Some((info.id.to_string(), life(info)?))).collect(),
            certificates: certificates
                .iter()
                .filter_map(|info| Some((info.id.to_string(), info.seconds_to_expiry?)))
                .collect(),
            certificates_issued: asked.issued,
            certificate_failures: asked.failures,
            stale_lists: trust.revoked().iter().filter(|list| list.is_stale(now)).count(),
            capture_events,
            maps: ctx.capture.occupancy().to_vec(),
            log_lines: ctx.log.lines(),
            ready: self.ready().is_ok(),
            pods: vec![("ready", pods_in(PodState::Ready)), ("refused", pods_in(PodState::Refused))],
            hooks: Hook::by_name(&self.proxy.hooks()),
            source: self.about.source.as_ref().map(source::Shown::counts),
            process: process::metrics(),
        }
    }
}

impl View for Gathered {
    fn ready(&self) -> Result<(), String> {
        self.about.source.as_ref().map_or(Ok(()), source::Shown::is_known)?;
        self.proxy.ready()?;
        let snapshot = self.proxy.context().state.load();
        self.about.source.as_ref().map_or(Ok(()), |source| source.probes_fail(&snapshot))
    }

    fn metrics(&self) -> String {
        let _turn = self.rendering.lock().unwrap_or_else(PoisonError::into_inner);
        self.catch_up();
        self.metrics.render(self.others())
    }

    fn pods(&self) -> Value {
        json!(self.proxy.pods())
    }

    fn connections(&self) -> Value {
        let live = self.proxy.context().connections.all();
        live.iter()
            .map(|live| {
                json!({
                    "id": live.id,
                    "direction": live.direction,
                    "age_ms": u64::try_from(live.started.elapsed().as_millis()).unwrap_or(u64::MAX),
                    "bytes_sent": live.moved.sent.load(Ordering::Relaxed),
                    "bytes_received": live.moved.received.load(Ordering::Relaxed),
                    "facts": live.facts(),
                    "wire": live.wire().and_then(|wire| Some([wire.local_addr().ok()?, wire.peer_addr().ok()?])),
                })
            })
            .collect()
    }

    fn ended(&self) -> Value {
        status::ended(self)
    }

    fn status(&self) -> Value {
        status::status(self)
    }

    fn explain(&self, question: Question<'_>) -> Result<Value, String> {
        status::explain(self, question)
    }

    fn workloads(&self) -> Value {
        configuration::workloads(&self.proxy.context().state.load())
    }

    fn services(&self) -> Value {
        configuration::services(&self.proxy.context().state.load())
    }

    fn policies(&self) -> Value {
        policies::policies(&self.proxy.context().state.load())
    }

    fn certs(&self) -> Value {
        json!(self.proxy.context().identities.list())
    }

    fn chain(&self, id: &str) -> Option<String> {
        self.proxy.context().identities.chain_pem(&id.parse().ok()?)
    }

    fn config_dump(&self) -> Value {
        let snapshot = self.proxy.context().state.load();
        let mut sources: Vec<_> = snapshot.sources.iter().collect();
        sources.sort_unstable_by_key(|source| (&source.file, source.line));
        let source = |source: &&crate::state::Source| json!({"file": source.file.display().to_string(), "line": source.line, "resource": &*source.resource});
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "generation": snapshot.generation,
            "agent": configuration::agent(&self.about.agent),
            "resources": sources.iter().map(source).collect::<Vec<_>>(),
            "workloads": configuration::workloads(&snapshot),
            "services": configuration::services(&snapshot),
            "policies": policies::policies(&snapshot),
            "certificates": self.certs(),
            "pods": self.pods(),
            "hooks": self.proxy.hooks().iter().map(|hook| json!({
                "name": hook.name, "target": hook.target, "attached": hook.fault.is_none(), "fault": hook.fault,
            })).collect::<Vec<_>>(),
            "logging": self.logging().unwrap_or_default(),
        })
    }

    fn runtime(&self) -> Value {
        let ctx = self.proxy.context();
        process::runtime(self.started, ctx.runtime(), ctx.connections.all().len())
    }

    fn logging(&self) -> Result<String, String> {
        self.levels.now().map_err(|error| with_causes(&error))
    }

    fn set_logging(&self, levels: Option<&str>) -> Result<String, String> {
        let set = levels.map_or_else(|| self.levels.reset(), |levels| self.levels.add(levels));
        match set {
            Ok(now) => {
                tracing::info!(levels = now, "what is logged was changed");
                Ok(now)
            }
            Err(error) => Err(with_causes(&error)),
        }
    }
}
