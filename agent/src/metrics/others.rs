//! What is counted elsewhere and asked for when the metrics are read: by the kernel programs, the access log, the certificates' manager,
//! the kernel's account of this process.

use std::{
    fmt,
    sync::{Arc, Mutex},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, NoLabelSet},
};

use super::{
    table::lock,
    traffic::{counter, gauge, single},
};

#[derive(Debug, Default, Clone)]
pub struct Others {
    /// By event.
    pub capture_events: Vec<(&'static str, u64)>,
    /// By map: entries, and how many it has room for.
    pub maps: Vec<(&'static str, u64, u64)>,
    /// Access log lines by what became of them.
    pub log_lines: Vec<(&'static str, u64)>,
    /// By identity, seconds to their end: less than nothing when that has passed.
    pub certificates: Vec<(String, i64)>,
    /// By identity, seconds from beginning to end.
    pub lifetimes: Vec<(String, u64)>,
    pub certificates_issued: u64,
    pub certificate_failures: u64,
    /// Revocation lists whose next update is overdue.
    pub stale_lists: usize,
    pub ready: bool,
    pub pods: Vec<(&'static str, u64)>,
    /// Hooks that should be attached, and whether each is.
    pub hooks: Vec<(&'static str, bool)>,
    pub source: Option<Source>,
    pub process: Option<Process>,
}

/// Of the API server as the source of resources.
#[derive(Debug, Default, Clone)]
pub struct Source {
    pub connected: bool,
    pub times_away: u64,
    /// Requests by what they were for.
    pub requests: Vec<(&'static str, u64)>,
    pub bytes: u64,
    /// Objects that cannot be read, and deny.
    pub refused: usize,
    /// Pods of this node that are not captured, by the reason.
    pub uncaptured: Vec<(&'static str, usize)>,
    /// Pods of this node that are captured and have run uncaptured before.
    pub late: usize,
}

/// What the kernel says of this process, under the names that every Prometheus client uses.
#[derive(Debug, Default, Clone, Copy)]
pub struct Process {
    pub cpu_seconds: f64,
    pub resident_bytes: u64,
    pub open_fds: u64,
    pub max_fds: u64,
    pub start_seconds: f64,
}

#[derive(Debug, Default, Clone)]
pub struct Latest(Arc<Mutex<Others>>);

impl Latest {
    pub fn set(&self, others: Others) {
        *lock(&self.0) = others;
    }
}

/// Whether an event is that a connection or packet was not let through, and not one of traffic.
fn is_refusal(event: &str) -> bool {
    !["outbound_redirected", "inbound_steered", "udp_passed", "direct_held_back", "kubelet_admitted"].contains(&event)
}

impl Collector for Latest {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let others = lock(&self.0).clone();
        let encoder = &mut encoder;
        let (refusals, events): (Vec<_>, Vec<_>) =
            others.capture_events.iter().copied().partition(|(event, _)| is_refusal(event));
        let events = events.into_iter().map(|(event, count)| ([("event", event)], count));
        counter(encoder, "marline_capture_events", "What the kernel programs did with traffic of pods", events)?;
        let refusals = refusals.into_iter().map(|(reason, count)| ([("reason", reason)], count));
        counter(encoder, "marline_capture_refusals", "What the kernel programs did not let through", refusals)?;
        let entries = others.maps.iter().map(|(map, entries, _)| ([("map", *map)], *entries as f64));
        gauge(encoder, "marline_capture_map_entries", "Entries in the maps shared with the kernel programs", entries)?;
        let room = others.maps.iter().map(|(map, _, room)| ([("map", *map)], *room as f64));
        gauge(encoder, "marline_capture_map_capacity", "Entries for which the maps have room", room)?;
        let hooks = others.hooks.iter().map(|(hook, there)| ([("hook", *hook)], f64::from(u8::from(*there))));
        gauge(
            encoder,
            "marline_capture_hook_attached",
            "Whether each kernel program is attached (1) or not (0)",
            hooks,
        )?;
        let lines = others.log_lines.iter().map(|(outcome, count)| ([("outcome", *outcome)], *count));
        counter(encoder, "marline_access_log_lines", "Access log lines by what became of them", lines)?;
        let seconds = others.certificates.iter().map(|(id, seconds)| ([("identity", id.clone())], *seconds as f64));
        let help = "Time to the end of each certificate of a local workload";
        gauge(encoder, "marline_certificate_expiry_seconds", help, seconds)?;
        let seconds = others.lifetimes.iter().map(|(id, seconds)| ([("identity", id.clone())], *seconds as f64));
        let help = "Time from the beginning to the end of each certificate of a local workload";
        gauge(encoder, "marline_certificate_lifetime_seconds", help, seconds)?;
        let issues = [("issued", others.certificates_issued), ("failed", others.certificate_failures)];
        let issues = issues.into_iter().map(|(result, count)| ([("result", result)], count));
        counter(encoder, "marline_certificate_issues", "Certificates that were asked for, by result", issues)?;
        let help = "Revocation lists whose next update has passed";
        single(encoder, "marline_trust_overdue_lists", help, others.stale_lists as f64)?;
        let pods = others.pods.iter().map(|(state, count)| ([("state", *state)], *count as f64));
        gauge(encoder, "marline_pods", "Local pods by state", pods)?;
        let ready = f64::from(u8::from(others.ready));
        single(encoder, "marline_ready", "Whether the agent is ready (1) or not (0)", ready)?;
        others.source.as_ref().map_or(Ok(()), |source| source.encode(encoder))?;
        others.process.map_or(Ok(()), |process| process.encode(encoder))
    }
}

impl Source {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let help = "Whether the API server is heard of (1) or not (0)";
        single(encoder, "marline_kubernetes_connected", help, f64::from(u8::from(self.connected)))?;
        let help = "How often the API server was not heard of any more";
        counter(
            encoder,
            "marline_kubernetes_losses",
            help,
            [([("source", "api_server")], self.times_away)].into_iter(),
        )?;
        let requests = self.requests.iter().map(|(request, count)| ([("request", *request)], *count));
        counter(encoder, "marline_kubernetes_requests", "What was asked of the API server", requests)?;
        let help = "What the API server has answered, decompressed";
        counter(
            encoder,
            "marline_kubernetes_received_bytes",
            help,
            [([("source", "api_server")], self.bytes)].into_iter(),
        )?;
        let help = "Objects that cannot be read, and deny until they can";
        single(encoder, "marline_kubernetes_refused_objects", help, self.refused as f64)?;
        let pods = self.uncaptured.iter().map(|(reason, count)| ([("reason", *reason)], *count as f64));
        gauge(encoder, "marline_kubernetes_pods_not_captured", "Pods of this node that are not captured", pods)?;
        let help = "Pods of this node that are captured and have run uncaptured before";
        single(encoder, "marline_kubernetes_pods_captured_late", help, self.late as f64)
    }
}

impl Process {
    fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        use prometheus_client::metrics::MetricType::Counter;
        let help = "Processor time, of user and system.";
        encoder
            .encode_descriptor("process_cpu_seconds", help, None, Counter)?
            .encode_counter::<NoLabelSet, _, u64>(&self.cpu_seconds, None)?;
        for (name, help, value) in [
            ("process_resident_memory_bytes", "Resident memory", self.resident_bytes as f64),
            ("process_open_fds", "Open descriptors", self.open_fds as f64),
            ("process_max_fds", "Descriptors that may be open", self.max_fds as f64),
            ("process_start_time_seconds", "When the agent was started, since the epoch", self.start_seconds),
        ] {
            single(encoder, name, help, value)?;
        }
        Ok(())
    }
}
