//! What a keeper hears at its sockets that it should not: it stays what it was, and says why it took nothing.

use std::{
    fs::File,
    io::{Read, Write},
    net::Shutdown,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{fs::PermissionsExt, net::UnixStream},
    },
};

use marline::{
    keeper::{Container, Offer, OfferError, agent_socket, seccomp_socket},
    sys::pass,
};
use marline_tests::wait::seconds;
use socket2::{Domain, SockAddr, Socket, Type};

use crate::bed::{Bed, LONG, next};

const STATE: &str = r#"{"ociVersion":"1.0.2","fds":["seccompFd"],"pid":1,"state":{"id":"x","pid":1}}"#;

/// What the keeper answers to a message.
pub(crate) fn told(bed: &Bed, text: &[u8], descriptors: &[BorrowedFd<'_>]) -> String {
    let mut stream = UnixStream::connect(seccomp_socket(&bed.dir())).unwrap();
    stream.set_read_timeout(Some(seconds(20))).unwrap();
    stream.set_write_timeout(Some(seconds(20))).unwrap();
    let sent = pass::send(&stream, text, descriptors).unwrap();
    // It may have heard enough before the end, and closed.
    let _ = stream.write_all(&text[sent..]);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    // A connection that is closed with something unread in it is reset; the answer comes first.
    let _ = stream.read_to_end(&mut answer);
    String::from_utf8_lossy(&answer).into_owned()
}

/// It does its work.
async fn works(bed: &Bed) {
    let mut program = bed.python("input()");
    let link = bed.link().await;
    assert_eq!(next(&link).await.held.container.pid, program.pid());
    program.kill();
    bed.keeper_holds(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn messages_that_are_no_container_states_are_refused_with_a_reason() {
    let bed = Bed::new(LONG);
    let file = File::open("/dev/null").unwrap();
    let one = [file.as_fd()];
    let two = [file.as_fd(), file.as_fd()];
    let eight = [file.as_fd(); pass::MOST];
    let named = STATE.replace("[\"seccompFd\"]", "[\"other\"]");
    let cases: [(&str, &[u8], &[BorrowedFd<'_>], &str); 9] = [
        ("no JSON", b"hello keeper", &one, "not a container process state"),
        ("half of it", &STATE.as_bytes()[..30], &one, "ends in the middle"),
        ("binary", &[0xff, 0, 1, 2], &one, "not a container process state"),
        ("other JSON", b"{}", &one, "missing field"),
        ("another name", named.as_bytes(), &one, "no seccompFd"),
        ("no descriptor", STATE.as_bytes(), &[], "0 descriptors came, and the message names 1"),
        ("two descriptors", STATE.as_bytes(), &two, "2 descriptors came, and the message names 1"),
        ("eight descriptors", STATE.as_bytes(), &eight, "8 descriptors came"),
        ("another kind of descriptor", STATE.as_bytes(), &one, "/dev/null instead of a seccomp notify descriptor"),
    ];
    for (what, text, descriptors, reason) in cases {
        let answer = told(&bed, text, descriptors);
        assert!(answer.starts_with('-') && answer.contains(reason), "{what}: {answer:?}");
    }
    works(&bed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_message_without_an_end_is_cut_off() {
    let bed = Bed::new(LONG);
    let long = format!("{{\"fds\":[\"{}", "x".repeat(4 << 20));
    let answer = told(&bed, long.as_bytes(), &[]);
    assert!(answer.starts_with("-the message is longer than"), "{answer:?}");
    let deep = "[".repeat(100_000);
    let answer = told(&bed, deep.as_bytes(), &[]);
    assert!(answer.starts_with('-'), "{answer:?}");
    works(&bed).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn a_message_in_pieces_is_taken_as_one() {
    let bed = Bed::new(LONG);
    let mut program = bed.python("input()");
    let link = bed.link().await;
    let held = next(&link).await;
    // The same descriptor again, from a slow sender.
    let mut stream = UnixStream::connect(seccomp_socket(&bed.dir())).unwrap();
    stream.set_read_timeout(Some(seconds(20))).unwrap();
    pass::send(&stream, &STATE.as_bytes()[..1], &[held.held.as_fd()]).unwrap();
    for byte in &STATE.as_bytes()[1..] {
        stream.write_all(&[*byte]).unwrap();
    }
    let mut answer = [0];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer, [b'+'], "though its sender has not closed");
    assert_eq!(next(&link).await.held.container, Container { pid: 1, id: "x".into(), metadata: String::new() });
    program.kill();
    bed.keeper_holds(0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn peers_that_say_nothing_and_many_of_them_keep_nobody_out() {
    let bed = Bed::new(LONG);
    for _ in 0..200 {
        drop(UnixStream::connect(seccomp_socket(&bed.dir())).unwrap());
    }
    let silent: Vec<UnixStream> = (0..200).map(|_| UnixStream::connect(seccomp_socket(&bed.dir())).unwrap()).collect();
    works(&bed).await;
    assert!(!bed.log().contains("ERROR"), "{}", bed.log());
    // Their time ends as well.
    for mut stream in silent {
        stream.set_read_timeout(Some(seconds(20))).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("in time"), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
async fn agents_that_speak_or_leave_do_not_matter() {
    let bed = Bed::new(LONG);
    let connect = || {
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).unwrap();
        socket.connect(&SockAddr::unix(agent_socket(&bed.dir())).unwrap()).unwrap();
        socket
    };
    for _ in 0..50 {
        drop(connect());
    }
    let file = File::open("/dev/null").unwrap();
    let talkers: Vec<OwnedFd> = (0..4).map(|_| connect().into()).collect();
    for talker in &talkers {
        for _ in 0..10 {
            // One that waits for its turn is let go for it, one that has it is not heard.
            let _ = pass::send(talker, &[7; 1000], &[file.as_fd(); 8]);
        }
    }
    let half = connect();
    half.shutdown(Shutdown::Write).unwrap();
    drop(talkers);
    works(&bed).await;
    drop(half);
    works(&bed).await;
}

#[test]
fn the_sockets_are_for_root_alone() {
    let bed = Bed::new(LONG);
    for socket in [seccomp_socket(&bed.dir()), agent_socket(&bed.dir())] {
        let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", socket.display());
    }
}

#[test]
fn without_a_keeper_an_offer_says_so() {
    let dir = tempfile::tempdir().unwrap();
    assert!(matches!(Offer::connect(dir.path()), Err(OfferError::Absent { .. })));
    // A socket that nobody listens at is no keeper either.
    drop(std::os::unix::net::UnixListener::bind(seccomp_socket(dir.path())).unwrap());
    assert!(matches!(Offer::connect(dir.path()), Err(OfferError::Absent { .. })));
}
