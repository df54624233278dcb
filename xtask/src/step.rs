//! Steps: a progress line before the work, and a failure that names the step, the command and the way out.
//! What the steps are is left to the commands; what is missing on the machine to `deps`.

use std::{
    env, fmt,
    io::{self, IsTerminal, Write},
    process::{Command, Output, Stdio},
};

use anyhow::Result;

/// One piece of work with a name. `begin` prints `==> name` on standard error.
pub(crate) struct Step {
    name: String,
    way_out: Option<String>,
}

impl Step {
    /// Prints the progress line. `name` reads as "building the eBPF program": a failure says "building the eBPF program failed".
    pub(crate) fn begin(name: impl Into<String>) -> Self {
        let name = name.into();
        say(&name);
        Self::quiet(name)
    }

    /// A step that is too small or too frequent for a line of its own, but not for a good error.
    pub(crate) fn quiet(name: impl Into<String>) -> Self {
        Self { name: name.into(), way_out: None }
    }

    /// What a person can do when the step fails.
    #[must_use]
    pub(crate) fn way_out(mut self, text: impl Into<String>) -> Self {
        self.way_out = Some(text.into());
        self
    }

    /// Runs the command and shows its output as it comes. Its standard output goes to our standard error:
    /// standard output belongs to results (and, in `vm`, to the guest's command).
    pub(crate) fn run(&self, command: &mut Command) -> Result<()> {
        command.stdin(Stdio::null()).stdout(io::stderr());
        let status = command.status().map_err(|error| self.failure(Some(command), error.to_string()))?;
        if status.success() { Ok(()) } else { Err(self.failure(Some(command), status.to_string())) }
    }

    /// Runs the command in silence and returns its standard output. What it wrote is shown if it fails.
    pub(crate) fn output(&self, command: &mut Command) -> Result<String> {
        command.stdin(Stdio::null());
        let output = command.output().map_err(|error| self.failure(Some(command), error.to_string()))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(self.failure(Some(command), format!("{}{}", output.status, tail(&output))))
        }
    }

    /// Runs the command, shows its standard error as it comes, and returns its standard output, which is for programs to read.
    pub(crate) fn read(&self, command: &mut Command) -> Result<String> {
        command.stdin(Stdio::null()).stderr(Stdio::inherit());
        let output = command.output().map_err(|error| self.failure(Some(command), error.to_string()))?;
        if output.status.success() {
            Ok(String::from_utf8_lossy(&output.stdout).into_owned())
        } else {
            Err(self.failure(Some(command), output.status.to_string()))
        }
    }

    /// An error of this step that did not come from a command.
    pub(crate) fn fail(&self, cause: impl fmt::Display) -> anyhow::Error {
        self.failure(None, cause.to_string())
    }

    fn failure(&self, command: Option<&Command>, cause: String) -> anyhow::Error {
        Failure { step: self.name.clone(), command: command.map(describe), cause, way_out: self.way_out.clone() }.into()
    }
}

/// A progress line without a step.
pub(crate) fn say(text: &str) {
    let (on, off) = if colour() { ("\x1b[1;32m", "\x1b[0m") } else { ("", "") };
    line(&format!("{on}==>{off} {text}"));
}

/// A line that a person should see although nothing failed.
pub(crate) fn note(text: &str) {
    let (on, off) = if colour() { ("\x1b[33m", "\x1b[0m") } else { ("", "") };
    line(&format!("{on}note:{off} {text}"));
}

/// Prints an error with its causes, as the last thing before the exit.
pub(crate) fn report(error: &anyhow::Error) {
    let (on, off) = if colour() { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
    line(&format!("{on}error:{off} {error}"));
    for cause in error.chain().skip(1) {
        line(&format!("  cause: {cause}"));
    }
}

/// Colour only where a person looks, and only if they did not ask for none.
pub(crate) fn colour() -> bool {
    io::stderr().is_terminal() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// A command as a person would type it.
pub(crate) fn describe(command: &Command) -> String {
    let mut words: Vec<String> = Vec::new();
    for (name, value) in command.get_envs() {
        if let Some(value) = value {
            words.push(format!("{}={}", name.to_string_lossy(), quote(&value.to_string_lossy())));
        }
    }
    words.push(quote(&command.get_program().to_string_lossy()));
    words.extend(command.get_args().map(|arg| quote(&arg.to_string_lossy())));
    let line = words.join(" ");
    match command.get_current_dir() {
        Some(dir) => format!("(cd {} && {line})", quote(&dir.to_string_lossy())),
        None => line,
    }
}

/// Quotes a word for a POSIX shell, if it needs it.
pub(crate) fn quote(word: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,+@%^".contains(c);
    if !word.is_empty() && word.chars().all(plain) {
        word.to_owned()
    } else {
        format!("'{}'", word.replace('\'', r"'\''"))
    }
}

#[derive(Debug)]
struct Failure {
    step: String,
    command: Option<String>,
    cause: String,
    way_out: Option<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} failed", self.step)?;
        if let Some(command) = &self.command {
            write!(f, "\n  command: {command}")?;
        }
        write!(f, "\n  cause: {}", self.cause)?;
        if let Some(way_out) = &self.way_out {
            write!(f, "\n  way out: {way_out}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

/// Standard error may be closed or a broken pipe: progress is not worth dying for.
fn line(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// The last lines that a failed command wrote, on either stream.
fn tail(output: &Output) -> String {
    const LINES: usize = 20;
    let both = [output.stdout.as_slice(), output.stderr.as_slice()].concat();
    let text = String::from_utf8_lossy(&both);
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let from = lines.len().saturating_sub(LINES);
    lines[from..].iter().map(|line| format!("\n    | {line}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_names_step_command_cause_and_way_out() {
        let step = Step::quiet("counting sheep").way_out("sleep");
        let error = step.output(Command::new("sh").args(["-c", "echo baa >&2; exit 3"])).unwrap_err().to_string();
        for part in
            ["counting sheep failed", "sh -c 'echo baa >&2; exit 3'", "exit status: 3", "| baa", "way out: sleep"]
        {
            assert!(error.contains(part), "{part:?} is missing from {error:?}");
        }
    }

    #[test]
    fn a_missing_program_is_a_failure_of_the_step() {
        let error = Step::quiet("looking").run(&mut Command::new("/no/such/program")).unwrap_err().to_string();
        assert!(error.contains("looking failed") && error.contains("/no/such/program"), "{error}");
    }

    #[test]
    fn words_are_quoted_so_that_a_shell_reads_them_back() {
        assert_eq!(quote("a-b/c.d"), "a-b/c.d");
        assert_eq!(quote(""), "''");
        assert_eq!(quote("it's"), r"'it'\''s'");
    }
}
