//! AuthorizationPolicy: decisions taken from Istio's documentation and tests.

use marline::policy::{Denial, Verdict};

use super::bed::{Bed, load_as};

/// One AuthorizationPolicy: NAMESPACE/NAME and its spec.
pub fn authorization(name: &str, spec: &str) -> String {
    annotated(name, "", spec)
}

pub fn annotated(name: &str, annotations: &str, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\n\
         metadata: {{name: {name}, namespace: {namespace}, annotations: {{{annotations}}}}}\nspec: {spec}\n---\n"
    )
}

const A: bool = true;
const D: bool = false;

type Decision = (&'static str, &'static str, bool);

/// Checks the decisions, and gives their number.
fn check(what: &str, policies: &[String], decisions: &[Decision]) -> usize {
    let bed = Bed::new(&policies.concat());
    for (source, destination, allowed) in decisions {
        let verdict = bed.decide(source, destination);
        assert_eq!(matches!(verdict, Verdict::Allowed(_)), *allowed, "{what}: {source} to {destination}: {verdict:?}");
    }
    decisions.len()
}

fn in_foo(spec: &str) -> Vec<String> {
    vec![authorization("foo/x", spec)]
}

/// https://istio.io/latest/docs/tasks/security/authorization/authz-tcp/ (istio/istio.io content/en/docs/tasks/security/
/// authorization/authz-tcp/index.md), step by step.
#[test]
fn the_task_on_tcp_traffic_goes_as_written() {
    let policy = |spec: &str| in_foo(&format!("{{selector: {{matchLabels: {{app: tcp-echo}}}}, {spec}}}"));
    let calls = |first, second, third| {
        [
            ("foo/sleep", "foo/tcp-echo:9000", first),
            ("foo/sleep", "foo/tcp-echo:9001", second),
            ("foo/sleep", "foo/tcp-echo:9002", third),
        ]
    };
    let allow_ports = policy("action: ALLOW, rules: [{to: [{operation: {ports: [\"9000\", \"9001\"]}}]}]");
    let allow_get = policy("action: ALLOW, rules: [{to: [{operation: {methods: [GET], ports: [\"9000\"]}}]}]");
    let deny_get = policy("action: DENY, rules: [{to: [{operation: {methods: [GET]}}]}]");
    let deny_get_9000 = policy("action: DENY, rules: [{to: [{operation: {methods: [GET], ports: [\"9000\"]}}]}]");
    let decisions = check("before", &[], &calls(A, A, A))
        + check("ALLOW with ports", &allow_ports, &calls(A, A, D))
        + check("ALLOW with an HTTP field", &allow_get, &calls(D, D, D))
        + check("DENY with HTTP fields only", &deny_get, &calls(D, D, D))
        + check("DENY with both", &deny_get_9000, &calls(D, A, A))
        + check("another workload", &deny_get, &[("foo/tcp-echo", "foo/sleep:9000", A)]);
    assert_eq!(decisions, 16);
}

/// https://istio.io/latest/docs/concepts/security/ : the authorization part, and the examples of istio/api
/// security/v1beta1/authorization_policy.proto.
#[test]
fn the_examples_of_the_concepts_page_mean_what_they_say() {
    let mut decisions = 0;
    // "allow-nothing", "deny-all" and "allow-all".
    let allow_nothing = authorization("foo/allow-nothing", "{}");
    let also_nothing = authorization("foo/allow-nothing", "{action: ALLOW}");
    let deny_all = authorization("foo/deny-all", "{action: DENY, rules: [{}]}");
    let allow_all = authorization("foo/allow-all", "{action: ALLOW, rules: [{}]}");
    let both = |to_foo| {
        [
            ("bar/sleep", "foo/httpbin:80", to_foo),
            ("legacy/sleep", "foo/httpbin:80", to_foo),
            ("foo/sleep", "bar/httpbin:80", A),
        ]
    };
    for (what, policies, allowed) in [
        ("no policy", vec![], A),
        ("allow-nothing", vec![allow_nothing.clone()], D),
        ("allow-nothing with an action", vec![also_nothing], D),
        ("deny-all", vec![deny_all.clone()], D),
        ("allow-all", vec![allow_all.clone()], A),
        ("allow-all makes other ALLOW policies useless", vec![allow_nothing.clone(), allow_all.clone()], A),
        ("DENY takes precedence over ALLOW", vec![allow_all, deny_all.clone()], D),
    ] {
        decisions += check(what, &policies, &both(allowed));
    }
    // Scope: namespace and selector; the root namespace is for the whole mesh.
    let selected = "{selector: {matchLabels: {app: httpbin}}}";
    decisions += check(
        "allow-nothing for app: httpbin in bar",
        &[authorization("bar/allow-nothing", selected)],
        &[("foo/sleep", "bar/httpbin:80", D), ("foo/sleep", "bar/sleep:80", A), ("bar/sleep", "foo/httpbin:80", A)],
    );
    decisions += check(
        "allow-nothing for version: v1 in all namespaces",
        &[authorization("istio-system/allow-nothing", "{selector: {matchLabels: {version: v1}}}")],
        &[
            ("foo/sleep", "bar/httpbin:80", D),
            ("foo/sleep", "foo/httpbin:80", D),
            ("foo/sleep", "default/productpage:80", D),
            ("foo/sleep", "default/reviews:80", A),
            ("foo/sleep", "foo/sleep:80", A),
        ],
    );
    decisions += check(
        "deny-all in the root namespace",
        &[authorization("istio-system/deny-all", "{action: DENY, rules: [{}]}")],
        &[("foo/sleep", "foo/httpbin:80", D), ("foo/sleep", "istio-system/ingress:80", D)],
    );
    // "Using Istio authorization on plain TCP protocols".
    let mongodb = "{selector: {matchLabels: {app: mongodb}}, action: ALLOW, rules: [{from: [{source: {principals: \
        [cluster.local/ns/default/sa/bookinfo-ratings-v2]}}], to: [{operation: {ports: [\"27017\"]}}]}]}";
    decisions += check(
        "mongodb-policy",
        &[authorization("default/mongodb-policy", mongodb)],
        &[
            ("default/ratings", "default/mongodb:27017", A),
            ("default/ratings", "default/mongodb:27018", D),
            ("default/productpage", "default/mongodb:27017", D),
            ("~default/ratings", "default/mongodb:27017", D),
            ("legacy/sleep", "default/mongodb:27017", D),
            ("default/sleep", "default/ratings:27017", A),
        ],
    );
    // "Authenticated and unauthenticated identity", without the HTTP fields.
    decisions += check(
        "principals: *",
        &in_foo("{action: ALLOW, rules: [{from: [{source: {principals: [\"*\"]}}]}]}"),
        &[
            ("bar/sleep", "foo/httpbin:80", A),
            ("legacy/sleep", "foo/httpbin:80", D),
            ("~bar/sleep", "foo/httpbin:80", D),
        ],
    );
    decisions += check(
        "no source",
        &in_foo("{action: ALLOW, rules: [{to: [{operation: {ports: [\"80\"]}}]}]}"),
        &[
            ("bar/sleep", "foo/httpbin:80", A),
            ("legacy/sleep", "foo/httpbin:80", A),
            ("bar/sleep", "foo/httpbin:81", D),
        ],
    );
    // The reference page's first DENY: with `methods`, which nothing here can tell, it denies all of dev.
    decisions += check(
        "DENY from a namespace",
        &in_foo(
            "{action: DENY, rules: [{from: [{source: {namespaces: [bar]}}], to: [{operation: {methods: [POST]}}]}]}",
        ),
        &[
            ("bar/sleep", "foo/httpbin:80", D),
            ("foo/sleep", "foo/httpbin:80", A),
            ("legacy/sleep", "foo/httpbin:80", A),
        ],
    );
    decisions += check(
        "DENY on a port",
        &in_foo("{action: DENY, rules: [{to: [{operation: {methods: [POST], ports: [\"8080\"]}}]}]}"),
        &[("bar/sleep", "foo/httpbin:8080", D), ("bar/sleep", "foo/httpbin:80", A)],
    );
    // AUDIT "policies do not affect whether requests are allowed or denied".
    decisions += check(
        "AUDIT",
        &in_foo("{action: AUDIT, rules: [{}]}"),
        &[("bar/sleep", "foo/httpbin:80", A), ("legacy/sleep", "foo/httpbin:80", A)],
    );
    // "fields in the source are ANDed together": the example of message Source.
    let source = "principals: [cluster.local/ns/bar/sa/sleep, cluster.local/ns/foo/sa/sleep], namespaces: [bar, test], \
        notIpBlocks: [203.0.113.4]";
    decisions += check(
        "fields of a source",
        &in_foo(&format!("{{rules: [{{from: [{{source: {{{source}}}}}]}}]}}")),
        &[
            ("bar/sleep", "foo/httpbin:80", A),
            ("foo/sleep", "foo/httpbin:80", D),
            ("id:cluster.local/ns/bar/sa/sleep@203.0.113.4", "foo/httpbin:80", D),
            ("id:cluster.local/ns/test/sa/sleep", "foo/httpbin:80", D),
        ],
    );
    assert_eq!(decisions, 54);
}

/// istio/ztunnel src/rbac.rs, the tests by `rbac_test!`, `rbac_empty_policy`, `rbac_nesting` and `rbac_multi_rule`: one condition, a
/// plaintext connection, one in mTLS, and one in mTLS from and to elsewhere.
#[test]
fn conditions_match_as_in_ztunnels_own_test() {
    let mut decisions = 0;
    let plain = ("ip:127.0.0.1", "foo/httpbin@127.0.0.2:8080");
    let tls = ("id:td/ns/namespace/sa/account@127.0.0.1", "foo/httpbin@127.0.0.2:8080");
    let other = ("id:td-alt/ns/ns-alt/sa/sa-alt@127.0.0.3", "foo/httpbin@127.0.0.4:9090");
    for (rule, matches) in [
        ("from: [{source: {namespaces: [namespace]}}]", [D, A, D]),
        ("from: [{source: {notNamespaces: [namespace]}}]", [A, D, A]),
        ("from: [{source: {serviceAccounts: [namespace/account]}}]", [D, A, D]),
        ("from: [{source: {notServiceAccounts: [namespace/account]}}]", [A, D, A]),
        ("from: [{source: {principals: [td/ns/namespace/sa/account]}}]", [D, A, D]),
        ("from: [{source: {notPrincipals: [td/ns/namespace/sa/account]}}]", [A, D, A]),
        ("from: [{source: {ipBlocks: [127.0.0.1/32]}}]", [A, A, D]),
        ("from: [{source: {notIpBlocks: [127.0.0.1/32]}}]", [D, D, A]),
        ("when: [{key: destination.ip, values: [127.0.0.2/32]}]", [A, A, D]),
        ("when: [{key: destination.ip, notValues: [127.0.0.2/32]}]", [D, D, A]),
        ("when: [{key: destination.ip, values: [127.0.0.1/24]}]", [A, A, A]),
        ("to: [{operation: {ports: [\"8080\"]}}]", [A, A, D]),
        ("to: [{operation: {notPorts: [\"8080\"]}}]", [D, D, A]),
        // The same by `when`, and what ztunnel leaves to waypoints but Istio's sidecars know.
        ("when: [{key: source.namespace, values: [namespace]}]", [D, A, D]),
        ("when: [{key: source.namespace, notValues: [namespace]}]", [A, D, A]),
        ("when: [{key: source.principal, values: [td/ns/namespace/sa/account]}]", [D, A, D]),
        ("when: [{key: source.principal, notValues: [td/ns/namespace/sa/account]}]", [A, D, A]),
        ("when: [{key: source.ip, values: [127.0.0.1]}]", [A, A, D]),
        ("when: [{key: source.ip, notValues: [127.0.0.1]}]", [D, D, A]),
        ("when: [{key: remote.ip, values: [127.0.0.1]}]", [A, A, D]),
        ("from: [{source: {remoteIpBlocks: [127.0.0.1]}}]", [A, A, D]),
        ("from: [{source: {notRemoteIpBlocks: [127.0.0.1]}}]", [D, D, A]),
        ("when: [{key: destination.port, values: [\"8080\"]}]", [A, A, D]),
        ("when: [{key: destination.port, notValues: [\"8080\"]}]", [D, D, A]),
        ("when: [{key: source.serviceAccount, values: [namespace/account]}]", [D, A, D]),
        ("when: [{key: source.trustDomain, values: [td]}]", [D, A, D]),
        ("from: [{source: {trustDomains: [\"td*\"]}}]", [D, A, A]),
        ("from: [{source: {notTrustDomains: [\"td-*\"]}}]", [A, A, D]),
        ("when: [{key: connection.sni, values: [\"*.httpbin.foo.svc.cluster.local\"]}]", [D, A, A]),
        ("when: [{key: connection.sni, values: [never-matched]}]", [D, D, D]),
        ("when: [{key: connection.sni, notValues: [\"*.httpbin.foo.svc.cluster.local\"]}]", [A, D, D]),
        // Several values: one suffices; values and notValues: both must hold.
        ("when: [{key: destination.port, values: [\"9090\", \"8080\"], notValues: [\"9090\"]}]", [A, A, D]),
        (
            "from: [{source: {namespaces: [a]}}, {source: {namespaces: [namespace]}}], to: [{operation: {ports: [\"8080\"]}}]",
            [D, A, D],
        ),
        ("from: [{source: {namespaces: [a]}}]}, {from: [{source: {namespaces: [ns-alt]}}]", [D, D, A]),
    ] {
        let calls = [(plain.0, plain.1, matches[0]), (tls.0, tls.1, matches[1]), (other.0, other.1, matches[2])];
        decisions += check(rule, &in_foo(&format!("{{rules: [{{{rule}}}]}}")), &calls);
        // A DENY of the same denies exactly what the ALLOW allows.
        let denied = calls.map(|(source, destination, allowed)| (source, destination, !allowed));
        decisions += check(rule, &in_foo(&format!("{{action: DENY, rules: [{{{rule}}}]}}")), &denied);
    }
    assert_eq!(decisions, 34 * 6);
}

/// istio/istio pilot/pkg/security/authz/builder/testdata/tcp/*-in.yaml, read as their -out.yaml are.
#[test]
fn policies_with_http_and_tcp_fields_mean_what_istio_makes_of_them() {
    let from = |spec: &str| format!("from: [{{source: {{{spec}}}}}]");
    let to = |spec: &str| format!("to: [{{operation: {{{spec}}}}}]");
    let request = "requestPrincipals: [id-1]";
    // allow-both-http-tcp: only the last of four rules is left.
    let allow = |rules: &[String]| format!("{{action: ALLOW, rules: [{{{}}}]}}", rules.join("}, {"));
    let rules = allow(&[
        format!("{}, {}", from(request), to("methods: [GET]")),
        format!("{}, {}", from("namespaces: [ns-1]"), to("ports: [\"8080\"], methods: [GET]")),
        format!("{}, {}", from("namespaces: [ns-2], requestPrincipals: [id-2]"), to("ports: [\"9090\"]")),
        format!("{}, {}", from("namespaces: [ns-1]"), to("ports: [\"80\"]")),
    ]);
    let (ns1, ns2) = ("id:cluster.local/ns/ns-1/sa/x", "id:cluster.local/ns/ns-2/sa/x");
    let mut decisions = check(
        "allow-both-http-tcp",
        &in_foo(&rules),
        &[
            (ns1, "foo/httpbin:80", A),
            (ns1, "foo/httpbin:8080", D),
            (ns2, "foo/httpbin:9090", D),
            (ns2, "foo/httpbin:80", D),
            ("legacy/sleep", "foo/httpbin:80", D),
        ],
    );
    // allow-only-http: nothing is left, and so nothing is allowed.
    let only_http = [
        format!("{}, {}", from(request), to("methods: [GET]")),
        format!("{}, {}", from("namespaces: [ns-1]"), to("hosts: [example.com]")),
    ];
    let only_http = format!("{{action: ALLOW, rules: [{{{}}}]}}", only_http.join("}, {"));
    decisions +=
        check("allow-only-http", &in_foo(&only_http), &[(ns1, "foo/httpbin:80", D), (ns2, "foo/httpbin:80", D)]);
    // deny-both-http-tcp: each of its rules by itself.
    for (rule, calls) in [
        (format!("{}, {}", from(request), to("methods: [GET]")), [D, D, D, D]),
        (to("methods: [GET]"), [D, D, D, D]),
        (from(request), [D, D, D, D]),
        (format!("{}, {}", from("namespaces: [ns-1]"), to("methods: [GET]")), [D, D, A, A]),
        (format!("{}, {}", from(request), to("ports: [\"80\"]")), [D, A, D, A]),
        (format!("{}, {}", from(request), to("ports: [\"8080\"], methods: [GET]")), [A, D, A, D]),
        (
            format!(
                "{}, {}",
                from("namespaces: [ns-2], requestPrincipals: [id-1]"),
                to("ports: [\"8080\"], methods: [GET]")
            ),
            [A, A, A, D],
        ),
        (format!("{}, {}", from("namespaces: [ns-1]"), to("ports: [\"80\"]")), [D, A, A, A]),
        ("when: [{key: \"request.headers[:method]\", values: [GET]}]".to_owned(), [D, D, D, D]),
        ("when: [{key: destination.port, values: [\"80\"]}]".to_owned(), [D, A, D, A]),
    ] {
        let policies = in_foo(&format!("{{action: DENY, rules: [{{{rule}}}]}}"));
        let table = [
            (ns1, "foo/httpbin:80", calls[0]),
            (ns1, "foo/httpbin:8080", calls[1]),
            (ns2, "foo/httpbin:80", calls[2]),
            (ns2, "foo/httpbin:8080", calls[3]),
        ];
        decisions += check(&rule, &policies, &table);
    }
    // dry-run-mix: the one that is not a dry run counts alone.
    let spec = |port: &str| {
        format!(
            "{{selector: {{matchLabels: {{app: httpbin, version: v1}}}}, rules: [{{to: [{{operation: {{ports: [\"{port}\"]}}}}]}}]}}"
        )
    };
    let mix = [
        annotated("foo/httpbin-1", "istio.io/dry-run: \"true\"", &spec("80")),
        annotated("foo/httpbin-2", "istio.io/dry-run: \"false\"", &spec("9000")),
    ];
    decisions += check("dry-run-mix", &mix, &[(ns1, "foo/httpbin:80", D), (ns1, "foo/httpbin:9000", A)]);
    decisions += check("dry run alone", &mix[..1], &[(ns1, "foo/httpbin:80", A), (ns1, "foo/httpbin:9000", A)]);
    assert_eq!(decisions, 51);
}

/// istio/istio tests/integration/security/testdata/authz: the TCP parts of its policies.
#[test]
fn istios_integration_tests_come_out_alike() {
    let httpbin = |more: &str| format!("{{selector: {{matchLabels: {{app: httpbin}}}}, {more}}}");
    let mut decisions = 0;
    // allow-namespace, allow-principal, allow-serviceaccount: with HTTP rules beside a TCP rule.
    for source in ["namespaces: [bar]", "principals: [cluster.local/ns/bar/sa/sleep]", "serviceAccounts: [bar/sleep]"] {
        let rules = format!(
            "action: ALLOW, rules: [{{to: [{{operation: {{ports: [\"8080\"], paths: [/allow], methods: [GET]}}}}], from: [{{source: {{{source}}}}}]}}, \
             {{to: [{{operation: {{ports: [\"9000\"]}}}}], from: [{{source: {{{source}}}}}]}}]"
        );
        decisions += check(
            source,
            &in_foo(&httpbin(&rules)),
            &[
                ("bar/sleep", "foo/httpbin:9000", A),
                ("foo/sleep", "foo/httpbin:9000", D),
                ("~bar/sleep", "foo/httpbin:9000", D),
                ("bar/sleep", "foo/httpbin:8080", D),
                ("foo/sleep", "foo/sleep:9000", A),
            ],
        );
        let deny = rules.replace("ALLOW", "DENY").replace("/allow", "/deny*");
        decisions += check(
            source,
            &in_foo(&httpbin(&deny)),
            &[
                ("bar/sleep", "foo/httpbin:9000", D),
                ("foo/sleep", "foo/httpbin:9000", A),
                ("~bar/sleep", "foo/httpbin:9000", A),
                ("bar/sleep", "foo/httpbin:8080", D),
                ("bar/sleep", "foo/httpbin:9001", A),
            ],
        );
    }
    decisions += check(
        "not-namespace",
        &in_foo(&httpbin("action: DENY, rules: [{from: [{source: {notNamespaces: [bar]}}]}]")),
        &[
            ("bar/sleep", "foo/httpbin:80", A),
            ("foo/sleep", "foo/httpbin:80", D),
            ("legacy/sleep", "foo/httpbin:80", D),
        ],
    );
    decisions += check(
        "not-port",
        &in_foo(&httpbin("action: ALLOW, rules: [{to: [{operation: {notPorts: [\"8085\"]}}]}]")),
        &[("bar/sleep", "foo/httpbin:8080", A), ("bar/sleep", "foo/httpbin:8085", D)],
    );
    // plaintext: "denies access to the service if the request was not mTLS".
    decisions += check(
        "plaintext",
        &in_foo(&httpbin("action: DENY, rules: [{from: [{source: {notPrincipals: [\"*\"]}}]}]")),
        &[
            ("bar/sleep", "foo/httpbin:80", A),
            ("~bar/sleep", "foo/httpbin:80", D),
            ("legacy/sleep", "foo/httpbin:80", D),
        ],
    );
    // workload-bad selects nobody.
    decisions += check(
        "workload-bad",
        &in_foo("{selector: {matchLabels: {app: httpbin, foo: bla}}, rules: [{to: [{operation: {ports: [\"1\"]}}]}]}"),
        &[("bar/sleep", "foo/httpbin:80", A)],
    );
    assert_eq!(decisions, 39);
}

/// istio/istio pilot/pkg/security/trustdomain/bundle.go: `cluster.local` "is a pointer to the local trust domain", in whole principals.
#[test]
fn cluster_local_in_a_principal_stands_for_the_meshs_trust_domain() {
    for (principal, allowed) in [
        ("cluster.local/ns/bar/sa/sleep", A),
        ("example.org/ns/bar/sa/sleep", A),
        ("\"cluster.local/ns/bar/sa/*\"", A),
        ("\"*/ns/bar/sa/sleep\"", A),
        ("\"cluster.local/ns/*\"", D),
        ("other.org/ns/bar/sa/sleep", D),
    ] {
        let policy =
            authorization("foo/x", &format!("{{rules: [{{from: [{{source: {{principals: [{principal}]}}}}]}}]}}"));
        let bed = Bed { loaded: load_as("example.org", &[&policy]).unwrap() };
        let verdict = bed.decide("bar/sleep", "foo/httpbin:80");
        assert_eq!(matches!(verdict, Verdict::Allowed(_)), allowed, "{principal}");
    }
}

#[test]
fn a_decision_names_the_policy_and_the_rule() {
    let policies = [
        authorization(
            "foo/b-deny",
            "{action: DENY, rules: [{to: [{operation: {ports: [\"1\"]}}]}, {to: [{operation: {ports: [\"2\"]}}]}]}",
        ),
        authorization(
            "istio-system/a-allow",
            "{rules: [{to: [{operation: {methods: [GET]}}]}, {to: [{operation: {ports: [\"1\", \"2\", \"3\"]}}]}]}",
        ),
        authorization("foo/c-allow", "{rules: [{to: [{operation: {ports: [\"3\"]}}]}]}"),
    ];
    let bed = Bed::new(&policies.concat());
    let said = |port: u16| match bed.decide("bar/sleep", &format!("foo/httpbin:{port}")) {
        Verdict::Allowed(Some(cited)) => format!("allowed by {cited}"),
        Verdict::Denied(Denial::Rule(cited)) => format!("denied by {cited}"),
        Verdict::Denied(Denial::NothingAllows(names)) => format!("none of {names:?}"),
        other => format!("{other:?}"),
    };
    assert_eq!(said(1), "denied by AuthorizationPolicy foo/b-deny rules[0]");
    assert_eq!(said(2), "denied by AuthorizationPolicy foo/b-deny rules[1]");
    assert_eq!(said(3), "allowed by AuthorizationPolicy istio-system/a-allow rules[1]");
    let nothing = said(4);
    assert!(nothing.contains("a-allow") && nothing.contains("c-allow") && !nothing.contains("b-deny"), "{nothing}");
}

#[test]
fn dry_runs_and_audits_are_told_and_change_nothing() {
    let policies = [
        annotated(
            "foo/try-deny",
            "istio.io/dry-run: \"true\"",
            "{action: DENY, rules: [{from: [{source: {namespaces: [bar]}}]}]}",
        ),
        authorization("foo/watch", "{action: AUDIT, rules: [{to: [{operation: {ports: [\"80\"]}}]}]}"),
        annotated("foo/unwatched", "istio.io/dry-run: \"true\"", "{action: AUDIT, rules: [{}]}"),
    ];
    let bed = Bed::new(&policies.concat());
    for (source, destination, rehearsed, audited) in [
        ("bar/sleep", "foo/httpbin:80", true, true),
        ("foo/sleep", "foo/httpbin:80", false, true),
        ("bar/sleep", "foo/httpbin:81", true, false),
        ("legacy/sleep", "foo/httpbin:81", false, false),
    ] {
        let (workload, local) = bed.destination(destination);
        let (from, id) = bed.source(source);
        let peer =
            id.as_ref().map_or(marline::policy::Peer::Nobody, |id| marline::policy::Peer::Proved { id, sni: None });
        let attempt = marline::policy::Attempt { source: from, destination: local, peer };
        let decision = bed.loaded.snapshot.policies.authorization.decide(workload, &attempt);
        assert_eq!(decision.verdict, Verdict::Allowed(None));
        assert_eq!(
            (decision.rehearsed.is_some(), decision.audited_by.is_some()),
            (rehearsed, audited),
            "{source} {destination}"
        );
    }
}
