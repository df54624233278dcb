//! `cargo xtask vm`: runs a command inside a stock Debian kernel, with the host's files at their own paths.
//! Fetching kernels is left to `kernel`, one boot to `machine`, the inside to `guest`.

pub(crate) mod guest;
mod initramfs;
pub(crate) mod kernel;
mod machine;
pub(crate) mod share;

use std::{
    env, fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use self::{
    guest::Spec,
    machine::{Accelerator, Machine, Outcome},
};
pub(crate) use self::{kernel::Kernel, machine::Sink};
use crate::{
    deps::{self, need},
    signals::Interrupted,
    step::{self, Step},
    workspace,
};

/// Exit codes beside the command's own; the same as those of timeout(1) and docker(1).
pub(crate) const EXIT_TIMEOUT: i32 = 124;
pub(crate) const EXIT_NO_VM: i32 = 125;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
The guest is a stock Debian kernel under QEMU (KVM where it works, else emulation; about 5 s to boot). It sees this machine's
files at their own paths, through a writable layer that is thrown away at the end. What shall come back must be written to
target/vm/out (also in $MARLINE_OUT), or to a folder given with --share. There is no network but lo. cgroup2 is at
/sys/fs/cgroup, bpffs at /sys/fs/bpf, and the modules tls, tcp_diag and inet_diag are loaded.

The command runs as root in the current folder. Of the environment it gets PATH, HOME, LANG, TERM, RUST_*, PROPTEST_*, the homes
of cargo and rustup, and MARLINE_*; MARLINE_VM holds the kernel's name. Its standard input is empty; standard output and error stay separate and
come as they are written. The exit code is the command's own (128+N if signal N killed it, 126 or 127 if it could not be
started), 124 after --timeout, 125 if the VM itself failed. The console of the last boot is in target/vm/console-KERNEL.log.

Kernels are fetched once; remove target/vm/KERNEL to get the newest build.

  cargo xtask vm -- uname -r
  cargo xtask vm --kernel 6.1 -- sh -c 'modprobe dummy && ip link add d0 type dummy && ip link'
  cargo xtask vm -- sh -c 'dmesg > $MARLINE_OUT/dmesg.txt'")]
pub(crate) struct Args {
    /// Which of Debian's kernels
    #[arg(long, value_enum, default_value = "6.12")]
    kernel: Kernel,
    /// Processors of the guest [default: those of this machine, at most 4]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=64))]
    cpus: Option<u32>,
    /// Memory of the guest in MiB [default: half of this machine's, at most 4096]
    #[arg(long, value_parser = clap::value_parser!(u32).range(256..))]
    memory: Option<u32>,
    /// Seconds until the VM is stopped, with exit code 124
    #[arg(long, default_value_t = 1800)]
    timeout: u64,
    /// Count instructions instead of time: repeatable to about 1 %, one processor, slow
    #[arg(long)]
    icount: bool,
    /// A further folder that is read-write at the same path in the guest
    #[arg(long)]
    share: Vec<PathBuf>,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// Runs the command line's command and returns the exit code.
pub(crate) fn run(args: &Args) -> Result<i32> {
    let mut vm = Vm::new(args.kernel);
    vm.cpus = args.cpus.unwrap_or(vm.cpus);
    vm.memory_mib = args.memory.unwrap_or(vm.memory_mib);
    vm.timeout = Duration::from_secs(args.timeout);
    vm.icount = args.icount;
    vm.shares.extend(args.share.iter().cloned());
    vm.run(&args.command)
}

/// A VM to run commands in, for other commands of this tool.
pub(crate) struct Vm {
    pub kernel: Kernel,
    pub cpus: u32,
    pub memory_mib: u32,
    pub timeout: Duration,
    pub icount: bool,
    /// Folders that are read-write at the same path; they are made if they do not exist. `target/vm/out` always is one.
    pub shares: Vec<PathBuf>,
    /// Added to the environment that is passed on anyway.
    pub env: Vec<(String, String)>,
    pub cwd: PathBuf,
}

impl Vm {
    pub(crate) fn new(kernel: Kernel) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, |n| u32::try_from(n.get()).unwrap_or(1)).min(4);
        Self {
            kernel,
            cpus,
            memory_mib: (host_memory_mib() / 2).clamp(512, 4096),
            timeout: Duration::from_secs(1800),
            icount: false,
            shares: vec![workspace::vm_out()],
            env: Vec::new(),
            cwd: env::current_dir().unwrap_or_else(|_| workspace::root()),
        }
    }

    /// Runs the command with its output on our own, and returns the exit code.
    pub(crate) fn run(&self, command: &[String]) -> Result<i32> {
        self.run_into(command, Box::new(io::stdout()), Box::new(io::stderr()))
    }

    /// Runs the command with its output where the caller wants it.
    pub(crate) fn run_into(&self, command: &[String], out: Sink, err: Sink) -> Result<i32> {
        workspace::require_x86_64()?;
        prepare()?;
        let boot = Boot { kernel: kernel::prepare(self.kernel)?, busybox: kernel::busybox()? };
        let accelerator = if self.icount { Accelerator::Counted } else { self.accelerator(&boot)? };
        let how = match accelerator {
            Accelerator::Kvm => "KVM",
            Accelerator::Tcg => "emulated",
            Accelerator::Counted => "emulated, counting instructions",
        };
        let step = Step::begin(format!("booting {} ({how}, {} MiB)", boot.kernel.release, self.memory_mib));
        let started = Instant::now();
        let outcome = self
            .boot(&boot, accelerator, command, self.timeout, out, err)
            .map_err(|error| step.fail(format!("{error:#}")))?;
        match outcome {
            Outcome::Exit(code) => Ok(code),
            Outcome::TimedOut => {
                step::note(&format!(
                    "the command did not end within {} s: VM stopped (see --timeout)",
                    started.elapsed().as_secs()
                ));
                Ok(EXIT_TIMEOUT)
            }
            Outcome::Interrupted(signal) => Err(Interrupted(signal).into()),
            // As if SIGPIPE had killed us.
            Outcome::NobodyListens => Ok(141),
            Outcome::Died(said) => {
                let console = tail(&self.console(), 30);
                // The next boot overwrites it.
                let kept = self.console().with_extension("died.log");
                let kept = fs::copy(self.console(), &kept).map_or_else(|_| self.console(), |_| kept);
                let way = format!("look at {}; kernel and image are renewed by removing target/vm", kept.display());
                Err(step.way_out(way).fail(format!("{said}\n{console}")))
            }
        }
    }

    fn boot(
        &self,
        boot: &Boot,
        accelerator: Accelerator,
        command: &[String],
        timeout: Duration,
        out: Sink,
        err: Sink,
    ) -> Result<Outcome> {
        for share in &self.shares {
            fs::create_dir_all(share).with_context(|| format!("cannot create {}", share.display()))?;
        }
        let spec = self.spec(boot, command)?;
        let modules = boot.kernel.module_files(&["virtio_pci", "virtiofs"])?;
        let init = env::current_exe().context("cannot find this program's own file")?;
        let initramfs = initramfs::build(&boot.busybox, &modules, &init, &serde_json::to_string(&spec)?)?;
        let machine = Machine {
            accelerator,
            cpus: self.cpus,
            memory_mib: self.memory_mib,
            image: &boot.kernel.image(),
            initramfs: &initramfs,
            spec: &spec,
            timeout,
            console: &self.console(),
        };
        machine.run(out, err)
    }

    fn spec(&self, boot: &Boot, command: &[String]) -> Result<Spec> {
        let absolute = |path: &Path| fs::canonicalize(path).with_context(|| format!("cannot find {}", path.display()));
        let mut shares = Vec::new();
        for (number, path) in self.shares.iter().enumerate() {
            shares.push((format!("share{number}"), absolute(path)?));
        }
        let mut keep = vec![workspace::root(), workspace::target(), self.cwd.clone()];
        keep.push(env::current_exe().context("cannot find this program's own file")?);
        keep.extend(
            ["HOME", "CARGO_HOME", "RUSTUP_HOME", "CARGO_TARGET_DIR"].iter().filter_map(env::var_os).map(PathBuf::from),
        );
        keep.extend(shares.iter().map(|(_, path)| path.clone()));
        keep.retain(|path| path.is_absolute());
        let mut environment = passed_on(env::vars());
        environment.push(("MARLINE_VM".into(), self.kernel.name().into()));
        environment.push(("MARLINE_OUT".into(), workspace::vm_out().display().to_string()));
        environment.extend(self.env.iter().cloned());
        Ok(Spec {
            kernel: self.kernel.name().into(),
            release: boot.kernel.release.clone(),
            kernel_root: boot.kernel.root.clone(),
            command: command.to_vec(),
            env: environment,
            cwd: self.cwd.clone(),
            keep,
            shares,
        })
    }

    fn console(&self) -> PathBuf {
        workspace::vm().join(format!("console-{}.log", self.kernel.name()))
    }

    /// What the kernel said of its own end, in a line, if it did.
    pub(crate) fn last_words(&self) -> Option<String> {
        let said = last_words(&String::from_utf8_lossy(&fs::read(self.console()).unwrap_or_default()));
        Some(said).filter(|said| !said.is_empty())
    }

    /// /dev/kvm may exist and still not run a stock kernel: try once, and remember the answer.
    fn accelerator(&self, boot: &Boot) -> Result<Accelerator> {
        if fs::OpenOptions::new().read(true).write(true).open("/dev/kvm").is_err() {
            return Ok(Accelerator::Tcg);
        }
        let file = workspace::vm().join(format!("kvm-{}", self.kernel.name()));
        let host = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
        let known = fs::read_to_string(&file).unwrap_or_default();
        let answer = |works: bool| {
            format!("{}\n{} on {host}", if works { "works" } else { "does not work" }, boot.kernel.release)
        };
        for works in [true, false] {
            if known == answer(works) {
                return Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg });
            }
        }
        step::say(&format!("trying whether KVM runs {} here", boot.kernel.release));
        let outcome = self.boot(
            boot,
            Accelerator::Kvm,
            &["true".into()],
            Duration::from_secs(20),
            Box::new(io::sink()),
            Box::new(io::sink()),
        )?;
        if let Outcome::Interrupted(signal) = outcome {
            return Err(Interrupted(signal).into());
        }
        let works = outcome == Outcome::Exit(0);
        fs::write(&file, answer(works)).with_context(|| format!("cannot write {}", file.display()))?;
        if !works {
            step::note("KVM does not run it: emulating from now on");
        }
        Ok(if works { Accelerator::Kvm } else { Accelerator::Tcg })
    }
}

/// Installs what a VM needs.
pub(crate) fn prepare() -> Result<()> {
    deps::ensure("run a VM", &NEEDS)
}

/// The release of the kernel that would be booted, fetched if it is not there.
pub(crate) fn release(kernel: Kernel) -> Result<String> {
    Ok(kernel::prepare(kernel)?.release)
}

const NEEDS: [deps::Need; 4] = [
    need("qemu-system-x86_64", "qemu-system-x86"),
    need(share::VIRTIOFSD, "qemu-system-common"),
    need("/sbin/modprobe", "kmod"),
    need("ip", "iproute2"),
];

/// What one boot is made from.
struct Boot {
    kernel: kernel::Unpacked,
    busybox: PathBuf,
}

/// The guest's environment: enough to run Rust programs, little enough to be the same everywhere.
fn passed_on(all: impl Iterator<Item = (String, String)>) -> Vec<(String, String)> {
    const NAMES: [&str; 8] = ["HOME", "LANG", "TERM", "USER", "LOGNAME", "CARGO_HOME", "RUSTUP_HOME", "NO_COLOR"];
    const PREFIXES: [&str; 3] = ["MARLINE_", "RUST_", "PROPTEST_"];
    let mut passed = Vec::new();
    for (name, value) in all {
        if name == "PATH" {
            passed.push((name, format!("{value}:/usr/local/sbin:/usr/sbin:/sbin:/usr/bin:/bin")));
        } else if NAMES.contains(&name.as_str()) || PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            passed.push((name, value));
        }
    }
    passed
}

fn host_memory_mib() -> u32 {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemTotal:")?.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok());
    kib.map_or(2048, |kib| u32::try_from(kib / 1024).unwrap_or(u32::MAX))
}

/// What names the fault, where it was, and the way to it; without the times that stand before each line.
fn last_words(console: &str) -> String {
    const NAMING: [&str; 6] =
        ["BUG: ", "Oops: ", "general protection fault", "RIP: 0010:", "Out of memory", "Kernel panic"];
    let lines = console.lines().map(|line| line.split_once("] ").map_or(line, |(_, text)| text).trim());
    let mut said: Vec<&str> = Vec::new();
    for line in lines.filter(|line| NAMING.iter().any(|name| line.contains(name))) {
        if !said.contains(&line) && said.len() < 8 {
            said.push(line);
        }
    }
    said.join("; ")
}

fn tail(file: &Path, lines: usize) -> String {
    let bytes = fs::read(file).unwrap_or_default();
    let text = String::from_utf8_lossy(&bytes);
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].iter().map(|line| format!("    | {line}\n")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_environment_that_is_meant_for_the_guest_is_passed_on() {
        let all = [
            ("PATH", "/a"),
            ("MARLINE_X", "1"),
            ("AWS_SECRET", "s"),
            ("RUST_LOG", "debug"),
            ("CARGO_PKG_NAME", "xtask"),
        ];
        let passed = passed_on(all.into_iter().map(|(name, value)| (name.to_owned(), value.to_owned())));
        let names: Vec<&str> = passed.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(names, ["PATH", "MARLINE_X", "RUST_LOG"]);
        assert!(passed[0].1.starts_with("/a:") && passed[0].1.contains("/sbin"));
    }

    #[test]
    fn a_kernels_last_words_name_fault_and_place_once() {
        let console = "[   12.000000] tls: loaded\r\n\
            [  801.100000] BUG: kernel NULL pointer dereference, address: 0000000000000028\r\n\
            [  801.100001] #PF: supervisor read access in kernel mode\r\n\
            [  801.100002] Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI\r\n\
            [  801.100003] RIP: 0010:tls_sw_sendmsg+0x12/0x80 [tls]\r\n\
            [  801.100004] RIP: 0010:tls_sw_sendmsg+0x12/0x80 [tls]\r\n\
            [  801.100005] Kernel panic - not syncing: Fatal exception\r\n";
        let said = last_words(console);
        assert_eq!(
            said,
            "BUG: kernel NULL pointer dereference, address: 0000000000000028; Oops: Oops: 0000 [#1] PREEMPT SMP NOPTI; \
             RIP: 0010:tls_sw_sendmsg+0x12/0x80 [tls]; Kernel panic - not syncing: Fatal exception"
        );
        assert_eq!(last_words(""), "");
    }
}
