//! What one connection puts on the wire, as a stranger there sees it: packets in, streams and TLS records out. Pure; it says only what it has
//! seen, and whether something is missing.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

use serde::Serialize;

const TCP: u8 = 6;
const HOP_BY_HOP: u8 = 0;
const SYN: u8 = 0x02;
/// So many bytes of each direction are kept, to look for the marker.
const KEPT: usize = 1 << 16;
/// So much may wait for what comes before it.
const AHEAD: usize = 1 << 20;
/// The largest record of TLS 1.2; those of 1.3 are smaller.
const LARGEST_RECORD: usize = (1 << 14) + 2048;

/// One TCP segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment<'a> {
    pub(super) source: SocketAddr,
    pub(super) destination: SocketAddr,
    sequence: u32,
    syn: bool,
    /// Payload that is there by the packet's own lengths, and was not captured.
    cut: bool,
    payload: &'a [u8],
}

/// One direction.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(super) struct Flow {
    pub(super) bytes: u64,
    /// TLS records, by their type.
    pub(super) handshake: u64,
    pub(super) change_cipher_spec: u64,
    pub(super) alert: u64,
    pub(super) application_data: u64,
    /// Bytes that are no TLS records.
    pub(super) not_tls: u64,
    /// Whether something of it was missed.
    pub(super) hole: bool,
}

/// A connection that began while it was watched.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    pub(super) client: SocketAddr,
    pub(super) server: SocketAddr,
    sent: Half,
    received: Half,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Streams(HashMap<(SocketAddr, SocketAddr), Stream>);

#[derive(Clone, Debug, Default)]
struct Half {
    flow: Flow,
    /// The sequence number of the first byte, once it is known.
    first: Option<u32>,
    /// What has come ahead of its turn, by its offset.
    ahead: BTreeMap<u64, Vec<u8>>,
    waiting: usize,
    kept: Vec<u8>,
    header: Vec<u8>,
    /// How much of the present record is still to come.
    record: usize,
    plain: bool,
}

impl Streams {
    pub(super) fn take(&mut self, segment: &Segment<'_>) {
        let (from, to) = (segment.source, segment.destination);
        if let Some(stream) = self.0.get_mut(&(from, to)) {
            stream.sent.take(segment);
        } else if let Some(stream) = self.0.get_mut(&(to, from)) {
            stream.received.take(segment);
        } else if segment.syn {
            let mut stream = Stream { client: from, server: to, sent: Half::default(), received: Half::default() };
            stream.sent.take(segment);
            self.0.insert((from, to), stream);
        }
    }

    pub(super) fn get(&self, client: SocketAddr, server: SocketAddr) -> Option<&Stream> {
        self.0.get(&(client, server))
    }

    /// Those to one of these servers.
    pub(super) fn to<'a>(&'a self, servers: &'a [SocketAddr]) -> impl Iterator<Item = &'a Stream> {
        self.0.values().filter(|stream| servers.contains(&stream.server))
    }
}

impl Stream {
    pub(super) fn sent(&self) -> Flow {
        self.sent.told()
    }

    pub(super) fn received(&self) -> Flow {
        self.received.told()
    }

    /// Whether the text is there to be read.
    pub(super) fn shows(&self, text: &str) -> bool {
        let text = text.as_bytes();
        let shows = |half: &Half| !text.is_empty() && half.kept.windows(text.len()).any(|window| window == text);
        shows(&self.sent) || shows(&self.received)
    }
}

impl Half {
    fn take(&mut self, segment: &Segment<'_>) {
        if segment.syn {
            self.first = Some(segment.sequence.wrapping_add(1));
        }
        self.flow.hole |= segment.cut;
        let Some(first) = self.first else {
            self.flow.hole |= !segment.payload.is_empty();
            return;
        };
        let start = if segment.syn { segment.sequence.wrapping_add(1) } else { segment.sequence };
        // Within 2 GiB of where the stream is now: forward is new or early, backward was sent again.
        let now = first.wrapping_add(self.flow.bytes as u32);
        let distance = i64::from(start.wrapping_sub(now) as i32);
        let Some(offset) = self.flow.bytes.checked_add_signed(distance) else { return };
        self.place(offset, segment.payload);
        while let Some((&offset, _)) = self.ahead.first_key_value() {
            if offset > self.flow.bytes {
                break;
            }
            let Some(bytes) = self.ahead.remove(&offset) else { break };
            self.waiting = self.waiting.saturating_sub(bytes.len());
            self.place(offset, &bytes);
        }
    }

    fn place(&mut self, offset: u64, payload: &[u8]) {
        if payload.is_empty() {
            return;
        }
        let Some(known) = self.flow.bytes.checked_sub(offset) else {
            if self.waiting + payload.len() > AHEAD {
                self.flow.hole = true;
            } else if self.ahead.get(&offset).is_none_or(|there| there.len() < payload.len()) {
                let old = self.ahead.insert(offset, payload.to_vec());
                self.waiting = self.waiting + payload.len() - old.map_or(0, |old| old.len());
            }
            return;
        };
        let fresh = usize::try_from(known).ok().and_then(|known| payload.get(known..)).unwrap_or_default();
        self.flow.bytes += fresh.len() as u64;
        let room = KEPT.saturating_sub(self.kept.len()).min(fresh.len());
        self.kept.extend_from_slice(fresh.get(..room).unwrap_or_default());
        self.read(fresh);
    }

    fn read(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.plain {
                self.flow.not_tls += bytes.len() as u64;
                return;
            }
            if self.record > 0 {
                let taken = self.record.min(bytes.len());
                self.record -= taken;
                bytes = bytes.get(taken..).unwrap_or_default();
                continue;
            }
            let Some((byte, rest)) = bytes.split_first() else { return };
            self.header.push(*byte);
            bytes = rest;
            if !could_begin_a_record(&self.header) {
                // From here on nothing tells where a record would begin.
                self.plain = true;
                self.flow.not_tls += std::mem::take(&mut self.header).len() as u64;
            } else if let [kind, _, _, high, low] = *self.header.as_slice() {
                self.header.clear();
                self.record = usize::from(u16::from_be_bytes([high, low]));
                match kind {
                    20 => self.flow.change_cipher_spec += 1,
                    21 => self.flow.alert += 1,
                    22 => self.flow.handshake += 1,
                    _ => self.flow.application_data += 1,
                }
            }
        }
    }

    fn told(&self) -> Flow {
        Flow { hole: self.flow.hole || !self.ahead.is_empty(), ..self.flow.clone() }
    }
}

fn could_begin_a_record(header: &[u8]) -> bool {
    let length = match *header {
        [_, _, _, high, low] => usize::from(u16::from_be_bytes([high, low])),
        _ => 1,
    };
    header.first().is_none_or(|kind| (20..=23).contains(kind))
        && header.get(1).is_none_or(|major| *major == 3)
        && header.get(2).is_none_or(|minor| (1..=4).contains(minor))
        && (1..=LARGEST_RECORD).contains(&length)
}

/// The TCP segment of a packet that begins with its IP header; nothing if it is none, or a fragment.
pub(super) fn parse(packet: &[u8]) -> Option<Segment<'_>> {
    let (source, destination, header, length): (IpAddr, IpAddr, usize, usize) = match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet.first()? & 0x0f) * 4;
            let fragment = u16::from_be_bytes(packet.get(6..8)?.try_into().ok()?) & 0x3fff;
            if header < 20 || *packet.get(9)? != TCP || fragment != 0 {
                return None;
            }
            let total = usize::from(u16::from_be_bytes(packet.get(2..4)?.try_into().ok()?));
            let source = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?);
            let destination = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(16..20)?).ok()?);
            // 0 is a packet of more than 64 KiB that the link is to cut.
            let length = if total == 0 { packet.len() } else { total };
            (source.into(), destination.into(), header, length)
        }
        6 => {
            let payload = usize::from(u16::from_be_bytes(packet.get(4..6)?.try_into().ok()?));
            let (mut next, mut header) = (*packet.get(6)?, 40);
            if next == HOP_BY_HOP {
                next = *packet.get(40)?;
                header += (usize::from(*packet.get(41)?) + 1) * 8;
            }
            if next != TCP {
                return None;
            }
            let source = Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(8..24)?).ok()?);
            let destination = Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(24..40)?).ok()?);
            let length = if payload == 0 { packet.len() } else { 40 + payload };
            (source.into(), destination.into(), header, length)
        }
        _ => return None,
    };
    let tcp = packet.get(header..length.min(packet.len()))?;
    let port = |at: usize| Some(u16::from_be_bytes(tcp.get(at..at + 2)?.try_into().ok()?));
    let data = usize::from(tcp.get(12)? >> 4) * 4;
    Some(Segment {
        source: SocketAddr::new(source, port(0)?),
        destination: SocketAddr::new(destination, port(2)?),
        sequence: u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?),
        syn: tcp.get(13)? & SYN != 0,
        cut: length > packet.len(),
        payload: tcp.get(data.max(20)..)?,
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const CLIENT: &str = "10.0.0.1:40000";
    const SERVER: &str = "10.0.0.2:80";

    fn segment(from_client: bool, sequence: u32, syn: bool, payload: &[u8]) -> Segment<'_> {
        let (client, server) = (CLIENT.parse().unwrap(), SERVER.parse().unwrap());
        let (source, destination) = if from_client { (client, server) } else { (server, client) };
        Segment { source, destination, sequence, syn, cut: false, payload }
    }

    fn record(kind: u8, length: usize) -> Vec<u8> {
        let mut record = vec![kind, 3, 3];
        record.extend(u16::try_from(length).unwrap().to_be_bytes());
        record.extend(std::iter::repeat_n(0x5a, length));
        record
    }

    fn after(segments: &[Segment<'_>]) -> Stream {
        let mut streams = Streams::default();
        segments.iter().for_each(|segment| streams.take(segment));
        streams.get(CLIENT.parse().unwrap(), SERVER.parse().unwrap()).unwrap().clone()
    }

    #[test]
    fn records_are_counted_and_plaintext_is_told_from_them() {
        let sent = [record(22, 200), record(20, 1), record(23, 50), record(23, 16_000)].concat();
        let stream = after(&[
            segment(true, 99, true, b""),
            segment(false, 7, true, b""),
            segment(true, 100, false, &sent),
            segment(false, 8, false, b"SSH-2.0-marker\r\n"),
        ]);
        let flow = stream.sent();
        assert_eq!((flow.handshake, flow.change_cipher_spec, flow.application_data, flow.not_tls), (1, 1, 2, 0));
        assert_eq!((flow.bytes, flow.hole), (sent.len() as u64, false));
        assert_eq!(stream.received().not_tls, 16);
        assert!(stream.shows("marker") && !stream.shows("other"));
    }

    #[test]
    fn plaintext_after_records_is_not_taken_for_one() {
        let bytes = [record(23, 10), b"plain text".to_vec()].concat();
        let stream = after(&[segment(true, 0, true, b""), segment(true, 1, false, &bytes)]);
        assert_eq!((stream.sent().application_data, stream.sent().not_tls), (1, 10));
    }

    #[test]
    fn what_was_missed_is_said() {
        let bytes = record(23, 100);
        let stream = after(&[segment(true, 0, true, b""), segment(true, 51, false, &bytes[50..])]);
        assert!(stream.sent().hole && stream.sent().bytes == 0);
        let cut = Segment { cut: true, ..segment(true, 1, false, &bytes) };
        assert!(after(&[segment(true, 0, true, b""), cut]).sent().hole);
        let mut streams = Streams::default();
        streams.take(&segment(true, 1, false, &bytes));
        assert_eq!(streams.0.len(), 0, "a connection from before is not this one");
    }

    #[test]
    fn a_packet_is_read_by_its_own_lengths() {
        let mut packet = vec![0x45, 0, 0, 44, 0, 0, 0x40, 0, 64, 6, 0, 0, 10, 0, 0, 1, 10, 0, 0, 2];
        packet.extend([0x9c, 0x40, 0, 80, 0, 0, 0, 9, 0, 0, 0, 0, 0x50, 0x18, 0, 0, 0, 0, 0, 0]);
        packet.extend(*b"data and padding");
        let found = parse(&packet).unwrap();
        assert_eq!((found.source, found.payload), (CLIENT.parse().unwrap(), &b"data"[..]));
        assert!(parse(&packet[..42]).unwrap().cut);
        packet[6] = 0x20;
        assert_eq!(parse(&packet), None, "a fragment");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            if let Some(segment) = parse(&bytes) {
                let mut streams = Streams::default();
                streams.take(&Segment { syn: true, ..segment });
                streams.take(&segment);
            }
        }

        #[test]
        fn however_a_stream_is_cut_doubled_and_shuffled_it_counts_the_same(
            lengths in proptest::collection::vec(1_usize..400, 1..12),
            cuts in proptest::collection::vec(1_usize..300, 1..60),
            order in any::<u64>(),
            first in any::<u32>(),
        ) {
            let bytes: Vec<u8> = lengths.iter().flat_map(|length| record(23, *length)).collect();
            let (mut pieces, mut at) = (Vec::new(), 0);
            for cut in cuts.iter().cycle() {
                if at >= bytes.len() {
                    break;
                }
                let end = (at + cut).min(bytes.len());
                pieces.push((at, &bytes[at..end]));
                pieces.push((at, &bytes[at..(end + 5).min(bytes.len())]));
                at = end;
            }
            let mut state = order;
            for i in (1..pieces.len()).rev() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                pieces.swap(i, (state >> 33) as usize % (i + 1));
            }
            let mut segments = vec![segment(true, first, true, b"")];
            segments.extend(pieces.iter().map(|(at, piece)| {
                segment(true, first.wrapping_add(1).wrapping_add(*at as u32), false, piece)
            }));
            let flow = after(&segments).sent();
            prop_assert_eq!(flow.application_data, lengths.len() as u64);
            prop_assert_eq!((flow.bytes, flow.not_tls, flow.hole), (bytes.len() as u64, 0, false));
        }
    }
}
