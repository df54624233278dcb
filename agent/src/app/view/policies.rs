//! The policies in force as JSON, in the words in which people write them, each with the workloads that it selects now.

use std::collections::{BTreeMap, HashMap};

use serde_json::{Map, Value, json};

use crate::{
    policy::{
        DestinationRule, Header, MtlsMode, PeerAuthentication, PolicyName,
        authorization::{Condition, Rule, Test},
        evaluate::Written,
    },
    state::Snapshot,
};

/// How many workloads are named for each policy; the count is of all.
const NAMED: usize = 100;

#[derive(Default)]
struct Selected {
    count: usize,
    named: Vec<String>,
}

type Selections<'a> = HashMap<&'a PolicyName, Selected>;

pub(super) fn policies(snapshot: &Snapshot) -> Value {
    let policies = &snapshot.policies;
    let mut selections: Selections<'_> = HashMap::new();
    for workload in snapshot.workloads() {
        let authentication = policies.authentication.selecting(workload);
        for name in policies.authorization.applying(workload).chain(authentication) {
            let selected = selections.entry(name).or_default();
            selected.count += 1;
            if selected.named.len() < NAMED {
                selected.named.push(workload.to_string());
            }
        }
    }
    let sources: HashMap<&str, (&std::path::Path, u64)> =
        snapshot.sources.iter().map(|source| (&*source.resource, (&*source.file, source.line))).collect();
    let common = |header: &Header| common(header, &selections, &sources);
    let authentication =
        policies.authentication.written().map(|policy| peer_authentication(common(&policy.header), policy));
    let authorization = policies.authorization.written().map(|policy| authorization(common(policy.header), policy));
    let destinations = policies.destinations.written().map(|rule| destination_rule(common(&rule.header), rule));
    let mut all: Vec<Value> = authentication.chain(authorization).chain(destinations).collect();
    all.sort_by_cached_key(|policy| policy["name"].as_str().unwrap_or_default().to_owned());
    json!({
        "generation": snapshot.generation,
        "mode": policies.authentication.mesh_mode(),
        "policies": all,
        "superseded": policies.authentication.superseded().iter().map(|(void, by)| {
            json!({"name": void, "by": by})
        }).collect::<Vec<_>>(),
        "warnings": snapshot.warnings,
    })
}

/// What every policy has.
fn common(
    header: &Header,
    selections: &Selections<'_>,
    sources: &HashMap<&str, (&std::path::Path, u64)>,
) -> Map<String, Value> {
    let mut of = Map::new();
    let name = header.name.to_string();
    if let Some((file, line)) = sources.get(name.as_str()) {
        of.insert("file".into(), json!(file.display().to_string()));
        of.insert("line".into(), json!(line));
    }
    of.insert("name".into(), json!(name));
    of.insert("selector".into(), json!(header.selector.iter().collect::<BTreeMap<_, _>>()));
    if let Some(selected) = selections.get(&header.name) {
        of.insert("selects".into(), json!({"count": selected.count, "workloads": selected.named}));
    }
    of
}

fn peer_authentication(mut of: Map<String, Value>, policy: &PeerAuthentication) -> Value {
    let mode = |mode: Option<MtlsMode>| mode.map_or_else(|| "UNSET".to_owned(), |mode| mode.to_string());
    let ports: BTreeMap<_, _> = policy.ports.iter().map(|(port, at)| (port, json!({"mode": mode(*at)}))).collect();
    of.insert("mtls".into(), json!({"mode": mode(policy.mode)}));
    of.insert("portLevelMtls".into(), json!(ports));
    of.into()
}

fn authorization(mut of: Map<String, Value>, policy: Written<'_>) -> Value {
    of.insert("action".into(), json!(policy.action));
    of.insert("dry_run".into(), json!(policy.dry_run));
    of.insert("rules".into(), policy.rules.iter().map(rule).collect());
    of.into()
}

fn destination_rule(mut of: Map<String, Value>, rule: &DestinationRule) -> Value {
    let ports: BTreeMap<_, _> = rule.ports.iter().map(|(port, traffic)| (port, traffic.to_string())).collect();
    of.insert("host".into(), json!(rule.host));
    of.insert("exportTo".into(), json!(rule.exported_to));
    of.insert("trafficPolicy".into(), json!(rule.traffic.to_string()));
    of.insert("portLevelSettings".into(), json!(ports));
    of.into()
}

/// In the shape of AuthorizationPolicy's `rules`.
fn rule(rule: &Rule) -> Value {
    let one = |conditions: &Vec<Condition>| {
        let mut fields = Map::new();
        for condition in conditions {
            let (field, _, values) = named(&condition.test);
            let field = if condition.negated { negated(field) } else { field.to_owned() };
            fields.insert(field, json!(values));
        }
        Value::from(fields)
    };
    let mut shown = Map::new();
    if !rule.from.is_empty() {
        shown.insert("from".into(), rule.from.iter().map(|from| json!({"source": one(from)})).collect());
    }
    if !rule.to.is_empty() {
        shown.insert("to".into(), rule.to.iter().map(|to| json!({"operation": one(to)})).collect());
    }
    if !rule.when.is_empty() {
        let when = rule.when.iter().map(|condition| {
            let (_, key, values) = named(&condition.test);
            let values_of = if condition.negated { "notValues" } else { "values" };
            json!({"key": key, values_of: values})
        });
        shown.insert("when".into(), when.collect());
    }
    shown.into()
}

/// A test's field in `from` or `to`, its key in `when`, and its values.
fn named(test: &Test) -> (&'static str, &'static str, Vec<String>) {
    fn texts<T: ToString>(values: &[T]) -> Vec<String> {
        values.iter().map(ToString::to_string).collect()
    }
    match test {
        Test::SourceIp(blocks) => ("ipBlocks", "source.ip", texts(blocks)),
        Test::Principal(patterns) => ("principals", "source.principal", texts(patterns)),
        Test::Namespace(patterns) => ("namespaces", "source.namespace", texts(patterns)),
        Test::TrustDomain(patterns) => ("trustDomains", "source.trustDomain", texts(patterns)),
        Test::ServiceAccount(accounts) => {
            let accounts = accounts.iter().map(|(namespace, name)| format!("{namespace}/{name}"));
            ("serviceAccounts", "source.serviceAccount", accounts.collect())
        }
        Test::DestinationIp(blocks) => ("ipBlocks", "destination.ip", texts(blocks)),
        Test::DestinationPort(ports) => ("ports", "destination.port", texts(ports)),
        Test::Sni(patterns) => ("sni", "connection.sni", texts(patterns)),
        Test::Http => ("http", "request.*", vec!["of HTTP: cannot be met here".to_owned()]),
    }
}

fn negated(field: &str) -> String {
    let mut letters = field.chars();
    letters.next().map_or_else(String::new, |first| format!("not{}{}", first.to_ascii_uppercase(), letters.as_str()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rule_is_shown_as_it_is_written() {
        let condition = |test, negated| Condition { test, negated };
        let shown = rule(&Rule {
            from: vec![vec![
                condition(Test::Principal(vec!["a/*".parse().unwrap()]), false),
                condition(Test::SourceIp(vec!["10.0.0.0/8".parse().unwrap()]), true),
            ]],
            to: vec![vec![condition(Test::DestinationPort(vec![80, 443]), false)]],
            when: vec![condition(Test::Sni(vec!["*.example".parse().unwrap()]), true)],
        });
        assert_eq!(
            shown,
            json!({
                "from": [{"source": {"principals": ["a/*"], "notIpBlocks": ["10.0.0.0/8"]}}],
                "to": [{"operation": {"ports": ["80", "443"]}}],
                "when": [{"key": "connection.sni", "notValues": ["*.example"]}],
            })
        );
    }
}
