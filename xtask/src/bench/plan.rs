//! What is measured: the workloads, small or not, and the figures that each answer of the load program amounts to.

pub(super) use marline_tests::bench::AGENTS;
use marline_tests::bench::{Answer, Work};
use serde::{Deserialize, Serialize};

use super::bed::Mode;

/// One workload under a name for people.
#[derive(Clone, Debug)]
pub(super) struct Workload {
    pub name: String,
    pub work: Work,
    /// Measured in the first round alone, and before the others: it takes long, or it needs proxies that nobody has used yet.
    pub once: bool,
    /// The work during which system calls are counted, in a pass of its own.
    pub trace: Option<Work>,
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

impl Figure {
    /// Of most figures less is better.
    pub(super) fn more_is_better(&self) -> bool {
        matches!(self.unit.as_str(), "1/s" | "Gbit/s")
    }
}

/// How much of everything there is.
struct Sizes {
    one: u32,
    many: u32,
    seconds: u32,
    bytes: u64,
    idle: u32,
    idle_seconds: u32,
}

const QUICK: Sizes = Sizes { one: 200, many: 600, seconds: 1, bytes: 250_000_000, idle: 1000, idle_seconds: 2 };
const WHOLE: Sizes = Sizes { one: 800, many: 2000, seconds: 4, bytes: 1_500_000_000, idle: 10_000, idle_seconds: 10 };

/// So many new connections come in a second where they come one by one: enough to be expected, and no load.
const ARRIVALS: u32 = 100;
/// So many pods a full node has: the kubelet's default is 110.
pub(super) const PODS: u8 = 100;
/// Over so many connections requests come.
const CONNECTIONS: u32 = 16;
/// So many new connections are there at once where there are many.
const AT_ONCE: u32 = 32;

/// So many idle connections a proxy can have that may open so many files: each is two, and there are others.
fn idle_at_most(files: u64) -> u32 {
    u32::try_from(files.saturating_sub(2000) / 2).unwrap_or(u32::MAX)
}

/// On this machine, in time, with proxies that may open so many files.
pub(super) fn timed(quick: bool, files: u64) -> Vec<Workload> {
    let mut size = if quick { QUICK } else { WHOLE };
    size.idle = size.idle.min(idle_at_most(files));
    let workload = |name: String, work| Workload { name, work, once: false, trace: None, kind: Kind::Timed };
    let once = |name: String, work| Workload { once: true, ..workload(name, work) };
    let traced = |name: String, work, trace| Workload { trace: Some(trace), ..workload(name, work) };
    let requests = |rate| {
        let work = |seconds| Work::Requests { rate, connections: CONNECTIONS, seconds };
        traced(format!("1 KB request/response, {rate}/s due"), work(size.seconds), work(1))
    };
    let bulk = |streams| {
        let name = if streams == 1 { "bulk, one way".to_owned() } else { format!("bulk, one way, {streams} streams") };
        traced(name, Work::Bulk { bytes: size.bytes, streams }, Work::Bulk { bytes: 100_000_000, streams })
    };
    let connect = |name: String, count, at_once| {
        traced(name, Work::Connect { count, at_once }, Work::Connect { count: 100, at_once })
    };
    vec![
        once("at rest".into(), Work::Idle { connections: 0, seconds: 1 }),
        once(
            format!("{} idle connections", size.idle),
            Work::Idle { connections: size.idle, seconds: size.idle_seconds },
        ),
        connect("new connection to first byte".into(), size.one, 1),
        connect(format!("new connection to first byte, {AT_ONCE} at once"), size.many, AT_ONCE),
        traced(
            format!("new connection to answer, {ARRIVALS}/s due"),
            Work::Arrivals { rate: ARRIVALS, seconds: 2 * size.seconds },
            Work::Arrivals { rate: ARRIVALS, seconds: 1 },
        ),
        requests(1000),
        requests(3200),
        bulk(1),
        bulk(8),
        bulk(64),
    ]
}

/// In the VM, in instructions.
pub(super) fn counted(quick: bool) -> Vec<Workload> {
    let (connections, requests, bytes) = if quick { (50, 500, 16_000_000) } else { (150, 2000, 64_000_000) };
    let workload =
        |name: &str, work| Workload { name: name.into(), work, once: false, trace: None, kind: Kind::Counted };
    vec![
        workload("new connection, one request", Work::Connect { count: connections, at_once: 1 }),
        workload("1 KB request/response", Work::Exchanges { count: requests }),
        workload("bulk, one way", Work::Bulk { bytes, streams: 1 }),
    ]
}

impl Workload {
    /// Whether it tells anything in a mode: where there is no proxy, there is nothing to be said of one.
    pub(super) fn belongs_to(&self, mode: Mode) -> bool {
        mode != Mode::None || !matches!(self.work, Work::Idle { .. })
    }

    pub(super) fn figures(&self, mode: Mode, answer: &Answer) -> Vec<(Figure, f64)> {
        let mut figures = Vec::new();
        let mut add = |name: &str, unit: &str, value: f64| figures.push((self.figure(name, unit), value));
        match (self.kind, self.work) {
            (Kind::Timed, Work::Idle { connections, .. }) => idle(connections, answer, &mut add),
            (Kind::Timed, _) => self.times(mode, answer, &mut add),
            (Kind::Counted, _) => self.instructions(answer, &mut add),
        }
        figures
    }

    /// What a pass with counted system calls amounts to.
    pub(super) fn calls(&self, answer: &Answer) -> Option<(Figure, f64)> {
        let (amount, each) = amount(self.trace?, answer);
        let (amount, each) = small(amount, each);
        Some((self.figure("system calls, proxies", &format!("1/{each}")), answer.calls? as f64 / amount))
    }

    fn figure(&self, name: &str, unit: &str) -> Figure {
        Figure { workload: self.name.clone(), name: name.to_owned(), unit: unit.to_owned() }
    }

    fn times(&self, mode: Mode, answer: &Answer, add: &mut impl FnMut(&str, &str, f64)) {
        if let Some(latencies) = &answer.latencies {
            let all =
                [("p50", latencies.p50), ("p90", latencies.p90), ("p99", latencies.p99), ("p99.9", latencies.p999)];
            // Of a few hundred connections the extremes are single ones.
            let few = !matches!(self.work, Work::Requests { .. });
            let wanted = |name| !few || matches!(name, "p50" | "p99");
            all.into_iter().filter(|(name, _)| wanted(*name)).for_each(|(name, value)| add(name, "us", value));
        }
        if let Some(late) = &answer.late {
            add("sent late, p99", "us", late.p99);
        }
        let (amount, each) = amount(self.work, answer);
        let proxies = proxies(answer);
        match self.work {
            Work::Connect { at_once, .. } if at_once > 1 => {
                add("rate", "1/s", amount / answer.seconds);
                if let Some(spent) = proxies.filter(|spent| *spent > 0.0 && has_a_handshake_each(mode)) {
                    add("handshakes per core-second of the proxies", "1/s", amount / spent);
                }
            }
            Work::Bulk { .. } => add("throughput", "Gbit/s", 8.0 * amount / answer.seconds),
            _ => {}
        }
        let (unit, scale) = if each == "GB" { ("s/GB", 1.0) } else { ("us/request", 1e6) };
        if matches!(self.work, Work::Bulk { .. }) {
            add("CPU, whole machine", unit, scale * answer.spent.machine / amount);
        }
        add("CPU, pods and proxies", unit, scale * answer.spent.by_watched() / amount);
        if let Some(spent) = proxies {
            add("CPU, proxies alone", unit, scale * spent / amount);
        }
        if let Some(switches) = switches(answer) {
            let (amount, each) = small(amount, each);
            add("context switches, proxies", &format!("1/{each}"), switches as f64 / amount);
        }
    }

    fn instructions(&self, answer: &Answer, add: &mut impl FnMut(&str, &str, f64)) {
        let (amount, each) = small_of(self.work, answer);
        let each = if matches!(self.work, Work::Connect { .. }) { "connection" } else { each };
        // A nanosecond is an instruction, and the one processor is never idle: each of these workloads is one chain of causes.
        let unit = format!("thousand/{each}");
        add("instructions, all", &unit, 1e6 * answer.seconds / amount);
        if let Some(spent) = proxies(answer) {
            add("instructions, proxies alone", &unit, 1e6 * spent / amount);
        }
        if let Some(switches) = switches(answer) {
            add("context switches, proxies", &format!("1/{each}"), switches as f64 / amount);
        }
    }
}

fn idle(connections: u32, answer: &Answer, add: &mut impl FnMut(&str, &str, f64)) {
    const KIB: f64 = 1024.0;
    let Some(memory) = answer.memory else { return };
    if connections > 0 {
        // Memory that was given back meanwhile makes less than nothing of it, and is told as that.
        let each = (memory.then as f64 - memory.before as f64) / f64::from(connections);
        add("memory of the proxies for each", "KiB", each / KIB);
    }
    add("memory of all proxies", "MiB", memory.then as f64 / (KIB * KIB));
    if let Some(spent) = proxies(answer) {
        add("CPU, proxies alone", "ms/s", 1e3 * spent / answer.seconds);
    }
}

/// How much was done, in what amounts processor time is told in.
fn amount(work: Work, answer: &Answer) -> (f64, &'static str) {
    match work {
        Work::Connect { count, .. } | Work::Exchanges { count } => (f64::from(count), "request"),
        Work::Requests { .. } | Work::Arrivals { .. } => {
            (answer.latencies.as_ref().map_or(0.0, |l| l.count as f64), "request")
        }
        Work::Bulk { bytes, .. } => (bytes as f64 / 1e9, "GB"),
        Work::Idle { connections, .. } => (f64::from(connections), "connection"),
    }
}

/// The same in amounts that events are told in.
fn small(amount: f64, each: &'static str) -> (f64, &'static str) {
    if each == "GB" { (1000.0 * amount, "MB") } else { (amount, each) }
}

fn small_of(work: Work, answer: &Answer) -> (f64, &'static str) {
    let (amount, each) = amount(work, answer);
    small(amount, each)
}

/// Sidecars that read requests send those of many connections over few; of a proxy that somebody brings nobody knows.
fn has_a_handshake_each(mode: Mode) -> bool {
    !matches!(mode, Mode::None | Mode::SidecarHttp | Mode::External)
}

/// Processor seconds of the proxies; nothing where there are none.
fn proxies(answer: &Answer) -> Option<f64> {
    let theirs = || answer.spent.watched.iter().filter(|(name, _)| name.starts_with(AGENTS)).map(|(_, spent)| spent);
    theirs().next().map(|_| theirs().sum())
}

/// Nothing where there are none, or where one's are unknown.
fn switches(answer: &Answer) -> Option<u64> {
    proxies(answer)?;
    let names = answer.spent.watched.keys().filter(|name| name.starts_with(AGENTS));
    names.map(|name| answer.spent.switches.get(name)).sum()
}

#[cfg(test)]
mod tests {
    use marline_tests::bench::{Memory, Spent};

    use super::*;

    fn answer(proxies: &[(&str, f64, Option<u64>)]) -> Answer {
        let mut spent = Spent { machine: 3.0, idle: 1.0, ..Spent::default() };
        spent.watched.insert("client".into(), 1.0);
        for (name, seconds, switches) in proxies {
            spent.watched.insert((*name).to_owned(), *seconds);
            spent.switches.extend(switches.map(|count| ((*name).to_owned(), count)));
        }
        Answer { seconds: 2.0, latencies: None, late: None, spent, memory: None, calls: None }
    }

    fn value(figures: &[(Figure, f64)], name: &str, unit: &str) -> Option<f64> {
        figures.iter().find(|(figure, _)| figure.name == name && figure.unit == unit).map(|(_, value)| *value)
    }

    fn workload(name: &str) -> Workload {
        timed(true, 1 << 18).into_iter().find(|workload| workload.name.contains(name)).unwrap()
    }

    #[test]
    fn there_are_no_more_idle_connections_than_proxies_may_open() {
        let name = |files| timed(false, files).swap_remove(1).name;
        assert_eq!([name(1 << 18), name(20_000)], ["10000 idle connections", "9000 idle connections"]);
    }

    #[test]
    fn handshakes_are_told_only_where_each_connection_has_one() {
        let (work, answer) = (workload("32 at once"), answer(&[("agent A", 0.1, None), ("agent B", 0.2, None)]));
        let of = |mode| value(&work.figures(mode, &answer), "handshakes per core-second of the proxies", "1/s");
        assert!(of(Mode::Proxied).is_some_and(|rate| (rate - 2000.0).abs() < 1e-6));
        assert_eq!(of(Mode::SidecarHttp), None);
    }

    #[test]
    fn switches_of_which_one_part_is_unknown_are_no_figure() {
        let work = workload("64 streams");
        let of = |b| {
            let answer = answer(&[("agent A", 0.1, Some(500)), ("agent B", 0.2, b)]);
            value(&work.figures(Mode::Proxied, &answer), "context switches, proxies", "1/MB")
        };
        assert_eq!(of(Some(250)), Some(3.0));
        assert_eq!(of(None), None);
    }

    #[test]
    fn an_idle_connection_costs_what_came_on_top() {
        let work = workload("1000 idle");
        let memory = Some(Memory { before: 1024 * 1024, then: 5 * 1024 * 1024 });
        let figures = work.figures(Mode::Proxied, &Answer { memory, ..answer(&[("agent A", 0.1, None)]) });
        assert_eq!(value(&figures, "memory of the proxies for each", "KiB"), Some(4.096));
        assert_eq!(value(&figures, "CPU, proxies alone", "ms/s"), Some(50.0));
        assert!(work.belongs_to(Mode::Proxied) && !work.belongs_to(Mode::None));
    }

    #[test]
    fn calls_are_told_by_what_was_done_while_they_were_counted() {
        let counted = Answer { calls: Some(500), ..answer(&[]) };
        let of = |name| workload(name).calls(&counted).map(|(figure, value)| (figure.unit, value));
        assert_eq!(of("64 streams"), Some(("1/MB".to_owned(), 5.0)));
        assert_eq!(of("to first byte"), Some(("1/request".to_owned(), 5.0)));
        assert_eq!(workload("64 streams").calls(&answer(&[])), None);
    }
}
