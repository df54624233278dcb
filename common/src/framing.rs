//! Whether a stream is made of TLS records, judged segment by segment: what a released direct socket may send.
//!
//! Only headers are looked at, as TLS 1.3 has them once keys are in use (RFC 8446, 5.2): the outer type is always application
//! data. Pure, so that the kernel program and its property test run the same lines; `ebpf/src/direct.rs` reads the packets.

/// The part of a stream that was seen to be records, and what its last bytes leave open. It begins empty, where a record begins.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Framing {
    /// Where the verified part ends, in bytes from where records begin, modulo 2^32.
    pub verified: u32,
    /// How much of the last record's body is still to come.
    pub left: u32,
    /// The bytes of a header that was cut there, the first one the highest, and how many they are: 0 to 4.
    pub header: u64,
    pub seen: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing but records, now or when it was verified before.
    Records,
    /// It begins beyond the verified part: a segment before it never got here. TCP sends both again.
    Ahead,
    /// More records than any packet has. Those that were walked are verified: the walk goes on when TCP sends it again.
    TooMany,
    /// Something else.
    Foreign,
}

/// What carries a segment. Bytes that cannot be read are zero, which no header begins with.
pub trait Packet: Sized {
    /// The five bytes at this place, the first one the highest.
    fn header(&self, at: u64) -> u64;
    fn byte(&self, at: u64) -> u8;

    /// Takes steps for as long as they lead on, `MAX_WALKED` at most.
    #[inline(always)]
    fn walk(&self, walk: &mut Walk) {
        for _ in 0..MAX_WALKED {
            if !walk.step(self) {
                break;
            }
        }
    }
}

/// Type, version and length.
pub const RECORD_HEADER: u64 = 5;
/// The inner type and the tag.
pub const LEAST_RECORD: u64 = 1 + 16;
pub const MOST_RECORD: u64 = (1 << 14) + 256;
/// How many headers are walked at once: all that fit into the largest packet of BIG TCP (GSO_MAX_SIZE, 512 KiB).
pub const MAX_WALKED: u32 = (8 * 65535 / (RECORD_HEADER + LEAST_RECORD) + 1) as u32;

/// Application data of TLS 1.2, without a length.
const TYPE_AND_VERSION: u64 = 0x17_0303_0000;

impl Framing {
    /// Judges a segment of `length` bytes that lie in the packet from `at` on and in the stream from `offset` on, counted like
    /// `verified`. TCP does not change what it has queued, so what was verified is not looked at again.
    #[inline(always)]
    pub fn judge(&mut self, offset: u32, at: u32, length: u32, packet: &impl Packet) -> Verdict {
        let known = self.verified.wrapping_sub(offset);
        if known > i32::MAX as u32 {
            return Verdict::Ahead;
        }
        if known >= length {
            return Verdict::Records;
        }
        let (start, end) = (u64::from(at) + u64::from(known), u64::from(at) + u64::from(length));
        let mut walk = Walk { next: start + u64::from(self.left), end, foreign: 0 };
        let mut cut = Cut { header: self.header, seen: self.seen };
        if cut.seen != 0 {
            cut.extend(&mut walk, packet);
        }
        if walk.foreign == 0 {
            packet.walk(&mut walk);
        }
        if walk.foreign == 0 && !walk.ends() {
            *self = Self { verified: self.verified.wrapping_add((walk.next - start) as u32), ..Self::default() };
            return Verdict::TooMany;
        }
        cut.extend(&mut walk, packet);
        if walk.foreign != 0 {
            return Verdict::Foreign;
        }
        let left = walk.next.saturating_sub(end) as u32;
        *self = Self { verified: offset.wrapping_add(length), left, header: cut.header, seen: cut.seen };
        Verdict::Records
    }
}

/// A walk from header to header through a segment.
#[repr(C)]
pub struct Walk {
    /// Where the next header begins, and where the segment ends.
    next: u64,
    end: u64,
    /// Not 0 if what is there is no header.
    foreign: u64,
}

impl Walk {
    /// Goes on by a record whose header lies whole in the segment. `false` if there is none.
    #[inline(always)]
    pub fn step(&mut self, packet: &impl Packet) -> bool {
        if self.ends() {
            return false;
        }
        let header = packet.header(self.next);
        if !begins(header, RECORD_HEADER) {
            self.foreign = 1;
            return false;
        }
        self.next += RECORD_HEADER + body(header);
        true
    }

    #[inline(always)]
    fn ends(&self) -> bool {
        self.next + RECORD_HEADER > self.end
    }
}

/// The first bytes of a header.
struct Cut {
    header: u64,
    seen: u64,
}

impl Cut {
    /// Goes on byte by byte until the header is whole or the segment ends.
    #[inline(always)]
    fn extend(&mut self, walk: &mut Walk, packet: &impl Packet) {
        for _ in 0..RECORD_HEADER {
            if walk.foreign != 0 || walk.next >= walk.end {
                break;
            }
            self.header = self.header << 8 | u64::from(packet.byte(walk.next));
            self.seen += 1;
            walk.next += 1;
            if !begins(self.header, self.seen) {
                walk.foreign = 1;
            } else if self.seen >= RECORD_HEADER {
                walk.next += body(self.header);
                *self = Self { header: 0, seen: 0 };
                break;
            }
        }
    }
}

/// Whether a header can begin with these bytes, as many as were `seen`: all that it can be lie between the least and the most.
#[inline(always)]
fn begins(bytes: u64, seen: u64) -> bool {
    const LEAST: u64 = TYPE_AND_VERSION | LEAST_RECORD;
    const MOST: u64 = TYPE_AND_VERSION | MOST_RECORD;
    let missing = (8 * RECORD_HEADER.wrapping_sub(seen)) as u32;
    bytes >= LEAST.wrapping_shr(missing) && bytes <= MOST.wrapping_shr(missing)
}

/// The length that a header tells.
#[inline(always)]
fn body(header: u64) -> u64 {
    header - TYPE_AND_VERSION
}

const _: () = assert!(size_of::<Framing>() == 24);
