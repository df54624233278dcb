//! Addresses and endpoints as the maps hold them: one form for both families, so that one key type serves all.
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An IP address as four words in network byte order. IPv4 is held v4-mapped, so an IPv4 destination is the same key
/// whether the application used an IPv4 socket or an IPv6 one.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Address {
    pub words: [u32; 4],
}

/// An address and a port (network byte order).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Endpoint {
    pub address: Address,
    pub port: u16,
    pub pad: u16,
}

const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Address {
    pub const UNSPECIFIED: Self = Self { words: [0; 4] };
    pub const LOOPBACK4: Self = Self::v4(0x7f00_0001_u32.to_be());
    pub const LOOPBACK6: Self = Self { words: [0, 0, 0, 1_u32.to_be()] };

    /// From an IPv4 address in network byte order.
    #[inline(always)]
    pub const fn v4(word: u32) -> Self {
        Self { words: [0, 0, MAPPED, word] }
    }

    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        self.words[0] == 0 && self.words[1] == 0 && self.words[2] == MAPPED
    }

    /// 0.0.0.0 and ::, which mean this host to connect().
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.words[0] == 0
            && self.words[1] == 0
            && self.words[3] == 0
            && (self.words[2] == 0 || self.words[2] == MAPPED)
    }

    /// 127.0.0.0/8 and ::1.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.words[3]) >> 24 == 127
        } else {
            self.words[0] == 0 && self.words[1] == 0 && self.words[2] == 0 && self.words[3] == Self::LOOPBACK6.words[3]
        }
    }

    /// fe80::/10: means nothing without an interface, so the agent cannot connect there in the pod's place.
    #[inline(always)]
    pub const fn is_link_local6(&self) -> bool {
        u32::from_be(self.words[0]) >> 22 == 0xfe80_0000 >> 22
    }
}

impl Endpoint {
    #[inline(always)]
    pub const fn new(address: Address, port: u16) -> Self {
        Self { address, port, pad: 0 }
    }
}

impl From<IpAddr> for Address {
    fn from(address: IpAddr) -> Self {
        let octets = match address {
            IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
            IpAddr::V6(v6) => v6.octets(),
        };
        let mut words = [0; 4];
        for (word, bytes) in words.iter_mut().zip(octets.chunks_exact(4)) {
            *word = u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
        }
        Self { words }
    }
}

impl From<Address> for IpAddr {
    fn from(address: Address) -> Self {
        if address.is_v4() {
            return Ipv4Addr::from_bits(u32::from_be(address.words[3])).into();
        }
        let mut octets = [0; 16];
        for (bytes, word) in octets.chunks_exact_mut(4).zip(address.words) {
            bytes.copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(octets).into()
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self::new(address.ip().into(), address.port().to_be())
    }
}

impl From<Endpoint> for SocketAddr {
    fn from(endpoint: Endpoint) -> Self {
        Self::new(endpoint.address.into(), u16::from_be(endpoint.port))
    }
}

const _: () = assert!(size_of::<Address>() == 16);
const _: () = assert!(size_of::<Endpoint>() == 20);

#[cfg(test)]
mod tests {
    use super::*;

    fn address(text: &str) -> Address {
        Address::from(text.parse::<IpAddr>().expect("a literal"))
    }

    #[test]
    fn addresses_come_back_as_they_went_in() {
        for text in ["10.1.2.3:80", "[2001:db8::1]:443", "[::1]:1", "127.0.0.1:65535"] {
            let socket_address: SocketAddr = text.parse().expect("a literal");
            assert_eq!(SocketAddr::from(Endpoint::from(socket_address)), socket_address);
        }
    }

    #[test]
    fn mapped_and_plain_ipv4_are_one_address() {
        assert_eq!(address("::ffff:10.1.2.3"), address("10.1.2.3"));
        assert!(address("10.1.2.3").is_v4());
        assert!(!address("::10.1.2.3").is_v4());
    }

    #[test]
    fn only_loopback_addresses_are_loopback() {
        for text in ["127.0.0.1", "127.255.0.9", "::1", "::ffff:127.0.0.1"] {
            assert!(address(text).is_loopback(), "{text}");
        }
        for text in ["128.0.0.1", "::2", "1::1", "::", "0.0.0.0", "::7f00:1"] {
            assert!(!address(text).is_loopback(), "{text}");
        }
    }

    #[test]
    fn both_unspecified_addresses_are_known_in_each_form() {
        for text in ["0.0.0.0", "::", "::ffff:0.0.0.0"] {
            assert!(address(text).is_unspecified(), "{text}");
        }
        for text in ["0.0.0.1", "::1", "1::"] {
            assert!(!address(text).is_unspecified(), "{text}");
        }
    }

    #[test]
    fn link_local_is_the_whole_slash_ten() {
        for text in ["fe80::1", "febf::1"] {
            assert!(address(text).is_link_local6(), "{text}");
        }
        for text in ["fec0::1", "fe00::1", "169.254.1.1", "2001:db8::1"] {
            assert!(!address(text).is_link_local6(), "{text}");
        }
    }
}
