//! Adding up: from looks at the connections to rows with rates and totals. Pure.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    time::Instant,
};

use clap::ValueEnum;
use serde::Serialize;

use super::super::connections::model::Connection;
use crate::words::{Direction, Endpoint};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Sort {
    #[default]
    Rate,
    Total,
    Connections,
    Name,
}

impl Sort {
    pub(super) fn next(self) -> Self {
        match self {
            Self::Rate => Self::Total,
            Self::Total => Self::Connections,
            Self::Connections => Self::Name,
            Self::Name => Self::Rate,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::Total => "total",
            Self::Connections => "connections",
            Self::Name => "name",
        }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(in crate::cli) enum Grouping {
    /// From one workload to a port of another
    #[default]
    Flow,
    /// All of one workload
    Workload,
}

/// One line. Bytes per second; `sent` is what this node's pod has sent.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub(super) struct Row {
    pub(super) direction: String,
    pub(super) source: String,
    /// Empty where rows are workloads.
    pub(super) destination: String,
    /// `mtls`, `plaintext`, `none` where it did not come so far; `mixed` where rows are workloads and have both.
    pub(super) mode: String,
    pub(super) path: String,
    /// That live now.
    pub(super) connections: u64,
    pub(super) sent_rate: f64,
    pub(super) received_rate: f64,
    pub(super) sent: u64,
    pub(super) received: u64,
    /// Since the start of the command.
    pub(super) refused: u64,
}

type Key = (String, String, String, String, String);

#[derive(Clone, Debug, Default)]
struct Known {
    key: Key,
    sent: u64,
    received: u64,
}

/// What has been seen so far.
pub(super) struct Model {
    by: Grouping,
    last: Option<Instant>,
    live: HashMap<u64, Known>,
    gone: HashSet<u64>,
    /// Rows as they are, and as they are shown: these stand still in a pause.
    rows: BTreeMap<Key, Row>,
    shown: Vec<Row>,
}

impl Model {
    pub(super) fn new(by: Grouping) -> Self {
        let (live, gone, rows) = Default::default();
        Self { by, last: None, live, gone, rows, shown: Vec::new() }
    }

    /// Adds a look at all connections.
    pub(super) fn take(&mut self, at: Instant, live: &[Connection], ended: &[Connection], show: bool) {
        let first = self.last.is_none();
        let seconds = self.last.map_or(0.0, |last| at.saturating_duration_since(last).as_secs_f64());
        self.last = Some(at);
        for row in self.rows.values_mut() {
            (row.connections, row.sent_rate, row.received_rate) = (0, 0.0, 0.0);
        }
        // What had ended before this command began is none of its business.
        let gone = std::mem::replace(&mut self.gone, ended.iter().map(|one| one.id).collect());
        for one in ended.iter().filter(|one| !first && !gone.contains(&one.id)) {
            let known = self.live.remove(&one.id);
            self.add(one, known, seconds);
            if one.verdict.as_deref() == Some("refused") {
                self.rows.entry(key(one)).or_default().refused += 1;
            }
        }
        let mut now = HashMap::with_capacity(live.len());
        for one in live {
            // It has ended between the two questions, and is counted already.
            if self.gone.contains(&one.id) {
                continue;
            }
            let known = self.live.remove(&one.id);
            let known = self.add(one, known, seconds);
            if let Some(row) = self.rows.get_mut(&known.key) {
                row.connections += 1;
            }
            now.insert(one.id, known);
        }
        self.live = now;
        if show {
            self.show();
        }
    }

    fn add(&mut self, one: &Connection, known: Option<Known>, seconds: f64) -> Known {
        // What a connection is may be learned while it lives: what it has moved until then is where it was counted.
        let key = key(one);
        let before = known.unwrap_or_default();
        let sent = one.bytes_sent.saturating_sub(before.sent);
        let received = one.bytes_received.saturating_sub(before.received);
        let row = self.rows.entry(key.clone()).or_insert_with(|| row(&key));
        row.sent += sent;
        row.received += received;
        if seconds > 0.0 {
            row.sent_rate += sent as f64 / seconds;
            row.received_rate += received as f64 / seconds;
        }
        Known { key, sent: one.bytes_sent, received: one.bytes_received }
    }

    /// What is shown is what is known now.
    pub(super) fn show(&mut self) {
        self.shown = match self.by {
            Grouping::Flow => self.rows.values().cloned().collect(),
            Grouping::Workload => by_workload(self.rows.values()),
        };
    }

    pub(super) fn regroup(&mut self) {
        self.by = if self.by == Grouping::Flow { Grouping::Workload } else { Grouping::Flow };
        self.show();
    }

    pub(super) fn by(&self) -> Grouping {
        self.by
    }

    /// Those that have the text somewhere, in order.
    pub(super) fn rows(&self, sort: Sort, reverse: bool, filter: &str) -> Vec<Row> {
        let has = |row: &&Row| [&row.source, &row.destination, &row.mode, &row.path].iter().any(|t| t.contains(filter));
        let mut rows: Vec<Row> = self.shown.iter().filter(has).cloned().collect();
        let name = |row: &Row| (row.source.clone(), row.destination.clone());
        rows.sort_by(|a, b| match sort {
            Sort::Rate => (b.sent_rate + b.received_rate)
                .total_cmp(&(a.sent_rate + a.received_rate))
                .then_with(|| name(a).cmp(&name(b))),
            Sort::Total => (b.sent + b.received).cmp(&(a.sent + a.received)).then_with(|| name(a).cmp(&name(b))),
            Sort::Connections => b.connections.cmp(&a.connections).then_with(|| name(a).cmp(&name(b))),
            Sort::Name => name(a).cmp(&name(b)),
        });
        if reverse {
            rows.reverse();
        }
        rows
    }

    /// The share of the bytes that went under mTLS, of all that were seen. None if there were none.
    pub(super) fn coverage(&self) -> Option<f64> {
        let bytes = |row: &Row| (row.sent + row.received) as f64;
        let all: f64 = self.rows.values().map(bytes).sum();
        let sealed: f64 = self.rows.values().filter(|row| row.mode == "mtls").map(bytes).sum();
        (all > 0.0).then(|| sealed / all)
    }
}

fn key(one: &Connection) -> Key {
    let port = one.destination.address.map_or_else(String::new, |address| format!(":{}", address.port()));
    (
        if one.direction == Direction::Outbound { "out" } else { "in" }.to_owned(),
        name(&one.source),
        format!("{}{port}", name(&one.destination)),
        one.mode.clone().unwrap_or_else(|| "none".into()),
        one.path.clone().unwrap_or_else(|| "-".into()),
    )
}

fn name(end: &Endpoint) -> String {
    match (&end.namespace, &end.workload, end.address) {
        (Some(namespace), Some(workload), _) => format!("{namespace}/{workload}"),
        (.., Some(address)) => address.ip().to_string(),
        _ => "?".to_owned(),
    }
}

fn row(key: &Key) -> Row {
    let (direction, source, destination, mode, path) = key.clone();
    Row { direction, source, destination, mode, path, ..Row::default() }
}

/// Each workload of this node with all that it does: of connections that come in it is the destination.
fn by_workload<'a>(rows: impl Iterator<Item = &'a Row>) -> Vec<Row> {
    let mut all: BTreeMap<String, Row> = BTreeMap::new();
    for one in rows {
        let local = match one.direction.as_str() {
            "in" => one.destination.rsplit_once(':').map_or(one.destination.as_str(), |(name, _)| name),
            _ => one.source.as_str(),
        };
        let row = all.entry(local.to_owned()).or_insert_with(|| Row {
            direction: "-".into(),
            source: local.to_owned(),
            mode: one.mode.clone(),
            path: one.path.clone(),
            ..Row::default()
        });
        if row.mode != one.mode {
            row.mode = "mixed".into();
        }
        if row.path != one.path {
            row.path = "mixed".into();
        }
        row.connections += one.connections;
        row.sent += one.sent;
        row.received += one.received;
        row.sent_rate += one.sent_rate;
        row.received_rate += one.received_rate;
        row.refused += one.refused;
    }
    all.into_values().collect()
}

#[cfg(test)]
pub(super) mod tests {
    use std::time::Duration;

    use super::{super::super::connections::model::tests::sample, *};

    pub(in super::super) fn one(id: u64, sent: u64, received: u64) -> Connection {
        Connection { id, bytes_sent: sent, bytes_received: received, ..sample() }
    }

    #[test]
    fn rates_are_of_the_time_between_two_looks_and_totals_of_all_time() {
        let (start, mut model) = (Instant::now(), Model::new(Grouping::Flow));
        model.take(start, &[one(1, 1000, 0)], &[], true);
        let row = model.rows(Sort::Rate, false, "").remove(0);
        assert_eq!((row.sent, row.sent_rate, row.connections), (1000, 0.0, 1));
        model.take(start + Duration::from_secs(2), &[one(1, 5000, 10), one(2, 2000, 0)], &[], true);
        let row = model.rows(Sort::Rate, false, "").remove(0);
        assert_eq!((row.sent, row.received, row.connections), (7000, 10, 2));
        assert_eq!((row.sent_rate, row.received_rate), (3000.0, 5.0));
    }

    #[test]
    fn what_ends_between_two_looks_is_counted_once_to_its_last_byte() {
        let (start, mut model) = (Instant::now(), Model::new(Grouping::Flow));
        model.take(start, &[one(1, 100, 0)], &[one(9, 77, 77)], true);
        let at = |seconds| start + Duration::from_secs(seconds);
        let ended = [one(9, 77, 77), one(1, 150, 0), Connection { verdict: Some("refused".into()), ..one(3, 20, 0) }];
        model.take(at(1), &[], &ended, true);
        model.take(at(2), &[], &ended, true);
        let row = model.rows(Sort::Rate, false, "").remove(0);
        assert_eq!((row.sent, row.received, row.connections, row.refused), (170, 0, 0, 1));
        assert_eq!(row.sent_rate, 0.0);
    }

    #[test]
    fn a_pause_hides_and_does_not_lose() {
        let (start, mut model) = (Instant::now(), Model::new(Grouping::Flow));
        model.take(start, &[one(1, 100, 0)], &[], true);
        model.take(start + Duration::from_secs(1), &[one(1, 900, 0)], &[], false);
        assert_eq!(model.rows(Sort::Rate, false, "")[0].sent, 100);
        model.show();
        assert_eq!(model.rows(Sort::Rate, false, "")[0].sent, 900);
    }

    #[test]
    fn workloads_add_up_what_they_do_at_either_end_and_say_if_modes_differ() {
        let mut model = Model::new(Grouping::Workload);
        let inbound = Connection {
            direction: Direction::Inbound,
            source: sample().destination,
            destination: sample().source,
            mode: Some("plaintext".into()),
            ..one(2, 7, 5)
        };
        model.take(Instant::now(), &[one(1, 10, 1), inbound], &[], true);
        let rows = model.rows(Sort::Name, false, "client");
        assert_eq!(rows.len(), 1, "{rows:?}");
        assert_eq!((rows[0].sent, rows[0].received, rows[0].mode.as_str()), (17, 6, "mixed"));
        assert!((model.coverage().unwrap() - 11.0 / 23.0).abs() < 1e-9);
    }

    #[test]
    fn rows_are_filtered_and_sorted() {
        let mut model = Model::new(Grouping::Flow);
        let mut other = one(2, 99, 0);
        other.source.workload = Some("another".into());
        model.take(Instant::now(), &[one(1, 10, 1), other], &[], true);
        let names = |rows: Vec<Row>| rows.into_iter().map(|row| row.source).collect::<Vec<_>>();
        assert_eq!(names(model.rows(Sort::Total, false, "")), ["demo/another", "demo/client"]);
        assert_eq!(names(model.rows(Sort::Total, true, "")), ["demo/client", "demo/another"]);
        assert_eq!(names(model.rows(Sort::Total, false, "client")), ["demo/client"]);
        assert_eq!(names(model.rows(Sort::Total, false, "nothing")), [""; 0]);
    }
}
