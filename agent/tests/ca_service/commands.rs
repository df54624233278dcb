//! What people type and write: the commands, and what is said of files that are wrong.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::{Command, Output},
};

use marline::config;
use serde_json::Value;
use tonic::Code;

use crate::{bed::*, lives::Process};

fn marline(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_marline")).args(args).output().unwrap()
}

fn text(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_commands_of_the_handbook_lead_from_nothing_to_a_certificate_and_to_its_end() {
    let bed = Bed::files("");
    let file = bed.path("ca.yaml");
    let (file, out) = (file.to_str().unwrap(), bed.path("node-c.token"));
    let made = marline(&[
        "ca",
        "token",
        "--node",
        "node-c",
        "--out",
        out.to_str().unwrap(),
        "--expires",
        "30d",
        "--from",
        "127.0.0.0/8",
    ]);
    assert!(made.status.success(), "{}", text(&made));
    let token = fs::read_to_string(&out).unwrap().trim().to_owned();
    assert_eq!(fs::metadata(&out).unwrap().permissions().mode() & 0o777, 0o600);
    assert!(!text(&made).contains(&token), "the file alone has it");
    let entry = String::from_utf8(made.stdout).unwrap();
    bed.write("tokens.yaml", &format!("{}{entry}", tokens(&[(TOKEN_A, "node-a", "")])));
    bed.write("nodes.yaml", &format!("{NODES}    - {{name: node-c, serviceAccounts: [shop/cart]}}\n"));
    let again = marline(&["ca", "token", "--node", "node-c", "--out", out.to_str().unwrap()]);
    assert_eq!(again.status.code(), Some(1), "nothing that exists is overwritten");

    let checked = marline(&["check-config", file]);
    assert!(checked.status.success(), "{}", text(&checked));
    assert!(text(&checked).contains("good, 2 tokens, 3 nodes"), "{}", text(&checked));

    let process = Process::start(&bed);
    let root = bed.path("ca/root-cert.pem");
    let mut client = connect(process.address, &root, "127.0.0.1".parse().unwrap()).await.unwrap();
    let id = "spiffe://cluster.local/ns/shop/sa/cart";
    let (_, csr) = new_csr(id);
    let chain = send(&mut client, &token, Some(id), &csr, 3600).await.unwrap();

    let revoked = marline(&["ca", "revoke", "--config", file, "--node", "node-c", "--json"]);
    assert!(revoked.status.success(), "{}", text(&revoked));
    let said: Value = serde_json::from_slice(&revoked.stdout).unwrap();
    assert_eq!((&said["changed"], &said["known"], &said["list"]["added"]), (&true.into(), &true.into(), &1.into()));
    assert!(fs::read_to_string(bed.path("ca/ca-crl.pem")).unwrap().contains("X509 CRL"));
    refused(send(&mut client, &token, Some(id), &csr, 3600).await, Code::PermissionDenied, "marline ca revoke --undo");
    let again = marline(&["ca", "revoke", "--config", file, "--node", "node-c"]);
    assert!(text(&again).contains("was shut out already") && again.status.success(), "{}", text(&again));
    let typo = marline(&["ca", "revoke", "--config", file, "--node", "nod-c"]);
    assert!(text(&typo).contains("knows no such node"), "{}", text(&typo));

    let undone = marline(&["ca", "revoke", "--config", file, "--node", "node-c", "--undo"]);
    assert!(undone.status.success(), "{}", text(&undone));
    let after = send(&mut client, &token, Some(id), &csr, 3600).await.unwrap();
    assert_ne!(serial(&after), serial(&chain));
}

#[test]
fn every_error_of_a_file_is_listed_with_its_line_and_its_field() {
    let bed = Bed::files("");
    bed.write(
        "ca.yaml",
        "apiVersion: marline.io/v1alpha1
kind: CaServer
spec:
  trustDomain: UPPER
  ca: {path: ca, leafLifetime: 1h}
  listen:
    address: here
    names: [ca.test, \"not a name\"]
  nodes: nodes.yaml
  certificates: {maxLifetime: 1s}
  authentication:
    kubernetes: {agents: [marline], server: {address: \"http://x\"}}
  limits:
    perNode: {burst: 0}
    connections: many
  more: 1
",
    );
    let file = bed.path("ca.yaml");
    let errors = config::load_ca_server(&file).unwrap_err();
    let found: Vec<(u64, &str)> =
        errors.errors.iter().map(|error| (error.line.unwrap(), error.field.as_deref().unwrap())).collect();
    assert_eq!(
        found,
        [
            (3, "spec.state"),
            (4, "spec.trustDomain"),
            (5, "spec.ca.leafLifetime"),
            (7, "spec.listen.address"),
            (8, "spec.listen.names"),
            (10, "spec.certificates.maxLifetime"),
            (12, "spec.authentication.kubernetes.agents"),
            (12, "spec.authentication.kubernetes.server.address"),
            (12, "spec.authentication.kubernetes.server.rootCert"),
            (12, "spec.authentication.kubernetes.server.tokenFile"),
            (14, "spec.limits.perNode.burst"),
            (15, "spec.limits.connections"),
            (16, "spec.more"),
        ],
        "{errors}"
    );
    for command in
        [["check-config", file.to_str().unwrap()].as_slice(), &["ca", "serve", "--config", file.to_str().unwrap()]]
    {
        let output = marline(command);
        assert_eq!(output.status.code(), Some(2), "{command:?}");
        assert!(text(&output).contains("ca.yaml:7: CaServer"), "{}", text(&output));
    }
}

#[test]
fn what_is_wrong_with_the_lists_is_told() {
    let bed = Bed::files("");
    let tokens = |text: &str| {
        bed.write("tokens.yaml", &format!("apiVersion: marline.io/v1alpha1\nkind: CaTokens\nspec:\n  tokens:\n{text}"));
        config::load_ca_tokens(&bed.path("tokens.yaml")).unwrap_err().to_string()
    };
    let hash = "a".repeat(64);
    for (entry, reason) in [
        ("    - {sha256: abc, node: a}".to_owned(), "spec.tokens[0].sha256: is no SHA-256"),
        (format!("    - {{sha256: {hash}}}"), "spec.tokens[0].node: is missing"),
        (format!("    - {{sha256: {hash}, node: a, expires: soon}}"), "\"soon\" is no time"),
        (format!("    - {{sha256: {hash}, node: a, from: [here]}}"), "no address and no network"),
        (format!("    - {{sha256: {hash}, node: a, token: b}}"), "spec.tokens[0].token: this field is not known"),
        (
            format!("    - {{sha256: {hash}, node: a}}\n    - {{sha256: {hash}, node: b}}"),
            "is there already, for node a",
        ),
    ] {
        let errors = tokens(&entry);
        assert!(errors.contains(reason), "{errors}");
    }
    bed.write("nodes.yaml", "apiVersion: marline.io/v1alpha1\nkind: CaNodes\nspec:\n  nodes: [{name: a}, {name: a}, {serviceAccounts: [x]}]\n");
    let errors = config::load_ca_nodes(&bed.path("nodes.yaml")).unwrap_err().to_string();
    for reason in ["a is there twice", "spec.nodes[2].name: is missing", "\"x\" is no service account"] {
        assert!(errors.contains(reason), "{errors}");
    }
    let errors = config::load_ca_nodes(&bed.path("ca.yaml")).unwrap_err().to_string();
    assert!(errors.contains("expected kind CaNodes of marline.io/v1alpha1, found \"CaServer\""), "{errors}");
    let checked = marline(&["check-config", bed.path("ca.yaml").to_str().unwrap()]);
    assert_eq!(checked.status.code(), Some(2), "the files that it names are read as well");
}

#[test]
fn the_example_is_sound() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy/example/ca");
    let (settings, warnings) = config::load_ca_server(&dir.join("ca.yaml")).unwrap_or_else(|errors| panic!("{errors}"));
    assert!(warnings.is_empty());
    assert_eq!(config::load_ca_tokens(settings.tokens.as_ref().unwrap()).unwrap().0.len(), 2);
    assert_eq!(config::load_ca_nodes(&kept(&settings).nodes).unwrap().0.len(), 2);
}

#[test]
fn certificates_that_could_not_be_revoked_are_no_success_and_the_way_out_is_told() {
    let bed = Bed::files("");
    let file = bed.path("ca.yaml");
    let revoke = || marline(&["ca", "revoke", "--config", file.to_str().unwrap(), "--node", "node-a"]);
    fs::create_dir(bed.path("state")).unwrap();
    let line = r#"{"time":"2026-01-01T00:00:00Z","outcome":"issued","node":"node-a","peer":"","serial":"0A","not_after":"2999-01-01T00:00:00Z","signer":"another"}"#;
    bed.write("state/ledger.jsonl", &format!("{line}\n"));
    let other = revoke();
    assert_eq!(other.status.code(), Some(1), "{}", text(&other));
    assert!(text(&other).contains("They count until 2999-01-01T00:00:00Z"), "{}", text(&other));
    bed.write("state/ledger.jsonl", "\n{half\n");
    let half = revoke();
    assert_eq!(half.status.code(), Some(1), "{}", text(&half));
    assert!(text(&half).contains("ledger.jsonl:2"), "{}", text(&half));
    bed.write("state/ledger.jsonl", "");
    assert_eq!(revoke().status.code(), Some(0));
}
