//! `marline certs`: the certificates that a running agent holds, as its admin address tells them. Keys are never told.

use std::{fmt::Write as _, net::SocketAddr, process::ExitCode, time::Duration};

use clap::{Args, Subcommand};
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, StatusCode, body::Bytes};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;

use super::WRONG_CONFIGURATION;
use crate::app;

const PATIENCE: Duration = Duration::from_secs(10);

/// Exit codes: 0 all is well, 1 a certificate is missing, has expired, is about to, or could not be renewed; 2 the command line is wrong
/// or no agent answers.
#[derive(Args)]
pub(super) struct CertsArgs {
    /// The agent's admin address (spec.admin.address)
    #[arg(long, global = true, default_value = "127.0.0.1:15000")]
    admin: SocketAddr,
    /// Print what the agent says, as JSON
    #[arg(long, global = true)]
    json: bool,
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
    match answer(args) {
        Ok((text, well)) => {
            print!("{text}");
            if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("marline: {error}");
            ExitCode::from(WRONG_CONFIGURATION)
        }
    }
}

fn answer(args: &CertsArgs) -> Result<(String, bool), String> {
    let runtime = app::runtime().map_err(|error| error.to_string())?;
    let get = |path: &str| {
        let answer = runtime.block_on(async { tokio::time::timeout(PATIENCE, get(args.admin, path)).await });
        let slow = || Err(format!("it did not answer within {PATIENCE:?}").into());
        answer.unwrap_or_else(|_| slow()).map_err(|error| {
            format!(
                "no agent answers at {}: {error}; is one running, and is --admin its spec.admin.address?",
                args.admin
            )
        })
    };
    if let Some(CertsCommand::Show { id, pem: true }) = &args.command {
        let (status, text) = get(&format!("/certs/chain?id={id}"))?;
        return match status {
            StatusCode::OK => Ok((text, true)),
            _ => Err(format!("the agent holds no certificate for {id}; `marline certs` lists those that it holds")),
        };
    }
    let (status, text) = get("/certs")?;
    let all: Vec<Value> = serde_json::from_str(&text)
        .ok()
        .filter(|_| status == StatusCode::OK)
        .ok_or_else(|| format!("what answers at {} is no agent of Marline: {status}", args.admin))?;
    let chosen: Vec<Value> = match &args.command {
        Some(CertsCommand::Show { id, .. }) => {
            let found: Vec<_> = all.into_iter().filter(|one| one["id"] == id.as_str()).collect();
            if found.is_empty() {
                return Err(format!(
                    "the agent holds no certificate for {id}; `marline certs` lists those that it holds"
                ));
            }
            found
        }
        None => all,
    };
    let well = chosen.iter().all(is_well);
    let text = if args.json { format!("{}\n", Value::Array(chosen)) } else { table(&chosen) };
    Ok((text, well))
}

async fn get(
    address: SocketAddr,
    path: &str,
) -> Result<(StatusCode, String), Box<dyn std::error::Error + Send + Sync>> {
    let stream = TcpStream::connect(address).await?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path).header("host", address.to_string()).body(Empty::<Bytes>::new())?;
    tokio::spawn(connection);
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

fn is_well(one: &Value) -> bool {
    matches!(one["state"].as_str(), Some("valid" | "due")) && one["last_error"].is_null()
}

fn table(all: &[Value]) -> String {
    const HEADER: [&str; 7] = ["STATE", "IDENTITY", "SERIAL", "NOT BEFORE", "NOT AFTER", "ISSUER", "SOURCE"];
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let time = |value: &Value| {
        let since = value.as_u64().map(|seconds| std::time::UNIX_EPOCH + Duration::from_secs(seconds));
        since.map_or_else(|| "-".to_owned(), |time| humantime::format_rfc3339_seconds(time).to_string())
    };
    let row = |one: &Value| {
        let (from, to) = (time(&one["not_before"]), time(&one["not_after"]));
        [
            text(&one["state"]),
            text(&one["id"]),
            text(&one["serial"]),
            from,
            to,
            text(&one["issuer"]),
            text(&one["source"]),
        ]
    };
    let rows: Vec<[String; 7]> = std::iter::once(HEADER.map(str::to_owned)).chain(all.iter().map(row)).collect();
    let width = |column: usize| rows.iter().map(|row| row.get(column).map_or(0, |cell| cell.chars().count())).max();
    let widths: Vec<usize> = (0..HEADER.len()).map(|column| width(column).unwrap_or_default()).collect();
    let mut out = String::new();
    for (number, row) in rows.iter().enumerate() {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(out, "{}", cells.join("  ").trim_end());
        let one = number.checked_sub(1).and_then(|at| all.get(at));
        if let Some(error) = one.and_then(|one| one["last_error"].as_str()) {
            let _ = writeln!(out, "    could not be renewed: {error}");
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
        let text = table(&all);
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
