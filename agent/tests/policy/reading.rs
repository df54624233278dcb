//! AuthorizationPolicies that are refused, and those that are taken with a warning: what is said, and of which field.

use proptest::prelude::*;

use super::{
    bed::{Bed, load},
    rules::{annotated, authorization},
};

fn refused(policy: &str) -> Vec<(String, String)> {
    let errors = load(policy).err().unwrap_or_else(|| panic!("accepted: {policy}"));
    errors.errors.into_iter().map(|error| (error.field.unwrap_or_default(), error.message)).collect()
}

/// Most follow istio/istio pkg/config/validation/validation.go, `ValidateAuthorizationPolicy`; the rest is what would not be acted on.
#[test]
fn what_cannot_be_acted_on_is_refused_by_name() {
    let rule = |rule: &str| format!("{{rules: [{rule}]}}");
    let source = |source: &str| format!("{{rules: [{{from: [{{source: {source}}}]}}]}}");
    let when = |when: &str| format!("{{rules: [{{when: [{when}]}}]}}");
    let in_source = "spec.rules[0].from[0].source";
    let field = |name: &str| format!("{in_source}.{name}");
    let cases: Vec<(String, String, &str)> = vec![
        (
            "{action: CUSTOM, provider: {name: x}, rules: [{}]}".into(),
            "spec.action",
            "CUSTOM asks an external authorizer",
        ),
        ("{action: allow}".into(), "spec.action", "\"allow\" is not known"),
        ("{provider: {name: x}}".into(), "spec.provider", "belongs to the action CUSTOM"),
        ("{action: DENY}".into(), "spec.rules", "denies nothing"),
        ("{action: DENY, rules: []}".into(), "spec.rules", "denies nothing"),
        ("{targetRefs: [{kind: Gateway, name: x}]}".into(), "spec.targetRefs", "a gateway or a waypoint"),
        ("{targetRef: {kind: Gateway, name: x}}".into(), "spec.targetRef", "a gateway or a waypoint"),
        ("{rule: []}".into(), "spec.rule", "not known"),
        ("{rules: {}}".into(), "spec.rules", "must be a list"),
        ("{selector: {matchLabels: {app: \"*\"}}}".into(), "spec.selector.matchLabels", "selects nothing"),
        (rule("null"), "spec.rules[0]", "must be a mapping"),
        (rule("{form: []}"), "spec.rules[0].form", "not known"),
        (rule("{from: []}"), "spec.rules[0].from", "is an empty list"),
        (rule("{to: []}"), "spec.rules[0].to", "is an empty list"),
        (rule("{from: [{}]}"), "spec.rules[0].from[0]", "has no source"),
        (rule("{from: [{sources: {}}]}"), "spec.rules[0].from[0]", "has no source"),
        (rule("{to: [{operation: {}}]}"), "spec.rules[0].to[0].operation", "holds no condition"),
        (rule("{to: [{operation: {ports: [80]}}]}"), "spec.rules[0].to[0].operation.ports[0]", "must be a text"),
        (rule("{to: [{operation: {ports: [\"http\"]}}]}"), "spec.rules[0].to[0].operation.ports", "is not a port"),
        (rule("{to: [{operation: {ports: [\"65536\"]}}]}"), "spec.rules[0].to[0].operation.ports", "is not a port"),
        (rule("{to: [{operation: {port: [\"80\"]}}]}"), "spec.rules[0].to[0].operation", "holds no condition"),
        (source("{}"), in_source, "holds no condition"),
        (source("{principals: []}"), in_source, "holds no condition"),
        (source("{principals: x}"), &field("principals"), "must be a list"),
        (source("{principals: [\"\"]}"), &field("principals[0]"), "is empty"),
        (source("{principals: [\"a*b\"]}"), &field("principals"), "wildcard in its middle"),
        (source("{principals: [\"spiffe://td/ns/a/sa/b\"]}"), &field("principals"), "without spiffe://"),
        (source("{namespaces: [\"*a*\"]}"), &field("namespaces"), "wildcard"),
        (source("{ipBlocks: [\"10.0.0.0/33\"]}"), &field("ipBlocks"), "neither an IP address nor a block"),
        (source("{notRemoteIpBlocks: [example.org]}"), &field("notRemoteIpBlocks"), "neither an IP address"),
        (source("{serviceAccounts: [\"a/*\"]}"), &field("serviceAccounts"), "wildcard"),
        (source("{serviceAccounts: [\"a/b/c\"]}"), &field("serviceAccounts"), "neither NAME nor"),
        (source("{serviceAccounts: [\"/b\"]}"), &field("serviceAccounts"), "neither NAME nor"),
        (
            source("{serviceAccounts: [a], namespaces: [b]}"),
            &field("serviceAccounts"),
            "cannot stand beside namespaces",
        ),
        (
            source("{notServiceAccounts: [a], principals: [b]}"),
            &field("notServiceAccounts"),
            "cannot stand beside principals",
        ),
        (source("{trustDomains: [\"a/b\"]}"), &field("trustDomains"), "holds a /"),
        (when("{}"), "spec.rules[0].when[0].key", "is missing"),
        (when("{key: source.ip}"), "spec.rules[0].when[0]", "neither values nor notValues"),
        (when("{key: source.ip, values: []}"), "spec.rules[0].when[0]", "neither values nor notValues"),
        (when("{key: source.ip, values: [x]}"), "spec.rules[0].when[0].values", "neither an IP address"),
        (when("{key: destination.port, notValues: [\"-1\"]}"), "spec.rules[0].when[0].notValues", "is not a port"),
        (when("{key: source.user, values: [x]}"), "spec.rules[0].when[0].key", "is not known"),
        (
            when("{key: destination.namespace, values: [x]}"),
            "spec.rules[0].when[0].key",
            "replaced by metadata.namespace",
        ),
        (
            when("{key: \"destination.labels[a]\", values: [x]}"),
            "spec.rules[0].when[0].key",
            "replaced by the selector",
        ),
        (when("{key: \"request.headers[]\", values: [x]}"), "spec.rules[0].when[0].key", "is not known"),
        (
            when("{key: \"experimental.envoy.filters.a.b[c]\", values: [x]}"),
            "spec.rules[0].when[0].key",
            "Envoy's filters",
        ),
        (when("{key: source.ip, value: [x]}"), "spec.rules[0].when[0]", "neither values nor notValues"),
    ]
    .into_iter()
    .map(|(spec, field, part): (String, &str, &str)| (spec, field.to_owned(), part))
    .collect();
    for (spec, field, part) in cases {
        let errors = refused(&authorization("foo/x", &spec));
        let first = errors.first().unwrap();
        assert!(first.0 == field && first.1.contains(part), "{spec}: {errors:?}");
    }
    let maybe = annotated("foo/x", "istio.io/dry-run: \"maybe\"", "{}");
    assert!(refused(&maybe)[0].1.contains("neither true nor false"));
    let ours = annotated("foo/x", "marline.io/netns: /n", "{}");
    assert!(refused(&ours)[0].1.contains("means nothing on this kind"));
}

#[test]
fn fields_that_only_http_has_are_warned_of_by_name() {
    for (action, rule, expected) in [
        (
            "ALLOW",
            "to: [{operation: {methods: [GET], ports: [\"80\"]}}]",
            "spec.rules[0]: never matches, and so allows nothing: methods needs HTTP",
        ),
        (
            "DENY",
            "to: [{operation: {notPaths: [/a], ports: [\"80\"]}}]",
            "spec.rules[0]: denies more than it says: notPaths needs HTTP",
        ),
        ("DENY", "to: [{operation: {hosts: [a]}}]", "spec.rules[0]: denies every connection: hosts needs HTTP"),
        (
            "AUDIT",
            "from: [{source: {requestPrincipals: [a]}}]",
            "spec.rules[0]: audits every connection: requestPrincipals needs HTTP",
        ),
        (
            "DENY",
            "when: [{key: \"request.auth.claims[iss]\", values: [a]}]",
            "spec.rules[0]: denies every connection: request.auth.claims[iss]",
        ),
        (
            "DENY",
            "from: [{source: {principals: [], ipBlocks: [10.0.0.1]}}]",
            "spec.rules[0].from[0].source.principals: is an empty list",
        ),
    ] {
        let warnings =
            Bed::new(&authorization("foo/x", &format!("{{action: {action}, rules: [{{{rule}}}]}}"))).warnings();
        assert_eq!(warnings.len(), 1, "{warnings:?}");
        assert!(warnings[0].starts_with(expected), "{warnings:?}");
    }
    assert_eq!(
        Bed::new(&authorization("foo/x", "{rules: [{to: [{operation: {ports: [\"80\"]}}]}]}")).warnings(),
        Vec::<String>::new()
    );
}

fn yaml_like() -> impl Strategy<Value = String> {
    let words = "action|ALLOW|DENY|AUDIT|CUSTOM|rules|from|to|when|source|operation|principals|notPrincipals|namespaces|ipBlocks|\
        serviceAccounts|ports|notPorts|methods|key|values|notValues|source.ip|destination.port|10.0.0.0/8|\"80\"|\\*|a/b|selector|matchLabels|app|null|1";
    let marks = ": |: \\[|\\[|\\]|\\{|\\}|, |\\}, \\{|: \\{";
    proptest::collection::vec(proptest::string::string_regex(&format!("({words}|{marks})")).unwrap(), 0..40)
        .prop_map(|parts| parts.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn no_yaml_makes_the_reader_of_policies_panic(spec in yaml_like(), kind in "AuthorizationPolicy|PeerAuthentication") {
        let text = authorization("foo/x", &format!("{{{spec}}}")).replace("AuthorizationPolicy", &kind);
        if let Err(errors) = load(&text) {
            prop_assert_eq!(errors.to_string().lines().count(), errors.errors.len());
        }
    }
}
