//! A released socket: TLS records leave it, however they are cut and however often they are sent, and nothing else does.
//!
//! The gate looks at headers alone, so most records here are made up. What did not leave is looked for on the wire itself.
use std::{
    fs,
    io::{ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream},
    os::fd::OwnedFd,
    process::Command,
    sync::mpsc,
    thread,
    time::Duration,
};

use marline::{
    sys::{netns::Netns, options, tcp_info::Opening},
    tls::ktls::{self, KtlsError},
};
use rustls::{
    ConnectionTrafficSecrets,
    crypto::{
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        cipher::{AeadKey, Iv},
    },
};
use socket2::{Domain, Protocol, Socket, Type};

use super::{
    bed::{Agent, Bed, ip},
    direct::{FAMILIES, Line, line, line_of, noise, received_before_reset, until},
};

const NODE: &str = "10.77.1.1:7400";
const NODE6: &str = "[fd77:1::1]:7400";
/// What the agent says before the records. It is cut by a wrap of the sequence numbers, and ends beyond a segment's end.
const HELLO: usize = 2000;
const SECRET: &[u8] = b"GET /secret HTTP/1.1\r\n\r\n";
const SMALLEST: usize = 17;
const LONGEST: usize = 16640;

/// A record that says this, or begins with it.
fn saying(what: &[u8], length: usize) -> Vec<u8> {
    let mut record = [&[0x17, 3, 3][..], &u16::try_from(length).unwrap().to_be_bytes()].concat();
    record.extend(what);
    record.resize(5 + length, 0x17);
    record
}

fn record(length: usize) -> Vec<u8> {
    saying(&noise(length), length)
}

/// Records of many lengths, at least as many bytes as these.
pub(super) fn records(bytes: usize) -> Vec<u8> {
    let mut stream = Vec::new();
    while stream.len() < bytes {
        let length = SMALLEST + stream.len() * 7 % (LONGEST - SMALLEST);
        stream.extend(record(length));
    }
    stream
}

/// The end of the handshake: something is said, and the application has the socket.
fn release(line: Line) -> (Socket, TcpStream) {
    let Line { mut socket, mut gate, mut server } = line;
    let hello = noise(HELLO);
    gate.announce(&hello).unwrap();
    socket.write_all(&hello).unwrap();
    server.read_exact(&mut [0; HELLO]).unwrap();
    gate.release().unwrap();
    // Each write is a segment from here on.
    socket.set_tcp_nodelay(true).unwrap();
    (socket, server)
}

fn write_and_read(socket: &mut Socket, server: &mut TcpStream, bytes: &[u8]) {
    let mut received = vec![0; bytes.len()];
    thread::scope(|scope| {
        scope.spawn(|| socket.write_all(bytes).unwrap());
        server.read_exact(&mut received).unwrap();
    });
    assert!(received == bytes, "the bytes are others");
}

fn undisturbed(agent: &Agent) {
    for counter in ["direct_foreign", "direct_held_back", "direct_dropped", "egress_dropped"] {
        assert_eq!(agent.counter(counter), 0, "{counter}");
    }
}

/// Whether the node's answers to pod a find their way. What the pod sends arrives all the same.
fn acknowledgements(bed: &Bed, arrive: bool) {
    let node = bed.node.path().file_name().unwrap().to_str().unwrap();
    let change = if arrive { "del" } else { "add" };
    ip(&format!("-n {node} route {change} blackhole {}/32", bed.a.v4));
}

/// All frames that pass the devices of a namespace.
struct Wire(Socket);

impl Wire {
    fn tap(netns: &Netns) -> Self {
        let all = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket = netns.run(|| Socket::new(Domain::PACKET, Type::RAW, Some(all)).unwrap()).unwrap();
        socket.set_nonblocking(true).unwrap();
        Self(socket)
    }

    /// What was seen until now. The tap hears of a frame before its receiver does.
    fn frames(&mut self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = vec![0; 1 << 20];
        loop {
            match self.0.read(&mut buffer) {
                Ok(length) => frames.push(buffer[..length].to_vec()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return frames,
                Err(error) => panic!("{error}"),
            }
        }
    }
}

fn shows(frames: &[Vec<u8>], marker: &[u8]) -> bool {
    frames.iter().any(|frame| frame.windows(marker.len()).any(|window| window == marker))
}

#[test]
fn records_leave_wherever_a_segment_cuts_them() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    for (to, shown) in FAMILIES {
        let (mut socket, mut server) = release(line(&bed, &agent, &bed.node, to, shown));
        let two = [record(SMALLEST), record(40)].concat();
        for cut in 1..two.len() {
            for piece in [&two[..cut], &two[cut..]] {
                write_and_read(&mut socket, &mut server, piece);
            }
        }
        for byte in &two {
            write_and_read(&mut socket, &mut server, &[*byte]);
        }
        write_and_read(&mut socket, &mut server, &record(LONGEST));
    }
    undisturbed(&agent);
}

#[test]
fn the_smallest_records_leave_by_thousands_in_one_packet() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    for to in [NODE, NODE6] {
        let (mut socket, mut server) = release(line(&bed, &agent, &bed.node, to, to));
        // Of two lengths, so that packets end anywhere in a record.
        let stream: Vec<u8> = (0..60_000).flat_map(|i| record(SMALLEST + i % 2000 / 1999)).collect();
        write_and_read(&mut socket, &mut server, &stream);
        write_and_read(&mut socket, &mut server, &records(1 << 21));
    }
    undisturbed(&agent);
}

#[test]
fn records_leave_again_when_they_were_lost() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let (mut socket, mut server) = release(line(&bed, &agent, &bed.node, NODE, NODE));
    // Pieces that are sent one by one, and not acknowledged, take much room each.
    socket2::SockRef::from(&socket).set_send_buffer_size(4 << 20).unwrap();
    let stream: Vec<u8> = (0..2000).flat_map(|i| record(SMALLEST + i % 50)).collect();
    let mut received = vec![0; stream.len()];
    // The first of it leaves in small pieces, and again in others, with more behind it.
    for (round, part) in stream.chunks(stream.len().div_ceil(3)).enumerate() {
        let before = options::counts(&socket).unwrap().bytes_retransmitted;
        acknowledgements(&bed, false);
        let (small, rest) = part.split_at(500);
        small.chunks(7).for_each(|piece| socket.write_all(piece).unwrap());
        until("something to be sent again", || options::counts(&socket).unwrap().bytes_retransmitted > before);
        socket.write_all(rest).unwrap();
        acknowledgements(&bed, true);
        let start = round * stream.len().div_ceil(3);
        server.read_exact(&mut received[start..start + part.len()]).unwrap();
    }
    assert!(received == stream);
    undisturbed(&agent);
}

#[test]
fn whatever_is_no_record_stays_in_the_pod_and_nothing_follows_it() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let header = |bytes: [u8; 5]| [&bytes[..], SECRET].concat();
    let cases = [
        ("plaintext", SECRET.to_vec()),
        ("plaintext behind a record", [record(100), SECRET.to_vec()].concat()),
        ("a handshake record", header([0x16, 3, 3, 0, 24])),
        ("an alert", header([0x15, 3, 3, 0, 24])),
        ("another version", header([0x17, 3, 1, 0, 24])),
        ("too short", header([0x17, 3, 3, 0, 16])),
        ("too long", header([0x17, 3, 3, 0x41, 1])),
        ("far too long", header([0x17, 3, 3, 0xff, 0xff])),
    ];
    for (name, foreign) in &cases {
        refused(&bed, &agent, FAMILIES[0], name, &[], foreign);
    }
    for family in &FAMILIES[1..] {
        refused(&bed, &agent, *family, "plaintext", &[], SECRET);
    }
    // Behind a header that the segment's end has cut, which leaves.
    let cut = [0x17, 3, 3, 0x41];
    for seen in 1..=4 {
        refused(&bed, &agent, FAMILIES[0], "plaintext behind a part of a header", &cut[..seen], SECRET);
    }
}

fn refused(bed: &Bed, agent: &Agent, (to, shown): (&str, &str), name: &str, fine: &[u8], foreign: &[u8]) {
    let (mut socket, mut server) = release(line(bed, agent, &bed.node, to, shown));
    let mut wire = Wire::tap(&bed.node);
    let before = agent.counter("direct_foreign");
    write_and_read(&mut socket, &mut server, &saying(b"in order", 20));
    if !fine.is_empty() {
        write_and_read(&mut socket, &mut server, fine);
    }
    socket.write_all(foreign).unwrap();
    until("the drop", || agent.counter("direct_foreign") > before);
    let once = agent.counter("direct_foreign");
    socket.write_all(&saying(b"too late", 20)).unwrap();
    until("TCP to try again", || agent.counter("direct_foreign") > once);
    assert_eq!(received_before_reset(&socket, server), b"", "{name}");
    let frames = wire.frames();
    assert!(shows(&frames, b"in order"), "{name}: the tap works");
    assert!(!shows(&frames, b"secret") && !shows(&frames, b"too late"), "{name}");
    assert_eq!(agent.counter("direct_held_back"), 0, "{name}");
}

#[test]
fn records_leave_where_sequence_numbers_begin_anew() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let stream = records(40_000);
    // In the handshake, at its end, in a record's header, in its body, and in a later packet.
    for before in [1, 1000, HELLO, HELLO + 1, HELLO + 3, HELLO + 5, HELLO + 10, HELLO + 30_000] {
        let to: SocketAddr = NODE.parse().unwrap();
        let socket = bed.a.socket(to);
        let first = u32::MAX - u32::try_from(before).unwrap();
        if !set_sequence(&socket, first) {
            println!("SKIPPED: records_leave_where_sequence_numbers_begin_anew: no python3 to set them");
            return;
        }
        let mut wire = Wire::tap(&bed.node);
        let (mut socket, mut server) = release(line_of(&agent, &bed.node, socket, NODE, NODE));
        write_and_read(&mut socket, &mut server, &stream[..3]);
        write_and_read(&mut socket, &mut server, &stream[3..]);
        assert_eq!(syn(&wire.frames()), first, "the SYN's number is the one that was set");
        // And what is no record is found there as well.
        socket.write_all(SECRET).unwrap();
        assert_eq!(received_before_reset(&socket, server), b"");
    }
    assert_eq!(agent.counter("direct_held_back"), 0);
    assert!(agent.counter("direct_foreign") >= 8);
}

/// The sequence number of the first SYN, without options of the internet protocol.
fn syn(frames: &[Vec<u8>]) -> u32 {
    let tcp = frames.iter().filter(|frame| frame.len() >= 54 && frame[12..14] == [8, 0] && frame[23] == 6);
    let syn = tcp.map(|frame| &frame[34..]).find(|tcp| tcp[13] == 0x02).expect("a SYN");
    u32::from_be_bytes(syn[4..8].try_into().unwrap())
}

/// The number of the SYN that an unconnected socket will send.
fn set_sequence(socket: &Socket, number: u32) -> bool {
    // TCP_REPAIR, TCP_REPAIR_QUEUE (the one that is sent), TCP_QUEUE_SEQ.
    let script = format!(
        "import socket, struct; s = socket.socket(fileno=0)\n\
         for name, value in ((19, 1), (20, 2), (21, {number}), (19, 0)): s.setsockopt(6, name, struct.pack('=I', value))"
    );
    let theirs = OwnedFd::from(socket.try_clone().unwrap());
    let Ok(status) = Command::new("python3").args(["-c", &script]).stdin(theirs).status() else {
        return false;
    };
    assert!(status.success());
    true
}

/// The race that the gate stays for. Inside send() since before the kernel had the keys, waiting for room, the thread goes on with plain
/// TCP after the release: TCP's count has nothing of it when the agent looks.
#[test]
fn a_thread_that_was_inside_send_at_the_release_gets_nothing_out() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let Line { mut socket, mut gate, mut server } = line(&bed, &agent, &bed.node, NODE, NODE);
    let mut wire = Wire::tap(&bed.node);
    acknowledgements(&bed, false);
    // Full with what the agent says, until that is acknowledged; and nothing of it waits for more to go with it.
    socket.set_send_buffer_size(1).unwrap();
    socket.set_tcp_nodelay(true).unwrap();
    let hello = noise(3 * HELLO);
    gate.announce(&hello).unwrap();
    socket.write_all(&hello).unwrap();
    let (tell, told) = mpsc::channel();
    let mut twin = socket.try_clone().unwrap();
    let thread = thread::spawn(move || {
        tell.send(nix::unistd::gettid()).unwrap();
        twin.write_all(SECRET).unwrap();
    });
    let call = format!("/proc/self/task/{}/syscall", told.recv().unwrap());
    let sending = format!("{} ", libc::SYS_sendto);
    until("the thread to wait in send()", || fs::read_to_string(&call).unwrap().starts_with(&sending));
    let sealed = seal(&socket);
    assert_eq!(options::written(&socket, Opening::Active).unwrap(), gate.announced(), "the agent sees nothing of it");
    gate.release().unwrap();
    acknowledgements(&bed, true);

    thread.join().unwrap();
    until("the drop", || agent.counter("direct_foreign") > 0);
    let written = options::written(&socket, Opening::Active).unwrap();
    assert_eq!(written, (hello.len() + SECRET.len()) as u64, "it is in the stream, and in the clear");
    let mut received = vec![0; hello.len()];
    server.read_exact(&mut received).unwrap();
    assert!(received == hello, "what was announced leaves, though it was not acknowledged at the release");
    // With records on it, it cannot be disconnected.
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    drop(socket);
    let error = server.read(&mut [0; 1]).unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::ECONNRESET));
    let frames = wire.frames();
    assert!(shows(&frames, &hello[..100]), "the tap works");
    assert!(!shows(&frames, SECRET));
    println!("kernel TLS on the socket: {sealed}");
}

/// Gives the kernel keys, where it has TLS: what is written from then on is sealed.
fn seal(socket: &Socket) -> bool {
    match ktls::attach(socket) {
        Err(KtlsError::NotThere(_)) => return false,
        attached => attached.unwrap(),
    }
    let key = || ConnectionTrafficSecrets::Chacha20Poly1305 { key: AeadKey::from([1; 32]), iv: Iv::copy(&[1; 12]) };
    for direction in [ktls::Direction::Transmit, ktls::Direction::Receive] {
        ktls::install(socket, direction, TLS13_CHACHA20_POLY1305_SHA256, (0, key())).unwrap();
    }
    true
}

#[test]
fn what_kernel_tls_writes_leaves() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let (mut socket, mut server) = release(line(&bed, &agent, &bed.node, NODE, NODE));
    if !seal(&socket) {
        println!("SKIPPED: what_kernel_tls_writes_leaves: this kernel has no TLS");
        return;
    }
    // As many bytes as were written, and 22 more for each record.
    let lengths = [1, 2, 100, 16384, 16385, 100_000];
    let sealed = |length: usize| length + length.div_ceil(16384) * 22;
    for length in lengths {
        let bytes = noise(length);
        thread::scope(|scope| {
            scope.spawn(|| socket.write_all(&bytes).unwrap());
            server.read_exact(&mut vec![0; sealed(length)]).unwrap();
        });
    }
    for _ in 0..3000 {
        socket.write_all(b"x").unwrap();
    }
    server.read_exact(&mut vec![0; 3000 * sealed(1)]).unwrap();
    undisturbed(&agent);
}

#[test]
fn packets_of_big_tcp_leave_with_all_the_records_that_they_hold() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let [node, pod] = [&bed.node, &bed.a.netns].map(|ns| ns.path().file_name().unwrap().to_str().unwrap().to_owned());
    for device in [format!("-n {pod} link set eth0"), format!("-n {node} link set to-a")] {
        let larger = ["gso_max_size", "500000", "gro_max_size", "500000"];
        let status = Command::new("ip").args(device.split(' ')).args(larger).status();
        if !status.is_ok_and(|status| status.success()) {
            println!(
                "SKIPPED: packets_of_big_tcp_leave_with_all_the_records_that_they_hold: neither ip nor veth has it here"
            );
            return;
        }
    }
    // A packet has half a window at most.
    bed.node.run(|| fs::write("/proc/sys/net/ipv4/tcp_rmem", "4096 4000000 8000000").unwrap()).unwrap();
    let (mut socket, mut server) = release(line(&bed, &agent, &bed.node, NODE6, NODE6));
    let mut wire = Wire::tap(&bed.node);
    write_and_read(&mut socket, &mut server, &records(1 << 22));
    write_and_read(&mut socket, &mut server, &record(SMALLEST).repeat(100_000));
    undisturbed(&agent);
    let largest = wire.frames().iter().map(Vec::len).max().unwrap();
    if largest <= 65536 {
        println!(
            "SKIPPED: packets_of_big_tcp_leave_with_all_the_records_that_they_hold: none was larger than {largest} bytes"
        );
    }
}
