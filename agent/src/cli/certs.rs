//! `marline certs`: the certificates that a running agent holds, as its admin address tells them. Keys are never told.

use std::process::ExitCode;

use clap::{Args, Subcommand};
use hyper::StatusCode;
use serde_json::Value;

use super::{
    client::{AdminArgs, Client},
    finish,
    table::{Cell, Colour, Paint, plain, table, time},
};

/// Exit codes: 0 all is well, 1 a certificate is missing, has expired, is about to, or could not be renewed; 2 the command line is wrong
/// or no agent answers.
#[derive(Args)]
#[command(after_long_help = "\
  marline certs
  marline certs show spiffe://cluster.local/ns/shop/sa/web --pem | openssl x509 -noout -text")]
pub(super) struct CertsArgs {
    #[command(flatten)]
    admin: AdminArgs,
    #[command(subcommand)]
    command: Option<CertsCommand>,
}

#[derive(Subcommand)]
enum CertsCommand {
    /// Show one identity's certificate
    Show {
        /// The SPIFFE ID, as `marline certs` lists it
        id: String,
        /// Print the chain that peers are shown, in PEM
        #[arg(long)]
        pem: bool,
    },
}

pub(super) fn run(args: &CertsArgs) -> ExitCode {
    finish(answer(args))
}

fn answer(args: &CertsArgs) -> Result<(String, bool), String> {
    let client = Client::new(args.admin.admin).map_err(|error| error.to_string())?;
    if let Some(CertsCommand::Show { id, pem: true }) = &args.command {
        let (status, text) = client.get(&format!("/certs/chain?id={id}")).map_err(|error| error.to_string())?;
        return match status {
            StatusCode::OK => Ok((text, true)),
            _ => Err(unknown(id)),
        };
    }
    let all: Vec<Value> = client.json("/certs").map_err(|error| error.to_string())?;
    let chosen: Vec<Value> = match &args.command {
        Some(CertsCommand::Show { id, .. }) => {
            let found: Vec<_> = all.into_iter().filter(|one| one["id"] == id.as_str()).collect();
            if found.is_empty() {
                return Err(unknown(id));
            }
            found
        }
        None => all,
    };
    let well = chosen.iter().all(is_well);
    let text =
        if args.admin.json { format!("{}\n", Value::Array(chosen)) } else { listed(&chosen, Colour::of_stdout()) };
    Ok((text, well))
}

fn unknown(id: &str) -> String {
    format!("the agent holds no certificate for {id}; `marline certs` lists those that it holds")
}

fn is_well(one: &Value) -> bool {
    matches!(one["state"].as_str(), Some("valid" | "due")) && one["last_error"].is_null()
}

fn listed(all: &[Value], colour: Colour) -> String {
    const HEADER: [&str; 7] = ["STATE", "IDENTITY", "SERIAL", "NOT BEFORE", "NOT AFTER", "ISSUER", "SOURCE"];
    let text = |value: &Value| Cell::from(value.as_str().unwrap_or("-"));
    let when = |value: &Value| Cell::from(value.as_u64().map_or_else(|| "-".to_owned(), time));
    let row = |one: &Value| {
        let paint = if is_well(one) { Paint::Good } else { Paint::Bad };
        vec![
            Cell::new(one["state"].as_str().unwrap_or("-"), paint),
            text(&one["id"]),
            text(&one["serial"]),
            when(&one["not_before"]),
            when(&one["not_after"]),
            text(&one["issuer"]),
            text(&one["source"]),
        ]
    };
    let rows: Vec<_> = all.iter().map(row).collect();
    let mut out = String::new();
    for (number, line) in table(&HEADER, &rows, colour).lines().enumerate() {
        out.push_str(line);
        out.push('\n');
        let one = number.checked_sub(1).and_then(|at| all.get(at));
        if let Some(error) = one.and_then(|one| one["last_error"].as_str()) {
            out.push_str(&format!("    could not be renewed: {}\n", plain(error)));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_table_names_each_certificate_and_why_it_could_not_be_renewed() {
        let all = [
            json!({"id": "spiffe://cluster.local/ns/a/sa/web", "serial": "0A", "not_before": 0, "not_after": 3600,
                   "state": "valid", "issuer": "CN=root", "source": "embedded CA", "last_error": null}),
            json!({"id": "spiffe://cluster.local/ns/a/sa/db", "serial": null, "not_before": null, "not_after": null,
                   "state": "missing", "issuer": null, "source": "embedded CA", "last_error": "the CA is away"}),
        ];
        let text = listed(&all, Colour::OFF);
        let lines: Vec<&str> = text.lines().collect();
        assert!(
            lines[1].starts_with("valid    spiffe://cluster.local/ns/a/sa/web  0A      1970-01-01T00:00:00Z"),
            "{text}"
        );
        assert!(lines[2].starts_with("missing") && lines[3].ends_with("the CA is away"), "{text}");
        assert_eq!(all.iter().map(is_well).collect::<Vec<_>>(), [true, false]);
    }

    #[test]
    fn a_certificate_that_ends_soon_is_not_well() {
        for (state, well) in [("valid", true), ("due", true), ("expiring", false), ("expired", false), ("", false)] {
            assert_eq!(is_well(&json!({"state": state, "last_error": null})), well, "{state}");
        }
        assert!(!is_well(&json!({"state": "valid", "last_error": "no"})));
    }
}
