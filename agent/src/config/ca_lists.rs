//! The two lists that the CA service follows: whose tokens it takes (kind CaTokens), and which service accounts run on which node (kind
//! CaNodes). Comparing tokens and deciding is left to `ca`.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::IpAddr,
    path::Path,
    time::SystemTime,
};

use super::{
    ConfigErrors, Finding,
    document::Pair,
    fields::{Fields, Unknown},
    finding::{Origin, Report},
    single,
};
use crate::identity::hex;

/// One token, by its hash: the file does not hold what lets one in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TokenEntry {
    pub sha256: [u8; 32],
    pub node: String,
    pub expires: Option<SystemTime>,
    /// If there is one, the service's own audience must be it.
    pub audience: Option<String>,
    /// Where the token may come from; anywhere if there are none.
    pub from: Vec<Network>,
}

/// An address with the length of its prefix.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Network {
    address: u128,
    prefix: u32,
}

/// `NAMESPACE/NAME` of service accounts, by node.
pub type Placements = BTreeMap<String, BTreeSet<(String, String)>>;

pub fn load_ca_tokens(file: &Path) -> Result<(Vec<TokenEntry>, Vec<Finding>), ConfigErrors> {
    single::read(file, "CaTokens", read_tokens)
}

pub fn load_ca_nodes(file: &Path) -> Result<(Placements, Vec<Finding>), ConfigErrors> {
    single::read(file, "CaNodes", read_nodes)
}

impl Network {
    /// `10.0.0.0/8`, `fd00::/64`, or an address alone.
    pub fn parse(text: &str) -> Option<Self> {
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix.parse::<u32>().ok()?)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        let width = if address.is_ipv4() { 32 } else { 128 };
        let prefix = prefix.unwrap_or(width);
        (prefix <= width).then(|| Self { address: mapped(address), prefix: prefix + 128 - width })
    }

    pub fn contains(&self, address: IpAddr) -> bool {
        let differs = self.address ^ mapped(address);
        self.prefix == 0 || differs >> (128 - self.prefix) == 0
    }
}

/// IPv4 as IPv6 has it: a listener for both sees clients so.
fn mapped(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped().to_bits(),
        IpAddr::V6(address) => address.to_bits(),
    }
}

fn read_tokens(origin: &Origin, document: &[Pair], report: &mut Report) -> Option<Vec<TokenEntry>> {
    let mut spec = spec(origin, document, report)?;
    let items = spec.items(report, "tokens");
    spec.finish(report, Unknown::Error);
    let mut tokens: Vec<TokenEntry> = Vec::new();
    for mut item in items.unwrap_or_default() {
        let hint = "write what `marline ca token` prints: 64 hexadecimal digits";
        let hash = item.required(report, "sha256", hint).and_then(|text| {
            let hash = hex::parse(text).and_then(|bytes| bytes.try_into().ok());
            if hash.is_none() {
                item.error(report, "sha256", "is no SHA-256", hint);
            }
            hash
        });
        let node = item.required(report, "node", "write the name of the node whose agent has the token");
        let expires = item.text(report, "expires").and_then(|text| {
            let time = humantime::parse_rfc3339_weak(text).ok();
            if time.is_none() {
                item.error(report, "expires", format!("{text:?} is no time"), "write it like 2030-01-31T12:00:00Z");
            }
            time
        });
        let audience = item.text(report, "audience").map(str::to_owned);
        let from = item.strings(report, "from");
        let networks: Vec<Network> = from.iter().filter_map(|text| Network::parse(text)).collect();
        if networks.len() != from.len() {
            let hint = "write addresses or networks, as in 10.0.0.7 or 10.0.0.0/24";
            item.error(report, "from", "holds what is no address and no network", hint);
        }
        if let Some(twin) = hash.and_then(|hash| tokens.iter().find(|known| known.sha256 == hash)) {
            let message = format!("this token is there already, for node {}", twin.node);
            item.error(report, "sha256", message, "give each node a token of its own");
        }
        item.finish(report, Unknown::Error);
        if let (Some(sha256), Some(node)) = (hash, node) {
            tokens.push(TokenEntry { sha256, node: node.to_owned(), expires, audience, from: networks });
        }
    }
    Some(tokens)
}

fn read_nodes(origin: &Origin, document: &[Pair], report: &mut Report) -> Option<Placements> {
    let mut spec = spec(origin, document, report)?;
    let items = spec.items(report, "nodes");
    spec.finish(report, Unknown::Error);
    let mut nodes = Placements::new();
    for mut item in items.unwrap_or_default() {
        let name = item.required(report, "name", "write the node's name, as its token has it");
        let mut accounts = BTreeSet::new();
        for text in item.strings(report, "serviceAccounts") {
            match text.split_once('/') {
                Some((namespace, account))
                    if !namespace.is_empty() && !account.is_empty() && !account.contains('/') =>
                {
                    accounts.insert((namespace.to_owned(), account.to_owned()));
                }
                _ => {
                    let hint = "write NAMESPACE/NAME, as in shop/web";
                    item.error(report, "serviceAccounts", format!("{text:?} is no service account"), hint);
                }
            }
        }
        if let Some(name) = name
            && nodes.insert(name.to_owned(), accounts).is_some()
        {
            item.error(report, "name", format!("{name} is there twice"), "write each node once");
        }
        item.finish(report, Unknown::Error);
    }
    Some(nodes)
}

fn spec<'a>(origin: &'a Origin, document: &'a [Pair], report: &mut Report) -> Option<Fields<'a>> {
    let mut top = Fields::top(origin, document);
    top.skip(&["apiVersion", "kind", "metadata"]);
    if !top.has("spec") {
        top.error(report, "spec", "is missing", "write spec, if only with an empty list");
    }
    let spec = top.fields(report, "spec");
    top.finish(report, Unknown::Error);
    spec
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_network_holds_its_own_addresses_alone() {
        let cases = [
            ("10.0.0.0/8", "10.255.0.1", true),
            ("10.0.0.0/8", "11.0.0.1", false),
            ("10.0.0.7", "10.0.0.7", true),
            ("10.0.0.7", "10.0.0.8", false),
            ("10.0.0.7", "::ffff:10.0.0.7", true),
            ("0.0.0.0/0", "192.0.2.1", true),
            ("0.0.0.0/0", "2001:db8::1", false),
            ("::/0", "2001:db8::1", true),
            ("fd00::/64", "fd00::1", true),
            ("fd00::/64", "fd00:0:0:1::1", false),
        ];
        for (network, address, holds) in cases {
            let network = Network::parse(network).unwrap();
            assert_eq!(network.contains(address.parse().unwrap()), holds, "{network:?} {address}");
        }
        for text in ["", "10.0.0.0/33", "::/129", "10.0.0.0/-1", "host", "10.0.0.0/"] {
            assert_eq!(Network::parse(text), None, "{text:?}");
        }
    }

    proptest! {
        #[test]
        fn no_text_makes_a_network_panic(text in "\\PC*|[0-9.:a-f/]{0,40}", address in any::<u128>()) {
            if let Some(network) = Network::parse(&text) {
                network.contains(IpAddr::from(address.to_be_bytes()));
            }
        }
    }
}
