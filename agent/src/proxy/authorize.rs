//! Turns policy's answer into a `Permit`, which is the only way on to the later stages and cannot be made elsewhere. It carries
//! the handle by which it is taken back, because offloaded bytes pass no more checks in userspace.

use std::net::SocketAddr;

use tokio::sync::watch;

use super::{
    connections::{Facts, Live},
    target::Target,
};
use crate::{
    identity::{SpiffeId, Trust, trust::Withdrawn},
    policy::{self, Attempt, DenyReason, Inbound, MtlsMode, Outbound, Peer, Verdict, Workload},
    state::Snapshot,
    words::{Direction, Mode},
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
    #[error("mTLS is required of this client (STRICT, or its workload is in the mesh) and it speaks plaintext")]
    PlaintextUnderStrict,
}

/// How to reach a destination.
pub enum Way {
    Mtls { permit: Permit, expect: Vec<SpiffeId> },
    Plaintext { permit: Permit },
}

impl Way {
    pub fn permit(self) -> Permit {
        match self {
            Self::Mtls { permit, .. } | Self::Plaintext { permit } => permit,
        }
    }
}

/// The client's side.
pub fn towards(snapshot: &Snapshot, target: &Target, live: &Live) -> Result<Way, Denied> {
    let (endpoint, port) = (target.workload.as_deref(), target.address.port());
    match policy::towards(&snapshot.policies, endpoint, port, target.service.as_deref(), &target.traffic) {
        Outbound::Mtls { expect } => Ok(Way::Mtls { permit: permit(live, Mode::Mtls), expect }),
        Outbound::Plaintext => Ok(Way::Plaintext { permit: permit(live, Mode::Plaintext) }),
        Outbound::Deny(reason) => Err(Denied::Policy(reason)),
    }
}

/// A connection to a local workload.
#[derive(Clone, Copy)]
pub struct Arrival<'a> {
    pub workload: &'a Workload,
    pub client: SocketAddr,
    pub local: SocketAddr,
}

/// What an arrival must be, by the addresses at its ends.
pub fn arriving(snapshot: &Snapshot, arrival: Arrival<'_>, source: Option<&Workload>) -> Inbound {
    let told_plaintext = source.is_some_and(|source| snapshot.told_plaintext(source, arrival.local));
    policy::inbound(&snapshot.policies, arrival.workload, arrival.local, arrival.client.ip(), source, told_plaintext)
}

/// The final word on an inbound connection, once it is known whether a certificate proved its source.
pub fn inbound(
    snapshot: &Snapshot,
    arrival: Arrival<'_>,
    proved: Option<&SpiffeId>,
    rule: &Inbound,
    live: &Live,
) -> Result<Permit, Denied> {
    if let Inbound::Deny(reason) = rule {
        return Err(denied(reason.clone(), live));
    }
    let strict = snapshot.policies.authentication.mode(arrival.workload, arrival.local.port()) == MtlsMode::Strict;
    let mode = match (rule, proved) {
        (_, Some(_)) => Mode::Mtls,
        (Inbound::Mtls, None) => return Err(Denied::PlaintextUnderStrict),
        (_, None) if strict => return Err(Denied::PlaintextUnderStrict),
        (_, None) => Mode::Plaintext,
    };
    let facts = live.facts();
    let peer = peer(mode, proved, facts.sni.as_deref());
    let attempt = Attempt { source: arrival.client.ip(), destination: arrival.local, peer };
    let decision = snapshot.policies.authorization.decide(arrival.workload, &attempt);
    if let Some(cited) = decision.audited_by {
        tracing::info!(policy = %cited, client = %arrival.client, local = %arrival.local, "audited");
        live.learn(|facts| facts.audit = Some(cited.to_string()));
    }
    if let Some(denial) = decision.rehearsed {
        let reason = DenyReason::from(denial);
        tracing::info!(client = %arrival.client, local = %arrival.local, "dry run: would be {reason}");
        live.learn(|facts| facts.dry_run = Some(reason.to_string()));
    }
    match decision.verdict {
        Verdict::Allowed(cited) => {
            live.learn(|facts| facts.policy = cited.map(|cited| cited.to_string()));
            Ok(permit(live, mode))
        }
        Verdict::Denied(denial) => Err(denied(denial.into(), live)),
        Verdict::Open => Err(denied(DenyReason::Undecided, live)),
    }
}

/// Why a live connection is taken back.
#[derive(Debug, PartialEq, Eq)]
pub struct Revoked {
    pub reason: &'static str,
    /// The policy that says so.
    pub policy: Option<String>,
}

impl Revoked {
    /// Resets the connection.
    pub fn enforce(self, live: &Live) {
        if self.policy.is_some() {
            live.learn(|facts| facts.policy = self.policy);
        }
        live.revoke(self.reason);
    }
}

/// Why a live connection would not be let in any more: by the evaluator that new ones go through.
pub fn revoked_by(snapshot: &Snapshot, direction: Direction, facts: &Facts) -> Option<Revoked> {
    // What has no permit yet is decided on its way, by the newest snapshot.
    let mode = facts.mode?;
    let by = |reason| Some(Revoked { reason, policy: None });
    match direction {
        Direction::Inbound => {
            let (served, local) = (facts.served.as_ref()?, facts.destination.address?);
            let workload = snapshot.now(served);
            let strict = snapshot.policies.authentication.mode(workload, local.port()) == MtlsMode::Strict;
            if strict && mode == Mode::Plaintext {
                return by("plaintext under STRICT");
            }
            let client = facts.source.address?;
            // It was of the mesh when it was let in, so something had told it to speak plaintext. One that came into the mesh later may
            // go on: else enrolling a workload would cut what it is doing.
            if mode == Mode::Plaintext && facts.source.identity.is_some() {
                let source = snapshot.workload(client.ip()).map(|source| &**source);
                let arrival = Arrival { workload, client, local };
                if arriving(snapshot, arrival, source) == Inbound::Mtls {
                    return by("plaintext where mTLS is demanded of the client now");
                }
            }
            let peer = peer(mode, facts.proved.as_ref(), facts.sni.as_deref());
            let attempt = Attempt { source: client.ip(), destination: local, peer };
            let reason = match snapshot.policies.authorization.decide(workload, &attempt).verdict {
                Verdict::Allowed(_) => return None,
                Verdict::Denied(denial) => denial.into(),
                Verdict::Open => DenyReason::Undecided,
            };
            Some(Revoked { reason: "forbidden by policy", policy: reason.policy().map(str::to_owned) })
        }
        Direction::Outbound => {
            let destination = facts.destination.address?;
            let workload = snapshot.workload(destination.ip());
            // What is said now of the service that was called. One that is gone says nothing, and ends nothing.
            let caller = facts.source.address.and_then(|source| snapshot.workload(source.ip()));
            let called = caller.zip(facts.called).and_then(|(caller, to)| snapshot.called(caller, to));
            let (service, traffic) = called.map(|called| (Some(&**called.service), called.traffic)).unwrap_or_default();
            match policy::towards(&snapshot.policies, workload.map(|now| &**now), destination.port(), service, &traffic)
            {
                Outbound::Deny(_) => by("forbidden by policy"),
                Outbound::Plaintext => None,
                Outbound::Mtls { expect } => match &facts.proved {
                    Some(proved) if !expect.iter().any(|id| snapshot.trust_domains.same(id, proved)) => {
                        by("another identity is expected at the destination now")
                    }
                    None if policy::demands_mtls(service, &traffic) => by("mTLS is asked for towards the service now"),
                    _ => None,
                },
            }
        }
    }
}

/// Why nobody would vouch any more for a live connection's peer.
pub fn withdrawn(trust: &Trust, facts: &Facts) -> Option<Withdrawn> {
    let domain = facts.proved.as_ref()?.trust_domain();
    match &facts.voucher {
        Some(voucher) => trust.stands(domain, voucher).err(),
        None => trust.bundle(domain).is_none().then_some(Withdrawn::TrustDomain),
    }
}

/// Under mTLS what the certificate proved, in plaintext nobody: an address alone makes nobody's identity.
fn peer<'a>(mode: Mode, proved: Option<&'a SpiffeId>, sni: Option<&'a str>) -> Peer<'a> {
    match (mode, proved) {
        (Mode::Mtls, Some(id)) => Peer::Proved { id, sni },
        (Mode::Mtls | Mode::Plaintext, _) => Peer::Nobody,
    }
}

fn denied(reason: DenyReason, live: &Live) -> Denied {
    live.learn(|facts| facts.policy = reason.policy().map(str::to_owned));
    Denied::Policy(reason)
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
        policy::{
            Authentication, Authorization, AuthorizationPolicy, ClientTls, DestinationRule, DestinationRules, Header,
            Labels, PeerAuthentication, Policies, PolicyName, Service, ServiceEndpoint, Traffic,
            authorization::{Action, Condition, Rule, Test},
        },
        proxy::connections::Connections,
        words::Endpoint,
    };

    fn workload(account: &str, address: SocketAddr) -> Arc<Workload> {
        Arc::new(Workload {
            name: account.into(),
            namespace: "shop".into(),
            service_account: account.into(),
            id: SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap(),
            addresses: vec![address.ip()],
            in_mesh: true,
            labels: Labels::from([("app", account)]),
            host: Workload::host_of(account, "shop"),
        })
    }

    /// A mesh of one workload, `account` at 10.0.0.1, whose port 80 has the mode given.
    fn snapshot(account: &str, mode: MtlsMode) -> Snapshot {
        let header = Header {
            name: PolicyName { kind: "PeerAuthentication", namespace: "shop".into(), name: "x".into() },
            created: None,
            selector: Labels::from([("app", account)]),
        };
        let policy = PeerAuthentication { header, mode: None, ports: BTreeMap::from([(80, Some(mode))]) };
        let policies = Policies { authentication: Authentication::compile(vec![policy]), ..Policies::default() };
        let workloads = vec![workload(account, "10.0.0.1:80".parse().unwrap())];
        Snapshot::new(policies, TrustDomain::default(), workloads, Vec::new())
    }

    fn facts(mode: Option<Mode>, proved: Option<&str>, destination: &str) -> Facts {
        let destination: SocketAddr = destination.parse().unwrap();
        Facts {
            source: Endpoint { address: Some("10.0.0.9:4000".parse().unwrap()), ..Endpoint::default() },
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

    /// A service's endpoint outside of what is known of the mesh, or at a workload.
    fn target(workload: Option<Arc<Workload>>, identities: &[&str], tls: Option<ClientTls>) -> Target {
        let id = |account: &&str| SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap();
        let service = Service {
            host: "web.example".into(),
            namespace: "shop".into(),
            identities: identities.iter().map(id).collect(),
            ..Service::default()
        };
        let traffic = Arc::new(Traffic { tls, ..Traffic::default() });
        let address = "10.0.0.1:80".parse().unwrap();
        let service = Some(Arc::new(service));
        Target { called: address, address, port: 80, workload, service, traffic, slot: None, affinity: None }
    }

    /// The mesh of `snapshot` with a service for the workload, and a rule for it.
    fn snapshot_with_rule(account: &str, named: &[&str], traffic: Traffic) -> Snapshot {
        let id = |account: &&str| SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap();
        let traffic = Arc::new(Traffic { identities: named.iter().map(id).collect(), ..traffic });
        let name = PolicyName { kind: "DestinationRule", namespace: "shop".into(), name: "x".into() };
        let header = Header { name, created: None, selector: Labels::default() };
        let rule = DestinationRule {
            header,
            host: "web.example".into(),
            exported_to: None,
            traffic,
            ports: BTreeMap::new(),
            subsets: Vec::new(),
        };
        let policies = Policies { destinations: DestinationRules::compile(vec![rule]), ..Policies::default() };
        let server = workload(account, "10.0.0.1:80".parse().unwrap());
        let client = workload("client", "10.0.0.9:80".parse().unwrap());
        let endpoint =
            ServiceEndpoint { address: "10.0.0.1:80".parse().unwrap(), workload: Some(server.clone()), zone: None };
        let service = Service {
            host: "web.example".into(),
            namespace: "shop".into(),
            addresses: vec!["10.96.0.1".parse().unwrap()],
            ports: BTreeMap::from([(80, vec![endpoint])]),
            ..Service::default()
        };
        Snapshot::new(policies, TrustDomain::default(), vec![server, client], Vec::new())
            .with_services(vec![Arc::new(service)])
    }

    #[test]
    fn a_live_connection_to_a_service_is_judged_by_what_its_destination_rule_says_now() {
        let rule = |tls| Traffic { tls, ..Traffic::default() };
        let mutual = Some(ClientTls::IstioMutual);
        let cases = [
            (&[][..], None, Some("web"), false),
            (&["web"], mutual, Some("web"), false),
            (&["db"], mutual, Some("web"), true),
            (&["db"], None, Some("web"), true),
            (&[], mutual, None, true),
            (&[], Some(ClientTls::Disable), None, false),
            // What was encrypted is no less allowed where plaintext would do.
            (&[], Some(ClientTls::Disable), Some("web"), false),
            (&[], None, None, false),
        ];
        for (named, tls, proved, revoked) in cases {
            let mode = if proved.is_some() { Mode::Mtls } else { Mode::Plaintext };
            let called = |to: &str| Facts { called: to.parse().ok(), ..facts(Some(mode), proved, "10.0.0.1:80") };
            let now = snapshot_with_rule("web", named, rule(tls));
            let found = revoked_by(&now, Direction::Outbound, &called("10.96.0.1:80"));
            assert_eq!(found.is_some(), revoked, "{named:?} {tls:?} {proved:?}");
            // The rule is for the service, not for the workload's own address.
            assert_eq!(revoked_by(&now, Direction::Outbound, &called("")), None);
            assert_eq!(revoked_by(&now, Direction::Outbound, &called("10.96.0.2:80")), None, "a service that is gone");
        }
    }

    #[test]
    fn plaintext_that_a_rule_had_asked_for_ends_with_the_rule_and_that_of_the_outside_goes_on() {
        let disabled = Traffic { tls: Some(ClientTls::Disable), ..Traffic::default() };
        let with = |identity: Option<&str>| {
            let mut facts = facts(Some(Mode::Plaintext), None, "10.0.0.1:80");
            facts.source.identity = identity.map(str::to_owned);
            facts
        };
        let member = with(Some("spiffe://cluster.local/ns/shop/sa/client"));
        let revoked = |traffic: &Traffic, facts: &Facts| {
            revoked_by(&snapshot_with_rule("web", &[], traffic.clone()), Direction::Inbound, facts).is_some()
        };
        assert!(!revoked(&disabled, &member));
        assert!(revoked(&Traffic::default(), &member));
        // It came into the mesh while it was connected.
        assert!(!revoked(&Traffic::default(), &with(None)));
    }

    #[test]
    fn who_must_answer_is_never_left_to_plaintext_but_where_a_rule_asks_for_that() {
        let snapshot = Snapshot::new(Policies::default(), TrustDomain::default(), Vec::new(), Vec::new());
        let web = || Some(workload("web", "10.0.0.1:80".parse().unwrap()));
        let cases = [
            (target(None, &[], None), None),
            // Who is named by hand need not be a workload that is known.
            (target(None, &["web", "db"], None), Some(vec!["web", "db"])),
            (target(None, &[], Some(ClientTls::IstioMutual)), Some(vec![])),
            (target(None, &["web"], Some(ClientTls::Disable)), None),
            (target(web(), &[], Some(ClientTls::Disable)), None),
            (target(web(), &[], None), Some(vec!["web"])),
            (target(web(), &["web", "db"], None), Some(vec!["web"])),
            (target(web(), &["db"], None), Some(vec![])),
        ];
        for (number, (target, expected)) in cases.into_iter().enumerate() {
            let live = Connections::default().open(Direction::Outbound, std::time::SystemTime::now());
            let found = match towards(&snapshot, &target, &live).unwrap() {
                Way::Plaintext { .. } => None,
                Way::Mtls { expect, .. } => Some(expect.iter().map(ToString::to_string).collect::<Vec<_>>()),
            };
            let expected: Option<Vec<String>> = expected
                .map(|all| all.iter().map(|account| format!("spiffe://cluster.local/ns/shop/sa/{account}")).collect());
            assert_eq!(found, expected, "case {number}");
        }
    }

    #[test]
    fn a_live_connection_is_judged_by_the_labels_that_its_workload_has_now() {
        let header = Header {
            name: PolicyName { kind: "AuthorizationPolicy", namespace: "shop".into(), name: "closed".into() },
            created: None,
            selector: Labels::from([("state", "closed")]),
        };
        let everybody =
            AuthorizationPolicy { header, action: Action::Deny, dry_run: false, rules: vec![Rule::default()] };
        let facts = facts(Some(Mode::Mtls), Some("good"), "10.0.0.1:80");
        let now = |name: &str, state: &str| {
            let authorization = Authorization::compile(TrustDomain::default(), vec![everybody.clone()]);
            let mut workload = (*workload(name, "10.0.0.1:80".parse().unwrap())).clone();
            workload.labels = Labels::from([("state", state)]);
            let policies = Policies { authorization, ..Policies::default() };
            Snapshot::new(policies, TrustDomain::default(), vec![Arc::new(workload)], Vec::new())
        };
        assert_eq!(revoked_by(&now("web", "open"), Direction::Inbound, &facts), None);
        assert!(revoked_by(&now("web", "closed"), Direction::Inbound, &facts).is_some());
        // Another workload has the address by now: what was served was not it.
        assert_eq!(revoked_by(&now("db", "closed"), Direction::Inbound, &facts), None);
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

    /// DENY from 10.0.0.9, DENY for the account `bad`, ALLOW for the rest of the namespace.
    fn guarded() -> Snapshot {
        let header = |name: &str| Header {
            name: PolicyName { kind: "AuthorizationPolicy", namespace: "shop".into(), name: name.into() },
            created: None,
            selector: Labels::default(),
        };
        let from = |test| Rule { from: vec![vec![Condition { test, negated: false }]], ..Rule::default() };
        let policy = |name, action, test| AuthorizationPolicy {
            header: header(name),
            action,
            dry_run: false,
            rules: vec![from(test)],
        };
        let bad = Test::ServiceAccount(vec![("shop".into(), "bad".into())]);
        let policies = vec![
            policy("address", Action::Deny, Test::SourceIp(vec!["10.0.0.9".parse().unwrap()])),
            policy("account", Action::Deny, bad),
            policy("shop", Action::Allow, Test::Namespace(vec!["shop".parse().unwrap()])),
        ];
        let authorization = Authorization::compile(TrustDomain::default(), policies);
        let policies = Policies { authorization, ..Policies::default() };
        Snapshot::new(policies, TrustDomain::default(), Vec::new(), Vec::new())
    }

    #[test]
    fn a_permit_is_given_only_where_the_rules_allow_and_the_record_names_the_rule() {
        let (snapshot, local) = (guarded(), "10.0.0.1:80".parse().unwrap());
        let web = workload("web", local);
        let cases = [
            ("10.0.0.9", Some("good"), Err("forbidden by AuthorizationPolicy shop/address rules[0]")),
            ("10.0.0.2", Some("good"), Ok("AuthorizationPolicy shop/shop rules[0]")),
            ("10.0.0.2", Some("bad"), Err("forbidden by AuthorizationPolicy shop/account rules[0]")),
            ("10.0.0.2", None, Err("allowed by no rule of AuthorizationPolicy shop/shop")),
        ];
        for (client, proved, expected) in cases {
            let arrival = Arrival { workload: &web, client: SocketAddr::new(client.parse().unwrap(), 4000), local };
            let proved = proved.map(|account| SpiffeId::new(&TrustDomain::default(), "shop", account).unwrap());
            let rule = arriving(&snapshot, arrival, None);
            assert_eq!(
                matches!(rule, Inbound::Deny(_)),
                client == "10.0.0.9",
                "addresses alone decide before the handshake"
            );
            let live = Connections::default().open(Direction::Inbound, std::time::SystemTime::now());
            let permit = inbound(&snapshot, arrival, proved.as_ref(), &rule, &live);
            let policy = live.facts().policy.unwrap();
            match (permit, expected) {
                (Ok(permit), Ok(by)) => assert_eq!((permit.mode(), policy.as_str()), (Mode::Mtls, by)),
                (Err(error), Err(text)) => {
                    assert!(error.to_string().ends_with(text) && text.ends_with(&policy), "{error}")
                }
                (permit, expected) => panic!("{:?} instead of {expected:?}", permit.map(|permit| permit.mode())),
            }
        }
    }

    #[test]
    fn a_live_connection_is_revoked_when_a_rule_forbids_it_and_the_rule_is_named() {
        let mut live = facts(Some(Mode::Mtls), Some("good"), "10.0.0.1:80");
        let by_address = revoked_by(&guarded(), Direction::Inbound, &live).unwrap();
        assert_eq!(by_address.policy.as_deref(), Some("AuthorizationPolicy shop/address rules[0]"));
        live.source.address = Some("10.0.0.2:4000".parse().unwrap());
        assert_eq!(revoked_by(&guarded(), Direction::Inbound, &live), None);
        assert_eq!(revoked_by(&guarded(), Direction::Outbound, &live), None, "rules are for servers");
        // What an address is known to be proves nothing: in plaintext nobody is in the namespace.
        live.mode = Some(Mode::Plaintext);
        live.source.identity = Some("spiffe://cluster.local/ns/shop/sa/good".into());
        let nobody = revoked_by(&guarded(), Direction::Inbound, &live).unwrap();
        assert_eq!(nobody.policy.as_deref(), Some("AuthorizationPolicy shop/shop"));
    }
}
