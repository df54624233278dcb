//! Why a connection is what it is, for people: both ends' decisions by the functions that the agent itself asks, and every
//! policy with a say, in order of precedence. Printing it is `cli`'s.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use super::{
    Attempt, Denial, DenyReason, Inbound, MtlsMode, Outbound, Peer, Policies, Verdict, Workload, authentication::Step,
    evaluate::Asked,
};

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

/// What becomes of a call to `local`, an address of `destination`.
pub fn explain<'a>(
    policies: &'a Policies,
    caller: Caller<'_>,
    destination: &Workload,
    local: SocketAddr,
) -> Explanation<'a> {
    let member = caller.workload.filter(|workload| workload.in_mesh && !caller.plaintext);
    let identity = match super::outbound(policies, Some(destination), local.port()) {
        Outbound::Mtls { .. } => member.map(|workload| &workload.id),
        Outbound::Plaintext | Outbound::Deny(_) => None,
    };
    let encryption = if identity.is_some() { Encryption::Mtls } else { Encryption::Plaintext };
    let sni = format!("outbound_.{}_._.{}", local.port(), destination.host);
    let peer = identity.map_or(Peer::Nobody, |id| Peer::Proved { id, sni: Some(&sni) });
    let attempt = Attempt { source: caller.address, destination: local, peer };
    if !destination.in_mesh {
        let reason = "the destination is not in the mesh: nobody enforces anything there".to_owned();
        let mode = MtlsMode::Disable;
        let (modes, rules) = (Vec::new(), Vec::new());
        return Explanation { allowed: true, encryption, reason, mode, modes, rules, dry_run: None };
    }
    let decision = policies.authorization.decide(destination, &attempt);
    let refused = match super::inbound(policies, destination, local, caller.address, caller.workload) {
        Inbound::Deny(reason) => Some(reason.to_string()),
        Inbound::Mtls if encryption == Encryption::Plaintext => {
            Some("mTLS is required, and the client speaks plaintext".into())
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
        let verdict = if self.allowed { "allowed" } else { "refused" };
        writeln!(f, "{verdict}, in {}: {}", self.encryption, self.reason)?;
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
