//! The last counts of a socket against what the two ends have written, for every way in which a connection ends.

use std::{
    collections::HashMap,
    io::{Read, Write},
    net::{Shutdown, TcpStream},
    time::Duration,
};

use marline::sys::{
    diag::{Destruction, Diag, DiagSocket, Event},
    options::{self, cookie},
    socket,
    tcp_info::{Opening, Payload},
};
use socket2::SockRef;

use super::bed::{Bed, Ends, FAMILIES, kernel_tls, runtime, until, within};

/// Ends both sockets in its own way. What it leaves is closed, the client first.
type Ending = fn(&Diag, &mut Ends);

/// What is known of the counts at each end, the client's first.
#[derive(Clone, Copy)]
enum Known {
    Exactly,
    /// Something was left unread, so that a FIN behind it cannot be told.
    ButForAFin,
    /// close() has wiped them.
    Nothing,
}
use Known::{ButForAFin, Exactly, Nothing};

const ENDINGS: &[(&str, [Known; 2], Ending)] = &[
    ("the client closes, then the server", [Exactly; 2], |_, ends| {
        ends.client.shutdown(Shutdown::Both).unwrap();
        to_the_end(&mut ends.server);
    }),
    ("the server closes, then the client", [Exactly; 2], |_, ends| {
        ends.server.shutdown(Shutdown::Write).unwrap();
        to_the_end(&mut ends.client);
        ends.client.shutdown(Shutdown::Write).unwrap();
        to_the_end(&mut ends.server);
    }),
    ("the client closes its half and is answered", [Exactly; 2], |_, ends| {
        ends.client.shutdown(Shutdown::Write).unwrap();
        to_the_end(&mut ends.server);
        ends.down(30_000);
        ends.server.shutdown(Shutdown::Write).unwrap();
        to_the_end(&mut ends.client);
    }),
    ("the client is answered and closes before the server's end has come", [Exactly; 2], |_, ends| {
        ends.client.shutdown(Shutdown::Write).unwrap();
        to_the_end(&mut ends.server);
        ends.down(300);
    }),
    ("both close at once", [Exactly; 2], |_, ends| {
        ends.client.shutdown(Shutdown::Write).unwrap();
        ends.server.shutdown(Shutdown::Write).unwrap();
    }),
    ("the client resets by closing (SO_LINGER 0)", [Nothing, Exactly], |_, ends| {
        SockRef::from(&ends.client).set_linger(Some(Duration::ZERO)).unwrap();
    }),
    ("the server resets by closing (SO_LINGER 0)", [Exactly, Nothing], |_, ends| {
        close_now(&mut ends.server, |server| SockRef::from(server).set_linger(Some(Duration::ZERO)).unwrap());
        assert!(ends.client.read(&mut [0; 1]).is_err());
    }),
    ("the client closes with bytes unread", [ButForAFin, Exactly], |diag, ends| {
        ends.write_down(500);
        unread(diag, ends, &ends.client, 500);
    }),
    ("the server closes with bytes unread", [Exactly, ButForAFin], |diag, ends| {
        ends.write_up(500);
        unread(diag, ends, &ends.server, 500);
        close_now(&mut ends.server, |_| {});
        assert!(ends.client.read(&mut [0; 1]).is_err());
    }),
    ("the server closes with bytes unread, after the client's end", [Exactly, ButForAFin], |diag, ends| {
        ends.write_up(500);
        ends.client.shutdown(Shutdown::Write).unwrap();
        unread(diag, ends, &ends.server, 501);
        close_now(&mut ends.server, |_| {});
        assert!(ends.client.read(&mut [0; 1]).is_err());
    }),
    ("the client's is destroyed", [Exactly; 2], |diag, ends| destroy(diag, &ends.client)),
    ("the server's is destroyed", [Exactly; 2], |diag, ends| destroy(diag, &ends.server)),
    ("the server's is destroyed with bytes unread", [Exactly, ButForAFin], |diag, ends| {
        ends.write_up(500);
        unread(diag, ends, &ends.server, 500);
        destroy(diag, &ends.server);
    }),
];

#[test]
fn the_last_counts_of_a_socket_are_what_its_peer_wrote_however_it_ends() {
    let bed = Bed::new();
    let diag = Diag::open(&bed.netns).unwrap();
    let mut kinds = vec![false];
    if kernel_tls() {
        kinds.push(true);
    } else {
        println!("SKIPPED: counts of kernel TLS sockets: this kernel has none");
    }
    runtime().block_on(async {
        for family in FAMILIES {
            for &tls in &kinds {
                for (name, known, end) in ENDINGS {
                    let mut ended = Destruction::open(&bed.netns).unwrap();
                    let mut ends = bed.connect(family, tls);
                    let cookies = [cookie(&ends.client).unwrap(), cookie(&ends.server).unwrap()];
                    ends.up(1000);
                    ends.down(70_000);
                    // What was not acknowledged when a reset came is not counted as sent.
                    acknowledged(&ends);
                    end(&diag, &mut ends);
                    acknowledged(&ends);
                    let (up, down) = (ends.up, ends.down);
                    drop(ends);
                    let mut last = both(&mut ended, cookies).await;
                    for (side, opening, cookie, known, sent, received) in [
                        ("client", Opening::Active, cookies[0], known[0], up, down),
                        ("server", Opening::Passive, cookies[1], known[1], down, up),
                    ] {
                        let socket = last.remove(&cookie).unwrap();
                        let what = format!("{family:?}, TLS {tls}, {name}: {side}: {socket:?}");
                        check(&what, &socket, opening, tls, known, (sent, received));
                    }
                }
            }
        }
    });
}

fn check(what: &str, socket: &DiagSocket, opening: Opening, tls: bool, known: Known, (sent, received): (u64, u64)) {
    let counts = socket.counts.unwrap_or_else(|| panic!("no counts: {what}"));
    let payload = counts.payload(opening, socket.fin_received(tls));
    match (known, payload) {
        (Exactly, Some(payload)) if tls => {
            assert_eq!(payload, Payload { sent, received, unanswered: 0, exact: true }, "{what}")
        }
        // A read of a plain socket has taken the FIN, and nothing is left to tell of it.
        (Exactly | ButForAFin, Some(payload)) => {
            assert_eq!((payload.sent, payload.unanswered), (sent, 0), "{what}");
            assert!(!payload.exact && payload.received - received <= 1, "{payload:?}, not {received}: {what}");
        }
        (Nothing, None) => {}
        (_, payload) => panic!("{payload:?}: {what}"),
    }
}

async fn both(ended: &mut Destruction, cookies: [u64; 2]) -> HashMap<u64, DiagSocket> {
    let mut last = HashMap::new();
    while last.len() < 2 {
        match within(ended.next()).await.unwrap() {
            Event::Destroyed(socket) if cookies.contains(&socket.id.cookie) => {
                let doubled = last.insert(socket.id.cookie, *socket);
                assert_eq!(doubled, None, "each is told of once");
            }
            Event::Destroyed(_) => {}
            Event::Lost => panic!("lost"),
        }
    }
    last
}

#[test]
fn a_count_of_what_was_written_meets_every_byte_and_notices_one_more() {
    let bed = Bed::new();
    for family in FAMILIES {
        let mut ends = bed.connect(family, false);
        for (end, opening) in [(&ends.client, Opening::Active), (&ends.server, Opening::Passive)] {
            assert_eq!(options::written(end, opening).unwrap(), 0, "{family:?}");
        }
        // Acknowledged, in flight and not yet sent alike.
        ends.up(1000);
        ends.write_up(60_000);
        assert_eq!(options::written(&ends.client, Opening::Active).unwrap(), 61_000, "{family:?}");
        ends.client.write_all(&[0]).unwrap();
        assert_eq!(options::written(&ends.client, Opening::Active).unwrap(), 61_001, "{family:?}");
        ends.client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(options::written(&ends.client, Opening::Active).unwrap(), 61_002, "{family:?}: FIN");
        ends.write_down(5);
        assert_eq!(options::written(&ends.server, Opening::Passive).unwrap(), 5, "{family:?}");
    }
}

fn acknowledged(ends: &Ends) {
    for end in [&ends.client, &ends.server] {
        // A connection that was reset has nothing more to wait for; what it had not heard of stays in its count.
        let over = || options::counts(end).is_ok_and(|counts| counts.state == marline::sys::tcp_info::TcpState::CLOSED);
        until("acknowledgements", || over() || socket::unacknowledged(end).unwrap() == 0);
    }
}

/// Waits until so many bytes are there to be read at one end, and the other knows that they have come.
fn unread(diag: &Diag, ends: &Ends, end: &TcpStream, bytes: u32) {
    let (local, remote) = (end.local_addr().unwrap(), end.peer_addr().unwrap());
    until("bytes to come", || diag.find(local, remote).unwrap().is_some_and(|found| found.unread >= bytes));
    acknowledged(ends);
}

fn destroy(diag: &Diag, end: &TcpStream) {
    let found = diag.find(end.local_addr().unwrap(), end.peer_addr().unwrap()).unwrap().expect("the connection");
    assert!(diag.destroy(&found.id).unwrap());
}

fn to_the_end(end: &mut TcpStream) {
    end.read_to_end(&mut Vec::new()).unwrap();
}

/// Closes an end whose place in `Ends` goes on to hold something: a socket that was never connected.
fn close_now(end: &mut TcpStream, before: impl FnOnce(&TcpStream)) {
    before(end);
    let blank = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    drop(std::mem::replace(end, blank.into()));
}
