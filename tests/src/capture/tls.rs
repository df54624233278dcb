//! TLS as a stranger sees it: record headers, the two hellos, and bytes that are no records.

const CHANGE_CIPHER_SPEC: u8 = 20;
const HANDSHAKE: u8 = 22;
const APPLICATION_DATA: u8 = 23;
const CLIENT_HELLO: u8 = 1;
const SERVER_HELLO: u8 = 2;
const SUPPORTED_VERSIONS: u16 = 43;
const TLS13: u16 = 0x0304;
/// RFC 8446, 5.2: 2^14 and 256 more.
const LONGEST_RECORD: u16 = 16_384 + 256;
/// As much of a hello as is looked at.
const HELLO: usize = 4096;

/// Follows one direction of a stream.
#[derive(Clone, Debug, Default)]
pub struct Scanner {
    pub client_hello: bool,
    pub chose_tls13: bool,
    /// The length of the first record of application data, which holds the rest of the handshake.
    pub first_encrypted: Option<u16>,
    /// Bytes that belong to no record: everything after the first thing that is not one.
    pub not_tls: u64,
    header: Vec<u8>,
    /// What is left of the record, and its type.
    left: usize,
    kind: u8,
    body: Vec<u8>,
    lost: bool,
}

impl Scanner {
    /// Takes the next bytes of the direction.
    pub fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            if self.lost {
                self.not_tls += bytes.len() as u64;
                return;
            }
            if self.left == 0 {
                let (head, rest) = bytes.split_at(bytes.len().min(5 - self.header.len()));
                self.header.extend(head);
                bytes = rest;
                // What cannot become a header is seen before the fifth byte: a single letter is not TLS.
                self.check_header();
                continue;
            }
            let (part, rest) = bytes.split_at(bytes.len().min(self.left));
            if self.kind == HANDSHAKE {
                self.body.extend(&part[..part.len().min(HELLO.saturating_sub(self.body.len()))]);
            }
            self.left -= part.len();
            bytes = rest;
            if self.left == 0 {
                self.end_record();
            }
        }
    }

    fn check_header(&mut self) {
        let plausible = match *self.header.as_slice() {
            [] => true,
            [kind] => (CHANGE_CIPHER_SPEC..=APPLICATION_DATA).contains(&kind),
            [_, major] => major == 3,
            [_, _, minor, ..] if !(1..=3).contains(&minor) => false,
            [kind, _, _, high, low] => {
                let length = u16::from_be_bytes([high, low]);
                if kind == APPLICATION_DATA && self.first_encrypted.is_none() {
                    self.first_encrypted = Some(length);
                }
                (self.kind, self.left) = (kind, length.into());
                (1..=LONGEST_RECORD).contains(&length)
            }
            _ => true,
        };
        if !plausible {
            self.lost = true;
            self.not_tls += self.header.len() as u64;
        } else if self.header.len() == 5 {
            self.header.clear();
        }
    }

    fn end_record(&mut self) {
        match self.body.first() {
            Some(&CLIENT_HELLO) => self.client_hello = true,
            Some(&SERVER_HELLO) => self.chose_tls13 |= chosen_version(&self.body) == Some(TLS13),
            _ => {}
        }
        self.body.clear();
    }
}

/// The version that a ServerHello chose in its extension.
fn chosen_version(hello: &[u8]) -> Option<u16> {
    // Type and length, the old version, the random, then the session's id.
    let session = 4 + 2 + 32;
    let after = session + 1 + usize::from(*hello.get(session)?);
    // The cipher and the compression, then the length of the extensions.
    let mut extensions = hello.get(after + 2 + 1 + 2..)?;
    loop {
        let (kind, length) = (half(extensions, 0)?, usize::from(half(extensions, 2)?));
        let value = extensions.get(4..4 + length)?;
        if kind == SUPPORTED_VERSIONS {
            return half(value, 0);
        }
        extensions = &extensions[4 + length..];
    }
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut record = vec![kind, 3, 3];
        record.extend(u16::try_from(body.len()).unwrap_or_default().to_be_bytes());
        record.extend(body);
        record
    }

    fn server_hello(extensions: &[u8]) -> Vec<u8> {
        let mut hello = vec![SERVER_HELLO, 0, 0, 0, 3, 3];
        hello.extend([7; 32]);
        hello.extend([2, 9, 9, 0x13, 0x01, 0]);
        hello.extend(u16::try_from(extensions.len()).unwrap_or_default().to_be_bytes());
        hello.extend(extensions);
        record(HANDSHAKE, &hello)
    }

    #[test]
    fn only_the_extension_makes_a_server_hello_tls13() {
        let mut scanner = Scanner::default();
        scanner.take(&server_hello(&[0, 51, 0, 1, 0, 0, 43, 0, 2, 3, 4]));
        assert!(scanner.chose_tls13);
        let mut older = Scanner::default();
        older.take(&server_hello(&[0, 51, 0, 1, 0]));
        assert!(!older.chose_tls13);
        assert_eq!(older.not_tls, 0);
    }

    #[test]
    fn records_are_followed_byte_by_byte() {
        let mut bytes = record(HANDSHAKE, &[CLIENT_HELLO, 0, 0, 0]);
        bytes.extend(record(CHANGE_CIPHER_SPEC, &[1]));
        bytes.extend(record(APPLICATION_DATA, &[0; 600]));
        bytes.extend(record(APPLICATION_DATA, &[0; 17]));
        let mut scanner = Scanner::default();
        bytes.chunks(1).for_each(|chunk| scanner.take(chunk));
        assert_eq!((scanner.client_hello, scanner.first_encrypted, scanner.not_tls), (true, Some(600), 0));
    }

    #[test]
    fn bytes_in_the_clear_are_counted_even_after_records_and_even_if_there_is_one() {
        let mut scanner = Scanner::default();
        scanner.take(b"G");
        assert_eq!(scanner.not_tls, 1);
        scanner.take(b"ET / HTTP/1.1");
        assert_eq!(scanner.not_tls, 14);
        let mut later = Scanner::default();
        later.take(&record(APPLICATION_DATA, &[0; 20]));
        later.take(b"SSH-2.0");
        assert_eq!(later.not_tls, 7);
    }
}
