//! What an agent's facts mean, line by line, with the way out. Pure: facts in, judgement out.

use super::{
    super::table::{age, time},
    Check,
};
use crate::admin::status::{Certificate, Source, Status};

/// Above this part of its capacity a map deserves a look.
const NEARLY_FULL: f64 = 0.9;
/// So many of one kind are named, the rest is counted.
const NAMED: usize = 8;

pub(super) fn judge(status: &Status) -> Vec<Check> {
    let mut checks = vec![agent(status), kernel(status), cgroup(status), hooks(status)];
    checks.extend(pods(status));
    checks.push(keeper(status));
    checks.push(authority(status));
    checks.extend(certificates(status));
    checks.extend(configuration(status));
    checks.extend(status.source.iter().flat_map(source));
    checks.push(maps(status));
    checks
}

fn agent(status: &Status) -> Check {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default().as_secs();
    let up = age(now.saturating_sub(status.started).saturating_mul(1000));
    let text = format!("marline {}, process {}, up {up}", status.version, status.pid);
    match &status.not_ready {
        None => Check::ok("agent", format!("{text}, ready")),
        Some(why) => Check::fail("agent", format!("{text}, NOT ready: {why}"), "see the lines below"),
    }
}

fn kernel(status: &Status) -> Check {
    const NAME: &str = "kernel-tls";
    let kernel = &status.kernel;
    if kernel.records == "userspace" {
        return Check::ok(NAME, format!("{}: not used, as spec.records says", kernel.release));
    }
    if kernel.suites.is_empty() {
        let text = format!(
            "kernel {} has no usable kernel TLS ({}): the agent encrypts in userspace, and no connection is direct",
            kernel.release, kernel.why
        );
        return Check::warn(NAME, text, "modprobe tls and restart the agent, or run a kernel with CONFIG_TLS");
    }
    let text = format!("kernel {}: {}, bytes moved by {}", kernel.release, kernel.suites.join(" "), kernel.pump);
    match kernel.pump.as_str() {
        "splice" => Check::ok(NAME, text),
        _ => Check::warn(
            NAME,
            format!("{text} ({}): no connection is direct", kernel.why),
            "run a newer kernel: on 6.12 splice was seen to be sound (marline kernel tells)",
        ),
    }
}

fn cgroup(status: &Status) -> Check {
    match &status.capture.cgroup_fault {
        None => Check::ok("cgroup", format!("{} is a cgroup2 directory", status.capture.cgroup.display())),
        Some(fault) => Check::fail(
            "cgroup",
            format!("the pods' cgroup: {fault}: no pod's connection is captured"),
            "make it again or set spec.capture.cgroup to the directory in cgroup2 that the pods live in, then restart the agent",
        ),
    }
}

fn hooks(status: &Status) -> Check {
    let all = &status.capture.hooks;
    let faults: Vec<_> = all
        .iter()
        .filter_map(|hook| Some(format!("{} at {}: {}", hook.name, hook.target.display(), hook.fault.as_ref()?)))
        .collect();
    match faults.as_slice() {
        [] => Check::ok("hooks", format!("all {} kernel programs are attached where they should be", all.len())),
        faults => Check::fail(
            "hooks",
            format!("{} of {} kernel programs are NOT in force: {}", faults.len(), all.len(), named(faults)),
            "restart the agent, which attaches them anew; `bpftool link` and `bpftool cgroup tree` show who else is at work here",
        ),
    }
}

fn pods(status: &Status) -> Vec<Check> {
    let refused: Vec<_> = status.pods.iter().filter(|pod| pod.state != "ready").collect();
    let ready = status.pods.len() - refused.len();
    let mut checks: Vec<_> = refused
        .iter()
        .take(NAMED)
        .map(|pod| {
            let reason = pod.reason.as_deref().unwrap_or("no reason is known");
            let way_out = "it stays closed until that is mended; the agent tries again by itself";
            Check::fail("pods", format!("{}/{} is refused: {reason}", pod.namespace, pod.name), way_out)
        })
        .collect();
    let troubled = status.pods.iter().filter(|pod| pod.state == "ready");
    checks.extend(troubled.filter_map(|pod| Some((pod, pod.reason.as_ref()?))).take(NAMED).map(|(pod, reason)| {
        let way_out = "remove its WorkloadEntry, or start it again: it is captured anew by itself";
        Check::warn("pods", format!("{}/{}: {reason}", pod.namespace, pod.name), way_out)
    }));
    if refused.len() > NAMED {
        let more = format!("{} more are refused", refused.len() - NAMED);
        checks.push(Check::fail("pods", more, "marline status --json names all"));
    }
    match (ready, refused.len()) {
        (0, 0) => checks.push(Check::warn(
            "pods",
            "no pod of this node is enrolled",
            "pods are enrolled by WorkloadEntries with the annotation marline.io/netns: PATH",
        )),
        (ready, 0) => checks.push(Check::ok("pods", format!("{ready} captured and ready"))),
        (ready, refused) => checks.insert(
            0,
            Check::fail("pods", format!("{ready} captured and ready, {refused} refused"), "see the next lines"),
        ),
    }
    checks
}

fn keeper(status: &Status) -> Check {
    const NAME: &str = "keeper";
    let keeper = &status.keeper;
    let place = keeper.directory.as_ref().map(|directory| directory.display().to_string()).unwrap_or_default();
    match (keeper.mode.as_str(), keeper.usable, keeper.connected) {
        ("off", ..) => Check::ok(NAME, "not needed: direct connections are off (spec.direct.mode)"),
        (_, false, _) => Check::ok(NAME, "not needed: this kernel cannot have direct connections"),
        (_, true, true) => Check::ok(NAME, format!("connected at {place}")),
        (_, true, false) => Check::warn(
            NAME,
            format!("no keeper answers in {place}: no program can have direct connections, all are proxied"),
            format!("marline keeper --dir {place}, or spec.direct.mode: off"),
        ),
    }
}

fn authority(status: &Status) -> Check {
    const NAME: &str = "authority";
    let (source, all) = (&status.authority.source, &status.certificates);
    if let Some(why) = &status.authority.refusal {
        return Check::warn(
            NAME,
            format!("what {source} has now is refused, the last good stays in force until a restart: {why}"),
            "put it right: it is read again by itself",
        );
    }
    // One that is well is told by what it has signed: that it is configured says nothing.
    let without = all.iter().filter(|one| !matches!(one.state.as_str(), "valid" | "due" | "expiring")).count();
    let error = all.iter().find_map(|one| one.last_error.as_deref());
    let way_out = "is it there, and may this node ask it? The agent tries again by itself";
    match (without, error) {
        (0, None) if all.is_empty() => Check::ok(NAME, format!("{source}: nothing was asked of it yet")),
        (0, None) => Check::ok(NAME, format!("certificates come from {source}")),
        (0, Some(error)) => Check::warn(NAME, format!("{source} does not renew what it has signed: {error}"), way_out),
        (_, None) => {
            Check::warn(NAME, format!("{source} has not answered yet for {without} of {}", all.len()), way_out)
        }
        (_, Some(error)) => {
            Check::fail(NAME, format!("{source} gives no certificate for {without} of {}: {error}", all.len()), way_out)
        }
    }
}

fn certificates(status: &Status) -> Vec<Check> {
    const NAME: &str = "certificates";
    let mut checks: Vec<Check> = status.certificates.iter().filter_map(certificate).collect();
    let more = checks.len().saturating_sub(NAMED);
    checks.truncate(NAMED);
    if more > 0 {
        checks.push(Check::fail(NAME, format!("and {more} more"), "marline certs lists all"));
    }
    if checks.is_empty() {
        let soonest = status.certificates.iter().filter_map(|one| one.seconds_to_expiry).min();
        let soonest = soonest.and_then(|seconds| u64::try_from(seconds).ok());
        let ends = soonest.map_or_else(String::new, |seconds| format!(", the first ends in {}", age(seconds * 1000)));
        checks.push(Check::ok(NAME, format!("{} valid{ends}", status.certificates.len())));
    }
    checks
}

/// Nothing if it is well.
fn certificate(one: &Certificate) -> Option<Check> {
    const NAME: &str = "certificates";
    let error = one.last_error.as_ref().map_or_else(String::new, |error| format!("; renewing fails: {error}"));
    let ends = one.not_after.map(time).unwrap_or_default();
    match (one.state.as_str(), &one.last_error) {
        ("valid" | "due", None) => None,
        ("valid" | "due", Some(_)) => Some(Check::warn(
            NAME,
            format!("{} is valid until {ends}{error}", one.id),
            "mend what the error names before it ends: the agent tries again by itself",
        )),
        ("expiring", _) => Some(Check::warn(
            NAME,
            format!("{} is about to expire, at {ends}{error}", one.id),
            "mend what the error names before it ends: the agent tries again by itself",
        )),
        ("expired", _) => Some(Check::fail(
            NAME,
            format!("{} has EXPIRED, at {ends}: its connections fail{error}", one.id),
            "mend the CA (`authority`) or the clock; the agent tries again by itself",
        )),
        (state, _) => Some(Check::fail(
            NAME,
            format!("{} is {state}: the pod stays closed{error}", one.id),
            "mend the CA (`authority`); the agent tries again by itself",
        )),
    }
}

fn configuration(status: &Status) -> Vec<Check> {
    const NAME: &str = "configuration";
    let (configuration, directory) = (&status.configuration, status.configuration.directory.display());
    let (generation, reload) = (configuration.generation, &configuration.reload);
    let mut checks = Vec::new();
    if reload.accepted {
        checks.push(Check::ok(
            NAME,
            format!(
                "{directory} read at {}, generation {generation}, {} workloads, mode {}",
                time(reload.at),
                configuration.workloads,
                configuration.mode
            ),
        ));
    } else {
        checks.push(Check::fail(
            NAME,
            format!(
                "the change at {} was REJECTED, generation {generation} stays in force: {}",
                time(reload.at),
                named(&reload.errors)
            ),
            format!(
                "marline check-config {directory} lists everything that is wrong; a good change is taken by itself"
            ),
        ));
    }
    if !configuration.warnings.is_empty() {
        let text = format!("{} warnings: {}", configuration.warnings.len(), named(&configuration.warnings));
        checks.push(Check::warn(NAME, text, format!("marline check-config {directory}")));
    }
    if !configuration.restart.is_empty() {
        let text = format!("changed and not in force yet: {}", configuration.restart.join(", "));
        checks.push(Check::warn(NAME, text, "restart the agent"));
    }
    checks
}

/// The API server, where resources come from there.
fn source(source: &Source) -> Vec<Check> {
    const NAME: &str = "kubernetes";
    let since = time(source.since);
    let mut checks = vec![match (&source.away, source.ready) {
        (Some(why), true) => Check::warn(
            NAME,
            format!("the API server is away since {since}, what was known then stays in force: {why}"),
            "mend what it names: the agent tries again by itself",
        ),
        (Some(why), false) => Check::fail(
            NAME,
            format!("nothing is known of the cluster yet, and no pod is served: {why}"),
            "mend what it names: the agent tries again by itself",
        ),
        (None, false) => Check::fail(
            NAME,
            format!("nothing is known of the cluster yet: waiting for {}", source.waiting.join(", ")),
            "it lists everything first; if that takes minutes, look at the agent's log",
        ),
        (None, true) => {
            let absent = &source.absent;
            let absent =
                if absent.is_empty() { String::new() } else { format!("; the cluster has no {}", absent.join(", ")) };
            Check::ok(NAME, format!("connected since {since} as node {}, {} pods{absent}", source.node, source.pods))
        }
    }];
    if !source.errors.is_empty() {
        let text = format!("{} objects cannot be read, and DENY: {}", source.errors.len(), named(&source.errors));
        checks.push(Check::fail(NAME, text, "correct or remove them: they are taken in by themselves"));
    }
    if !source.not_captured.is_empty() {
        let text = format!(
            "{} pods of this node are not captured yet: nobody has told where they run: {}",
            source.not_captured.len(),
            named(&source.not_captured)
        );
        checks.push(Check::warn(NAME, text, "others speak mTLS to them, which they do not understand uncaptured"));
    }
    if !source.late.is_empty() {
        let text = format!(
            "{} pods of this node were captured late, and what they had open before was not encrypted: {}",
            source.late.len(),
            named(&source.late)
        );
        checks.push(Check::warn(NAME, text, "restart them (kubectl rollout restart), so that they start captured"));
    }
    if let Some(why) = &source.cni_fault {
        let text = format!("the CNI plugin is missing: {why}");
        checks.push(Check::fail(NAME, text, "run marline cni install, with --watch to keep it there"));
    }
    checks.extend(kubelet(source));
    if !source.host_network.is_empty() {
        let text = format!("left alone, as they have the node's own network: {}", named(&source.host_network));
        checks.push(Check::ok(NAME, text));
    }
    if !source.warnings.is_empty() {
        let text = format!("{} warnings: {}", source.warnings.len(), named(&source.warnings));
        checks.push(Check::warn(NAME, text, "marline status --json has all"));
    }
    checks
}

/// Whether its probes reach pods that take no other plaintext.
fn kubelet(source: &Source) -> Option<Check> {
    const NAME: &str = "kubelet";
    let way_out = "set spec.kubernetes.kubeletCgroup to the directory in cgroup2 that has the kubelet and nothing else (see /proc/PID/cgroup of \
                   the kubelet); the agent looks again by itself";
    match (&source.kubelet_fault, &source.kubelet, source.probed) {
        (Some(why), _, 0) => {
            let text = format!("its probes would be refused, and no pod here declares one: {why}");
            Some(Check::warn(NAME, text, way_out))
        }
        (Some(why), _, pods) => {
            let text = format!("its probes of {pods} pods are refused where plaintext is: {why}");
            Some(Check::fail(NAME, text, way_out))
        }
        (None, Some(cgroup), pods) => {
            let text = format!("{pods} pods declare ports for its probes, which are known by {}", cgroup.display());
            Some(Check::ok(NAME, text))
        }
        (None, None, _) => None,
    }
}

fn maps(status: &Status) -> Check {
    let full: Vec<_> = status
        .capture
        .maps
        .iter()
        .filter(|map| map.entries as f64 > map.capacity as f64 * NEARLY_FULL)
        .map(|map| format!("{} has {} of {} entries", map.name, map.entries, map.capacity))
        .collect();
    match full.as_slice() {
        [] => Check::ok("maps", "the kernel programs' maps have room"),
        full => Check::warn(
            "maps",
            format!("nearly full, and what does not fit is refused: {}", full.join(", ")),
            "fewer pods or connections on this node",
        ),
    }
}

fn named(all: &[String]) -> String {
    let more = all.len().saturating_sub(NAMED);
    let named = all.iter().take(NAMED).map(String::as_str).collect::<Vec<_>>().join("; ");
    if more == 0 { named } else { format!("{named}; and {more} more") }
}

#[cfg(test)]
mod tests {
    use super::{super::State, *};

    fn well() -> Status {
        serde_json::from_value(serde_json::json!({
            "version": "0.1.0", "pid": 7, "started": 0, "not_ready": null,
            "kernel": {"release": "6.12", "suites": ["TLS13_AES_128_GCM_SHA256"], "pump": "splice", "why": "", "records": "auto"},
            "capture": {"cgroup": "/sys/fs/cgroup/pods", "cgroup_fault": null, "pin_path": "/sys/fs/bpf/marline",
                        "hooks": [{"name": "connect4", "target": "/sys/fs/cgroup/pods", "fault": null}],
                        "maps": [{"name": "pods", "entries": 1, "capacity": 100}]},
            "pods": [{"namespace": "shop", "name": "web", "identity": "spiffe://x/ns/shop/sa/web", "netns": "/run/netns/web",
                      "state": "ready", "reason": null}],
            "keeper": {"mode": "auto", "directory": "/run/marline", "connected": true, "usable": true},
            "authority": {"source": "the CA in /etc/ca", "refusal": null},
            "certificates": [{"id": "spiffe://x/ns/shop/sa/web", "state": "valid", "not_after": 9, "seconds_to_expiry": 3600,
                              "last_error": null, "source": "embedded CA"}],
            "configuration": {"directory": "/etc/marline", "generation": 3, "mode": "STRICT", "workloads": 2,
                              "reload": {"at": 0, "accepted": true, "errors": []}, "warnings": [], "restart": []},
            "listeners": {"admin": "127.0.0.1:15000", "metrics": "0.0.0.0:15020", "readiness": "0.0.0.0:15021"}
        }))
        .unwrap()
    }

    fn rejected() -> crate::admin::status::Reload {
        crate::admin::status::Reload { at: 0, accepted: false, errors: vec!["a.yaml:3: wrong".into()] }
    }

    /// The worst of a part's lines, and all their words.
    fn part(status: &Status, name: &str) -> (State, String) {
        let checks: Vec<_> = judge(status).into_iter().filter(|check| check.name == name).collect();
        let words = checks.iter().map(|check| format!("{} -> {:?}\n", check.text, check.way_out)).collect();
        (checks.iter().map(|check| check.state).max().unwrap(), words)
    }

    #[test]
    fn a_node_that_is_well_has_no_way_out_to_show() {
        for check in judge(&well()) {
            assert_eq!((check.state, &check.way_out), (State::Ok, &None), "{check:?}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_way_out() {
        type Case = (&'static str, fn(&mut Status), State, &'static [&'static str]);
        let cases: [Case; 15] = [
            ("agent", |s| s.not_ready = Some("pod shop/web".into()), State::Fail, &["NOT ready: pod shop/web"]),
            ("kernel-tls", |s| s.kernel.suites.clear(), State::Warn, &["no usable kernel TLS", "modprobe tls"]),
            ("kernel-tls", |s| s.kernel.pump = "copy".into(), State::Warn, &["newer kernel"]),
            (
                "cgroup",
                |s| s.capture.cgroup_fault = Some("it is gone".into()),
                State::Fail,
                &["it is gone", "spec.capture.cgroup"],
            ),
            (
                "hooks",
                |s| s.capture.hooks[0].fault = Some("detached".into()),
                State::Fail,
                &["connect4", "detached", "restart the agent"],
            ),
            ("pods", |s| s.pods[0].state = "refused".into(), State::Fail, &["shop/web is refused"]),
            ("pods", |s| s.pods.clear(), State::Warn, &["marline.io/netns"]),
            ("keeper", |s| s.keeper.connected = false, State::Warn, &["marline keeper --dir /run/marline"]),
            ("authority", |s| s.authority.refusal = Some("no key".into()), State::Warn, &["no key", "/etc/ca"]),
            ("authority", |s| s.certificates[0].state = "missing".into(), State::Warn, &["has not answered yet"]),
            (
                "authority",
                |s| {
                    (s.certificates[0].state, s.certificates[0].last_error) = ("missing".into(), Some("refused".into()))
                },
                State::Fail,
                &["no certificate for 1 of 1: refused", "/etc/ca", "is it there"],
            ),
            ("authority", |s| s.certificates[0].last_error = Some("away".into()), State::Warn, &["not renew", "away"]),
            ("certificates", |s| s.certificates[0].state = "expired".into(), State::Fail, &["has EXPIRED", "sa/web"]),
            (
                "configuration",
                |s| s.configuration.reload = rejected(),
                State::Fail,
                &["REJECTED", "a.yaml:3", "check-config /etc/marline"],
            ),
            ("maps", |s| s.capture.maps[0].entries = 95, State::Warn, &["95 of 100"]),
        ];
        for (name, spoil, state, words) in cases {
            let mut status = well();
            spoil(&mut status);
            let (found, text) = part(&status, name);
            assert_eq!(found, state, "{name}: {text}");
            assert!(words.iter().all(|word| text.contains(word)), "{name}: {words:?} in {text}");
        }
    }
}
