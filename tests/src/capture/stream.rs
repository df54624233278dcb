//! TCP streams put together from segments: each direction's bytes in order, once, looked at as they come and not kept.

use std::{
    collections::{BTreeMap, HashMap},
    fmt,
    net::SocketAddr,
};

use memchr::memmem::Finder;

use super::{packet::Segment, tls::Scanner};

/// One connection as the wire showed it.
#[derive(Clone)]
pub struct Stream {
    /// The end that sent the SYN.
    pub client: SocketAddr,
    pub server: SocketAddr,
    /// Whether the three-way handshake was answered.
    pub accepted: bool,
    pub reset: bool,
    from_client: Half,
    from_server: Half,
}

impl Stream {
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.from_client.seen + self.from_server.seen
    }

    /// A ClientHello, and a ServerHello that chose TLS 1.3, and nothing else of a handshake in the clear.
    #[must_use]
    pub fn is_tls13(&self) -> bool {
        self.from_client.tls.client_hello && self.from_server.tls.chose_tls13
    }

    /// Bytes that belong to no TLS record.
    #[must_use]
    pub fn not_tls(&self) -> u64 {
        self.from_client.tls.not_tls + self.from_server.tls.not_tls
    }

    /// The size of the client's first encrypted record. In TLS 1.3 a client without a certificate sends its Finished
    /// there, 74 bytes at most; one that shows a certificate sends that, and several hundred bytes.
    #[must_use]
    pub fn first_client_record(&self) -> Option<u16> {
        self.from_client.tls.first_encrypted
    }

    /// Frames are missing: bytes came after some that never came.
    #[must_use]
    pub fn has_hole(&self) -> bool {
        !self.from_client.early.is_empty() || !self.from_server.early.is_empty()
    }
}

impl fmt::Debug for Stream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{} to {}: {} bytes, {} not TLS", self.client, self.server, self.bytes(), self.not_tls())?;
        let facts = [
            (self.accepted, "accepted"),
            (self.reset, "reset"),
            (self.is_tls13(), "TLS 1.3"),
            (self.has_hole(), "frames missing"),
        ];
        facts.iter().filter(|(holds, _)| *holds).try_for_each(|(_, fact)| write!(formatter, ", {fact}"))
    }
}

#[derive(Default)]
pub struct Streams {
    list: Vec<Stream>,
    open: HashMap<(SocketAddr, SocketAddr), usize>,
    hits: BTreeMap<String, u64>,
}

impl Streams {
    #[must_use]
    pub fn list(&self) -> Vec<Stream> {
        self.list.clone()
    }

    /// How often a marker showed across the borders of segments; those within one are found in the frames.
    #[must_use]
    pub fn hits(&self, marker: &str) -> u64 {
        self.hits.get(marker).copied().unwrap_or_default()
    }

    pub fn take(&mut self, segment: &Segment<'_>, markers: &[String], finders: &[Finder<'_>]) {
        let (there, back) = ((segment.source, segment.destination), (segment.destination, segment.source));
        let fresh = segment.syn && !segment.ack && !self.is_repeated(there, segment.sequence);
        let known = if fresh { None } else { self.open.get(&there).or_else(|| self.open.get(&back)).copied() };
        let index = known.unwrap_or_else(|| {
            self.list.push(Stream::new(segment));
            let index = self.list.len() - 1;
            self.open.remove(&back);
            self.open.insert(there, index);
            index
        });
        let Some(stream) = self.list.get_mut(index) else { return };
        let from_client = segment.source == stream.client;
        stream.accepted |= segment.syn && segment.ack && !from_client;
        stream.reset |= segment.rst;
        let half = if from_client { &mut stream.from_client } else { &mut stream.from_server };
        half.take(segment, |crossing| {
            for (marker, finder) in markers.iter().zip(finders) {
                if crossing.holds(finder) {
                    *self.hits.entry(marker.clone()).or_default() += 1;
                }
            }
        });
    }

    /// A SYN that was sent again is no new stream.
    fn is_repeated(&self, key: (SocketAddr, SocketAddr), sequence: u32) -> bool {
        let half = self.open.get(&key).and_then(|index| self.list.get(*index)).map(|stream| &stream.from_client);
        half.is_some_and(|half| half.first == Some(sequence.wrapping_add(1)))
    }
}

impl Stream {
    fn new(segment: &Segment<'_>) -> Self {
        // Begun before the capture and first seen from the server's side: the higher port is taken for the client's.
        let swapped = if segment.syn { segment.ack } else { segment.source.port() < segment.destination.port() };
        let (client, server) =
            if swapped { (segment.destination, segment.source) } else { (segment.source, segment.destination) };
        let (from_client, from_server) = (Half::default(), Half::default());
        Self { client, server, accepted: false, reset: false, from_client, from_server }
    }
}

/// The last bytes of what came before, and the new ones.
struct Crossing<'a> {
    tail: &'a [u8],
    fresh: &'a [u8],
}

impl Crossing<'_> {
    /// Whether the marker begins in the old bytes and ends in the new ones.
    fn holds(&self, finder: &Finder<'_>) -> bool {
        let reach = finder.needle().len().saturating_sub(1);
        let tail = &self.tail[self.tail.len().saturating_sub(reach)..];
        let fresh = &self.fresh[..self.fresh.len().min(reach)];
        finder.find(&[tail, fresh].concat()).is_some()
    }
}

/// Longer than any marker.
const TAIL: usize = 128;

/// One direction.
#[derive(Clone, Default)]
struct Half {
    /// The sequence number of the first byte.
    first: Option<u32>,
    /// Bytes in order so far.
    seen: u64,
    /// Segments that came before their time, by position.
    early: BTreeMap<u64, Vec<u8>>,
    tail: Vec<u8>,
    tls: Scanner,
}

impl Half {
    fn take(&mut self, segment: &Segment<'_>, mut cross: impl FnMut(&Crossing<'_>)) {
        if segment.syn {
            self.first = Some(segment.sequence.wrapping_add(1));
            return;
        }
        if segment.payload.is_empty() {
            return;
        }
        let first = *self.first.get_or_insert(segment.sequence);
        // The distance to the next byte that is awaited, which may lie behind (sent again) or ahead (out of order).
        let awaited = first.wrapping_add(self.seen as u32);
        let distance = i64::from(segment.sequence.wrapping_sub(awaited).cast_signed());
        let Some(position) = self.seen.checked_add_signed(distance) else {
            // From before the first byte: a keep-alive's, or a stream that was met in its midst.
            return;
        };
        if position > self.seen {
            let longest = self.early.entry(position).or_default();
            if longest.len() < segment.payload.len() {
                *longest = segment.payload.to_vec();
            }
            return;
        }
        self.append(position, segment.payload, &mut cross);
        while let Some(entry) = self.early.first_entry().filter(|entry| *entry.key() <= self.seen) {
            let (position, bytes) = entry.remove_entry();
            self.append(position, &bytes, &mut cross);
        }
    }

    fn append(&mut self, position: u64, bytes: &[u8], cross: &mut impl FnMut(&Crossing<'_>)) {
        let known = usize::try_from(self.seen - position).unwrap_or(usize::MAX);
        let Some(fresh) = bytes.get(known..).filter(|fresh| !fresh.is_empty()) else { return };
        cross(&Crossing { tail: &self.tail, fresh });
        self.tls.take(fresh);
        self.seen += fresh.len() as u64;
        self.tail.extend_from_slice(&fresh[fresh.len().saturating_sub(TAIL)..]);
        self.tail.drain(..self.tail.len().saturating_sub(TAIL));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MARKER: &str = "the-marker";

    struct Wire {
        streams: Streams,
        markers: Vec<String>,
    }

    impl Wire {
        fn new() -> Self {
            Self { streams: Streams::default(), markers: vec![MARKER.to_owned()] }
        }

        fn segment(&mut self, sequence: u32, syn: bool, payload: &[u8]) {
            let (source, destination) =
                (SocketAddr::from(([10, 0, 0, 1], 40000)), SocketAddr::from(([10, 0, 0, 2], 80)));
            let segment = Segment { source, destination, sequence, syn, ack: !syn, fin: false, rst: false, payload };
            let finders: Vec<Finder<'_>> = self.markers.iter().map(Finder::new).collect();
            self.streams.take(&segment, &self.markers, &finders);
        }
    }

    #[test]
    fn bytes_are_counted_once_whatever_the_order_they_come_in() {
        let mut wire = Wire::new();
        // The numbers wrap within the stream.
        let start = u32::MAX - 3;
        wire.segment(start.wrapping_sub(1), true, b"");
        wire.segment(start.wrapping_add(5), false, b"fghij");
        assert!(wire.streams.list()[0].has_hole());
        wire.segment(start, false, b"abcde");
        wire.segment(start, false, b"abcde");
        wire.segment(start.wrapping_add(3), false, b"defghijkl");
        let stream = &wire.streams.list()[0];
        assert_eq!((stream.bytes(), stream.has_hole()), (12, false));
    }

    #[test]
    fn a_marker_across_segments_is_found() {
        let mut wire = Wire::new();
        wire.segment(0, true, b"");
        wire.segment(1, false, b"xx the-");
        wire.segment(8, false, b"mar");
        wire.segment(11, false, b"ker yy");
        assert_eq!(wire.streams.hits(MARKER), 1);
    }

    #[test]
    fn a_port_that_is_used_again_begins_a_new_stream_and_a_repeated_syn_does_not() {
        let mut wire = Wire::new();
        wire.segment(0, true, b"");
        wire.segment(0, true, b"");
        wire.segment(1, false, b"abc");
        wire.segment(5000, true, b"");
        wire.segment(5001, false, b"de");
        let bytes: Vec<u64> = wire.streams.list().iter().map(Stream::bytes).collect();
        assert_eq!(bytes, [3, 2]);
    }
}
