//! Why a connection is what it is, for people: both ends' decisions by the functions that the agent itself asks, and every
//! policy with a say, in order of precedence. Printing it is `cli`'s.

mod service;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

pub use service::{EndpointExplained, ServiceExplanation, explain_service};

use serde::Serialize;

use super::{
    Attempt, ClientTls, Denial, DenyReason, Inbound, MtlsMode, Outbound, Peer, Policies, Service, Traffic, Verdict,
    Workload, authentication::Step, evaluate::Asked,
};

impl Explanation<'_> {
    /// In one line.
    pub fn verdict(&self) -> String {
        let verdict = if self.allowed { "allowed" } else { "refused" };
        format!("{verdict}, in {}: {}", self.encryption, self.reason)
    }
}

/// Who calls.
#[derive(Clone, Copy, Debug)]
pub struct Caller<'a> {
    pub address: IpAddr,
    /// None at an address of which nothing is known.
    pub workload: Option<&'a Workload>,
    /// Whether it speaks plaintext although it is in the mesh: as what has got around its agent does.
    pub plaintext: bool,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Explanation<'a> {
    pub allowed: bool,
    /// What the connection is, if it is allowed.
    pub encryption: Encryption,
    /// In words: who decided.
    pub reason: String,
    /// The mode of the destination's port.
    pub mode: MtlsMode,
    /// Who has a say in the mode, the narrowest first; the first that is not UNSET decides.
    pub modes: Vec<Step<'a>>,
    /// Who has a say in the verdict, in the order of asking: AUDIT, DENY, ALLOW, then dry runs.
    pub rules: Vec<Asked<'a>>,
    /// Why the dry runs would have denied it.
    pub dry_run: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Encryption {
    Mtls,
    Plaintext,
}

impl fmt::Display for Encryption {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mtls => "mTLS",
            Self::Plaintext => "plaintext",
        })
    }
}

/// Who is called.
#[derive(Clone, Copy, Debug)]
pub struct Callee<'a> {
    /// None where no workload is known.
    pub workload: Option<&'a Workload>,
    pub address: SocketAddr,
    /// The service that it is called as an endpoint of, and what the DestinationRule for it says.
    pub service: Option<(&'a Service, &'a Traffic)>,
    /// Whether the caller is told to speak plaintext to it, as an endpoint of whatever service.
    pub told_plaintext: bool,
}

/// What becomes of a call.
pub fn explain<'a>(policies: &'a Policies, caller: Caller<'_>, callee: Callee<'_>) -> Explanation<'a> {
    let local = callee.address;
    let member = caller.workload.filter(|workload| workload.in_mesh && !caller.plaintext);
    let way = match callee.service {
        Some((service, traffic)) => super::towards(policies, callee.workload, local.port(), Some(service), traffic),
        None => super::outbound(policies, callee.workload, local.port()),
    };
    // Who is not in the mesh asks nobody's DestinationRule.
    let (identity, expected) = match (member, way) {
        (Some(workload), Outbound::Mtls { expect }) => (Some(&workload.id), Some(expect)),
        _ => (None, None),
    };
    let encryption = if identity.is_some() { Encryption::Mtls } else { Encryption::Plaintext };
    let Some(destination) = callee.workload.filter(|workload| workload.in_mesh) else {
        let allowed = identity.is_none();
        let reason = match allowed {
            true => "the destination is not in the mesh: nobody enforces anything there",
            false => "the client must speak mTLS, and the destination is not in the mesh: nobody answers it there",
        };
        let (reason, mode, modes, rules) = (reason.to_owned(), MtlsMode::Disable, Vec::new(), Vec::new());
        return Explanation { allowed, encryption, reason, mode, modes, rules, dry_run: None };
    };
    let host = callee.service.map_or(&destination.host, |(service, _)| &service.host);
    let sni = format!("outbound_.{}_._.{host}", local.port());
    let peer = identity.map_or(Peer::Nobody, |id| Peer::Proved { id, sni: Some(&sni) });
    let attempt = Attempt { source: caller.address, destination: local, peer };
    let decision = policies.authorization.decide(destination, &attempt);
    let told =
        callee.told_plaintext || callee.service.is_some_and(|(_, traffic)| traffic.tls == Some(ClientTls::Disable));
    let refused = match super::inbound(policies, destination, local, caller.address, caller.workload, told) {
        _ if expected.is_some_and(|expected| !expected.contains(&destination.id)) => {
            Some(format!("the client lets others answer for the service, and not {}", destination.id))
        }
        Inbound::Deny(reason) => Some(reason.to_string()),
        Inbound::Mtls if encryption == Encryption::Plaintext => {
            Some("mTLS is required, and the client speaks plaintext".into())
        }
        Inbound::Plaintext if encryption == Encryption::Mtls => {
            Some("the client must speak mTLS, and the destination's port takes plaintext alone".into())
        }
        Inbound::Mtls | Inbound::Plaintext | Inbound::Sniff => None,
    };
    let (allowed, reason) = match (refused, decision.verdict) {
        (Some(reason), _) => (false, reason),
        (None, Verdict::Denied(denial)) => (false, denied(denial)),
        (None, Verdict::Open) => (false, DenyReason::Undecided.to_string()),
        (None, Verdict::Allowed(Some(cited))) => (true, format!("allowed by {cited}")),
        (None, Verdict::Allowed(None)) => (true, "no ALLOW policy applies, and no DENY rule matches".to_owned()),
    };
    Explanation {
        allowed,
        encryption,
        reason,
        mode: policies.authentication.mode(destination, local.port()),
        modes: policies.authentication.steps(destination, local.port()),
        rules: policies.authorization.asked(destination, &attempt),
        dry_run: decision.rehearsed.map(denied),
    }
}

fn denied(denial: Denial<'_>) -> String {
    DenyReason::from(denial).to_string()
}

impl fmt::Display for Explanation<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.verdict())?;
        writeln!(f, "mode {}, of PeerAuthentication:", self.mode)?;
        let mut decided = false;
        for step in &self.modes {
            let decides = step.mode.is_some() && !decided;
            decided |= decides;
            let mode = step.mode.map_or_else(|| "UNSET".to_owned(), |mode| mode.to_string());
            let mark = if decides { "*" } else { " " };
            let level = format!("{:?}", step.level).to_lowercase();
            writeln!(f, "  {mark} {level:<9} {mode:<10} {}", step.policy)?;
        }
        if !decided {
            writeln!(f, "  * default   {:<10} nothing is said", MtlsMode::default().to_string())?;
        }
        writeln!(f, "rules, of AuthorizationPolicy:")?;
        if self.rules.is_empty() {
            writeln!(f, "    none applies")?;
        }
        for asked in &self.rules {
            let mark = if asked.matches.is_some() { "*" } else { " " };
            let dry_run = if asked.dry_run { " (dry run)" } else { "" };
            let says = match asked.matches {
                Some(rule) => format!("rules[{rule}] matches"),
                None => "no rule matches".to_owned(),
            };
            writeln!(f, "  {mark} {:<9} {}{dry_run}: {says}", asked.action.to_string(), asked.policy)?;
        }
        if let Some(reason) = &self.dry_run {
            writeln!(f, "dry runs: would be {reason}")?;
        }
        Ok(())
    }
}
