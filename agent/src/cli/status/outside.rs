//! What can be seen of a node without an agent: the kernel, the pods' cgroup, the files, and what a dead agent has left.

use std::path::Path;

use super::{super::client::ClientError, Check};
use crate::{
    app,
    bpf::facts::{self, Outside},
    config::{self, AgentConfig, CaSource},
    control::trust,
    words::{PumpKind, with_causes},
};

/// Where an agent pins if it is not told otherwise.
const PIN_PATH: &str = "/sys/fs/bpf/marline";

pub(super) fn look(error: &ClientError, directory: Option<&Path>) -> Vec<Check> {
    let loaded = directory.map(|directory| (directory, config::load(directory)));
    let agent = loaded.as_ref().and_then(|(_, loaded)| loaded.as_ref().ok()).map(|loaded| &loaded.agent);
    let pin_path = agent.map_or(Path::new(PIN_PATH), |agent| &agent.capture.pin_path);
    let outside = facts::outside(pin_path);
    let mut checks = vec![silence(error, agent, &outside, pin_path, directory), left(&outside, pin_path), kernel_tls()];
    checks.extend(kernel(&outside, pin_path));
    match loaded {
        None => {}
        Some((directory, Err(errors))) => checks.push(Check::fail(
            "configuration",
            format!("an agent would refuse {}: {}", directory.display(), errors.to_string().replace('\n', "; ")),
            format!("marline check-config {}", directory.display()),
        )),
        Some((directory, Ok(loaded))) => {
            checks.push(Check::ok("configuration", format!("{} is sound", directory.display())));
            checks.push(cgroup(&loaded.agent));
            checks.push(authority(&loaded.agent));
        }
    }
    checks
}

fn silence(
    error: &ClientError,
    agent: Option<&AgentConfig>,
    outside: &Outside,
    pin_path: &Path,
    directory: Option<&Path>,
) -> Check {
    let text = error.to_string();
    let told = agent.map(|agent| format!("spec.admin.address is {}", agent.admin));
    let way_out = match (outside.held, told) {
        _ if outside.unseen.is_some() => "run it as root, to see whether an agent lives".to_owned(),
        (true, Some(told)) => {
            format!("an agent lives, for it holds {}: ask it with --admin; {told}", pin_path.display())
        }
        (true, None) => format!(
            "an agent lives, for it holds {}: ask it with --admin, at its spec.admin.address and in its network namespace",
            pin_path.display()
        ),
        (false, _) => {
            let directory = directory.map_or_else(|| "DIR".to_owned(), |directory| directory.display().to_string());
            format!("start one: marline agent --config {directory}; its log says why the last one ended")
        }
    };
    Check::fail("agent", text, way_out)
}

/// What a dead agent's pods are in.
fn left(outside: &Outside, pin_path: &Path) -> Check {
    const NAME: &str = "pods";
    let place = pin_path.display();
    if let Some(why) = &outside.unseen {
        return Check::warn(NAME, format!("it cannot be seen whether pods are captured: {why}"), "run it as root");
    }
    match (outside.held, outside.pods) {
        (true, pods) => Check::ok(NAME, format!("{pods} are captured by the agent that holds {place}")),
        (false, 0) => Check::ok(NAME, format!("nothing is captured under {place}")),
        (false, pods) => Check::fail(
            NAME,
            format!(
                "an agent that is gone has left {pods} captured under {place}: they are CLOSED, nothing goes in or out"
            ),
            format!("start the agent again, or let them go, in the clear: marline unload {place}"),
        ),
    }
}

fn kernel_tls() -> Check {
    const NAME: &str = "kernel-tls";
    let release = crate::sys::release();
    match app::kernel_alone() {
        Err(error) => Check::warn(NAME, format!("cannot be tried: {}", with_causes(&error)), "run it as root"),
        Ok(found) if found.suites.is_empty() => Check::warn(
            NAME,
            format!("kernel {release} has no usable kernel TLS ({}): an agent encrypts in userspace", found.why),
            "modprobe tls, or run a kernel with CONFIG_TLS",
        ),
        Ok(found) => {
            let suites: Vec<_> = found.suites.iter().map(|suite| format!("{suite:?}")).collect();
            let pump = if found.pump == PumpKind::Splice { "splice" } else { "copy" };
            Check::ok(NAME, format!("kernel {release}: {}, bytes moved by {pump}", suites.join(" ")))
        }
    }
}

fn kernel(outside: &Outside, pin_path: &Path) -> Vec<Check> {
    let mut checks = Vec::new();
    checks.push(match (&outside.unasked, outside.missing.as_slice()) {
        (_, missing @ [_, ..]) => Check::fail(
            "programs",
            format!("this kernel lacks {}", missing.join(", ")),
            "run a kernel with CONFIG_CGROUP_BPF and BPF socket lookup (Debian 6.1 has all)",
        ),
        (Some(why), []) => Check::warn("programs", format!("the kernel cannot be asked: {why}"), "run it as root"),
        (None, []) => Check::ok("programs", "the kernel has every kind of BPF program and map that is needed"),
    });
    checks.push(match outside.bpffs {
        true => Check::ok("bpf-fs", format!("{} is on a BPF file system", pin_path.display())),
        false => Check::warn(
            "bpf-fs",
            format!("{} is not on a BPF file system", pin_path.display()),
            "mount -t bpf bpf /sys/fs/bpf (an agent in the host's mount namespace does that by itself)",
        ),
    });
    checks
}

fn cgroup(agent: &AgentConfig) -> Check {
    let path = &agent.capture.cgroup;
    match facts::cgroup_fault(path) {
        None => Check::ok("cgroup", format!("{} is a cgroup2 directory", path.display())),
        Some(fault) => Check::fail(
            "cgroup",
            format!("the pods' cgroup: {fault}"),
            "set spec.capture.cgroup to the directory in cgroup2 that the pods live in (mount -t cgroup2 none /sys/fs/cgroup, if none is)",
        ),
    }
}

fn authority(agent: &AgentConfig) -> Check {
    const NAME: &str = "authority";
    let source = &agent.ca.source;
    let (read, way_out) = match source {
        CaSource::Embedded(path) => (
            trust::load(path, &agent.trust).map(drop),
            format!("put its files right, or make one: marline ca init {}", path.display()),
        ),
        CaSource::Remote(_, roots) => {
            (trust::load_pinned(roots, &agent.trust).map(drop), format!("put {} right", roots.display()))
        }
        CaSource::WorkloadApi(socket) if !socket.exists() => {
            let text = format!("{source} is not there");
            return Check::warn(NAME, text, "start SPIRE's agent, or correct spec.ca.workloadApi");
        }
        CaSource::WorkloadApi(_) => return Check::ok(NAME, format!("{source} is there")),
    };
    match read {
        Ok(()) => Check::ok(NAME, format!("{source}: what is here of it is sound")),
        Err(error) => Check::fail(NAME, format!("{source} cannot be used: {}", with_causes(&error)), way_out),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::State, *};

    #[test]
    fn pins_that_cannot_be_seen_are_not_called_none() {
        let unseen = Outside { unseen: Some("/sys/fs/bpf/m: no rights".into()), ..Outside::default() };
        let check = left(&unseen, Path::new("/sys/fs/bpf/m"));
        assert_eq!((check.state, check.way_out.as_deref()), (State::Warn, Some("run it as root")), "{}", check.text);
        assert!(check.text.contains("no rights") && !check.text.contains("nothing is captured"), "{}", check.text);
    }
}
