//! The end of a test run: a table, what was skipped and why, what failed and how to run it again, one line for machines.

use std::fmt::Write;

use super::runner::Report;

/// The whole summary. Its last line is `N passed, N failed, N skipped`.
pub(crate) fn text(reports: &[Report]) -> String {
    let shown: Vec<&Report> = reports.iter().filter(|report| !report.tally.is_empty()).collect();
    let mut text = String::from("\n");
    table(&mut text, &shown);
    // Writing to a String cannot fail.
    for report in &shown {
        for (name, reason) in &report.tally.skipped {
            let _ = writeln!(text, "skipped: {} / {name} ({}): {reason}", report.suite, report.kernel);
        }
    }
    for report in &shown {
        for name in &report.tally.failed {
            let _ = writeln!(
                text,
                "FAILED:  {} / {name} ({})\n         again: {}",
                report.suite,
                report.kernel,
                again(report, name)
            );
        }
    }
    let (passed, failed, skipped) = totals(reports);
    let _ = writeln!(text, "{passed} passed, {failed} failed, {skipped} skipped");
    text
}

/// Passed, failed, skipped.
pub(crate) fn totals(reports: &[Report]) -> (usize, usize, usize) {
    let sum = |count: fn(&Report) -> usize| reports.iter().map(count).sum();
    (sum(|r| r.tally.passed), sum(|r| r.tally.failed.len()), sum(|r| r.tally.skipped.len()))
}

fn table(text: &mut String, reports: &[&Report]) {
    let heads = ["suite", "kernel", "passed", "failed", "skipped", "time"];
    let mut rows = vec![heads.map(str::to_owned)];
    for report in reports {
        let tally = &report.tally;
        let counts = [tally.passed, tally.failed.len(), tally.skipped.len()].map(|count| count.to_string());
        let [passed, failed, skipped] = counts;
        rows.push([
            report.suite.clone(),
            report.kernel.clone(),
            passed,
            failed,
            skipped,
            format!("{} s", report.seconds),
        ]);
    }
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    for row in &rows {
        let mut line = String::new();
        for (column, (cell, &width)) in row.iter().zip(&widths).enumerate() {
            let _ = if column < 2 { write!(line, "{cell:<width$}  ") } else { write!(line, "{cell:>width$}  ") };
        }
        let _ = writeln!(text, "{}", line.trim_end());
    }
    text.push('\n');
}

/// The command that runs one test once more.
fn again(report: &Report, test: &str) -> String {
    let place = match report.kernel.strip_prefix("VM ") {
        Some(kernel) => format!("--vm {kernel}"),
        // Suites of crates are named CRATE/WHAT.
        None if report.suite.contains('/') => "--unit".to_owned(),
        None => "--native".to_owned(),
    };
    // In brackets stands what happened to the suite as a whole, and where.
    let test = test
        .strip_prefix('(')
        .map_or(Some(test), |words| words.strip_suffix(')')?.split_once(" during ").map(|(_, test)| test));
    let filter = test.map_or_else(String::new, |test| format!(" --filter {test}"));
    format!("cargo xtask test {place} --suite {}{filter}", report.suite)
}

#[cfg(test)]
mod tests {
    use super::{super::tally::Tally, *};

    fn report(kernel: &str, passed: usize, failed: &[&str]) -> Report {
        let failed = failed.iter().map(|&name| name.to_owned()).collect();
        let tally = Tally { passed, failed, complete: true, ..Tally::default() };
        Report { suite: "matrix".into(), kernel: kernel.into(), tally, seconds: 3 }
    }

    #[test]
    fn the_last_line_is_the_plain_total() {
        let mut skipped = report("6.18.0", 3, &[]);
        skipped.tally.skipped.insert("ktls".into(), "no kernel TLS".into());
        let text = text(&[skipped, report("VM 6.12", 2, &["half_close"])]);
        assert_eq!(text.lines().last(), Some("5 passed, 1 failed, 1 skipped"));
        assert!(text.contains("skipped: matrix / ktls (6.18.0): no kernel TLS"), "{text}");
        assert!(text.contains("again: cargo xtask test --vm 6.12 --suite matrix --filter half_close"), "{text}");
    }

    #[test]
    fn a_hanging_test_is_run_again_by_its_name() {
        assert_eq!(
            again(&report("6.18.0", 0, &[]), "(stopped after 600 s during slow::one)"),
            "cargo xtask test --native --suite matrix --filter slow::one"
        );
        assert_eq!(
            again(&report("VM 6.1", 0, &[]), "(the VM did not come back)"),
            "cargo xtask test --vm 6.1 --suite matrix"
        );
    }
}
