//! What is shown of the API server as the source of resources.

use std::{
    sync::{Arc, atomic::Ordering},
    time::SystemTime,
};

use crate::{
    admin::status,
    app::{enrol::Enrolment, kubelet::Kubelet},
    control::kubernetes::{Asked, Health, Source},
    metrics,
    state::Snapshot,
};

#[derive(Clone)]
pub(in crate::app) struct Shown {
    health: Health,
    asked: Arc<Asked>,
    node: Arc<str>,
    enrolment: Enrolment,
    kubelet: Kubelet,
}

impl Shown {
    pub(in crate::app) fn new(source: &Source, enrolment: Enrolment, kubelet: Kubelet) -> Self {
        Self {
            health: source.health.clone(),
            asked: Arc::clone(source.api.asked()),
            node: Arc::clone(&source.viewpoint.node),
            enrolment,
            kubelet,
        }
    }

    /// Waits for the first complete list of everything.
    pub(in crate::app) async fn ready(&self) {
        // Its sender lives in `health`.
        let _ = self.health.ready().wait_for(|ready| *ready).await;
    }

    pub(super) fn is_known(&self) -> Result<(), String> {
        if let Some(why) = self.enrolment.fault() {
            return Err(format!(
                "the CNI plugin is missing: {why}; run marline cni install, with --watch to keep it there"
            ));
        }
        let report = self.health.report();
        match (report.ready, report.away) {
            (true, _) => Ok(()),
            (false, Some(why)) => Err(format!("nothing is known of the cluster yet: {why}")),
            (false, None) => {
                Err(format!("nothing is known of the cluster yet: waiting for {}", report.waiting.join(", ")))
            }
        }
    }

    /// Why pods' probes fail, if pods have any.
    pub(super) fn probes_fail(&self, snapshot: &Snapshot) -> Result<(), String> {
        let probed = snapshot.probes.len();
        match self.kubelet.found() {
            Err(why) if probed > 0 => Err(format!(
                "the kubelet's probes of {probed} pods are refused where plaintext is: {why}; set spec.kubernetes.kubeletCgroup to the cgroup2 \
                 directory that has the kubelet and nothing else"
            )),
            _ => Ok(()),
        }
    }

    pub(super) fn facts(&self, snapshot: &Snapshot) -> status::Source {
        let (report, kubelet) = (self.health.report(), self.kubelet.found());
        let owned = |texts: Vec<&'static str>| texts.into_iter().map(str::to_owned).collect();
        status::Source {
            node: self.node.to_string(),
            ready: report.ready,
            waiting: owned(report.waiting),
            away: report.away,
            since: report.since.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs(),
            absent: owned(report.absent),
            pods: report.facts.pods,
            not_captured: report.facts.not_captured,
            host_network: report.facts.host_network,
            late: report.facts.late,
            cni_fault: self.enrolment.fault(),
            kubelet: kubelet.as_ref().ok().cloned(),
            kubelet_fault: kubelet.err(),
            probed: snapshot.probes.len(),
            errors: report.facts.errors,
            warnings: report.facts.warnings,
        }
    }

    pub(super) fn counts(&self) -> metrics::Source {
        let report = self.health.report();
        let count = |counter: &std::sync::atomic::AtomicU64| counter.load(Ordering::Relaxed);
        metrics::Source {
            connected: report.ready && report.away.is_none(),
            times_away: report.times_away,
            requests: vec![("list", count(&self.asked.pages)), ("watch", count(&self.asked.watches))],
            bytes: count(&self.asked.bytes),
            refused: report.facts.errors.len(),
            uncaptured: vec![
                ("not_told", report.facts.not_captured.len()),
                ("host_network", report.facts.host_network.len()),
            ],
            late: report.facts.late.len(),
        }
    }
}
