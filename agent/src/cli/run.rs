//! `marline run -- CMD`: becomes a command whose connect and accept calls are held for the agent. The keeper takes the filter's
//! descriptor; what the calls are answered is the agent's matter.

use std::{
    ffi::OsString,
    fs, io,
    os::{fd::AsFd, unix::process::CommandExt},
    path::{Path, PathBuf},
    process::{self, Command, ExitCode},
    sync::Arc,
};

use crate::{
    config::{self, ConfigErrors},
    keeper::{self, Container, Offer, OfferError},
    state::LocalPod,
    sys::{netns::Netns, seccomp},
    words::with_causes,
};

/// Those of env(1) and nice(1): apart from what commands commonly end with.
const FAILED: u8 = 125;
const NOT_EXECUTABLE: u8 = 126;
const NOT_FOUND: u8 = 127;

#[derive(clap::Args)]
#[command(after_long_help = "\
Runs COMMAND under a seccomp filter that holds its connect, accept and accept4 calls, and those of all that it starts, until the
agent has answered them: so its connections in the mesh go without a proxy in between. Everything else that it does is untouched,
filters of its own included. Calls that do not concern the mesh are carried out by the kernel.

With --identity the command runs as that workload: in its network namespace (the annotation marline.io/netns of its WorkloadEntry)
and in the cgroup NS.SA below capture.cgroup. Without it, it stays where it is, which should be in a pod.

The command takes the place of this program: the process id, and the exit code, are the command's own. Exit codes of
this program itself: 125 it failed (no keeper, no such workload, ...), 126 the command cannot be run, 127 the command is not there,
2 the command line is wrong.

A filter cannot be taken off, and a process can have one that holds calls: `marline run` inside of `marline run` fails.

  marline run -- curl http://10.10.2.2:8080/
  marline run --identity shop/web --config /etc/marline -- nginx -g 'daemon off;'")]
pub(super) struct Args {
    /// Run as the workload of this service account
    #[arg(long, value_name = "NS/SA", value_parser = identity, requires = "config")]
    identity: Option<(String, String)>,
    /// The configuration directory of the agent, where the workload is looked up
    #[arg(long, value_name = "DIR", env = "MARLINE_CONFIG")]
    config: Option<PathBuf>,
    /// The directory of the keeper's sockets
    #[arg(long, value_name = "DIR", env = "MARLINE_KEEPER", default_value = keeper::DIRECTORY)]
    keeper: PathBuf,
    /// Without the filter, and without a keeper: every connection is proxied
    #[arg(long)]
    without_direct: bool,
    /// The command and its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
}

#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("the configuration is wrong\n{0}")]
    Config(#[from] ConfigErrors),
    #[error("no local workload has the identity {0}; those that have one here: {1}")]
    Unknown(String, String),
    #[error("the identity {0} is that of pods in different network namespaces: {1}")]
    Ambiguous(String, String),
    #[error("cannot enter the network namespace {}", path.display())]
    Netns { path: PathBuf, source: io::Error },
    #[error("cannot enter the cgroup {}", path.display())]
    Cgroup { path: PathBuf, source: io::Error },
    #[error("cannot be put under the filter: it is under one that holds calls already")]
    Nested,
    #[error("cannot be put under the filter")]
    Filter(#[source] io::Error),
    #[error(transparent)]
    Offer(#[from] OfferError),
}

/// Returns only if it fails. Writes no log: there are no threads but this one, which the command takes the place of.
pub(super) fn run(args: &Args) -> ExitCode {
    if let Err(error) = prepare(args) {
        let way = match error {
            RunError::Offer(OfferError::Absent { .. }) => " (--without-direct does without)",
            _ => "",
        };
        eprintln!("marline run: {}{way}", with_causes(&error));
        return ExitCode::from(FAILED);
    }
    let Some((program, arguments)) = args.command.split_first() else { return ExitCode::from(FAILED) };
    let error = Command::new(program).args(arguments).exec();
    eprintln!("marline run: {}: {error}", Path::new(program).display());
    ExitCode::from(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE })
}

fn prepare(args: &Args) -> Result<(), RunError> {
    // Under the filter nothing here can connect any more.
    let offer = if args.without_direct { None } else { Some(Offer::connect(&args.keeper)?) };
    let mut name = "marline run".to_owned();
    if let (Some((namespace, account)), Some(dir)) = (&args.identity, &args.config) {
        name = format!("{namespace}/{account}");
        settle(namespace, account, dir)?;
    }
    let Some(offer) = offer else { return Ok(()) };
    let descriptor = seccomp::install().map_err(|error| match error.raw_os_error() {
        Some(libc::EBUSY) => RunError::Nested,
        _ => RunError::Filter(error),
    })?;
    let container = Container { pid: process::id(), id: format!("{name} {}", process::id()), metadata: "run".into() };
    let handed = offer.hand_over(descriptor.as_fd(), &container);
    // Both close with exec or exit. A close() of our own would be held, and there may be nobody to answer it.
    std::mem::forget((offer, descriptor));
    Ok(handed?)
}

/// Moves this process to where the identity's pod is.
fn settle(namespace: &str, account: &str, dir: &Path) -> Result<(), RunError> {
    let loaded = config::load(dir)?;
    let path = netns_of(&loaded.snapshot.local, namespace, account)?;
    let cgroup = loaded.agent.capture.cgroup.join(format!("{namespace}.{account}"));
    let entered = fs::create_dir_all(&cgroup).and_then(|()| fs::write(cgroup.join("cgroup.procs"), "0"));
    entered.map_err(|source| RunError::Cgroup { path: cgroup, source })?;
    let entered = Netns::open(&path).and_then(|netns| netns.enter());
    entered.map_err(|source| RunError::Netns { path, source })
}

fn netns_of(local: &[Arc<LocalPod>], namespace: &str, account: &str) -> Result<PathBuf, RunError> {
    let (mut paths, mut others) = (Vec::new(), Vec::new());
    for LocalPod { workload, netns, .. } in local.iter().map(AsRef::as_ref) {
        if workload.namespace == namespace && workload.service_account == account {
            paths.push(netns.clone());
        }
        others.push(format!("{}/{}", workload.namespace, workload.service_account));
    }
    paths.sort();
    paths.dedup();
    others.sort();
    others.dedup();
    let name = format!("{namespace}/{account}");
    match paths.as_slice() {
        [path] => Ok(path.clone()),
        [] if others.is_empty() => Err(RunError::Unknown(name, "none".into())),
        [] => Err(RunError::Unknown(name, others.join(", "))),
        several => {
            let several: Vec<_> = several.iter().map(|path| path.display().to_string()).collect();
            Err(RunError::Ambiguous(name, several.join(", ")))
        }
    }
}

fn identity(text: &str) -> Result<(String, String), String> {
    match text.split_once('/') {
        Some((namespace, account)) if !namespace.is_empty() && !account.is_empty() && !account.contains('/') => {
            Ok((namespace.to_owned(), account.to_owned()))
        }
        _ => Err("write NAMESPACE/SERVICEACCOUNT".into()),
    }
}
