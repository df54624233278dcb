//! What `admin` shows, gathered from the rooms that know it.

pub(super) mod status;

use std::sync::{Arc, atomic::Ordering};

use serde_json::{Value, json};

use crate::{
    admin::View,
    metrics::{Metrics, Others},
    proxy::{PodState, Proxy},
    state::explain::Question,
    words::with_causes,
};

pub(super) struct Gathered {
    pub(super) proxy: Proxy,
    pub(super) metrics: Arc<Metrics>,
    pub(super) about: status::About,
}

impl View for Gathered {
    fn ready(&self) -> Result<(), String> {
        self.proxy.ready()
    }

    fn metrics(&self) -> String {
        let ctx = self.proxy.context();
        let capture_events = ctx.capture.counters().unwrap_or_else(|error| {
            tracing::error!("the kernel program's counters cannot be read: {}", with_causes(&error));
            Vec::new()
        });
        let pods = self.proxy.pods();
        for (label, state) in [("ready", PodState::Ready), ("refused", PodState::Refused)] {
            let count = pods.iter().filter(|pod| pod.state == state).count();
            self.metrics.pods.get_or_create(&[("state", label)]).set(i64::try_from(count).unwrap_or(i64::MAX));
        }
        let certificates = ctx.identities.list().into_iter();
        let certificates: Vec<_> =
            certificates.filter_map(|info| Some((info.id.to_string(), info.seconds_to_expiry?))).collect();
        let trust = ctx.identities.trust();
        let now = std::time::SystemTime::now();
        self.metrics.render(&Others {
            certificates: &certificates,
            stale_lists: trust.revoked().iter().filter(|list| list.is_stale(now)).count(),
            capture_events: &capture_events,
            map_entries: &ctx.capture.occupancy(),
            log_lines_dropped: ctx.log.dropped(),
        })
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
        let snapshot = self.proxy.context().state.load();
        let local: std::collections::HashSet<_> =
            snapshot.local.iter().map(|pod| (&pod.workload.namespace, &pod.workload.name)).collect();
        let mode = |workload: &crate::policy::Workload| {
            workload.in_mesh.then(|| snapshot.policies.authentication.mode(workload, 0))
        };
        let workload = |workload: &Arc<crate::policy::Workload>| {
            json!({
                "namespace": workload.namespace, "name": workload.name, "identity": workload.id.to_string(),
                "addresses": workload.addresses, "in_mesh": workload.in_mesh,
                "local": local.contains(&(&workload.namespace, &workload.name)), "mode": mode(workload),
            })
        };
        json!({
            "generation": snapshot.generation,
            "mode": snapshot.policies.authentication.mesh_mode(),
            "workloads": snapshot.workloads().iter().map(workload).collect::<Vec<_>>(),
        })
    }

    fn certs(&self) -> Value {
        json!(self.proxy.context().identities.list())
    }

    fn chain(&self, id: &str) -> Option<String> {
        self.proxy.context().identities.chain_pem(&id.parse().ok()?)
    }
}
