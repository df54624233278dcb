//! What blocks travel as: bytes and nothing else, or the bodies of HTTP/1.1. Client and server read and write blocks alike; as HTTP each
//! write is a message of its own, but for one that is announced longer. Just enough HTTP for the two to understand each other, and a
//! proxy between them.

use std::{
    io::{self, Read, Write},
    net::{Shutdown, TcpStream},
};

/// What a message begins with; a block of bytes never does.
const HEAD: u8 = b'P';
const END: &[u8] = b"\r\n\r\n";
const LONGEST_HEAD: usize = 8 * 1024;

/// One connection.
pub struct Wire {
    stream: TcpStream,
    http: Option<Http>,
    /// Of a server that has read nothing yet.
    unheard: bool,
}

/// Where a connection is with its messages.
struct Http {
    /// What a message of ours begins with, up to the length.
    head: String,
    /// What is left to write, or to read, of a message that has begun.
    outgoing: u64,
    incoming: u64,
    /// Read, and not yet asked for: what came with a head.
    early: Vec<u8>,
}

impl Wire {
    /// Of a client, which says what it speaks.
    pub fn client(stream: TcpStream, http: bool) -> io::Result<Self> {
        let http = if http {
            let host = stream.peer_addr()?;
            Some(Http::new(format!("POST /block HTTP/1.1\r\nhost: {host}\r\n")))
        } else {
            None
        };
        Ok(Self { stream, http, unheard: false })
    }

    /// Of a server, which hears from the first byte what is spoken.
    #[must_use]
    pub fn server(stream: TcpStream) -> Self {
        Self { stream, http: None, unheard: true }
    }

    /// Begins to send so many bytes, in as many writes as it takes.
    pub fn begin(&mut self, length: u64) -> io::Result<()> {
        let Some(http) = &mut self.http else { return Ok(()) };
        http.outgoing = length;
        self.stream.write_all(http.start(length).as_bytes())
    }

    /// Ends what was begun: bytes end with the connection's direction, a message by its length.
    pub fn end(&mut self) -> io::Result<()> {
        if self.http.is_none() { self.stream.shutdown(Shutdown::Write) } else { Ok(()) }
    }

    /// Whether blocks are messages, each of which may come over another connection than the one before.
    #[must_use]
    pub fn has_messages(&self) -> bool {
        self.http.is_some()
    }

    /// How much is left to read of the message that has begun: more than nothing after a block only if it is a longer one.
    #[must_use]
    pub fn left(&self) -> u64 {
        self.http.as_ref().map_or(0, |http| http.incoming)
    }
}

impl Read for Wire {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if self.unheard {
            // Not looked at beforehand: that would be one call more where bytes are only bytes.
            let count = self.stream.read(bytes)?;
            self.unheard = false;
            if count == 0 || bytes.first() != Some(&HEAD) {
                return Ok(count);
            }
            let http = self.http.insert(Http::new("HTTP/1.1 200 OK\r\n".to_owned()));
            http.early.extend_from_slice(&bytes[..count]);
        }
        let Some(http) = &mut self.http else { return self.stream.read(bytes) };
        if http.incoming == 0 && !http.meet(&mut self.stream)? {
            return Ok(0);
        }
        let most = usize::try_from(http.incoming).unwrap_or(usize::MAX).min(bytes.len());
        let count = if http.early.is_empty() {
            self.stream.read(&mut bytes[..most])?
        } else {
            let count = most.min(http.early.len());
            bytes[..count].copy_from_slice(&http.early[..count]);
            http.early.drain(..count);
            count
        };
        http.incoming -= count as u64;
        Ok(count)
    }
}

impl Write for Wire {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let Some(http) = &mut self.http else { return self.stream.write(bytes) };
        if http.outgoing == 0 {
            let mut message = http.start(bytes.len() as u64).into_bytes();
            message.extend_from_slice(bytes);
            self.stream.write_all(&message)?;
            return Ok(bytes.len());
        }
        let most = usize::try_from(http.outgoing).unwrap_or(usize::MAX).min(bytes.len());
        let count = self.stream.write(&bytes[..most])?;
        http.outgoing -= count as u64;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Http {
    fn new(head: String) -> Self {
        Self { head, outgoing: 0, incoming: 0, early: Vec::new() }
    }

    fn start(&self, length: u64) -> String {
        format!("{}content-type: application/octet-stream\r\ncontent-length: {length}\r\n\r\n", self.head)
    }

    /// Reads the next message's head; false if the connection has ended instead.
    fn meet(&mut self, stream: &mut TcpStream) -> io::Result<bool> {
        let mut buffer = [0; 2048];
        loop {
            if let Some(at) = memchr::memmem::find(&self.early, END) {
                let head: Vec<u8> = self.early.drain(..at + END.len()).collect();
                self.incoming = length(&String::from_utf8_lossy(&head))
                    .ok_or_else(|| io::Error::other(String::from_utf8_lossy(&head).into_owned()))?;
                return Ok(true);
            }
            let count = stream.read(&mut buffer)?;
            if count == 0 && self.early.is_empty() {
                return Ok(false);
            }
            if count == 0 || self.early.len() > LONGEST_HEAD {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            self.early.extend_from_slice(&buffer[..count]);
        }
    }
}

/// The length of a request's or a good answer's body; nothing for all else.
fn length(head: &str) -> Option<u64> {
    let (start, fields) = head.split_once("\r\n")?;
    (start.starts_with("POST /") || start.starts_with("HTTP/1.1 200 ")).then_some(())?;
    let mut fields = fields.lines().filter_map(|line| line.split_once(':'));
    let (_, value) = fields.find(|(name, _)| name.eq_ignore_ascii_case("content-length"))?;
    value.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::{net::TcpListener, thread};

    use super::*;

    /// Both ends of a connection, the server's as soon as the client has sent something.
    fn talk(http: bool, client: impl FnOnce(&mut Wire) + Send, server: impl FnOnce(&mut Wire)) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::scope(|scope| {
            scope.spawn(move || client(&mut Wire::client(TcpStream::connect(address).unwrap(), http).unwrap()));
            server(&mut Wire::server(listener.accept().unwrap().0));
        });
    }

    #[test]
    fn blocks_and_many_bytes_arrive_as_they_were_sent_whatever_they_travel_as() {
        for http in [false, true] {
            let client = |wire: &mut Wire| {
                let mut block = [b'x'; 64];
                for _ in 0..3 {
                    wire.write_all(&block).unwrap();
                    wire.read_exact(&mut block).unwrap();
                    assert_eq!(block, [b'x'; 64]);
                }
                wire.begin(300_000).unwrap();
                for _ in 0..3 {
                    wire.write_all(&vec![b'.'; 100_000]).unwrap();
                }
                wire.end().unwrap();
                let mut total = [0; 8];
                wire.read_exact(&mut total).unwrap();
                assert_eq!(u64::from_be_bytes(total), 300_000);
            };
            talk(http, client, |wire| {
                let mut block = [0; 64];
                for _ in 0..3 {
                    wire.read_exact(&mut block).unwrap();
                    assert_eq!(wire.http.is_some(), http);
                    wire.write_all(&block).unwrap();
                }
                let mut all = vec![0; 300_000];
                wire.read_exact(&mut all[..64]).unwrap();
                assert_eq!(wire.left(), if http { 300_000 - 64 } else { 0 });
                wire.read_exact(&mut all[64..]).unwrap();
                wire.write_all(&300_000_u64.to_be_bytes()).unwrap();
            });
        }
    }

    #[test]
    fn only_a_request_or_a_good_answer_has_a_length() {
        assert_eq!(length("HTTP/1.1 200 OK\r\nContent-Length: 12\r\n\r\n"), Some(12));
        assert_eq!(length("POST /block HTTP/1.1\r\nhost: a\r\ncontent-length: 7\r\n\r\n"), Some(7));
        assert_eq!(length("HTTP/1.1 503 Service Unavailable\r\ncontent-length: 12\r\n\r\n"), None);
        assert_eq!(length("HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"), None);
    }
}
