//! Turns policy's answer into a `Permit`, which is the only way on to the later stages and cannot be made elsewhere. It carries
//! the handle by which it is taken back, because offloaded bytes pass no more checks in userspace.

use tokio::sync::watch;

use super::connections::{Direction, Facts, Live, Mode};
use crate::{
    identity::SpiffeId,
    policy::{self, DenyReason, Inbound, MtlsMode, Outbound, Workload},
    state::Snapshot,
};

/// Leave to move a connection's bytes in one mode.
pub struct Permit {
    mode: Mode,
    pub revoked: watch::Receiver<Option<&'static str>>,
}

impl Permit {
    pub fn mode(&self) -> Mode {
        self.mode
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Denied {
    #[error("denied by policy: {0}")]
    Policy(DenyReason),
    #[error("mTLS is required (STRICT) and the client speaks plaintext")]
    PlaintextUnderStrict,
}

/// How to reach a destination.
pub enum Way {
    Mtls { permit: Permit, expect: Vec<SpiffeId> },
    Plaintext { permit: Permit },
}

pub fn outbound(snapshot: &Snapshot, destination: Option<&Workload>, live: &Live) -> Result<Way, Denied> {
    match policy::outbound(snapshot.mode, destination) {
        Outbound::Mtls { expect } => Ok(Way::Mtls { permit: permit(live, Mode::Mtls), expect }),
        Outbound::Plaintext => Ok(Way::Plaintext { permit: permit(live, Mode::Plaintext) }),
        Outbound::Deny(reason) => Err(Denied::Policy(reason)),
    }
}

/// The final word on an inbound connection, once it is known whether a certificate proved its source.
pub fn inbound(mode: MtlsMode, proved: Option<&SpiffeId>, rule: &Inbound, live: &Live) -> Result<Permit, Denied> {
    match (rule, proved) {
        (Inbound::Deny(reason), _) => Err(Denied::Policy(reason.clone())),
        (Inbound::Mtls | Inbound::Sniff | Inbound::Plaintext, Some(_)) => Ok(permit(live, Mode::Mtls)),
        (Inbound::Mtls, None) => Err(Denied::PlaintextUnderStrict),
        (Inbound::Plaintext | Inbound::Sniff, None) if mode == MtlsMode::Strict => Err(Denied::PlaintextUnderStrict),
        (Inbound::Plaintext | Inbound::Sniff, None) => Ok(permit(live, Mode::Plaintext)),
    }
}

/// Whether a live connection would still be let in: the reason where not.
pub fn revoked_by(snapshot: &Snapshot, direction: Direction, facts: &Facts) -> Option<&'static str> {
    let plaintext_inbound = direction == Direction::Inbound && facts.mode == Some(Mode::Plaintext);
    (plaintext_inbound && snapshot.mode == MtlsMode::Strict).then_some("plaintext under STRICT")
}

fn permit(live: &Live, mode: Mode) -> Permit {
    Permit { mode, revoked: live.revocation() }
}
