//! Reads what libtest prints and keeps count. Pure; running the tests is left to `runner`.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

/// What became of one suite.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Tally {
    pub passed: usize,
    /// Names of failed tests; something that is not a test but went wrong stands here in brackets.
    pub failed: Vec<String>,
    /// Name and reason, of those that libtest ignores and of those that say so themselves.
    pub skipped: BTreeMap<String, String>,
    /// Whether libtest came to its end.
    pub complete: bool,
    /// The test that began last and has not ended.
    pub running: Option<String>,
    /// libtest's list of failures, while it is being read.
    #[serde(skip)]
    pub list: Option<Vec<String>>,
    /// Every test that began.
    #[serde(skip)]
    pub begun: BTreeSet<String>,
}

impl Tally {
    /// Takes one line of the output.
    pub(crate) fn line(&mut self, line: &str) {
        if let Some(counts) = line.strip_prefix("test result: ") {
            self.result(counts);
        } else if let Some(rest) = line.strip_prefix("test ") {
            self.test(rest);
        } else if line == "failures:" {
            // Printed twice, first with what the tests wrote: the last one is the list.
            self.list = Some(Vec::new());
        } else if let Some((_, skip)) = line.split_once("SKIPPED: ") {
            let (name, reason) = skip.split_once(": ").unwrap_or((skip, "no reason given"));
            self.skipped.insert(name.trim().to_owned(), reason.trim().to_owned());
        } else if let (Some(list), Some(name)) = (&mut self.list, line.strip_prefix("    ")) {
            list.push(name.to_owned());
        }
        if matches!(line, "ok" | "FAILED") {
            self.running = None;
        }
    }

    /// `name ... ok`, or `name ...` for one that has only begun.
    fn test(&mut self, rest: &str) {
        let split = rest.rsplit_once(" ... ").or_else(|| Some((rest.strip_suffix(" ...")?, "")));
        let Some((name, verdict)) = split else { return };
        self.running = None;
        self.begun.insert(name.to_owned());
        if verdict == "FAILED" {
            self.failed.push(name.to_owned());
        } else if let Some(reason) = verdict.strip_prefix(IGNORED) {
            let reason = reason.trim_start_matches(", ");
            let reason = if reason.is_empty() { IGNORED.to_owned() } else { format!("{IGNORED}: {reason}") };
            self.skipped.insert(name.to_owned(), reason);
        } else if verdict != "ok" {
            self.running = Some(name.to_owned());
        }
    }

    /// `ok. 3 passed; 0 failed; …`: from here on libtest's own numbers hold.
    fn result(&mut self, counts: &str) {
        let count = |what: &str| {
            counts.split(['.', ';']).find_map(|part| part.trim().strip_suffix(what)?.parse::<usize>().ok())
        };
        let (Some(passed), Some(failed)) = (count(" passed"), count(" failed")) else { return };
        self.complete = true;
        self.running = None;
        // To libtest, a test that skips itself has passed. One that skips only a part of its work has its own name for that part.
        let skips_itself =
            |(name, reason): &(&String, &String)| self.begun.contains(*name) && !reason.starts_with(IGNORED);
        let own = self.skipped.iter().filter(skips_itself).count();
        self.passed = passed.saturating_sub(own);
        self.failed = self.list.take().unwrap_or_default();
        self.failed.resize(failed, "(a test without a name)".to_owned());
    }

    /// The suite has ended; `how` tells of an end that is not one's own.
    pub(crate) fn close(&mut self, how: Option<&str>) {
        let running = self.running.take();
        if let Some(how) = how {
            let during = running.map_or_else(String::new, |test| format!(" during {test}"));
            self.failed.push(format!("({how}{during})"));
        } else if !self.complete {
            self.failed.push("(ended without a result)".to_owned());
        }
        self.complete = true;
    }

    /// Whether there is anything to tell.
    pub(crate) fn is_empty(&self) -> bool {
        self.passed == 0 && self.failed.is_empty() && self.skipped.is_empty()
    }
}

const IGNORED: &str = "ignored";

#[cfg(test)]
mod tests {
    use super::*;

    fn tally(text: &str) -> Tally {
        let mut tally = Tally::default();
        text.lines().for_each(|line| tally.line(line));
        tally
    }

    #[test]
    fn a_usual_run_is_counted() {
        let text = "running 3 tests\ntest a::x ... ok\ntest b ... FAILED\ntest c ... ignored, takes an hour\n\nfailures:\n    b\n\n\
                    test result: FAILED. 1 passed; 1 failed; 1 ignored; 0 measured; 4 filtered out; finished in 0.00s\n";
        let mut tally = tally(text);
        tally.close(None);
        assert_eq!((tally.passed, tally.failed.as_slice()), (1, ["b".to_owned()].as_slice()));
        assert_eq!(tally.skipped.get("c").map(String::as_str), Some("ignored: takes an hour"));
    }

    #[test]
    fn a_test_that_skips_itself_has_not_passed() {
        let text = "test a ... ok\ntest b ... ok\nsuccesses:\n---- b stdout ----\nSKIPPED: b: no kernel TLS here: go away\n\
                    test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let tally = tally(text);
        assert_eq!(tally.passed, 1);
        assert_eq!(tally.skipped.get("b").map(String::as_str), Some("no kernel TLS here: go away"));
    }

    #[test]
    fn a_test_that_skips_a_part_has_passed_with_the_rest() {
        let text = "test a ... ok\n---- a stdout ----\nSKIPPED: kernel TLS: this kernel has none\n\
                    test result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n";
        let tally = tally(text);
        assert_eq!((tally.passed, tally.skipped.len()), (1, 1));
    }

    #[test]
    fn an_end_without_a_result_is_a_failure_that_names_the_test() {
        let mut cut = tally("test a ... ok\ntest slow ... ");
        assert_eq!(cut.running.as_deref(), Some("slow"));
        cut.close(Some("stopped after 600 s"));
        assert_eq!(cut.failed, ["(stopped after 600 s during slow)"]);
        let mut silent = tally("running 1 test\n");
        silent.close(None);
        assert_eq!(silent.failed, ["(ended without a result)"]);
    }

    #[test]
    fn what_children_write_does_not_hide_the_verdict() {
        let text = "test a ... nginx says hello\nok\ntest b ... child\nall but one FAILED\nFAILED\n\nfailures:\n\n---- b stdout ----\n\
                        not this\n\n\nfailures:\n    b\n\ntest result: FAILED. 1 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out\n";
        let tally = tally(text);
        assert_eq!((tally.passed, tally.failed), (1, vec!["b".to_owned()]));
    }
}
