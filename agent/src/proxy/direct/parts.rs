//! Socket addresses as they lie in an application's memory (sockaddr_in, sockaddr_in6). Pure.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV6};

/// The longest that is read: a sockaddr_in6.
pub(super) const LONGEST: usize = 28;
const SHORTEST4: usize = 16;

/// An internet address; `None` for any other family, or too few bytes.
pub(super) fn read(bytes: &[u8]) -> Option<SocketAddr> {
    let family = i32::from(u16::from_ne_bytes(*bytes.first_chunk()?));
    let port = u16::from_be_bytes(*bytes.get(2..)?.first_chunk()?);
    match family {
        libc::AF_INET if bytes.len() >= SHORTEST4 => {
            let octets: [u8; 4] = *bytes.get(4..)?.first_chunk()?;
            Some((Ipv4Addr::from(octets), port).into())
        }
        // The scope may be left out (SIN6_LEN_RFC2133).
        libc::AF_INET6 if bytes.len() >= 24 => {
            let octets: [u8; 16] = *bytes.get(8..)?.first_chunk()?;
            let flow = u32::from_ne_bytes(*bytes.get(4..)?.first_chunk()?);
            let scope =
                bytes.get(24..).and_then(|rest| rest.first_chunk()).map_or(0, |scope| u32::from_ne_bytes(*scope));
            Some(SocketAddrV6::new(Ipv6Addr::from(octets), port, flow, scope).into())
        }
        _ => None,
    }
}

/// As accept() writes it, for a socket of the family given: IPv4 clients of an IPv6 socket are v4-mapped.
pub(super) fn write(address: SocketAddr, v6: bool) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(LONGEST);
    match (address, v6) {
        (SocketAddr::V4(address), false) => {
            bytes.extend((libc::AF_INET as u16).to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend(address.ip().octets());
            bytes.resize(SHORTEST4, 0);
        }
        (address, _) => {
            let (ip, scope) = match address {
                SocketAddr::V4(v4) => (v4.ip().to_ipv6_mapped(), 0),
                SocketAddr::V6(v6) => (*v6.ip(), v6.scope_id()),
            };
            bytes.extend((libc::AF_INET6 as u16).to_ne_bytes());
            bytes.extend(address.port().to_be_bytes());
            bytes.extend([0; 4]);
            bytes.extend(ip.octets());
            bytes.extend(scope.to_ne_bytes());
        }
    }
    bytes
}

/// One form for both families, by which connections are matched.
pub(in crate::proxy) fn canonical(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

/// The address as a socket has it that was to be connected to `asked`: v4-mapped, if that is IPv6. `None` where no such socket can be
/// connected to it.
pub(super) fn like(asked: SocketAddr, address: SocketAddr) -> Option<SocketAddr> {
    if canonical(asked) == address {
        return Some(asked);
    }
    match (asked, address) {
        (SocketAddr::V4(_), SocketAddr::V6(_)) => None,
        // One of IPv6 alone, or bound to an IPv6 address, is told so by the kernel.
        (SocketAddr::V6(_), SocketAddr::V4(v4)) => Some((v4.ip().to_ipv6_mapped(), v4.port()).into()),
        _ => Some(address),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn addresses_are_read_as_they_were_written() {
        for text in ["10.1.2.3:80", "[2001:db8::1]:443", "[fe80::1%3]:1"] {
            let address: SocketAddr = text.parse().unwrap();
            assert_eq!(read(&write(address, address.is_ipv6())), Some(address));
        }
        let mapped = read(&write("10.1.2.3:80".parse().unwrap(), true)).unwrap();
        assert_eq!(mapped, "[::ffff:10.1.2.3]:80".parse().unwrap());
        assert_eq!(canonical(mapped), "10.1.2.3:80".parse().unwrap());
    }

    #[test]
    fn what_is_no_internet_address_is_none() {
        assert_eq!(read(&[]), None);
        assert_eq!(read(&(libc::AF_UNIX as u16).to_ne_bytes()), None);
        assert_eq!(read(&write("10.1.2.3:80".parse().unwrap(), false)[..15]), None);
    }

    proptest! {
        #[test]
        fn any_memory_is_read_without_panic(bytes: Vec<u8>) {
            let _ = read(&bytes);
        }
    }
}
