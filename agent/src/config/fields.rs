//! Reading the fields of one mapping: each is asked for by name, a value of another kind is reported where it stands,
//! and what nobody asked for is reported at the end.

use std::{collections::BTreeMap, net::SocketAddr, time::Duration};

use super::{
    document::{Node, Pair, Value},
    finding::{Origin, Report},
};

/// A mapping that is being read.
pub(super) struct Fields<'a> {
    origin: &'a Origin,
    /// `spec.`, or nothing at the top.
    prefix: String,
    pairs: &'a [Pair],
    line: u64,
    known: Vec<&'static str>,
}

/// What to make of fields that nobody asked for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Unknown {
    /// Ignoring them could weaken what the user wanted.
    Error,
    Warning,
}

impl<'a> Fields<'a> {
    pub(super) fn top(origin: &'a Origin, pairs: &'a [Pair]) -> Self {
        Self { origin, prefix: String::new(), pairs, line: origin.line, known: Vec::new() }
    }

    /// The line of a field, or that of the mapping if it is not there. `a.b` is a field of the mapping `a`.
    pub(super) fn line_of(&self, key: &str) -> u64 {
        if let Some(pair) = find(self.pairs, key) {
            return pair.line;
        }
        let inside = key.split_once('.').and_then(|(outer, inner)| Some((find(self.pairs, outer)?, inner)));
        match inside {
            Some((Pair { value: Node { value: Value::Map(pairs), .. }, line, .. }, inner)) => {
                find(pairs, inner).map_or(*line, |pair| pair.line)
            }
            Some((outer, _)) => outer.line,
            None => self.line,
        }
    }

    pub(super) fn path(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    pub(super) fn error(&self, report: &mut Report, key: &str, message: impl Into<String>, hint: impl Into<String>) {
        report.errors.push(self.origin.finding(&self.path(key), self.line_of(key), message.into(), hint.into()));
    }

    pub(super) fn warning(&self, report: &mut Report, key: &str, message: impl Into<String>, hint: impl Into<String>) {
        report.warnings.push(self.origin.finding(&self.path(key), self.line_of(key), message.into(), hint.into()));
    }

    /// Whether a field is there and holds something, be it wrong.
    pub(super) fn has(&self, key: &str) -> bool {
        find(self.pairs, key).is_some_and(|pair| pair.value.value != Value::Null)
    }

    /// A text that must be there.
    pub(super) fn required(&mut self, report: &mut Report, key: &'static str, hint: &str) -> Option<&'a str> {
        let text = self.text(report, key).filter(|text| !text.is_empty());
        let absent = |node: &Node| matches!(&node.value, Value::Null) || node.value == Value::Text(String::new());
        // A value of another kind has been reported already.
        if find(self.pairs, key).is_none_or(|pair| absent(&pair.value)) {
            self.error(report, key, "is missing or empty", hint);
        }
        text
    }

    /// The value of a field; a null is no value.
    pub(super) fn take(&mut self, key: &'static str) -> Option<&'a Node> {
        self.known.push(key);
        let pairs: &'a [Pair] = self.pairs;
        find(pairs, key).map(|pair| &pair.value).filter(|node| node.value != Value::Null)
    }

    /// Takes fields whose content is of no concern.
    pub(super) fn skip(&mut self, keys: &[&'static str]) {
        self.known.extend(keys);
    }

    pub(super) fn text(&mut self, report: &mut Report, key: &'static str) -> Option<&'a str> {
        let node = self.take(key)?;
        match &node.value {
            Value::Text(text) => Some(text),
            other => {
                let hint = match other {
                    Value::Bool(_) | Value::Integer(_) | Value::Float(_) => "put it in quotes",
                    _ => "write one value",
                };
                self.error(report, key, format!("must be a text, but is {}", other.kind()), hint);
                None
            }
        }
    }

    pub(super) fn boolean(&mut self, report: &mut Report, key: &'static str) -> Option<bool> {
        let node = self.take(key)?;
        match node.value {
            Value::Bool(value) => Some(value),
            ref other => {
                self.error(
                    report,
                    key,
                    format!("must be true or false, but is {}", other.kind()),
                    "write true or false",
                );
                None
            }
        }
    }

    /// One of a few words.
    pub(super) fn choice<T: Copy>(
        &mut self,
        report: &mut Report,
        key: &'static str,
        choices: &[(&str, T)],
    ) -> Option<T> {
        let text = self.text(report, key)?;
        let chosen = choices.iter().find(|(name, _)| *name == text).map(|(_, value)| *value);
        if chosen.is_none() {
            let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
            self.error(
                report,
                key,
                format!("{text:?} is not known here"),
                format!("write one of {}", names.join(", ")),
            );
        }
        chosen
    }

    pub(super) fn duration(&mut self, report: &mut Report, key: &'static str, least: Duration) -> Option<Duration> {
        let text = self.text(report, key)?;
        let hint = "write a number and a unit, as in 500ms, 10s, 5m or 24h";
        match parse_duration(text) {
            None => self.error(report, key, format!("{text:?} is not a duration"), hint),
            Some(duration) if duration < least => {
                self.error(report, key, format!("{text} is too short"), format!("write at least {least:?}"));
            }
            Some(duration) => return Some(duration),
        }
        None
    }

    /// A number of things, at least one.
    pub(super) fn count(&mut self, report: &mut Report, key: &'static str) -> Option<u32> {
        let count = match &self.take(key)?.value {
            Value::Integer(count) => u32::try_from(*count).ok().filter(|count| *count != 0),
            _ => None,
        };
        if count.is_none() {
            self.error(report, key, "is not a number of at least 1", "write one, or remove it");
        }
        count
    }

    /// Bytes, as Kubernetes writes quantities: `4096`, `64Ki`, `1Mi`, `100Gi`.
    pub(super) fn quantity(&mut self, report: &mut Report, key: &'static str) -> Option<u64> {
        let node = self.take(key)?;
        let quantity = match &node.value {
            Value::Text(text) => parse_quantity(text),
            Value::Integer(bytes) => u64::try_from(*bytes).ok(),
            _ => None,
        };
        if quantity.is_none_or(|bytes| bytes == 0) {
            self.error(report, key, "is not a number of bytes", "write it like `4096`, `64Ki` or `100Gi`");
        }
        quantity
    }

    pub(super) fn socket(&mut self, report: &mut Report, key: &'static str) -> Option<SocketAddr> {
        let text = self.text(report, key)?;
        let parsed = text.parse().ok();
        if parsed.is_none() {
            let hint = "write ADDRESS:PORT with an IP address, as in 127.0.0.1:15000 or [::]:15020";
            self.error(report, key, format!("{text:?} is not an address with a port"), hint);
        }
        parsed
    }

    /// A mapping inside this one.
    pub(super) fn fields(&mut self, report: &mut Report, key: &'static str) -> Option<Fields<'a>> {
        let node = self.take(key)?;
        match &node.value {
            Value::Map(pairs) => Some(Fields {
                origin: self.origin,
                prefix: format!("{}.", self.path(key)),
                pairs,
                line: self.line_of(key),
                known: Vec::new(),
            }),
            other => {
                let message = format!("must be a mapping, but is {}", other.kind());
                self.error(report, key, message, "write its fields below it, indented");
                None
            }
        }
    }

    /// The mappings of a list, in order; each knows its path, such as `spec.rules[0]`. None if there is no list.
    pub(super) fn items(&mut self, report: &mut Report, key: &'static str) -> Option<Vec<Fields<'a>>> {
        let node = self.take(key)?;
        let Value::List(nodes) = &node.value else {
            let message = format!("must be a list, but is {}", node.value.kind());
            self.error(report, key, message, "write its items below it, each behind a dash");
            return None;
        };
        let mut items = Vec::new();
        for (n, node) in nodes.iter().enumerate() {
            let path = format!("{}[{n}]", self.path(key));
            match &node.value {
                Value::Map(pairs) => {
                    let prefix = format!("{path}.");
                    items.push(Fields { origin: self.origin, prefix, pairs, line: node.line, known: Vec::new() });
                }
                other => {
                    let message = format!("must be a mapping, but is {}", other.kind());
                    let hint = "write its fields behind the dash; {} is one without fields".to_owned();
                    report.errors.push(self.origin.finding(&path, node.line, message, hint));
                }
            }
        }
        Some(items)
    }

    /// The texts of a list; empty if there is none. None of them may be empty.
    pub(super) fn strings(&mut self, report: &mut Report, key: &'static str) -> Vec<&'a str> {
        let Some(node) = self.take(key) else { return Vec::new() };
        let Value::List(nodes) = &node.value else {
            let message = format!("must be a list, but is {}", node.value.kind());
            self.error(report, key, message, "write it as a list, as in [\"a\", \"b\"]");
            return Vec::new();
        };
        let mut texts = Vec::new();
        for (n, node) in nodes.iter().enumerate() {
            match &node.value {
                Value::Text(text) if !text.is_empty() => texts.push(text.as_str()),
                other => {
                    let (message, hint) = match other {
                        Value::Text(_) => ("is empty".to_owned(), "write a value, or remove it"),
                        other => (format!("must be a text, but is {}", other.kind()), "put it in quotes"),
                    };
                    let path = format!("{}[{n}]", self.path(key));
                    report.errors.push(self.origin.finding(&path, node.line, message, hint.to_owned()));
                }
            }
        }
        texts
    }

    /// An error about the mapping itself.
    pub(super) fn error_here(&self, report: &mut Report, message: impl Into<String>, hint: impl Into<String>) {
        let path = self.prefix.trim_end_matches('.');
        report.errors.push(self.origin.finding(path, self.line, message.into(), hint.into()));
    }

    pub(super) fn warning_here(&self, report: &mut Report, message: impl Into<String>, hint: impl Into<String>) {
        let path = self.prefix.trim_end_matches('.');
        report.warnings.push(self.origin.finding(path, self.line, message.into(), hint.into()));
    }

    /// The mappings of a mapping, by their keys.
    pub(super) fn mappings(&mut self, report: &mut Report, key: &'static str) -> Vec<(&'a str, Fields<'a>)> {
        let Some(outer) = self.fields(report, key) else { return Vec::new() };
        let mut mappings = Vec::new();
        for pair in outer.pairs {
            let inner = match &pair.value.value {
                Value::Map(inner) => inner.as_slice(),
                Value::Null => &[],
                other => {
                    let message = format!("must be a mapping, but is {}", other.kind());
                    outer.error(report, &pair.key, message, "write its fields below it, indented");
                    continue;
                }
            };
            let prefix = format!("{}.", outer.path(&pair.key));
            let fields = Fields { origin: self.origin, prefix, pairs: inner, line: pair.line, known: Vec::new() };
            mappings.push((pair.key.as_str(), fields));
        }
        mappings
    }

    /// Everything in the mapping, as it is.
    pub(super) fn values(&self) -> impl Iterator<Item = (&'a str, &'a Value)> {
        self.pairs.iter().map(|pair| (pair.key.as_str(), &pair.value.value))
    }

    /// A mapping of texts to texts, such as labels.
    pub(super) fn texts(&mut self, report: &mut Report, key: &'static str) -> BTreeMap<String, String> {
        let Some(fields) = self.fields(report, key) else { return BTreeMap::new() };
        let mut texts = BTreeMap::new();
        for pair in fields.pairs {
            match &pair.value.value {
                Value::Text(text) => {
                    texts.insert(pair.key.clone(), text.clone());
                }
                Value::Null => {
                    texts.insert(pair.key.clone(), String::new());
                }
                other => {
                    fields.error(
                        report,
                        &pair.key,
                        format!("must be a text, but is {}", other.kind()),
                        "put it in quotes",
                    );
                }
            }
        }
        texts
    }

    /// Reports the fields that nobody asked for.
    pub(super) fn finish(self, report: &mut Report, unknown: Unknown) {
        for pair in self.pairs.iter().filter(|pair| !self.known.contains(&pair.key.as_str())) {
            let hint = match self.resembling(&pair.key) {
                Some(meant) => format!("did you mean {meant}?"),
                None => format!("remove it; known here: {}", self.known.join(", ")),
            };
            match unknown {
                Unknown::Error => self.error(report, &pair.key, "this field is not known", hint),
                Unknown::Warning => self.warning(report, &pair.key, "this field is not known and has no effect", hint),
            }
        }
    }

    fn resembling(&self, key: &str) -> Option<&'static str> {
        let close = |known: &&&'static str| edit_distance(key, known) <= 2 && known.len() > 3;
        self.known.iter().filter(close).min_by_key(|known| edit_distance(key, known)).copied()
    }
}

/// Durations as Go and Istio write them: `1h30m`, `10s`, `250ms`, `1.5h`.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    const UNITS: [(&str, f64); 6] = [("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9), ("h", 3_600.0), ("m", 60.0), ("s", 1.0)];
    if text == "0" {
        return Some(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = Duration::ZERO;
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(rest.len());
        let number: f64 = rest.get(..digits)?.parse().ok()?;
        rest = rest.get(digits..)?;
        let (unit, seconds) = UNITS.iter().find(|(unit, _)| rest.starts_with(unit))?;
        rest = rest.get(unit.len()..)?;
        total = total.checked_add(Duration::try_from_secs_f64(number * seconds).ok()?)?;
    }
    (!text.is_empty()).then_some(total)
}

fn parse_quantity(text: &str) -> Option<u64> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match &text[digits.len()..] {
        "" => 1,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    // `parse` would take a sign.
    digits.bytes().all(|byte| byte.is_ascii_digit()).then(|| digits.parse::<u64>().ok()?.checked_mul(unit))?
}

fn find<'a>(pairs: &'a [Pair], key: &str) -> Option<&'a Pair> {
    pairs.iter().find(|pair| pair.key == key)
}

/// How many letters must be put in, taken out or changed to make one word of the other.
fn edit_distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        row.first_mut().into_iter().for_each(|first| *first = left);
        for (cell, y) in row.iter_mut().skip(1).zip(&b) {
            let best = (diagonal + usize::from(x.to_lowercase().ne(y.to_lowercase()))).min(left + 1).min(*cell + 1);
            diagonal = *cell;
            *cell = best;
            left = best;
        }
    }
    row.last().copied().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_are_read_as_go_writes_them() {
        let cases = [
            ("10s", Some(10_000)),
            ("24h", Some(86_400_000)),
            ("1h30m", Some(5_400_000)),
            ("250ms", Some(250)),
            ("1.5s", Some(1_500)),
            ("0", Some(0)),
            ("0s", Some(0)),
            ("", None),
            ("10", None),
            ("s", None),
            ("10 s", None),
            ("-1s", None),
            ("1d", None),
            ("1.2.3s", None),
            ("99999999999999999999999h", None),
            ("5µs", None),
        ];
        for (text, milliseconds) in cases {
            assert_eq!(parse_duration(text), milliseconds.map(Duration::from_millis), "{text:?}");
        }
    }

    #[test]
    fn a_slip_of_the_finger_is_recognised() {
        assert_eq!(edit_distance("serviceAcount", "serviceAccount"), 1);
        assert_eq!(edit_distance("trustdomain", "trustDomain"), 0);
        assert_eq!(edit_distance("", "abc"), 3);
        assert_eq!(edit_distance("abc", ""), 3);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }

    proptest! {
        #[test]
        fn no_text_makes_a_duration_panic(text in "\\PC*|[0-9.]{0,400}[hmsnu]{1,2}") {
            parse_duration(&text);
        }
    }
}
