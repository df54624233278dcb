//! `marline ca`: makes CAs, runs the service that signs for agents, and what belongs to running it: tokens, and shutting nodes out. The
//! work is `identity::ca`'s and the `ca` room's.

mod revoke;

use std::{
    fs::OpenOptions,
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime},
};

use clap::Subcommand;

use super::{WRONG_CONFIGURATION, failed};
use crate::{
    app,
    ca::{self, CaError, caller::tokens},
    config::{self, CaServerConfig, ConfigErrors, Keeping},
    identity::{TrustDomain, ca::Ca},
    words::with_causes,
};

#[derive(Subcommand)]
pub(super) enum CaCommand {
    /// Make a new self-signed CA in DIR, in the layout of Istio's `cacerts`; nothing that exists is overwritten
    Init {
        dir: PathBuf,
        #[arg(long, default_value = "cluster.local")]
        trust_domain: String,
    },
    /// Make a new intermediate in DIR, signed by the CA in ABOVE and with its roots: copy its files over those in spec.ca.path, and the
    /// agents sign with it from then on
    Intermediate { above: PathBuf, dir: PathBuf },
    /// Sign certificates for agents and workloads, over Istio's signing API, until told to stop (SIGTERM, SIGINT)
    Serve {
        /// The file with the CaServer
        #[arg(long)]
        config: PathBuf,
    },
    /// Make a token for the agent of a node, and print its entry for the file of kind CaTokens: the token itself is told once
    Token {
        #[arg(long)]
        node: String,
        /// Where to write the token, for the agent's spec.ca.tokenFile; nothing that exists is overwritten
        #[arg(long)]
        out: PathBuf,
        /// How long it counts, such as 30d; for ever if not given
        #[arg(long, value_parser = humantime::parse_duration)]
        expires: Option<Duration>,
        /// The addresses or networks from which it may be used; anywhere if not given
        #[arg(long)]
        from: Vec<String>,
    },
    /// Shut a node out: no more certificates for it, and those that it has go on the CA's revocation list. Works whether the service runs
    /// or not; may be repeated
    Revoke {
        /// The file with the CaServer
        #[arg(long)]
        config: PathBuf,
        #[arg(long)]
        node: String,
        /// Let the node have certificates again; what was put on the list stays there
        #[arg(long)]
        undo: bool,
        /// Print what was done as JSON
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(command: CaCommand) -> ExitCode {
    match command {
        CaCommand::Init { dir, trust_domain } => {
            let made = TrustDomain::parse(&trust_domain)
                .map_err(|error| with_causes(&error))
                .and_then(|domain| Ca::init(&dir, &domain).map_err(|error| with_causes(&error)));
            said(made.map(|()| format!("a CA for {trust_domain} is in {}", dir.display())))
        }
        CaCommand::Intermediate { above, dir } => {
            let made = Ca::open(&above).and_then(|ca| {
                let domain = ca.trust_domain().cloned().unwrap_or_default();
                ca.init_intermediate(&above, &dir, &domain)
            });
            let text = || format!("an intermediate CA under {} is in {}", above.display(), dir.display());
            said(made.map(|()| text()).map_err(|error| with_causes(&error)))
        }
        CaCommand::Serve { config } => serve(&config),
        CaCommand::Token { node, out, expires, from } => token(&node, &out, expires, &from),
        CaCommand::Revoke { config, node, undo, json } => revoke::run(&config, &node, undo, json),
    }
}

/// Reads a CaServer and the files that it names, as the service would. The text says what was found.
pub(super) fn check(file: &Path) -> Result<(String, Vec<config::Finding>), ConfigErrors> {
    let (settings, mut warnings) = config::load_ca_server(file)?;
    let mut errors = ConfigErrors { errors: Vec::new(), warnings: Vec::new() };
    let mut tell = |found: Result<usize, ConfigErrors>| {
        found.unwrap_or_else(|more| {
            errors.errors.extend(more.errors);
            0
        })
    };
    let tokens = settings.tokens.as_ref().map_or(0, |path| {
        tell(config::load_ca_tokens(path).map(|(tokens, more)| {
            warnings.extend(more);
            tokens.len()
        }))
    });
    let nodes = match &settings.keeping {
        Keeping::Files(files) => {
            let nodes = tell(config::load_ca_nodes(&files.nodes).map(|(nodes, _)| nodes.len()));
            format!("{nodes} nodes")
        }
        Keeping::Cluster(names) => format!("in a cluster, kept in Secret {}/{}", names.namespace, names.secret),
    };
    match errors.errors.is_empty() {
        true => Ok((format!("{}: good, {tokens} tokens, {nodes}", file.display()), warnings)),
        false => Err(errors),
    }
}

fn serve(file: &Path) -> ExitCode {
    let settings = match load(file) {
        Ok(settings) => settings,
        Err(code) => return code,
    };
    let runtime = match app::runtime() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&with_causes(&error)),
    };
    app::raise_descriptor_limit();
    match runtime.block_on(ca::run(settings)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(CaError::Config(errors)) => {
            eprintln!("{errors}");
            ExitCode::from(WRONG_CONFIGURATION)
        }
        Err(error) => failed(&with_causes(&error)),
    }
}

fn token(node: &str, out: &Path, expires: Option<Duration>, from: &[String]) -> ExitCode {
    if let Some(wrong) = from.iter().find(|text| config::Network::parse(text).is_none()) {
        eprintln!("marline: --from {wrong:?}: is no address and no network; write 10.0.0.7 or 10.0.0.0/24");
        return ExitCode::from(WRONG_CONFIGURATION);
    }
    let (token, hash) = tokens::generate();
    if let Err(error) = write_secret(out, &token) {
        return failed(&format!("cannot write {}: {error}", out.display()));
    }
    // JSON's texts are YAML's.
    println!("    - sha256: {hash}\n      node: {}", serde_json::json!(node));
    if let Some(end) = expires.and_then(|life| SystemTime::now().checked_add(life)) {
        println!("      expires: \"{}\"", humantime::format_rfc3339_seconds(end));
    }
    if !from.is_empty() {
        println!("      from: {}", serde_json::json!(from));
    }
    ExitCode::SUCCESS
}

fn write_secret(path: &Path, text: &str) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    writeln!(file, "{text}")?;
    file.sync_all()
}

fn load(file: &Path) -> Result<CaServerConfig, ExitCode> {
    match config::load_ca_server(file) {
        Ok((settings, warnings)) => {
            for warning in warnings {
                tracing::warn!("configuration: {warning}");
            }
            Ok(settings)
        }
        Err(errors) => {
            eprintln!("{errors}");
            Err(ExitCode::from(WRONG_CONFIGURATION))
        }
    }
}

fn said(done: Result<String, String>) -> ExitCode {
    match done {
        Ok(text) => {
            println!("{text}");
            ExitCode::SUCCESS
        }
        Err(error) => failed(&error),
    }
}
