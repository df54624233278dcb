//! The judgement on a stream of records, held against a reading of the whole stream, byte by byte: however it is cut into segments,
//! with repeats and gaps, and wherever something else is in it.
#![allow(clippy::unwrap_used)]

use marline_common::framing::{Framing, LEAST_RECORD, MAX_WALKED, MOST_RECORD, Packet, RECORD_HEADER, Verdict};
use proptest::{collection::vec, prelude::*, sample::Index};

/// A packet with something before and after the segment.
struct Bytes(Vec<u8>);

impl Packet for Bytes {
    fn header(&self, at: u64) -> u64 {
        (0..RECORD_HEADER).fold(0, |header, i| header << 8 | u64::from(self.byte(at + i)))
    }

    fn byte(&self, at: u64) -> u8 {
        self.0[at as usize]
    }
}

/// The body looks like headers, to mislead.
fn record(length: u64) -> Vec<u8> {
    let mut record = vec![0x17, 3, 3];
    record.extend(u16::try_from(length).unwrap().to_be_bytes());
    record.extend([0x17, 3, 3, 0].iter().cycle().take(length as usize));
    record
}

/// How many of the first bytes can be those of records.
fn sound(stream: &[u8]) -> usize {
    let mut at = 0;
    loop {
        let header = stream[at..].iter().take(5).copied().enumerate();
        let mut length = 0;
        for (place, byte) in header {
            let fits = match place {
                0 => byte == 0x17,
                1 | 2 => byte == 3,
                3 => byte <= 0x41,
                _ => (17..=0x4100).contains(&(length << 8 | u32::from(byte))),
            };
            if !fits {
                return at + place;
            }
            if place >= 3 {
                length = length << 8 | u32::from(byte);
            }
        }
        if stream.len() < at + 5 + length as usize {
            return stream.len();
        }
        at += 5 + length as usize;
    }
}

/// Offers a piece of the stream as a segment.
fn offer(framing: &mut Framing, base: u32, stream: &[u8], from: usize, to: usize) -> Verdict {
    let mut packet = vec![0x17; 40];
    packet.extend(&stream[from..to]);
    packet.extend([0x17; 8]);
    framing.judge(base.wrapping_add(from as u32), 40, (to - from) as u32, &Bytes(packet))
}

fn streams() -> impl Strategy<Value = Vec<u8>> {
    let length = prop_oneof![8 => 17..60_u64, 2 => 60..2000_u64, 1 => Just(MOST_RECORD)];
    let records = vec(length, 0..40).prop_map(|lengths| lengths.into_iter().flat_map(record).collect::<Vec<u8>>());
    let foreign = prop_oneof![
        2 => Just(None),
        1 => (any::<Index>(), vec(any::<u8>(), 1..4)).prop_map(Some),
        1 => (any::<Index>(), Just(b"GET / HTTP/1.1".to_vec())).prop_map(Some),
    ];
    (records, foreign, any::<bool>()).prop_map(|(mut stream, foreign, replace)| {
        if let Some((place, bytes)) = foreign {
            let place = place.index(stream.len() + 1);
            let until = if replace { (place + bytes.len()).min(stream.len()) } else { place };
            stream.splice(place..until, bytes);
        }
        stream
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, ..ProptestConfig::default() })]

    #[test]
    fn a_segment_passes_exactly_if_all_up_to_its_end_can_be_records(
        stream in streams(),
        segments in vec((any::<Index>(), 1..200_usize, 0..4_u8), 1..80),
        base: u32,
    ) {
        let sound = sound(&stream);
        let mut framing = Framing { verified: base, ..Framing::default() };
        let mut verified = 0;
        for (place, length, kind) in segments {
            // Mostly what comes next, now and then all that is left, sometimes a repeat that may go on with what is new, or a gap.
            let from = match kind {
                0 => place.index(stream.len() + 1),
                1 => verified - place.index(verified + 1).min(300),
                _ => verified,
            };
            let to = if length == 199 { stream.len() } else { (from + length).min(stream.len()) };
            if from == to {
                continue;
            }
            let before = framing;
            let expected = if from > verified {
                Verdict::Ahead
            } else if to <= verified.max(sound) {
                verified = verified.max(to);
                Verdict::Records
            } else {
                Verdict::Foreign
            };
            prop_assert_eq!(offer(&mut framing, base, &stream, from, to), expected);
            prop_assert_eq!(framing.verified, base.wrapping_add(verified as u32));
            if expected != Verdict::Records {
                prop_assert_eq!(framing, before);
            }
        }
    }

    #[test]
    fn only_lengths_within_the_bounds_are_records(length: u16) {
        let mut header = vec![0x17, 3, 3];
        header.extend(length.to_be_bytes());
        let expected = if (17..=16640).contains(&length) { Verdict::Records } else { Verdict::Foreign };
        prop_assert_eq!(offer(&mut Framing::default(), 0, &header, 0, 5), expected);
        // Also if it comes byte by byte.
        let mut framing = Framing::default();
        let verdicts: Vec<_> = (0..5).map(|i| offer(&mut framing, 0, &header, i, i + 1)).collect();
        prop_assert_eq!(verdicts.contains(&Verdict::Foreign), expected == Verdict::Foreign);
    }
}

#[test]
fn the_smallest_records_are_walked_in_the_largest_packet() {
    const GSO_MAX_SIZE: usize = 8 * 65535;
    let stream: Vec<u8> = (0..24_000).flat_map(|_| record(LEAST_RECORD)).collect();
    for first in 0..22 {
        let mut framing = Framing::default();
        if first > 0 {
            assert_eq!(offer(&mut framing, 0, &stream, 0, first), Verdict::Records);
        }
        assert_eq!(offer(&mut framing, 0, &stream, first, first + GSO_MAX_SIZE), Verdict::Records, "from byte {first}");
    }
}

#[test]
fn a_walk_that_is_too_long_goes_on_where_it_ended() {
    let stream: Vec<u8> = (0..60_000).flat_map(|_| record(LEAST_RECORD)).collect();
    let mut framing = Framing::default();
    assert_eq!(offer(&mut framing, 0, &stream, 0, 3), Verdict::Records);
    let rounds = 60_000 / MAX_WALKED;
    for round in 0..rounds {
        assert_eq!(offer(&mut framing, 0, &stream, 0, stream.len()), Verdict::TooMany, "round {round}");
    }
    assert_eq!(offer(&mut framing, 0, &stream, 0, stream.len()), Verdict::Records);
    assert_eq!(framing, Framing { verified: stream.len() as u32, ..Framing::default() });
    // What comes after the walk's end is not passed by it.
    let mut hidden = stream.clone();
    *hidden.last_mut().unwrap() = 0;
    hidden.extend(b"GET / HTTP/1.1");
    let mut framing = Framing::default();
    for _ in 0..rounds {
        assert_eq!(offer(&mut framing, 0, &hidden, 0, hidden.len()), Verdict::TooMany);
    }
    assert_eq!(offer(&mut framing, 0, &hidden, 0, hidden.len()), Verdict::Foreign);
}
