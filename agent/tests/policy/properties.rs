//! What holds for all policies: random ones, against an evaluator that is as simple as Istio's words.

use std::net::{IpAddr, SocketAddr};

use marline::{
    identity::{SpiffeId, TrustDomain},
    policy::{
        Attempt, Authorization, AuthorizationPolicy, Denial, Header, Peer, PolicyName, Verdict, Workload,
        authorization::{Action, Condition, Rule, Test},
        matching::Pattern,
    },
};
use proptest::{prelude::*, sample::select};

/// Looks at everything, each time, in the order of the documentation.
fn naive(policies: &[AuthorizationPolicy], workload: &Workload, attempt: &Attempt<'_>) -> bool {
    let applies = |policy: &&AuthorizationPolicy| {
        let namespace = &policy.header.name.namespace;
        (*namespace == workload.namespace || namespace == "istio-system")
            && policy.header.selector.iter().all(|(key, value)| workload.labels.get(key) == Some(value))
            && !policy.dry_run
    };
    let mine: Vec<_> = policies.iter().filter(applies).collect();
    let of = |action| mine.iter().filter(move |policy| policy.action == action);
    if of(Action::Deny).any(|policy| policy.rules.iter().any(|rule| naive_rule(rule, false, attempt))) {
        return false;
    }
    of(Action::Allow).count() == 0
        || of(Action::Allow).any(|policy| policy.rules.iter().any(|rule| naive_rule(rule, true, attempt)))
}

fn naive_rule(rule: &Rule, allow: bool, attempt: &Attempt<'_>) -> bool {
    let all = |conditions: &[Condition]| conditions.iter().all(|condition| naive_condition(condition, allow, attempt));
    let http = |conditions: &Vec<Condition>| conditions.iter().any(|condition| condition.test == Test::Http);
    if allow && (rule.from.iter().any(http) || rule.to.iter().any(http) || http(&rule.when)) {
        return false;
    }
    (rule.from.is_empty() || rule.from.iter().any(|group| all(group)))
        && (rule.to.is_empty() || rule.to.iter().any(|group| all(group)))
        && all(&rule.when)
}

fn naive_condition(condition: &Condition, allow: bool, attempt: &Attempt<'_>) -> bool {
    let (principal, namespace, account, domain, sni) = match attempt.peer {
        Peer::Proved { id, sni } => (
            format!("{}/ns/{}/sa/{}", id.trust_domain(), id.namespace(), id.service_account()),
            id.namespace(),
            id.service_account(),
            id.trust_domain().as_str(),
            sni.unwrap_or_default(),
        ),
        _ => (String::new(), "", "", "", ""),
    };
    let text = |patterns: &[Pattern], text: &str| patterns.iter().any(|pattern| pattern.matches(text));
    let met = match &condition.test {
        Test::SourceIp(blocks) => blocks.iter().any(|block| block.contains(attempt.source)),
        Test::DestinationIp(blocks) => blocks.iter().any(|block| block.contains(attempt.destination.ip())),
        Test::DestinationPort(ports) => ports.contains(&attempt.destination.port()),
        Test::Principal(patterns) => text(patterns, &principal),
        Test::Namespace(patterns) => text(patterns, namespace),
        Test::TrustDomain(patterns) => text(patterns, domain),
        Test::ServiceAccount(accounts) => accounts.iter().any(|(ns, name)| ns == namespace && name == account),
        Test::Sni(patterns) => text(patterns, sni),
        Test::Http => return !allow,
    };
    met != condition.negated
}

fn condition() -> impl Strategy<Value = Condition> {
    let some = |texts: &'static [&'static str]| proptest::collection::vec(select(texts), 1..4);
    fn parsed<T: std::str::FromStr<Err: std::fmt::Debug>>(texts: Vec<&'static str>) -> Vec<T> {
        texts.into_iter().map(|text| text.parse().unwrap()).collect()
    }
    let blocks = || {
        some(&["10.0.0.1", "10.0.0.0/30", "10.0.0.0/8", "0.0.0.0/0", "fd00::/8", "::ffff:10.0.0.2/127"])
            .prop_map(parsed)
    };
    let names = || some(&["a", "b", "a*", "*b", "*", "ab"]).prop_map(parsed);
    let principals = some(&["td/ns/a/sa/x", "td/*", "*/sa/y", "*", "td/ns/b*", "other/ns/a/sa/x"]).prop_map(parsed);
    let accounts = proptest::collection::vec((select(&["a", "b"][..]), select(&["x", "y"][..])), 1..3)
        .prop_map(|pairs| pairs.into_iter().map(|(ns, name)| (ns.to_owned(), name.to_owned())).collect());
    let test = prop_oneof![
        3 => blocks().prop_map(Test::SourceIp),
        3 => principals.prop_map(Test::Principal),
        3 => names().prop_map(Test::Namespace),
        1 => some(&["td", "t*", "*d", "*", "other"]).prop_map(parsed).prop_map(Test::TrustDomain),
        2 => accounts.prop_map(Test::ServiceAccount),
        1 => blocks().prop_map(Test::DestinationIp),
        3 => proptest::collection::vec(80u16..84, 1..3).prop_map(Test::DestinationPort),
        1 => some(&["web.*", "*.local", "*", "db.local"]).prop_map(parsed).prop_map(Test::Sni),
        1 => Just(Test::Http),
    ];
    (test, any::<bool>()).prop_map(|(test, negated)| Condition { test, negated })
}

fn rule() -> impl Strategy<Value = Rule> {
    let group = || proptest::collection::vec(condition(), 1..3);
    (
        proptest::collection::vec(group(), 0..3),
        proptest::collection::vec(group(), 0..2),
        proptest::collection::vec(condition(), 0..2),
    )
        .prop_map(|(from, to, when)| Rule { from, to, when })
}

fn policy() -> impl Strategy<Value = AuthorizationPolicy> {
    let label = (select(&["app", "version"][..]), select(&["a", "b"][..]));
    (
        "[a-z]{3}",
        select(&["istio-system", "a", "b"][..]),
        proptest::collection::btree_map(
            label.clone().prop_map(|(key, _)| key.to_owned()),
            label.prop_map(|(_, value)| value.to_owned()),
            0..3,
        ),
        select(&[Action::Allow, Action::Allow, Action::Deny, Action::Audit][..]),
        proptest::bool::weighted(0.1),
        proptest::collection::vec(rule(), 0..4),
    )
        .prop_map(|(name, namespace, selector, action, dry_run, rules)| AuthorizationPolicy {
            header: Header {
                name: PolicyName { kind: "AuthorizationPolicy", namespace: namespace.to_owned(), name },
                created: None,
                selector: selector.into_iter().collect(),
            },
            action,
            dry_run,
            rules,
        })
}

/// A call as owned parts: to whom, from where, to which port, and with what proof.
#[derive(Clone, Debug)]
struct Call {
    workload: Workload,
    source: IpAddr,
    destination: SocketAddr,
    proved: Option<(SpiffeId, Option<&'static str>)>,
}

impl Call {
    fn attempt(&self) -> Attempt<'_> {
        let peer = self.proved.as_ref().map_or(Peer::Nobody, |(id, sni)| Peer::Proved { id, sni: *sni });
        Attempt { source: self.source, destination: self.destination, peer }
    }
}

fn call() -> impl Strategy<Value = Call> {
    let address = || select(&["10.0.0.1", "10.0.0.2", "10.0.0.9", "11.0.0.1", "fd00::1", "::ffff:10.0.0.1"][..]);
    let id = (select(&["td", "other"][..]), select(&["a", "b", "ab"][..]), select(&["x", "y"][..]))
        .prop_map(|(td, ns, sa)| SpiffeId::new(&TrustDomain::parse(td).unwrap(), ns, sa).unwrap());
    let sni = proptest::option::of(select(&["web.local", "db.local", "other"][..]));
    let labels = (proptest::option::of(select(&["a", "b"][..])), proptest::option::of(select(&["a", "b"][..])));
    (
        select(&["a", "b", "istio-system"][..]),
        labels,
        address(),
        address(),
        80u16..84,
        proptest::option::weighted(0.7, (id, sni)),
    )
        .prop_map(|(namespace, (app, version), source, destination, port, proved)| {
            let labels = [("app", app), ("version", version)];
            let workload = Workload {
                name: "w".into(),
                namespace: namespace.into(),
                service_account: "w".into(),
                id: SpiffeId::new(&TrustDomain::default(), namespace, "w").unwrap(),
                addresses: vec![destination.parse().unwrap()],
                in_mesh: true,
                labels: labels.into_iter().filter_map(|(key, value)| Some((key, value?))).collect(),
                host: "w".into(),
            };
            let destination = SocketAddr::new(destination.parse().unwrap(), port);
            Call { workload, source: source.parse().unwrap(), destination, proved }
        })
}

/// Policies of different names.
fn policies() -> impl Strategy<Value = Vec<AuthorizationPolicy>> {
    proptest::collection::vec(policy(), 0..8).prop_map(|mut policies| {
        policies.sort_by(|a, b| a.header.name.cmp(&b.header.name));
        policies.dedup_by(|a, b| a.header.name == b.header.name);
        policies
    })
}

fn compiled(policies: &[AuthorizationPolicy]) -> Authorization {
    Authorization::compile(TrustDomain::default(), policies.to_vec())
}

fn allowed(authorization: &Authorization, call: &Call) -> bool {
    match authorization.decide(&call.workload, &call.attempt()).verdict {
        Verdict::Allowed(_) => true,
        Verdict::Denied(_) => false,
        Verdict::Open => panic!("all is known"),
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn compiled_policies_decide_as_a_naive_reading_does(policies in policies(), calls in proptest::collection::vec(call(), 1..12)) {
        let authorization = compiled(&policies);
        for call in &calls {
            prop_assert_eq!(allowed(&authorization, call), naive(&policies, &call.workload, &call.attempt()), "{:?}", call);
        }
    }

    #[test]
    fn an_added_deny_never_widens(policies in policies(), added in policy(), calls in proptest::collection::vec(call(), 1..12)) {
        let added = AuthorizationPolicy { action: Action::Deny, ..added };
        let before = compiled(&policies);
        let after = compiled(&[policies.as_slice(), &[added]].concat());
        for call in &calls {
            prop_assert!(!allowed(&after, call) || allowed(&before, call), "{:?}", call);
        }
    }

    #[test]
    fn audits_and_dry_runs_decide_nothing(policies in policies(), added in policy(), audit in any::<bool>(), calls in proptest::collection::vec(call(), 1..8)) {
        let added = match audit {
            true => AuthorizationPolicy { action: Action::Audit, ..added },
            false => AuthorizationPolicy { dry_run: true, ..added },
        };
        let before = compiled(&policies);
        let after = compiled(&[policies.as_slice(), &[added]].concat());
        for call in &calls {
            prop_assert_eq!(allowed(&after, call), allowed(&before, call), "{:?}", call);
        }
    }

    #[test]
    fn the_order_of_policies_never_matters(order in policies().prop_flat_map(|policies| (Just(policies.clone()), Just(policies).prop_shuffle())), calls in proptest::collection::vec(call(), 1..8)) {
        let (one, other) = (compiled(&order.0), compiled(&order.1));
        for call in &calls {
            let (a, b) = (one.decide(&call.workload, &call.attempt()), other.decide(&call.workload, &call.attempt()));
            prop_assert_eq!(format!("{a:?}"), format!("{b:?}"));
        }
        prop_assert!(one == other, "a reload that only shuffles changes nothing");
    }

    #[test]
    fn what_is_decided_before_the_handshake_stays_whatever_it_proves(policies in policies(), call in call(), others in proptest::collection::vec(call(), 1..8)) {
        let authorization = compiled(&policies);
        let early = Attempt { peer: Peer::NotYetKnown, ..call.attempt() };
        let early = authorization.decide(&call.workload, &early).verdict;
        for other in &others {
            let then = Call { proved: other.proved.clone(), ..call.clone() };
            match early {
                Verdict::Open => {}
                Verdict::Allowed(_) => prop_assert!(allowed(&authorization, &then)),
                Verdict::Denied(_) => prop_assert!(!allowed(&authorization, &then)),
            }
        }
    }

    #[test]
    fn a_plaintext_connection_is_never_allowed_by_a_rule_on_identity(account in select(&["x", "y"][..]), call in call()) {
        let tests = [
            Test::Principal(vec![Pattern::Presence]),
            Test::Namespace(vec![Pattern::Presence]),
            Test::TrustDomain(vec![Pattern::Presence]),
            Test::ServiceAccount(vec![("a".to_owned(), account.to_owned())]),
            Test::Sni(vec![Pattern::Presence]),
        ];
        for test in tests {
            let rule = Rule { from: vec![vec![Condition { test, negated: false }]], ..Rule::default() };
            let name = PolicyName { kind: "AuthorizationPolicy", namespace: "istio-system".into(), name: "x".into() };
            let header = Header { name, created: None, selector: Default::default() };
            let policy = AuthorizationPolicy { header, action: Action::Allow, dry_run: false, rules: vec![rule] };
            let plain = Call { proved: None, ..call.clone() };
            let authorization = compiled(&[policy]);
            let verdict = authorization.decide(&plain.workload, &plain.attempt()).verdict;
            prop_assert!(matches!(verdict, Verdict::Denied(Denial::NothingAllows(_))), "{:?}", verdict);
        }
    }
}
