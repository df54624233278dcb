//! What rules compare with: text patterns and blocks of addresses, one by one as they are written, and as sets that take
//! the same time however many there are.

use std::{
    collections::{BTreeMap, HashSet},
    fmt,
    net::IpAddr,
    str::FromStr,
};

/// Istio's four forms: `abc`, `abc*`, `*abc`, `*` (istio/api security/v1beta1/authorization_policy.proto, message Rule).
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Pattern {
    Exact(String),
    Prefix(String),
    Suffix(String),
    /// Anything that is there at all.
    Presence,
}

/// Addresses that begin with the same bits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct IpBlock {
    network: IpAddr,
    length: u8,
}

#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum MatchError {
    #[error("is empty")]
    Empty,
    #[error("{0:?} has a wildcard in its middle, or more than one: Istio would compare it letter by letter")]
    Wildcard(String),
    #[error("{0:?} is neither an IP address nor a block such as 10.0.0.0/8")]
    NotABlock(String),
}

impl FromStr for Pattern {
    type Err = MatchError;

    fn from_str(text: &str) -> Result<Self, MatchError> {
        let pattern = match (text.strip_prefix('*'), text.strip_suffix('*')) {
            _ if text.is_empty() => return Err(MatchError::Empty),
            (Some(""), _) => return Ok(Self::Presence),
            (Some(suffix), _) => Self::Suffix(suffix.to_owned()),
            (None, Some(prefix)) => Self::Prefix(prefix.to_owned()),
            (None, None) => Self::Exact(text.to_owned()),
        };
        match &pattern {
            Self::Exact(rest) | Self::Prefix(rest) | Self::Suffix(rest) if rest.contains('*') => {
                Err(MatchError::Wildcard(text.to_owned()))
            }
            _ => Ok(pattern),
        }
    }
}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(exact) => f.write_str(exact),
            Self::Prefix(prefix) => write!(f, "{prefix}*"),
            Self::Suffix(suffix) => write!(f, "*{suffix}"),
            Self::Presence => f.write_str("*"),
        }
    }
}

impl fmt::Display for IpBlock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.network, self.length)
    }
}

impl Pattern {
    /// What is not there is the empty text, and matches nothing.
    pub fn matches(&self, text: &str) -> bool {
        !text.is_empty()
            && match self {
                Self::Exact(exact) => text == exact,
                Self::Prefix(prefix) => text.starts_with(prefix),
                Self::Suffix(suffix) => text.ends_with(suffix),
                Self::Presence => true,
            }
    }
}

impl FromStr for IpBlock {
    type Err = MatchError;

    fn from_str(text: &str) -> Result<Self, MatchError> {
        let wrong = || MatchError::NotABlock(text.to_owned());
        if text.is_empty() {
            return Err(MatchError::Empty);
        }
        let (address, length) = match text.split_once('/') {
            None => (text, None),
            // Go, and so Istio, takes neither a sign nor leading zeros.
            Some((_, length)) if length.starts_with(['+', '0']) && length != "0" => return Err(wrong()),
            Some((address, length)) => (address, Some(length.parse::<u8>().map_err(|_| wrong())?)),
        };
        let written: IpAddr = address.parse().map_err(|_| wrong())?;
        let network = written.to_canonical();
        let length = match length {
            None => bits(network),
            Some(length) if length > bits(written) => return Err(wrong()),
            // An IPv4-mapped block is a block of IPv4 addresses, as addresses are compared in canonical form.
            Some(length) if written.is_ipv6() && network.is_ipv4() => length.checked_sub(96).ok_or_else(wrong)?,
            Some(length) => length,
        };
        Ok(Self { network: masked(network, length), length })
    }
}

impl IpBlock {
    pub fn contains(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        address.is_ipv4() == self.network.is_ipv4() && masked(address, self.length) == self.network
    }
}

/// Many patterns.
#[derive(PartialEq, Default, Debug)]
pub(super) struct Patterns {
    exact: HashSet<String>,
    prefixes: Vec<String>,
    suffixes: Vec<String>,
    presence: bool,
}

impl FromIterator<Pattern> for Patterns {
    fn from_iter<I: IntoIterator<Item = Pattern>>(patterns: I) -> Self {
        let mut all = Self::default();
        for pattern in patterns {
            match pattern {
                Pattern::Exact(text) => _ = all.exact.insert(text),
                Pattern::Prefix(text) => all.prefixes.push(text),
                Pattern::Suffix(text) => all.suffixes.push(text),
                Pattern::Presence => all.presence = true,
            }
        }
        // So that the same patterns compare equal in whatever order they were written.
        all.prefixes.sort_unstable();
        all.suffixes.sort_unstable();
        all
    }
}

impl Patterns {
    pub(super) fn any(&self, text: &str) -> bool {
        !text.is_empty()
            && (self.presence
                || self.exact.contains(text)
                || self.prefixes.iter().any(|prefix| text.starts_with(prefix))
                || self.suffixes.iter().any(|suffix| text.ends_with(suffix)))
    }
}

/// Many blocks: one look for each length that occurs.
#[derive(PartialEq, Default, Debug)]
pub(super) struct Blocks {
    by_length: BTreeMap<u8, HashSet<IpAddr>>,
}

impl FromIterator<IpBlock> for Blocks {
    fn from_iter<I: IntoIterator<Item = IpBlock>>(blocks: I) -> Self {
        let mut by_length: BTreeMap<u8, HashSet<IpAddr>> = BTreeMap::new();
        for block in blocks {
            by_length.entry(block.length).or_default().insert(block.network);
        }
        Self { by_length }
    }
}

impl Blocks {
    pub(super) fn any(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        let fits = |length: u8| length <= bits(address);
        self.by_length.iter().any(|(length, networks)| fits(*length) && networks.contains(&masked(address, *length)))
    }
}

fn bits(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn masked(address: IpAddr, length: u8) -> IpAddr {
    match address {
        IpAddr::V4(v4) => {
            let mask = u32::MAX.checked_shl(u32::from(32 - length.min(32))).unwrap_or(0);
            IpAddr::V4((v4.to_bits() & mask).into())
        }
        IpAddr::V6(v6) => {
            let mask = u128::MAX.checked_shl(u32::from(128 - length.min(128))).unwrap_or(0);
            IpAddr::V6((v6.to_bits() & mask).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// istio/ztunnel src/rbac.rs, the test `string_match`.
    #[test]
    fn patterns_match_as_in_ztunnels_own_test() {
        let cases = [
            ("foo", "foo", true),
            ("foo", "not", false),
            ("foo", "", false),
            ("foo*", "foobar", true),
            ("foo*", "foo", true),
            ("foo*", "notfoo", false),
            ("foo*", "", false),
            ("*foo", "barfoo", true),
            ("*foo", "foo", true),
            ("*foo", "foonot", false),
            ("*foo", "", false),
            ("*", "foo", true),
            ("*", "", false),
        ];
        for (pattern, text, expected) in cases {
            let pattern: Pattern = pattern.parse().unwrap();
            assert_eq!(pattern.matches(text), expected, "{pattern:?} {text:?}");
        }
        for text in ["", "a*b", "*a*", "**", "a**", "*a*b"] {
            assert!(text.parse::<Pattern>().is_err(), "{text:?}");
        }
    }

    #[test]
    fn blocks_hold_their_addresses_and_no_others() {
        let cases = [
            ("10.0.0.1", "10.0.0.1", true),
            ("10.0.0.1", "10.0.0.2", false),
            ("10.0.0.1/8", "10.255.0.9", true),
            ("10.0.0.0/8", "11.0.0.0", false),
            ("10.0.0.0/8", "::ffff:10.1.2.3", true),
            ("::ffff:10.0.0.0/104", "10.1.2.3", true),
            ("0.0.0.0/0", "255.255.255.255", true),
            ("0.0.0.0/0", "::1", false),
            ("::/0", "fd00::1", true),
            ("::/0", "10.0.0.1", false),
            ("fd00::/8", "fdff::1", true),
            ("fd00::1", "fd00::2", false),
            ("172.18.4.0/22", "172.18.7.255", true),
            ("172.18.4.0/22", "172.18.8.0", false),
        ];
        for (block, address, expected) in cases {
            let (block, address): (IpBlock, IpAddr) = (block.parse().unwrap(), address.parse().unwrap());
            assert_eq!(block.contains(address), expected, "{block:?} {address}");
            assert_eq!(Blocks::from_iter([block]).any(address), expected, "{block:?} {address}");
        }
        for text in
            ["", "10.0.0", "10.0.0.1/33", "10.0.0.1/", "10.0.0.1/-1", "10.0.0.1/+8", "10.0.0.1/08", "::/129", "a"]
        {
            assert!(text.parse::<IpBlock>().is_err(), "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_pattern_or_a_block_panic(text in "\\PC*|[0-9a-f:.]{0,20}(/[0-9]{0,4})?|[a*]{0,4}") {
            let (_, _) = (text.parse::<Pattern>(), text.parse::<IpBlock>());
        }
    }
}
