//! What a container runtime says to a CNI plugin and hears from it, by the CNI specification in its versions from 0.3.0 to 1.1.0: environment and
//! configuration in, results and errors out. Pure.

use std::{collections::HashMap, net::IpAddr, path::PathBuf};

use serde::{Deserialize, Deserializer};
use serde_json::{json, value::RawValue};

use super::wire::{PodRef, Valid};

/// That this plugin speaks, the oldest first.
pub const VERSIONS: [&str; 5] = ["0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];
/// Of answers to what names none that is known.
pub const NEWEST: &str = "1.1.0";

/// What went wrong, as the specification numbers it.
#[derive(Debug, thiserror::Error)]
pub enum ProtocolError {
    #[error("the CNI version {version:?} is not spoken here; it may be one of {}", VERSIONS.join(", "))]
    Version { version: String },
    #[error("{variable} {why}")]
    Environment { variable: &'static str, why: String },
    #[error("the configuration on standard input cannot be read: {0}")]
    Decode(String),
    #[error("{0}")]
    Configuration(String),
    #[error("the container {0} is not known here")]
    Unknown(String),
    #[error("{0}")]
    Io(String),
    #[error("{0}")]
    Later(String),
    #[error("{0}")]
    Unavailable(String),
    #[error("{0}")]
    Refused(String),
}

impl ProtocolError {
    pub fn code(&self) -> u32 {
        match self {
            Self::Version { .. } => 1,
            Self::Unknown(_) => 3,
            Self::Environment { .. } => 4,
            Self::Io(_) => 5,
            Self::Decode(_) => 6,
            Self::Configuration(_) => 7,
            Self::Later(_) => 11,
            Self::Unavailable(_) => 50,
            Self::Refused(_) => 100,
        }
    }

    /// As it is printed for the runtime.
    pub fn json(&self, version: &str, details: &str) -> String {
        json!({"cniVersion": version, "code": self.code(), "msg": self.to_string(), "details": details}).to_string()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    Add,
    Del,
    Check,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub fn parse(text: &str) -> Result<Self, ProtocolError> {
        Ok(match text {
            "ADD" => Self::Add,
            "DEL" => Self::Del,
            "CHECK" => Self::Check,
            "GC" => Self::Gc,
            "STATUS" => Self::Status,
            "VERSION" => Self::Version,
            other => return Err(wrong("CNI_COMMAND", format!("is {other:?}, which is no command of CNI"))),
        })
    }

    /// Since which of the versions there is one.
    fn since(self) -> &'static str {
        match self {
            Self::Add | Self::Del | Self::Version => "0.3.0",
            Self::Check => "0.4.0",
            Self::Gc | Self::Status => "1.1.0",
        }
    }
}

/// The part of the environment that names a container.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Container {
    pub id: String,
    pub interface: String,
    pub netns: Option<PathBuf>,
    pub arguments: HashMap<String, String>,
}

impl Container {
    pub fn read(verb: Verb, variable: &dyn Fn(&str) -> Option<String>) -> Result<Self, ProtocolError> {
        let given = |name: &str| variable(name).filter(|text| !text.is_empty());
        let missing = |name| wrong(name, "is not set");
        let id = given("CNI_CONTAINERID").ok_or_else(|| missing("CNI_CONTAINERID"))?;
        let letter = |c: char| c.is_ascii_alphanumeric() || "_.-".contains(c);
        if !id.chars().all(letter) || !id.starts_with(|c: char| c.is_ascii_alphanumeric()) {
            return Err(wrong("CNI_CONTAINERID", format!("is {id:?}, which is no name of a container")));
        }
        let interface = given("CNI_IFNAME").ok_or_else(|| missing("CNI_IFNAME"))?;
        let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
        if interface.len() > 15 || interface == "." || interface == ".." || interface.contains(bad) {
            return Err(wrong("CNI_IFNAME", format!("is {interface:?}, which is no name of an interface")));
        }
        let netns = given("CNI_NETNS").map(PathBuf::from);
        if netns.is_none() && matches!(verb, Verb::Add | Verb::Check) {
            return Err(missing("CNI_NETNS"));
        }
        if netns.as_ref().is_some_and(|path| !path.is_absolute()) {
            return Err(wrong("CNI_NETNS", "is no absolute path"));
        }
        let arguments = given("CNI_ARGS").unwrap_or_default();
        let pairs = arguments.split(';').filter_map(|pair| pair.split_once('='));
        let arguments = pairs.map(|(key, value)| (key.trim().to_owned(), value.trim().to_owned())).collect();
        Ok(Self { id, interface, netns, arguments })
    }

    /// The pod, as the kubelet names it.
    pub fn pod(&self) -> Result<PodRef, ProtocolError> {
        let said = |key: &str| {
            let text = self.arguments.get(key).filter(|text| !text.is_empty())?;
            let letter = |c: char| c.is_ascii_alphanumeric() || ".-".contains(c);
            (text.len() <= 253 && text.chars().all(letter)).then(|| text.clone())
        };
        let wanted = |key: &str| {
            said(key).ok_or_else(|| wrong("CNI_ARGS", format!("says no {key}; this plugin is for pods of Kubernetes")))
        };
        let (namespace, name) = (wanted("K8S_POD_NAMESPACE")?, wanted("K8S_POD_NAME")?);
        Ok(PodRef { namespace, name, uid: said("K8S_POD_UID") })
    }

    pub fn uid(&self) -> Option<String> {
        self.arguments.get("K8S_POD_UID").filter(|uid| !uid.is_empty()).cloned()
    }
}

/// The plugin's configuration, from standard input.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Configuration<'a> {
    pub cni_version: Option<String>,
    pub name: Option<String>,
    /// What the plugins before this one have done, to the letter.
    #[serde(borrow)]
    pub prev_result: Option<&'a RawValue>,
    /// Where the agent listens.
    pub socket: Option<PathBuf>,
    pub timeout_seconds: Option<u64>,
    /// By its name in the specification, and by the one that libcni sends beside it.
    #[serde(rename = "cni.dev/valid-attachments", deserialize_with = "there")]
    valid_attachments: Option<Vec<Valid>>,
    #[serde(rename = "cni.dev/attachments", deserialize_with = "there")]
    attachments: Option<Vec<Valid>>,
}

/// A runtime in Go that has none says `null`, and means so.
fn there<'de, D: Deserializer<'de>>(value: D) -> Result<Option<Vec<Valid>>, D::Error> {
    Option::deserialize(value).map(|valid| Some(valid.unwrap_or_default()))
}

impl<'a> Configuration<'a> {
    pub fn read(text: &'a str) -> Result<Self, ProtocolError> {
        serde_json::from_str(text).map_err(|error| ProtocolError::Decode(error.to_string()))
    }

    /// All attachments that the runtime still has, of this network. Only GC tells them.
    pub fn valid(&self) -> Result<&[Valid], ProtocolError> {
        let told = self.valid_attachments.as_deref().or(self.attachments.as_deref());
        told.ok_or_else(|| ProtocolError::Configuration("cni.dev/valid-attachments is missing".into()))
    }

    /// The version that is spoken, if it is one of ours and has this command.
    pub fn version(&self, verb: Verb) -> Result<&'static str, ProtocolError> {
        // Without a word it is the very first, by the specification.
        let said = self.cni_version.as_deref().unwrap_or("0.1.0");
        let unspoken = || ProtocolError::Version { version: said.to_owned() };
        let at = VERSIONS.iter().position(|known| *known == said).ok_or_else(unspoken)?;
        let since = VERSIONS.iter().position(|known| *known == verb.since()).unwrap_or_default();
        if at < since {
            let why = format!("is {verb:?}, which CNI has since {}, and the configuration is of {said}", verb.since());
            return Err(wrong("CNI_COMMAND", why));
        }
        VERSIONS.get(at).copied().ok_or_else(unspoken)
    }
}

/// The answer to VERSION, in the version that was asked in.
pub fn versions(asked: Option<&str>) -> String {
    let version = VERSIONS.into_iter().find(|known| Some(*known) == asked).unwrap_or(NEWEST);
    json!({"cniVersion": version, "supportedVersions": VERSIONS}).to_string()
}

#[derive(Deserialize)]
struct Outcome {
    #[serde(default)]
    interfaces: Vec<Interface>,
    #[serde(default)]
    ips: Vec<Ip>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Interface {
    name: String,
    sandbox: String,
}

#[derive(Deserialize)]
struct Ip {
    address: String,
    interface: Option<i64>,
}

/// The addresses that a result gives the pod: those of its interface, of others in the sandbox if that has none, and those of
/// which no interface is told.
pub fn addresses(result: &RawValue, interface: &str) -> Result<Vec<IpAddr>, ProtocolError> {
    let unread = |why: String| ProtocolError::Decode(format!("prevResult: {why}"));
    let outcome: Outcome = serde_json::from_str(result.get()).map_err(|error| unread(error.to_string()))?;
    let (mut named, mut others) = (Vec::new(), Vec::new());
    for ip in &outcome.ips {
        let text = ip.address.split_once('/').map_or(ip.address.as_str(), |(address, _)| address);
        let address: IpAddr = text.parse().map_err(|_| unread(format!("{:?} is no address", ip.address)))?;
        let address = address.to_canonical();
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() {
            return Err(unread(format!("{address} can be no pod's address")));
        }
        // Some plugins count from -1 where they do not know.
        let Some(index) = ip.interface.filter(|index| *index >= 0) else {
            named.push(address);
            continue;
        };
        let of = usize::try_from(index).ok().and_then(|index| outcome.interfaces.get(index));
        match of {
            None => return Err(unread(format!("{address} is of the interface {index}, and there is none"))),
            Some(of) if of.sandbox.is_empty() => {}
            Some(of) if of.name == interface => named.push(address),
            Some(_) => others.push(address),
        }
    }
    let mut found = if named.is_empty() { others } else { named };
    found.sort_unstable();
    found.dedup();
    Ok(found)
}

fn wrong(variable: &'static str, why: impl Into<String>) -> ProtocolError {
    ProtocolError::Environment { variable, why: why.into() }
}

#[cfg(test)]
mod tests;
