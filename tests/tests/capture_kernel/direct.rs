//! A pod's socket in the agent's hands: what was announced leaves it, however TCP cuts it, and nothing else does.
//!
//! The servers are outside of the mesh, so that they see what a stranger would. That nothing arrived is proven by the reset
//! that comes after: whatever had been sent before would have been read first.
use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::{AsFd, OwnedFd},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use marline::{
    bpf::{BpfError, Gate},
    sys::{netns::Netns, options},
};
use marline_common::MAX_ANNOUNCED;
use socket2::Socket;

use super::{
    bed::{Agent, Bed, ip},
    framing::records,
    helper::PATIENCE,
};

const NODE4: &str = "10.77.1.1:7200";
const NODE6: &str = "[fd77:1::1]:7200";
const NODE_MAPPED: &str = "[::ffff:10.77.1.1]:7200";
/// What programs ask for and mesh addresses stand for: nothing has this address.
const SHOWN4: &str = "10.96.0.10:80";
const SHOWN6: &str = "[fd96::10]:80";
const SHOWN_MAPPED: &str = "[::ffff:10.96.0.10]:80";

/// Destinations of each kind, and what is shown in their place.
pub(super) const FAMILIES: [(&str, &str); 3] = [(NODE4, SHOWN4), (NODE6, SHOWN6), (NODE_MAPPED, SHOWN_MAPPED)];

/// A socket of pod a in handshake with a server.
pub(super) struct Line {
    pub(super) socket: Socket,
    pub(super) gate: Gate,
    pub(super) server: TcpStream,
}

/// Connects a socket of pod a to a server in the namespace `at`, as the agent does.
pub(super) fn line(bed: &Bed, agent: &Agent, at: &Netns, to: &str, shown: &str) -> Line {
    line_of(agent, at, bed.a.socket(to.parse().unwrap()), to, shown)
}

/// The same of a socket that is there.
pub(super) fn line_of(agent: &Agent, at: &Netns, socket: Socket, to: &str, shown: &str) -> Line {
    let to: SocketAddr = to.parse().unwrap();
    let listener = at.run(|| TcpListener::bind(SocketAddr::new(to.ip().to_canonical(), to.port())).unwrap()).unwrap();
    let gate = agent.capture.direct(socket.as_fd(), to, shown.parse().unwrap()).unwrap();
    socket.connect(&to.into()).unwrap();
    let (server, _) = listener.accept().unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    Line { socket, gate, server }
}

pub(super) fn until(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < PATIENCE, "waited for {what}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// Resets the connection from the pod's side and tells what the server had received until then.
pub(super) fn received_before_reset(socket: &Socket, mut server: TcpStream) -> Vec<u8> {
    options::disconnect(socket).unwrap();
    server.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = Vec::new();
    let error = server.read_to_end(&mut received).expect_err("the stream does not end in order");
    assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET));
    received
}

/// Bytes of which no two chunks are alike.
pub(super) fn noise(length: usize) -> Vec<u8> {
    (0..length).map(|i| (i.wrapping_mul(2_654_435_761) >> 11) as u8).collect()
}

fn each_family(test: impl Fn(&Bed, &Agent, Line)) {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    for (to, shown) in FAMILIES {
        test(&bed, &agent, line(&bed, &agent, &bed.node, to, shown));
    }
}

#[test]
fn announced_bytes_leave_however_they_are_cut_and_to_the_last_one() {
    each_family(|_, agent, Line { mut socket, mut gate, mut server }| {
        let bytes = noise(MAX_ANNOUNCED);
        let mut received = vec![0; bytes.len()];
        let mut start = 0;
        // Pieces that are shorter, as long and longer than what is compared at once, and than a segment.
        for length in [1, 62, 1, 64, 65, 1447, 1449, 2900] {
            let piece = &bytes[start..start + length];
            gate.announce(piece).unwrap();
            socket.write_all(piece).unwrap();
            server.read_exact(&mut received[start..start + length]).unwrap();
            start += length;
        }
        gate.announce(&bytes[start..]).unwrap();
        assert_eq!(gate.announced(), MAX_ANNOUNCED as u64);
        // All in one call and one by one.
        socket.write_all(&bytes[start..bytes.len() - 100]).unwrap();
        socket.set_tcp_nodelay(true).unwrap();
        bytes[bytes.len() - 100..].iter().for_each(|byte| socket.write_all(&[*byte]).unwrap());
        server.read_exact(&mut received[start..]).unwrap();
        assert_eq!(received, bytes);
        assert!(!gate.poisoned().unwrap());
        assert!(matches!(gate.announce(&[0]), Err(BpfError::TooLong { .. })));
        drop(gate);
        assert_eq!(received_before_reset(&socket, server), b"");
        assert_eq!(agent.counter("direct_dropped"), 0);
    });
}

#[test]
fn announced_bytes_leave_again_when_they_were_lost() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let Line { mut socket, mut gate, mut server } = line(&bed, &agent, &bed.node, NODE4, SHOWN4);
    let bytes = noise(4000);
    gate.announce(&bytes).unwrap();
    let mut received = vec![0; bytes.len()];
    socket.write_all(&bytes[..1000]).unwrap();
    server.read_exact(&mut received[..1000]).unwrap();
    let node = bed.node.path().file_name().unwrap().to_str().unwrap().to_owned();
    ip(&format!("-n {node} link set to-a down"));
    socket.write_all(&bytes[1000..]).unwrap();
    until("something to be lost", || options::counts(&socket).unwrap().bytes_retransmitted > 0);
    ip(&format!("-n {node} link set to-a up"));
    server.read_exact(&mut received[1000..]).unwrap();
    assert_eq!(received, bytes);
    assert!(!gate.poisoned().unwrap());
    assert_eq!(agent.counter("direct_dropped"), 0);
}

#[test]
fn what_was_not_announced_stays_in_the_pod() {
    each_family(|_, agent, Line { mut socket, gate, server }| {
        let before = agent.counter("direct_dropped");
        socket.write_all(b"GET /secret").unwrap();
        until("the poison", || gate.poisoned().unwrap());
        assert!(agent.counter("direct_dropped") > before);
        assert!(matches!(gate.release(), Err(BpfError::Poisoned)));
        // The refused release has shut it for good.
        socket.write_all(b"GET /more").unwrap();
        assert_eq!(received_before_reset(&socket, server), b"");
    });
}

#[test]
fn a_thread_that_writes_in_between_is_told_from_the_agent() {
    each_family(|_, _, Line { mut socket, mut gate, mut server }| {
        let [hello, finished] = [noise(1500), noise(3000)];
        gate.announce(&hello).unwrap();
        socket.write_all(&hello).unwrap();
        let mut received = vec![0; hello.len()];
        server.read_exact(&mut received).unwrap();
        assert_eq!(received, hello);
        let mut twin = socket.try_clone().unwrap();
        thread::spawn(move || twin.write_all(b"x").unwrap()).join().unwrap();
        until("the poison", || gate.poisoned().unwrap());
        // What the agent goes on to say is at the wrong place now.
        gate.announce(&finished).unwrap();
        socket.write_all(&finished).unwrap();
        assert_eq!(received_before_reset(&socket, server), b"");
    });
}

#[test]
fn one_wrong_byte_anywhere_in_a_segment_holds_all_of_it_back() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let bytes = noise(1400);
    for wrong in [0, 1, 63, 64, 65, 700, 1398, 1399] {
        let Line { mut socket, mut gate, server } = line(&bed, &agent, &bed.node, NODE4, SHOWN4);
        gate.announce(&bytes).unwrap();
        let mut sent = bytes.clone();
        sent[wrong] ^= 1;
        socket.write_all(&sent).unwrap();
        until("the poison", || gate.poisoned().unwrap());
        assert_eq!(received_before_reset(&socket, server), b"", "byte {wrong}");
    }
}

#[test]
fn a_byte_beyond_what_was_announced_holds_its_segment_back() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    for length in [63, 64, 65, 1400] {
        let Line { mut socket, mut gate, server } = line(&bed, &agent, &bed.node, NODE4, SHOWN4);
        let bytes = noise(length + 1);
        gate.announce(&bytes[..length]).unwrap();
        socket.write_all(&bytes).unwrap();
        until("the poison", || gate.poisoned().unwrap());
        assert_eq!(received_before_reset(&socket, server), b"", "{length} bytes");
    }
}

#[test]
fn a_socket_in_handshake_is_watched_on_the_loopback_device_too() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    for to in ["10.77.1.2:7201", "[fd77:1::2]:7201"] {
        let Line { mut socket, mut gate, mut server } = line(&bed, &agent, &bed.a.netns, to, to);
        gate.announce(b"hello").unwrap();
        socket.write_all(b"hello").unwrap();
        let mut received = [0; 5];
        server.read_exact(&mut received).unwrap();
        socket.write_all(b"secret").unwrap();
        until("the poison", || gate.poisoned().unwrap());
        assert_eq!(received_before_reset(&socket, server), b"");
    }
}

#[test]
fn a_released_socket_is_the_applications() {
    each_family(|bed, agent, Line { mut socket, mut gate, mut server }| {
        let shown = socket.peer_addr().unwrap().as_socket().unwrap();
        assert_eq!(shown.ip().to_canonical().to_string(), if is_v4(shown) { "10.96.0.10" } else { "fd96::10" });
        gate.announce(b"hello").unwrap();
        socket.write_all(b"hello").unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        gate.release().unwrap();

        let bytes = records(1 << 20);
        let writer = thread::spawn({
            let (bytes, mut twin) = (bytes.clone(), socket.try_clone().unwrap());
            move || twin.write_all(&bytes).unwrap()
        });
        let mut received = vec![0; bytes.len()];
        server.read_exact(&mut received).unwrap();
        writer.join().unwrap();
        assert!(received == bytes);
        server.write_all(b"aye").unwrap();
        socket.read_exact(&mut [0; 3]).unwrap();
        assert_eq!(socket.peer_addr().unwrap().as_socket().unwrap(), shown, "the name stays");
        let local = socket.local_addr().unwrap().as_socket().unwrap().ip().to_canonical();
        assert!(bed.a.addresses().contains(&local));
        assert_eq!(agent.counter("direct_dropped") + agent.counter("egress_dropped"), 0);
    });
}

fn is_v4(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_ipv4()
}

#[test]
fn data_in_a_syn_leaves_only_if_it_was_announced() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    // Clients may send data at once, without a server's cookie.
    bed.a.netns.run(|| std::fs::write("/proc/sys/net/ipv4/tcp_fastopen", "5").unwrap()).unwrap();
    let to: SocketAddr = NODE4.parse().unwrap();
    let listener = bed.node.run(|| TcpListener::bind(to).unwrap()).unwrap();
    for announced in [true, false] {
        let socket = bed.a.socket(to);
        let mut gate = agent.capture.direct(socket.as_fd(), to, to).unwrap();
        gate.announce(if announced { b"hello" } else { b"other" }).unwrap();
        assert_eq!(socket.send_to_with_flags(b"hello", &to.into(), libc::MSG_FASTOPEN).unwrap(), 5);
        if announced {
            let (mut server, _) = listener.accept().unwrap();
            let mut received = [0; 5];
            server.read_exact(&mut received).unwrap();
            assert_eq!(&received, b"hello");
            assert!(!gate.poisoned().unwrap());
        } else {
            until("the poison", || gate.poisoned().unwrap());
            // TCP tries again without data, and is let through.
            let (server, _) = listener.accept().unwrap();
            assert_eq!(received_before_reset(&socket, server), b"");
        }
    }
}

#[test]
fn bytes_are_found_behind_options_of_the_internet_protocol() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    // Four bytes of "no operation"; eight of destination options and of hop-by-hop options that say nothing.
    let v4 = "s.setsockopt(socket.IPPROTO_IP, socket.IP_OPTIONS, bytes([1, 1, 1, 0]))";
    let v6 = "for name in (socket.IPV6_DSTOPTS, socket.IPV6_HOPOPTS): \
              s.setsockopt(socket.IPPROTO_IPV6, name, bytes([0, 0, 1, 4, 0, 0, 0, 0]))";
    for (to, options) in [(NODE4, v4), (NODE6, v6)] {
        let to: SocketAddr = to.parse().unwrap();
        let listener = bed.node.run(|| TcpListener::bind(to).unwrap()).unwrap();
        let mut socket = bed.a.socket(to);
        let theirs = OwnedFd::from(socket.try_clone().unwrap());
        let script = format!("import socket; s = socket.socket(fileno=0)\n{options}");
        let Ok(status) = Command::new("python3").args(["-c", &script]).stdin(theirs).status() else {
            println!("SKIPPED: bytes_are_found_behind_options_of_the_internet_protocol: no python3 to set them");
            return;
        };
        assert!(status.success());
        let mut gate = agent.capture.direct(socket.as_fd(), to, to).unwrap();
        socket.connect(&to.into()).unwrap();
        let (mut server, _) = listener.accept().unwrap();
        gate.announce(b"hello").unwrap();
        socket.write_all(b"hello").unwrap();
        server.set_read_timeout(Some(PATIENCE)).unwrap();
        server.read_exact(&mut [0; 5]).unwrap();
        socket.write_all(b"secret").unwrap();
        until("the poison", || gate.poisoned().unwrap());
        assert_eq!(received_before_reset(&socket, server), b"");
    }
}

#[test]
fn a_pod_that_is_not_ready_has_no_direct_sockets() {
    let bed = Bed::new();
    let agent = bed.agent();
    let to: SocketAddr = NODE4.parse().unwrap();
    let direct = || agent.capture.direct(bed.a.socket(to).as_fd(), to, to);
    assert!(matches!(direct(), Err(BpfError::NotEnrolled { .. })));
    let _served = agent.serve(&bed.a, &bed.a.addresses());
    assert!(matches!(direct(), Err(BpfError::NotEnrolled { .. })));
}
