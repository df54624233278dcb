//! A question about a connection as people ask it, with names: finds both ends in a snapshot and has `policy` explain. Printing the
//! answer is left to whoever was asked.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use serde::{Deserialize, Serialize};

use super::Snapshot;
use crate::policy::{
    Service, Workload,
    explain::{Callee, Caller, explain, explain_service},
};

/// The source is NAMESPACE/NAME, NAME or an address; the destination any of these or a service, with `:PORT`.
#[derive(Clone, Copy, Debug)]
pub struct Question<'a> {
    pub source: &'a str,
    pub destination: &'a str,
    /// The source speaks plaintext, although it may be in the mesh.
    pub plaintext: bool,
    /// Whether the destination may be an address that nothing is known of.
    pub strangers: bool,
}

/// Who calls and who is called, and what becomes of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub source: Party,
    pub destination: Party,
    pub allowed: bool,
    /// `mtls` or `plaintext`.
    pub encryption: String,
    /// In words: who decided.
    pub reason: String,
    /// Of a service: the same of each endpoint, of which a connection reaches one. What is above is of the first.
    #[serde(default)]
    pub by_endpoint: Vec<Endpoint>,
    /// All that has a say, as `marline policy explain --json` prints it.
    pub explanation: serde_json::Value,
    /// The same for people.
    pub text: String,
}

/// What becomes of a connection to one endpoint of a service.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    pub address: SocketAddr,
    pub allowed: bool,
    pub encryption: String,
    pub reason: String,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Party {
    /// Where to connect to; of a source without a port, port 0.
    pub address: SocketAddr,
    /// NAMESPACE/NAME, or a service's host.
    pub name: Option<String>,
    /// Of a workload in the mesh.
    pub identity: Option<String>,
    /// Of a service, where its endpoints listen.
    pub endpoints: Vec<SocketAddr>,
}

impl Answer {
    /// The answer for the endpoint of the service that a connection has reached; false if the service has none there.
    pub fn narrow(&mut self, reached: SocketAddr) -> bool {
        let Some(endpoint) = self.by_endpoint.iter().find(|endpoint| endpoint.address == reached).cloned() else {
            return false;
        };
        (self.allowed, self.encryption, self.reason) = (endpoint.allowed, endpoint.encryption, endpoint.reason);
        true
    }
}

impl Snapshot {
    /// The answer, or what is wrong with the question.
    pub fn answer(&self, question: Question<'_>) -> Result<Answer, String> {
        let Question { source, destination, plaintext, strangers } = question;
        let (address, workload) = self.find(source, "--source")?;
        let (name, port) = destination
            .rsplit_once(':')
            .and_then(|(name, port)| Some((name.trim_matches(['[', ']']), port.parse::<u16>().ok()?)))
            .ok_or_else(|| format!("--destination {destination:?}: write WORKLOAD:PORT"))?;
        let caller = Caller { address, workload, plaintext };
        let source = Party::of(SocketAddr::new(address, 0), workload);
        if let Some(service) = self.service_called(name, port) {
            // Of a headless service the port alone counts.
            let ip = name.parse().ok().or_else(|| service.addresses.first().copied());
            let to = SocketAddr::new(ip.unwrap_or(Ipv4Addr::UNSPECIFIED.into()), port);
            let explanation = explain_service(&self.policies, caller, service, to)
                .ok_or_else(|| format!("--destination {name}: {} has no port {port}", service.host))?;
            let by_endpoint = explanation.endpoints.iter().map(|endpoint| Endpoint {
                address: endpoint.address,
                allowed: endpoint.explanation.allowed,
                encryption: endpoint.explanation.encryption.to_string().to_lowercase(),
                reason: endpoint.explanation.reason.clone(),
            });
            let by_endpoint: Vec<_> = by_endpoint.collect();
            let first = by_endpoint.first().cloned();
            let (encryption, reason) = match first {
                Some(first) => (first.encryption, first.reason),
                None => ("plaintext".to_owned(), "the service has no endpoints".to_owned()),
            };
            let endpoints: Vec<_> = explanation.endpoints.iter().map(|endpoint| endpoint.address).collect();
            let virtual_address = service.addresses.first().map(|address| SocketAddr::new(*address, port));
            let address = match name.parse::<IpAddr>() {
                Ok(address) => SocketAddr::new(address, port),
                Err(_) => virtual_address.or_else(|| endpoints.first().copied()).ok_or_else(|| {
                    format!("--destination {name}: the service has no address, and no endpoints to connect to")
                })?,
            };
            return Ok(Answer {
                source,
                destination: Party { address, name: Some(service.host.clone()), identity: None, endpoints },
                allowed: explanation.allowed,
                encryption,
                reason,
                by_endpoint,
                text: format!("to   {} port {port}\n{explanation}", service.host),
                explanation: serde_json::json!(explanation),
            });
        }
        let (local, destination) = self.find(name, "--destination")?;
        if destination.is_none() && !strangers {
            return Err(format!("--destination {name}: no workload and no service has this address"));
        }
        let local = SocketAddr::new(local, port);
        // As the agents see it: the address may be that of a headless service's endpoint.
        let called = workload.filter(|caller| caller.in_mesh).and_then(|caller| self.called(caller, local));
        let callee = Callee {
            workload: destination,
            address: local,
            service: called.as_ref().map(|called| (&**called.service, &*called.traffic)),
            told_plaintext: workload.is_some_and(|caller| self.told_plaintext(caller, local)),
        };
        let explanation = explain(&self.policies, caller, callee);
        let described = destination.map_or_else(|| "nobody known".to_owned(), describe);
        Ok(Answer {
            source,
            destination: Party::of(local, destination),
            allowed: explanation.allowed,
            encryption: explanation.encryption.to_string().to_lowercase(),
            reason: explanation.reason.clone(),
            by_endpoint: Vec::new(),
            text: format!("to   {described} at {local}\n{explanation}"),
            explanation: serde_json::json!(explanation),
        })
    }

    /// A service by one of its addresses, a port of the nodes, its host, or the beginning of that: NAME.NAMESPACE, NAME.NAMESPACE.svc.
    fn service_called(&self, text: &str, port: u16) -> Option<&Service> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return self.service_at(SocketAddr::new(address, port)).map(|service| &**service);
        }
        let in_full = [text.to_owned(), format!("{text}.svc.cluster.local"), format!("{text}.cluster.local")];
        let found = in_full.iter().filter(|_| text.contains('.')).find_map(|host| self.service_of_host(host));
        found.map(|service| &**service)
    }

    /// The first of the workloads of a service account, ACCOUNT or NAMESPACE/ACCOUNT, if that is one identity's: by policy they are alike.
    fn by_account(&self, text: &str) -> Option<&Workload> {
        let of = |workload: &&Workload| {
            let (namespace, account) = (&workload.namespace, &workload.service_account);
            account == text || text.split_once('/').is_some_and(|(n, a)| n == namespace && a == account)
        };
        let mut found = self.workloads().iter().map(|workload| &**workload).filter(of);
        let first = found.next()?;
        found.all(|other| other.id == first.id).then_some(first)
    }

    /// A workload by its name or one of its addresses; an address may be nobody's.
    fn find(&self, text: &str, option: &str) -> Result<(IpAddr, Option<&Workload>), String> {
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok((address.to_canonical(), self.workload(address).map(|workload| &**workload)));
        }
        let named = |workload: &&Workload| workload.name == text || workload.to_string() == text;
        let all = || self.workloads().iter().map(|workload| &**workload);
        if let Some(workload) = self.by_account(text).filter(|_| !all().any(|one| named(&one)))
            && let Some(address) = workload.addresses.first()
        {
            return Ok((*address, Some(workload)));
        }
        let mut found = all().filter(named);
        match (found.next(), found.next()) {
            (Some(workload), None) => match workload.addresses.first() {
                Some(address) => Ok((*address, Some(workload))),
                None => Err(format!("{option} {text}: this workload has no address")),
            },
            (Some(_), Some(_)) => {
                Err(format!("{option} {text}: there are several; write NAMESPACE/NAME, or an address"))
            }
            (None, _) => Err(format!("{option} {text}: no WorkloadEntry has this name")),
        }
    }
}

impl Party {
    fn of(address: SocketAddr, workload: Option<&Workload>) -> Self {
        Self {
            address,
            name: workload.map(ToString::to_string),
            identity: workload.filter(|workload| workload.in_mesh).map(|workload| workload.id.to_string()),
            endpoints: Vec::new(),
        }
    }
}

/// For people.
pub fn describe(workload: &Workload) -> String {
    let identity = if workload.in_mesh { workload.id.to_string() } else { "not in the mesh".to_owned() };
    format!("{workload} ({identity})")
}
