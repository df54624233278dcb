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
    pub const TIME_WAIT: Self = Self(6);
    /// Not connected yet, or no more.
    pub const CLOSED: Self = Self(7);
    pub const LISTENING: Self = Self(10);
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

    proptest! {
        #[test]
        fn info_of_any_length_and_content_never_panics(info: Vec<u8>) {
            prop_assert_eq!(Counts::parse(&info).is_some(), info.len() >= 144);
        }
    }
}
