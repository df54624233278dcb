//! `marline run`: the command is what it would be without, but its connects and accepts are held.

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt},
    path::Path,
    process::Command,
    time::Duration,
};

use marline::sys::seccomp::{Answer, Call};
use marline_tests::{
    cgroup, netns,
    process::{output, succeed},
};

use crate::bed::{Bed, LONG, Program, call, marline, next, python};

const LIMIT: Duration = Duration::from_secs(60);

fn code(command: &mut Command) -> (Option<i32>, String) {
    let output = output(command, LIMIT).unwrap();
    let text = [output.stdout, output.stderr].concat();
    (output.status.code(), String::from_utf8_lossy(&text).into_owned())
}

#[test]
fn the_exit_code_is_the_commands_and_failures_have_their_own() {
    let bed = Bed::new(LONG);
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "no program").unwrap();
    for (command, expected) in [
        (bed.run().args(["sh", "-c", "exit 7"]), 7),
        (bed.run().arg("true"), 0),
        (bed.run().arg("no-such-program"), 127),
        (bed.run().arg(&file), 126),
        (marline().args(["run", "--keeper"]).arg(dir.path()).args(["--", "true"]), 125),
        (marline().args(["run", "--without-direct", "--keeper"]).arg(dir.path()).args(["--", "sh", "-c", "exit 3"]), 3),
        (marline().args(["run", "--keeper", "/x"]), 2),
        (marline().args(["run", "--identity", "half", "--", "true"]), 2),
    ] {
        assert_eq!(code(command).0, Some(expected), "{command:?}");
    }
    let (_, text) = code(marline().args(["run", "--keeper"]).arg(dir.path()).args(["--", "true"]));
    assert!(text.contains("is `marline keeper` running?") && text.contains("--without-direct"), "{text}");
    let mut ended = bed.run();
    let status = output(ended.args(["sh", "-c", "kill -9 $$"]), LIMIT).unwrap().status;
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(9));
}

#[test]
fn the_command_is_under_one_filter_and_has_no_descriptor_more() {
    let bed = Bed::new(LONG);
    let look = "readlink /proc/self/fd/*; grep -E 'NoNewPrivs|Seccomp' /proc/self/status";
    let words = |command: &mut Command| {
        let text = succeed(command.args(["sh", "-c", look]), LIMIT).unwrap();
        let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        let status = words.split_off(words.iter().position(|word| word == "NoNewPrivs:").unwrap());
        // Pipes have other numbers each time, and the shell has read that directory.
        words.retain(|word| !word.starts_with("pipe:") && !word.starts_with("/proc/"));
        (words, status.join(" "))
    };
    let (held, status) = words(&mut bed.run());
    assert_eq!(status, "NoNewPrivs: 0 Seccomp: 2 Seccomp_filters: 1");
    let (free, status) = words(marline().args(["run", "--without-direct", "--"]));
    assert_eq!(status, "NoNewPrivs: 0 Seccomp: 0 Seccomp_filters: 0");
    assert_eq!(held, free, "what this test has open, and nothing else");
}

#[test]
fn a_filter_inside_of_a_filter_is_refused_with_its_reason() {
    let bed = Bed::new(LONG);
    // The inner one connects to the keeper before anything else: that call is let through.
    let mut inner = bed.run();
    inner.arg(marline().get_program()).args(["run", "--keeper"]).arg(bed.dir()).args(["--", "true"]);
    let mut agent = bed.agent();
    agent.ask("link");
    let inner = std::thread::spawn(move || code(&mut inner));
    agent.ask("held");
    assert_eq!(agent.ask("recv"), "connect");
    agent.kill();
    let (code, text) = inner.join().unwrap();
    assert_eq!(code, Some(125));
    assert!(text.contains("under one that holds calls already"), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn connect_and_both_accepts_are_held_with_their_arguments() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import socket, ctypes
libc = ctypes.CDLL(None, use_errno=True)
s = socket.socket()
print(s.fileno())
libc.syscall(42, s.fileno(), ctypes.c_long(0x1234), 28)
libc.syscall(43, s.fileno(), ctypes.c_long(0x5678), ctypes.c_long(0x9abc))
libc.syscall(288, s.fileno(), ctypes.c_long(0), ctypes.c_long(0), socket.SOCK_CLOEXEC)
libc.syscall(288, -1, ctypes.c_long(-1), ctypes.c_long(-1), -1)
",
    );
    let mut calls = next(&link).await;
    let fd: i32 = program.line().parse().unwrap();
    for expected in [
        Call::Connect { fd, address: 0x1234, length: 28 },
        Call::Accept { fd, address: 0x5678, length: 0x9abc, flags: 0 },
        Call::Accept { fd, address: 0, length: 0, flags: libc::SOCK_CLOEXEC },
        Call::Accept { fd: -1, address: u64::MAX, length: u64::MAX, flags: -1 },
    ] {
        let pending = call(&mut calls).await;
        assert_eq!(pending.notification.call, expected);
        pending.answer(Answer::Errno(libc::EPERM)).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn sockets_that_are_not_tcp_work_when_their_calls_go_on() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import socket, tempfile, os
path = os.path.join(tempfile.mkdtemp(), 's')
l = socket.socket(socket.AF_UNIX); l.bind(path); l.listen()
c = socket.socket(socket.AF_UNIX); c.connect(path)
s, _ = l.accept(); c.send(b'unix'); print(s.recv(4).decode())
u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.bind(('127.0.0.1', 0))
v = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); v.connect(u.getsockname()); v.send(b'udp'); print(u.recv(4).decode())
",
    );
    let mut calls = next(&link).await;
    for expected in ["connect", "accept", "connect"] {
        let pending = call(&mut calls).await;
        let name = if matches!(pending.notification.call, Call::Connect { .. }) { "connect" } else { "accept" };
        assert_eq!(name, expected);
        pending.answer(Answer::Continue).unwrap();
    }
    assert_eq!(program.line(), "unix");
    assert_eq!(program.line(), "udp");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn children_and_what_they_become_are_under_the_filter() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let connect = "import socket; print(socket.socket().connect_ex((\"127.0.0.1\", 1)))";
    let python = python();
    let script = format!("{python} -Ic '{connect}' & wait; (exec {python} -Ic '{connect}')");
    let program = Program::start(bed.run().args(["sh", "-c", &script]));
    let mut calls = next(&link).await;
    for errno in [libc::EHOSTDOWN, libc::ENETDOWN] {
        call(&mut calls).await.answer(Answer::Errno(errno)).unwrap();
        assert_eq!(program.line(), errno.to_string());
    }
}

/// i386's `socketcall(SYS_SOCKET, {AF_INET, SOCK_STREAM, 0})` and `socketcall(SYS_CONNECT, {it, 127.0.0.1:1, 16})` by
/// `int $0x80`, then `exit(errno)`; at 0x8048054.
const I386: &str = "b866000000bb01000000b986800408cd80a392800408b866000000bb0300\
                    0000b992800408cd80f7d889c3b801000000cd8002000000010000000000\
                    0000000000009e80040810000000020000017f0000010000000000000000";
/// x86-64's `socket`, then `connect` to 127.0.0.1:1 with x32's bit in its number, then `exit(errno)`.
const X32: &str = "b829000000bf02000000be0100000031d20f0589c7b82a000040488d3512\
                   000000ba100000000f05f7d889c7b83c0000000f05020000017f00000100\
                   00000000000000";

/// A program of one segment, which may be read, written and executed.
fn elf(wide: bool, hex: &str, file: &Path) {
    let code: Vec<u8> = (0..hex.len() / 2).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
    let (head, base): (u64, u64) = if wide { (0x78, 0x40_0000) } else { (0x54, 0x804_8000) };
    let size = head + code.len() as u64;
    let mut bytes = vec![0x7f, b'E', b'L', b'F', 1 + u8::from(wide), 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    let half = |bytes: &mut Vec<u8>, value: u16| bytes.extend(value.to_le_bytes());
    let word = |bytes: &mut Vec<u8>, value: u64| bytes.extend(&(value as u32).to_le_bytes());
    let long = |bytes: &mut Vec<u8>, value: u64| bytes.extend(&value.to_le_bytes()[..if wide { 8 } else { 4 }]);
    half(&mut bytes, 2);
    half(&mut bytes, if wide { 62 } else { 3 });
    word(&mut bytes, 1);
    for value in [base + head, if wide { 64 } else { 52 }, 0] {
        long(&mut bytes, value);
    }
    word(&mut bytes, 0);
    for value in if wide { [64, 56, 1, 0, 0, 0] } else { [52, 32, 1, 0, 0, 0] } {
        half(&mut bytes, value);
    }
    word(&mut bytes, 1);
    if wide {
        word(&mut bytes, 7);
    }
    for value in [0, base, base, size, size] {
        long(&mut bytes, value);
    }
    if !wide {
        word(&mut bytes, 7);
    }
    long(&mut bytes, 0x1000);
    assert_eq!(bytes.len() as u64, head);
    bytes.extend(code);
    fs::write(file, bytes).unwrap();
    fs::set_permissions(file, fs::Permissions::from_mode(0o755)).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn calls_by_other_entries_are_not_held() {
    if cfg!(not(target_arch = "x86_64")) {
        println!("SKIPPED: calls_by_other_entries_are_not_held: the other entries are x86's");
        return;
    }
    let bed = Bed::new(LONG);
    let dir = tempfile::tempdir().unwrap();
    let link = bed.link().await;
    for (name, wide, code, expected) in [
        ("i386", false, I386, vec![libc::ECONNREFUSED]),
        // Where the kernel knows x32 it connects, else there is no such call.
        ("x32", true, X32, vec![libc::ENOSYS, libc::ECONNREFUSED]),
    ] {
        let file = dir.path().join(name);
        elf(wide, code, &file);
        let native = Command::new(&file).status();
        if let Err(error) = native {
            println!("SKIPPED: calls_by_other_entries_are_not_held ({name}): {error}");
            continue;
        }
        let mut program = Program::start(bed.run().arg(&file));
        // Held, it would wait: there is nobody who answers.
        let code = program.code();
        assert!(expected.iter().any(|errno| code == Some(*errno)), "{name}: {code:?}");
        next(&link).await.end().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_programs_own_filters_go_on_working() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import ctypes, struct, socket, os
libc = ctypes.CDLL(None, use_errno=True)
def deny(nr, errno):
    code = b''.join(struct.pack('HBBI', *i) for i in [
        (0x20, 0, 0, 0), (0x15, 0, 1, nr), (0x06, 0, 0, 0x50000 | errno), (0x06, 0, 0, 0x7fff0000)])
    buffer = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack('HxxxxxxQ', 4, ctypes.addressof(buffer)))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, program, 0, 0) == 0
deny(39, 77)
print(libc.syscall(39), ctypes.get_errno())
print(socket.socket().connect_ex(('127.0.0.1', 1)))
deny(42, 13)
print(socket.socket().connect_ex(('127.0.0.1', 1)))
",
    );
    let mut calls = next(&link).await;
    assert_eq!(program.line(), "-1 77", "its own filter refuses getpid");
    call(&mut calls).await.answer(Answer::Errno(libc::EHOSTDOWN)).unwrap();
    assert_eq!(program.line(), libc::EHOSTDOWN.to_string(), "and connect is held all the same");
    assert_eq!(program.line(), "13", "until the program refuses itself");
}

#[test]
fn with_an_identity_the_command_runs_where_that_workload_does() {
    let name = format!("mlrun{}", std::process::id());
    let pods = cgroup::mount_point().unwrap().join(&name);
    let dir = tempfile::tempdir().unwrap();
    netns::create(&name).unwrap();
    cgroup::create(&pods).unwrap();
    let outcome = std::panic::catch_unwind(|| in_the_place_of_an_identity(&name, &pods, dir.path()));
    cgroup::remove(&pods).unwrap();
    netns::remove(&name).unwrap();
    outcome.unwrap();
}

fn in_the_place_of_an_identity(name: &str, pods: &Path, dir: &Path) {
    let bed = Bed::new(LONG);
    let entry = |account: &str, address: &str, netns: &str| {
        format!(
            "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: {account}{netns}\n  namespace: shop\n  \
             annotations:\n    marline.io/netns: /run/netns/{netns}\nspec:\n  address: {address}\n  serviceAccount: {account}\n"
        )
    };
    let text = format!(
        "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nmetadata:\n  name: agent\nspec:\n  ca:\n    path: ca\n  capture:\n    \
         cgroup: {}\n{}{}{}",
        pods.display(),
        entry("web", "10.1.1.1", name),
        entry("two", "10.1.1.2", "one"),
        entry("two", "10.1.1.3", "other"),
    );
    fs::write(dir.join("marline.yaml"), text).unwrap();
    let run = |identity: &str, command: &[&str]| {
        let mut run = marline();
        run.args(["run", "--identity", identity, "--config"]).arg(dir).arg("--keeper").arg(bed.dir());
        code(run.arg("--").args(command))
    };
    let (code, text) = run("shop/web", &["sh", "-c", "cat /proc/self/cgroup; stat -Lc %i /proc/self/ns/net"]);
    assert_eq!(code, Some(0), "{text}");
    assert!(text.contains(&format!("/{name}/shop.web\n")), "{text}");
    let inode = fs::metadata(netns::path(name)).unwrap().ino().to_string();
    assert!(text.trim().ends_with(&inode), "{text} without {inode}");
    for (identity, reason) in [
        ("shop/nobody", "those that have one here: shop/two, shop/web"),
        ("shop/two", "pods in different network namespaces"),
    ] {
        let (code, text) = run(identity, &["true"]);
        assert_eq!(code, Some(125));
        assert!(text.contains(reason), "{text}");
    }
    fs::write(dir.join("marline.yaml"), "kind: nonsense").unwrap();
    assert_eq!(run("shop/web", &["true"]).0, Some(125));
}
