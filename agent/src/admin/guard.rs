//! Who may ask the admin address. It listens on loopback only; what is left are web pages, which can make a browser on this machine ask
//! for anything, under the page's own host name if that was made to resolve to loopback (DNS rebinding).

use std::net::IpAddr;

use axum::http::{
    HeaderMap, HeaderValue, Method, Uri,
    header::{HOST, ORIGIN},
};

/// Why a request is refused. It must name this machine, and one that may change something must not come from a page.
pub(super) fn check(method: &Method, headers: &HeaderMap, uri: &Uri) -> Result<(), String> {
    let mut hosts = headers.get_all(HOST).iter().map(text).chain(uri.authority().map(|authority| authority.as_str()));
    if let Some(host) = hosts.find(|host| !is_here(host)) {
        return Err(format!(
            "{host:?} is not this machine by its own name: ask for localhost, 127.0.0.1 or [::1] (a proxy between must not change it)"
        ));
    }
    if [Method::GET, Method::HEAD].contains(method) {
        return Ok(());
    }
    let foreign = headers.get_all(ORIGIN).iter().map(text).find(|origin| {
        let host = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        !host.is_some_and(is_here)
    });
    if let Some(origin) = foreign {
        return Err(format!("a page of {origin:?} may not change anything here"));
    }
    match headers.get("sec-fetch-site").map(text) {
        None | Some("none" | "same-origin") => Ok(()),
        Some(site) => Err(format!("a page ({site}) may not change anything here")),
    }
}

/// What is no text is nothing that is known.
fn text(value: &HeaderValue) -> &str {
    value.to_str().unwrap_or("\u{fffd}")
}

/// Whether a host, with or without a port, can only be this machine.
fn is_here(host: &str) -> bool {
    let name = match host.strip_prefix('[') {
        Some(rest) => match rest.split_once(']') {
            Some((name, port)) if port.is_empty() || is_port(port) => name,
            _ => return false,
        },
        None => match host.split_once(':') {
            Some((name, port)) if is_port(&format!(":{port}")) => name,
            Some(_) => return false,
            None => host,
        },
    };
    name.eq_ignore_ascii_case("localhost") || name.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn is_port(text: &str) -> bool {
    text.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs.iter().map(|(name, value)| ((*name).parse().unwrap(), HeaderValue::from_str(value).unwrap())).collect()
    }

    fn refused(method: Method, pairs: &[(&'static str, &str)], uri: &str) -> bool {
        check(&method, &headers(pairs), &uri.parse().unwrap()).is_err()
    }

    #[test]
    fn only_names_that_cannot_be_anothers_are_taken() {
        for host in ["localhost", "LocalHost:15000", "127.0.0.1:15000", "127.8.9.1", "[::1]:15000", "[::1]"] {
            assert!(!refused(Method::GET, &[("host", host)], "/pods"), "{host}");
        }
        for host in [
            "evil.example",
            "evil.example:15000",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "10.0.0.1",
            "[::2]",
            "localhost:",
            "localhost:99999",
            "[::1]x",
            "[::1",
            "",
            "0.0.0.0",
            "localhost@evil.example",
        ] {
            assert!(refused(Method::GET, &[("host", host)], "/pods"), "{host}");
        }
        assert!(!refused(Method::GET, &[], "/pods"), "HTTP/1.0 names no host");
        assert!(refused(Method::GET, &[], "http://evil.example/pods"));
        assert!(refused(Method::GET, &[("host", "localhost"), ("host", "evil.example")], "/pods"));
    }

    #[test]
    fn a_page_changes_nothing() {
        let here = ("host", "127.0.0.1:15000");
        assert!(!refused(Method::POST, &[here], "/logging?level=debug"));
        assert!(!refused(Method::POST, &[here, ("origin", "http://localhost:15000")], "/logging"));
        for origin in ["http://evil.example", "null", "http://127.0.0.1.evil.example", "file://", ""] {
            assert!(refused(Method::POST, &[here, ("origin", origin)], "/logging"), "{origin}");
        }
        assert!(refused(Method::PUT, &[here, ("sec-fetch-site", "cross-site")], "/logging"));
        assert!(!refused(Method::PUT, &[here, ("sec-fetch-site", "none")], "/logging"));
    }

    proptest! {
        #[test]
        fn no_foreign_name_is_taken_however_it_is_written(host in "[a-z0-9.:@\\[\\]-]{0,24}") {
            let name = host.trim_start_matches('[');
            prop_assume!(!name.starts_with("127.") && !name.starts_with("localhost") && !name.starts_with("::1")
                && !name.starts_with('0'));
            prop_assert!(!is_here(&host), "{}", host);
        }
    }
}
