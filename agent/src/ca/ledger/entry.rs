//! One line of the ledger, as it is written and as it is read again.

use std::time::SystemTime;

use serde::{Deserialize, Serialize};

#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct Entry {
    pub time: String,
    /// `issued` or `refused`.
    pub outcome: String,
    /// What kind of refusal, by gRPC's names.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub code: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub caller: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    pub peer: String,
    /// Of the certificate, or that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub identity: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub not_after: Option<String>,
    /// The fingerprint of the key that signed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signer: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The caller is the node's agent.
    #[serde(skip)]
    pub by_agent: bool,
    /// Refusals before this one that have no line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub unrecorded: Option<u64>,
}

impl Entry {
    pub fn issued(&self) -> bool {
        self.outcome == "issued"
    }

    /// The node that a certificate is for.
    pub fn certificate_for(&self) -> Option<&str> {
        self.node.as_deref().filter(|_| self.issued())
    }

    /// Turns it into the line of a refusal.
    pub fn refuse(&mut self, code: &str, reason: &str) {
        "refused".clone_into(&mut self.outcome);
        self.code = Some(code.to_owned());
        self.reason = Some(reason.to_owned());
        (self.serial, self.not_after, self.signer) = (None, None, None);
    }

    /// When the certificate expires, if that can be read.
    pub fn expires(&self) -> Option<SystemTime> {
        self.not_after.as_deref().and_then(|text| humantime::parse_rfc3339(text).ok())
    }

    /// Whether the certificate has not expired. What cannot be read has not.
    pub fn counts_at(&self, now: SystemTime) -> bool {
        self.expires().is_none_or(|end| end > now)
    }

    pub(super) fn append_to(&self, lines: &mut Vec<u8>) {
        // Texts and numbers alone: there is nothing in it that could fail.
        if serde_json::to_writer(&mut *lines, self).is_ok() {
            lines.push(b'\n');
        }
    }
}
