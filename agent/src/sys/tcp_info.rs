//! The kernel's `tcp_info` (include/uapi/linux/tcp.h), read field by field: older kernels give fewer bytes, newer ones more. How it
//! is asked for is `options`'s and `diag`'s.

/// How a connection came to be. The SYN of the side that connects is counted among the bytes that were acknowledged; a
/// socket that accept returned begins to count after it (tcp_minisocks.c, tcp_create_openreq_child).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Opening {
    Active,
    Passive,
}

impl Opening {
    /// What the SYN adds to the bytes acknowledged.
    pub fn syn(self) -> u64 {
        match self {
            Self::Active => 1,
            Self::Passive => 0,
        }
    }
}

/// TCP's states by their kernel numbers (include/net/tcp_states.h); those that Marline asks for have a name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct TcpState(pub u8);

impl TcpState {
    pub const ESTABLISHED: Self = Self(1);
    pub const SYN_SENT: Self = Self(2);
    pub const SYN_RECEIVED: Self = Self(3);
    pub const FIN_WAIT1: Self = Self(4);
    pub const FIN_WAIT2: Self = Self(5);
    pub const TIME_WAIT: Self = Self(6);
    /// Not connected yet, or no more.
    pub const CLOSED: Self = Self(7);
    pub const CLOSE_WAIT: Self = Self(8);
    pub const LAST_ACK: Self = Self(9);
    pub const LISTENING: Self = Self(10);
    pub const CLOSING: Self = Self(11);

    /// Whether the peer's FIN has come, of the last state that a socket had before it was closed. In FIN_WAIT2 it may have: the FIN takes
    /// a socket from there to its end.
    pub fn fin_received(self) -> Option<bool> {
        match self {
            Self::CLOSE_WAIT | Self::LAST_ACK | Self::CLOSING | Self::TIME_WAIT => Some(true),
            Self::ESTABLISHED | Self::SYN_SENT | Self::SYN_RECEIVED | Self::FIN_WAIT1 => Some(false),
            _ => None,
        }
    }
}

/// Bytes that a connection moved, as TCP has them: without SYN and FIN, with TLS's records as they are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Payload {
    /// What the peer's kernel has acknowledged.
    pub sent: u64,
    /// What came in order, also if nobody has read it.
    pub received: u64,
    /// What was sent and not acknowledged: of a socket that has ended, whether the peer has got it nobody will know.
    pub unanswered: u64,
    /// Otherwise `received` may be one too many: it is not known whether a FIN is in it.
    pub exact: bool,
}

/// TCP's own counts of one socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    pub state: TcpState,
    /// Sequence numbers that the peer has acknowledged: payload, FIN, and the SYN of a socket that connected.
    pub bytes_acked: u64,
    /// Sequence numbers taken from the peer in order: payload and FIN.
    pub bytes_received: u64,
    /// Payload handed to the network, what was sent again included; `bytes_retransmitted` is that share.
    pub bytes_sent: u64,
    pub bytes_retransmitted: u64,
    pub segments_out: u32,
    pub segments_in: u32,
    pub data_segments_out: u32,
    pub data_segments_in: u32,
}

impl Counts {
    /// What of the counts is payload. `None` where they are blank: close() of a socket with SO_LINGER 0, and connect() to AF_UNSPEC, wipe them
    /// (tcp.c, tcp_disconnect).
    pub fn payload(&self, opening: Opening, fin_received: Option<bool>) -> Option<Payload> {
        if self.segments_in == 0 {
            return None;
        }
        let acked = self.bytes_acked.saturating_sub(opening.syn());
        // A FIN is the last to be acknowledged: it was if there is one more than all the payload that was ever sent.
        let once = self.bytes_sent.saturating_sub(self.bytes_retransmitted);
        let sent = if acked == once + 1 { once } else { acked };
        let received = match fin_received {
            Some(true) => self.bytes_received.saturating_sub(1),
            Some(false) | None => self.bytes_received,
        };
        let unanswered = once.saturating_sub(sent);
        Some(Payload { sent, received, unanswered, exact: fin_received.is_some() })
    }

    /// `None` where the kernel gave less than the counts of bytes (before 4.1) or nothing.
    pub fn parse(info: &[u8]) -> Option<Self> {
        Some(Self {
            state: TcpState(*info.first()?),
            bytes_acked: u64_at(info, 120)?,
            bytes_received: u64_at(info, 128)?,
            segments_out: u32_at(info, 136)?,
            segments_in: u32_at(info, 140)?,
            data_segments_in: u32_at(info, 152).unwrap_or(0),
            data_segments_out: u32_at(info, 156).unwrap_or(0),
            bytes_sent: u64_at(info, 200).unwrap_or(0),
            bytes_retransmitted: u64_at(info, 208).unwrap_or(0),
        })
    }
}

fn u64_at(bytes: &[u8], offset: usize) -> Option<u64> {
    Some(u64::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use std::mem::offset_of;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_offsets_are_those_of_the_kernels_structure() {
        let mut info = [0_u8; 232];
        for (offset, value) in [(120, 1_u64), (128, 2), (200, 3), (208, 4)] {
            info[offset..offset + 8].copy_from_slice(&value.to_ne_bytes());
        }
        for (offset, value) in [(136, 5_u32), (140, 6), (152, 7), (156, 8)] {
            info[offset..offset + 4].copy_from_slice(&value.to_ne_bytes());
        }
        info[0] = 10;
        let counts = Counts {
            state: TcpState::LISTENING,
            bytes_acked: 1,
            bytes_received: 2,
            bytes_sent: 3,
            bytes_retransmitted: 4,
            segments_out: 5,
            segments_in: 6,
            data_segments_in: 7,
            data_segments_out: 8,
        };
        assert_eq!(Counts::parse(&info), Some(counts));
        // The C library's structure ends before the counts; where it does not, they lie in the same order.
        assert_eq!(offset_of!(libc::tcp_info, tcpi_total_retrans), 100);
    }

    #[test]
    fn syn_and_fin_are_no_payload() {
        let counts = Counts {
            bytes_acked: 1002,
            bytes_received: 501,
            bytes_sent: 1300,
            bytes_retransmitted: 300,
            segments_in: 9,
            ..Counts::default()
        };
        let payload = |sent, received, exact| Some(Payload { sent, received, unanswered: 1000 - sent, exact });
        assert_eq!(counts.payload(Opening::Active, Some(true)), payload(1000, 500, true));
        assert_eq!(counts.payload(Opening::Active, Some(false)), payload(1000, 501, true));
        assert_eq!(counts.payload(Opening::Active, None), payload(1000, 501, false));
        // The FIN was not acknowledged, or none was sent; then, the last of the payload neither.
        assert_eq!(Counts { bytes_acked: 1001, ..counts }.payload(Opening::Active, None), payload(1000, 501, false));
        assert_eq!(Counts { bytes_acked: 900, ..counts }.payload(Opening::Passive, None), payload(900, 501, false));
        assert_eq!(Counts::default().payload(Opening::Passive, None), None, "wiped");
    }

    proptest! {
        #[test]
        fn info_of_any_length_and_content_never_panics(info: Vec<u8>) {
            prop_assert_eq!(Counts::parse(&info).is_some(), info.len() >= 144);
        }
    }
}
