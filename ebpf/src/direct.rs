//! Sockets of a pod that the agent connects and handshakes on, while the pod holds them as well.
//!
//! Until the agent releases such a socket, only bytes that it has announced leave it, compared one by one at their place in the
//! stream: what another thread of the pod writes meanwhile stays here. It can be connected once and to one destination.
//! Whether it may be released is the agent's judgement; this file only tells it that somebody else wrote.
//!
//! From the release on, only TLS records leave it: a thread that was inside send() before the kernel had the keys may still
//! append what it was given. What a record is says `marline_common::framing`.
use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    btf_maps::SkStorage,
    cty::{c_long, c_void},
    helpers::{bpf_get_socket_cookie, bpf_loop, bpf_sk_fullsock, bpf_sk_storage_get, bpf_skb_load_bytes},
    programs::{SkBuffContext, SockAddrContext},
};
use aya_log_ebpf::warn;
use marline_common::{
    ANNOUNCED_CHUNK, Counter, DIRECT_HANDSHAKE, DIRECT_RELEASED, DIRECT_WITHOUT_RECORDS, DirectEntry, Endpoint,
    GateEntry, MAX_ANNOUNCED, Transcript,
    framing::{MAX_WALKED, Packet, RECORD_HEADER, Verdict, Walk},
};

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
    match entry.state {
        DIRECT_HANDSHAKE | DIRECT_RELEASED | DIRECT_WITHOUT_RECORDS => Some(entry.shown),
        _ => None,
    }
}

pub(crate) enum Standing {
    /// Not a direct socket.
    Other,
    Pass,
    /// Dropped, and counted as this.
    Drop(Counter),
}

/// Judges a packet that leaves a socket. TCP holds the socket's lock meanwhile, so two are never judged at once.
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
    match entry.state {
        DIRECT_WITHOUT_RECORDS => Standing::Pass,
        DIRECT_RELEASED => released(ctx, sk, entry),
        state => in_handshake(ctx, sk, state),
    }
}

#[inline(always)]
fn in_handshake(ctx: &SkBuffContext, sk: *mut bpf_sock, state: u32) -> Standing {
    let Some(segment) = Segment::of(ctx) else {
        // Nothing that TCP sends by itself looks like this; something on the way has wrapped it.
        return poison(sk);
    };
    let mut gate = stored(&GATES, sk);
    if segment.syn
        && let Some(gate) = &mut gate
    {
        gate.isn = segment.sequence;
        gate.synced = 1;
    }
    if segment.payload == 0 {
        return Standing::Pass;
    }
    if state != DIRECT_HANDSHAKE {
        return poison(sk);
    }
    let (Some(gate), Some(transcript)) = (gate, stored(&TRANSCRIPTS, sk)) else {
        // Released while this packet was on its way, which speaks against nobody: it is judged anew when TCP sends it again.
        return Standing::Drop(Counter::DirectHeldBack);
    };
    if announced(ctx, gate, transcript, &segment) { Standing::Pass } else { poison(sk) }
}

#[inline(always)]
fn poison(sk: *mut bpf_sock) -> Standing {
    if let Some(gate) = stored(&GATES, sk) {
        gate.poisoned = 1;
    }
    Standing::Drop(Counter::DirectDropped)
}

#[inline(always)]
fn released(ctx: &SkBuffContext, sk: *mut bpf_sock, entry: &DirectEntry) -> Standing {
    let (Some(gate), Some(segment)) = (stored(&GATES, sk), Segment::of(ctx)) else {
        return Standing::Drop(Counter::DirectForeign);
    };
    if segment.payload == 0 {
        return Standing::Pass;
    }
    if gate.poisoned == 0 && gate.synced != 0 {
        // Records begin after the SYN and what was announced.
        let offset = segment.sequence.wrapping_sub(gate.isn.wrapping_add(1).wrapping_add(entry.announced));
        match gate.framing.judge(offset, segment.head, segment.payload, &Skb(ctx)) {
            Verdict::Records => return Standing::Pass,
            Verdict::Ahead | Verdict::TooMany => return Standing::Drop(Counter::DirectHeldBack),
            Verdict::Foreign => {
                gate.poisoned = 1;
                // SAFETY: the context is this program's own.
                let cookie = unsafe { bpf_get_socket_cookie(ctx.skb.skb.cast()) };
                warn!(
                    ctx,
                    "something else than TLS was written to a direct connection: nothing leaves it any more (socket {})",
                    cookie
                );
            }
        }
    }
    Standing::Drop(Counter::DirectForeign)
}

/// A packet whose bytes are loaded where they are looked at.
struct Skb<'a>(&'a SkBuffContext);

impl Packet for Skb<'_> {
    #[inline(always)]
    fn header(&self, at: u64) -> u64 {
        // The kernel fills it with zeroes where it cannot load.
        let mut bytes = [0_u8; 8];
        // SAFETY: the header goes to the last bytes of the word.
        unsafe {
            let header = bytes.as_mut_ptr().add(size_of::<u64>() - RECORD_HEADER as usize);
            bpf_skb_load_bytes(self.0.skb.skb.cast(), at as u32, header.cast(), RECORD_HEADER as u32)
        };
        u64::from_be_bytes(bytes)
    }

    #[inline(always)]
    fn byte(&self, at: u64) -> u8 {
        let mut byte = 0_u8;
        // SAFETY: as above.
        unsafe { bpf_skb_load_bytes(self.0.skb.skb.cast(), at as u32, (&raw mut byte).cast(), 1) };
        byte
    }

    /// By a helper that calls `step`: the verifier follows it once, and not as often as it may be called.
    #[inline(always)]
    fn walk(&self, walk: &mut Walk) {
        let mut steps = Steps { skb: self.0.skb.skb, walk };
        // SAFETY: `step` is what the helper calls back, with `steps`.
        unsafe { bpf_loop(MAX_WALKED, step as *mut c_void, (&raw mut steps).cast(), 0) };
    }
}

#[repr(C)]
struct Steps<'a> {
    skb: *mut __sk_buff,
    walk: &'a mut Walk,
}

extern "C" fn step(_index: u32, steps: *mut Steps<'_>) -> c_long {
    // SAFETY: the helper hands over what `walk` gave it.
    let steps = unsafe { &mut *steps };
    c_long::from(!steps.walk.step(&Skb(&SkBuffContext::new(steps.skb))))
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
fn announced(ctx: &SkBuffContext, gate: &GateEntry, transcript: &Transcript, segment: &Segment) -> bool {
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
