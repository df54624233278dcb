//! `cargo xtask test`: everything, on this kernel and on Debian's. What CI runs, too.
//!
//! Not cargo-nextest: it is not on a fresh machine, and building it would cost more than it brings here, since scenarios run one after
//! the other anyway. Finding binaries is cargo's, one run is `runner`'s, the count `tally`'s, the end `summary`'s.

pub(crate) mod programs;
mod runner;
mod suite;
mod summary;
mod tally;

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use self::{
    runner::{Report, Settings},
    suite::{Kind, Suite},
    tally::Tally,
};
use crate::{
    build, lint,
    signals::Interrupted,
    step::{self, Step},
    vm::{Kernel, Vm},
    workspace,
};

/// CI has 90 minutes for everything: these add up to 80, which leaves a cold build its time.
const NATIVE_SUITE: Duration = Duration::from_secs(8 * 60);
const NATIVE_ALL: Duration = Duration::from_secs(20 * 60);
const VM_SUITE: Duration = Duration::from_secs(12 * 60);
const VM_ALL: Duration = Duration::from_secs(30 * 60);

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Without a choice, all of these run:
  --unit    tests of the single crates
  --native  scenarios (tests/tests) on this machine's kernel; root, in network namespaces, one after the other
  --vm      the same scenarios in Debian's kernels 6.12 and 6.1, one boot each
Files named native_* run only natively, files named vm_* only in the VM. Before them come the checks of the format and of the
rules of the house; a part that was chosen runs without them. What tests need (nginx, redis, …) is installed, but not started.

A test that cannot run on a kernel prints `SKIPPED: name: reason`, which is counted and shown. The last line on standard output is
`N passed, N failed, N skipped`. The exit code is 0 only if nothing failed and something ran. With MARLINE_LONG=1 some suites
(direct_transfer) move ten times as much: for single suites, as the time that a suite may take stays the same.

  cargo xtask test --native --suite transfer_matrix --filter half_close
  cargo xtask test --vm 6.1")]
pub(crate) struct Args {
    /// Run the tests of the single crates
    #[arg(long)]
    unit: bool,
    /// Run the scenarios on this kernel
    #[arg(long)]
    native: bool,
    /// Run the scenarios in the VM: on one kernel, or on all
    #[arg(long, value_name = "KERNEL", num_args = 0..=1)]
    vm: Option<Option<Kernel>>,
    /// Only tests whose name contains this
    #[arg(long, value_name = "NAME")]
    filter: Option<String>,
    /// Only suites whose name contains this: a file of tests/tests, or as `agent/lib` with --unit
    #[arg(long, value_name = "NAME")]
    suite: Option<String>,
    /// Show the tests instead of running them
    #[arg(long)]
    list: bool,
}

impl Args {
    fn everything(&self) -> bool {
        !self.unit && !self.native && self.vm.is_none()
    }

    fn kernels(&self) -> Vec<Kernel> {
        match self.vm {
            Some(Some(kernel)) => vec![kernel],
            Some(None) => Kernel::ALL.to_vec(),
            None if self.everything() => Kernel::ALL.to_vec(),
            None => Vec::new(),
        }
    }
}

/// Returns the exit code.
pub(crate) fn run(args: &Args) -> Result<i32> {
    if args.everything() && !args.list {
        lint::quick()?;
    }
    let agent = build::agent(false)?;
    let mut suites = build_suites()?;
    suites.retain(|suite| args.suite.as_ref().is_none_or(|name| suite.name.contains(name.as_str())));
    if args.list {
        return list(&suites, args).map(|()| 0);
    }
    // Whoever reads the log of a failure that does not come back will want the backtrace.
    let mut told = vec![
        ("MARLINE_BIN".to_owned(), agent.display().to_string()),
        ("RUST_BACKTRACE".to_owned(), env::var("RUST_BACKTRACE").unwrap_or_else(|_| "1".to_owned())),
    ];
    let scenarios = args.everything() || args.native || args.vm.is_some();
    if scenarios {
        ensure!(
            Uid::effective().is_root(),
            "scenarios need root: network namespaces, cgroups and eBPF (--unit does not)"
        );
        told.extend(programs::prepare(&suites)?);
        if args.everything() || args.native {
            // For a kernel without TLS, as this one may be.
            let agent = build::agent_without_records(false)?;
            told.push(("MARLINE_BIN_WITHOUT_RECORDS".to_owned(), agent.display().to_string()));
        }
    }
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("cannot read this kernel's name")?;
    let settings = |kernel: &str, timeout, place: &str| Settings {
        kernel: kernel.to_owned(),
        filter: args.filter.clone(),
        timeout,
        env: [&[("MARLINE_TEST_ENV".to_owned(), place.to_owned())][..], &told].concat(),
    };
    let mut native = settings(release.trim(), NATIVE_SUITE, "native");
    let end = Instant::now() + NATIVE_ALL;
    let mut reports = Vec::new();
    for suite in &suites {
        let chosen = match suite.kind {
            Kind::Unit => args.everything() || args.unit,
            Kind::Scenario { native, .. } => native && (args.everything() || args.native),
        };
        if chosen && has_tests(suite, args)? {
            step::say(&format!("testing {} on this kernel, {}", suite.name, native.kernel));
            native.timeout = NATIVE_SUITE.min(end.saturating_duration_since(Instant::now()));
            reports.push(runner::run(suite, &native)?);
        }
    }
    for kernel in args.kernels() {
        let settings = settings(&format!("VM {}", kernel.name()), VM_SUITE, "vm");
        reports.extend(in_vm(kernel, &suites, settings, args)?);
    }
    print!("{}", summary::text(&reports));
    let (passed, failed, _) = summary::totals(&reports);
    if passed == 0 && failed == 0 {
        step::note("nothing ran: is there a test of that name in the chosen parts? See --list");
    }
    Ok(i32::from(failed > 0 || passed == 0))
}

fn build_suites() -> Result<Vec<Suite>> {
    let step = Step::begin("building the tests").way_out("mend the code: cargo test --workspace --no-run");
    let mut cargo = workspace::cargo();
    cargo.args(["test", "--workspace", "--no-run"]);
    let mut suites: Vec<Suite> =
        build::artifacts(&step, &mut cargo)?.into_iter().filter(|a| a.test).map(Suite::new).collect();
    // Quick ones first; otherwise by name, so that two runs can be compared.
    suites.sort_by_key(|suite| (suite.kind != Kind::Unit, suite.name.clone()));
    if suites.is_empty() {
        return Err(step.fail("cargo built no test"));
    }
    Ok(suites)
}

fn has_tests(suite: &Suite, args: &Args) -> Result<bool> {
    Ok(!runner::list(suite, args.filter.as_deref())?.is_empty())
}

fn list(suites: &[Suite], args: &Args) -> Result<()> {
    for suite in suites {
        let place = match suite.kind {
            Kind::Unit => "unit",
            Kind::Scenario { native: true, vm: true } => "native, vm",
            Kind::Scenario { native: true, .. } => "native",
            Kind::Scenario { .. } => "vm",
        };
        for test in runner::list(suite, args.filter.as_deref())? {
            println!("{}: {test} [{place}]", suite.name);
        }
    }
    Ok(())
}

/// Orders for `guest`.
#[derive(Serialize, Deserialize)]
struct Plan {
    suites: Vec<Suite>,
    settings: Settings,
    results: PathBuf,
}

/// Runs the scenarios in one boot of the kernel. Where a suite takes the kernel down, it has failed with what the kernel said last, and
/// those after it get another boot. What is the emulator's own fault proves nothing: that suite begins anew, some times.
fn in_vm(kernel: Kernel, suites: &[Suite], settings: Settings, args: &Args) -> Result<Vec<Report>> {
    let mut chosen = Vec::new();
    for suite in suites {
        if matches!(suite.kind, Kind::Scenario { vm: true, .. }) && has_tests(suite, args)? {
            chosen.push(suite.clone());
        }
    }
    let out = workspace::vm_out();
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let results = out.join(format!("test-results-{}.json", kernel.name()));
    let mut plan = Plan { suites: chosen, settings, results };
    let (end, mut reports, mut again) = (Instant::now() + VM_ALL, Vec::new(), AGAIN);
    while !plan.suites.is_empty() {
        let (done, how) = boot(kernel, &plan, end.saturating_duration_since(Instant::now()))?;
        plan.suites.retain(|suite| !done.iter().any(|report| report.suite == suite.name));
        reports.extend(done);
        let Some(first) = plan.suites.first() else { break };
        if again > 0 && how.is_the_emulators() && Instant::now() < end {
            step::note(&format!("{}: {}. That is the emulator's fault: once more", first.name, how.text()));
            again -= 1;
            continue;
        }
        // Without time there is no other boot.
        let lost = if Instant::now() < end { 1 } else { plan.suites.len() };
        reports.extend(plan.suites.drain(..lost).map(|suite| without_result(&suite, &plan.settings, &how.text())));
    }
    Ok(reports)
}

/// How a VM ended.
#[derive(Debug, PartialEq, Eq)]
enum End {
    Exit(i32),
    /// The kernel's last words.
    Died(String),
    NoWord,
}

/// How often one kernel may begin anew.
const AGAIN: usize = 3;

impl End {
    /// Seen with QEMU 7.2 and two processors that two threads emulate: the kernel patches its own code while it runs (text_poke_bp, for the
    /// static key in sched_clock_cpu at boot), and the other processor executes the breakpoint that was there until then, of which no
    /// handler knows any more. Neither Marline nor its tests can make the kernel execute a breakpoint, or end QEMU without a word
    /// of the kernel.
    fn is_the_emulators(&self) -> bool {
        match self {
            Self::NoWord => true,
            Self::Died(words) => words.starts_with("Oops: int3"),
            Self::Exit(_) => false,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Exit(code) => format!("the VM ended with exit code {code} before a result"),
            Self::Died(words) => format!("the VM died before a result: {words}"),
            Self::NoWord => "the VM went away before a result, and its kernel said nothing".to_owned(),
        }
    }
}

/// What the suites of the plan did until the VM ended, and how it ended.
fn boot(kernel: Kernel, plan: &Plan, timeout: Duration) -> Result<(Vec<Report>, End)> {
    let plan_file = workspace::vm_out().join(format!("test-plan-{}.json", kernel.name()));
    if plan.results.exists() {
        // An old result must not be taken for the answer.
        fs::remove_file(&plan.results).with_context(|| format!("cannot remove {}", plan.results.display()))?;
    }
    fs::write(&plan_file, serde_json::to_string(plan)?)
        .with_context(|| format!("cannot write {}", plan_file.display()))?;
    let program = env::current_exe().context("cannot find this program's own file")?;
    let command = [program.display().to_string(), "test-guest".to_owned(), plan_file.display().to_string()];
    step::say(&format!("testing {} suites on Debian's kernel {}", plan.suites.len(), kernel.name()));
    let mut vm = Vm::new(kernel);
    vm.timeout = timeout;
    vm.cwd = workspace::root();
    let how = match vm.run(&command) {
        Ok(code) => End::Exit(code),
        Err(error) if error.is::<Interrupted>() => return Err(error),
        // The other suites, and the other kernel's, are still worth running.
        Err(error) => {
            step::report(&error);
            vm.last_words().map_or(End::NoWord, End::Died)
        }
    };
    let text = fs::read_to_string(&plan.results).unwrap_or_default();
    Ok((serde_json::from_str(&text).unwrap_or_default(), how))
}

/// A suite without a report has failed: the VM went away before it ended.
fn without_result(suite: &Suite, settings: &Settings, how: &str) -> Report {
    let mut tally = Tally::default();
    tally.close(Some(how));
    Report { suite: suite.name.clone(), kernel: settings.kernel.clone(), tally, seconds: 0 }
}

/// Runs the suites of a plan; started inside the VM. Results are written after each suite, so that they survive what the next one does.
pub(crate) fn guest(plan: &Path) -> Result<i32> {
    let text = fs::read_to_string(plan).with_context(|| format!("cannot read {}", plan.display()))?;
    let plan: Plan = serde_json::from_str(&text).context("cannot understand the plan")?;
    let mut reports = Vec::new();
    for suite in &plan.suites {
        step::say(&format!("testing {} on {}", suite.name, plan.settings.kernel));
        reports.push(runner::run(suite, &plan.settings)?);
        let text = serde_json::to_string(&reports)?;
        fs::write(&plan.results, text).with_context(|| format!("cannot write {}", plan.results.display()))?;
    }
    Ok(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_suite_without_a_result_has_failed() {
        let kind = Kind::Scenario { native: true, vm: true };
        let suite = Suite { name: "b".into(), binary: "/t".into(), cwd: "/".into(), kind };
        let settings = Settings { kernel: "VM 6.1".into(), filter: None, timeout: VM_SUITE, env: Vec::new() };
        let reports = [without_result(&suite, &settings, &End::Died("BUG: at x".into()).text())];
        assert_eq!(summary::totals(&reports), (0, 1, 0));
        assert_eq!(reports[0].tally.failed, ["(the VM died before a result: BUG: at x)"]);
    }

    #[test]
    fn a_kernel_that_died_of_what_it_ran_is_not_excused() {
        let died = |words: &str| End::Died(words.into());
        assert!(
            died("Oops: int3: 0000 [#1] PREEMPT SMP NOPTI; RIP: 0010:sched_clock_cpu+0x9/0x190").is_the_emulators()
        );
        assert!(End::NoWord.is_the_emulators());
        assert!(
            !died("BUG: kernel NULL pointer dereference; Oops: int3: 0000 [#2] PREEMPT SMP NOPTI").is_the_emulators()
        );
        assert!(!died("Kernel panic - not syncing: Attempted to kill init!").is_the_emulators());
        assert!(!End::Exit(124).is_the_emulators());
    }
}
