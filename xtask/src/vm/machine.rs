//! One boot: QEMU, the daemons that share folders with it, the sockets that its output comes through, and how it ends.
//! What the guest does is left to `guest`, what to run and where its output goes to the caller.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::{fs::DirBuilderExt, net::UnixListener, process::CommandExt},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{self, Receiver, RecvTimeoutError, Sender},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;

use super::{
    guest::{self, Spec},
    initramfs,
};
use crate::{signals::Signals, step::describe};

/// How the processor of the guest is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Accelerator {
    Kvm,
    Tcg,
    /// Guest time counts executed instructions: one processor, slow, repeatable.
    Counted,
}

/// Everything that one boot needs.
pub(crate) struct Machine<'a> {
    pub accelerator: Accelerator,
    pub cpus: u32,
    pub memory_mib: u32,
    pub image: &'a Path,
    pub initramfs: &'a [u8],
    pub spec: &'a Spec,
    pub timeout: Duration,
    /// Where the guest's console goes.
    pub console: &'a Path,
}

/// How a boot ended.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    Exit(i32),
    TimedOut,
    Interrupted(Signal),
    /// Whoever read our output has gone.
    NobodyListens,
    /// QEMU ended before the command did; what it said.
    Died(String),
}

/// Where a stream of the guest's command goes.
pub(crate) type Sink = Box<dyn Write + Send>;

impl Machine<'_> {
    pub(crate) fn run(&self, out: Sink, err: Sink) -> Result<Outcome> {
        // Before the first thread, so that all of them leave these signals to us.
        let signals = Signals::take()?;
        let dir = RunDir::create()?;
        let (events, inbox) = mpsc::channel();
        let mut relays = vec![
            relay(&dir.0, guest::PORT_OUT, out, events.clone())?,
            relay(&dir.0, guest::PORT_ERR, err, events.clone())?,
        ];
        exit_code(&dir.0, events)?;
        let _shares = self.share(&dir.0, &signals)?;
        fs::write(dir.0.join("initramfs"), self.initramfs).context("cannot write the initramfs")?;
        let log = dir.0.join("qemu.log");
        let mut command = self.qemu(&dir.0)?;
        let file = File::create(&log).context("cannot create QEMU's log")?;
        command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("cannot share QEMU's log")?)
            .stderr(file)
            .process_group(0);
        let child = signals.spawn(&mut command).with_context(|| format!("cannot start {}", describe(&command)))?;
        let mut qemu = Guarded(child);
        let outcome = self.watch(&mut qemu, &inbox, &signals)?;
        drop(qemu);
        // The sockets are closed now. What is in them still belongs to the caller, unless the caller wants out.
        if !matches!(outcome, Outcome::NobodyListens | Outcome::Interrupted(_)) {
            for relay in relays.drain(..) {
                let _ = relay.join();
            }
        }
        Ok(match outcome {
            Outcome::Died(how) => Outcome::Died(format!("{how}{}", fs::read_to_string(log).unwrap_or_default())),
            outcome => outcome,
        })
    }

    fn watch(&self, qemu: &mut Guarded, inbox: &Receiver<Event>, signals: &Signals) -> Result<Outcome> {
        let end = Instant::now() + self.timeout;
        loop {
            match inbox.recv_timeout(Duration::from_millis(50)) {
                Ok(Event::Exit(code)) => return Ok(Outcome::Exit(code)),
                Ok(Event::NobodyListens) => return Ok(Outcome::NobodyListens),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => {}
            }
            if let Some(signal) = signals.pending() {
                return Ok(Outcome::Interrupted(signal));
            }
            if let Some(status) = qemu.0.try_wait().context("cannot wait for QEMU")? {
                // The code may have come between the two looks.
                return Ok(match inbox.recv_timeout(Duration::from_millis(200)) {
                    Ok(Event::Exit(code)) => Outcome::Exit(code),
                    _ => Outcome::Died(format!("QEMU ended by itself ({status}). ")),
                });
            }
            if Instant::now() >= end {
                return Ok(Outcome::TimedOut);
            }
        }
    }

    fn share(&self, dir: &Path, signals: &Signals) -> Result<Vec<Guarded>> {
        let mut keep: Vec<&Path> = self.spec.keep.iter().map(PathBuf::as_path).collect();
        keep.sort_unstable();
        let mut daemons = Vec::new();
        let mount_point = dir.join("root");
        fs::create_dir(&mount_point).context("cannot create the mount point of the root share")?;
        let mut root = share_command(dir, initramfs::ROOT_TAG)?;
        root.arg("--read-only-root").arg(&mount_point);
        for path in keep {
            root.arg("--keep").arg(path);
        }
        daemons.push(daemon(dir, root, signals)?);
        for (tag, path) in &self.spec.shares {
            let mut share = share_command(dir, tag)?;
            share.arg("--folder").arg(path);
            daemons.push(daemon(dir, share, signals)?);
        }
        let tags = self.spec.shares.iter().map(|(tag, _)| tag.as_str()).chain([initramfs::ROOT_TAG]);
        for tag in tags {
            wait_for_socket(dir, tag, &mut daemons)?;
        }
        Ok(daemons)
    }

    fn qemu(&self, dir: &Path) -> Result<Command> {
        let mut command = this_program("vm-tied")?;
        command.arg("qemu-system-x86_64");
        // q35: the microvm machine hangs with these kernels.
        command.args(["-M", "q35", "-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"]);
        // Without the wide vector units: emulating them costs more than they save.
        let narrow = "max,-vaes,-avx,-avx2";
        match self.accelerator {
            Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
            Accelerator::Tcg => command.args(["-accel", "tcg,thread=multi", "-cpu", narrow]),
            Accelerator::Counted => {
                // `rep movsb` counts each byte: with it a copy would seem to cost more than encryption.
                let cpu = format!("{narrow},-erms,-fsrm");
                command.args(["-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off", "-cpu"]).arg(cpu)
            }
        };
        let cpus = if self.accelerator == Accelerator::Counted { 1 } else { self.cpus };
        command.arg("-smp").arg(cpus.to_string()).arg("-m").arg(format!("{}M", self.memory_mib));
        // virtiofs reads and writes guest memory from another process.
        command.arg("-object").arg(format!("memory-backend-memfd,id=mem,size={}M,share=on", self.memory_mib));
        command.args(["-numa", "node,memdev=mem", "-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        let tags = self.spec.shares.iter().map(|(tag, _)| tag.as_str()).chain([initramfs::ROOT_TAG]);
        for tag in tags {
            command.arg("-chardev").arg(format!("socket,id={tag},path={}", socket(dir, tag).display()));
            command.arg("-device").arg(format!("vhost-user-fs-pci,chardev={tag},tag={tag},queue-size=1024"));
        }
        for port in [guest::PORT_OUT, guest::PORT_ERR, guest::PORT_EXIT] {
            command.arg("-chardev").arg(format!("socket,id={port},path={}", socket(dir, port).display()));
            command.arg("-device").arg(format!("virtserialport,chardev={port},name={port}"));
        }
        command.arg("-serial").arg(format!("file:{}", self.console.display()));
        command.arg("-kernel").arg(self.image).arg("-initrd").arg(dir.join("initramfs"));
        // An oops ends the guest: a test must not pass on a kernel that has lost its footing.
        command.arg("-append").arg(
            "console=ttyS0 quiet loglevel=4 panic=-1 oops=panic mitigations=off nokaslr audit=0 apparmor=0 \
             random.trust_cpu=on tsc=reliable no_timer_check net.ifnames=0 cgroup_no_v1=all",
        );
        Ok(command)
    }
}

enum Event {
    Exit(i32),
    NobodyListens,
}

/// A private folder for sockets: their paths are limited to some 100 bytes, which a checkout's path may exceed.
struct RunDir(PathBuf);

impl RunDir {
    fn create() -> Result<Self> {
        for attempt in 0..100 {
            let dir = PathBuf::from(format!("/tmp/marline-vm-{}-{attempt}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&dir) {
                Ok(()) => return Ok(Self(dir)),
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => return Err(error).with_context(|| format!("cannot create {}", dir.display())),
            }
        }
        bail!("/tmp is full of old marline-vm-* folders: remove them")
    }
}

impl Drop for RunDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// A child that does not outlive us.
struct Guarded(Child);

impl Drop for Guarded {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

const DAEMON_LOG: &str = "virtiofsd.log";

fn socket(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("{name}.sock"))
}

fn listen(dir: &Path, port: &str) -> Result<UnixListener> {
    let path = socket(dir, port);
    UnixListener::bind(&path).with_context(|| format!("cannot listen on {}", path.display()))
}

/// Copies a port's bytes to the sink as they come.
fn relay(dir: &Path, port: &str, mut sink: Sink, events: Sender<Event>) -> Result<JoinHandle<()>> {
    let listener = listen(dir, port)?;
    Ok(thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let mut buffer = vec![0; 64 * 1024];
        loop {
            match stream.read(&mut buffer) {
                Ok(0) => return,
                Ok(count) => {
                    if sink.write_all(&buffer[..count]).and_then(|()| sink.flush()).is_err() {
                        let _ = events.send(Event::NobodyListens);
                        return;
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => return,
            }
        }
    }))
}

/// Waits for the line with the exit code.
fn exit_code(dir: &Path, events: Sender<Event>) -> Result<()> {
    let listener = listen(dir, guest::PORT_EXIT)?;
    thread::spawn(move || {
        let Ok((mut stream, _)) = listener.accept() else { return };
        let mut text = Vec::new();
        let mut byte = [0];
        while let Ok(1) = stream.read(&mut byte) {
            if byte[0] != b'\n' {
                text.push(byte[0]);
            } else if let Some(code) =
                String::from_utf8(std::mem::take(&mut text)).ok().and_then(|text| text.parse().ok())
            {
                let _ = events.send(Event::Exit(code));
            }
        }
    });
    Ok(())
}

fn share_command(dir: &Path, tag: &str) -> Result<Command> {
    let mut command = this_program("vm-share")?;
    command.arg(socket(dir, tag));
    Ok(command)
}

fn this_program(subcommand: &str) -> Result<Command> {
    let mut command = Command::new(std::env::current_exe().context("cannot find this program's own file")?);
    command.arg(subcommand);
    Ok(command)
}

fn daemon(dir: &Path, mut command: Command, signals: &Signals) -> Result<Guarded> {
    // It complains whenever QEMU goes first, which here is always.
    let log = File::options()
        .create(true)
        .append(true)
        .open(dir.join(DAEMON_LOG))
        .context("cannot create virtiofsd's log")?;
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).process_group(0);
    Ok(Guarded(signals.spawn(&mut command).with_context(|| format!("cannot start {}", describe(&command)))?))
}

fn wait_for_socket(dir: &Path, tag: &str, daemons: &mut [Guarded]) -> Result<()> {
    let path = socket(dir, tag);
    let said = || fs::read_to_string(dir.join(DAEMON_LOG)).unwrap_or_default();
    let end = Instant::now() + Duration::from_secs(20);
    while !path.exists() {
        for daemon in daemons.iter_mut() {
            if let Some(status) = daemon.0.try_wait().context("cannot wait for virtiofsd")? {
                bail!("virtiofsd ended at once ({status}); sharing folders with the VM needs root. {}", said());
            }
        }
        if Instant::now() > end {
            bail!("virtiofsd did not open {} within 20 s. {}", path.display(), said());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
