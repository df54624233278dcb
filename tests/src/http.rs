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
}
