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

pub fn outbound(snapshot: &Snapshot, destination: Option<&Workload>, port: u16, live: &Live) -> Result<Way, Denied> {
    match policy::outbound(&snapshot.policies, destination, port) {
        Outbound::Mtls { expect } => Ok(Way::Mtls { permit: permit(live, Mode::Mtls), expect }),
        Outbound::Plaintext => Ok(Way::Plaintext { permit: permit(live, Mode::Plaintext) }),
        Outbound::Deny(reason) => Err(Denied::Policy(reason)),
    }
}

/// The final word on an inbound connection, once it is known whether a certificate proved its source.
pub fn inbound(
    snapshot: &Snapshot,
    destination: &Workload,
    port: u16,
    proved: Option<&SpiffeId>,
    rule: &Inbound,
    live: &Live,
) -> Result<Permit, Denied> {
    let mode = snapshot.policies.authentication.mode(destination, port);
    match (rule, proved) {
        (Inbound::Deny(reason), _) => Err(Denied::Policy(reason.clone())),
        (Inbound::Mtls | Inbound::Sniff | Inbound::Plaintext, Some(_)) => Ok(permit(live, Mode::Mtls)),
        (Inbound::Mtls, None) => Err(Denied::PlaintextUnderStrict),
        (Inbound::Plaintext | Inbound::Sniff, None) if mode == MtlsMode::Strict => Err(Denied::PlaintextUnderStrict),
        (Inbound::Plaintext | Inbound::Sniff, None) => Ok(permit(live, Mode::Plaintext)),
    }
}

/// Why a live connection would not be let in any more: by the evaluator that new ones go through.
pub fn revoked_by(snapshot: &Snapshot, direction: Direction, facts: &Facts) -> Option<&'static str> {
    // What has no permit yet is decided on its way, by the newest snapshot.
    let mode = facts.mode?;
    match direction {
        Direction::Inbound => {
            let (destination, port) = (facts.served.as_ref()?, facts.destination.address?.port());
            let strict = snapshot.policies.authentication.mode(destination, port) == MtlsMode::Strict;
            (strict && mode == Mode::Plaintext).then_some("plaintext under STRICT")
        }
        Direction::Outbound => {
            let destination = snapshot.workload(facts.destination.address?.ip())?;
            let proved = facts.proved.as_ref()?;
            match policy::outbound(&snapshot.policies, Some(destination), facts.destination.address?.port()) {
                Outbound::Mtls { expect } => {
                    (!expect.contains(proved)).then_some("another identity is expected at the destination now")
                }
                Outbound::Deny(_) => Some("forbidden by policy"),
                Outbound::Plaintext => None,
            }
        }
    }
}

fn permit(live: &Live, mode: Mode) -> Permit {
    Permit { mode, revoked: live.revocation() }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeMap, net::SocketAddr, sync::Arc};

    use super::*;
    use crate::{
        identity::TrustDomain,
        policy::{Authentication, Header, PeerAuthentication, Policies, PolicyName},
        proxy::connections::Endpoint,
    };

    fn workload(account: &str, address: SocketAddr) -> Arc<Workload> {
        Arc::new(Workload {
            name: account.into(),
            namespace: "shop".into(),
            service_account: account.into(),
            id: SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap(),
            addresses: vec![address.ip()],
            in_mesh: true,
            labels: BTreeMap::from([("app".into(), account.into())]),
            host: Workload::host_of(account, "shop"),
        })
    }

    /// A mesh of one workload, `account` at 10.0.0.1, whose port 80 has the mode given.
    fn snapshot(account: &str, mode: MtlsMode) -> Snapshot {
        let header = Header {
            name: PolicyName { kind: "PeerAuthentication", namespace: "shop".into(), name: "x".into() },
            created: None,
            selector: BTreeMap::from([("app".into(), account.into())]),
        };
        let policy = PeerAuthentication { header, mode: None, ports: BTreeMap::from([(80, Some(mode))]) };
        let policies = Policies { authentication: Authentication::compile(vec![policy]) };
        let workloads = vec![workload(account, "10.0.0.1:80".parse().unwrap())];
        Snapshot::new(policies, TrustDomain::default(), workloads, Vec::new())
    }

    fn facts(mode: Option<Mode>, proved: Option<&str>, destination: &str) -> Facts {
        let destination: SocketAddr = destination.parse().unwrap();
        Facts {
            destination: Endpoint { address: Some(destination), ..Endpoint::default() },
            mode,
            proved: proved.map(|account| SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap()),
            served: Some(workload("web", destination)),
            ..Facts::default()
        }
    }

    #[test]
    fn a_live_plaintext_connection_is_revoked_when_its_port_becomes_strict() {
        let cases = [
            (MtlsMode::Strict, Some(Mode::Plaintext), "10.0.0.1:80", true),
            (MtlsMode::Strict, Some(Mode::Plaintext), "10.0.0.1:81", false),
            (MtlsMode::Strict, Some(Mode::Mtls), "10.0.0.1:80", false),
            (MtlsMode::Strict, None, "10.0.0.1:80", false),
            (MtlsMode::Permissive, Some(Mode::Plaintext), "10.0.0.1:80", false),
            (MtlsMode::Disable, Some(Mode::Plaintext), "10.0.0.1:80", false),
        ];
        for (port_mode, mode, destination, revoked) in cases {
            let found = revoked_by(&snapshot("web", port_mode), Direction::Inbound, &facts(mode, None, destination));
            assert_eq!(found.is_some(), revoked, "{port_mode} {mode:?} {destination}");
        }
    }

    #[test]
    fn a_live_outbound_connection_is_revoked_when_another_identity_lives_at_its_destination() {
        let cases = [
            ("web", Some("web"), Some(Mode::Mtls), false),
            ("db", Some("web"), Some(Mode::Mtls), true),
            ("db", None, Some(Mode::Plaintext), false),
            ("db", Some("web"), None, false),
        ];
        for (now, proved, mode, revoked) in cases {
            let facts = facts(mode, proved, "10.0.0.1:80");
            let found = revoked_by(&snapshot(now, MtlsMode::Permissive), Direction::Outbound, &facts);
            assert_eq!(found.is_some(), revoked, "{now} {proved:?} {mode:?}");
        }
    }
}
