//! `marline connections`: who talks to whom through this node, now and a moment ago. `model` is what the agent tells of one.

pub(super) mod model;
mod watch;

use std::{process::ExitCode, time::Duration};

use clap::{Args, ValueEnum};

use super::{
    client::{AdminArgs, Client},
    finish,
    table::{Cell, Colour, Paint, age, bytes, table},
};
use model::{Connection, Fetched};

#[derive(Args)]
#[command(after_long_help = "\
Like ss(8), for what goes through this node's agent. PEER is the identity that the other end's certificate has proved; there is none in
plaintext. Bytes are the application's, SENT by this node's pod; those of direct connections
are looked at every 5 seconds.

--ended shows the last 512 that are over, with the reason in words (the access log has all of them); --refused those of them that were
refused. --watch prints a line for each connection that comes (+) and goes (-); with --json one object a line.

Exit codes: 0 listed, 2 no agent answers.

  marline connections
  marline connections --refused -n shop
  marline connections --plaintext
  marline connections --watch --json")]
pub(super) struct ConnectionsArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(flatten)]
    filter: Filter,
    /// Those that have ended, instead of those that live
    #[arg(long)]
    ended: bool,
    /// Those that were refused
    #[arg(long, conflicts_with = "watch")]
    refused: bool,
    /// Print what changes, until interrupted
    #[arg(long)]
    watch: bool,
    /// How often to look for changes
    #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = humantime::parse_duration)]
    interval: Duration,
    /// Both identities, the policy that decided, and why it is not direct
    #[arg(long)]
    wide: bool,
}

/// Which connections to show.
#[derive(Args, Clone, Debug, Default)]
pub(super) struct Filter {
    /// With an end in this namespace
    #[arg(short, long)]
    namespace: Option<String>,
    /// With this workload at an end: NAME or NAMESPACE/NAME, or its service account
    #[arg(short, long)]
    workload: Option<String>,
    /// In this direction
    #[arg(long)]
    direction: Option<Way>,
    /// To this port
    #[arg(short, long)]
    port: Option<u16>,
    /// Under mTLS
    #[arg(long, conflicts_with = "plaintext")]
    mtls: bool,
    /// In plaintext
    #[arg(long)]
    plaintext: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Way {
    Outbound,
    Inbound,
}

impl Filter {
    pub(super) fn lets(&self, one: &Connection) -> bool {
        let ends = [&one.source, &one.destination];
        let namespace = |wanted: &String| ends.iter().any(|end| end.namespace.as_ref() == Some(wanted));
        let workload = |wanted: &String| {
            ends.iter().any(|end| {
                let full = format!(
                    "{}/{}",
                    end.namespace.as_deref().unwrap_or_default(),
                    end.workload.as_deref().unwrap_or_default()
                );
                let account = end.identity.as_deref().and_then(|id| id.split_once("/ns/")?.1.split_once("/sa/"));
                let accounts = account.is_some_and(|(namespace, account)| {
                    account == wanted || wanted.split_once('/') == Some((namespace, account))
                });
                end.workload.as_ref() == Some(wanted) || full == *wanted || accounts
            })
        };
        let direction = match self.direction {
            None => true,
            Some(Way::Outbound) => one.direction.as_str() == "outbound",
            Some(Way::Inbound) => one.direction.as_str() == "inbound",
        };
        self.namespace.as_ref().is_none_or(namespace)
            && self.workload.as_ref().is_none_or(workload)
            && direction
            && self.port.is_none_or(|port| one.destination.address.is_some_and(|address| address.port() == port))
            && (!self.mtls || one.mode.as_deref() == Some("mtls"))
            && (!self.plaintext || one.mode.as_deref() == Some("plaintext"))
    }
}

pub(super) fn run(args: &ConnectionsArgs) -> ExitCode {
    if args.watch {
        return finish(watch::run(args).map(|()| (String::new(), true)));
    }
    finish(answer(args).map(|text| (text, true)))
}

fn answer(args: &ConnectionsArgs) -> Result<String, String> {
    let client = Client::new(args.admin.admin).map_err(|error| error.to_string())?;
    let mut all = match args.ended || args.refused {
        true => Fetched::ended(&client),
        false => Fetched::live(&client),
    }
    .map_err(|error| error.to_string())?;
    all.retain(|one| args.filter.lets(one) && (!args.refused || one.verdict.as_deref() == Some("refused")));
    if args.admin.json {
        return Ok(format!("{}\n", serde_json::json!(all)));
    }
    Ok(listed(&all, args.wide, Colour::of_stdout()))
}

pub(super) fn listed(all: &[Connection], wide: bool, colour: Colour) -> String {
    let mut header =
        vec!["DIR", "SOURCE", "DESTINATION", "MODE", "RECORDS", "PATH", "CIPHER", "SENT", "RECEIVED", "AGE"];
    let ended = all.iter().any(|one| one.verdict.is_some());
    header.extend(if wide { &["SOURCE IDENTITY", "DESTINATION IDENTITY", "POLICY"][..] } else { &["PEER"] });
    if wide {
        header.push("PATH REASON");
    }
    if ended {
        header.push("END");
    }
    let rows: Vec<_> = all.iter().map(|one| row(one, wide, ended)).collect();
    format!("{}{} connections\n", table(&header, &rows, colour), all.len())
}

fn row(one: &Connection, wide: bool, ended: bool) -> Vec<Cell> {
    let dash = |text: Option<&str>| Cell::from(text.unwrap_or("-"));
    let mode = one.mode.as_deref().unwrap_or("-");
    let mut row = vec![
        Cell::from(if one.direction.as_str() == "outbound" { "out" } else { "in" }),
        Cell::from(model::end(&one.source)),
        Cell::from(model::end(&one.destination)),
        Cell::new(mode, mode_paint(mode)),
        dash(one.records.as_deref()),
        dash(one.path.as_deref()),
        dash(one.tls.as_ref().map(|tls| tls.cipher.trim_start_matches("TLS13_"))),
        Cell::from(bytes(one.bytes_sent)),
        Cell::from(bytes(one.bytes_received)),
        Cell::from(age(one.age_ms)),
    ];
    if wide {
        row.extend([
            dash(one.source.identity.as_deref()),
            dash(one.destination.identity.as_deref()),
            dash(one.policy.as_deref()),
            dash(one.path_reason.as_deref()),
        ]);
    } else {
        row.push(dash(one.peer()));
    }
    if ended {
        let refused = one.verdict.as_deref() == Some("refused");
        let verdict = one.verdict.as_deref().unwrap_or_default();
        let end = match one.reason.as_deref() {
            Some(reason) => format!("{verdict}, {reason}: {}", one.close.as_deref().unwrap_or_default()),
            None => one.close.clone().unwrap_or_default(),
        };
        row.push(Cell::new(end, if refused { Paint::Bad } else { Paint::Plain }));
    }
    row
}

pub(super) fn mode_paint(mode: &str) -> Paint {
    match mode {
        "mtls" => Paint::Good,
        "plaintext" => Paint::Warning,
        _ => Paint::Faint,
    }
}

#[cfg(test)]
mod tests {
    use super::{model::tests::sample, *};

    #[test]
    fn a_connection_is_told_with_both_ends_and_the_proven_peer() {
        let text = listed(&[sample()], false, Colour::OFF);
        let line = text.lines().nth(1).unwrap();
        for word in
            ["out", "demo/client@10.0.0.1:40000", "demo/server@10.0.0.2:80", "mtls", "ktls", "AES_128_GCM_SHA256"]
        {
            assert!(line.contains(word), "{word} in {text}");
        }
        assert!(line.contains("spiffe://cluster.local/ns/demo/sa/server"), "{text}");
    }

    #[test]
    fn an_end_is_told_with_its_reason() {
        let mut one = sample();
        one.verdict = Some("refused".into());
        one.reason = Some("policy".into());
        one.close = Some("forbidden by AuthorizationPolicy demo/deny rules[0]".into());
        let text = listed(&[one], false, Colour::OFF);
        assert!(text.contains("refused, policy: forbidden by AuthorizationPolicy demo/deny rules[0]"), "{text}");
    }

    #[test]
    fn filters_go_by_either_end() {
        let one = sample();
        let filter = |change: fn(&mut Filter)| {
            let mut filter = Filter::default();
            change(&mut filter);
            filter.lets(&one)
        };
        assert!(filter(|f| f.namespace = Some("demo".into())));
        assert!(!filter(|f| f.namespace = Some("other".into())));
        assert!(filter(|f| f.workload = Some("demo/server".into())) && filter(|f| f.workload = Some("client".into())));
        assert!(!filter(|f| f.workload = Some("other/server".into())));
        let renamed = |name: &str| {
            let mut one = sample();
            one.destination.workload = Some("server-7d9f".into());
            Filter { workload: Some(name.into()), ..Filter::default() }.lets(&one)
        };
        assert!(renamed("server") && renamed("demo/server") && !renamed("other/server"), "by the service account");
        assert!(filter(|f| f.port = Some(80)) && !filter(|f| f.port = Some(81)));
        assert!(filter(|f| f.mtls = true) && !filter(|f| f.plaintext = true));
        assert!(filter(|f| f.direction = Some(Way::Outbound)) && !filter(|f| f.direction = Some(Way::Inbound)));
    }
}
