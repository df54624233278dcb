//! Reaching the process behind a held call: its memory, its descriptors, its signals, however its threads are arranged.

use std::{io, net::TcpListener, os::fd::AsFd, os::unix::fs::MetadataExt};

use marline::{
    keeper::Pending,
    sys::{
        process::{self, Caller},
        seccomp::{Answer, Call},
    },
};
use marline_tests::wait::{Look, seconds, wait_for};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::bed::{Bed, LONG, call, next};

fn inode(descriptor: impl AsFd) -> String {
    let file = std::fs::File::from(descriptor.as_fd().try_clone_to_owned().unwrap());
    file.metadata().unwrap().ino().to_string()
}

fn connect(pending: &Pending) -> (i32, u64, u32) {
    match pending.notification.call {
        Call::Connect { fd, address, length } => (fd, address, length),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_callers_address_and_socket_are_those_of_its_call() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import socket, os, threading
def work():
    s = socket.socket()
    print(os.fstat(s.fileno()).st_ino)
    print(s.connect_ex(('10.20.30.40', 513)))
work()
t = threading.Thread(target=work); t.start(); t.join()
",
    );
    let mut calls = next(&link).await;
    for leader in [true, false] {
        let pending = call(&mut calls).await;
        let (fd, address, length) = connect(&pending);
        let tid = pending.notification.tid;
        assert_eq!(tid == program.pid(), leader);
        let mut family = [0; 2];
        assert_eq!(process::peek(tid, address, &mut family).unwrap(), 2);
        assert_eq!(u16::from_ne_bytes(family), libc::AF_INET as u16);
        let caller = Caller::of(tid).unwrap();
        assert!(pending.valid());
        assert_eq!((caller.tid(), caller.pid().unwrap()), (tid, program.pid()));
        assert_eq!(caller.read(address, length as usize).unwrap()[2..8], [2, 1, 10, 20, 30, 40]);
        assert_eq!(inode(caller.descriptor(fd).unwrap()), program.line());
        assert_eq!(caller.descriptor(999).unwrap_err().raw_os_error(), Some(libc::EBADF));
        assert!(!caller.interrupted().unwrap());
        pending.answer(Answer::Value(0)).unwrap();
        assert_eq!(program.line(), "0");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_thread_whose_leader_is_dead_is_reached_or_refused_but_never_mistaken() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import socket, os, threading, ctypes
libc = ctypes.CDLL(None)
leader = threading.get_native_id()
def work():
    while open(f'/proc/self/task/{leader}/stat').read().rsplit(')')[1].split()[0] != 'Z': pass
    s = socket.socket()
    print(os.fstat(s.fileno()).st_ino)
    print(s.connect_ex(('10.20.30.40', 513)))
threading.Thread(target=work).start()
libc.syscall(60, 0)
",
    );
    let mut calls = next(&link).await;
    let pending = call(&mut calls).await;
    let (fd, address, length) = connect(&pending);
    let expected = program.line();
    match Caller::of(pending.notification.tid) {
        Ok(caller) => {
            assert_eq!(inode(caller.descriptor(fd).unwrap()), expected);
            assert_eq!(caller.read(address, length as usize).unwrap()[4..8], [10, 20, 30, 40]);
            println!("reached");
        }
        Err(error) => {
            assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}");
            println!("refused: {error}");
        }
    }
    pending.answer(Answer::Errno(libc::EHOSTDOWN)).unwrap();
    assert_eq!(program.line(), libc::EHOSTDOWN.to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_thread_with_descriptors_of_its_own_is_reached_or_refused_but_never_mistaken() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import socket, os, threading, ctypes
libc = ctypes.CDLL(None)
a, b = socket.socket(), socket.socket()
print(os.fstat(b.fileno()).st_ino)
def work():
    assert libc.unshare(0x400) == 0
    os.dup2(b.fileno(), a.fileno())
    print(a.connect_ex(('10.20.30.40', 513)))
t = threading.Thread(target=work); t.start(); t.join()
",
    );
    let mut calls = next(&link).await;
    let pending = call(&mut calls).await;
    let expected = program.line();
    match Caller::of(pending.notification.tid) {
        Ok(caller) => assert_eq!(inode(caller.descriptor(connect(&pending).0).unwrap()), expected),
        Err(error) => assert_eq!(error.kind(), io::ErrorKind::Unsupported, "{error}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_socket_is_given_with_its_address_and_its_flag() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import socket, fcntl
l = socket.socket(); l.bind(('127.0.0.1', 0)); l.listen()
s, address = l.accept()
print(address[0], address[1], s.recv(4).decode(), fcntl.fcntl(s.fileno(), fcntl.F_GETFD))
",
    );
    let mut calls = next(&link).await;
    let mut pending = call(&mut calls).await;
    let Call::Accept { address, length, flags, .. } = pending.notification.call else { panic!("{pending:?}") };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (server, _) = listener.accept().unwrap();
    let caller = Caller::of(pending.notification.tid).unwrap();
    assert!(pending.valid());
    caller.write(address, &[2, 0, 1, 2, 9, 8, 7, 6]).unwrap();
    caller.write(length, &16_u32.to_ne_bytes()).unwrap();
    assert!(pending.give(server.as_fd(), flags & libc::SOCK_CLOEXEC != 0).unwrap());
    assert!(!pending.valid());
    drop((pending, server));
    io::Write::write_all(&mut &client, b"ahoy").unwrap();
    assert_eq!(program.line(), "9.8.7.6 258 ahoy 1");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn memory_that_is_not_there_is_a_fault_and_half_of_it_is_half() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let _program = bed.python(
        "
import ctypes, mmap
libc = ctypes.CDLL(None)
libc.mmap.restype = ctypes.c_void_p
area = libc.mmap(None, ctypes.c_size_t(8192), 3, 0x22, -1, ctypes.c_long(0))
libc.munmap(ctypes.c_void_p(area + 4096), ctypes.c_size_t(4096))
libc.syscall(42, 0, ctypes.c_void_p(area + 4090), 16)
",
    );
    let mut calls = next(&link).await;
    let pending = call(&mut calls).await;
    let (_, address, length) = connect(&pending);
    let caller = Caller::of(pending.notification.tid).unwrap();
    assert_eq!(caller.read(address, length as usize).unwrap().len(), 6);
    assert_eq!(process::peek(pending.notification.tid, address, &mut [0; 16]).unwrap(), 6);
    for nowhere in [0, 8, address + 6, 1 << 63, u64::MAX - 2] {
        let fault = Some(libc::EFAULT);
        assert_eq!(caller.read(nowhere, 4).unwrap_err().raw_os_error(), fault, "{nowhere:#x}");
        assert_eq!(caller.write(nowhere, &[1; 4]).unwrap_err().raw_os_error(), fault, "{nowhere:#x}");
        assert_eq!(process::peek(caller.tid(), nowhere, &mut [0; 4]).unwrap_err().raw_os_error(), fault);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_caller_at_its_limit_of_descriptors_can_be_told_so() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import socket, resource
l = socket.socket(); l.listen()
resource.setrlimit(resource.RLIMIT_NOFILE, (l.fileno() + 1, l.fileno() + 1))
try: l.accept()
except OSError as e: print(e.errno)
",
    );
    let mut calls = next(&link).await;
    let mut pending = call(&mut calls).await;
    let error = pending.give(io::stdin().as_fd(), true).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMFILE));
    assert!(pending.valid(), "it waits still");
    pending.answer(Answer::Errno(libc::EMFILE)).unwrap();
    assert_eq!(program.line(), libc::EMFILE.to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_signal_for_a_held_caller_is_seen_and_delivered_when_the_call_goes_on() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let program = bed.python(
        "
import socket, signal
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
signal.signal(signal.SIGUSR1, lambda *_: print('signal'))
l = socket.socket(); l.listen()
l.accept()
",
    );
    let mut calls = next(&link).await;
    let pending = call(&mut calls).await;
    let tid = pending.notification.tid;
    let pid = Pid::from_raw(program.pid().try_into().unwrap());
    // One that the thread blocks does not count.
    kill(pid, Signal::SIGUSR2).unwrap();
    assert!(!process::interrupted(tid).unwrap());
    kill(pid, Signal::SIGUSR1).unwrap();
    wait_for("the signal to be seen", seconds(20), || {
        Ok(if process::interrupted(tid)? { Look::Done(()) } else { Look::NotYet("nothing".into()) })
    })
    .unwrap();
    assert_eq!(program.spoke(), None, "a call that was received is not interrupted by itself");
    pending.answer(Answer::Continue).unwrap();
    assert_eq!(program.line(), "signal");
    // Python tries again.
    let again = call(&mut calls).await;
    assert!(matches!(again.notification.call, Call::Accept { .. }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_thread_that_is_gone_is_no_caller() {
    let bed = Bed::new(LONG);
    let link = bed.link().await;
    let mut program = bed.python("import socket; socket.socket().connect(('10.20.30.40', 513))");
    let mut calls = next(&link).await;
    let pending = call(&mut calls).await;
    let (fd, address, _) = connect(&pending);
    let caller = Caller::of(pending.notification.tid).unwrap();
    assert!(pending.valid());
    program.kill();
    assert!(!pending.valid());
    assert!(caller.descriptor(fd).is_err());
    assert!(caller.read(address, 16).map_or(true, |bytes| bytes.is_empty()));
    assert!(caller.write(address, &[0; 2]).is_err());
    assert!(caller.interrupted().is_err() && caller.pid().is_err());
    assert!(Caller::of(pending.notification.tid).is_err());
}
