//! Takes secrets out of text: what looks like one is taken for one. Rather too much than too little; who needs a value can ask for it.
//!
//! Pure. Knows YAML and JSON by their lines and keys only, because what is to be helped with may be broken.

use std::collections::HashSet;

use serde_json::Value;

const GONE: &str = "REDACTED";
/// A field whose name has one of these (without `-` and `_`, in small letters) has a secret for a value.
const NAMES: [&str; 13] = [
    "password",
    "passwd",
    "passphrase",
    "secret",
    "token",
    "apikey",
    "privatekey",
    "keypem",
    "credential",
    "authorization",
    "cookie",
    "bearer",
    "jwt",
];

/// The text without secrets, and how many places were taken out.
pub(super) fn redact(text: &str) -> (String, usize) {
    if let Ok(mut value) = serde_json::from_str::<Value>(text)
        && (value.is_object() || value.is_array())
    {
        let mut count = 0;
        in_json(&mut value, &mut count);
        return (value.to_string(), count);
    }
    let (text, keys) = keys(text);
    let (text, secrets) = documents(&text);
    let (text, words) = lines(&text);
    (text, secrets + keys + words)
}

fn in_json(value: &mut Value, count: &mut usize) {
    match value {
        Value::String(text) => {
            let (clean, found) = keys(text);
            let (clean, more) = lines(&clean);
            if found + more > 0 {
                *text = clean;
                *count += found + more;
            }
        }
        Value::Array(all) => all.iter_mut().for_each(|one| in_json(one, count)),
        Value::Object(all) => {
            let secret = all.get("kind").and_then(Value::as_str) == Some("Secret");
            let named = ["name", "key"].iter().any(|key| all.get(*key).and_then(Value::as_str).is_some_and(is_secret));
            for (name, value) in all.iter_mut() {
                let hidden = is_secret(name)
                    || (secret && matches!(name.as_str(), "data" | "stringData"))
                    || (named && name == "value");
                if hidden && !matches!(value, Value::Null | Value::Bool(_) | Value::Number(_)) {
                    *value = GONE.into();
                    *count += 1;
                } else {
                    in_json(value, count);
                }
            }
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => {}
    }
}

/// Of a YAML document that is a Secret nothing is left.
fn documents(text: &str) -> (String, usize) {
    let mut all = vec![String::new()];
    for line in text.split_inclusive('\n') {
        if line.strip_prefix("---").is_some_and(|rest| rest.is_empty() || rest.starts_with(char::is_whitespace)) {
            all.push(String::new());
        }
        if let Some(document) = all.last_mut() {
            document.push_str(line);
        }
    }
    let mut count = 0;
    for document in all.iter_mut().filter(|document| document.lines().any(names_a_secret)) {
        count += 1;
        let separator = if document.starts_with("---") { "---\n" } else { "" };
        *document = format!("{separator}# a Secret: {GONE}\n");
    }
    (all.concat(), count)
}

/// Whether `kind: Secret` is in the line, however it is quoted and in whatever braces.
fn names_a_secret(line: &str) -> bool {
    let bare: String = line.chars().filter(|c| !c.is_whitespace() && !"\"'".contains(*c)).collect();
    bare.split(['{', '}', ',', '#']).any(|part| part.trim_start_matches('-').starts_with("kind:Secret"))
}

/// Private keys in PEM, also with their line breaks escaped or behind comment signs; and what is PEM in base64.
fn keys(text: &str) -> (String, usize) {
    const BEGIN: &str = "-----BEGIN ";
    let (mut out, mut rest, mut count) = (String::new(), text, 0);
    while let Some(at) = rest.find(BEGIN) {
        let (before, block) = rest.split_at(at);
        out.push_str(before);
        let label = block.get(BEGIN.len()..).and_then(|block| block.split("-----").next()).unwrap_or_default();
        if !label.contains("PRIVATE") && !label.contains("SECRET") {
            out.push_str(BEGIN);
            rest = block.get(BEGIN.len()..).unwrap_or_default();
            continue;
        }
        count += 1;
        out.push_str(GONE);
        // Without an end all that follows may be of the key.
        let end = block.find("-----END ").and_then(|end| {
            let after = end + "-----END ".len();
            block.get(after..)?.find("-----").map(|dashes| after + dashes + "-----".len())
        });
        rest = end.and_then(|end| block.get(end..)).unwrap_or_default();
    }
    out.push_str(rest);
    (out, count)
}

/// What is left out of the lines to come.
enum Hidden {
    /// What is further in than this: it belongs to a field that is gone, as a block, a list or the rest of a plain value.
    Further(usize),
    /// All up to the end of a quoted value, and what is further in than its field.
    Quoted(char, usize),
}

fn lines(text: &str) -> (String, usize) {
    let all: Vec<&str> = text.split_inclusive('\n').collect();
    let values = values_of_named(&all);
    let (mut out, mut count) = (String::new(), 0);
    let mut hidden: Option<Hidden> = None;
    for (number, line) in all.iter().enumerate() {
        match hidden {
            Some(Hidden::Quoted(quote, field)) => {
                if ends_quoted(line, quote) {
                    hidden = Some(Hidden::Further(field));
                }
                continue;
            }
            Some(Hidden::Further(field)) if line.trim().is_empty() || indent(line) > field => continue,
            _ => {}
        }
        let (clean, found, value) = in_line(line, values.contains(&number));
        hidden = value.map(|value| match value.chars().next() {
            Some(quote @ ('"' | '\'')) if !ends_quoted(value.get(1..).unwrap_or_default(), quote) => {
                Hidden::Quoted(quote, indent(line))
            }
            _ => Hidden::Further(indent(line)),
        });
        count += found;
        out.push_str(&clean);
    }
    (out, count)
}

/// How far in a line is: the dash of a list and the sign of a comment are no content.
fn indent(line: &str) -> usize {
    line.len() - line.trim_start_matches([' ', '-', '#', '\t']).len()
}

fn ends_quoted(rest: &str, quote: char) -> bool {
    let mut escaped = false;
    rest.chars().any(|c| {
        let ends = c == quote && !escaped;
        escaped = quote == '"' && c == '\\' && !escaped;
        ends
    })
}

/// The lines whose field `value` is a secret because the field `name` beside it says so, as in a container's environment.
fn values_of_named(lines: &[&str]) -> HashSet<usize> {
    let mut found = HashSet::new();
    for (number, line) in lines.iter().enumerate().filter(|(_, line)| names_a_value(line)) {
        found.insert(number);
        let field = indent(line);
        let begins = |line: &str| indent(line) == field && line.trim_start().starts_with('-');
        let beside = |line: &str| line.trim().is_empty() || indent(line) >= field;
        let after = lines.iter().enumerate().skip(number + 1);
        found.extend(after.take_while(|(_, line)| beside(line) && !begins(line)).map(|(at, _)| at));
        if begins(line) {
            continue;
        }
        for (at, line) in lines.iter().enumerate().take(number).rev() {
            if !beside(line) {
                break;
            }
            found.insert(at);
            if begins(line) {
                break;
            }
        }
    }
    found
}

/// Whether the line has a field `name` or `key` that names a secret.
fn names_a_value(line: &str) -> bool {
    let bare: String = line.chars().filter(|c| !"\"'\\".contains(*c)).collect();
    bare.split(['{', '}', '[', ']', ',']).any(|part| {
        let field = part.trim_start_matches([' ', '-', '#', '\t']).split_once(':');
        field.is_some_and(|(name, value)| matches!(name.trim(), "name" | "key") && is_secret(value))
    })
}

/// The line, how many places were taken out, and of a field that is gone what its line had of its value: the next ones may have more.
/// With `named` the field `value` is one of those.
fn in_line(line: &str, named: bool) -> (String, usize, Option<&str>) {
    let (body, end) = match line.strip_suffix('\n') {
        Some(body) => (body, "\n"),
        None => (line, ""),
    };
    let (mut out, mut count, mut rest) = (String::new(), 0, body);
    // Names that are followed by a sign of assignment.
    while let Some(at) = rest.find([':', '=']) {
        let (name, value) = (rest.get(..at).unwrap_or_default(), rest.get(at + 1..).unwrap_or_default());
        let sign = rest.get(at..=at).unwrap_or_default();
        let word = name.trim_end_matches(['"', '\'', '\\', ' ']);
        let word = word.rsplit(|c: char| !(c.is_alphanumeric() || "-_.".contains(c))).next().unwrap_or_default();
        out.push_str(name);
        out.push_str(sign);
        let secret = is_secret(word) || (named && word == "value");
        if !secret {
            rest = value;
            continue;
        }
        count += 1;
        if sign == "=" {
            // A log's NAME=VALUE: the value ends where the word or its quotes end.
            let value = value.trim_start();
            let taken = match value.starts_with(['"', '\'']) {
                true => quoted(value).unwrap_or(value.len()),
                false => value.find(char::is_whitespace).unwrap_or(value.len()),
            };
            out.push_str(GONE);
            rest = value.get(taken..).unwrap_or_default();
            continue;
        }
        // A field's value goes to the end of the line, and is continued by what is further in.
        out.push(' ');
        out.push_str(GONE);
        out.push_str(end);
        return (out, count, Some(value.trim()));
    }
    out.push_str(rest);
    let (out, words) = in_words(&out);
    (out + end, count + words, None)
}

/// How long a quoted value is, if it is one.
fn quoted(value: &str) -> Option<usize> {
    let quote = value.chars().next().filter(|first| matches!(first, '"' | '\''))?;
    value.get(1..)?.find(quote).map(|end| end + 2)
}

/// What is a secret by its own looks: tokens after their scheme, JWTs, passwords in URLs, PEM in base64.
fn in_words(line: &str) -> (String, usize) {
    let (mut out, mut count, mut after_scheme) = (String::new(), 0, false);
    for word in line.split_inclusive(' ') {
        let bare = word.trim_end();
        let tail = word.get(bare.len()..).unwrap_or_default();
        let core = bare.trim_matches(['"', '\'', ',', ';']);
        let looks = core.contains("LS0tLS1CRUdJTi") || (core.contains("eyJ") && core.matches('.').count() >= 2);
        if (after_scheme && !core.is_empty()) || looks {
            count += 1;
            out.push_str(GONE);
            out.push_str(tail);
            after_scheme = false;
            continue;
        }
        if let Some((scheme, rest)) = bare.split_once("://")
            && let Some((user, host)) = rest.split('/').next().and_then(|authority| authority.rsplit_once('@'))
            && user.contains(':')
        {
            count += 1;
            let path = rest.get(user.len() + 1 + host.len()..).unwrap_or_default();
            out.push_str(&format!("{scheme}://{GONE}@{host}{path}{tail}"));
            continue;
        }
        after_scheme = matches!(
            core.to_ascii_lowercase().trim_start_matches(|c: char| !c.is_ascii_alphabetic()),
            "bearer" | "basic"
        );
        out.push_str(word);
    }
    (out, count)
}

fn is_secret(name: &str) -> bool {
    let name: String = name.chars().filter(|c| c.is_alphanumeric()).flat_map(char::to_lowercase).collect();
    NAMES.iter().any(|secret| name.contains(secret))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECRET: &str = "s3cr3t-value";

    #[test]
    fn secrets_go_in_whatever_shape_they_come() {
        for text in [
            "-----BEGIN EC PRIVATE KEY-----\ns3cr3t-value\n-----END EC PRIVATE KEY-----\nkept",
            "key: \"-----BEGIN PRIVATE KEY-----\\ns3cr3t-value\\n-----END PRIVATE KEY-----\\n\"\nkept: yes",
            "-----BEGIN PRIVATE KEY-----\ns3cr3t-value without an end",
            "# -----BEGIN PRIVATE KEY-----\n# s3cr3t-value\n# -----END PRIVATE KEY-----\nkept",
            "password: s3cr3t-value\nkept: yes",
            "db_password: 's3cr3t-value with words'\nkept: yes",
            "spec:\n  apiToken: |\n    s3cr3t-value\n    s3cr3t-value\n  kept: yes",
            "clientSecret: \"s3cr3t-value\n  s3cr3t-value\"\nkept: yes",
            "spec: {user: me, password: s3cr3t-value}",
            "a: 1\n---\napiVersion: v1\nkind: Secret\ndata:\n  x: s3cr3t-value\n---\nkept: yes",
            "--- \nkind: \"Secret\"\ndata: {x: s3cr3t-value}\n",
            "{kind: Secret, data: {x: s3cr3t-value}}",
            "GET / Authorization: Bearer s3cr3t-value",
            "sent header Bearer s3cr3t-value to kept",
            "url=https://user:s3cr3t-value@kept/path?x",
            "token=s3cr3t-value kept",
            "password=\"s3cr3t-value s3cr3t-value\" kept",
            "saw eyJhbGciOi.s3cr3t-value.sig kept",
            "tls.key: LS0tLS1CRUdJTis3cr3t-value",
            "{\"a\":{\"api_key\":\"s3cr3t-value\",\"kept\":1}}",
            "{\"kind\":\"Secret\",\"data\":{\"x\":\"s3cr3t-value\"}}",
            "{\"text\":\"-----BEGIN PRIVATE KEY-----\\ns3cr3t-value\\n-----END PRIVATE KEY-----\"}",
            "[{\"password\":[\"s3cr3t-value\"]}]",
            "token: !!binary |\n  s3cr3t-value\n  s3cr3t-value\nkept: yes",
            "a:\n  password: &p |-2\n    s3cr3t-value\n\n    s3cr3t-value\n  kept: yes",
            "password: first\n  s3cr3t-value\n  s3cr3t-value\nkept: yes",
            "a:\n- password: first\n    s3cr3t-value\n  b: kept",
            "password: \"first\ns3cr3t-value \\\" s3cr3t-value\n\"\nkept: yes",
            "password = s3cr3t-value\nkept = 1",
            "password=\"s3cr3t-value s3cr3t-value",
            "env:\n- name: DB_PASSWORD\n  value: s3cr3t-value\n- name: kept\n  value: kept",
            "env:\n  - name: DB_PASSWORD\n    value: |\n      s3cr3t-value\n  - name: kept",
            "env:\n- value: kept\n  name: x\n- value: s3cr3t-value\n  name: \"DB_PASSWORD\"\n- name: kept",
            "env: [{name: kept, value: kept}, {name: DB_PASSWORD, value: s3cr3t-value}]",
            "{\"env\":[{\"name\":\"DB_PASSWORD\",\"value\":\"s3cr3t-value\"},{\"name\":\"a\",\"value\":\"kept\"}]}",
            "{\"env\": [\n  {\n    \"name\": \"DB_PASSWORD\",\n    \"value\": \"s3cr3t-value\"\n  },\n  \"kept\" broken",
            "last-applied: '{\"env\":[{\"name\":\"DB_PASSWORD\",\"value\":\"s3cr3t-value\"}]}'\nkept: yes",
            "{\"authorization\":\"Bearer s3cr3t-value\"}\n{\"authorization\":\"Bearer s3cr3t-value\"}",
        ] {
            let (clean, count) = redact(text);
            assert!(!clean.contains(SECRET), "{text:?} became {clean:?}");
            assert!(count > 0, "{text:?}");
            assert_eq!(clean.contains("kept"), text.contains("kept"), "{text:?} became {clean:?}");
        }
    }

    #[test]
    fn what_is_no_secret_stays_to_the_letter() {
        for text in [
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: web\nspec:\n  address: 10.0.0.1\n",
            "-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n",
            "2026-01-01T00:00:00Z INFO marline: agent is ready generation=3\n",
            "istio_tcp_connections_opened_total{reporter=\"source\"} 5\n",
            "env:\n- name: LEVEL\n  value: debug\n- name: OTHER\n  value: more\n",
            "metadata:\n  name: web\nspec:\n  value: 3\n",
            "see https://example.com/a:b and spiffe://cluster.local/ns/a/sa/b\n",
        ] {
            assert_eq!(redact(text), (text.to_owned(), 0));
        }
    }

    proptest! {
        #[test]
        fn any_text_is_redacted_without_a_panic_and_a_field_never_survives(before in "\\PC{0,80}", indent in 0_usize..6) {
            let before = before.replace("://", " ");
            let text = format!("{before}\n{}password: {SECRET}\n", " ".repeat(indent));
            prop_assert!(!redact(&text).0.contains(SECRET));
        }
    }
}
