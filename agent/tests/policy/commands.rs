//! `marline policy check` and `marline policy explain`, as they are typed.

use std::{
    path::Path,
    process::{Command, Output},
};

use marline::{
    config,
    policy::{
        MtlsMode,
        explain::{Callee, Caller, Encryption, explain, explain_service},
    },
};

use super::{
    bed::{self, Bed},
    modes::peer,
    rules::{annotated, authorization},
};

fn marline(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_marline")).args(args).output().unwrap()
}

fn text(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap() + &String::from_utf8(output.stderr.clone()).unwrap()
}

fn check(dir: &Path, args: &[&str]) -> (Option<i32>, String) {
    let output = marline(&[&["policy", "check", dir.to_str().unwrap()], args].concat());
    (output.status.code(), text(&output))
}

fn explained(dir: &Path, source: &str, destination: &str, args: &[&str]) -> (Option<i32>, String) {
    let dir = dir.to_str().unwrap();
    let fixed = ["policy", "explain", "--config", dir, "--source", source, "--destination", destination];
    let output = marline(&[&fixed, args].concat());
    (output.status.code(), text(&output))
}

/// That it exits with `code` and says each of `parts`.
fn explains(dir: &Path, source: &str, destination: &str, code: i32, parts: &[&str]) {
    let (found, said) = explained(dir, source, destination, &[]);
    assert_eq!(found, Some(code), "{source} to {destination}:\n{said}");
    for part in parts {
        assert!(said.contains(part), "{source} to {destination}: no {part:?} in\n{said}");
    }
}

#[test]
fn check_exits_with_0_1_or_2_and_needs_no_agent_config() {
    let sound = peer("foo/default", None, "{mtls: {mode: STRICT}}");
    let void = peer("istio-system/x", None, "{selector: {matchLabels: {app: x}}}");
    let wrong = authorization("foo/x", "{action: CUSTOM, provider: {name: x}, rules: [{}]}");
    for (policies, code, part) in [
        (vec![], 0, "good, 0 policies"),
        (vec![sound.as_str()], 0, "good, 1 policies"),
        (vec![&sound, &void], 1, "warning: "),
        (vec![&sound, &void, &wrong], 2, "CUSTOM asks an external authorizer"),
    ] {
        let dir = bed::directory("cluster.local", &policies);
        std::fs::remove_file(dir.path().join("agent.yaml")).unwrap();
        let (found, said) = check(dir.path(), &[]);
        assert_eq!(found, Some(code), "{said}");
        assert!(said.contains(part), "{said}");
        let (found, json) = check(dir.path(), &["--json"]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(found, Some(code));
        assert_eq!(json["errors"].as_array().unwrap().is_empty(), code != 2);
        assert_eq!(json["warnings"].as_array().unwrap().is_empty(), code == 0);
    }
    assert_eq!(check(Path::new("/nonexistent/marline"), &[]).0, Some(2));
}

#[test]
fn explain_says_the_verdict_the_mode_and_the_rule_that_decided() {
    let policies = [
        peer("istio-system/default", None, "{mtls: {mode: STRICT}}"),
        peer("foo/default", None, "{mtls: {mode: UNSET}}"),
        authorization("foo/not-bar", "{action: DENY, rules: [{from: [{source: {namespaces: [bar]}}]}]}"),
        authorization("foo/ports", "{rules: [{to: [{operation: {ports: [\"80\"]}}]}]}"),
        annotated("foo/tried", "istio.io/dry-run: \"true\"", "{action: DENY, rules: [{}]}"),
    ];
    let dir = bed::directory("cluster.local", &[&policies.concat()]);
    for (source, destination, code, parts) in [
        (
            "foo/sleep",
            "foo/httpbin:80",
            0,
            vec![
                "allowed, in mTLS: allowed by AuthorizationPolicy foo/ports rules[0]",
                "mode STRICT",
                "  namespace UNSET      PeerAuthentication foo/default",
                "* mesh      STRICT     PeerAuthentication istio-system/default",
                "  DENY      AuthorizationPolicy foo/not-bar: no rule matches",
                "* ALLOW     AuthorizationPolicy foo/ports: rules[0] matches",
                "* DENY      AuthorizationPolicy foo/tried (dry run): rules[0] matches",
                "dry runs: would be forbidden by AuthorizationPolicy foo/tried rules[0]",
            ],
        ),
        (
            "bar/sleep",
            "foo/httpbin:80",
            1,
            vec!["refused, in mTLS: forbidden by AuthorizationPolicy foo/not-bar rules[0]"],
        ),
        ("10.0.1.2", "10.0.1.1:81", 1, vec!["refused, in mTLS: allowed by no rule of AuthorizationPolicy foo/ports"]),
        ("finance", "mongodb:1", 0, vec!["allowed, in mTLS: no ALLOW policy applies", "none applies"]),
        ("legacy/sleep", "foo/httpbin:80", 1, vec!["refused, in plaintext: mTLS is required"]),
        ("10.9.9.9", "foo/httpbin:80", 1, vec!["from nobody known at 10.9.9.9", "refused, in plaintext"]),
        ("foo/sleep", "legacy/httpbin:80", 0, vec!["allowed, in plaintext: the destination is not in the mesh"]),
        ("foo/sleep", "[fd00::6]:80", 0, vec!["allowed, in mTLS"]),
        ("sleep", "foo/httpbin:80", 2, vec!["there are several"]),
        ("foo/nobody", "foo/httpbin:80", 2, vec!["no WorkloadEntry has this name"]),
        ("foo/sleep", "foo/httpbin", 2, vec!["write WORKLOAD:PORT"]),
        ("foo/sleep", "10.9.9.9:80", 2, vec!["no workload and no service has this address"]),
    ] {
        explains(dir.path(), source, destination, code, &parts);
    }
    let (code, said) = explained(dir.path(), "foo/sleep", "foo/httpbin:80", &["--plaintext"]);
    assert_eq!(code, Some(1), "{said}");
    let (_, json) = explained(dir.path(), "foo/sleep", "foo/httpbin:80", &["--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(
        (&json["allowed"], &json["mode"], &json["encryption"]),
        (&true.into(), &"STRICT".into(), &"mtls".into())
    );
    assert_eq!(json["rules"][1]["policy"], "AuthorizationPolicy foo/ports");
    assert_eq!(json["modes"][1]["level"], "mesh");
}

/// The nine pairs, by the explanation: what it says is what the evaluators decide (`nine_pairs` has those).
#[test]
fn explain_agrees_on_the_nine_pairs() {
    let strict = peer("istio-system/default", None, "{mtls: {mode: STRICT}}");
    let namespace = peer("foo/default", None, "{mtls: {mode: STRICT}}");
    for (policies, refused) in [("", 0), (&*strict, 2), (&*namespace, 1)] {
        let bed = Bed::new(policies);
        let (mut denied, mut mtls) = (0, 0);
        for client in ["foo", "bar", "legacy"] {
            for server in ["foo", "bar", "legacy"] {
                let from = bed.workload(&format!("{client}/sleep"));
                let (to, local) = bed.destination(&format!("{server}/httpbin:8000"));
                let caller = Caller { address: from.addresses[0], workload: Some(from), plaintext: false };
                let callee = Callee { workload: Some(to), address: local, service: None, told_plaintext: false };
                let explanation = explain(&bed.loaded.snapshot.policies, caller, callee);
                denied += usize::from(!explanation.allowed);
                mtls +=
                    usize::from(explanation.encryption == Encryption::Mtls && explanation.mode != MtlsMode::Disable);
            }
        }
        assert_eq!((denied, mtls), (refused, 4), "{policies}");
    }
}

/// Every kind of Istio's that is not read, and what is said of it.
#[test]
fn documents_that_are_not_acted_on_are_refused_with_what_to_do_instead() {
    for (kind, version, message, hint) in [
        ("MeshPolicy", "authentication.istio.io/v1alpha1", "left Istio", "PeerAuthentication in istio-system"),
        ("Policy", "authentication.istio.io/v1alpha1", "left Istio", "PeerAuthentication in the same namespace"),
        ("ClusterRbacConfig", "rbac.istio.io/v1alpha1", "left Istio", "AuthorizationPolicies"),
        ("ServiceRole", "rbac.istio.io/v1alpha1", "left Istio", "AuthorizationPolicy"),
        ("ServiceRoleBinding", "rbac.istio.io/v1alpha1", "left Istio", "AuthorizationPolicy"),
        ("IstioOperator", "install.istio.io/v1alpha1", "there is no Istio here", "AgentConfig"),
        ("EnvoyFilter", "networking.istio.io/v1alpha3", "no Envoy here", "move it out"),
        ("DestinationRule", "networking.istio.io/v1alpha1", "version v1alpha1", "networking.istio.io/v1"),
        ("VirtualService", "networking.istio.io/v1", "not acted on yet", "move it out"),
        ("Sidecar", "networking.istio.io/v1", "not acted on yet", "AuthorizationPolicies"),
        ("Gateway", "networking.istio.io/v1", "not acted on yet", "move it out"),
        ("WorkloadGroup", "networking.istio.io/v1", "not acted on", "WorkloadEntry"),
        ("ServiceEntry", "networking.istio.io/v1alpha1", "version v1alpha1", "networking.istio.io/v1"),
        ("RequestAuthentication", "security.istio.io/v1", "tokens would go unchecked", "move it out"),
        ("Whatever", "config.istio.io/v1", "does not act on this kind", "move it out"),
        ("Deployment", "apps/v1", "not known", "AuthorizationPolicy"),
        ("AuthorizationPolicy", "security.istio.io/v1alpha1", "version v1alpha1", "security.istio.io/v1"),
        ("PeerAuthentication", "networking.istio.io/v1", "not one of the group", "security.istio.io/v1"),
    ] {
        let text = format!("apiVersion: {version}\nkind: {kind}\nmetadata: {{name: x}}\n");
        let errors = bed::load(&text).unwrap_err();
        let [error]: &[config::Finding] = &errors.errors else { panic!("{kind}: {errors}") };
        assert!(error.message.contains(message) && error.hint.contains(hint), "{error}");
        assert_eq!(error.resource.as_deref(), Some(format!("{kind} default/x").as_str()));
    }
    let twice = peer("foo/x", None, "{}").repeat(2);
    assert!(bed::load(&twice).unwrap_err().to_string().contains("another of this kind and name"));
}

fn service(place: &str, address: &str) -> String {
    let (namespace, name) = place.split_once('/').unwrap();
    format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{clusterIP: {address}, selector: {{app: {name}}}, ports: [{{name: tcp, port: 8000, targetPort: 80}}]}}\n---\n"
    )
}

fn destination_rule(place: &str, spec: &str) -> String {
    let (namespace, name) = place.split_once('/').unwrap();
    format!(
        "apiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {spec}\n---\n"
    )
}

#[test]
fn explain_says_what_a_service_and_its_destination_rules_come_to() {
    let host = "httpbin.bar.svc.cluster.local";
    let policies = [
        peer("bar/default", None, "{mtls: {mode: STRICT}}"),
        service("bar/httpbin", "10.96.0.1"),
        service("bar/nobody", "10.96.0.2"),
        service("legacy/httpbin", "10.96.0.3"),
        destination_rule(
            "foo/own",
            &format!(
                "{{host: {host}, trafficPolicy: {{tls: {{mode: DISABLE}}}}, \
                 subsets: [{{name: v1, labels: {{version: v1}}}}, {{name: v2, labels: {{version: v2}}}}]}}"
            ),
        ),
        destination_rule(
            "bar/httpbin",
            "{host: httpbin, trafficPolicy: {connectionPool: {tcp: {maxConnections: 3, connectTimeout: 2s}}}}",
        ),
        destination_rule("istio-system/all", "{host: \"*.local\", trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}"),
        destination_rule(
            "default/who",
            &format!(
                "{{host: {host}, exportTo: [\".\"], trafficPolicy: {{tls: {{mode: ISTIO_MUTUAL, \
                 subjectAltNames: [spiffe://cluster.local/ns/bar/sa/other]}}}}}}"
            ),
        ),
    ];
    let dir = bed::directory("cluster.local", &[&policies.concat()]);
    for (source, destination, code, parts) in [
        (
            "foo/sleep",
            "httpbin.bar:8000",
            1,
            vec![
                "to   httpbin.bar.svc.cluster.local port 8000",
                "* DestinationRule foo/own for httpbin.bar.svc.cluster.local: tls.mode DISABLE",
                "  DestinationRule bar/httpbin for httpbin.bar.svc.cluster.local: at most 3 connections of each pod, connect timeout 2s",
                "  DestinationRule istio-system/all for *.local: tls.mode ISTIO_MUTUAL",
                "10.0.2.1:80 bar/httpbin (subset v1): refused, in plaintext: mTLS is required, and the client speaks plaintext",
            ],
        ),
        ("bar/sleep", "httpbin.bar:8000", 0, vec!["* DestinationRule bar/httpbin", "allowed, in mTLS"]),
        ("legacy/sleep", "10.96.0.1:8000", 1, vec!["none applies", "refused, in plaintext: mTLS is required"]),
        ("foo/sleep", "httpbin.legacy:8000", 1, vec!["must speak mTLS, and the destination is not in the mesh"]),
        (
            "default/sleep",
            "httpbin.bar.svc.cluster.local:8000",
            1,
            vec!["lets others answer for the service, and not spiffe://cluster.local/ns/bar/sa/httpbin"],
        ),
        ("foo/sleep", "nobody.bar:8000", 1, vec!["there are none"]),
        ("foo/sleep", "httpbin.bar:81", 2, vec!["httpbin.bar.svc.cluster.local has no port 81"]),
    ] {
        explains(dir.path(), source, destination, code, &parts);
    }
    let (_, json) = explained(dir.path(), "bar/sleep", "httpbin.bar:8000", &["--json"]);
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    assert_eq!(json["destination_rules"][0]["rule"], "DestinationRule bar/httpbin");
    assert_eq!(json["endpoints"][0]["explanation"]["encryption"], "mtls");
}

/// The older guide's way to mesh-wide mTLS, before clients found out by themselves
/// (https://istio.io/v1.4/docs/tasks/security/authentication/authn-policy/): the rule makes clients speak mTLS to everybody, so that who has
/// no sidecar cannot be called, until a rule for its host takes that back.
#[test]
fn the_guides_destination_rule_for_all_hosts_asks_for_mtls_where_nobody_answers_it() {
    let services = [
        service("foo/httpbin", "10.96.0.1"),
        service("bar/httpbin", "10.96.0.2"),
        service("legacy/httpbin", "10.96.0.3"),
    ];
    let all =
        destination_rule("istio-system/default", "{host: \"*.local\", trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}");
    let legacy = destination_rule(
        "legacy/httpbin-legacy",
        "{host: httpbin.legacy.svc.cluster.local, trafficPolicy: {tls: {mode: DISABLE}}}",
    );
    let strict = peer("istio-system/default", None, "{mtls: {mode: STRICT}}");
    for (policies, expected) in [
        (vec![], ["M M P", "M M P", "P P P"]),
        (vec![&all], ["M M R", "M M R", "P P P"]),
        (vec![&all, &legacy], ["M M P", "M M P", "P P P"]),
        (vec![&all, &legacy, &strict], ["M M P", "M M P", "R R P"]),
    ] {
        let text: String = services.iter().chain(policies.clone()).map(String::as_str).collect();
        let bed = Bed::new(&text);
        let snapshot = &bed.loaded.snapshot;
        for (client, expected) in ["foo", "bar", "legacy"].iter().zip(expected) {
            let from = bed.workload(&format!("{client}/sleep"));
            let caller = Caller { address: from.addresses[0], workload: Some(from), plaintext: false };
            let found: Vec<&str> = (1..4)
                .map(|n| {
                    let service = snapshot.service(format!("10.96.0.{n}").parse().unwrap()).unwrap();
                    let said =
                        explain_service(&snapshot.policies, caller, service, (service.addresses[0], 8000).into())
                            .unwrap();
                    match (said.allowed, said.endpoints[0].explanation.encryption) {
                        (false, _) => "R",
                        (true, Encryption::Mtls) => "M",
                        (true, Encryption::Plaintext) => "P",
                    }
                })
                .collect();
            assert_eq!(
                found.join(" "),
                expected,
                "{client} under\n{}",
                policies.iter().map(|p| p.as_str()).collect::<String>()
            );
        }
    }
}
