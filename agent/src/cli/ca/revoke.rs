//! `marline ca revoke`: shuts a node out, and says what was done and what was not. Where that is kept, in files or in a cluster, the
//! configuration says; the work is the `ca` room's.

use std::{path::Path, process::ExitCode};

use super::{load, said};
use crate::{
    app,
    ca::{
        CaError,
        cluster::{self, Cluster},
        revoke::{self, Outcome},
    },
    cli::failed,
    config::Keeping,
    words::with_causes,
};

pub(super) fn run(file: &Path, node: &str, undo: bool, json: bool) -> ExitCode {
    let keeping = match load(file) {
        Ok(settings) => settings.keeping,
        Err(code) => return code,
    };
    if undo {
        let done = undone(&keeping, node).map_err(|error| with_causes(&error));
        return said(done.map(|was| match (json, was) {
            (true, was) => serde_json::json!({ "node": node, "changed": was }).to_string(),
            (_, true) => format!("node {node} may have certificates again; those that were revoked stay so"),
            (_, false) => format!("node {node} was not shut out"),
        }));
    }
    match revoked(&keeping, node) {
        Ok(done) => {
            match json {
                true => print_json(node, &done),
                false => print_text(node, &done, &Places::of(&keeping)),
            }
            // What is left undone must not look done to a script.
            if done.is_whole() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            failed(&format!("{}; run it again when that is mended: it goes on where it ended", with_causes(&error)))
        }
    }
}

fn revoked(keeping: &Keeping, node: &str) -> Result<Outcome, CaError> {
    match keeping {
        Keeping::Files(files) => revoke::revoke(files, node),
        Keeping::Cluster(names) => in_runtime(async {
            let cluster = Cluster::new(names)?;
            cluster::revoke::revoke(&cluster, node).await
        }),
    }
}

fn undone(keeping: &Keeping, node: &str) -> Result<bool, CaError> {
    match keeping {
        Keeping::Files(files) => revoke::undo(files, node),
        Keeping::Cluster(names) => in_runtime(async {
            let cluster = Cluster::new(names)?;
            cluster::revoke::undo(&cluster, node).await
        }),
    }
}

fn in_runtime<T>(work: impl Future<Output = Result<T, CaError>>) -> Result<T, CaError> {
    app::runtime().map_err(|error| CaError::Ended(with_causes(&error)))?.block_on(work)
}

/// Where things are, for texts.
struct Places {
    list: String,
    /// What becomes of the list.
    then: &'static str,
    ledger: String,
    key: String,
    /// What to do about certificates that another key has signed.
    others: String,
}

impl Places {
    fn of(keeping: &Keeping) -> Self {
        match keeping {
            Keeping::Files(files) => Self {
                list: files.crl.display().to_string(),
                then: ": give it to the agents",
                ledger: files.state.display().to_string(),
                key: files.ca.display().to_string(),
                others: format!(
                    "run this with a copy of the configuration whose spec.ca.path has that CA's files and whose spec.state is {}; or \
                     take its root from the agents",
                    files.state.display()
                ),
            },
            Keeping::Cluster(names) => Self {
                list: format!("in ConfigMap {}", names.root_config_map),
                then: ", which agents follow",
                ledger: format!("namespace {}", names.namespace),
                key: format!("Secret {}", names.secret),
                others: "take that CA's root from the Secret".to_owned(),
            },
        }
    }
}

fn print_json(node: &str, done: &Outcome) {
    let list = done.list.map(|(number, added)| serde_json::json!({ "number": number, "added": added }));
    println!(
        "{}",
        serde_json::json!({ "node": node, "changed": done.changed, "known": done.known, "list": list,
            "other_signer": done.other_signer, "other_until": done.other_until,
            "unreadable": done.unreadable, "first_unreadable": done.first_unreadable })
    );
}

fn print_text(node: &str, done: &Outcome, places: &Places) {
    match done.changed {
        true => println!("node {node} is shut out: it gets no more certificates"),
        false => println!("node {node} was shut out already"),
    }
    match done.list {
        Some((number, added)) => println!(
            "{added} certificates were put on the revocation list {} (number {number}){}",
            places.list, places.then
        ),
        None => println!("it has no certificate that counts and is not on the revocation list already"),
    }
    if !done.known {
        println!("warning: the ledger in {} knows no such node; is it called so?", places.ledger);
    }
    if done.other_signer > 0 {
        println!(
            "NOT revoked: {} certificates that count still were signed with another key than the CA's in {}. They count until {}, or until \
             that CA lists them: {}",
            done.other_signer,
            places.key,
            done.other_until.as_deref().unwrap_or("an unknown time"),
            places.others
        );
    }
    if done.unreadable > 0 {
        println!(
            "NOT revoked, if there are any: certificates in {} lines of the ledger that cannot be read or have no serial (the first: {}). \
             Unpack files that are compressed; mend a line, or remove one that was written by half, and run this again",
            done.unreadable,
            done.first_unreadable.as_deref().unwrap_or("without a serial")
        );
    }
}
