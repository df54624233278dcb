//! Ethernet, IP and TCP or UDP headers, as far as needed to find the payload. Fragments and options of no interest are left.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

const TCP: u8 = 6;
const UDP: u8 = 17;

pub enum Packet<'a> {
    Tcp(Segment<'a>),
    Udp { port: u16, payload: &'a [u8] },
}

/// One TCP segment.
pub struct Segment<'a> {
    pub source: SocketAddr,
    pub destination: SocketAddr,
    pub sequence: u32,
    pub syn: bool,
    pub ack: bool,
    pub fin: bool,
    pub rst: bool,
    pub payload: &'a [u8],
}

/// The TCP or UDP packet of a frame, if it holds one.
#[must_use]
pub fn parse(frame: &[u8]) -> Option<Packet<'_>> {
    let packet = frame.get(14..)?;
    let (source, destination, protocol, body) = match half(frame, 12)? {
        0x0800 => ipv4(packet)?,
        0x86dd => ipv6(packet)?,
        _ => return None,
    };
    match protocol {
        TCP => segment(source, destination, body).map(Packet::Tcp),
        UDP => Some(Packet::Udp { port: half(body, 2)?, payload: body.get(8..)? }),
        _ => None,
    }
}

fn ipv4(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let header = usize::from(packet.first()? & 0x0f) * 4;
    // Padding of short frames is cut off. A length of zero is one that was left to the hardware: then it is all.
    let length = match usize::from(half(packet, 2)?) {
        0 => packet.len(),
        length => length,
    };
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 4] = packet.get(at..at + 4)?.try_into().ok()?;
        Some(Ipv4Addr::from(bytes).into())
    };
    Some((address(12)?, address(16)?, *packet.get(9)?, packet.get(header..length)?))
}

fn ipv6(packet: &[u8]) -> Option<(IpAddr, IpAddr, u8, &[u8])> {
    let length = match usize::from(half(packet, 4)?) {
        0 => packet.len(),
        length => 40 + length,
    };
    let address = |at: usize| -> Option<IpAddr> {
        let bytes: [u8; 16] = packet.get(at..at + 16)?.try_into().ok()?;
        Some(Ipv6Addr::from(bytes).into())
    };
    Some((address(8)?, address(24)?, *packet.get(6)?, packet.get(40..length)?))
}

fn segment(source: IpAddr, destination: IpAddr, body: &[u8]) -> Option<Segment<'_>> {
    let header = usize::from(body.get(12)? >> 4) * 4;
    let flags = *body.get(13)?;
    Some(Segment {
        source: SocketAddr::new(source, half(body, 0)?),
        destination: SocketAddr::new(destination, half(body, 2)?),
        sequence: u32::from_be_bytes(body.get(4..8)?.try_into().ok()?),
        syn: flags & 0x02 != 0,
        ack: flags & 0x10 != 0,
        fin: flags & 0x01 != 0,
        rst: flags & 0x04 != 0,
        payload: body.get(header..)?,
    })
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use anyhow::{Result, bail};

    use super::*;

    fn tcp(frame: &[u8]) -> Result<Segment<'_>> {
        let Some(Packet::Tcp(segment)) = parse(frame) else { bail!("no segment in {frame:?}") };
        Ok(segment)
    }

    fn frame(kind: u16, ip: &[u8], tcp_payload: &[u8]) -> Vec<u8> {
        let mut frame = vec![0; 12];
        frame.extend(kind.to_be_bytes());
        frame.extend(ip);
        frame.extend([0x9c, 0x40, 0x00, 0x50, 0, 0, 0, 7, 0, 0, 0, 0, 0x50, 0x12, 0, 0, 0, 0, 0, 0]);
        frame.extend(tcp_payload);
        frame
    }

    #[test]
    fn a_segment_over_ipv4_is_read_without_the_padding_of_its_frame() -> Result<()> {
        let ip = [0x45, 0, 0, 43, 0, 0, 0, 0, 64, TCP, 0, 0, 10, 77, 1, 10, 10, 77, 2, 11];
        let mut bytes = frame(0x0800, &ip, b"abc");
        bytes.extend([0; 3]);
        let segment = tcp(&bytes)?;
        assert_eq!(
            (segment.source.to_string(), segment.destination.to_string()),
            ("10.77.1.10:40000".into(), "10.77.2.11:80".into())
        );
        assert_eq!((segment.sequence, segment.payload), (7, &b"abc"[..]));
        assert!(segment.syn && segment.ack && !segment.fin && !segment.rst);
        Ok(())
    }

    #[test]
    fn a_segment_over_ipv6_is_read() -> Result<()> {
        let mut ip = vec![0x60, 0, 0, 0, 0, 23, TCP, 64];
        ip.extend(Ipv6Addr::new(0xfd77, 0, 0, 1, 0, 0, 0, 10).octets());
        ip.extend(Ipv6Addr::new(0xfd77, 0, 0, 2, 0, 0, 0, 11).octets());
        let bytes = frame(0x86dd, &ip, b"abc");
        let segment = tcp(&bytes)?;
        assert_eq!(segment.destination.to_string(), "[fd77:0:0:2::b]:80");
        assert_eq!(segment.payload, b"abc");
        Ok(())
    }

    #[test]
    fn a_frame_that_ends_early_is_no_packet() {
        let ip = [0x45, 0, 0, 43, 0, 0, 0, 0, 64, TCP, 0, 0, 10, 77, 1, 10, 10, 77, 2, 11];
        let bytes = frame(0x0800, &ip, b"abc");
        for length in 0..bytes.len() {
            assert!(parse(&bytes[..length]).is_none(), "{length} bytes");
        }
    }
}
