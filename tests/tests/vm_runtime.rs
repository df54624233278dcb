//! Containers of a real OCI runtime under the seccomp profile of `deploy/seccomp`: the runtime hands the notify descriptor to
//! the keeper, and the containers' calls are held as those of `marline run`.
//!
//! Debian's crun wants a cgroup2 of its own: so in the VM only. A program in a container sees this machine's /usr. How a caller is
//! reached depends on the kernel: what `native_keeper` asks of callers is asked here, too.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#[allow(dead_code, reason = "other tests use the rest")]
#[path = "keeper/bed.rs"]
mod bed;
#[path = "keeper/callers.rs"]
mod callers;

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::Command,
};

use bed::{Bed, LONG, Program, call, next};
use marline::{
    keeper::seccomp_socket,
    sys::{
        process::Caller,
        seccomp::{Answer, Call},
    },
};
use marline_tests::process::output;
use serde_json::{Value, json};
use tempfile::TempDir;

/// As Kubernetes gives them.
const CAPABILITIES: [&str; 4] = ["CAP_CHOWN", "CAP_NET_BIND_SERVICE", "CAP_SETUID", "CAP_SYS_CHROOT"];

#[test]
fn agent_process() {
    bed::agent_process();
}

/// A container's bundle, and its name. Removed with the container when dropped.
struct Bundle {
    dir: TempDir,
    name: String,
}

impl Bundle {
    fn new(bed: &Bed, name: &str, command: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("rootfs");
        for folder in ["dev", "proc", "sys", "tmp", "usr"] {
            fs::create_dir_all(root.join(folder)).unwrap();
        }
        for link in ["bin", "lib", "lib64", "sbin"] {
            symlink(format!("usr/{link}"), root.join(link)).unwrap();
        }
        let name = format!("marline-{name}-{}", std::process::id());
        let mount = |kind: &str, to: &str| json!({ "destination": to, "type": kind, "source": kind });
        let usr = json!({ "destination": "/usr", "type": "bind", "source": "/usr", "options": ["rbind", "ro"] });
        let capabilities = json!(CAPABILITIES);
        let config = json!({
            "ociVersion": "1.0.2",
            "root": { "path": "rootfs" },
            "process": {
                "user": { "uid": 0, "gid": 0 }, "cwd": "/", "args": command,
                "env": ["PATH=/usr/local/bin:/usr/bin:/bin"],
                "capabilities": { "bounding": capabilities, "effective": capabilities, "permitted": capabilities },
            },
            "mounts": [mount("proc", "/proc"), mount("tmpfs", "/dev"), usr],
            "linux": {
                "namespaces": [{ "type": "pid" }, { "type": "mount" }, { "type": "ipc" }, { "type": "uts" }],
                "cgroupsPath": format!("/{name}"),
                "seccomp": profile(&seccomp_socket(&bed.dir())),
            },
        });
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        Self { dir, name }
    }

    /// `crun run`, which ends with the container and as it does.
    fn run(&self) -> Command {
        let mut command = Command::new("crun");
        command.args(["run", "--bundle"]).arg(self.dir.path()).arg(&self.name);
        command
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        let _ = Command::new("crun").args(["delete", "--force", &self.name]).output();
    }
}

/// The profile that is shipped, with this test's keeper in it.
fn profile(listener: &Path) -> Value {
    let name = if cfg!(target_arch = "x86_64") { "marline-amd64.json" } else { "marline-arm64.json" };
    let file: PathBuf = [env!("CARGO_MANIFEST_DIR"), "../deploy/seccomp", name].iter().collect();
    let mut profile: Value = serde_json::from_str(&fs::read_to_string(file).unwrap()).unwrap();
    profile["listenerPath"] = json!(listener);
    profile
}

/// Whether there is a runtime that works; if not, says so.
fn runtime(test: &str) -> bool {
    let reason = match Command::new("crun").arg("--version").output() {
        Err(error) => format!("no crun: {error}"),
        Ok(output) if !output.status.success() => format!("crun: {}", String::from_utf8_lossy(&output.stderr)),
        Ok(output) if !String::from_utf8_lossy(&output.stdout).contains("+SECCOMP") => "crun knows no seccomp".into(),
        Ok(_) => return true,
    };
    println!("SKIPPED: {test}: {reason}");
    false
}

const PROGRAM: &str = "
import ctypes, os, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
print(os.getpid())
print(socket.socket().connect_ex(('10.20.30.40', 513)))
for denied in [lambda: libc.unshare(0x10000000), lambda: libc.mount(b'x', b'/tmp', b'tmpfs', 0, None), lambda: libc.syscall(425, 1, 0)]:
    ctypes.set_errno(0); denied(); print(ctypes.get_errno())
for line in sys.stdin: pass
sys.exit(5)
";

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_containers_calls_are_held_and_the_runtimes_denials_are_kept() {
    if !runtime("a_containers_calls_are_held_and_the_runtimes_denials_are_kept") {
        return;
    }
    let bed = Bed::new(LONG);
    let bundle = Bundle::new(&bed, "held", &["python3", "-Iuc", PROGRAM]);
    let mut program = Program::start(&mut bundle.run());
    let link = bed.link().await;
    let mut calls = next(&link).await;
    let container = calls.held.container.clone();
    assert_eq!((container.id.as_str(), container.metadata.as_str()), (bundle.name.as_str(), "marline"));
    assert_eq!(program.line(), "1", "it has a pid namespace of its own");
    let pending = call(&mut calls).await;
    let Call::Connect { fd, address, length } = pending.notification.call else { panic!("{pending:?}") };
    assert_eq!(pending.notification.tid, container.pid, "and is known by its pid outside of it");
    let caller = Caller::of(pending.notification.tid).unwrap();
    assert!(pending.valid());
    assert_eq!(caller.read(address, length as usize).unwrap()[2..8], [2, 1, 10, 20, 30, 40]);
    caller.descriptor(fd).unwrap();
    pending.answer(Answer::Errno(libc::EHOSTDOWN)).unwrap();
    assert_eq!(program.line(), libc::EHOSTDOWN.to_string());
    for denied in ["unshare", "mount", "io_uring_setup"] {
        assert_eq!(program.line(), libc::EPERM.to_string(), "{denied}");
    }
    assert_eq!(program.code(), Some(5));
    calls.end().await;
    bed.keeper_holds(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn what_is_executed_in_a_container_has_a_descriptor_of_its_own() {
    if !runtime("what_is_executed_in_a_container_has_a_descriptor_of_its_own") {
        return;
    }
    let bed = Bed::new(LONG);
    let bundle = Bundle::new(&bed, "exec", &["sh", "-c", "echo here; read line"]);
    let mut program = Program::start(&mut bundle.run());
    assert_eq!(program.line(), "here");
    let link = bed.link().await;
    let first = next(&link).await;
    let connect = "import socket; print(socket.socket().connect_ex(('10.20.30.40', 513)))";
    let executed = Program::start(Command::new("crun").args(["exec", &bundle.name, "python3", "-Iuc", connect]));
    let mut second = next(&link).await;
    let container = second.held.container.clone();
    assert_eq!(container.id, bundle.name);
    let pending = call(&mut second).await;
    assert_ne!(pending.notification.tid, first.held.container.pid);
    // crun 1.8 does not say it here.
    assert!([0, pending.notification.tid].contains(&container.pid), "{container:?}");
    pending.answer(Answer::Errno(libc::EHOSTDOWN)).unwrap();
    assert_eq!(executed.line(), libc::EHOSTDOWN.to_string());
    program.say("end");
    assert_eq!(program.code(), Some(0));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_container_that_cannot_start_leaves_nothing_with_the_keeper() {
    if !runtime("a_container_that_cannot_start_leaves_nothing_with_the_keeper") {
        return;
    }
    let bed = Bed::new(LONG);
    let broken = Bundle::new(&bed, "broken", &["/no/such/program"]);
    let failed = output(&mut broken.run(), marline_tests::wait::seconds(60)).unwrap();
    assert!(!failed.status.success());
    bed.keeper_holds(0);
    assert!(!bed.log().contains("not taken"), "{}", bed.log());
    let bundle = Bundle::new(&bed, "sound", &["true"]);
    let ran = output(&mut bundle.run(), marline_tests::wait::seconds(60)).unwrap();
    assert!(ran.status.success(), "{}", String::from_utf8_lossy(&ran.stderr));
    bed.keeper_says(&bundle.name);
    bed.keeper_holds(0);
}
