//! What is known of the kubelet's own connections to enrolled pods: by them its probes pass where nobody else's plaintext does.
//!
//! A connection is named by its two ends, as the kubelet's socket in the node's network has them before its SYN leaves. The kernel
//! writes the entry when the kubelet connects, and notes the end of the socket in it; whose entry is closed has no socket any more.
use crate::Endpoint;

/// A connection from the node's network. The key of `KUBELET`.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Flow {
    pub client: Endpoint,
    pub server: Endpoint,
}

/// One connection of the kubelet's. Times are of CLOCK_MONOTONIC, counts are TCP's with SYN and FIN in them.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct KubeletEntry {
    /// Of the kubelet's socket: another's end is not this one's.
    pub socket_cookie: u64,
    pub opened: u64,
    /// 0 while the socket lives.
    pub closed: u64,
    /// Whether its SYN was let through to the pod.
    pub admitted: u32,
    /// TCP's state: 0 until the connection stands, `TCP_ESTABLISHED` from then on, at the end the state before it.
    pub state: u32,
    pub bytes_acked: u64,
    pub bytes_received: u64,
}

impl Flow {
    #[inline(always)]
    pub const fn new(client: Endpoint, server: Endpoint) -> Self {
        Self { client, server }
    }
}

impl KubeletEntry {
    /// Whether a SYN of now is the kubelet's: its socket lives, as far as is known, and may still be sending SYNs. One that stands sends none any
    /// more: had the node's NAT given it another port, somebody else could come from this one. Should its end be missed, as when another
    /// program takes away the hook's flag, the entry proves nothing soon.
    #[inline(always)]
    pub const fn proves_syn(&self, now: u64) -> bool {
        self.is_open() && self.state == 0 && now.wrapping_sub(self.opened) < KUBELET_SYN_NANOS
    }

    /// It came to stand, and its SYN never came by: the pod saw it from another port, where it is nobody's that is known.
    #[inline(always)]
    pub const fn was_translated(&self) -> bool {
        self.admitted == 0 && self.state != 0 && self.state != TCP_SYN_SENT
    }

    #[inline(always)]
    pub const fn is_open(&self) -> bool {
        self.closed == 0
    }

    /// Open for so long that its end must have been missed: no probe takes that long.
    pub const fn is_lost(&self, now: u64) -> bool {
        self.is_open() && now.saturating_sub(self.opened) > KUBELET_LOST_NANOS
    }

    /// Whether the pod may still answer: also for a moment after the end, or its own socket could not end in order.
    #[inline(always)]
    pub const fn may_be_answered(&self, now: u64) -> bool {
        self.is_open() || now.wrapping_sub(self.closed) < KUBELET_LINGERS_NANOS
    }
}

pub const TCP_ESTABLISHED: u32 = 1;
const TCP_SYN_SENT: u32 = 2;

/// Linux sends SYNs for 127 s at most by default (tcp_syn_retries).
pub const KUBELET_SYN_NANOS: u64 = 130_000_000_000;
pub const KUBELET_LOST_NANOS: u64 = 3_600_000_000_000;
/// For so long after the kubelet's socket has gone the pod's may send what belongs to its end.
pub const KUBELET_LINGERS_NANOS: u64 = 5_000_000_000;

const _: () = assert!(size_of::<Flow>() == 40);
const _: () = assert!(size_of::<KubeletEntry>() == 48);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_whose_socket_is_gone_proves_nothing_and_is_answered_for_a_moment_only() {
        let open = KubeletEntry { opened: 5, ..KubeletEntry::default() };
        assert!(open.is_open() && open.may_be_answered(u64::MAX));
        assert!(open.proves_syn(5) && open.proves_syn(4 + KUBELET_SYN_NANOS) && !open.is_lost(5 + KUBELET_LOST_NANOS));
        assert!(!open.proves_syn(5 + KUBELET_SYN_NANOS), "its end may have been missed");
        assert!(!open.proves_syn(4), "a clock that goes backwards proves nothing");
        let stands = KubeletEntry { state: TCP_ESTABLISHED, ..open };
        assert!(!stands.proves_syn(5), "it sends no SYN any more");
        assert!(stands.is_open() && stands.may_be_answered(u64::MAX));
        assert!(open.is_lost(6 + KUBELET_LOST_NANOS));
        let closed = KubeletEntry { closed: 10, ..open };
        assert!(!closed.is_open() && !closed.proves_syn(11) && !closed.is_lost(u64::MAX));
        assert!(closed.may_be_answered(10) && closed.may_be_answered(9 + KUBELET_LINGERS_NANOS));
        assert!(!closed.may_be_answered(10 + KUBELET_LINGERS_NANOS));
        assert!(!closed.may_be_answered(9), "a clock that goes backwards lets nothing through");
    }

    #[test]
    fn what_stands_and_was_never_seen_has_come_from_another_port() {
        let entry = |admitted, state| KubeletEntry { admitted, state, ..KubeletEntry::default() };
        assert!(entry(0, TCP_ESTABLISHED).was_translated() && entry(0, 4).was_translated());
        assert!(!entry(1, TCP_ESTABLISHED).was_translated(), "it was let through");
        assert!(!entry(0, 0).was_translated() && !entry(0, TCP_SYN_SENT).was_translated(), "nobody has answered it");
    }
}
