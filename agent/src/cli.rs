//! What people type: the programs of a node (`agent`, `keeper`, `run`), what asks a running agent (`status`, `workloads`, `connections`,
//! `top`, `check`, `certs`, `bugreport`), and what asks files (`check-config`, `policy`, `ca`). Exit codes: 0 done and well, 1 failed or not
//! well, 2 the command line or the configuration is wrong, or no agent answers; `marline run` has its command's.

mod bugreport;
mod ca;
mod certs;
mod check;
mod client;
mod cni;
mod connections;
mod generate;
mod keeper;
mod policy;
mod run;
mod status;
mod table;
mod top;
mod workloads;

use std::{path::PathBuf, process::ExitCode};

use clap::{CommandFactory as _, Parser, Subcommand};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    app,
    bpf::{
        Capture,
        probe::{ProbeArgs, probe_main},
    },
    config,
    logging::{self, Levels},
    sys::memory,
    words::{PumpKind, with_causes},
};

const WRONG_CONFIGURATION: u8 = 2;

#[derive(Parser)]
#[command(
    name = "marline",
    version,
    about = "A mesh agent for one node: mTLS between pods, with the kernel encrypting"
)]
struct Cli {
    /// What to log, as in RUST_LOG: `info`, `debug`, `marline::proxy=trace`
    #[arg(long, global = true, env = "MARLINE_LOG", default_value = "info")]
    log: String,
    /// Log as JSON lines
    #[arg(long, global = true)]
    log_json: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run the agent of this node until it is told to stop (SIGTERM, SIGINT)
    #[command(after_long_help = "  marline agent --config /etc/marline")]
    Agent {
        /// The directory with the AgentConfig and Istio's resources; changes are followed while running
        #[arg(long)]
        config: PathBuf,
        /// Wait while another agent has this node, and follow it when it ends; without this, end with an error
        #[arg(long)]
        wait: bool,
    },
    /// Hold the notify descriptors of pods' seccomp filters, so that their calls outlive the agent
    Keeper(keeper::Args),
    /// Run a command whose connections in the mesh need no proxy between
    Run(run::Args),
    #[command(after_long_help = "  marline check-config /etc/marline")]
    /// Read a configuration directory (or the file of a CA service), list everything that is wrong with it, and exit with 2 if the agent
    /// (or the service) would refuse it
    CheckConfig {
        /// An agent's directory, or a file with a CaServer
        dir: PathBuf,
        /// Print the findings as JSON
        #[arg(long)]
        json: bool,
    },
    /// Ask the policies of a directory, without an agent
    #[command(after_long_help = "\
  marline policy check /etc/marline
  marline policy explain --config /etc/marline --source shop/web --destination shop/db:5432")]
    Policy {
        #[command(subcommand)]
        command: policy::PolicyCommand,
    },
    #[command(after_long_help = "  marline ca init /etc/marline/ca --trust-domain cluster.local")]
    /// The certificate authority: make one, or run the service that signs for agents
    Ca {
        #[command(subcommand)]
        command: ca::CaCommand,
    },
    /// Keep pods of a Kubernetes node from starting uncaptured: the CNI plugin, which container runtimes call, and its installation
    Cni(cni::Args),
    /// Is this node healthy? One line for each part, with the way out where something is not
    Status(status::StatusArgs),
    /// List the workloads that a running agent knows
    Workloads(workloads::WorkloadsArgs),
    /// List who talks to whom through a running agent, or did a moment ago, and how
    Connections(connections::ConnectionsArgs),
    /// Watch a running agent's flows: rates, totals, mTLS or not
    Top(top::TopArgs),
    /// Try a connection from a pod of this node, and look at the wire: which mode, which identities, which policy, encrypted or not
    Check(check::CheckArgs),
    /// List the certificates that a running agent holds, and how they stand
    Certs(certs::CertsArgs),
    /// Gather what somebody who is to help must know into one archive, without secrets
    Bugreport(bugreport::BugreportArgs),
    /// Print what completes this program's command line in a shell
    Completions(generate::CompletionsArgs),
    /// Print this program's manual page, or write those of all its commands
    Man(generate::ManArgs),
    /// Try what this kernel can do for Marline, by a real handshake and transfer over loopback
    #[command(after_long_help = "  marline kernel --json")]
    Kernel {
        /// Print the answer as JSON
        #[arg(long)]
        json: bool,
    },
    /// Let go of every pod that an agent left captured: remove the kernel programs, links and maps pinned at PIN_PATH. Traffic of
    /// those pods flows in the clear afterwards
    #[command(after_long_help = "  marline unload /sys/fs/bpf/marline")]
    Unload {
        #[arg(default_value = "/sys/fs/bpf/marline")]
        pin_path: PathBuf,
        /// Stay when it is done, until SIGTERM: the container of a DaemonSet may not end
        #[arg(long)]
        stay: bool,
    },
    #[command(hide = true)]
    InternalProbe(ProbeArgs),
    #[command(hide = true)]
    InternalCheck(check::probe::CheckProbeArgs),
}

/// What can be typed.
pub fn command() -> clap::Command {
    Cli::command()
}

pub fn run() -> ExitCode {
    if let Some(code) = cni::called() {
        return code;
    }
    let cli = Cli::parse();
    // Before there is a log with its thread.
    match &cli.command {
        Command::Run(args) => return run::run(args),
        // Several are started with each agent, and what they have to say is told in their answers.
        Command::InternalProbe(args) => return probe_main(args),
        _ => {}
    }
    if let Command::Cni(args) = &cli.command
        && cni::is_plugin(args)
    {
        return cni::plugin();
    }
    let (levels, _flush) = match logging::init(&cli.log, cli.log_json) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("marline: --log {:?}: {}", cli.log, with_causes(&error));
            return ExitCode::from(WRONG_CONFIGURATION);
        }
    };
    match cli.command {
        Command::Agent { config, wait } => agent(config, levels, wait),
        Command::Keeper(args) => keeper::run(&args),
        Command::Run(args) => run::run(&args),
        Command::CheckConfig { dir, json } => check_config(&dir, json),
        Command::Policy { command } => policy::run(&command),
        Command::Certs(args) => certs::run(&args),
        Command::Ca { command } => ca::run(command),
        Command::Cni(args) => cni::run(args),
        Command::Status(args) => status::run(&args),
        Command::Workloads(args) => workloads::run(&args),
        Command::Connections(args) => connections::run(&args),
        Command::Top(args) => top::run(&args),
        Command::Check(args) => check::run(&args),
        Command::Bugreport(args) => bugreport::run(&args),
        Command::Completions(args) => generate::completions(&args),
        Command::Man(args) => generate::man(&args),
        Command::InternalCheck(args) => check::probe::main(&args),
        Command::Kernel { json } => kernel(json),
        Command::Unload { pin_path, stay } => match unload(&pin_path, stay) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => failed(&why),
        },
        Command::InternalProbe(args) => probe_main(&args),
    }
}

fn agent(dir: PathBuf, levels: Levels, wait: bool) -> ExitCode {
    memory::share_heaps();
    match app::runtime().and_then(|runtime| runtime.block_on(app::run(dir, levels, wait))) {
        Ok(()) => ExitCode::SUCCESS,
        Err(app::AppError::Config(errors)) => {
            eprintln!("{}", table::plain_lines(&errors.to_string()));
            ExitCode::from(WRONG_CONFIGURATION)
        }
        Err(error) => failed(&with_causes(&error)),
    }
}

fn unload(pin_path: &std::path::Path, stay: bool) -> Result<(), String> {
    Capture::unload(pin_path).map_err(|error| with_causes(&error))?;
    println!("nothing is pinned at {} any more: the pods that were captured by it are let go", pin_path.display());
    if stay {
        app::runtime().map_err(|error| with_causes(&error))?.block_on(told_to_end())?;
    }
    Ok(())
}

/// Returns at SIGTERM and SIGINT.
async fn told_to_end() -> Result<(), String> {
    let mut terminate = signal(SignalKind::terminate()).map_err(|error| error.to_string())?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(|error| error.to_string())?;
    tokio::select! { _ = terminate.recv() => {} _ = interrupt.recv() => {} }
    Ok(())
}

fn kernel(json: bool) -> ExitCode {
    let found = match app::kernel_alone() {
        Ok(found) => found,
        Err(error) => return failed(&with_causes(&error)),
    };
    let suites: Vec<_> = found.suites.iter().map(|suite| format!("{suite:?}")).collect();
    if json {
        println!("{}", serde_json::json!({ "kernel_tls": suites, "pump": found.pump, "why": found.why }));
    } else {
        println!("kernel TLS: {}", if suites.is_empty() { "no".into() } else { suites.join(", ") });
        println!("pump: {}", if found.pump == PumpKind::Splice { "splice" } else { "copy" });
        println!("why: {}", found.why);
    }
    ExitCode::SUCCESS
}

fn check_config(dir: &std::path::Path, json: bool) -> ExitCode {
    if dir.is_file() {
        return check_service(dir, json);
    }
    let (text, findings, code) = match config::load(dir) {
        Ok(loaded) => {
            let lines: Vec<_> = loaded.warnings.iter().map(|warning| format!("warning: {warning}")).collect();
            let summary = format!(
                "{}: good, {} local pods, {} workloads, {} warnings",
                dir.display(),
                loaded.snapshot.local.len(),
                loaded.snapshot.workloads().len(),
                lines.len()
            );
            let json = serde_json::json!({ "errors": [], "warnings": loaded.warnings });
            ([lines, vec![summary]].concat().join("\n"), json, ExitCode::SUCCESS)
        }
        Err(errors) => refused(&errors),
    };
    told(&text, &findings, json);
    code
}

fn check_service(file: &std::path::Path, json: bool) -> ExitCode {
    let (text, findings, code) = match ca::check(file) {
        Ok((summary, warnings)) => {
            let lines: Vec<_> = warnings.iter().map(|warning| format!("warning: {warning}")).collect();
            let json = serde_json::json!({ "errors": [], "warnings": warnings });
            ([lines, vec![summary]].concat().join("\n"), json, ExitCode::SUCCESS)
        }
        Err(errors) => refused(&errors),
    };
    told(&text, &findings, json);
    code
}

fn refused(errors: &config::ConfigErrors) -> (String, serde_json::Value, ExitCode) {
    (errors.to_string(), serde_json::json!(errors), ExitCode::from(WRONG_CONFIGURATION))
}

fn told(text: &str, findings: &serde_json::Value, json: bool) {
    if json {
        println!("{findings}");
    } else {
        println!("{text}");
    }
}

/// Prints what a command has to say. What cannot be asked is an error of the command line, as no agent is.
fn finish(answer: Result<(String, bool), String>) -> ExitCode {
    match answer {
        Ok((text, well)) => {
            print(&text);
            if well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
        }
        Err(error) => {
            eprintln!("marline: {}", table::plain_lines(&error));
            ExitCode::from(WRONG_CONFIGURATION)
        }
    }
}

/// To standard output. A reader who has seen enough (`| head`) is no failure.
fn print(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

fn failed(text: &str) -> ExitCode {
    eprintln!("marline: {text}");
    ExitCode::FAILURE
}
