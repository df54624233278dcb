//! One call of the plugin: environment and standard input in, standard output and an exit code out. It asks the agent, and lets no pod of
//! which the agent does not say that it is captured, or not of the mesh.

use std::{
    io::{Read, Write as _},
    path::Path,
    process::ExitCode,
    time::Duration,
};

use super::{
    SOCKET, client,
    protocol::{Configuration, Container, NEWEST, ProtocolError, Verb, addresses, versions},
    wire::{Answer, Attachment, Gone, Request},
};

/// For how long ADD waits, if the configuration does not say. The kubelet gives a sandbox two minutes, and tries again.
const TIMEOUT: Duration = Duration::from_secs(30);
const LONGEST: Duration = Duration::from_secs(110);
/// For what needs no waiting.
const SHORT: Duration = Duration::from_secs(5);
/// What is read of a configuration.
const INPUT: u64 = 4 << 20;

const WAY_OUT: &str = "no pod starts on this node until the agent runs: look at the pod marline-agent of this node (kubectl -n marline-system get \
                       pods -o wide; kubectl logs) and at `marline status`; to run pods without Marline, uninstall it: marline cni uninstall";

/// What is printed, and the exit code.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Said {
    pub out: String,
    pub well: bool,
}

type Asked<'a> = &'a dyn Fn(&Path, &Request, Duration) -> Result<Answer, client::ClientError>;

/// The plugin's main, for the runtime that has called it.
pub fn main() -> ExitCode {
    let said = call(&|name| std::env::var(name).ok(), &mut std::io::stdin().lock(), &client::ask);
    let mut out = std::io::stdout().lock();
    // A runtime that does not listen goes by the code.
    let _ = out.write_all(said.out.as_bytes()).and_then(|()| out.flush());
    if said.well { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// One call.
pub fn call(variable: &dyn Fn(&str) -> Option<String>, input: &mut dyn Read, ask: Asked<'_>) -> Said {
    let mut text = String::new();
    let read = input.take(INPUT).read_to_string(&mut text);
    let read = read.map_err(|error| ProtocolError::Io(format!("standard input: {error}")));
    // Errors are told in the version of the caller, where that is one.
    let spoken = Configuration::read(&text).ok().and_then(|read| read.version(Verb::Add).ok()).unwrap_or(NEWEST);
    match read.and_then(|_| answer(variable, &text, ask)) {
        Ok(out) => Said { out, well: true },
        Err(error) => {
            let details =
                if matches!(error, ProtocolError::Later(_) | ProtocolError::Unavailable(_)) { WAY_OUT } else { "" };
            Said { out: format!("{}\n", error.json(spoken, details)), well: false }
        }
    }
}

fn answer(variable: &dyn Fn(&str) -> Option<String>, text: &str, ask: Asked<'_>) -> Result<String, ProtocolError> {
    let verb = Verb::parse(&variable("CNI_COMMAND").unwrap_or_default())?;
    if verb == Verb::Version {
        let asked = Configuration::read(text).ok().and_then(|read| read.cni_version);
        return Ok(format!("{}\n", versions(asked.as_deref())));
    }
    let configuration = Configuration::read(text)?;
    configuration.version(verb)?;
    let socket = configuration.socket.as_deref().unwrap_or(Path::new(SOCKET));
    let timeout =
        configuration.timeout_seconds.map_or(TIMEOUT, Duration::from_secs).clamp(Duration::from_secs(1), LONGEST);
    let network = configuration.name.clone().unwrap_or_default();
    match verb {
        Verb::Add => {
            let (attachment, result) = attachment(variable, verb, &configuration, network, timeout)?;
            match ask(socket, &Request::Add(attachment), timeout).map_err(later)? {
                // To the letter: what is behind this plugin in the chain, and the runtime, see what was before it.
                Answer::Captured | Answer::Outside => Ok(format!("{result}\n")),
                other => Err(refused(other)),
            }
        }
        Verb::Check => {
            let (attachment, _) = attachment(variable, verb, &configuration, network, SHORT)?;
            match ask(socket, &Request::Check(attachment), SHORT).map_err(later)? {
                Answer::Captured | Answer::Outside => Ok(String::new()),
                other => Err(refused(other)),
            }
        }
        Verb::Del => {
            let container = Container::read(verb, variable)?;
            let gone = Gone { uid: container.uid(), container: container.id };
            // Without an agent there is nothing to be undone: the next one finds that the namespace is gone.
            let _ = ask(socket, &Request::Del(gone), Duration::ZERO);
            Ok(String::new())
        }
        Verb::Gc => {
            let Some(valid) = configuration.valid else {
                return Err(ProtocolError::Configuration("cni.dev/valid-attachments is missing".into()));
            };
            let _ = ask(socket, &Request::Gc { network, valid }, Duration::ZERO);
            Ok(String::new())
        }
        Verb::Status => match ask(socket, &Request::Status, SHORT) {
            Ok(Answer::Done) => Ok(String::new()),
            Ok(Answer::Later { why } | Answer::Refused { why }) => Err(ProtocolError::Unavailable(why)),
            Ok(other) => Err(refused(other)),
            Err(error) => Err(ProtocolError::Unavailable(error.to_string())),
        },
        Verb::Version => Ok(String::new()),
    }
}

fn attachment<'a>(
    variable: &dyn Fn(&str) -> Option<String>,
    verb: Verb,
    configuration: &Configuration<'a>,
    network: String,
    timeout: Duration,
) -> Result<(Attachment, &'a str), ProtocolError> {
    let container = Container::read(verb, variable)?;
    let result = configuration.prev_result.ok_or_else(|| {
        let why = "there is no prevResult: marline-cni comes after the plugin that makes the pod's interface, in the same list";
        ProtocolError::Configuration(why.into())
    })?;
    let attachment = Attachment {
        network,
        pod: container.pod()?,
        addresses: addresses(result, &container.interface)?,
        netns: container.netns.unwrap_or_default(),
        container: container.id,
        interface: container.interface,
        wait_ms: u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX),
    };
    Ok((attachment, result.get()))
}

fn later(error: client::ClientError) -> ProtocolError {
    ProtocolError::Later(error.to_string())
}

fn refused(answer: Answer) -> ProtocolError {
    match answer {
        Answer::Later { why } => ProtocolError::Later(why),
        Answer::Refused { why } => ProtocolError::Refused(why),
        other => ProtocolError::Io(format!("the agent answered something else than was asked: {other:?}")),
    }
}
