//! `marline policy check` and `marline policy explain`: what the policies of a directory are worth, and what they decide. No
//! agent need run; the directory need not hold an AgentConfig.

use std::{
    net::{IpAddr, SocketAddr},
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Subcommand};

use super::WRONG_CONFIGURATION;
use crate::{
    config::{self, LoadedPolicies},
    policy::{
        Service, Workload,
        explain::{Callee, Caller, explain, explain_service},
    },
    state::Snapshot,
};

#[derive(Subcommand)]
pub(super) enum PolicyCommand {
    /// Read a directory of policies and list everything that is wrong with it: exit 0 if nothing is, 1 if there are warnings, 2 if
    /// an agent would refuse it
    Check {
        dir: PathBuf,
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
    },
    /// Say what becomes of a connection, and which policies decide it: exit 0 if it is allowed, 1 if it is refused, 2 if the question
    /// or the configuration is wrong
    Explain(ExplainArgs),
}

#[derive(Args)]
pub(super) struct ExplainArgs {
    /// The directory with the policies and the WorkloadEntries
    #[arg(long)]
    config: PathBuf,
    /// Who calls: NAMESPACE/NAME, NAME, or an IP address
    #[arg(long)]
    source: String,
    /// Who is called: a workload, as NAMESPACE/NAME:PORT or NAME:PORT, a service, as NAME.NAMESPACE:PORT or its whole host, or
    /// either as IP:PORT
    #[arg(long)]
    destination: String,
    /// Ask for a source that speaks plaintext although it is in the mesh
    #[arg(long)]
    plaintext: bool,
    /// Print the answer as JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(command: &PolicyCommand) -> ExitCode {
    match command {
        PolicyCommand::Check { dir, json } => check(dir, *json),
        PolicyCommand::Explain(args) => match answer(args) {
            Ok(code) => code,
            Err(text) => {
                eprintln!("{text}");
                ExitCode::from(WRONG_CONFIGURATION)
            }
        },
    }
}

fn check(dir: &Path, json: bool) -> ExitCode {
    let (text, findings, code) = match config::load_policies(dir) {
        Ok(LoadedPolicies { snapshot, warnings }) => {
            let mut lines: Vec<_> = warnings.iter().map(|warning| format!("warning: {warning}")).collect();
            let (number, workloads) = (snapshot.policies.len(), snapshot.workloads().len());
            let code = if lines.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
            lines.push(format!(
                "{}: good, {number} policies, {workloads} workloads, {} warnings",
                dir.display(),
                warnings.len()
            ));
            (lines.join("\n"), serde_json::json!({ "errors": [], "warnings": warnings }), code)
        }
        Err(errors) => {
            let warnings = errors.warnings.iter().map(|warning| format!("\nwarning: {warning}")).collect::<String>();
            (format!("{errors}{warnings}"), serde_json::json!(errors), ExitCode::from(WRONG_CONFIGURATION))
        }
    };
    if json {
        println!("{findings}");
    } else {
        println!("{text}");
    }
    code
}

fn answer(args: &ExplainArgs) -> Result<ExitCode, String> {
    let snapshot = config::load_policies(&args.config).map_err(|errors| errors.to_string())?.snapshot;
    let (address, workload) = find(&snapshot, &args.source, "--source")?;
    let (name, port) = args
        .destination
        .rsplit_once(':')
        .and_then(|(name, port)| Some((name.trim_matches(['[', ']']), port.parse::<u16>().ok()?)))
        .ok_or_else(|| format!("--destination {:?}: write WORKLOAD:PORT", args.destination))?;
    let caller = Caller { address, workload, plaintext: args.plaintext };
    let source = workload.map_or_else(|| "nobody known".to_owned(), describe);
    let (allowed, json, text) = match service(&snapshot, name) {
        Some(service) => {
            let explanation = explain_service(&snapshot.policies, caller, service, port)
                .ok_or_else(|| format!("--destination {name}: {} has no port {port}", service.host))?;
            let text = format!("to   {} port {port}\n{explanation}", service.host);
            (explanation.allowed, serde_json::json!(explanation), text)
        }
        None => {
            let (local, destination) = find(&snapshot, name, "--destination")?;
            let destination = destination
                .ok_or_else(|| format!("--destination {name}: no workload and no service has this address"))?;
            let local = SocketAddr::new(local, port);
            // As the agents see it: the address may be that of a headless service's endpoint.
            let called = workload.filter(|caller| caller.in_mesh).and_then(|caller| snapshot.called(caller, local));
            let callee = Callee {
                workload: Some(destination),
                address: local,
                service: called.as_ref().map(|(service, traffic)| (&***service, &**traffic)),
                told_plaintext: workload.is_some_and(|caller| snapshot.told_plaintext(caller, local)),
            };
            let explanation = explain(&snapshot.policies, caller, callee);
            let text = format!("to   {} at {local}\n{explanation}", describe(destination));
            (explanation.allowed, serde_json::json!(explanation), text)
        }
    };
    match args.json {
        true => println!("{json}"),
        false => println!("from {source} at {address}\n{text}"),
    }
    Ok(if allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// A service by one of its addresses, its host, or the beginning of that: NAME.NAMESPACE, NAME.NAMESPACE.svc.
fn service<'a>(snapshot: &'a Snapshot, text: &str) -> Option<&'a Service> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return snapshot.service(address).map(|service| &**service);
    }
    let in_full = [text.to_owned(), format!("{text}.svc.cluster.local"), format!("{text}.cluster.local")];
    let called = |service: &&Service| text.contains('.') && in_full.contains(&service.host);
    snapshot.services().iter().map(|service| &**service).find(called)
}

/// A workload by its name or one of its addresses; an address may be nobody's.
fn find<'a>(snapshot: &'a Snapshot, text: &str, option: &str) -> Result<(IpAddr, Option<&'a Workload>), String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok((address.to_canonical(), snapshot.workload(address).map(|workload| &**workload)));
    }
    let named = |workload: &&'a Workload| workload.name == text || workload.to_string() == text;
    let mut found = snapshot.workloads().iter().map(|workload| &**workload).filter(named);
    match (found.next(), found.next()) {
        (Some(workload), None) => match workload.addresses.first() {
            Some(address) => Ok((*address, Some(workload))),
            None => Err(format!("{option} {text}: this workload has no address")),
        },
        (Some(_), Some(_)) => Err(format!("{option} {text}: there are several; write NAMESPACE/NAME, or an address")),
        (None, _) => Err(format!("{option} {text}: no WorkloadEntry has this name")),
    }
}

fn describe(workload: &Workload) -> String {
    let identity = if workload.in_mesh { workload.id.to_string() } else { "not in the mesh".to_owned() };
    format!("{workload} ({identity})")
}
