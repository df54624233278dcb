//! `marline workloads`: who the agent knows, and how it treats them.

use std::{net::IpAddr, process::ExitCode};

use clap::Args;
use serde::{Deserialize, Serialize};

use super::{
    client::{AdminArgs, Client},
    finish,
    table::{Cell, Colour, Paint, plain, table},
};

#[derive(Args)]
#[command(after_long_help = "\
Every workload that the agent knows: MESH says whether it is in the mesh, LOCAL whether it is a pod of this node, MODE what its ports
take unless a port has a mode of its own. Exit codes: 0 listed, 2 no agent answers.

  marline workloads -n shop
  marline workloads --local --json | jq -r '.workloads[].identity'")]
pub(super) struct WorkloadsArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Of this namespace only
    #[arg(short, long)]
    namespace: Option<String>,
    /// Pods of this node only
    #[arg(long)]
    local: bool,
}

/// What `/workloads` answers, and `--json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Workloads {
    pub(super) generation: u64,
    /// Mesh-wide.
    pub(super) mode: String,
    pub(super) workloads: Vec<Workload>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(super) struct Workload {
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) identity: String,
    pub(super) addresses: Vec<IpAddr>,
    pub(super) in_mesh: bool,
    pub(super) local: bool,
    /// Of its ports that have no mode of their own; none outside of the mesh.
    pub(super) mode: Option<String>,
}

pub(super) fn run(args: &WorkloadsArgs) -> ExitCode {
    finish(answer(args).map(|text| (text, true)))
}

fn answer(args: &WorkloadsArgs) -> Result<String, String> {
    let client = Client::new(args.admin.admin).map_err(|error| error.to_string())?;
    let mut all: Workloads = client.json("/workloads").map_err(|error| error.to_string())?;
    all.workloads.retain(|one| {
        args.namespace.as_ref().is_none_or(|namespace| *namespace == one.namespace) && (one.local || !args.local)
    });
    if args.admin.json {
        return Ok(format!("{}\n", serde_json::json!(all)));
    }
    Ok(listed(&all, Colour::of_stdout()))
}

fn listed(all: &Workloads, colour: Colour) -> String {
    const HEADER: [&str; 7] = ["NAMESPACE", "NAME", "MESH", "LOCAL", "MODE", "ADDRESSES", "IDENTITY"];
    let yes = |yes: bool, paint| Cell::new(if yes { "yes" } else { "no" }, if yes { Paint::Plain } else { paint });
    let row = |one: &Workload| {
        let addresses: Vec<_> = one.addresses.iter().map(ToString::to_string).collect();
        vec![
            Cell::from(&one.namespace),
            Cell::from(&one.name),
            yes(one.in_mesh, Paint::Warning),
            yes(one.local, Paint::Faint),
            Cell::from(one.mode.as_deref().unwrap_or("-")),
            Cell::from(addresses.join(",")),
            Cell::from(if one.in_mesh { one.identity.as_str() } else { "-" }),
        ]
    };
    let rows: Vec<_> = all.workloads.iter().map(row).collect();
    format!("{}generation {}, mode {} mesh-wide\n", table(&HEADER, &rows, colour), all.generation, plain(&all.mode))
}
