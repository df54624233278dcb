//! Network namespaces by name: made, entered, listed and removed. What is inside of them is `cluster`'s matter.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// Where `ip netns` keeps its names.
pub const DIRECTORY: &str = "/run/netns";

#[must_use]
pub fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// Makes a namespace whose addresses are usable at once: no duplicate address detection, and loopback is up.
pub fn create(name: &str) -> Result<()> {
    run(Command::new("ip").args(["netns", "add", name]))?;
    inside(&path(name), || -> io::Result<()> {
        for file in ["ipv6/conf/all/disable_ipv6", "ipv6/conf/default/disable_ipv6", "ipv6/conf/default/accept_dad"] {
            sysctl(file, "0")?;
        }
        Ok(())
    })?
    .with_context(|| format!("preparing the network namespace {name}"))?;
    run(Command::new("ip").args(["-n", name, "link", "set", "lo", "up"]))
}

/// Removes a namespace; that it is not there is not an error.
pub fn remove(name: &str) -> Result<()> {
    if path(name).exists() { run(Command::new("ip").args(["netns", "del", name])) } else { Ok(()) }
}

/// All names, sorted.
#[must_use]
pub fn list() -> Vec<String> {
    let entries = fs::read_dir(DIRECTORY).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.filter_map(|entry| entry.file_name().into_string().ok()).collect();
    names.sort();
    names
}

/// Writes a setting below /proc/sys/net for the namespace that the calling thread is in.
pub fn sysctl(file: &str, value: &str) -> io::Result<()> {
    fs::write(Path::new("/proc/sys/net").join(file), value)
}

/// Runs `work` on a thread of its own inside the namespace. Sockets made there stay there.
pub fn inside<T: Send>(netns: &Path, work: impl FnOnce() -> T + Send) -> Result<T> {
    let handle = File::open(netns).with_context(|| format!("opening the network namespace {}", netns.display()))?;
    thread::scope(|scope| {
        scope
            .spawn(move || -> Result<T> {
                setns(&handle, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("entering the network namespace {}", netns.display()))?;
                Ok(work())
            })
            .join()
            .unwrap_or_else(|_| Err(anyhow!("the thread inside {} panicked", netns.display())))
    })
}

/// Runs a command to its end and fails with its own words.
pub fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("starting {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} failed ({}): {}", output.status, String::from_utf8_lossy(&output.stderr).trim());
    }
    Ok(())
}

/// Runs many `ip` commands in one process inside one namespace.
pub fn ip_batch(name: &str, lines: &[String]) -> Result<()> {
    use std::{io::Write, process::Stdio};
    let mut child = Command::new("ip")
        .args(["-n", name, "-batch", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .context("starting ip")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(lines.join("\n").as_bytes()).and_then(|()| stdin.write_all(b"\n")).context("writing to ip")?;
    }
    let output = child.wait_with_output().context("waiting for ip")?;
    if !output.status.success() {
        bail!("ip -n {name} -batch failed: {}\n{}", String::from_utf8_lossy(&output.stderr).trim(), lines.join("\n"));
    }
    Ok(())
}

/// Ports on which something listens for TCP in the namespace, over both families.
pub fn listening(netns: &Path) -> Result<Vec<u16>> {
    let tables = inside(netns, || {
        ["tcp", "tcp6"].map(|table| fs::read_to_string(format!("/proc/thread-self/net/{table}")).unwrap_or_default())
    })?;
    Ok(tables.iter().flat_map(|table| table.lines().skip(1).filter_map(listener)).collect())
}

/// The kernel's counts of TLS sockets in the namespace; none where it has no TLS.
pub fn tls_stat(netns: &Path) -> Result<BTreeMap<String, u64>> {
    let text = inside(netns, || fs::read_to_string("/proc/thread-self/net/tls_stat").unwrap_or_default())?;
    let counts = text.lines().filter_map(|line| {
        let mut fields = line.split_whitespace();
        Some((fields.next()?.to_owned(), fields.next()?.parse().ok()?))
    });
    Ok(counts.collect())
}

/// The port of one line of /proc/net/tcp if its socket listens (state 0A).
fn listener(line: &str) -> Option<u16> {
    let mut fields = line.split_whitespace().skip(1);
    let (local, state) = (fields.next()?, fields.nth(1)?);
    let (_, port) = local.rsplit_once(':')?;
    (state == "0A").then(|| u16::from_str_radix(port, 16).ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listening_line_gives_its_port_and_others_give_none() {
        let listening = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1";
        assert_eq!(listener(listening), Some(8080));
        assert_eq!(listener(&listening.replace(" 0A ", " 01 ")), None);
        assert_eq!(listener("nonsense"), None);
    }
}
