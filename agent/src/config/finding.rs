//! What is wrong with a configuration, said so that the reader can go there and put it right.

use std::{
    fmt::{self, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
};

use serde::Serialize;

/// One error or warning.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct Finding {
    pub file: PathBuf,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub line: Option<u64>,
    /// `KIND NAMESPACE/NAME`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub resource: Option<String>,
    /// Such as `spec.address`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub field: Option<String>,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub hint: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        one_line(f, &self.file.to_string_lossy())?;
        if let Some(line) = self.line {
            write!(f, ":{line}")?;
        }
        for part in [&self.resource, &self.field].into_iter().flatten() {
            f.write_str(": ")?;
            one_line(f, part)?;
        }
        f.write_str(": ")?;
        one_line(f, &self.message)?;
        f.write_str("; ")?;
        one_line(f, &self.hint)
    }
}

/// All that is wrong with a configuration, in the order of files and lines. Displays one error a line.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct ConfigErrors {
    pub errors: Vec<Finding>,
    pub warnings: Vec<Finding>,
}

impl ConfigErrors {
    /// Nothing could be said of any one file in `dir`.
    pub(crate) fn about(dir: &Path, why: String) -> Self {
        let hint = "the last good configuration stays in force, and this one is tried again";
        Self { errors: vec![about_file(dir, None, why, hint)], warnings: Vec::new() }
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, error) in self.errors.iter().enumerate() {
            if n > 0 {
                writeln!(f)?;
            }
            write!(f, "{error}")?;
        }
        Ok(())
    }
}

impl std::error::Error for ConfigErrors {}

/// Gathers findings while a configuration is read; nothing stops at the first.
#[derive(Default)]
pub(super) struct Report {
    pub(super) errors: Vec<Finding>,
    pub(super) warnings: Vec<Finding>,
}

impl Report {
    pub(super) fn append(&mut self, mut other: Self) {
        self.errors.append(&mut other.errors);
        self.warnings.append(&mut other.warnings);
    }

    pub(super) fn into_errors(mut self) -> ConfigErrors {
        sort(&mut self.errors);
        sort(&mut self.warnings);
        ConfigErrors { errors: self.errors, warnings: self.warnings }
    }

    pub(super) fn into_warnings(mut self) -> Vec<Finding> {
        sort(&mut self.warnings);
        self.warnings
    }
}

/// Where a resource stands: what every finding about it has in common. There are as many as resources, so clones share.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Origin {
    pub(super) file: Arc<Path>,
    pub(super) line: u64,
    pub(super) resource: Arc<str>,
}

impl Origin {
    pub(super) fn finding(&self, field: &str, line: u64, message: String, hint: String) -> Finding {
        Finding {
            file: self.file.to_path_buf(),
            line: Some(line),
            resource: Some(self.resource.to_string()),
            field: (!field.is_empty()).then(|| field.to_owned()),
            message,
            hint,
        }
    }

    /// `FILE:LINE`, for a finding about another resource that must point here.
    pub(super) fn place(&self) -> String {
        format!("{}:{}", self.file.display(), self.line)
    }
}

/// A finding about a whole file.
pub(super) fn about_file(file: &Path, line: Option<u64>, message: String, hint: &str) -> Finding {
    Finding { file: file.to_owned(), line, resource: None, field: None, message, hint: hint.to_owned() }
}

/// Names in a file may hold anything, also what would make one line two or move a terminal's cursor.
fn one_line(f: &mut fmt::Formatter<'_>, text: &str) -> fmt::Result {
    text.chars().try_for_each(|c| if c.is_control() { write!(f, "{}", c.escape_default()) } else { f.write_char(c) })
}

fn sort(findings: &mut [Finding]) {
    findings.sort_by(|a, b| (&a.file, a.line).cmp(&(&b.file, b.line)));
}
