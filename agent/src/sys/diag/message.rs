//! sock_diag's messages (include/uapi/linux/inet_diag.h, netlink.h): requests written, answers read, nothing sent. Whatever the
//! bytes, reading them never panics: what does not fit is left out or an error.
//!
//! Written here, because the layouts are few and fixed: the crates for it would bring three packages and a reader of `tcp_info`
//! that wants one kernel's length, and know nothing of the destruction groups.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6},
};

use crate::sys::tcp_info::{Counts, TcpState};

/// One TCP socket as the kernel tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiagSocket {
    pub id: SocketId,
    pub state: TcpState,
    /// 0 where no process holds it.
    pub inode: u32,
    pub owner: u32,
    /// Sequence numbers that have come in order and were not read; a FIN is one, until a read has met it.
    pub unread: u32,
    /// Sequence numbers that were written and are not acknowledged; a FIN is one.
    pub unacknowledged: u32,
    /// `None` for what has no more of them, as in TIME_WAIT.
    pub counts: Option<Counts>,
}

impl DiagSocket {
    /// Whether the peer's FIN is in the count of bytes received. Kernel TLS never reads it, so that where all records were read it alone
    /// is left (seen on 6.1 and 6.12); reads of a plain socket take it.
    pub fn fin_received(&self, kernel_tls: bool) -> Option<bool> {
        match self.unread {
            0 if kernel_tls => Some(false),
            1 if kernel_tls => Some(true),
            _ => None,
        }
    }
}

/// What a socket is told apart by. The addresses may be in use again, and of a socket that is gone they may be blank: the
/// cookie is its own for as long as the kernel runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct SocketId {
    /// IPv4 also where the socket is an IPv6 one (v4-mapped).
    pub local: SocketAddr,
    pub remote: SocketAddr,
    pub cookie: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// One socket by its addresses.
    Find,
    /// All of an address family.
    Dump,
    Destroy,
}

/// One message of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    Socket(Box<DiagSocket>),
    /// A dump is complete.
    Done,
    /// 0 is an acknowledgement.
    Error(i32),
    /// Of no interest, or not understood.
    Other,
}

const HEADER: usize = 16;
const REQUEST: usize = HEADER + 56;
const MESSAGE: usize = 72;

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

const INET_DIAG_INFO: u16 = 2;
/// Asks for `INET_DIAG_INFO`.
const WITH_INFO: u8 = 1 << (INET_DIAG_INFO - 1);
const NO_COOKIE: u64 = u64::MAX;

/// A request, addresses and cookie in the places where the kernel wants them. A dump goes by `id`'s address family.
pub(super) fn request(kind: Kind, sequence: u32, id: &SocketId, states: u32) -> [u8; REQUEST] {
    let (local, remote) = canonical(id);
    let (message, flags) = match kind {
        Kind::Find => (SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST),
        Kind::Dump => (SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP),
        Kind::Destroy => (SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK),
    };
    let interface = match remote {
        SocketAddr::V6(remote) => remote.scope_id(),
        SocketAddr::V4(_) => 0,
    };
    let cookie = if kind == Kind::Find { NO_COOKIE } else { id.cookie };
    let mut bytes = [0; REQUEST];
    let mut rest = &mut bytes[..];
    let mut put = |field: &[u8]| {
        // The fields below add up to the array's length.
        let (here, after) = std::mem::take(&mut rest).split_at_mut(field.len());
        here.copy_from_slice(field);
        rest = after;
    };
    put(&(REQUEST as u32).to_ne_bytes());
    put(&message.to_ne_bytes());
    put(&flags.to_ne_bytes());
    put(&sequence.to_ne_bytes());
    put(&[0; 4]);
    put(&[family(local), libc::IPPROTO_TCP as u8, WITH_INFO, 0]);
    put(&states.to_ne_bytes());
    put(&local.port().to_be_bytes());
    put(&remote.port().to_be_bytes());
    put(&octets(local.ip()));
    put(&octets(remote.ip()));
    put(&interface.to_ne_bytes());
    put(&(cookie as u32).to_ne_bytes());
    put(&((cookie >> 32) as u32).to_ne_bytes());
    bytes
}

/// The messages of one datagram, each with its sequence number.
pub(super) fn answers(datagram: &[u8]) -> impl Iterator<Item = (u32, Answer)> {
    let mut rest = datagram;
    std::iter::from_fn(move || {
        let length = u32_at(rest, 0)? as usize;
        let sequence = u32_at(rest, 8)?;
        let kind = u16::from_ne_bytes(*rest.get(4..)?.first_chunk()?);
        let body = rest.get(HEADER..length)?;
        rest = rest.get(aligned(length)..).unwrap_or_default();
        let answer = match kind {
            NLMSG_DONE => Answer::Done,
            NLMSG_ERROR => Answer::Error(u32_at(body, 0).map_or(-libc::EBADMSG, |error| error as i32)),
            SOCK_DIAG_BY_FAMILY => socket(body).map_or(Answer::Other, |socket| Answer::Socket(Box::new(socket))),
            _ => Answer::Other,
        };
        Some((sequence, answer))
    })
}

/// The error of an answer, as an error.
pub(super) fn failure(error: i32) -> io::Error {
    io::Error::from_raw_os_error(error.wrapping_neg())
}

/// Both addresses in the family in which the kernel has the socket hashed.
pub(super) fn canonical(id: &SocketId) -> (SocketAddr, SocketAddr) {
    (unmapped(id.local), unmapped(id.remote))
}

fn socket(body: &[u8]) -> Option<DiagSocket> {
    let (fixed, attributes) = body.split_at_checked(MESSAGE)?;
    let &[family, state, ..] = fixed else { return None };
    let port = |offset: usize| Some(u16::from_be_bytes(*fixed.get(offset..)?.first_chunk()?));
    let interface = u32_at(fixed, 40)?;
    let address = |offset: usize, port| {
        let octets: [u8; 16] = *fixed.get(offset..)?.first_chunk()?;
        match i32::from(family) {
            libc::AF_INET => Some(SocketAddr::from((Ipv4Addr::from(*octets.first_chunk::<4>()?), port))),
            libc::AF_INET6 => {
                let ip = Ipv6Addr::from(octets);
                let scope = if ip.is_unicast_link_local() { interface } else { 0 };
                Some(unmapped(SocketAddrV6::new(ip, port, 0, scope).into()))
            }
            _ => None,
        }
    };
    let id = SocketId {
        local: address(8, port(4)?)?,
        remote: address(24, port(6)?)?,
        cookie: u64::from(u32_at(fixed, 44)?) | u64::from(u32_at(fixed, 48)?) << 32,
    };
    Some(DiagSocket {
        id,
        state: TcpState(state),
        unread: u32_at(fixed, 56)?,
        unacknowledged: u32_at(fixed, 60)?,
        owner: u32_at(fixed, 64)?,
        inode: u32_at(fixed, 68)?,
        counts: attribute(attributes, INET_DIAG_INFO).and_then(Counts::parse),
    })
}

fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    loop {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes(*bytes.get(2..)?.first_chunk()?);
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(aligned(length)..)?;
    }
}

/// Messages and attributes begin at multiples of four. A length is at least that of its header, so that reading moves on.
fn aligned(length: usize) -> usize {
    length.saturating_add(3) & !3
}

fn unmapped(address: SocketAddr) -> SocketAddr {
    match address.ip().to_canonical() {
        IpAddr::V4(ip) => SocketAddr::from((ip, address.port())),
        IpAddr::V6(_) => address,
    }
}

fn family(address: SocketAddr) -> u8 {
    (if address.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 }) as u8
}

fn octets(ip: IpAddr) -> [u8; 16] {
    let mut octets = [0; 16];
    match ip {
        IpAddr::V4(ip) => octets[..4].copy_from_slice(&ip.octets()),
        IpAddr::V6(ip) => octets = ip.octets(),
    }
    octets
}

fn u32_at(bytes: &[u8], offset: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(offset..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(local: &str, remote: &str) -> SocketId {
        SocketId { local: local.parse().unwrap(), remote: remote.parse().unwrap(), cookie: 0x1_0000_0002 }
    }

    #[test]
    fn a_request_names_v4_mapped_addresses_as_ipv4() {
        let bytes = request(Kind::Destroy, 7, &id("[::ffff:10.0.0.1]:80", "[::ffff:10.0.0.2]:5000"), 0);
        assert_eq!(bytes, request(Kind::Destroy, 7, &id("10.0.0.1:80", "10.0.0.2:5000"), 0));
        assert_eq!(i32::from(bytes[16]), libc::AF_INET);
        assert_eq!(bytes[24..28], [0, 80, 0x13, 0x88]);
        assert_eq!(bytes[28..32], [10, 0, 0, 1]);
        assert_eq!(bytes[44..48], [10, 0, 0, 2]);
        assert_eq!(bytes[64..72], [2_u32.to_ne_bytes(), 1_u32.to_ne_bytes()].concat());
    }

    /// The kernel's answer has the same part in the same order as the request.
    fn answer(id: &SocketId, info: &[u8]) -> Vec<u8> {
        let request = request(Kind::Destroy, 9, id, 0);
        let mut bytes = vec![0; 16];
        bytes[4..6].copy_from_slice(&SOCK_DIAG_BY_FAMILY.to_ne_bytes());
        bytes[8..12].copy_from_slice(&9_u32.to_ne_bytes());
        bytes.extend([request[16], 7, 0, 0]);
        bytes.extend(&request[24..72]);
        for field in [0_u32, 11, 12, 13, 14] {
            bytes.extend(field.to_ne_bytes());
        }
        // An attribute of one byte, padded, before the one that is looked for.
        bytes.extend([5, 0, 10, 0, 6, 0, 0, 0]);
        bytes.extend(u16::try_from(info.len() + 4).unwrap().to_ne_bytes());
        bytes.extend(INET_DIAG_INFO.to_ne_bytes());
        bytes.extend(info);
        let length = u32::try_from(bytes.len()).unwrap();
        bytes[..4].copy_from_slice(&length.to_ne_bytes());
        bytes
    }

    #[test]
    fn an_answer_is_read_with_its_counts() {
        let id = id("[fe80::1%3]:80", "[fe80::2%3]:5000");
        let mut info = [0; 232];
        info[120] = 42;
        let mut bytes = answer(&id, &info);
        bytes.extend(answer(&id, &[]));
        let read: Vec<_> = answers(&bytes).collect();
        assert_eq!(read.len(), 2);
        let (9, Answer::Socket(socket)) = &read[0] else { panic!("{read:?}") };
        assert_eq!((socket.id, socket.state, socket.unread), (id, TcpState::CLOSED, 11));
        assert_eq!((socket.unacknowledged, socket.owner, socket.inode), (12, 13, 14));
        assert_eq!(socket.counts.map(|counts| counts.bytes_acked), Some(42));
        let (9, Answer::Socket(without)) = &read[1] else { panic!("{read:?}") };
        assert_eq!(without.counts, None);
    }

    proptest! {
        #[test]
        fn bytes_of_any_content_never_panic_and_are_read_to_an_end(bytes: Vec<u8>) {
            prop_assert!(answers(&bytes).count() <= bytes.len() / HEADER);
        }

        #[test]
        fn an_answer_changed_anywhere_never_panics(place in 0_usize..400, value: u8, cut in 0_usize..400) {
            let mut bytes = answer(&id("10.0.0.1:80", "10.0.0.2:5000"), &[7; 240]);
            if let Some(byte) = bytes.get_mut(place) {
                *byte = value;
            }
            bytes.truncate(cut);
            prop_assert!(answers(&bytes).count() <= bytes.len() / HEADER);
        }
    }
}
