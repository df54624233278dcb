//! Typing commands on a node, as a person does.
#![allow(dead_code, reason = "each suite types some of them")]

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use marline_tests::{
    cluster::{Cluster, Side},
    process::{Place, output},
    wait::seconds,
};
use serde_json::Value;

/// Where a person is, and the program.
pub struct Node {
    pub place: Place,
    pub program: PathBuf,
}

/// What came of it.
#[derive(Debug)]
pub struct Said {
    pub code: Option<i32>,
    pub out: String,
    pub err: String,
}

pub fn on(cluster: &Cluster, side: Side) -> Result<Node> {
    Ok(Node { place: cluster.node(side), program: cluster.program()? })
}

impl Node {
    pub fn types(&self, words: &[&str]) -> Result<Said> {
        let answer = output(self.place.command(&self.program).args(words), seconds(40))?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let said = Said { code: answer.status.code(), out: text(&answer.stdout), err: text(&answer.stderr) };
        println!("$ marline {}\n{}{}=> {:?}\n", words.join(" "), said.out, said.err, said.code);
        ensure!(!said.err.contains("panicked"), "{said:?}");
        Ok(said)
    }

    pub fn json(&self, words: &[&str]) -> Result<(Option<i32>, Value)> {
        let said = self.types(&[words, &["--json"]].concat())?;
        let value = serde_json::from_str(&said.out).with_context(|| format!("{words:?} said {said:?}"))?;
        Ok((said.code, value))
    }

    /// The lines of `marline status` about one part: the worst state and all words.
    pub fn part(&self, name: &str, more: &[&str]) -> Result<(Option<i32>, String, String)> {
        let (code, value) = self.json(&[&["status"], more].concat())?;
        let checks = value["checks"].as_array().context("checks")?;
        let of: Vec<_> = checks.iter().filter(|check| check["name"] == name).collect();
        let worst = ["fail", "warn", "ok"].into_iter().find(|state| of.iter().any(|check| check["state"] == *state));
        let words = of.iter().map(|check| format!("{} -> {}\n", check["text"], check["way_out"])).collect();
        Ok((code, worst.unwrap_or("none").to_owned(), words))
    }
}

impl Said {
    /// The exit code, and words that must be there.
    pub fn has(&self, code: i32, words: &[&str]) -> Result<()> {
        let all = format!("{}{}", self.out, self.err);
        ensure!(self.code == Some(code), "exit code {:?} and not {code}: {all}", self.code);
        for word in words {
            ensure!(all.contains(word), "{word:?} is not in what was said:\n{all}");
        }
        Ok(())
    }
}
