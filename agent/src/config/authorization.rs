//! AuthorizationPolicy, read as it was written. What Istio's own validation refuses is an error here too
//! (istio/istio pkg/config/validation/validation.go, `ValidateAuthorizationPolicy`, and pkg/config/security/security.go,
//! `ValidateAttribute`); fields that only HTTP has are kept as such, with a warning. What it all means is `policy`'s.

use std::str::FromStr;

use super::{
    document::Pair,
    fields::{Fields, Unknown},
    finding::{Origin, Report},
    policies::{self, DRY_RUN},
    resources::Metadata,
};
use crate::policy::{
    AuthorizationPolicy,
    authorization::{Action, Condition, Rule, Test},
    matching::MatchError,
};

/// Makes a test of the texts of a field, or says what is wrong with one of them.
type Make = fn(&[&str], &str) -> Result<Test, String>;

/// Name, name of the negation, meaning.
type Field = (&'static str, &'static str, Make);

const SOURCE: [Field; 7] = [
    ("principals", "notPrincipals", principals),
    ("requestPrincipals", "notRequestPrincipals", http),
    ("namespaces", "notNamespaces", |texts, _| parsed(texts).map(Test::Namespace)),
    ("serviceAccounts", "notServiceAccounts", service_accounts),
    ("trustDomains", "notTrustDomains", trust_domains),
    ("ipBlocks", "notIpBlocks", |texts, _| parsed(texts).map(Test::SourceIp)),
    // Without a proxy in between the connection's own source, as Envoy's TCP filter has it (istio/istio
    // pilot/pkg/security/authz/model/generator.go, `remoteIPGenerator`, is not limited to HTTP).
    ("remoteIpBlocks", "notRemoteIpBlocks", |texts, _| parsed(texts).map(Test::SourceIp)),
];

const OPERATION: [Field; 4] = [
    ("hosts", "notHosts", http),
    ("ports", "notPorts", ports),
    ("methods", "notMethods", http),
    ("paths", "notPaths", http),
];

pub(super) fn authorization_policy(
    origin: &Origin,
    metadata: Metadata,
    document: &[Pair],
    report: &mut Report,
) -> Option<AuthorizationPolicy> {
    let before = report.errors.len();
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata", "status"]);
    let created = policies::made(&top, &metadata, report);
    let dry_run = dry_run(&top, &metadata, report);
    let (mut selector, mut action, mut rules) = (Default::default(), Action::Allow, Vec::new());
    if let Some(mut spec) = top.fields(report, "spec") {
        selector = policies::read_selector(&mut spec, report, "selector");
        for key in ["targetRef", "targetRefs"] {
            if spec.take(key).is_some() {
                let message = "attaches the policy to a gateway or a waypoint, and Marline has none";
                spec.error(report, key, message, "say in spec.selector which workloads are meant");
            }
        }
        action = read_action(&mut spec, report).unwrap_or(action);
        match spec.items(report, "rules") {
            None => {}
            Some(items) => rules = items.into_iter().map(|rule| read_rule(rule, action, &metadata, report)).collect(),
        }
        if rules.is_empty() && action == Action::Deny {
            let hint = "write rules; one rule {} denies everything";
            spec.error(report, "rules", "a DENY policy without rules denies nothing", hint);
        }
        spec.finish(report, Unknown::Error);
    }
    top.finish(report, Unknown::Error);
    let sound = metadata.sound && report.errors.len() == before;
    let header = policies::header("AuthorizationPolicy", metadata, created, selector);
    sound.then_some(AuthorizationPolicy { header, action, dry_run, rules })
}

/// Go's `strconv.ParseBool` reads it in Istio. What that cannot read Istio enforces; here it is an error, as an ALLOW policy
/// that is enforced against its author's wish may let more in.
fn dry_run(top: &Fields<'_>, metadata: &Metadata, report: &mut Report) -> bool {
    match metadata.annotations.get(DRY_RUN).map(String::as_str) {
        None | Some("0" | "f" | "F" | "false" | "FALSE" | "False") => false,
        Some("1" | "t" | "T" | "true" | "TRUE" | "True") => true,
        Some(other) => {
            let message = format!("{DRY_RUN}: {other:?} is neither true nor false");
            top.error(report, "metadata.annotations", message, "write \"true\" or \"false\"");
            false
        }
    }
}

fn read_action(spec: &mut Fields<'_>, report: &mut Report) -> Option<Action> {
    let actions = [
        ("ALLOW", Some(Action::Allow)),
        ("DENY", Some(Action::Deny)),
        ("AUDIT", Some(Action::Audit)),
        ("CUSTOM", None),
    ];
    let action = spec.choice(report, "action", &actions);
    if action == Some(None) {
        let message = "CUSTOM asks an external authorizer, which Marline does not do yet; nothing would be checked";
        spec.error(report, "action", message, "move it out of the directory, or write ALLOW or DENY rules");
        spec.skip(&["provider"]);
    } else if spec.take("provider").is_some() {
        spec.error(report, "provider", "belongs to the action CUSTOM alone", "remove it");
    }
    action.flatten()
}

fn read_rule(mut rule: Fields<'_>, action: Action, metadata: &Metadata, report: &mut Report) -> Rule {
    let mut needs_http = Vec::new();
    let from = read_groups(&mut rule, report, ("from", "source"), &SOURCE, &metadata.namespace, &mut needs_http);
    let to = read_groups(&mut rule, report, ("to", "operation"), &OPERATION, &metadata.namespace, &mut needs_http);
    let mut when = Vec::new();
    for mut condition in rule.items(report, "when").unwrap_or_default() {
        when.extend(read_condition(&mut condition, report, &metadata.namespace, &mut needs_http));
        condition.finish(report, Unknown::Error);
    }
    let rule_read = Rule { from, to, when };
    warn_of_http(&rule, report, action, &rule_read, &needs_http);
    rule.finish(report, Unknown::Error);
    rule_read
}

/// Why a field only HTTP has is there in vain.
fn warn_of_http(rule: &Fields<'_>, report: &mut Report, action: Action, read: &Rule, fields: &[String]) {
    if fields.is_empty() {
        return;
    }
    let fields = fields.join(", ");
    if action == Action::Allow {
        let hint = "write a rule of source, ports and conditions of the connection, which Marline can tell";
        rule.warning_here(report, format!("never matches, and so allows nothing: {fields} needs HTTP"), hint);
        return;
    }
    let does = if action == Action::Deny { "denies" } else { "audits" };
    let on_tcp = |condition: &Condition| condition.test != Test::Http;
    let all = [&read.from, &read.to].into_iter().flatten().chain([&read.when]).flatten().any(on_tcp);
    let (message, hint) = match all {
        true => (format!("{does} more than it says: {fields} needs HTTP, and is as if it were not there"), "remove it"),
        // Istio warns of this, too.
        false => (format!("{does} every connection: {fields} needs HTTP, and there is nothing else"), "name the ports"),
    };
    rule.warning_here(report, message, hint);
}

/// The items of `from` or `to`, each a mapping of one mapping.
fn read_groups(
    rule: &mut Fields<'_>,
    report: &mut Report,
    (outer, inner): (&'static str, &'static str),
    known: &[Field],
    namespace: &str,
    needs_http: &mut Vec<String>,
) -> Vec<Vec<Condition>> {
    let Some(items) = rule.items(report, outer) else { return Vec::new() };
    if items.is_empty() {
        rule.error(report, outer, "is an empty list", "remove it if anything may match, or write an item");
    }
    let mut groups = Vec::new();
    for mut item in items {
        match item.fields(report, inner) {
            Some(mut fields) => {
                groups.push(read_group(&mut fields, report, known, namespace, needs_http));
                fields.finish(report, Unknown::Error);
            }
            None if !item.has(inner) => {
                item.error_here(report, format!("has no {inner}"), "write it, or remove the item")
            }
            None => {}
        }
        item.finish(report, Unknown::Error);
    }
    groups
}

fn read_group(
    fields: &mut Fields<'_>,
    report: &mut Report,
    known: &[Field],
    namespace: &str,
    needs_http: &mut Vec<String>,
) -> Vec<Condition> {
    let before = report.errors.len();
    let mut conditions = Vec::new();
    for (positive, negative, make) in known {
        for (key, negated) in [(*positive, false), (*negative, true)] {
            let (texts, faults) = (fields.strings(report, key), report.errors.len());
            if texts.is_empty() {
                // As in Istio. A template that was filled with nothing shall not go unnoticed, though.
                if fields.has(key) && faults == before {
                    fields.warning(report, key, "is an empty list, and so no condition at all", "remove it");
                }
                continue;
            }
            match make(&texts, namespace) {
                Ok(test) => {
                    if test == Test::Http {
                        needs_http.push(key.to_owned());
                    }
                    conditions.push(Condition { test, negated });
                }
                Err(message) => fields.error(report, key, message, "correct it"),
            }
        }
    }
    if conditions.is_empty() && report.errors.len() == before {
        fields.error_here(report, "holds no condition", "remove it if anything may match, or write one");
    }
    let accounts = ["serviceAccounts", "notServiceAccounts"].into_iter().find(|key| fields.has(key));
    let others = ["principals", "notPrincipals", "namespaces", "notNamespaces"];
    if let Some(key) = accounts
        && let Some(other) = others.into_iter().find(|key| fields.has(key))
    {
        let hint = "a service account names its namespace: keep one of the two";
        fields.error(report, key, format!("cannot stand beside {other}"), hint);
    }
    conditions
}

fn read_condition(
    condition: &mut Fields<'_>,
    report: &mut Report,
    namespace: &str,
    needs_http: &mut Vec<String>,
) -> Vec<Condition> {
    let key = condition.required(report, "key", "write the attribute to be compared").unwrap_or_default();
    let values = [("values", false), ("notValues", true)].map(|(name, negated)| {
        let texts = condition.strings(report, name);
        (name, texts, negated)
    });
    if values.iter().all(|(_, texts, _)| texts.is_empty()) {
        condition.error_here(report, "has neither values nor notValues", "write at least one of them");
    }
    let make = match attribute(key) {
        Ok(make) => make,
        Err(_) if key.is_empty() => return Vec::new(),
        Err((message, hint)) => {
            condition.error(report, "key", message, hint);
            return Vec::new();
        }
    };
    let mut conditions = Vec::new();
    for (name, texts, negated) in values.into_iter().filter(|(_, texts, _)| !texts.is_empty()) {
        match make(&texts, namespace) {
            Ok(test) => {
                if test == Test::Http {
                    needs_http.push(key.to_owned());
                }
                conditions.push(Condition { test, negated });
            }
            Err(message) => condition.error(report, name, message, "correct it"),
        }
    }
    conditions
}

/// What the key of a condition is about: https://istio.io/latest/docs/reference/config/security/conditions/
fn attribute(key: &str) -> Result<Make, (String, &'static str)> {
    const KNOWN: &str = "known of a connection are source.ip, remote.ip, source.namespace, source.principal, \
        source.serviceAccount, source.trustDomain, destination.ip, destination.port and connection.sni";
    let bracketed = |prefix: &str| {
        let rest = key.strip_prefix(prefix).unwrap_or_default();
        rest.len() > 2 && rest.starts_with('[') && rest.ends_with(']')
    };
    Ok(match key {
        "source.ip" | "remote.ip" => |texts, _| parsed(texts).map(Test::SourceIp),
        "source.namespace" => |texts, _| parsed(texts).map(Test::Namespace),
        "source.principal" => principals,
        "source.serviceAccount" => service_accounts,
        "source.trustDomain" => trust_domains,
        "destination.ip" => |texts, _| parsed(texts).map(Test::DestinationIp),
        "destination.port" => ports,
        "connection.sni" => |texts, _| parsed(texts).map(Test::Sni),
        "request.auth.principal" | "request.auth.audiences" | "request.auth.presenter" => http,
        _ if bracketed("request.headers") || bracketed("request.auth.claims") => http,
        _ if key.starts_with("experimental.") => {
            return Err((format!("{key:?} is about Envoy's filters, which are not here"), KNOWN));
        }
        "destination.namespace" => {
            return Err(("is replaced by metadata.namespace".to_owned(), "write the policy into that namespace"));
        }
        _ if key.starts_with("destination.labels") => {
            return Err(("is replaced by the selector".to_owned(), "write spec.selector.matchLabels"));
        }
        _ => return Err((format!("{key:?} is not known"), KNOWN)),
    })
}

fn parsed<T: FromStr<Err = MatchError>>(texts: &[&str]) -> Result<Vec<T>, String> {
    texts.iter().map(|text| text.parse().map_err(|error: MatchError| error.to_string())).collect()
}

fn http(_: &[&str], _: &str) -> Result<Test, String> {
    Ok(Test::Http)
}

fn principals(texts: &[&str], _: &str) -> Result<Test, String> {
    match texts.iter().find(|text| text.starts_with("spiffe://")) {
        Some(text) => Err(format!("{text:?} matches nobody: principals are written without spiffe://")),
        None => parsed(texts).map(Test::Principal),
    }
}

fn trust_domains(texts: &[&str], _: &str) -> Result<Test, String> {
    match texts.iter().find(|text| text.contains('/')) {
        Some(text) => Err(format!("{text:?} is not a trust domain: it holds a /")),
        None => parsed(texts).map(Test::TrustDomain),
    }
}

/// `NAMESPACE/NAME`, or `NAME` in the policy's own namespace; no wildcards.
fn service_accounts(texts: &[&str], namespace: &str) -> Result<Test, String> {
    let account = |text: &&str| match text.split_once('/').unwrap_or((namespace, text)) {
        _ if text.contains('*') => Err(format!("{text:?} holds a wildcard, which service accounts do not know")),
        (namespace, name) if namespace.is_empty() || name.is_empty() || name.contains('/') => {
            Err(format!("{text:?} is neither NAME nor NAMESPACE/NAME"))
        }
        (namespace, name) => Ok((namespace.to_owned(), name.to_owned())),
    };
    texts.iter().map(account).collect::<Result<_, _>>().map(Test::ServiceAccount)
}

fn ports(texts: &[&str], _: &str) -> Result<Test, String> {
    let port = |text: &&str| match text.parse() {
        Ok(port) if !text.starts_with('+') => Ok(port),
        _ => Err(format!("{text:?} is not a port")),
    };
    texts.iter().map(port).collect::<Result<_, _>>().map(Test::DestinationPort)
}
