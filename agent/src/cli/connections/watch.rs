//! `marline connections --watch`: a line for each connection that comes and goes.

use std::{collections::HashSet, io::Write as _};

use super::{
    super::{
        client::Client,
        table::{Colour, age, bytes, plain},
    },
    ConnectionsArgs, mode_paint,
    model::{Connection, Fetched, end},
};

/// Until the reader or the agent is gone.
pub(super) fn run(args: &ConnectionsArgs) -> Result<(), String> {
    let client = Client::new(args.admin.admin).map_err(|error| error.to_string())?;
    let colour = Colour::of_stdout();
    let mut changes = Changes::default();
    // What has ended before is no change.
    changes.ended(Fetched::ended(&client).map_err(|error| error.to_string())?);
    loop {
        // In this order none is missed: one that ends is among the ended before it leaves those that live.
        let live = Fetched::live(&client).map_err(|error| error.to_string())?;
        let ended = Fetched::ended(&client).map_err(|error| error.to_string())?;
        let mut lines: Vec<(&str, Connection)> = changes.opened(live).into_iter().map(|one| ("opened", one)).collect();
        lines.extend(changes.ended(ended).into_iter().map(|one| ("closed", one)));
        for (event, one) in lines.iter().filter(|(_, one)| args.filter.lets(one)) {
            let line = match args.admin.json {
                true => serde_json::json!({ "event": event, "connection": one }).to_string(),
                false => told(event, one, colour),
            };
            let mut out = std::io::stdout().lock();
            if writeln!(out, "{line}").and_then(|()| out.flush()).is_err() {
                return Ok(());
            }
        }
        std::thread::sleep(args.interval);
    }
}

/// Which of two looks have what the one before had not.
#[derive(Default)]
struct Changes {
    /// Connections that were told to live.
    live: HashSet<u64>,
    gone: HashSet<u64>,
}

impl Changes {
    /// One is told when it is known what it is, or else when it ends.
    fn opened(&mut self, live: Vec<Connection>) -> Vec<Connection> {
        live.into_iter()
            .filter(|one| {
                let decided = one.mode.is_some();
                decided && self.live.insert(one.id)
            })
            .collect()
    }

    fn ended(&mut self, ended: Vec<Connection>) -> Vec<Connection> {
        let present: HashSet<u64> = ended.iter().map(|one| one.id).collect();
        let fresh = ended.into_iter().filter(|one| !self.gone.contains(&one.id)).collect::<Vec<_>>();
        for one in &fresh {
            self.live.remove(&one.id);
        }
        // Those that the agent has forgotten need not be remembered here.
        self.gone = present;
        fresh
    }
}

fn told(event: &str, one: &Connection, colour: Colour) -> String {
    let mode = one.mode.as_deref().unwrap_or("-");
    let way = if one.direction.as_str() == "outbound" { "out" } else { "in" };
    let head = format!(
        "{} {way:<3} {} -> {}",
        if event == "opened" { "+" } else { "-" },
        plain(&end(&one.source)),
        plain(&end(&one.destination))
    );
    let mode_text = colour.paint(&plain(mode), mode_paint(mode));
    let records = plain(one.records.as_deref().unwrap_or("-"));
    let path = plain(one.path.as_deref().unwrap_or("-"));
    match event {
        "opened" => format!("{head}  {mode_text} {records} {path} {}", plain(one.peer().unwrap_or("-"))),
        _ => format!(
            "{head}  {mode_text} {} sent, {} received in {}: {}",
            bytes(one.bytes_sent),
            bytes(one.bytes_received),
            age(one.age_ms),
            plain(one.close.as_deref().unwrap_or_default())
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::model::tests::sample, *};

    #[test]
    fn each_connection_is_told_once_when_it_comes_and_once_when_it_goes() {
        let with = |id| Connection { id, ..sample() };
        let ids = |all: Vec<Connection>| all.into_iter().map(|one| one.id).collect::<Vec<_>>();
        let mut changes = Changes::default();
        assert_eq!(ids(changes.ended(vec![with(1)])), [1]);
        assert_eq!(ids(changes.opened(vec![with(2), Connection { mode: None, ..with(3) }])), [2]);
        assert_eq!(ids(changes.opened(vec![with(2), with(3)])), [3]);
        assert_eq!(ids(changes.ended(vec![with(1), with(2), with(9)])), [2, 9], "also one that was never seen to live");
        assert_eq!(ids(changes.ended(vec![with(2), with(9)])), [0; 0], "the agent has forgotten the first");
    }

    #[test]
    fn nothing_that_a_name_or_a_reason_has_reaches_the_terminal_raw() {
        let mut one = sample();
        (one.source.workload, one.close) = (Some("a\x1b[2J".into()), Some("b\x1b]0;c\x07".into()));
        for event in ["opened", "closed"] {
            let line = told(event, &one, Colour::OFF);
            assert!(line.contains("a?[2J") && !line.chars().any(char::is_control), "{line:?}");
        }
    }
}
