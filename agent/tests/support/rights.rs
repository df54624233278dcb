//! What the manifests grant, and what requests to an API server take: both as `GROUP/RESOURCE VERB`, with `=NAME` after it where a role names
//! the object. A request's verb is what the API server makes of it.

use std::{collections::BTreeSet, fs};

use serde_json::Value;

pub type Rights = BTreeSet<String>;

/// All documents of a file in deploy/manifests.
pub fn documents(file: &str) -> Vec<Value> {
    let path = format!("{}/../deploy/manifests/{file}", env!("CARGO_MANIFEST_DIR"));
    serde_saphyr::from_multiple(&fs::read_to_string(path).unwrap()).unwrap()
}

/// What the roles of that name grant.
pub fn granted(name: &str) -> Rights {
    let mut rights = Rights::new();
    for document in documents("marline.yaml") {
        let is_role = ["ClusterRole", "Role"].iter().any(|kind| document["kind"] == *kind);
        if is_role && document["metadata"]["name"] == name {
            document["rules"].as_array().unwrap().iter().for_each(|rule| grant(rule, &mut rights));
        }
    }
    assert!(!rights.is_empty(), "no role {name}");
    rights
}

fn grant(rule: &Value, rights: &mut Rights) {
    let all = |field: &str| -> Vec<String> { serde_json::from_value(rule[field].clone()).unwrap_or_default() };
    for group in all("apiGroups") {
        for resource in all("resources") {
            for verb in all("verbs") {
                let right = format!("{group}/{resource} {verb}");
                match all("resourceNames").as_slice() {
                    [] => drop(rights.insert(right)),
                    names => rights.extend(names.iter().map(|name| format!("{right}={name}"))),
                }
            }
        }
    }
}

/// What a request takes, and the name of its object if it is about one.
pub fn taken(method: &str, path: &str, query: &str) -> (String, Option<String>) {
    let mut parts = path.trim_start_matches('/').split('/');
    let group = match parts.next() {
        Some("api") => "",
        Some("apis") => parts.next().unwrap(),
        _ => panic!("{path} is no resource"),
    };
    let rest: Vec<&str> = parts.skip(1).collect();
    let (resource, name) = match rest.as_slice() {
        ["namespaces", _, resource] | [resource] => (resource, None),
        ["namespaces", _, resource, name] => (resource, Some((*name).to_owned())),
        _ => panic!("{path} is not known here"),
    };
    let verb = match (method, &name) {
        ("GET", _) if query.split('&').any(|pair| pair == "watch=1") => "watch",
        ("GET", None) => "list",
        ("GET", Some(_)) => "get",
        ("POST", None) => "create",
        ("PUT", Some(_)) => "update",
        ("DELETE", Some(_)) => "delete",
        _ => panic!("{method} {path} is not known here"),
    };
    (format!("{group}/{resource} {verb}"), name)
}
