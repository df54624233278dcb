//! An agent's metrics as a strict reader of OpenMetrics finds them: whatever the format does not allow is an error, and nothing is
//! passed over. Written from the format's specification.

use std::collections::{BTreeMap, HashSet};

use anyhow::{Context, Result, bail, ensure};

/// One line with a value.
#[derive(Clone, Debug, PartialEq)]
pub struct Sample {
    pub name: String,
    pub labels: BTreeMap<String, String>,
    pub value: f64,
}

/// Everything that was shown at one moment.
#[derive(Clone, Debug, Default)]
pub struct Exposition {
    pub samples: Vec<Sample>,
    /// Types by the names of families.
    pub types: BTreeMap<String, String>,
}

impl Exposition {
    pub fn parse(text: &str) -> Result<Self> {
        let body = text.strip_suffix("# EOF\n").context("it does not end with # EOF")?;
        let (mut all, mut seen, mut described) = (Self::default(), HashSet::new(), HashSet::new());
        let mut family = String::new();
        for line in body.lines() {
            let wrong = || format!("the line {line:?}");
            if let Some(comment) = line.strip_prefix("# ") {
                let mut words = comment.splitn(3, ' ');
                let (kind, name) = (words.next().with_context(wrong)?, words.next().with_context(wrong)?);
                ensure!(is_name(name), "{}: no name", wrong());
                if name != family {
                    ensure!(described.insert(name.to_owned()), "{}: the family comes twice", wrong());
                    name.clone_into(&mut family);
                }
                let rest = words.next().unwrap_or_default();
                match kind {
                    "HELP" => ensure!(!rest.is_empty(), "{}: says nothing", wrong()),
                    "UNIT" => ensure!(name.ends_with(&format!("_{rest}")), "{}: the name lacks its unit", wrong()),
                    "TYPE" => {
                        let known = ["counter", "gauge", "histogram", "info"].contains(&rest);
                        ensure!(known && all.types.insert(name.to_owned(), rest.to_owned()).is_none(), wrong());
                    }
                    _ => bail!(wrong()),
                }
                continue;
            }
            let sample = sample(line).with_context(wrong)?;
            let kind = all.types.get(&family).with_context(|| format!("{}: of no family", wrong()))?;
            let suffix = sample.name.strip_prefix(&family).with_context(|| format!("{}: not of {family}", wrong()))?;
            let suffixes: &[&str] = match kind.as_str() {
                "counter" => &["_total"],
                "histogram" => &["_bucket", "_sum", "_count"],
                "info" => &["_info"],
                _ => &[""],
            };
            ensure!(suffixes.contains(&suffix), "{}: no name for a {kind}", wrong());
            ensure!(kind == "gauge" || sample.value >= 0.0, "{}: a {kind} below nothing", wrong());
            ensure!(seen.insert(format!("{} {:?}", sample.name, sample.labels)), "{}: comes twice", wrong());
            all.samples.push(sample);
        }
        Ok(all)
    }

    /// The sum of a metric's series that have all these labels.
    #[must_use]
    pub fn sum(&self, name: &str, labels: &[(&str, &str)]) -> f64 {
        self.series(name, labels).map(|sample| sample.value).sum()
    }

    pub fn series<'a>(&'a self, name: &'a str, labels: &'a [(&str, &str)]) -> impl Iterator<Item = &'a Sample> {
        let has =
            |sample: &Sample| labels.iter().all(|(key, value)| sample.labels.get(*key).is_some_and(|v| v == value));
        self.samples.iter().filter(move |sample| sample.name == name && has(sample))
    }
}

fn is_name(text: &str) -> bool {
    let mut letters = text.chars();
    letters.next().is_some_and(|first| first.is_ascii_alphabetic() || first == '_')
        && letters.all(|letter| letter.is_ascii_alphanumeric() || letter == '_')
}

fn sample(line: &str) -> Result<Sample> {
    let end = line.find(['{', ' ']).context("no value")?;
    let (name, mut rest) = line.split_at(end);
    ensure!(is_name(name), "no name");
    let mut labels = BTreeMap::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while !rest.starts_with('}') {
            let (key, value) = rest.split_once("=\"").context("a label without a value")?;
            ensure!(is_name(key), "{key:?} is no name");
            let (value, after) = quoted(value)?;
            ensure!(labels.insert(key.to_owned(), value).is_none(), "the label {key} comes twice");
            rest = after.strip_prefix(',').unwrap_or(after);
            ensure!(after.starts_with([',', '}']), "labels run into each other");
        }
        rest = rest.strip_prefix('}').context("labels without an end")?;
    }
    let value = rest.strip_prefix(' ').context("no value")?;
    ensure!(!value.contains(' '), "more than a value");
    Ok(Sample { name: name.to_owned(), labels, value: value.parse().context("the value is no number")? })
}

/// What stands before the closing quote, and what comes behind it.
fn quoted(text: &str) -> Result<(String, &str)> {
    let (mut value, mut letters) = (String::new(), text.char_indices());
    while let Some((at, letter)) = letters.next() {
        match letter {
            '"' => return Ok((value, text.get(at + 1..).unwrap_or_default())),
            '\\' => match letters.next().context("an escape of nothing")?.1 {
                'n' => value.push('\n'),
                escaped @ ('\\' | '"') => value.push(escaped),
                other => bail!("\\{other} is no escape"),
            },
            other => value.push(other),
        }
    }
    bail!("a value without an end")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_the_format_allows_is_read() -> Result<()> {
        let all = Exposition::parse(
            "# HELP a Text.\n# TYPE a counter\na_total{x=\"1\",y=\"a\\\"b\\\\c\"} 2\na_total{x=\"2\"} 3.5\n# HELP b_seconds Text.\n\
             # TYPE b_seconds gauge\n# UNIT b_seconds seconds\nb_seconds -1\n# EOF\n",
        )?;
        assert_eq!((all.sum("a_total", &[]), all.sum("a_total", &[("x", "1")])), (5.5, 2.0));
        assert_eq!(all.series("a_total", &[("y", "a\"b\\c")]).count(), 1);
        assert_eq!(all.sum("b_seconds", &[]), -1.0);
        Ok(())
    }

    #[test]
    fn what_the_format_does_not_allow_is_an_error() {
        for wrong in [
            "# HELP a Text.\n# TYPE a counter\na_total 1\n",
            "# TYPE a counter\na 1\n# EOF\n",
            "# TYPE a counter\na_total -1\n# EOF\n",
            "# TYPE a gauge\na 1\na 2\n# EOF\n",
            "# TYPE a gauge\na{x=\"1\"} 1\na{x=\"1\"} 2\n# EOF\n",
            "# TYPE a gauge\nb 1\n# EOF\n",
            "# TYPE a gauge\na{x=\"1} 1\n# EOF\n",
            "# TYPE a gauge\na{x=\"1\"y=\"2\"} 1\n# EOF\n",
            "# TYPE a gauge\na{x=\"1\",x=\"2\"} 1\n# EOF\n",
            "# TYPE a gauge\na one\n# EOF\n",
            "# TYPE a gauge\n# TYPE b gauge\n# TYPE a gauge\n# EOF\n",
            "# TYPE a seconds\na 1\n# EOF\n",
            "a 1\n# EOF\n",
        ] {
            assert!(Exposition::parse(wrong).is_err(), "{wrong:?}");
        }
    }
}
