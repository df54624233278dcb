//! `cargo xtask seccomp`: writes `deploy/seccomp/` anew from the default profile of containers as Debian packages it.
//!
//! What the default denies stays denied, and more: it is some years old, so what today's runtimes deny as well is taken out, and
//! calls of newer kernels that they allow are put in. Reading and writing files is `run`'s; the rest is text in, text out.

use std::{collections::BTreeSet, fs};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::{deps, step::Step, workspace};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Downloads Debian's golang-github-docker-docker-dev (unpacked below target/seccomp, never installed), takes moby's default profile out
of it (Apache-2.0), works out its conditions for a container with Kubernetes's default capabilities, and adds that connect,
accept and some others are held for Marline.")]
pub(crate) struct Args {
    /// Only compare, and fail if the files differ
    #[arg(long)]
    check: bool,
}

const PACKAGE: &str = "golang-github-docker-docker-dev";
const DEFAULT: &str = "usr/share/gocode/src/github.com/docker/docker/profiles/seccomp/default.json";

/// Where the keeper listens, if nothing else is said.
const LISTENER: &str = "/run/marline/seccomp.sock";
/// As in `agent/src/sys/seccomp.rs`, which says why each; `agent/tests/seccomp_profiles.rs` compares.
const HELD: [&str; 7] = ["accept", "accept4", "close", "close_range", "connect", "listen", "shutdown"];

/// What containers have if nothing else is said, in Docker, containerd and CRI-O.
const CAPABILITIES: [&str; 14] = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
];

/// Allowed by the defaults of today, and unknown to the kernels of that one's time.
const LATER: [&str; 18] = [
    "cachestat",
    "fchmodat2",
    "futex_requeue",
    "futex_wait",
    "futex_wake",
    "getxattrat",
    "listmount",
    "listxattrat",
    "map_shadow_stack",
    "mseal",
    "pkey_alloc",
    "pkey_free",
    "pkey_mprotect",
    "removexattrat",
    "setxattrat",
    "statmount",
    "uretprobe",
    "rt_sigtimedwait_time64",
];

/// Denied by the defaults of today.
const DENIED: [&str; 3] = ["io_uring_enter", "io_uring_register", "io_uring_setup"];
/// So are sockets of the families AF_ALG (38) and AF_VSOCK (40).
const SOCKETS: [(&str, u64); 3] = [("SCMP_CMP_LT", 38), ("SCMP_CMP_EQ", 39), ("SCMP_CMP_GT", 40)];

/// One file each: its name, its architecture as the default calls it in conditions, and as libseccomp does.
const FILES: [(&str, &str, &str); 2] =
    [("marline-amd64.json", "amd64", "SCMP_ARCH_X86_64"), ("marline-arm64.json", "arm64", "SCMP_ARCH_AARCH64")];

pub(crate) fn run(args: &Args) -> Result<()> {
    let dir = workspace::target().join("seccomp");
    deps::unpack(PACKAGE, &dir, &dir)?;
    let text = fs::read_to_string(dir.join(DEFAULT)).context("the package has no default profile")?;
    let default = serde_json::from_str(&text).context("the default profile is not JSON")?;
    for (name, condition, architecture) in FILES {
        let file = workspace::root().join("deploy/seccomp").join(name);
        let step = Step::begin(format!("{} {}", if args.check { "comparing" } else { "writing" }, file.display()));
        let text = format!("{:#}\n", profile(&default, condition, architecture)?);
        if args.check {
            let now = fs::read_to_string(&file).unwrap_or_default();
            if now != text {
                return Err(step.way_out("cargo xtask seccomp").fail("it differs from what the default gives"));
            }
        } else {
            fs::write(&file, text).map_err(|error| step.fail(error))?;
        }
    }
    Ok(())
}

/// The profile for one architecture.
fn profile(default: &Value, condition: &str, architecture: &str) -> Result<Value> {
    let maps = default["archMap"].as_array().context("no archMap")?;
    let map = maps.iter().find(|map| map["architecture"] == architecture).context("the architecture is not known")?;
    let mut architectures = vec![json!(architecture)];
    architectures.extend(map["subArchitectures"].as_array().into_iter().flatten().cloned());

    let mut rules = Vec::new();
    let mut plain: BTreeSet<String> = LATER.iter().map(|name| (*name).to_owned()).collect();
    for rule in default["syscalls"].as_array().context("no syscalls")? {
        if !applies(rule, condition) {
            continue;
        }
        let names: Vec<String> = serde_json::from_value(rule["names"].clone()).context("a rule without names")?;
        let arguments = rule["args"].as_array().filter(|args| !args.is_empty());
        if rule["action"] == "SCMP_ACT_ALLOW" && arguments.is_none() {
            plain.extend(names);
            continue;
        }
        ensure!(names.iter().all(|name| !HELD.contains(&name.as_str())), "the default has conditions on {HELD:?}");
        let mut kept = json!({ "names": names, "action": rule["action"] });
        if let Some(arguments) = arguments {
            kept["args"] = json!(arguments);
        }
        if let Some(errno) = rule.get("errnoRet") {
            kept["errnoRet"] = errno.clone();
        }
        rules.push(kept);
    }
    plain.retain(|name| !HELD.contains(&name.as_str()) && !DENIED.contains(&name.as_str()));
    if plain.remove("socket") {
        rules.extend(SOCKETS.map(|(comparison, family)| {
            let arguments = [json!({ "index": 0, "value": family, "op": comparison })];
            json!({ "names": ["socket"], "action": "SCMP_ACT_ALLOW", "args": arguments })
        }));
    }
    rules.insert(0, json!({ "names": HELD, "action": "SCMP_ACT_NOTIFY" }));
    rules.insert(1, json!({ "names": plain, "action": "SCMP_ACT_ALLOW" }));
    Ok(json!({
        "defaultAction": default["defaultAction"],
        "defaultErrnoRet": 1,
        "architectures": architectures,
        "flags": ["SECCOMP_FILTER_FLAG_WAIT_KILLABLE_RECV"],
        "listenerPath": LISTENER,
        "listenerMetadata": "marline",
        "syscalls": rules,
    }))
}

/// Whether a rule is for this architecture and for containers with the default capabilities. The kernels that a rule can ask
/// for are all older than those that Marline needs.
fn applies(rule: &Value, architecture: &str) -> bool {
    let lists = |side: &str, what: &str, wanted: &dyn Fn(&str) -> bool| {
        rule[side][what].as_array().map(|list| list.iter().filter_map(Value::as_str).any(wanted))
    };
    let capability = |name: &str| CAPABILITIES.contains(&name);
    let architecture = |name: &str| name == architecture;
    lists("includes", "caps", &capability).unwrap_or(true)
        && lists("includes", "arches", &architecture).unwrap_or(true)
        && !lists("excludes", "caps", &capability).unwrap_or(false)
        && !lists("excludes", "arches", &architecture).unwrap_or(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(name: &str) -> Value {
        let file = workspace::root().join("deploy/seccomp").join(name);
        serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap()
    }

    /// What a call gets whatever its arguments are.
    fn action<'a>(profile: &'a Value, call: &str) -> &'a str {
        let rules = profile["syscalls"].as_array().unwrap().iter();
        let mut rules = rules.filter(|rule| rule["names"].as_array().unwrap().contains(&json!(call)));
        let rule = rules.find(|rule| rule.get("args").is_none()).unwrap_or(profile);
        rule.get("action").unwrap_or(&profile["defaultAction"]).as_str().unwrap()
    }

    #[test]
    fn what_is_held_has_one_rule_and_is_for_the_keeper() {
        for (name, ..) in FILES {
            let profile = written(name);
            let rules = profile["syscalls"].as_array().unwrap();
            let held: Vec<_> = rules.iter().filter(|rule| rule["action"] == "SCMP_ACT_NOTIFY").collect();
            assert_eq!(held.len(), 1, "{name}");
            assert_eq!(held[0]["names"], json!(HELD), "{name}");
            for call in HELD {
                let count =
                    rules.iter().filter(|rule| rule["names"].as_array().unwrap().contains(&json!(call))).count();
                assert_eq!(count, 1, "{name}: {call} has another rule");
            }
            assert_eq!(profile["listenerPath"], LISTENER);
        }
    }

    #[test]
    fn what_containers_must_not_do_is_denied_and_what_they_need_is_not() {
        for (name, ..) in FILES {
            let profile = written(name);
            for call in [
                "mount",
                "umount2",
                "unshare",
                "setns",
                "bpf",
                "kexec_load",
                "init_module",
                "keyctl",
                "add_key",
                "userfaultfd",
                "perf_event_open",
                "io_uring_setup",
                "pidfd_getfd",
                "reboot",
                "swapon",
                "open_by_handle_at",
                "clone3",
                "quotactl",
                "settimeofday",
                "acct",
                "fsopen",
                "move_mount",
            ] {
                assert_eq!(action(&profile, call), "SCMP_ACT_ERRNO", "{name}: {call}");
            }
            for call in ["read", "bind", "sendto", "futex_waitv", "fchmodat2", "chroot", "seccomp", "dup3"] {
                assert_eq!(action(&profile, call), "SCMP_ACT_ALLOW", "{name}: {call}");
            }
        }
    }

    #[test]
    fn conditions_are_worked_out_for_the_architecture_and_the_default_capabilities() {
        let rule = |text: &str| serde_json::from_str::<Value>(text).unwrap();
        for (text, expected) in [
            ("{}", true),
            (r#"{"includes":{"caps":["CAP_SYS_ADMIN"]}}"#, false),
            (r#"{"includes":{"caps":["CAP_SYS_CHROOT"]}}"#, true),
            (r#"{"excludes":{"caps":["CAP_SYS_ADMIN"]}}"#, true),
            (r#"{"excludes":{"caps":["CAP_CHOWN"]}}"#, false),
            (r#"{"includes":{"arches":["arm64"]}}"#, false),
            (r#"{"includes":{"arches":["amd64","x32"]}}"#, true),
            (r#"{"includes":{"minKernel":"4.8"},"excludes":{}}"#, true),
        ] {
            assert_eq!(applies(&rule(text), "amd64"), expected, "{text}");
        }
    }

    #[test]
    fn a_rule_is_kept_with_its_arguments_and_a_condition_on_a_held_call_is_an_error() {
        let default = |rule: Value| {
            json!({ "defaultAction": "SCMP_ACT_ERRNO", "archMap": [{ "architecture": "SCMP_ARCH_X86_64" }],
                "syscalls": [{ "names": ["connect", "read", "socket"], "action": "SCMP_ACT_ALLOW", "args": [] }, rule] })
        };
        let args = json!([{ "index": 0, "value": 8, "op": "SCMP_CMP_EQ" }]);
        let rule = json!({ "names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": args });
        let made = profile(&default(rule), "amd64", "SCMP_ARCH_X86_64").unwrap();
        assert_eq!(made["syscalls"][2]["args"], args);
        assert_eq!((action(&made, "read"), action(&made, "connect")), ("SCMP_ACT_ALLOW", "SCMP_ACT_NOTIFY"));
        assert_eq!(action(&made, "socket"), "SCMP_ACT_ERRNO", "of some families only");
        let rule = json!({ "names": ["accept"], "action": "SCMP_ACT_ALLOW", "args": args });
        assert!(profile(&default(rule), "amd64", "SCMP_ARCH_X86_64").is_err());
    }
}
