//! AuthorizationPolicy as it was written, and the question that is put to it. `policy::evaluate` gives the answer.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use serde::Serialize;

use super::{
    matching::{IpBlock, Pattern},
    select::Header,
};
use crate::identity::SpiffeId;

#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(rename_all = "UPPERCASE")]
pub enum Action {
    Allow,
    Deny,
    Audit,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AuthorizationPolicy {
    pub header: Header,
    pub action: Action,
    /// Only tried: what it would have decided is told, and has no effect.
    pub dry_run: bool,
    /// Matches when one of them does; never, if there is none.
    pub rules: Vec<Rule>,
}

/// Matches when one of `from`, one of `to` and all of `when` do; an empty list is no condition.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Rule {
    pub from: Vec<Vec<Condition>>,
    pub to: Vec<Vec<Condition>>,
    pub when: Vec<Condition>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Condition {
    pub test: Test,
    /// `notValues`, `notPrincipals` and the like: met by whatever does not match, and so by what is not there at all.
    pub negated: bool,
}

/// Met when one of the values is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Test {
    SourceIp(Vec<IpBlock>),
    Principal(Vec<Pattern>),
    Namespace(Vec<Pattern>),
    TrustDomain(Vec<Pattern>),
    /// Namespace and name.
    ServiceAccount(Vec<(String, String)>),
    DestinationIp(Vec<IpBlock>),
    DestinationPort(Vec<u16>),
    Sni(Vec<Pattern>),
    /// On what only HTTP has. It cannot be met here: an ALLOW rule with one never matches, and in any other rule it is as if
    /// it were not there, so that a DENY rule denies more (istio/istio pilot/pkg/security/authz/model/model.go, `checkError`).
    Http,
}

/// A connection to a workload of ours, as far as it is known.
#[derive(Clone, Copy, Debug)]
pub struct Attempt<'a> {
    pub source: IpAddr,
    pub destination: SocketAddr,
    pub peer: Peer<'a>,
}

/// Who calls, by what was proved. An address proves nothing.
#[derive(Clone, Copy, Debug)]
pub enum Peer<'a> {
    /// The handshake is still to come.
    NotYetKnown,
    /// Plaintext.
    Nobody,
    Proved {
        id: &'a SpiffeId,
        sni: Option<&'a str>,
    },
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "ALLOW",
            Self::Deny => "DENY",
            Self::Audit => "AUDIT",
        })
    }
}
