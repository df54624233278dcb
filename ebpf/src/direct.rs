//! Sockets of a pod that the agent connects and handshakes on, while the pod holds them as well.
//!
//! Until the agent releases such a socket, only bytes that it has announced leave it, compared one by one at their place in the
//! stream: what another thread of the pod writes meanwhile stays here. It can be connected once and to one destination.
//! Whether it may be released is the agent's judgement; this file only tells it that somebody else wrote.
use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    btf_maps::SkStorage,
    helpers::{bpf_sk_fullsock, bpf_sk_storage_get, bpf_skb_load_bytes},
    programs::{SkBuffContext, SockAddrContext},
};
use marline_common::{ANNOUNCED_CHUNK, DIRECT_HANDSHAKE, DIRECT_RELEASED, Endpoint, MAX_ANNOUNCED};

use crate::{
    account::{ETH_P_IP, ETH_P_IPV6},
    capture::socket,
    context::{IPPROTO_TCP, read, read_pointer},
    maps::{DIRECT, GATES, TRANSCRIPTS},
};

pub(crate) enum Connect {
    /// Not a direct socket, or not any more.
    Other,
    /// The connection for which the agent prepared the socket.
    Agents,
    NotAgents,
}

/// Judges a connect. It is called with the socket locked.
#[inline(always)]
pub(crate) fn connect(ctx: &SockAddrContext, destination: &Endpoint) -> Connect {
    let sk = socket(ctx);
    let Some(entry) = stored(&DIRECT, sk) else {
        return Connect::Other;
    };
    if entry.state != DIRECT_HANDSHAKE {
        // Used again after its connection, or given up by the agent: a socket like any other from here on.
        // SAFETY: the context's own socket.
        unsafe {
            let _ = DIRECT.delete(sk);
            let _ = GATES.delete(sk);
            let _ = TRANSCRIPTS.delete(sk);
        }
        return Connect::Other;
    }
    let allowed = entry.to == *destination;
    let Some(gate) = stored(&GATES, sk) else {
        return Connect::NotAgents;
    };
    // A second connect would meet a socket that has forgotten what was written, and whose count the agent must not trust.
    if !allowed || gate.connected != 0 {
        gate.poisoned = 1;
        return Connect::NotAgents;
    }
    gate.connected = 1;
    Connect::Agents
}

/// What a direct socket shows as its peer.
#[inline(always)]
pub(crate) fn shown(ctx: &SockAddrContext) -> Option<Endpoint> {
    let entry = stored(&DIRECT, socket(ctx))?;
    if entry.state == DIRECT_HANDSHAKE || entry.state == DIRECT_RELEASED { Some(entry.shown) } else { None }
}

pub(crate) enum Standing {
    /// Not a direct socket.
    Other,
    Pass,
    Drop,
}

/// Judges a packet that leaves a socket.
#[inline(always)]
pub(crate) fn standing(ctx: &SkBuffContext) -> Standing {
    let skb = ctx.skb.skb;
    let sk = read_pointer!(skb as __sk_buff, __bindgen_anon_2);
    if sk.is_null() {
        return Standing::Other;
    }
    // SAFETY: `sk` is the context's own socket and not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    if sk.is_null() {
        return Standing::Other;
    }
    let Some(entry) = stored(&DIRECT, sk) else {
        return Standing::Other;
    };
    if entry.state == DIRECT_RELEASED {
        return Standing::Pass;
    }
    let Some(segment) = Segment::of(ctx) else {
        // Nothing that TCP sends by itself looks like this; something on the way has wrapped it.
        return poison(sk);
    };
    let gate = stored(&GATES, sk);
    if segment.syn
        && let Some(gate) = gate
    {
        gate.isn = segment.sequence;
        gate.synced = 1;
    }
    if segment.payload == 0 {
        return Standing::Pass;
    }
    if entry.state != DIRECT_HANDSHAKE || !announced(ctx, sk, &segment) {
        return poison(sk);
    }
    Standing::Pass
}

#[inline(always)]
fn poison(sk: *mut bpf_sock) -> Standing {
    if let Some(gate) = stored(&GATES, sk) {
        gate.poisoned = 1;
    }
    Standing::Drop
}

/// A TCP segment, or several that are cut apart further down.
struct Segment {
    sequence: u32,
    syn: bool,
    /// Where the payload begins in the packet, and its length.
    head: u32,
    payload: u32,
}

impl Segment {
    #[inline(always)]
    fn of(ctx: &SkBuffContext) -> Option<Self> {
        let skb = ctx.skb.skb;
        let start = match read!(skb as __sk_buff, protocol) {
            ETH_P_IP => after_ipv4(ctx)?,
            ETH_P_IPV6 => after_ipv6(ctx)?,
            _ => return None,
        };
        let tcp = ctx.load::<[u8; 14]>(start as usize).ok()?;
        let head = start + u32::from(tcp[12] >> 4) * 4;
        let length = read!(skb as __sk_buff, len);
        if head < start + 20 || head > length {
            return None;
        }
        let sequence = u32::from_be_bytes([tcp[4], tcp[5], tcp[6], tcp[7]]);
        Some(Self { sequence, syn: tcp[13] & 0x02 != 0, head, payload: length - head })
    }
}

/// Where TCP begins. TCP's own packets are not fragments here yet.
#[inline(always)]
fn after_ipv4(ctx: &SkBuffContext) -> Option<u32> {
    let ip = ctx.load::<[u8; 10]>(0).ok()?;
    let words = u32::from(ip[0] & 0x0f);
    let fragment = u16::from_be_bytes([ip[6], ip[7]]) & 0x3fff;
    if u32::from(ip[9]) != IPPROTO_TCP || words < 5 || fragment != 0 {
        return None;
    }
    Some(words * 4)
}

#[inline(always)]
fn after_ipv6(ctx: &SkBuffContext) -> Option<u32> {
    const HOP_BY_HOP: u32 = 0;
    const ROUTING: u32 = 43;
    const DESTINATION: u32 = 60;
    /// As many as a socket can be given, with one to spare.
    const HEADERS: usize = 5;
    let mut next = u32::from(ctx.load::<u8>(6).ok()?);
    let mut at = 40;
    for _ in 0..HEADERS {
        if !matches!(next, HOP_BY_HOP | ROUTING | DESTINATION) {
            break;
        }
        let header = ctx.load::<[u8; 2]>(at as usize).ok()?;
        next = u32::from(header[0]);
        at += (u32::from(header[1]) + 1) * 8;
    }
    if next == IPPROTO_TCP { Some(at) } else { None }
}

/// Reads eight bytes that may lie at any address, as one access: the compiler would take them one by one.
macro_rules! word {
    ($pointer:ident, $offset:literal) => {{
        let value: u64;
        // SAFETY: the verifier rejects any access outside of the map's value.
        unsafe {
            core::arch::asm!(
                "{value} = *(u64 *)({pointer} + {offset})",
                value = out(reg) value,
                pointer = in(reg) $pointer,
                offset = const $offset,
                options(nostack, readonly),
            );
        }
        value
    }};
}

/// Whether the agent announced exactly these bytes for this place in the stream. True of retransmissions as well.
#[inline(always)]
fn announced(ctx: &SkBuffContext, sk: *mut bpf_sock, segment: &Segment) -> bool {
    let (Some(gate), Some(transcript)) = (stored(&GATES, sk), stored(&TRANSCRIPTS, sk)) else {
        return false;
    };
    if gate.synced == 0 || gate.poisoned != 0 {
        return false;
    }
    // The SYN takes a number of its own; what it carries follows.
    let offset = segment.sequence.wrapping_add(u32::from(segment.syn)).wrapping_sub(gate.isn.wrapping_add(1));
    let length = transcript.length;
    if offset > length || segment.payload > length - offset {
        return false;
    }
    let (offset, payload, head) = (u64::from(offset), u64::from(segment.payload), u64::from(segment.head));
    let bytes = transcript.bytes.as_ptr();
    let mut done = 0_u64;
    for _ in 0..MAX_ANNOUNCED / ANNOUNCED_CHUNK {
        let rest = payload.wrapping_sub(done);
        // The verifier follows no relation between two numbers, and Linux 6.1 learns nothing from "not zero": so each bound is
        // stated anew, on values that the compiler cannot see through.
        let size_less_one = opaque(rest.min(ANNOUNCED_CHUNK as u64).wrapping_sub(1));
        let at = opaque(offset + done);
        if size_less_one >= ANNOUNCED_CHUNK as u64 || at >= MAX_ANNOUNCED as u64 {
            return false;
        }
        // SAFETY: `at` is below MAX_ANNOUNCED, so a chunk from there ends within the array.
        let expected = unsafe { bytes.add(at as usize) };
        // What lies beyond a short chunk is then equal to itself.
        let mut chunk = [
            word!(expected, 0),
            word!(expected, 8),
            word!(expected, 16),
            word!(expected, 24),
            word!(expected, 32),
            word!(expected, 40),
            word!(expected, 48),
            word!(expected, 56),
        ];
        // SAFETY: `size` is at most that of `chunk`.
        let loaded = unsafe {
            bpf_skb_load_bytes(
                ctx.skb.skb.cast(),
                opaque(head + done) as u32,
                chunk.as_mut_ptr().cast(),
                (size_less_one + 1) as u32,
            )
        };
        let difference = (chunk[0] ^ word!(expected, 0))
            | (chunk[1] ^ word!(expected, 8))
            | (chunk[2] ^ word!(expected, 16))
            | (chunk[3] ^ word!(expected, 24))
            | (chunk[4] ^ word!(expected, 32))
            | (chunk[5] ^ word!(expected, 40))
            | (chunk[6] ^ word!(expected, 48))
            | (chunk[7] ^ word!(expected, 56));
        if loaded != 0 || difference != 0 {
            return false;
        }
        if rest <= ANNOUNCED_CHUNK as u64 {
            return true;
        }
        done += ANNOUNCED_CHUNK as u64;
    }
    false
}

/// What a map holds for a socket, which must not be null.
#[inline(always)]
fn stored<T>(map: &'static SkStorage<T>, sk: *mut bpf_sock) -> Option<&'static mut T> {
    // SAFETY: the verifier lets only sockets through. The storage is not freed before the program is done.
    unsafe {
        let value = bpf_sk_storage_get(core::ptr::from_ref(map).cast_mut().cast(), sk.cast(), core::ptr::null_mut(), 0);
        value.cast::<T>().as_mut()
    }
}

/// The same number, of which the compiler knows nothing.
#[inline(always)]
fn opaque(mut number: u64) -> u64 {
    // SAFETY: moves a register to itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) number, options(nomem, nostack)) };
    number
}
