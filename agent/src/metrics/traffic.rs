//! Istio's standard TCP metrics, and the share of mTLS. A connection is opened here when it is known who talks to whom, and closed with
//! the same labels; bytes are added while it lives, as they are asked for, and never twice.
//!
//! In Istio's words, at either reporter, bytes are *received* on their way from the client to the server and *sent* on their way back.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Instant,
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, NoLabelSet},
    metrics::MetricType,
};

use super::{
    flags::ResponseFlags,
    labels::{Denial, Flagged, Flow, Seen, Side},
    table::{Entry, Table, lock},
};
use crate::{
    state::Snapshot,
    words::{Direction, Mode},
};

/// How many combinations of labels there are at most, of each of these kinds. A line of Istio's metrics is a kilobyte.
pub const FLOWS: usize = 5_000;
pub const SIDES: usize = 5_000;
pub const DENIALS: usize = 1_000;

#[derive(Debug, Default)]
pub struct Counts {
    opened: AtomicU64,
    closed: [AtomicU64; ResponseFlags::ALL.len()],
    sent: AtomicU64,
    received: AtomicU64,
}

#[derive(Debug, Default)]
pub struct Share {
    connections: AtomicU64,
    bytes: AtomicU64,
    live: AtomicU64,
}

#[derive(Debug)]
pub struct Traffic {
    flows: Table<Flow, Counts>,
    sides: Table<Side, Share>,
    denials: Table<Denial, AtomicU64>,
    live: AtomicU64,
    /// Ours and the peers'.
    key_updates: [AtomicU64; 2],
}

/// What a live connection has moved: bytes by the application's view, and key updates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    pub sent: u64,
    pub received: u64,
    pub updates_sent: u64,
    pub updates_received: u64,
}

/// A connection that was counted as opened. Dropped without being closed, it is one that the agent ended.
pub struct Open {
    traffic: Arc<Traffic>,
    direction: Direction,
    flow: Arc<Entry<Flow, Counts>>,
    side: Option<Arc<Entry<Side, Share>>>,
    reported: Mutex<Progress>,
    flags: ResponseFlags,
}

impl Traffic {
    pub fn new() -> Self {
        Self {
            flows: Table::new(FLOWS),
            sides: Table::new(SIDES),
            denials: Table::new(DENIALS),
            live: AtomicU64::new(0),
            key_updates: Default::default(),
        }
    }

    /// `established` is the mode of one whose bytes may flow: only those count for the share of mTLS. Bytes before `since` were
    /// counted by an earlier agent.
    pub fn open(
        self: &Arc<Self>,
        snapshot: &Snapshot,
        seen: &Seen<'_>,
        established: Option<Mode>,
        since: Progress,
    ) -> Open {
        let flow = self.flows.entry(Flow::new(snapshot, seen));
        let side = established.map(|mode| self.sides.entry(Side::new(snapshot, seen, mode)));
        add(&flow.value.opened, 1);
        add(&self.live, 1);
        if let Some(side) = &side {
            if side.value.connections.fetch_add(1, Ordering::Relaxed) == 0 {
                // A share of nothing is 0 only if the series is there.
                self.sides.entry(side.key.counterpart());
            }
            add(&side.value.live, 1);
        }
        Open {
            traffic: self.clone(),
            direction: seen.direction,
            flow,
            side,
            reported: Mutex::new(since),
            flags: ResponseFlags::LocalReset,
        }
    }

    pub fn denied(&self, denial: Denial) {
        add(&self.denials.entry(denial).value, 1);
    }

    pub fn live(&self) -> u64 {
        self.live.load(Ordering::Relaxed)
    }

    /// Forgets what has left the mesh: see `table`.
    pub fn forget(&self, now: Instant, known: &dyn Fn(&str, &str) -> bool) {
        self.flows.forget(now, known);
        self.sides.forget(now, known);
        self.denials.forget(now, known);
    }
}

impl Open {
    /// Counts what has been moved since the last time.
    pub fn report(&self, now: Progress) {
        let mut last = lock(&self.reported);
        // Of direct connections the kernel tells, and its last word may be a byte less than the one before.
        let sent = now.sent.saturating_sub(last.sent);
        let received = now.received.saturating_sub(last.received);
        let (to_client, to_server) = match self.direction {
            Direction::Outbound => (received, sent),
            Direction::Inbound => (sent, received),
        };
        add(&self.flow.value.sent, to_client);
        add(&self.flow.value.received, to_server);
        if let Some(side) = &self.side {
            add(&side.value.bytes, sent + received);
        }
        let updates = [
            now.updates_sent.saturating_sub(last.updates_sent),
            now.updates_received.saturating_sub(last.updates_received),
        ];
        for (counter, updates) in self.traffic.key_updates.iter().zip(updates) {
            add(counter, updates);
        }
        *last = Progress { sent: now.sent.max(last.sent), received: now.received.max(last.received), ..now };
    }

    pub fn close(mut self, flags: ResponseFlags, last: Progress) {
        self.report(last);
        self.flags = flags;
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if let Some(closed) = self.flow.value.closed.get(self.flags.index()) {
            add(closed, 1);
        }
        self.traffic.live.fetch_sub(1, Ordering::Relaxed);
        if let Some(side) = &self.side {
            side.value.live.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Collector for Traffic {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), fmt::Error> {
        let (flows, sides, denials) = (self.flows.all(), self.sides.all(), self.denials.all());
        let none = ResponseFlags::None.as_str();
        let of_flow = |value: fn(&Counts) -> &AtomicU64| {
            flows.iter().map(move |flow| (Flagged(&flow.key, none), read(value(&flow.value))))
        };
        let name = "istio_tcp_connections_opened";
        counter(&mut encoder, name, "TCP connections opened", of_flow(|counts| &counts.opened))?;
        let closed = flows.iter().flat_map(|flow| {
            let by_flag = ResponseFlags::ALL.iter().zip(flow.value.closed.iter().map(read));
            by_flag.filter(|(_, count)| *count > 0).map(|(flag, count)| (Flagged(&flow.key, flag.as_str()), count))
        });
        counter(&mut encoder, "istio_tcp_connections_closed", "TCP connections closed", closed)?;
        let help = "Bytes that servers sent to clients";
        counter(&mut encoder, "istio_tcp_sent_bytes", help, of_flow(|counts| &counts.sent))?;
        let help = "Bytes that servers received from clients";
        counter(&mut encoder, "istio_tcp_received_bytes", help, of_flow(|counts| &counts.received))?;

        let of_side = |value: fn(&Share) -> &AtomicU64| {
            sides.iter().map(move |side| ((*side.key).clone(), read(value(&side.value))))
        };
        let help = "Connections of this node's workloads, by mode: their mTLS coverage";
        counter(&mut encoder, "marline_workload_connections", help, of_side(|share| &share.connections))?;
        let help = "Bytes of this node's workloads, both ways, by mode: their mTLS coverage";
        counter(&mut encoder, "marline_workload_bytes", help, of_side(|share| &share.bytes))?;
        coverage(&mut encoder, &sides)?;

        let denied = denials.iter().map(|denial| ((*denial.key).clone(), read(&denial.value)));
        counter(&mut encoder, "marline_policy_denials", "Connections that policy refused", denied)?;
        let updates = ["sent", "received"].into_iter().zip(self.key_updates.iter().map(read));
        let updates = updates.map(|(direction, count)| ([("direction", direction)], count));
        counter(&mut encoder, "marline_key_updates", "TLS keys that were changed on live connections", updates)?;
        let tables = [
            ("flows", self.flows.overflowed(), self.flows.len()),
            ("workloads", self.sides.overflowed(), self.sides.len()),
            ("denials", self.denials.overflowed(), self.denials.len()),
        ];
        let overflowed = tables.iter().map(|(table, count, _)| ([("table", *table)], *count));
        let help = "Connections that were counted as `other`, because there were too many combinations of labels";
        counter(&mut encoder, "marline_metrics_overflowed", help, overflowed)?;
        let sizes = tables.iter().map(|(table, _, size)| ([("table", *table)], *size as f64));
        gauge(&mut encoder, "marline_metrics_label_sets", "Combinations of labels that are counted", sizes)?;
        let help = "Connections that were opened and not closed yet";
        single(&mut encoder, "marline_connections_live", help, self.live() as f64)
    }
}

/// The share of mTLS among the connections that are open now, for each workload that has any.
fn coverage(encoder: &mut DescriptorEncoder<'_>, sides: &[Arc<Entry<Side, Share>>]) -> Result<(), fmt::Error> {
    let mut live: BTreeMap<(&str, &str), (u64, u64)> = BTreeMap::new();
    for side in sides {
        let (of_mtls, of_all) = live.entry((&side.key.namespace, &side.key.workload)).or_default();
        let count = read(&side.value.live);
        *of_all += count;
        if side.key.mode == Mode::Mtls.as_str() {
            *of_mtls += count;
        }
    }
    let ratios = live.into_iter().filter(|(_, (_, all))| *all > 0).map(|((namespace, workload), (mtls, all))| {
        ([("namespace", namespace.to_owned()), ("workload", workload.to_owned())], mtls as f64 / all as f64)
    });
    let help = "Share of mTLS among the connections of this node's workloads that are open now";
    gauge(encoder, "marline_mtls_coverage_ratio", help, ratios)
}

pub(super) fn counter<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (L, u64)>,
) -> Result<(), fmt::Error> {
    let help = format!("{help}.");
    let mut metric = encoder.encode_descriptor(name, &help, None, MetricType::Counter)?;
    for (labels, value) in samples {
        metric.encode_family(&labels)?.encode_counter::<NoLabelSet, _, u64>(&value, None)?;
    }
    Ok(())
}

pub(super) fn gauge<L: EncodeLabelSet>(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    samples: impl Iterator<Item = (L, f64)>,
) -> Result<(), fmt::Error> {
    let help = format!("{help}.");
    let mut metric = encoder.encode_descriptor(name, &help, None, MetricType::Gauge)?;
    for (labels, value) in samples {
        metric.encode_family(&labels)?.encode_gauge(&value)?;
    }
    Ok(())
}

pub(super) fn single(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    value: f64,
) -> Result<(), fmt::Error> {
    encoder.encode_descriptor(name, &format!("{help}."), None, MetricType::Gauge)?.encode_gauge(&value)
}

fn add(counter: &AtomicU64, count: u64) {
    counter.fetch_add(count, Ordering::Relaxed);
}

fn read(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

#[cfg(test)]
mod tests;
