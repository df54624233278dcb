//! The pump's promise, byte for byte, for every kind of record that this kernel can keep: what one application writes the other
//! reads, ends are passed on as ends, resets as resets, and a peer that breaks TLS breaks only its own connection.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "transfer/line.rs"]
mod line;

use std::{future::Future, io, time::Duration};

use line::{Buffers, Carrier, Line, PATIENCE, World};
use marline::{
    proxy::pump::PumpError,
    tls::records::{
        ALERT, APPLICATION_DATA, CLOSE_NOTIFY, Ending, HANDSHAKE, HEADER, Opener, RecordError, Schedule, Sealer,
        key_update_message, sealed_body_length,
    },
};
use marline_tests::amount::amount;
use proptest::prelude::*;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().expect("a runtime");
    runtime.block_on(async {
        tokio::time::timeout(8 * PATIENCE, test).await.expect("the test took too long: something hangs")
    })
}

/// Bytes that differ at every place, so that a lost, doubled or swapped piece shows.
fn pattern(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

#[derive(Debug, Clone, Copy)]
struct Manner {
    /// Bytes per write.
    chunk: usize,
    /// A pause after so many bytes read or written.
    pause_every: usize,
}

const BRISK: Manner = Manner { chunk: 1 << 16, pause_every: usize::MAX };

async fn write(to: &mut (impl AsyncWriteExt + Unpin), bytes: &[u8], manner: Manner) -> io::Result<()> {
    let mut since = 0;
    for chunk in bytes.chunks(manner.chunk) {
        to.write_all(chunk).await?;
        since += chunk.len();
        if since >= manner.pause_every {
            since = 0;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    to.shutdown().await
}

async fn read(from: &mut (impl AsyncReadExt + Unpin), manner: Manner) -> io::Result<Vec<u8>> {
    let (mut bytes, mut since, mut buffer) = (Vec::new(), 0, vec![0; manner.chunk]);
    loop {
        let read = from.read(&mut buffer).await?;
        if read == 0 {
            return Ok(bytes);
        }
        bytes.extend_from_slice(&buffer[..read]);
        since += read;
        if since >= manner.pause_every {
            since = 0;
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

fn assert_same(what: &str, got: &[u8], sent: &[u8]) {
    let differ = got.iter().zip(sent).position(|(a, b)| a != b);
    assert!(
        got.len() == sent.len() && differ.is_none(),
        "{what}: {} bytes sent, {} came, first difference at {differ:?}",
        sent.len(),
        got.len()
    );
}

/// Sends `up` and `down` at once, each to its end, and checks both and the pumps' word.
async fn both_ways(mut line: Line, up: usize, down: usize, writer: Manner, reader: Manner, what: &str) {
    let (up, down) = (pattern(3, up), pattern(5, down));
    let (mut client_in, mut client_out) = line.client.split();
    let (mut server_in, mut server_out) = line.server.split();
    let all = async {
        tokio::join!(
            write(&mut client_out, &up, writer),
            read(&mut server_in, reader),
            write(&mut server_out, &down, writer),
            read(&mut client_in, reader),
        )
    };
    let (wrote_up, got_up, wrote_down, got_down) =
        tokio::time::timeout(PATIENCE, all).await.unwrap_or_else(|_| panic!("{what}: stalled"));
    wrote_up.unwrap_or_else(|e| panic!("{what}: writing up: {e}"));
    wrote_down.unwrap_or_else(|e| panic!("{what}: writing down: {e}"));
    assert_same(&format!("{what}, up"), &got_up.expect("reading up"), &up);
    assert_same(&format!("{what}, down"), &got_down.expect("reading down"), &down);
    ended(line, what).await;
}

async fn ended(line: Line, what: &str) {
    for (name, pump) in [("near", line.near), ("far", line.far)] {
        tokio::time::timeout(PATIENCE, pump)
            .await
            .unwrap_or_else(|_| panic!("{what}: the {name} pump does not end"))
            .expect("the pump's task")
            .unwrap_or_else(|e| panic!("{what}: the {name} pump: {e:?}"));
    }
}

#[test]
fn every_size_arrives_exactly_both_ways_at_once() {
    run(async {
        let world = World::new().await;
        let mut sizes = vec![0, 1, 2, 16383, 16384, 16385, 65535, 65536, 65537, 1_000_003];
        sizes.push(amount(64 << 20, 4 << 20));
        for carrier in world.carriers() {
            for &size in &sizes {
                let line = world.line(carrier, Buffers::default()).await;
                both_ways(line, size, size / 2 + 1, BRISK, BRISK, &format!("{carrier:?}, {size} bytes")).await;
            }
        }
    });
}

#[test]
fn small_buffers_slow_readers_and_slow_writers_lose_nothing() {
    run(async {
        let world = World::new().await;
        let slow = Manner { chunk: 3001, pause_every: 20_000 };
        // TCP itself crawls where the receive buffer is smaller than a segment: a window probe's time for each few KiB.
        let (many, few) = amount((2_000_000, 20_000), (100_000, 20_000));
        for carrier in world.carriers() {
            for (buffers, size) in [
                (Buffers { send: Some(2048), receive: None }, many),
                (Buffers { send: Some(4096), receive: Some(1 << 16) }, many),
                (Buffers { send: Some(2048), receive: Some(2048) }, few),
                (Buffers { send: None, receive: Some(1) }, few),
            ] {
                for (writer, reader) in [(BRISK, BRISK), (BRISK, slow), (slow, BRISK)] {
                    let what = format!("{carrier:?} {buffers:?} {writer:?} {reader:?}");
                    let start = std::time::Instant::now();
                    both_ways(world.line(carrier, buffers).await, size, size / 3, writer, reader, &what).await;
                    println!("{what}: {:?}", start.elapsed());
                }
            }
        }
    });
}

#[test]
fn writes_of_one_byte_arrive_exactly() {
    run(async {
        let world = World::new().await;
        let one = Manner { chunk: 1, pause_every: usize::MAX };
        for carrier in world.carriers() {
            let line = world.line(carrier, Buffers::default()).await;
            both_ways(line, 5000, 5000, one, BRISK, &format!("{carrier:?}, bytes one by one")).await;
        }
    });
}

#[test]
fn any_mix_of_sizes_buffers_and_manners_arrives_exactly() {
    run(async {
        let world = World::new().await;
        let most: usize = amount(6_000_000, 300_000);
        let buffers = || proptest::option::of(32_000_usize..200_000);
        let manner = || {
            (1_usize..100_000, prop_oneof![Just(usize::MAX), 50_000_usize..500_000])
                .prop_map(|(chunk, pause_every)| Manner { chunk, pause_every })
        };
        let cases = (0..most, 0..most, buffers(), buffers(), manner(), manner());
        let mut runner = proptest::test_runner::TestRunner::default();
        for _ in 0..amount(24, 6) {
            use proptest::strategy::ValueTree;
            let (up, down, send, receive, writer, reader) = cases.new_tree(&mut runner).expect("a case").current();
            for carrier in world.carriers() {
                let what =
                    format!("{carrier:?} up {up} down {down} buffers {send:?}/{receive:?} {writer:?} {reader:?}");
                both_ways(world.line(carrier, Buffers { send, receive }).await, up, down, writer, reader, &what).await;
            }
        }
    });
}

#[test]
fn either_side_may_close_its_half_and_go_on_reading() {
    run(async {
        let world = World::new().await;
        for carrier in world.carriers() {
            for client_first in [true, false] {
                let what = format!("{carrier:?}, client first: {client_first}");
                let mut line = world.line(carrier, Buffers::default()).await;
                let (first, second) = if client_first {
                    (&mut line.client, &mut line.server)
                } else {
                    (&mut line.server, &mut line.client)
                };
                let (question, answer) = (pattern(7, 100_000), pattern(9, 3_000_000));
                write(first, &question, BRISK).await.unwrap();
                assert_same(&what, &read(second, BRISK).await.unwrap(), &question);
                let (wrote, got) = tokio::join!(write(second, &answer, BRISK), read(first, BRISK));
                wrote.unwrap();
                assert_same(&what, &got.unwrap(), &answer);
                ended(line, &what).await;
            }
        }
    });
}

#[test]
fn a_reader_that_pauses_after_the_writer_has_closed_still_gets_everything() {
    run(async {
        let world = World::new().await;
        for carrier in world.carriers() {
            let what = format!("{carrier:?}");
            let mut line = world.line(carrier, Buffers { send: Some(8192), receive: Some(8192) }).await;
            // Less than the buffers on the way hold, so that the writer can close while nothing is read.
            let sent = pattern(11, 20_000);
            write(&mut line.client, &sent, BRISK).await.unwrap();
            tokio::time::sleep(Duration::from_millis(700)).await;
            assert_same(&what, &read(&mut line.server, BRISK).await.unwrap(), &sent);
            line.server.shutdown().await.unwrap();
            ended(line, &what).await;
        }
    });
}

#[test]
fn a_reset_on_either_side_reaches_the_other_as_a_reset() {
    run(async {
        let world = World::new().await;
        for carrier in world.carriers() {
            for (by_client, half_closed) in [(true, false), (false, false), (true, true), (false, true)] {
                let what = format!("{carrier:?}, by client: {by_client}, half closed before: {half_closed}");
                let line = world.line(carrier, Buffers::default()).await;
                let (mut dies, mut sees) =
                    if by_client { (line.client, line.server) } else { (line.server, line.client) };
                dies.write_all(b"before").await.unwrap();
                let mut got = [0; 6];
                sees.read_exact(&mut got).await.unwrap();
                if half_closed {
                    dies.shutdown().await.unwrap();
                    assert_eq!(sees.read(&mut got).await.unwrap(), 0, "{what}: the end of the half");
                }
                socket2::SockRef::from(&dies).set_linger(Some(Duration::ZERO)).unwrap();
                drop(dies);
                if half_closed {
                    // Nothing is read any more on that side: the reset shows as an error event or on writing.
                    let deadline = tokio::time::Instant::now() + PATIENCE;
                    while sees.write_all(&[0; 1000]).await.is_ok() {
                        assert!(tokio::time::Instant::now() < deadline, "{what}: the reset is not passed on");
                        tokio::task::yield_now().await;
                    }
                } else {
                    let error = tokio::time::timeout(PATIENCE, sees.read(&mut got)).await.expect(&what);
                    let kind = error.map_err(|error| error.kind());
                    assert_eq!(kind, Err(io::ErrorKind::ConnectionReset), "{what}");
                }
                assert!(line.near.await.unwrap().is_err() && line.far.await.unwrap().is_err(), "{what}");
            }
        }
    });
}

/// The other end of a pump, played by the test, with records of its own making.
struct Peer {
    wire: TcpStream,
    sealer: Sealer,
    opener: Opener,
    schedule: Schedule,
    suite: rustls::SupportedCipherSuite,
}

impl Peer {
    fn new(wire: TcpStream, secured: marline::proxy::handshake::Secured) -> Self {
        let suite = secured.suite;
        Self {
            wire,
            sealer: Sealer::new(suite, secured.secrets.tx).unwrap(),
            opener: Opener::new(suite, secured.secrets.rx).unwrap(),
            schedule: secured.schedule,
            suite,
        }
    }

    async fn send(&mut self, content_type: u8, payload: &[u8]) {
        let record = self.sealer.seal(content_type, payload).unwrap();
        self.wire.write_all(&record).await.unwrap();
    }

    async fn receive(&mut self) -> (u8, Vec<u8>) {
        let mut header = [0; HEADER];
        self.wire.read_exact(&mut header).await.unwrap();
        let mut body = vec![0; sealed_body_length(&header).unwrap().unwrap()];
        self.wire.read_exact(&mut body).await.unwrap();
        let (content_type, payload) = self.opener.open(&mut body).unwrap();
        (content_type, payload.to_vec())
    }

    fn new_transmit_key(&mut self) {
        let secrets = match &mut self.schedule {
            Schedule::Client(connection) => connection.update_tx_secret(),
            Schedule::Server(connection) => connection.update_tx_secret(),
        };
        self.sealer = Sealer::new(self.suite, secrets.unwrap()).unwrap();
    }

    fn new_receive_key(&mut self) {
        let secrets = match &mut self.schedule {
            Schedule::Client(connection) => connection.update_rx_secret(),
            Schedule::Server(connection) => connection.update_rx_secret(),
        };
        self.opener = Opener::new(self.suite, secrets.unwrap()).unwrap();
    }
}

#[test]
fn empty_records_and_tickets_are_passed_over() {
    run(async {
        let world = World::new().await;
        for carrier in world.record_carriers() {
            let (mut client, pump, wire, secured) = world.half(carrier).await;
            let mut peer = Peer::new(wire, secured);
            peer.send(APPLICATION_DATA, b"").await;
            peer.send(APPLICATION_DATA, b"one ").await;
            peer.send(APPLICATION_DATA, b"").await;
            peer.send(APPLICATION_DATA, b"").await;
            // A ticket that nobody asked for.
            peer.send(HANDSHAKE, &[4, 0, 0, 3, 1, 2, 3]).await;
            peer.send(APPLICATION_DATA, b"two").await;
            peer.send(APPLICATION_DATA, b"").await;
            match carrier.ending() {
                Ending::CloseNotify => peer.send(ALERT, &CLOSE_NOTIFY).await,
                Ending::Fin => peer.wire.shutdown().await.unwrap(),
            }
            let mut got = Vec::new();
            client.read_to_end(&mut got).await.unwrap();
            assert_eq!(got, b"one two", "{carrier:?}");
            client.shutdown().await.unwrap();
            if carrier.ending() == Ending::CloseNotify {
                assert_eq!(peer.receive().await, (ALERT, CLOSE_NOTIFY.to_vec()), "{carrier:?}: close_notify is sent");
            }
            assert_eq!(peer.wire.read(&mut [0; 1]).await.unwrap(), 0, "{carrier:?}: then FIN");
            pump.await.unwrap().unwrap();
        }
    });
}

#[test]
fn a_key_update_is_followed_and_answered_or_ends_the_connection_where_the_kernel_cannot() {
    run(async {
        let world = World::new().await;
        for carrier in world.record_carriers() {
            let (mut client, pump, wire, secured) = world.half(carrier).await;
            let mut peer = Peer::new(wire, secured);
            peer.send(APPLICATION_DATA, b"old key, ").await;
            peer.send(HANDSHAKE, &key_update_message(true)).await;
            peer.new_transmit_key();
            peer.send(APPLICATION_DATA, b"new key").await;
            let mut got = vec![0; 16];
            match client.read_exact(&mut got).await {
                Err(error) if carrier.ending() == Ending::Fin => {
                    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{carrier:?}");
                    let ended = pump.await.unwrap().unwrap_err();
                    assert!(
                        matches!(ended, PumpError::Record(RecordError::KeyUpdateNotAgreed)),
                        "{carrier:?}: {ended:?}"
                    );
                }
                Ok(_) => {
                    assert_eq!(carrier.ending(), Ending::CloseNotify, "{carrier:?}: the key is not followed");
                    assert_eq!(got, b"old key, new key", "{carrier:?}");
                    client.write_all(b"answer").await.unwrap();
                    assert_eq!(peer.receive().await, (HANDSHAKE, key_update_message(false).to_vec()), "{carrier:?}");
                    peer.new_receive_key();
                    assert_eq!(peer.receive().await, (APPLICATION_DATA, b"answer".to_vec()), "{carrier:?}");
                    peer.send(ALERT, &CLOSE_NOTIFY).await;
                    client.shutdown().await.unwrap();
                    assert_eq!(peer.receive().await, (ALERT, CLOSE_NOTIFY.to_vec()));
                    pump.await.unwrap().unwrap();
                }
                Err(error) => {
                    assert!(matches!(carrier, Carrier::Kernel(..)), "userspace can always follow: {error}");
                    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset, "{carrier:?}");
                    let ended = pump.await.unwrap().unwrap_err();
                    assert!(matches!(ended, PumpError::CannotRekey(_)), "{carrier:?}: {ended:?}");
                    println!("SKIPPED: key update in the kernel: this kernel cannot, the connection is reset");
                }
            }
        }
    });
}

#[test]
fn whatever_breaks_the_stream_resets_the_application_and_is_told_apart() {
    run(async {
        let world = World::new().await;
        for carrier in world.record_carriers() {
            // Where streams end by FIN, one that is cut between two records cannot be told from one that has ended: that is the trade.
            let cut = if carrier.ending() == Ending::Fin { None } else { Some("cut") };
            let cases = ["alert", "garbage", "forged", "cut in a record", "reset", "handshake", "too long"];
            for case in cases.into_iter().chain(cut) {
                let what = format!("{carrier:?}, {case}");
                let (mut client, pump, wire, secured) = world.half(carrier).await;
                let mut peer = Peer::new(wire, secured);
                peer.send(APPLICATION_DATA, b"good").await;
                let mut got = [0; 4];
                client.read_exact(&mut got).await.unwrap();
                let expected: &[&str] = match case {
                    "alert" => {
                        peer.send(ALERT, &[2, 80]).await;
                        &["peer_alert"]
                    }
                    "garbage" => {
                        peer.wire.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
                        &["bad_record"]
                    }
                    "forged" => {
                        let mut record = peer.sealer.seal(APPLICATION_DATA, b"forged").unwrap();
                        *record.last_mut().unwrap() ^= 1;
                        peer.wire.write_all(&record).await.unwrap();
                        &["bad_record"]
                    }
                    "handshake" => {
                        peer.send(HANDSHAKE, &[1, 0, 0, 0]).await;
                        &["bad_record"]
                    }
                    "too long" => {
                        peer.wire.write_all(&[23, 3, 3, 0x48, 0]).await.unwrap();
                        peer.wire.write_all(&vec![0; 0x4800]).await.unwrap();
                        &["bad_record"]
                    }
                    "cut in a record" => {
                        let record = peer.sealer.seal(APPLICATION_DATA, b"half of this").unwrap();
                        peer.wire.write_all(&record[..record.len() / 2]).await.unwrap();
                        peer.wire.shutdown().await.unwrap();
                        &["truncated"]
                    }
                    "cut" => {
                        peer.wire.shutdown().await.unwrap();
                        &["truncated"]
                    }
                    _ => {
                        socket2::SockRef::from(&peer.wire).set_linger(Some(Duration::ZERO)).unwrap();
                        &["peer_reset"]
                    }
                };
                if case == "reset" {
                    drop(peer);
                }
                let error = tokio::time::timeout(PATIENCE, client.read(&mut got)).await.expect(&what);
                assert_eq!(error.map_err(|e| e.kind()), Err(io::ErrorKind::ConnectionReset), "{what}");
                let reason = pump.await.unwrap().unwrap_err().reason();
                assert!(expected.contains(&reason), "{what}: {reason}");
            }
        }
    });
}

#[test]
fn where_streams_end_by_fin_nothing_but_application_data_is_ever_said() {
    run(async {
        let world = World::new().await;
        for carrier in world.record_carriers().into_iter().filter(|carrier| carrier.ending() == Ending::Fin) {
            // A refusal is a reset, not an alert: an application at the other end could not read it.
            let (near, far) = line::pair(Buffers::default()).await;
            let (mut near, mut far) = (near, far);
            let (secured, _) = world.secured(&mut near, &mut far, Ending::Fin).await;
            let records = world.records(&near, secured, carrier);
            socket2::SockRef::from(&near).set_linger(Some(Duration::ZERO)).unwrap();
            marline::proxy::pump::refuse(near, records, 80).await;
            let refused = tokio::time::timeout(PATIENCE, far.read(&mut [0; 1])).await.expect("a refusal");
            assert_eq!(refused.map_err(|error| error.kind()), Err(io::ErrorKind::ConnectionReset), "{carrier:?}");

            // All that was written is there before the FIN, and no close_notify.
            let (mut client, pump, wire, secured) = world.half(carrier).await;
            let mut peer = Peer::new(wire, secured);
            let sent = pattern(13, 1_000_000);
            let writer = tokio::spawn({
                let sent = sent.clone();
                async move {
                    write(&mut client, &sent, BRISK).await.unwrap();
                    client
                }
            });
            let mut got = Vec::new();
            while got.len() < sent.len() {
                let (content_type, payload) = peer.receive().await;
                assert_eq!(content_type, APPLICATION_DATA, "{carrier:?}");
                got.extend(payload);
            }
            assert_same(&format!("{carrier:?}"), &got, &sent);
            assert_eq!(peer.wire.read(&mut [0; 1]).await.unwrap(), 0, "{carrier:?}: FIN, and nothing before it");
            let mut client = writer.await.unwrap();
            peer.wire.shutdown().await.unwrap();
            assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0, "{carrier:?}");
            pump.await.unwrap().unwrap();
        }
    });
}

#[test]
fn idle_connections_hold_no_pipe() {
    fn pipes() -> usize {
        let fds = std::fs::read_dir("/proc/self/fd").expect("/proc");
        fds.flatten()
            .filter_map(|fd| std::fs::read_link(fd.path()).ok())
            .filter(|target| target.to_string_lossy().starts_with("pipe:"))
            .count()
    }
    run(async {
        let world = World::new().await;
        for carrier in world.carriers() {
            let before = pipes();
            let mut lines = Vec::new();
            for _ in 0..100 {
                let mut line = world.line(carrier, Buffers::default()).await;
                line.client.write_all(b"hello").await.unwrap();
                let mut got = [0; 5];
                line.server.read_exact(&mut got).await.unwrap();
                lines.push(line);
            }
            // Each of the two worker threads keeps at most 16 pipes of two ends.
            let held = pipes().saturating_sub(before);
            assert!(held <= 2 * 16 * 2, "{carrier:?}: {held} pipe ends are held by 100 idle connections");
        }
    });
}

/// Not in CI: `MARLINE_LONG=1 cargo test --test transfer_matrix one_gibibyte`.
#[test]
fn one_gibibyte_arrives_exactly() {
    if std::env::var_os("MARLINE_LONG").is_none() {
        println!("SKIPPED: one_gibibyte_arrives_exactly: set MARLINE_LONG=1 to run it");
        return;
    }
    run(async {
        let world = World::new().await;
        for carrier in world.carriers() {
            let line = world.line(carrier, Buffers::default()).await;
            both_ways(line, 1 << 30, 1 << 20, BRISK, BRISK, &format!("{carrier:?}, 1 GiB")).await;
        }
    });
}
