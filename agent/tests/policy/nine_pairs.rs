//! The exercise of https://istio.io/latest/docs/tasks/security/authentication/authn-policy/ : sleep in foo, bar and legacy calls
//! httpbin in foo, bar and legacy. foo and bar are in the mesh, legacy is not.

use std::net::SocketAddr;

use marline::policy::{self, Inbound, Outbound, Workload};

use super::{bed::Bed, modes::peer};

const NAMESPACES: [&str; 3] = ["foo", "bar", "legacy"];

/// How one call goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Call {
    Mtls,
    Plaintext,
    Refused,
}

/// Puts both decisions together: the client's agent chooses how to speak, the server's what it takes.
fn call(bed: &Bed, client: &Workload, server: &Workload, port: u16) -> Call {
    let policies = &bed.loaded.snapshot.policies;
    // A workload out of the mesh has no agent: it speaks plaintext, and takes what comes.
    let speaks_mtls = client.in_mesh && matches!(policy::outbound(policies, Some(server), port), Outbound::Mtls { .. });
    if !server.in_mesh {
        assert!(!speaks_mtls, "nobody could answer mTLS");
        return Call::Plaintext;
    }
    let (local, from) = (SocketAddr::new(server.addresses[0], port), client.addresses[0]);
    match (policy::inbound(policies, server, local, from, Some(client), false), speaks_mtls) {
        (Inbound::Mtls | Inbound::Sniff, true) => Call::Mtls,
        (Inbound::Plaintext | Inbound::Sniff, false) => Call::Plaintext,
        (Inbound::Plaintext, true) => panic!("TLS bytes would go to the application"),
        (Inbound::Mtls, false) | (Inbound::Deny(_), _) => Call::Refused,
    }
}

/// Rows are clients, columns servers, both in the order foo, bar, legacy.
fn check(what: &str, policies: &str, port: u16, expected: [[Call; 3]; 3]) {
    let bed = Bed::new(policies);
    for (client, row) in NAMESPACES.iter().zip(expected) {
        for (server, expected) in NAMESPACES.iter().zip(row) {
            let (from, to) = (bed.workload(&format!("{client}/sleep")), bed.workload(&format!("{server}/httpbin")));
            assert_eq!(call(&bed, from, to, port), expected, "{what}: sleep.{client} to httpbin.{server}:{port}");
        }
    }
}

use Call::{Mtls as M, Plaintext as P, Refused as R};

#[test]
fn by_default_all_nine_calls_succeed_and_the_mesh_speaks_mtls() {
    check("default", "", 8000, [[M, M, P], [M, M, P], [P, P, P]]);
}

#[test]
fn mesh_strict_refuses_legacy_to_the_mesh() {
    let policies = peer("istio-system/default", None, "{mtls: {mode: STRICT}}");
    check("mesh STRICT", &policies, 8000, [[M, M, P], [M, M, P], [R, R, P]]);
}

#[test]
fn namespace_strict_refuses_legacy_to_that_namespace() {
    let policies = peer("foo/default", None, "{mtls: {mode: STRICT}}");
    check("foo STRICT", &policies, 8000, [[M, M, P], [M, M, P], [R, P, P]]);
}

#[test]
fn workload_strict_refuses_legacy_to_that_workload() {
    let httpbin = "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: STRICT}}";
    let policies = [peer("foo/default", None, "{mtls: {mode: STRICT}}"), peer("bar/httpbin", None, httpbin)].concat();
    check("foo STRICT, httpbin.bar STRICT", &policies, 8000, [[M, M, P], [M, M, P], [R, R, P]]);
}

#[test]
fn a_disabled_port_is_plaintext_for_all() {
    let httpbin =
        "{selector: {matchLabels: {app: httpbin}}, mtls: {mode: STRICT}, portLevelMtls: {8000: {mode: DISABLE}}}";
    let policies = [peer("foo/default", None, "{mtls: {mode: STRICT}}"), peer("bar/httpbin", None, httpbin)].concat();
    check("httpbin.bar:8000 DISABLE", &policies, 8000, [[M, P, P], [M, P, P], [R, P, P]]);
    check("its other ports", &policies, 9000, [[M, M, P], [M, M, P], [R, R, P]]);
}
