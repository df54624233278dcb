//! Who asks for a certificate. Behind `Authenticate`, by tokens from a file (`tokens`) or as an API server reviews them (`kubernetes`).
//! What a caller may have is `service`'s to decide.

pub mod kubernetes;
pub mod tokens;

use std::{fmt, future::Future, net::IpAddr, pin::Pin};

use super::refusal::Refusal;

/// What a caller shows. It is never printed.
#[derive(Clone)]
pub struct Token(String);

/// Somebody who has proved who it is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Caller {
    /// For the ledger and the log.
    pub name: String,
    pub node: String,
    pub kind: CallerKind,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub enum CallerKind {
    /// A node's agent: it may ask on behalf of what runs there.
    Agent,
    /// A workload, which may have its own certificate: namespace and service account.
    Workload(String, String),
}

impl Caller {
    /// Whose requests are counted together: a node's agent by itself, and each workload there by itself, so that no pod uses up what its
    /// node's agent needs.
    pub fn bucket(&self) -> String {
        match &self.kind {
            CallerKind::Agent => format!("agent\0{}", self.node),
            CallerKind::Workload(..) => format!("workload\0{}\0{}", self.node, self.name),
        }
    }

    /// For texts.
    pub fn words(&self) -> String {
        match &self.kind {
            CallerKind::Agent => format!("node {}", self.node),
            CallerKind::Workload(namespace, account) => format!("{namespace}/{account} on node {}", self.node),
        }
    }
}

pub type Authenticated<'a> = Pin<Box<dyn Future<Output = Result<Option<Caller>, Refusal>> + Send + 'a>>;

/// One way to find out who somebody is. None if the token is none of its own: then the next way is asked.
pub trait Authenticate: Send + Sync {
    fn authenticate<'a>(&'a self, token: &'a Token, peer: IpAddr) -> Authenticated<'a>;
}

impl Token {
    /// From the value of an `authorization` header.
    pub fn from_header(value: &str) -> Option<Self> {
        let (scheme, token) = value.split_once(' ')?;
        let token = token.trim();
        (scheme.eq_ignore_ascii_case("bearer") && !token.is_empty()).then(|| Self(token.to_owned()))
    }

    /// Whether it looks as those that `tokens` makes.
    fn is_our_own(&self) -> bool {
        self.0.starts_with(tokens::PREFIX)
    }

    fn secret(&self) -> &str {
        &self.0
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        zeroize::Zeroize::zeroize(&mut self.0);
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}
