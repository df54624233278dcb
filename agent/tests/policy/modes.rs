//! PeerAuthentication: the mode of a port.

use marline::policy::MtlsMode::{self, Disable, Permissive, Strict};
use proptest::prelude::*;

use super::bed::{Bed, load, load_files};

/// One PeerAuthentication: NAMESPACE/NAME, the seconds of its age, its spec.
pub fn peer(name: &str, created: Option<u64>, spec: &str) -> String {
    let (namespace, name) = name.split_once('/').unwrap();
    let created =
        created.map_or_else(String::new, |second| format!(", creationTimestamp: 2024-01-01T00:00:{second:02}Z"));
    format!(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
         metadata: {{name: {name}, namespace: {namespace}{created}}}\nspec: {spec}\n---\n"
    )
}

struct Case {
    what: &'static str,
    policies: Vec<String>,
    decisions: Vec<(&'static str, u16, MtlsMode)>,
}

fn check(cases: &[Case]) -> usize {
    let mut decisions = 0;
    for case in cases {
        let bed = Bed::new(&case.policies.concat());
        for (workload, port, expected) in &case.decisions {
            assert_eq!(bed.mode(workload, *port), *expected, "{}: {workload}:{port}", case.what);
            let steps = bed.loaded.snapshot.policies.authentication.steps(bed.workload(workload), *port);
            let explained = steps.iter().find_map(|step| step.mode).unwrap_or_default();
            assert_eq!(explained, *expected, "{}: the explanation of {workload}:{port}", case.what);
            decisions += 1;
        }
    }
    decisions
}

const APP_FOO: &str = "selector: {matchLabels: {app: foo}}";

/// istio/istio pilot/pkg/security/authn/policy_applier_test.go, `TestComposePeerAuthentication`: its cases by their names.
/// There the workload is app=foo, stage=prod in my-ns.
#[test]
fn modes_compose_as_in_istios_own_test() {
    let case = |what, policies: &[(&str, Option<u64>, &str)], decisions: &[(u16, MtlsMode)]| Case {
        what,
        policies: policies.iter().map(|(name, created, spec)| peer(name, *created, spec)).collect(),
        decisions: decisions.iter().map(|(port, mode)| ("my-ns/foo", *port, *mode)).collect(),
    };
    let foo = |more: &str| format!("{{{APP_FOO}{more}}}");
    let (foo_unset, foo_strict) = (foo(""), foo(", mtls: {mode: STRICT}"));
    let (foo_permissive, foo_disable) = (foo(", mtls: {mode: PERMISSIVE}"), foo(", mtls: {mode: DISABLE}"));
    let foo_ports = foo(", portLevelMtls: {80: {mode: DISABLE}, 90: {mode: UNSET}, 100: {}}");
    let (strict, permissive, disable) =
        ("{mtls: {mode: STRICT}}", "{mtls: {mode: PERMISSIVE}}", "{mtls: {mode: DISABLE}}");
    let unset = "{mtls: {mode: UNSET}}";
    let stage_strict = "{selector: {matchLabels: {stage: prod}}, mtls: {mode: STRICT}}";
    let decisions = check(&[
        case("no config", &[], &[(80, Permissive)]),
        case("mesh only", &[("istio-system/default", None, strict)], &[(80, Strict)]),
        case(
            "mesh vs namespace",
            &[
                ("istio-system/default", None, "{selector: {matchLabels: {}}, mtls: {mode: STRICT}}"),
                ("my-ns/default", None, permissive),
            ],
            &[(80, Permissive)],
        ),
        case(
            "ignore non-empty selector in root namespace",
            &[("istio-system/default", None, &foo_strict)],
            &[(80, Permissive)],
        ),
        case(
            "workload vs namespace config",
            &[("my-ns/default", None, "{}"), ("my-ns/foo", None, &foo_unset)],
            &[(80, Permissive)],
        ),
        case(
            "workload vs mesh config",
            &[("my-ns/default", None, permissive), ("istio-system/default", None, disable)],
            &[(80, Permissive)],
        ),
        case(
            "multiple mesh policy",
            &[
                ("istio-system/now", Some(2), disable),
                ("istio-system/second-ago", Some(1), permissive),
                ("istio-system/second-later", Some(1), strict),
            ],
            &[(80, Permissive)],
        ),
        case(
            "multiple namespace policy",
            &[
                ("my-ns/now", Some(2), disable),
                ("my-ns/second-ago", Some(1), permissive),
                ("my-ns/second-later", Some(1), strict),
            ],
            &[(80, Permissive)],
        ),
        case(
            "multiple workload policy",
            &[
                ("my-ns/now", Some(2), &foo_disable),
                ("my-ns/second-ago", Some(1), &foo_permissive),
                ("my-ns/second-later", Some(1), stage_strict),
            ],
            &[(80, Permissive)],
        ),
        case("inheritance: default mesh", &[("istio-system/default", None, unset)], &[(80, Permissive)]),
        case(
            "inheritance: mesh to workload",
            &[("istio-system/default", None, strict), ("my-ns/foo", None, &foo_unset)],
            &[(80, Strict)],
        ),
        case(
            "inheritance: namespace to workload",
            &[("my-ns/default", None, strict), ("my-ns/foo", None, &foo_unset)],
            &[(80, Strict)],
        ),
        case(
            "inheritance: mesh to namespace to workload",
            &[("istio-system/default", None, strict), ("my-ns/default", None, unset), ("my-ns/foo", None, &foo_unset)],
            &[(80, Strict)],
        ),
        case(
            "port level",
            &[("istio-system/default", None, strict), ("my-ns/foo", None, &foo_ports)],
            &[(80, Disable), (90, Strict), (100, Strict), (8080, Strict)],
        ),
    ]);
    assert_eq!(decisions, 17);
}

/// The examples of istio/api security/v1beta1/peer_authentication.proto, which are those of the reference page
/// https://istio.io/latest/docs/reference/config/security/peer_authentication/
#[test]
fn the_examples_of_the_reference_page_mean_what_they_say() {
    let finance =
        |more: &str| peer("foo/finance", None, &format!("{{selector: {{matchLabels: {{app: finance}}}}{more}}}"));
    let decisions = check(&[
        Case {
            what: "require mTLS for all workloads in foo",
            policies: vec![peer("foo/default", None, "{mtls: {mode: STRICT}}")],
            decisions: vec![
                ("foo/httpbin", 80, Strict),
                ("foo/finance", 8080, Strict),
                ("bar/httpbin", 80, Permissive),
                ("istio-system/ingress", 80, Permissive),
            ],
        },
        Case {
            what: "PERMISSIVE in foo, STRICT for finance",
            policies: vec![peer("foo/default", None, "{mtls: {mode: PERMISSIVE}}"), finance(", mtls: {mode: STRICT}")],
            decisions: vec![
                ("foo/httpbin", 80, Permissive),
                ("foo/finance", 80, Strict),
                ("bar/sleep", 80, Permissive),
            ],
        },
        Case {
            what: "STRICT for finance, 8080 in plaintext",
            policies: vec![finance(", mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: DISABLE}}")],
            decisions: vec![
                ("foo/finance", 8080, Disable),
                ("foo/finance", 80, Strict),
                ("foo/httpbin", 8080, Permissive),
            ],
        },
        Case {
            what: "inherited for finance, 8080 in plaintext",
            policies: vec![
                peer("istio-system/default", None, "{mtls: {mode: STRICT}}"),
                finance(", mtls: {mode: UNSET}, portLevelMtls: {8080: {mode: DISABLE}}"),
            ],
            decisions: vec![("foo/finance", 8080, Disable), ("foo/finance", 80, Strict), ("foo/httpbin", 8080, Strict)],
        },
        // https://istio.io/latest/docs/tasks/security/authentication/authn-policy/ : a selector, and a port, of one workload.
        Case {
            what: "mTLS for httpbin.bar except on port 9080",
            policies: vec![peer(
                "bar/httpbin",
                None,
                "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: STRICT}, portLevelMtls: {9080: {mode: DISABLE}}}",
            )],
            decisions: vec![
                ("bar/httpbin", 9080, Disable),
                ("bar/httpbin", 8000, Strict),
                ("bar/sleep", 9080, Permissive),
                ("foo/httpbin", 9080, Permissive),
            ],
        },
        // The same page: "a policy in a workload overrides that of its namespace".
        Case {
            what: "namespace STRICT, one workload DISABLE",
            policies: vec![
                peer("foo/default", None, "{mtls: {mode: STRICT}}"),
                peer("foo/overwrite", None, "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: DISABLE}}"),
            ],
            decisions: vec![("foo/httpbin", 80, Disable), ("foo/sleep", 80, Strict)],
        },
    ]);
    assert_eq!(decisions, 19);
}

/// The oldest of several that select a workload counts whole: ports of the others are not merged in (the code of
/// `ComposePeerAuthentication`: one `workloadCfg`).
#[test]
fn ports_of_a_younger_policy_are_not_merged() {
    let policies = [
        peer("my-ns/b-first", Some(1), &format!("{{{APP_FOO}, portLevelMtls: {{80: {{mode: DISABLE}}}}}}")),
        peer("my-ns/a-second", Some(2), &format!("{{{APP_FOO}, portLevelMtls: {{90: {{mode: STRICT}}}}}}")),
    ];
    let bed = Bed::new(&policies.concat());
    assert_eq!((bed.mode("my-ns/foo", 80), bed.mode("my-ns/foo", 90)), (Disable, Permissive));
}

#[test]
fn what_has_no_effect_is_warned_of() {
    let cases = [
        (
            vec![peer("istio-system/x", None, &format!("{{{APP_FOO}}}"))],
            "spec.selector: a PeerAuthentication in istio-system",
        ),
        (vec![peer("foo/x", None, "{selector: {matchLabels: {}}}")], "spec.selector: selects without labels"),
        (
            vec![peer("foo/b", Some(1), "{}"), peer("foo/a", Some(2), "{}")],
            "metadata.name: has no effect: PeerAuthentication foo/b is older",
        ),
        (
            vec![peer("foo/b", None, "{}"), peer("foo/a", None, "{}")],
            "metadata.name: has no effect: PeerAuthentication foo/a",
        ),
    ];
    for (policies, expected) in cases {
        let warnings = Bed::new(&policies.concat()).warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].starts_with(expected), "{warnings:?}");
    }
}

#[test]
fn both_versions_of_the_kind_are_read_and_no_other() {
    let v1 = peer("foo/default", None, "{mtls: {mode: STRICT}}");
    assert_eq!(Bed::new(&v1.replace("io/v1", "io/v1beta1")).mode("foo/httpbin", 80), Strict);
    assert!(load(&v1.replace("io/v1", "io/v1alpha1")).is_err());
}

/// What Istio says, written as simply as it can be said: all policies, all of them looked at each time.
fn naive(policies: &[Random], labels: &[(&str, &str)], namespace: &str, port: u16) -> MtlsMode {
    let selects = |policy: &Random| policy.selector.iter().all(|label| labels.contains(label));
    let oldest = |choose: &dyn Fn(&Random) -> bool| {
        policies.iter().filter(|policy| choose(policy)).min_by_key(|policy| (policy.created, policy.name.clone()))
    };
    let workload =
        oldest(&|p| p.namespace == namespace && namespace != "istio-system" && !p.selector.is_empty() && selects(p));
    let own = oldest(&|p| p.namespace == namespace && namespace != "istio-system" && p.selector.is_empty());
    let mesh = oldest(&|p| p.namespace == "istio-system" && p.selector.is_empty());
    let at_port = workload.and_then(|p| p.ports.iter().find(|(known, _)| *known == port)).and_then(|(_, mode)| *mode);
    let at = |policy: Option<&Random>| policy.and_then(|policy| policy.mode);
    at_port.or(at(workload)).or(at(own)).or(at(mesh)).unwrap_or(Permissive)
}

#[derive(Clone, Debug)]
struct Random {
    name: String,
    namespace: &'static str,
    created: Option<u64>,
    selector: Vec<(&'static str, &'static str)>,
    mode: Option<MtlsMode>,
    ports: Vec<(u16, Option<MtlsMode>)>,
}

impl Random {
    fn yaml(&self) -> String {
        let mode = |mode: Option<MtlsMode>| mode.map_or_else(|| "UNSET".to_owned(), |mode| mode.to_string());
        let selector: Vec<_> = self.selector.iter().map(|(key, value)| format!("{key}: {value}")).collect();
        let ports: Vec<_> = self.ports.iter().map(|(port, m)| format!("{port}: {{mode: {}}}", mode(*m))).collect();
        let mut spec = format!("mtls: {{mode: {}}}", mode(self.mode));
        if !selector.is_empty() {
            spec += &format!(", selector: {{matchLabels: {{{}}}}}", selector.join(", "));
            if !ports.is_empty() {
                spec += &format!(", portLevelMtls: {{{}}}", ports.join(", "));
            }
        }
        peer(&format!("{}/{}", self.namespace, self.name), self.created, &format!("{{{spec}}}"))
    }
}

fn random() -> impl Strategy<Value = Random> {
    let mode = || prop_oneof![Just(None), Just(Some(Strict)), Just(Some(Permissive)), Just(Some(Disable))];
    let label =
        prop_oneof![Just(("app", "httpbin")), Just(("app", "foo")), Just(("version", "v1")), Just(("stage", "prod"))];
    let selector = proptest::collection::btree_map(Just(()), label, 0..2).prop_map(|map| map.into_values().collect());
    let ports = proptest::collection::btree_map(prop_oneof![Just(80u16), Just(90)], mode(), 0..3)
        .prop_map(|map| map.into_iter().collect());
    let namespace = prop_oneof![Just("istio-system"), Just("foo"), Just("bar"), Just("my-ns")];
    ("[a-c]{1,3}", namespace, proptest::option::of(0u64..3), selector, mode(), ports).prop_map(
        |(name, namespace, created, selector, mode, ports)| Random { name, namespace, created, selector, mode, ports },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    #[test]
    fn the_compiled_modes_are_those_of_a_naive_reading_in_whatever_order(
        policies in proptest::collection::vec(random(), 0..9), seed in any::<prop::sample::Index>(),
    ) {
        let mut policies = policies;
        policies.sort_by(|a, b| (a.namespace, &a.name).cmp(&(b.namespace, &b.name)));
        policies.dedup_by(|a, b| (a.namespace, &a.name) == (b.namespace, &b.name));
        let mut texts: Vec<String> = policies.iter().map(Random::yaml).collect();
        let split = seed.index(texts.len() + 1);
        texts.rotate_left(split);
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let loaded = load_files(&texts).unwrap();
        let bed = Bed { loaded };
        for (workload, labels) in [
            ("foo/httpbin", vec![("app", "httpbin"), ("version", "v1")]),
            ("bar/httpbin", vec![("app", "httpbin"), ("version", "v1")]),
            ("foo/sleep", vec![("app", "sleep")]),
            ("my-ns/foo", vec![("app", "foo"), ("stage", "prod")]),
            ("istio-system/ingress", vec![("app", "istio-ingressgateway")]),
        ] {
            for port in [80, 90, 100] {
                let namespace = workload.split_once('/').unwrap().0;
                prop_assert_eq!(bed.mode(workload, port), naive(&policies, &labels, namespace, port), "{}:{}", workload, port);
            }
        }
    }
}
