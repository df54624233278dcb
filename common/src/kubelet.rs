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
    /// TCP's state before the end.
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
    /// Whether a SYN of now is the kubelet's: its socket lives, as far as is known, and may still be sending SYNs. Should its end be missed, as when
    /// another program takes away the hook's flag, the entry proves nothing soon.
    #[inline(always)]
    pub const fn proves_syn(&self, now: u64) -> bool {
        self.is_open() && now.wrapping_sub(self.opened) < KUBELET_SYN_NANOS
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
        assert!(open.is_lost(6 + KUBELET_LOST_NANOS));
        let closed = KubeletEntry { closed: 10, ..open };
        assert!(!closed.is_open() && !closed.proves_syn(11) && !closed.is_lost(u64::MAX));
        assert!(closed.may_be_answered(10) && closed.may_be_answered(9 + KUBELET_LINGERS_NANOS));
        assert!(!closed.may_be_answered(10 + KUBELET_LINGERS_NANOS));
        assert!(!closed.may_be_answered(9), "a clock that goes backwards lets nothing through");
    }
}
