//! Why somebody does not get a certificate, as the caller is told (a gRPC status), as it is counted and as it stands in the ledger. The
//! texts name what is wrong and what to do; they hold no secrets.

use std::{fmt, time::Duration};

use tonic::{Code, Status};

use crate::identity::humantime;

/// Some of it may be the caller's own words.
const LONGEST: usize = 1024;

/// A refusal, and what it says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    kind: RefusalKind,
    text: String,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum RefusalKind {
    Unauthenticated,
    Denied,
    Invalid,
    TooMany,
    Unavailable,
}

impl Refusal {
    /// Nobody knows who the caller is.
    pub fn unauthenticated(text: impl Into<String>) -> Self {
        Self::new(RefusalKind::Unauthenticated, text)
    }

    /// The caller is known, and may not.
    pub fn denied(text: impl Into<String>) -> Self {
        Self::new(RefusalKind::Denied, text)
    }

    /// The request could not be granted to anybody.
    pub fn invalid(text: impl Into<String>) -> Self {
        Self::new(RefusalKind::Invalid, text)
    }

    pub fn too_many(who: &str, per_minute: u32, after: Duration) -> Self {
        // Rounded up: who comes back then is let in.
        let after = humantime(Duration::from_secs(after.as_secs().saturating_add(1)));
        let text =
            format!("{who} asks more often than {per_minute} times a minute (limits.perNode): come back in {after}");
        Self::new(RefusalKind::TooMany, text)
    }

    /// Tokens that fail come from where it asks from.
    pub fn too_many_failures(from: &str, per_minute: u32, after: Duration) -> Self {
        let after = humantime(Duration::from_secs(after.as_secs().saturating_add(1)));
        let text = format!(
            "more than {per_minute} tokens a minute that do not count came from {from}: find out who sends them; come back in {after}"
        );
        Self::new(RefusalKind::TooMany, text)
    }

    /// They count still, and all of them must be known.
    pub fn too_many_certificates(node: &str, id: &str) -> Self {
        let text = format!(
            "node {node} has as many certificates that have not expired as its ledger can hold, of {id} or at all: find out who \
             asks so often; there is room again when some expire"
        );
        Self::new(RefusalKind::TooMany, text)
    }

    pub fn is_unauthenticated(&self) -> bool {
        self.kind == RefusalKind::Unauthenticated
    }

    /// The fault is this service's, or of what it rests on; trying again may help.
    pub fn unavailable(text: impl Into<String>) -> Self {
        Self::new(RefusalKind::Unavailable, text)
    }

    fn new(kind: RefusalKind, text: impl Into<String>) -> Self {
        let mut text: String = text.into();
        if let Some((at, _)) = text.char_indices().nth(LONGEST) {
            text.truncate(at);
        }
        Self { kind, text }
    }

    /// As it is counted and noted.
    pub fn label(&self) -> &'static str {
        match self.kind {
            RefusalKind::Unauthenticated => "unauthenticated",
            RefusalKind::Denied => "permission_denied",
            RefusalKind::Invalid => "invalid_argument",
            RefusalKind::TooMany => "resource_exhausted",
            RefusalKind::Unavailable => "unavailable",
        }
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<Refusal> for Status {
    fn from(refusal: Refusal) -> Self {
        let code = match refusal.kind {
            RefusalKind::Unauthenticated => Code::Unauthenticated,
            RefusalKind::Denied => Code::PermissionDenied,
            RefusalKind::Invalid => Code::InvalidArgument,
            RefusalKind::TooMany => Code::ResourceExhausted,
            RefusalKind::Unavailable => Code::Unavailable,
        };
        Self::new(code, refusal.text)
    }
}
