//! Process 1 of the guest: makes a writable, Debian-like system from the host's files, runs the command, and reports its
//! output and exit code over virtio serial ports. Runs inside the VM only; `machine` holds the other ends.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::{fs::symlink, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::{
    errno::Errno,
    mount::{MsFlags, mount},
    sys::{
        resource::{RLIM_INFINITY, Resource, setrlimit},
        signal::{Signal, kill},
        wait::{WaitStatus, wait},
    },
    unistd::{Pid, chroot, sync},
};
use serde::{Deserialize, Serialize};

/// Orders for the guest.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Spec {
    /// What the user calls the kernel: 6.12 or 6.1.
    pub kernel: String,
    pub release: String,
    /// The unpacked kernel package on the host.
    pub kernel_root: PathBuf,
    pub command: Vec<String>,
    pub env: Vec<(String, String)>,
    pub cwd: PathBuf,
    /// Folders that must not disappear under a fresh /tmp or /run.
    pub keep: Vec<PathBuf>,
    /// virtiofs tag and path of each folder that is shared read-write.
    pub shares: Vec<(String, PathBuf)>,
}

/// Names of the serial ports.
pub(crate) const PORT_OUT: &str = "marline.out";
pub(crate) const PORT_ERR: &str = "marline.err";
pub(crate) const PORT_EXIT: &str = "marline.exit";

/// Codes of the shell for a command that cannot be run.
const NOT_EXECUTABLE: i32 = 126;
const NOT_FOUND: i32 = 127;

/// Never returns: the VM ends, one way or the other.
pub(crate) fn main(spec: &Path) -> ! {
    if let Err(error) = run(spec) {
        // The console is the only place left to complain to.
        eprintln!("marline-vm: {error:#}");
    }
    sync();
    let _ = fs::write("/proc/sysrq-trigger", "o");
    loop {
        thread::sleep(Duration::from_secs(60));
    }
}

fn run(spec: &Path) -> Result<()> {
    let text = fs::read_to_string(spec).with_context(|| format!("cannot read {}", spec.display()))?;
    let spec: Spec = serde_json::from_str(&text).context("cannot understand the orders")?;
    writable_root(&spec)?;
    file_systems(&spec)?;
    prepare();
    let mut exit = port(PORT_EXIT)?;
    let code = command(&spec)?;
    // The host stops the machine as soon as it knows the code: what was written to the shares must be there by then.
    sync();
    writeln!(exit, "{code}").context("cannot report the exit code")
}

/// A tmpfs over the host's root, so that the whole system is writable and nothing of it comes back.
fn writable_root(spec: &Spec) -> Result<()> {
    virtual_fs("proc", "/proc", "")?;
    virtual_fs("sysfs", "/sys", "")?;
    virtual_fs("tmpfs", "/run", "mode=755,size=100%")?;
    // This early there is only the host's view of the modules, below the checkout.
    modprobe(Some(&spec.kernel_root), &["overlay"])?;
    for dir in ["/run/upper", "/run/work", "/run/root"] {
        fs::create_dir(dir).with_context(|| format!("cannot create {dir}"))?;
    }
    let options = "lowerdir=/,upperdir=/run/upper,workdir=/run/work";
    mount(Some("overlay"), "/run/root", Some("overlay"), MsFlags::empty(), Some(options))
        .context("cannot mount the overlay")?;
    for dir in ["proc", "sys", "dev"] {
        let (from, to) = (format!("/{dir}"), format!("/run/root/{dir}"));
        let _ = fs::create_dir(&to);
        mount(Some(from.as_str()), to.as_str(), None::<&str>, MsFlags::MS_MOVE, None::<&str>)
            .with_context(|| format!("cannot move {from}"))?;
    }
    std::env::set_current_dir("/run/root").context("cannot enter the overlay")?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).context("cannot make the overlay the root")?;
    chroot(".").context("cannot chroot into the overlay")?;
    std::env::set_current_dir("/").context("cannot enter /")
}

fn file_systems(spec: &Spec) -> Result<()> {
    for dir in ["/dev/pts", "/dev/shm"] {
        let _ = fs::create_dir(dir);
    }
    virtual_fs("devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666")?;
    virtual_fs("tmpfs", "/dev/shm", "mode=1777")?;
    for (link, to) in
        [("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "fd/0"), ("/dev/stdout", "fd/1"), ("/dev/stderr", "fd/2")]
    {
        let _ = symlink(to, link);
    }
    for (dir, options) in [("/tmp", "mode=1777,size=100%"), ("/run", "mode=755,size=100%")] {
        // A checkout below /tmp must stay visible; there the overlay, which is writable as well, has to do.
        if !spec.keep.iter().any(|path| path.starts_with(dir)) {
            virtual_fs("tmpfs", dir, options)?;
        }
    }
    for dir in ["/run/netns", "/run/lock"] {
        let _ = fs::create_dir_all(dir);
    }
    // As systemd does it: nobody moves a process out of a cgroup namespace.
    virtual_fs("cgroup2", "/sys/fs/cgroup", "nsdelegate")?;
    virtual_fs("bpf", "/sys/fs/bpf", "")?;
    virtual_fs("tracefs", "/sys/kernel/tracing", "")?;
    let modules = format!("/lib/modules/{}", spec.release);
    fs::create_dir_all(&modules).with_context(|| format!("cannot create {modules}"))?;
    let from = spec.kernel_root.join("lib/modules").join(&spec.release);
    mount(Some(&from), modules.as_str(), None::<&str>, MsFlags::MS_BIND, None::<&str>)
        .context("cannot bind the modules")?;
    let config = format!("boot/config-{}", spec.release);
    let _ = fs::create_dir_all("/boot");
    let _ = fs::copy(spec.kernel_root.join(&config), Path::new("/").join(&config));
    for (tag, path) in &spec.shares {
        fs::create_dir_all(path).with_context(|| format!("cannot create {}", path.display()))?;
        mount(Some(tag.as_str()), path, Some("virtiofs"), MsFlags::empty(), None::<&str>)
            .with_context(|| format!("cannot mount the share {}", path.display()))?;
    }
    Ok(())
}

/// Comforts whose absence the command will notice by itself, if it needs them.
fn prepare() {
    let complain = |what: &str, result: Result<()>| {
        if let Err(error) = result {
            eprintln!("marline-vm: {what}: {error:#}");
        }
    };
    // The rest (veth, dummy, sch_*, nf_tables, …) the kernel loads when it is asked for.
    complain("loading modules", modprobe(None, &["virtio_console", "virtio_rng", "tls", "tcp_diag", "inet_diag"]));
    complain("host name", fs::write("/proc/sys/kernel/hostname", "marline-vm").map_err(Into::into));
    let up = Command::new("ip").args(["link", "set", "lo", "up"]).status();
    complain("lo up", up.map(drop).map_err(Into::into));
    // As generous as a service manager's limits, so that a leak test can hold 10,000 connections.
    complain("file limit", setrlimit(Resource::RLIMIT_NOFILE, 1 << 20, 1 << 20).map_err(Into::into));
    complain("memlock limit", setrlimit(Resource::RLIMIT_MEMLOCK, RLIM_INFINITY, RLIM_INFINITY).map_err(Into::into));
}

/// Runs the command to its end and returns its exit code as a shell would.
fn command(spec: &Spec) -> Result<i32> {
    let (out, mut err) = (port(PORT_OUT)?, port(PORT_ERR)?);
    let Some((program, arguments)) = spec.command.split_first() else { return Ok(0) };
    let mut command = Command::new(program);
    command.args(arguments).env_clear().envs(spec.env.iter().cloned()).current_dir(&spec.cwd);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).process_group(0);
    let mut child = match command.spawn() {
        Ok(child) => child,
        Err(error) => {
            let _ = writeln!(err, "{program}: {error}");
            return Ok(if error.kind() == io::ErrorKind::NotFound { NOT_FOUND } else { NOT_EXECUTABLE });
        }
    };
    // Pipes, not the ports themselves: a port can be opened once only, and each write to it costs a trip to the host.
    let copies = [
        child.stdout.take().map(|from| thread::spawn(move || copy(from, out))),
        child.stderr.take().map(|from| thread::spawn(move || copy(from, err))),
    ];
    let code = reap_until(Pid::from_raw(i32::try_from(child.id()).context("impossible process id")?))?;
    // What the command left behind would keep the pipes open. As process 1 we reach everything but ourselves.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    for copy in copies.into_iter().flatten() {
        let _ = copy.join();
    }
    Ok(code)
}

/// Orphans come to process 1; they are reaped on the way.
fn reap_until(child: Pid) -> Result<i32> {
    loop {
        match wait() {
            Ok(WaitStatus::Exited(pid, code)) if pid == child => return Ok(code),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == child => return Ok(128 + signal as i32),
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error).context("cannot wait for the command"),
        }
    }
}

fn copy(mut from: impl Read, mut to: File) {
    // The port takes up to 32 KiB at once.
    let mut buffer = vec![0; 32 * 1024];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return,
            Ok(count) => {
                if to.write_all(&buffer[..count]).is_err() {
                    return;
                }
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return,
        }
    }
}

/// Opens a port by its name. The host announces names shortly after the driver is there, so wait for it.
fn port(name: &str) -> Result<File> {
    for _ in 0..500 {
        for entry in fs::read_dir("/sys/class/virtio-ports").into_iter().flatten().flatten() {
            let named = fs::read_to_string(entry.path().join("name")).unwrap_or_default();
            if named.trim() == name
                && let Ok(file) = OpenOptions::new().write(true).open(Path::new("/dev").join(entry.file_name()))
            {
                return Ok(file);
            }
        }
        thread::sleep(Duration::from_millis(10));
    }
    anyhow::bail!("there is no serial port {name}")
}

fn virtual_fs(kind: &str, at: &str, options: &str) -> Result<()> {
    mount(Some(kind), at, Some(kind), MsFlags::empty(), Some(options))
        .with_context(|| format!("cannot mount {kind} at {at}"))
}

fn modprobe(base: Option<&Path>, modules: &[&str]) -> Result<()> {
    let mut command = Command::new("/sbin/modprobe");
    command.arg("-a").stdin(Stdio::null());
    if let Some(base) = base {
        command.arg("-d").arg(base);
    }
    let status = command.args(modules).status().context("cannot run modprobe")?;
    anyhow::ensure!(status.success(), "modprobe {} failed: {status}", modules.join(" "));
    Ok(())
}
