//! Tokens from a file: random ones, each for the agent of one node, of which the file holds the hash. What is in the file `config` reads.

use std::{net::IpAddr, sync::Arc, time::SystemTime};

use arc_swap::ArcSwap;
use aws_lc_rs::{
    constant_time::verify_slices_are_equal,
    digest::{SHA256, digest},
};

use super::{Authenticate, Authenticated, Caller, CallerKind, Token};
use crate::{ca::refusal::Refusal, config::TokenEntry, identity::hex};

/// What all that are made here begin with.
pub const PREFIX: &str = "marline-";

/// The tokens as the file has them now. A clone is another handle on the same ones.
#[derive(Clone, Debug)]
pub struct Tokens {
    audience: Arc<str>,
    entries: Arc<ArcSwap<Vec<TokenEntry>>>,
}

/// A new token and its hash, both as text.
pub fn generate() -> (String, String) {
    let bytes: [u8; 32] = rand::random();
    let token = format!("{PREFIX}{}", hex::lower(&bytes));
    let hash = hex::lower(digest(&SHA256, token.as_bytes()).as_ref());
    (token, hash)
}

impl Tokens {
    pub fn new(audience: &str, entries: Vec<TokenEntry>) -> Self {
        Self { audience: audience.into(), entries: Arc::new(ArcSwap::from_pointee(entries)) }
    }

    pub fn replace(&self, entries: Vec<TokenEntry>) {
        self.entries.store(Arc::new(entries));
    }

    fn check(&self, token: &Token, peer: IpAddr, now: SystemTime) -> Result<Option<Caller>, Refusal> {
        let hash = digest(&SHA256, token.secret().as_bytes());
        let entries = self.entries.load();
        // All are compared, each in constant time: how long it takes tells nothing.
        let mut found = None;
        for entry in entries.iter() {
            if verify_slices_are_equal(&entry.sha256, hash.as_ref()).is_ok() {
                found = Some(entry);
            }
        }
        let Some(entry) = found else { return Ok(None) };
        let node = &entry.node;
        if entry.expires.is_some_and(|expires| expires <= now) {
            return Err(Refusal::unauthenticated(format!(
                "the token of node {node} has expired: give its agent a new one (`marline ca token`)"
            )));
        }
        if entry.audience.as_ref().is_some_and(|audience| **audience != *self.audience) {
            return Err(Refusal::unauthenticated(format!(
                "the token of node {node} is meant for another audience than this service, {}",
                self.audience
            )));
        }
        if !entry.from.is_empty() && !entry.from.iter().any(|network| network.contains(peer)) {
            return Err(Refusal::unauthenticated(format!(
                "the token of node {node} may not be used from {}: correct `from` of its entry, or find out who has the token",
                peer.to_canonical()
            )));
        }
        Ok(Some(Caller { name: format!("node/{node}"), node: node.clone(), kind: CallerKind::Agent }))
    }
}

impl Authenticate for Tokens {
    fn authenticate<'a>(&'a self, token: &'a Token, peer: IpAddr) -> Authenticated<'a> {
        Box::pin(std::future::ready(self.check(token, peer, SystemTime::now())))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::config::Network;

    fn tokens(change: impl FnOnce(&mut TokenEntry)) -> (Tokens, Token) {
        let (token, _) = generate();
        let sha256 = digest(&SHA256, token.as_bytes()).as_ref().try_into().unwrap();
        let mut entry = TokenEntry { sha256, node: "a".into(), expires: None, audience: None, from: Vec::new() };
        change(&mut entry);
        (Tokens::new("here", vec![entry]), Token::from_header(&format!("Bearer {token}")).unwrap())
    }

    fn check(change: impl FnOnce(&mut TokenEntry)) -> Result<Option<Caller>, String> {
        let (tokens, token) = tokens(change);
        let peer = "10.0.0.7".parse().unwrap();
        tokens.check(&token, peer, SystemTime::now()).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn a_token_counts_for_its_node_within_its_bounds() {
        let hour = Duration::from_secs(3_600);
        assert_eq!(check(|_| {}).unwrap().unwrap().node, "a");
        assert!(check(|entry| entry.expires = Some(SystemTime::now() + hour)).unwrap().is_some());
        assert!(check(|entry| entry.expires = Some(SystemTime::now() - hour)).unwrap_err().contains("has expired"));
        assert!(check(|entry| entry.audience = Some("here".into())).unwrap().is_some());
        assert!(check(|entry| entry.audience = Some("there".into())).unwrap_err().contains("audience"));
        assert!(check(|entry| entry.from = vec![Network::parse("10.0.0.0/24").unwrap()]).unwrap().is_some());
        let elsewhere = check(|entry| entry.from = vec![Network::parse("10.0.1.0/24").unwrap()]).unwrap_err();
        assert!(elsewhere.contains("may not be used from 10.0.0.7"), "{elsewhere}");
    }

    #[test]
    fn a_token_that_is_taken_out_of_the_file_is_unknown() {
        let (tokens, token) = tokens(|_| {});
        let peer = "10.0.0.7".parse().unwrap();
        assert!(tokens.check(&token, peer, SystemTime::now()).unwrap().is_some());
        tokens.replace(Vec::new());
        assert_eq!(tokens.check(&token, peer, SystemTime::now()).unwrap(), None);
    }

    #[test]
    fn a_token_is_read_from_a_bearer_header_alone_and_never_printed() {
        for header in ["", "Bearer", "Bearer ", "Basic abc", "abc"] {
            assert!(Token::from_header(header).is_none(), "{header:?}");
        }
        assert_eq!(format!("{:?}", Token::from_header("bearer abc").unwrap()), "Token");
    }
}
