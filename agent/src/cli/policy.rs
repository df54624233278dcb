//! `marline policy check` and `marline policy explain`: what the policies of a directory are worth, and what they decide. No
//! agent need run; the directory need not hold an AgentConfig.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use clap::{Args, Subcommand};

use super::{WRONG_CONFIGURATION, table::plain_lines};
use crate::{
    config::{self, LoadedPolicies},
    state::explain::{Question, describe},
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
                eprintln!("{}", plain_lines(&text));
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
        println!("{}", plain_lines(&text));
    }
    code
}

fn answer(args: &ExplainArgs) -> Result<ExitCode, String> {
    let snapshot = config::load_policies(&args.config).map_err(|errors| errors.to_string())?.snapshot;
    let (source, destination) = (args.source.as_str(), args.destination.as_str());
    let question = Question { source, destination, plaintext: args.plaintext, strangers: false };
    let answer = snapshot.answer(question)?;
    if args.json {
        println!("{}", answer.explanation);
    } else {
        let address = answer.source.address.ip();
        let source = snapshot.workload(address).map_or_else(|| "nobody known".to_owned(), |one| describe(one));
        print!("{}", plain_lines(&format!("from {source} at {address}\n{}\n", answer.text)));
    }
    Ok(if answer.allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
