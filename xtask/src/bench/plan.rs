//! What is measured: the workloads, small or not, and the figures that each answer of the load program amounts to.

use marline_tests::bench::{Answer, Latencies, Work};
use serde::{Deserialize, Serialize};

/// One workload under a name for people.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub name: String,
    pub work: Work,
    kind: Kind,
}

#[derive(Clone, Copy, Debug)]
enum Kind {
    /// Time on this machine.
    Timed,
    /// In the VM where time is instructions.
    Counted,
}

/// What a figure is called, and in what it is counted.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) struct Figure {
    pub workload: String,
    pub name: String,
    pub unit: String,
}

/// The part of the processor time that the mesh's own programs take goes by these names.
pub(super) const AGENTS: &str = "agent";

/// On this machine, in time.
pub(super) fn timed(quick: bool) -> Vec<Workload> {
    let (one, many, seconds, bytes) = if quick { (300, 600, 3, 500_000_000) } else { (1000, 2000, 10, 2_000_000_000) };
    let at_once = 8;
    let (rate, connections) = (1000, 16);
    let workload = |name: String, work| Workload { name, work, kind: Kind::Timed };
    vec![
        workload("new connection to first byte".into(), Work::Connect { count: one, at_once: 1 }),
        workload(format!("new connection to first byte, {at_once} at once"), Work::Connect { count: many, at_once }),
        workload(format!("1 KB request/response, {rate}/s due"), Work::Requests { rate, connections, seconds }),
        workload("bulk, one way".into(), Work::Bulk { bytes }),
    ]
}

/// In the VM, in instructions.
pub(super) fn counted(quick: bool) -> Vec<Workload> {
    let (connections, requests, bytes) = if quick { (50, 500, 16_000_000) } else { (150, 2000, 64_000_000) };
    let workload = |name: &str, work| Workload { name: name.into(), work, kind: Kind::Counted };
    vec![
        workload("new connection, one request", Work::Connect { count: connections, at_once: 1 }),
        workload("1 KB request/response", Work::Exchanges { count: requests }),
        workload("bulk, one way", Work::Bulk { bytes }),
    ]
}

impl Workload {
    pub(super) fn figures(&self, answer: &Answer) -> Vec<(Figure, f64)> {
        let mut figures = Vec::new();
        let mut add = |name: &str, unit: &str, value: f64| {
            let (name, unit) = (name.to_owned(), unit.to_owned());
            figures.push((Figure { workload: self.name.clone(), name, unit }, value));
        };
        match self.kind {
            Kind::Timed => self.times(answer, &mut add),
            Kind::Counted => self.instructions(answer, &mut add),
        }
        figures
    }

    fn times(&self, answer: &Answer, add: &mut impl FnMut(&str, &str, f64)) {
        let latencies = answer.latencies.as_ref();
        let mut latency = |name: &str, of: fn(&Latencies) -> f64| {
            if let Some(latencies) = latencies {
                add(name, "us", of(latencies));
            }
        };
        latency("p50", |l| l.p50);
        if matches!(self.work, Work::Requests { .. }) {
            latency("p90", |l| l.p90);
        }
        latency("p99", |l| l.p99);
        if matches!(self.work, Work::Requests { .. }) {
            latency("p99.9", |l| l.p999);
        }
        if let Some(late) = &answer.late {
            add("sent late, p99", "us", late.p99);
        }
        let (count, each, scale) = match self.work {
            Work::Connect { count, .. } | Work::Exchanges { count } => (f64::from(count), "request", 1e6),
            Work::Requests { .. } => (latencies.map_or(0.0, |l| l.count as f64), "request", 1e6),
            Work::Bulk { bytes } => (bytes as f64 / 1e9, "GB", 1.0),
        };
        match self.work {
            Work::Connect { at_once, .. } if at_once > 1 => add("rate", "1/s", count / answer.seconds),
            Work::Bulk { .. } => add("throughput", "Gbit/s", 8.0 * count / answer.seconds),
            _ => {}
        }
        let unit = if scale > 1.0 { format!("us/{each}") } else { format!("s/{each}") };
        if matches!(self.work, Work::Bulk { .. }) {
            add("CPU, whole machine", &unit, scale * answer.spent.machine / count);
        }
        add("CPU, pods and agents", &unit, scale * answer.spent.by_watched() / count);
        if let Some(agents) = agents(answer) {
            add("CPU, agents alone", &unit, scale * agents / count);
        }
    }

    fn instructions(&self, answer: &Answer, add: &mut impl FnMut(&str, &str, f64)) {
        let (count, each, scale) = match self.work {
            Work::Connect { count, .. } => (f64::from(count), "connection", 1e6),
            Work::Exchanges { count } => (f64::from(count), "request", 1e6),
            Work::Requests { .. } => (answer.latencies.as_ref().map_or(0.0, |l| l.count as f64), "request", 1e6),
            Work::Bulk { bytes } => (bytes as f64 / 1e6, "MB", 1e6),
        };
        // A nanosecond is an instruction, and the one processor is never idle: each of these workloads is one chain of causes.
        let unit = format!("thousand/{each}");
        add("instructions, all", &unit, scale * answer.seconds / count);
        if let Some(agents) = agents(answer) {
            add("instructions, agents alone", &unit, scale * agents / count);
        }
    }
}

/// Nothing where there are none.
fn agents(answer: &Answer) -> Option<f64> {
    let theirs = || answer.spent.watched.iter().filter(|(name, _)| name.starts_with(AGENTS)).map(|(_, spent)| spent);
    theirs().next().map(|_| theirs().sum())
}
