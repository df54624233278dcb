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
    // What ends is never held up, whoever changed the configuration meanwhile.
    if verb != Verb::Del {
        configuration.version(verb)?;
    }
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
            let valid = configuration.valid()?.to_vec();
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

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, io, path::PathBuf};

    use serde_json::{Value, json};

    use super::*;

    const RESULTS: [&str; 3] = [
        include_str!("testdata/result-bridge.json"),
        include_str!("testdata/result-calico.json"),
        include_str!("testdata/result-cilium.json"),
    ];

    fn input(result: &str) -> String {
        let result: Value = serde_json::from_str(result).unwrap();
        json!({"cniVersion": "1.0.0", "name": "pods", "type": "marline-cni", "prevResult": result}).to_string()
    }

    /// What is said, and what the agent was asked, where the agent answers so.
    fn called(command: &str, input: &str, answer: Result<Answer, ()>) -> (Said, Option<Request>) {
        let variable = |name: &str| {
            Some(match name {
                "CNI_COMMAND" => command.to_owned(),
                "CNI_CONTAINERID" => "c1".to_owned(),
                "CNI_NETNS" => "/run/netns/cni-1".to_owned(),
                "CNI_IFNAME" => "eth0".to_owned(),
                "CNI_PATH" => "/opt/cni/bin".to_owned(),
                "CNI_ARGS" => "IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web;K8S_POD_UID=a-1".to_owned(),
                _ => return None,
            })
        };
        let asked = RefCell::new(None);
        let ask = |_: &Path, request: &Request, _: Duration| {
            *asked.borrow_mut() = Some(request.clone());
            let absent = |()| client::ClientError::Absent {
                path: PathBuf::from("/run/marline/cni.sock"),
                source: io::ErrorKind::NotFound.into(),
            };
            answer.clone().map_err(absent)
        };
        let said = call(&variable, &mut input.as_bytes(), &ask);
        (said, asked.into_inner())
    }

    fn code(said: &Said) -> u64 {
        assert!(!said.well, "{}", said.out);
        serde_json::from_str::<Value>(&said.out).unwrap()["code"].as_u64().unwrap()
    }

    #[test]
    fn add_gives_back_what_was_before_it_if_the_agent_has_the_pod_and_asks_with_its_addresses() {
        for result in RESULTS {
            for answer in [Answer::Captured, Answer::Outside] {
                let (said, asked) = called("ADD", &input(result), Ok(answer));
                assert!(said.well, "{}", said.out);
                let before: Value = serde_json::from_str(result).unwrap();
                assert_eq!(serde_json::from_str::<Value>(&said.out).unwrap(), before);
                let Some(Request::Add(attachment)) = asked else { panic!("{asked:?}") };
                assert_eq!(attachment.pod.uid.as_deref(), Some("a-1"));
                let told = |address: &std::net::IpAddr| result.contains(&address.to_string());
                assert!(!attachment.addresses.is_empty() && attachment.addresses.iter().all(told), "{attachment:?}");
            }
        }
    }

    #[test]
    fn whatever_else_the_agent_says_or_does_not_say_no_pod_starts() {
        let why = || "because".to_owned();
        let answers = [Ok(Answer::Done), Ok(Answer::Later { why: why() }), Ok(Answer::Refused { why: why() }), Err(())];
        for answer in answers {
            let (said, _) = called("ADD", &input(RESULTS[0]), answer.clone());
            assert!(code(&said) > 0, "{answer:?}");
        }
        assert_eq!(code(&called("ADD", &input(RESULTS[0]), Err(())).0), 11, "the kubelet tries again");
        let without = json!({"cniVersion": "1.0.0", "name": "pods", "type": "marline-cni"}).to_string();
        let (said, asked) = called("ADD", &without, Ok(Answer::Captured));
        assert!(code(&said) > 0 && asked.is_none(), "without prevResult nobody has made an interface");
        assert!(code(&called("ADD", "{", Ok(Answer::Captured)).0) > 0);
        assert!(code(&called("PAINT", &input(RESULTS[0]), Ok(Answer::Captured)).0) > 0);
    }

    #[test]
    fn del_succeeds_without_an_agent_and_version_and_status_say_what_is_so() {
        let (said, asked) = called("DEL", &input(RESULTS[0]), Err(()));
        assert!(said.well && said.out.is_empty() && matches!(asked, Some(Request::Del(_))));
        for version in ["0.1.0", "1.2.0", "nonsense"] {
            let unspoken = json!({"cniVersion": version, "name": "pods", "type": "marline-cni"}).to_string();
            let (said, asked) = called("DEL", &unspoken, Ok(Answer::Done));
            assert!(said.well && matches!(asked, Some(Request::Del(_))), "{version}: {}", said.out);
            assert_eq!(code(&called("ADD", &unspoken, Ok(Answer::Captured)).0), 1, "{version}");
        }
        let (said, asked) = called("VERSION", "{\"cniVersion\": \"1.0.0\"}", Err(()));
        assert!(said.well && asked.is_none() && said.out.contains("supportedVersions"), "{}", said.out);
        let status = json!({"cniVersion": "1.1.0", "name": "pods", "type": "marline-cni"}).to_string();
        assert!(called("STATUS", &status, Ok(Answer::Done)).0.well);
        assert_eq!(code(&called("STATUS", &status, Err(())).0), 50, "the plugin is not available");
        // As libcni sends it.
        let gc = json!({
            "cniVersion": "1.1.0", "name": "pods", "type": "marline-cni",
            "cni.dev/valid-attachments": null, "cni.dev/attachments": null,
        });
        assert!(matches!(
            called("GC", &gc.to_string(), Ok(Answer::Done)),
            (Said { well: true, .. }, Some(Request::Gc { .. }))
        ));
    }
}
