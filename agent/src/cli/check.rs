//! `marline check`: tries a connection from a pod of this node, the way its own programs' go, and looks at the wire meanwhile. `probe` connects,
//! `attempt` watches, `wire` reads packets, `verdict` says what it means.

mod attempt;
pub(super) mod probe;
mod verdict;
mod wire;

use std::{path::PathBuf, process::ExitCode, time::Duration};

use clap::Args;
use hyper::StatusCode;

use super::{
    client::{AdminArgs, Client},
    finish,
    table::Colour,
};
use crate::{
    admin::status::{Pod, Status},
    state::explain::Answer,
};
use attempt::{Attempt, Plan};
use verdict::Report;

#[derive(Args)]
#[command(after_long_help = "\
A process of this command enters the pod's network namespace and a cgroup beside the pod's, and connects from there: the connection goes
the way of the pod's own, as those of programs without the seccomp filter do. Meanwhile a packet socket in the pod's namespace looks at
what leaves and enters on its links, for this one connection. What is reported as seen was seen; what was not is said to be unknown.

SOURCE is a pod of this node, NAMESPACE/NAME or NAME, where the service account will do for the name; or the path of a network namespace,
for one that is not enrolled. DESTINATION is a workload, a service (NAME.NAMESPACE) or an address.

Nothing is sent to the application unless --send says what: then the text is looked for on the wire.

Exit codes: 0 connected, and encrypted as policy wants; 1 otherwise, with the reason and the way out; 2 the question is wrong, or no
agent answers. Run it as root, in the agent's network namespace.

  marline check shop/web shop/db:5432
  marline check web 10.10.2.2:80 --send 'GET / HTTP/1.0
  
'
  marline check /run/netns/other db.shop:5432 --json")]
pub(super) struct CheckArgs {
    /// Who calls: a pod of this node, or the path of a network namespace
    source: String,
    /// Who is called
    #[arg(value_name = "DESTINATION:PORT")]
    destination: String,
    #[command(flatten)]
    admin: AdminArgs,
    /// Send this text when connected, and look for it on the wire
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    send: Option<String>,
    /// How long to watch the connection once it is made
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = humantime::parse_duration)]
    wait: Duration,
}

/// From where to connect.
#[derive(Clone, Debug)]
struct From {
    netns: PathBuf,
    /// None for a namespace that is not enrolled.
    pod: Option<Pod>,
}

pub(super) fn run(args: &CheckArgs) -> ExitCode {
    finish(answer(args))
}

fn answer(args: &CheckArgs) -> Result<(String, bool), String> {
    let client = Client::new(args.admin.admin).map_err(|error| error.to_string())?;
    let status: Status = client.json("/status").map_err(|error| error.to_string())?;
    let from = source(&client, &status, &args.source)?;
    // Of a namespace the address is known when it has connected.
    let asked = from.pod.as_ref().map_or("0.0.0.0".to_owned(), |pod| format!("{}/{}", pod.namespace, pod.name));
    let mut explained = explain(&client, &asked, &args.destination, from.pod.is_none())?;
    let plan = Plan {
        client: &client,
        netns: from.netns.clone(),
        cgroup: status.capture.cgroup.clone(),
        destination: explained.destination.clone(),
        enrolled: from.pod.is_some(),
        send: args.send.clone(),
        wait: args.wait,
    };
    let mut attempt = Attempt::make(&plan)?;
    if attempt.refused_at_once() && from.pod.as_ref().is_some_and(|pod| pod.state == "ready") {
        // A refusal is remembered for a second, which says nothing of now.
        std::thread::sleep(Duration::from_millis(1100));
        attempt = Attempt::make(&plan)?;
    }
    let source = match (&from.pod, attempt.local) {
        (None, Some(local)) => local.ip().to_canonical().to_string(),
        _ => asked,
    };
    // Of a service that has been called it is known now which endpoint was reached.
    let reached = attempt.outbound.as_ref().and_then(|one| one.destination.address);
    let reached = reached.filter(|_| !explained.by_endpoint.is_empty());
    if from.pod.is_none() || reached.is_some() {
        explained = explain(&client, &source, &args.destination, from.pod.is_none())?;
    }
    if let Some(reached) = reached
        && !explained.narrow(reached)
    {
        explained.reason = format!("{reached} is no endpoint of the service any more, by what this node has now");
    }
    let report = Report::of(from.pod.as_ref(), &from.netns, explained, attempt, args.send.as_deref());
    let text = match args.admin.json {
        true => format!("{}\n", serde_json::json!(report)),
        false => report.text(Colour::of_stdout()),
    };
    Ok((text, report.well))
}

fn source(client: &Client, status: &Status, text: &str) -> Result<From, String> {
    if text.starts_with('/') {
        let same = |pod: &&Pod| pod.netns.as_os_str() == text;
        return Ok(From { netns: text.into(), pod: status.pods.iter().find(same).cloned() });
    }
    let named = |pod: &&Pod| pod.name == text || format!("{}/{}", pod.namespace, pod.name) == text;
    let account = |pod: &&Pod| {
        let rest = pod.identity.split_once("/ns/").map(|(_, rest)| rest).unwrap_or_default();
        rest.split_once("/sa/").is_some_and(|(namespace, account)| {
            account == text || text.split_once('/').is_some_and(|(n, a)| n == namespace && a == account)
        })
    };
    let mut found: Vec<&Pod> = status.pods.iter().filter(named).collect();
    if found.is_empty() {
        found = status.pods.iter().filter(account).collect();
    }
    match found.as_slice() {
        [pod] => return Ok(From { netns: pod.netns.clone(), pod: Some((*pod).clone()) }),
        [_, _, ..] => return Err(format!("SOURCE {text}: there are several pods of this name; write NAMESPACE/NAME")),
        [] => {}
    }
    let known: super::workloads::Workloads = client.json("/workloads").map_err(|error| error.to_string())?;
    let known =
        known.workloads.iter().find(|one| one.name == text || format!("{}/{}", one.namespace, one.name) == text);
    let pods: Vec<_> = status.pods.iter().map(|pod| format!("{}/{}", pod.namespace, pod.name)).collect();
    let here = if pods.is_empty() { "none".to_owned() } else { pods.join(", ") };
    Err(match known {
        Some(one) if one.in_mesh => {
            format!("SOURCE {text} is no pod of this node: run this where it is; the pods of this node are {here}")
        }
        Some(_) => format!(
            "SOURCE {text} is not in the mesh, and this node's agent does not hold it: write the path of its network namespace; \
             the pods of this node are {here}"
        ),
        None => format!("SOURCE {text}: no workload has this name; the pods of this node are {here}"),
    })
}

/// What would become of it, by what the agent has in force.
fn explain(client: &Client, source: &str, destination: &str, plaintext: bool) -> Result<Answer, String> {
    let sound = |text: &str| text.chars().all(|one| one.is_ascii_alphanumeric() || "-_.:/[]".contains(one));
    if !sound(source) || !sound(destination) {
        return Err(format!(
            "DESTINATION {destination:?}: write WORKLOAD:PORT, SERVICE.NAMESPACE:PORT or ADDRESS:PORT"
        ));
    }
    let plaintext = if plaintext { "&plaintext" } else { "" };
    let path = format!("/explain?source={source}&destination={destination}{plaintext}");
    let (status, text) = client.get(&path).map_err(|error| error.to_string())?;
    if status == StatusCode::OK {
        return serde_json::from_str(&text).map_err(|error| format!("{path} was answered with {text}: {error}"));
    }
    let what: String = serde_json::from_str(&text).unwrap_or(text);
    Err(what.replace("--source", "SOURCE").replace("--destination", "DESTINATION"))
}
