//! Becomes virtiofsd for one folder, or for a read-only view of the whole host. A process of its own, because the view needs a
//! mount namespace of its own.

use std::{
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
    sys::{prctl::set_pdeathsig, signal::Signal},
};

/// Debian's qemu-system-common brings it.
pub(crate) const VIRTIOFSD: &str = "/usr/lib/qemu/virtiofsd";

#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where to listen
    socket: PathBuf,
    /// Share this folder read-write
    #[arg(long, conflicts_with = "read_only_root")]
    folder: Option<PathBuf>,
    /// Share the host's root read-only, bound here
    #[arg(long)]
    read_only_root: Option<PathBuf>,
    /// A path that must be part of the root's view, whatever file system it is on
    #[arg(long)]
    keep: Vec<PathBuf>,
}

/// Becomes the command, as a process that dies with its parent: whatever kills the tool, no VM is left behind.
/// Returns only if it cannot.
pub(crate) fn become_tied(command: &[String]) -> Result<()> {
    let Some((program, arguments)) = command.split_first() else { bail!("no command") };
    die_with_parent()?;
    Err(Command::new(program).args(arguments).exec()).with_context(|| format!("cannot run {program}"))
}

/// Returns only if it cannot become virtiofsd.
pub(crate) fn run(args: &Args) -> Result<()> {
    die_with_parent()?;
    let (source, cache) = match (&args.folder, &args.read_only_root) {
        (Some(folder), _) => (folder, "auto"),
        (None, Some(at)) => {
            bind_root(at, &args.keep)?;
            // Nothing of the host is expected to change under a running guest, and asking each time is slow.
            (at, "always")
        }
        (None, None) => bail!("neither --folder nor --read-only-root"),
    };
    let source = source.to_str().context("a shared path is not UTF-8")?;
    if source.contains(',') {
        bail!("virtiofsd cannot share a path with a comma: {source}");
    }
    let mut command = Command::new(VIRTIOFSD);
    command.arg(format!("--socket-path={}", args.socket.display()));
    command.args([
        "-o",
        &format!("source={source}"),
        "-o",
        &format!("cache={cache}"),
        "-o",
        "sandbox=namespace",
        "-o",
        "log_level=err",
    ]);
    Err(command.exec()).with_context(|| format!("cannot run {VIRTIOFSD}"))
}

/// Survives exec.
fn die_with_parent() -> Result<()> {
    set_pdeathsig(Signal::SIGKILL).context("cannot tie the process to its parent")
}

/// Binds the root and the disks below it, each read-only. Not the pseudo file systems: the guest has its own.
fn bind_root(at: &Path, keep: &[PathBuf]) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).context("cannot make a mount namespace")?;
    mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>)
        .context("cannot make mounts private")?;
    let text = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    bind_read_only(Path::new("/"), at)?;
    for (point, kind) in mounts(&text) {
        if point == Path::new("/") || !shown(&point, &kind, keep) {
            continue;
        }
        let Ok(below) = point.strip_prefix("/") else { continue };
        // Hidden below another mount, or a file: not worth failing for, unless the checkout needs it.
        if let Err(error) = bind_read_only(&point, &at.join(below))
            && keep.iter().any(|path| path.starts_with(&point))
        {
            return Err(error);
        }
    }
    Ok(())
}

fn bind_read_only(from: &Path, to: &Path) -> Result<()> {
    let what = || format!("cannot bind {} read-only", from.display());
    mount(Some(from), to, None::<&str>, MsFlags::MS_BIND, None::<&str>).with_context(what)?;
    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, to, None::<&str>, flags, None::<&str>).with_context(what)
}

/// Disks are shown; of all others only what holds a path to keep.
fn shown(point: &Path, kind: &str, keep: &[PathBuf]) -> bool {
    const DISKS: [&str; 10] = ["ext2", "ext3", "ext4", "xfs", "btrfs", "zfs", "f2fs", "overlay", "virtiofs", "9p"];
    let containers = ["/var/lib/docker", "/var/lib/containers", "/var/lib/containerd", "/proc", "/sys", "/dev"];
    let hidden = containers.iter().any(|dir| point.starts_with(dir));
    (DISKS.contains(&kind) && !hidden) || (point != Path::new("/") && keep.iter().any(|path| path.starts_with(point)))
}

/// Mount points and kinds, in the order in which they were mounted.
fn mounts(mountinfo: &str) -> Vec<(PathBuf, String)> {
    let parse = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        Some((PathBuf::from(unescape(left.split(' ').nth(4)?)), right.split(' ').next()?.to_owned()))
    };
    mountinfo.lines().filter_map(parse).collect()
}

/// Blanks, tabs, newlines and backslashes are written as octal numbers.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_and_the_checkout_are_shown_and_pseudo_file_systems_are_not() {
        let text = "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:5 / /proc rw - proc proc rw\n3 1 8:2 / /my\\040disk rw,x shared:1 - xfs /dev/b rw\n\
                    4 1 0:7 / /tmp rw - tmpfs t rw\n5 1 0:8 / /var/lib/docker/o rw - overlay o rw\n";
        let shown_with = |keep: &[PathBuf]| -> Vec<PathBuf> {
            mounts(text).into_iter().filter(|(point, kind)| shown(point, kind, keep)).map(|(point, _)| point).collect()
        };
        assert_eq!(shown_with(&["/home/x".into()]), [PathBuf::from("/"), "/my disk".into()]);
        assert_eq!(shown_with(&["/tmp/checkout".into()]), [PathBuf::from("/"), "/my disk".into(), "/tmp".into()]);
    }
}
