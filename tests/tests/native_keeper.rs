//! The keeper on the running kernel: descriptors and waiting calls outlive agents, every call is answered in the end, and
//! nothing that comes in at its sockets disturbs it. `keeper/run.rs` has what `marline run` does.
//!
//! Needs root. `bed` has the keeper, the programs and the agents.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#[path = "keeper/bed.rs"]
mod bed;
#[path = "keeper/callers.rs"]
mod callers;
#[path = "keeper/garbage.rs"]
mod garbage;
#[path = "keeper/run.rs"]
mod run;

use std::{
    net::TcpListener,
    time::{Duration, Instant},
};

use bed::{Bed, LONG, call, next, soon};
use marline::sys::seccomp::{Answer, Call};
use marline_tests::wait::{Look, seconds, wait_for};

/// Connects to a port as often as it is told, and says how it went.
const CONNECT: &str = "
import socket, sys
for line in sys.stdin:
    s = socket.socket()
    print(s.connect_ex(('127.0.0.1', int(line))))
";

/// Accepts once for each line, and says that it did.
const ACCEPT: &str = "
import socket, sys
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(16)
print(l.getsockname()[1])
for line in sys.stdin:
    s, _ = l.accept()
    print('accepted')
";

fn listener() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port().to_string();
    (listener, port)
}

#[test]
fn agent_process() {
    bed::agent_process();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_call_goes_to_the_agent_and_gets_its_answer() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let mut program = bed.python(CONNECT);
    let mut calls = next(&link).await;
    let container = &calls.held.container;
    assert_eq!((container.pid, container.metadata.as_str()), (program.pid(), "run"));
    program.say("1");
    let pending = call(&mut calls).await;
    assert!(matches!(pending.notification.call, Call::Connect { length: 16, .. }), "{pending:?}");
    assert_eq!(program.spoke(), None);
    assert!(pending.answer(Answer::Value(0)).unwrap());
    assert_eq!(program.line(), "0", "though nothing listens there");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_connect_without_an_agent_waits_until_one_is_ready() {
    let bed = Bed::new(LONG);
    let (_listener, port) = listener();
    let mut program = bed.python(CONNECT);
    program.say(&port);
    in_calls(program.pid(), libc::SYS_connect, 1);
    let link = bed.link().await;
    let _calls = next(&link).await;
    assert_eq!(program.spoke(), None);
    link.ready().unwrap();
    assert_eq!(program.line(), "0", "the kernel connects when the agent serves what it redirects");
}

#[test]
fn descriptors_outlive_an_agent_and_are_given_to_its_successor() {
    let bed = Bed::new(LONG);
    let mut program = bed.python(CONNECT);
    let mut agent = bed.agent();
    agent.ask("link");
    let id = agent.ask("held");
    agent.kill();
    let mut successor = bed.agent();
    successor.ask("link");
    assert_eq!(successor.ask("held"), id);
    successor.ask("serve");
    program.say("1");
    assert_eq!(program.line(), "0");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_second_agent_has_its_turn_when_the_first_one_and_all_that_it_held_is_gone() {
    let bed = Bed::new(LONG);
    let _program = bed.python(CONNECT);
    let link = bed.link().await;
    let calls = next(&link).await;
    let id = calls.held.id;
    let dir = bed.dir();
    let second = tokio::spawn(async move {
        let link = marline::keeper::Link::open(&dir).await.unwrap();
        next(&link).await.held.id
    });
    drop(link);
    // What shows that it waits: the keeper answers others meanwhile.
    assert!(garbage::told(&bed, b"hello", &[]).contains("not a container process state"));
    assert!(!second.is_finished(), "two could receive from one descriptor");
    drop(calls);
    assert_eq!(soon(second).await.unwrap(), id);
}

#[test]
fn calls_wait_for_an_agent_no_longer_than_the_patience_and_then_not_at_all() {
    let bed = Bed::new("300ms");
    let (listener, port) = listener();
    let start = Instant::now();
    let mut program = bed.python(CONNECT);
    program.say(&port);
    assert_eq!(program.line(), "0", "the kernel connects by itself");
    assert!(start.elapsed() >= Duration::from_millis(300), "after {:?} already", start.elapsed());
    listener.accept().unwrap();
    // A program whose every accept would wait could not live: a hundred calls take less than one patience each.
    let start = Instant::now();
    for _ in 0..100 {
        program.say(&port);
        assert_eq!(program.line(), "0");
        listener.accept().unwrap();
    }
    assert!(start.elapsed() < Duration::from_millis(300) * 50, "{:?}", start.elapsed());
}

#[test]
fn what_a_dead_agent_had_received_is_answered_for_it() {
    let bed = Bed::new(LONG);
    let (_listener, port) = listener();
    for (begun, expected) in [(false, "0"), (true, "111")] {
        let mut program = bed.python(CONNECT);
        let mut agent = bed.agent();
        agent.ask("link");
        agent.ask("held");
        program.say(&port);
        assert_eq!(agent.ask("recv"), "connect");
        if begun {
            agent.ask("begin");
        }
        assert_eq!(program.spoke(), None);
        agent.kill();
        assert_eq!(program.line(), expected, "begun: {begun}");
        program.kill();
        bed.keeper_holds(0);
    }
    let mut program = bed.python(ACCEPT);
    let port: u16 = program.line().parse().unwrap();
    let mut agent = bed.agent();
    agent.ask("link");
    agent.ask("held");
    program.say("accept");
    assert_eq!(agent.ask("recv"), "accept");
    let _client = std::net::TcpStream::connect(("127.0.0.1", port)).unwrap();
    agent.ask("begin");
    agent.kill();
    assert_eq!(program.line(), "accepted");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_call_that_an_agent_drops_is_answered_as_the_keeper_would() {
    let bed = Bed::new(LONG);
    let (_listener, port) = listener();
    let link = bed.link().await;
    let mut program = bed.python(CONNECT);
    let mut calls = next(&link).await;
    program.say(&port);
    drop(call(&mut calls).await);
    assert_eq!(program.line(), "0");
    program.say(&port);
    let mut pending = call(&mut calls).await;
    pending.begin();
    drop(pending);
    assert_eq!(program.line(), "111");
}

#[test]
fn no_call_is_lost_however_often_the_agent_is_killed() {
    let bed = Bed::new(LONG);
    let program = bed.python(
        "
import os, socket, threading
def work():
    while True:
        s = socket.socket()
        os.write(1, b'%d\\n' % s.connect_ex(('127.0.0.1', 1)))
        s.close()
for _ in range(4): threading.Thread(target=work).start()
",
    );
    let emulated = seconds(1) > Duration::from_secs(1);
    for round in 0..if emulated { 10 } else { 100 } {
        let mut agent = bed.agent();
        agent.ask("link");
        agent.ask("held");
        agent.ask("serve");
        agent.ask("ready");
        // All four threads go on: none is left behind in a call that was nobody's.
        for _ in 0..20 {
            let answer = program.line();
            assert!(["0", "111"].contains(&answer.as_str()), "{answer} in round {round}");
        }
        agent.kill();
    }
    let mut agent = bed.agent();
    agent.ask("link");
    agent.ask("held");
    agent.ask("ready");
    // None is elsewhere, or nowhere.
    in_calls(program.pid(), libc::SYS_connect, 4);
}

/// Waits until so many threads of a process are in a call.
fn in_calls(pid: u32, call: libc::c_long, threads: usize) {
    wait_for(format!("{threads} threads of {pid} in call {call}"), seconds(20), || {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))?;
        let calls = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("syscall")).ok());
        let count = calls.filter(|text| text.starts_with(&format!("{call} "))).count();
        Ok(if count == threads { Look::Done(()) } else { Look::NotYet(count.to_string()) })
    })
    .unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_filter_without_tasks_is_dropped_by_keeper_and_agent() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let mut ended = bed.python("input()");
    let mut ended_calls = next(&link).await;
    let mut living = bed.python(CONNECT);
    let mut living_calls = next(&link).await;
    bed.keeper_holds(2);
    ended.kill();
    ended_calls.end().await;
    bed.keeper_holds(1);
    living.say("1");
    call(&mut living_calls).await.answer(Answer::Errno(libc::ENETUNREACH)).unwrap();
    assert_eq!(living.line(), "101");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_caller_that_is_killed_while_it_waits_leaves_nothing_behind() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let mut program = bed.python(CONNECT);
    let mut calls = next(&link).await;
    program.say("1");
    let pending = call(&mut calls).await;
    assert!(pending.valid());
    program.kill();
    assert!(!pending.valid());
    assert!(!pending.answer(Answer::Value(0)).unwrap(), "nobody is there to be answered");
    calls.end().await;
    // A thread that is gone before its call was received: the kernel says that there is something, and then that there is not.
    let mut program = bed.python(&CONNECT.replace("for line", "print('here')\nfor line"));
    let mut calls = next(&link).await;
    assert_eq!(program.line(), "here");
    let held = calls.stop().await;
    program.say("1");
    in_calls(program.pid(), libc::SYS_connect, 1);
    program.kill();
    assert!(held.try_recv().unwrap().is_none());
    assert!(soon(held.receiver().unwrap().recv()).await.unwrap().is_none());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn more_calls_than_an_agent_can_hold_are_carried_out_by_the_kernel() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import os, socket, threading
threading.stack_size(65536)
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen(16); l.setblocking(False)
def work():
    try: l.accept()
    except BlockingIOError: os.write(1, b'again\\n')
for _ in range(1100): threading.Thread(target=work).start()
",
    );
    let mut calls = next(&link).await;
    let mut held = Vec::new();
    while calls.held.beyond() == 0 {
        if let Ok(pending) = calls.next_now() {
            held.push(pending);
        }
        tokio::task::yield_now().await;
    }
    while let Ok(pending) = calls.next_now() {
        held.push(pending);
    }
    assert_eq!(held.len(), 1024);
    assert_eq!(program.line(), "again");
    drop(held);
    assert_eq!(program.line(), "again");
}

#[test]
fn only_one_keeper_serves_a_directory() {
    let bed = Bed::new(LONG);
    let mut command = bed::marline();
    command.args(["keeper", "--dir"]).arg(bed.dir());
    let output = marline_tests::process::output(&mut command, Duration::from_secs(20)).unwrap();
    assert_eq!(output.status.code(), Some(1));
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("another keeper serves"), "{text}");
    // The first one is not disturbed.
    assert_eq!(bed.python("print('here')").line(), "here");
}
