//! `cargo xtask demo`: real programs talk through a two-node mesh, and what they saw, what the agents wrote and what the wire
//! carried is compared. Where it runs is decided here; the flows are in `demo/flows.rs`, the judgement in `demo/report.rs`,
//! nodes and pods in the harness.

mod flows;
pub(crate) mod kernel;
mod report;
mod rotate;

use std::{
    env, fs,
    path::{Path, PathBuf},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use clap::ValueEnum;
use marline_tests::{
    capture::LinkCapture,
    cluster::{Cluster, ClusterSpec, Direct, Side, remains},
    config::Mode,
};

use crate::{
    build, cluster, deps,
    signals::{Interrupted, Signals},
    step::{self, Step},
    vm::{Kernel, Vm},
    workspace,
};

/// The longest that an emulated machine may take.
const VM_TIME: Duration = Duration::from_secs(30 * 60);

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Builds everything, makes two nodes of network namespaces with an agent on each, and lets curl and nginx, redis-cli and redis-server,
iperf3 and ssh talk from node to node, over IPv4 and IPv6. None of them knows of the mesh. A pod outside of the mesh tries as well,
in PERMISSIVE and in STRICT mode. All frames on the link between the nodes are captured meanwhile.

Shown at the end: who talked to whom by SPIFFE ID, as both agents' access logs tell it; whether the kernel or the agent kept the TLS
records; whether the bytes that came were those that were sent; and whether the wire carried anything but TLS 1.3. The exit code is 0
only if all of that is as it should be.

It runs on this machine's kernel if that has kernel TLS, else inside a VM with Debian's kernel.

  cargo xtask demo
  cargo xtask demo --kernel 6.1 --json demo.json
  cargo xtask demo --rotate                  certificates are replaced under traffic, and no connection fails
  cargo xtask demo --kernel host --keep      then look around; cargo xtask down")]
pub(crate) struct Args {
    /// Write the results as JSON, too
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Where to run [default: here if this kernel has kernel TLS, else 6.12]
    #[arg(long, value_enum)]
    kernel: Option<Where>,
    /// Instead of the flows: replace leaves, an intermediate and the root of the mesh's certificates under traffic (on this kernel)
    #[arg(long, conflicts_with_all = ["keep", "kernel"])]
    rotate: bool,
    /// Leave the mesh up, as `cargo xtask up` would (on this kernel only)
    #[arg(long)]
    keep: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Where {
    /// A VM with Debian's newer kernel
    #[value(name = "6.12")]
    V6_12,
    /// A VM with Debian 12's own kernel
    #[value(name = "6.1")]
    V6_1,
    /// This machine's kernel, whatever it has
    #[value(name = "host")]
    Host,
}

/// Returns the exit code.
pub(crate) fn run(args: &Args) -> Result<i32> {
    cluster::require_root()?;
    if args.rotate {
        deps::ensure("rotate certificates", &rotate::NEEDS)?;
        build::agent(false)?;
        return rotate::run(args.json.as_deref());
    }
    let here = kernel::Kernel::this();
    let (place, why) = match (args.kernel, here.has_ktls()) {
        (Some(place), _) => (place, "as asked for"),
        (None, true) => (Where::Host, "it has kernel TLS"),
        (None, false) => (Where::V6_12, "this machine's kernel has no kernel TLS"),
    };
    let kernel = match place {
        Where::Host => {
            step::say(&format!("demo on this kernel, {} ({why}; {})", here.release, here.describe()));
            if !here.in_vm() {
                deps::ensure("run the demo", &cluster::NEEDS)?;
                build::agent(false)?;
            }
            return on_this_kernel(args, &here);
        }
        Where::V6_12 => Kernel::V6_12,
        Where::V6_1 => Kernel::V6_1,
    };
    step::say(&format!("demo in a VM with Debian's kernel {} ({why})", kernel.name()));
    if args.keep {
        return Err(Step::quiet("keeping the mesh").way_out("add --kernel host").fail("a VM's mesh ends with the VM"));
    }
    deps::ensure("run the demo", &cluster::NEEDS)?;
    in_vm(args, kernel, &build::agent(false)?)
}

/// Runs this very program inside, and fetches its results.
fn in_vm(args: &Args, kernel: Kernel, agent: &Path) -> Result<i32> {
    let program = env::current_exe().context("cannot find this program's own file")?;
    let results = workspace::vm_out().join(format!("demo-{}.json", kernel.name()));
    if results.exists() {
        // An old result must not be taken for the answer.
        fs::remove_file(&results).with_context(|| format!("cannot remove {}", results.display()))?;
    }
    let words = [program.as_os_str(), "demo".as_ref(), "--kernel".as_ref(), "host".as_ref(), "--json".as_ref()];
    let mut command: Vec<String> = words.iter().map(|word| word.to_string_lossy().into_owned()).collect();
    command.push(results.display().to_string());
    let mut vm = Vm::new(kernel);
    vm.timeout = VM_TIME;
    vm.env.push(("MARLINE_BIN".into(), agent.display().to_string()));
    let code = vm.run(&command)?;
    if let Some(file) = &args.json {
        fs::copy(&results, file)
            .with_context(|| format!("the VM left no results ({}) to copy to {}", results.display(), file.display()))?;
    }
    Ok(code)
}

fn on_this_kernel(args: &Args, kernel: &kernel::Kernel) -> Result<i32> {
    let spec = ClusterSpec { direct: Some(Direct::default()), ..ClusterSpec::pairs(Mode::Permissive).without_spares() };
    let signals = Signals::take()?;
    let step = Step::begin("making two nodes with their pods").way_out("cargo xtask down, then try again");
    let cluster = if args.keep {
        cluster::require_none()?;
        Cluster::create_lasting(cluster::NAME, Path::new(cluster::DIRECTORY), &spec)
    } else {
        Cluster::create(&spec)
    };
    let mut cluster = cluster.map_err(|error| step.fail(format!("{error:#}")))?;
    clean_up_when_interrupted(signals, vec![cluster.name().to_owned()]);
    let outcome = demonstrate(&mut cluster, kernel);
    let report = outcome.map_err(|error| {
        Step::quiet("the demo").way_out("the agents' logs are above").fail(format!("{}{error:#}", cluster.report()))
    })?;
    if let Some(file) = &args.json {
        fs::write(file, report.json()?).with_context(|| format!("cannot write {}", file.display()))?;
    }
    print!("{}", report.text());
    if args.keep {
        cluster::fill(&cluster)?;
        cluster::save(&cluster, &spec.pods)?;
        cluster::show(&cluster);
        step::say(&format!("the mesh stays up in mode {}; cargo xtask down removes it", cluster.mode().as_str()));
        cluster.stay();
    } else if !report.faults.is_empty() {
        eprintln!("{}", cluster.report());
    }
    Ok(i32::from(!report.faults.is_empty()))
}

fn demonstrate(cluster: &mut Cluster, kernel: &kernel::Kernel) -> Result<report::Report> {
    let capture = LinkCapture::start(cluster, &[flows::MARKER, flows::OUTSIDE])?;
    let step = Step::begin("starting an agent on each node").way_out("the agents' logs above tell why");
    cluster.start_agents().map_err(|error| step.fail(format!("{error:#}\n{}", cluster.report())))?;
    for side in Side::BOTH {
        step::note(&format!("node {}: {}", side.letter(), cluster.agent(side)?.announcement()));
    }
    let flows = flows::run(cluster)?;
    let wire = capture.finish()?;
    let tls_stat = report::tls_stat(cluster)?;
    Ok(report::judge(kernel, flows, &wire, tls_stat))
}

/// Namespaces and agents would outlive what was interrupted.
pub(crate) fn clean_up_when_interrupted(signals: Signals, clusters: Vec<String>) {
    thread::spawn(move || {
        loop {
            if let Some(signal) = signals.pending() {
                let interrupted = Interrupted(signal);
                step::note(&format!("{interrupted}: removing the mesh"));
                for error in clusters.iter().filter_map(|name| remains::remove(name).err()) {
                    step::report(&error);
                }
                std::process::exit(128 + signal as i32);
            }
            thread::sleep(Duration::from_millis(100));
        }
    });
}
