//! `marline status`: is this node healthy? Asks the agent for facts, or, where none answers, looks from outside; `judge` says what they mean.

mod judge;
mod outside;

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use serde::Serialize;

use super::{
    WRONG_CONFIGURATION,
    client::{AdminArgs, Client, ClientError},
    table::{Colour, Paint, plain},
};
use crate::admin::status::Status;

#[derive(Args)]
#[command(after_long_help = "\
One line for each part of the node: ok, warn or FAIL, what was found, and the way out where there is something to mend.

Exit codes: 0 nothing fails (there may be warnings), 1 something fails, 2 no agent answers. Where none answers, what can be seen from
outside is shown: the kernel, the pods' cgroup, and whether a dead agent has left pods captured, which are closed then. With
--config the agent's files are read for that, too.

  marline status
  marline status --config /etc/marline          # more to see when no agent runs
  marline status --json | jq '.checks[] | select(.state != \"ok\")'")]
pub(super) struct StatusArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// The agent's configuration directory, to look at if no agent answers
    #[arg(long, value_name = "DIR", env = "MARLINE_CONFIG")]
    config: Option<PathBuf>,
}

/// How one part of the node stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(super) struct Check {
    /// Which part: these names do not change.
    pub(super) name: &'static str,
    pub(super) state: State,
    pub(super) text: String,
    /// What to do about it.
    pub(super) way_out: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum State {
    Ok,
    Warn,
    Fail,
}

/// What `--json` prints.
#[derive(Serialize)]
pub(super) struct Report {
    /// Nothing fails.
    pub(super) well: bool,
    /// Whether an agent has answered.
    pub(super) agent: bool,
    pub(super) checks: Vec<Check>,
    /// The agent's own words: see `/status`.
    pub(super) status: Option<Status>,
}

impl Check {
    pub(super) fn ok(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, state: State::Ok, text: text.into(), way_out: None }
    }

    pub(super) fn warn(name: &'static str, text: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { name, state: State::Warn, text: text.into(), way_out: Some(way_out.into()) }
    }

    pub(super) fn fail(name: &'static str, text: impl Into<String>, way_out: impl Into<String>) -> Self {
        Self { name, state: State::Fail, text: text.into(), way_out: Some(way_out.into()) }
    }
}

pub(super) fn run(args: &StatusArgs) -> ExitCode {
    let report = match Client::new(args.admin.admin) {
        Ok(client) => report(&client, args.config.as_deref()),
        Err(error) => {
            eprintln!("marline: {error}");
            return ExitCode::FAILURE;
        }
    };
    if args.admin.json {
        super::print(&format!("{}\n", serde_json::json!(report)));
    } else {
        super::print(&text(&report, Colour::of_stdout()));
    }
    match (report.agent, report.well) {
        (false, _) => ExitCode::from(WRONG_CONFIGURATION),
        (true, false) => ExitCode::FAILURE,
        (true, true) => ExitCode::SUCCESS,
    }
}

/// Asks, or looks from outside.
pub(super) fn report(client: &Client, config: Option<&std::path::Path>) -> Report {
    let (checks, status) = match client.json::<Status>("/status") {
        Ok(status) => {
            let mut checks = judge::judge(&status);
            checks.extend(listeners(client, &status));
            (checks, Some(status))
        }
        Err(error) => (outside::look(&error, config), None),
    };
    let well = checks.iter().all(|check| check.state < State::Fail);
    Report { well, agent: status.is_some(), checks, status }
}

/// Whether the other two addresses answer, too.
fn listeners(client: &Client, status: &Status) -> Vec<Check> {
    const NAME: &str = "listeners";
    let mut faults = Vec::new();
    for (field, address, path) in [
        ("spec.readiness.address", status.listeners.readiness, "/readyz"),
        ("spec.metrics.address", status.listeners.metrics, "/metrics"),
    ] {
        let mut asked = address;
        if address.ip().is_unspecified() {
            asked.set_ip(client.address().ip());
        }
        // Of port 0 only the log knows which it is.
        if address.port() != 0
            && let Err(ClientError::Silent { what, .. }) = client.get_at(asked, path)
        {
            faults.push(format!("{field} {asked}: {what}"));
        }
    }
    let all = &status.listeners;
    vec![match faults.as_slice() {
        [] => Check::ok(NAME, format!("admin {}, metrics {}, readiness {}", all.admin, all.metrics, all.readiness)),
        faults => Check::fail(
            NAME,
            faults.join("; "),
            "something on this node keeps them from being reached: look at its packet filter (nft list ruleset)",
        ),
    }]
}

fn text(report: &Report, colour: Colour) -> String {
    let mut out = String::new();
    for check in &report.checks {
        let (word, paint) = match check.state {
            State::Ok => ("ok  ", Paint::Good),
            State::Warn => ("warn", Paint::Warning),
            State::Fail => ("FAIL", Paint::Bad),
        };
        out.push_str(&format!("{}  {:<13}  {}\n", colour.paint(word, paint), check.name, plain(&check.text)));
        if let Some(way_out) = &check.way_out {
            out.push_str(&format!("                     -> {}\n", colour.paint(&plain(way_out), Paint::Faint)));
        }
    }
    let count = |state| report.checks.iter().filter(|check| check.state == state).count();
    let (failures, warnings) = (count(State::Fail), count(State::Warn));
    let verdict = match (report.agent, failures) {
        (false, _) => colour.paint("no agent answers", Paint::Bad),
        (true, 0) => colour.paint("this node is well", Paint::Good),
        (true, _) => colour.paint("this node is NOT well", Paint::Bad),
    };
    out.push_str(&format!("{verdict}: {failures} failing, {warnings} warning\n"));
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_line_has_its_way_out_and_the_last_one_the_verdict() {
        let checks = vec![Check::ok("agent", "runs"), Check::fail("hooks", "connect4: gone", "restart it")];
        let report = Report { well: false, agent: true, checks, status: None };
        let text = text(&report, Colour::OFF);
        assert_eq!(
            text,
            "ok    agent          runs\nFAIL  hooks          connect4: gone\n                     -> restart it\n\
             this node is NOT well: 1 failing, 0 warning\n"
        );
    }
}
