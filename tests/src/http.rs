//! Just enough HTTP to ask an agent about itself from inside its node's namespace.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpStream},
    path::Path,
    time::Duration,
};

use anyhow::{Context, Result, anyhow};

const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug)]
pub struct Response {
    pub status: u16,
    pub body: String,
}

/// One GET request to `address` in the namespace.
pub fn get(netns: &Path, address: SocketAddr, path: &str) -> Result<Response> {
    let text = crate::netns::inside(netns, || exchange(address, path))?
        .with_context(|| format!("GET http://{address}{path} in {}", netns.display()))?;
    parse(&text).ok_or_else(|| anyhow!("GET http://{address}{path} was not answered in HTTP: {text:?}"))
}

/// Sends a request as it is, to `address` in the namespace, and gives all that comes back.
pub fn raw(netns: &Path, address: SocketAddr, request: &str) -> Result<String> {
    let text = crate::netns::inside(netns, || send(address, request))?;
    text.with_context(|| format!("asking {address} in {}", netns.display()))
}

/// The body of an answer in HTTP/1.1 that was read to the connection's end, chunked or not.
#[must_use]
pub fn body(answer: &str) -> Option<String> {
    let (head, body) = answer.split_once("\r\n\r\n")?;
    if !head.to_ascii_lowercase().contains("\r\ntransfer-encoding: chunked") {
        return Some(body.to_owned());
    }
    let (mut left, mut whole) = (body, String::new());
    loop {
        let (size, rest) = left.split_once("\r\n")?;
        let size = usize::from_str_radix(size, 16).ok()?;
        if size == 0 {
            return Some(whole);
        }
        whole.push_str(rest.get(..size)?);
        left = rest.get(size..)?.strip_prefix("\r\n")?;
    }
}

fn exchange(address: SocketAddr, path: &str) -> std::io::Result<String> {
    // HTTP/1.0: the answer ends where the connection ends, without chunks.
    send(address, &format!("GET {path} HTTP/1.0\r\nHost: {address}\r\n\r\n"))
}

fn send(address: SocketAddr, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, PATIENCE)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

fn parse(text: &str) -> Option<Response> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let status = head.strip_prefix("HTTP/1.")?.split_whitespace().nth(1)?.parse().ok()?;
    Some(Response { status, body: body.to_owned() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_told_apart() {
        let response = parse("HTTP/1.0 503 Service Unavailable\r\ncontent-length: 3\r\n\r\nnot");
        assert!(response.is_some_and(|response| response.status == 503 && response.body == "not"));
        assert!(parse("SSH-2.0-OpenSSH_9.2\r\n").is_none());
    }

    #[test]
    fn chunks_are_put_together_and_one_that_is_cut_off_is_no_answer() {
        let head = "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n";
        let of = |chunks: &str| body(&format!("{head}{chunks}"));
        assert_eq!(of("3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n").as_deref(), Some("abcde"));
        assert_eq!(of("3\r\nabc\r\n2\r\nd"), None);
        assert_eq!(body("HTTP/1.1 200 OK\r\n\r\nabc").as_deref(), Some("abc"));
    }
}
