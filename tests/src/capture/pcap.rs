//! The pcap file format, read as a stream: what tcpdump writes on this machine (its own byte order, Ethernet).

use std::io::{self, Read};

use anyhow::{Context, Result, bail, ensure};

const MICROSECONDS: u32 = 0xa1b2_c3d4;
const NANOSECONDS: u32 = 0xa1b2_3c4d;
const ETHERNET: u32 = 1;
/// No frame of a veth is longer than this.
const LONGEST: u32 = 1 << 20;

pub struct Reader<R> {
    source: R,
    frame: Vec<u8>,
}

impl<R: Read> Reader<R> {
    /// Reads the file's header.
    pub fn open(mut source: R) -> Result<Self> {
        let mut header = [0; 24];
        source.read_exact(&mut header).context("no pcap header")?;
        let magic = word(&header, 0);
        ensure!(magic == MICROSECONDS || magic == NANOSECONDS, "not a pcap file of this machine: magic {magic:#x}");
        let link = word(&header, 20) & 0xffff;
        ensure!(link == ETHERNET, "link type {link} is not Ethernet");
        Ok(Self { source, frame: Vec::new() })
    }

    /// The next frame, whole; nothing at the end of the file.
    pub fn next_frame(&mut self) -> Result<Option<&[u8]>> {
        let mut header = [0; 16];
        match self.source.read_exact(&mut header) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error).context("reading a frame's header"),
        }
        let (captured, original) = (word(&header, 8), word(&header, 12));
        if captured > LONGEST || captured != original {
            bail!("a frame of {original} bytes of which {captured} were captured");
        }
        self.frame.resize(usize::try_from(captured)?, 0);
        self.source.read_exact(&mut self.frame).context("a frame that ends early")?;
        Ok(Some(&self.frame))
    }
}

fn word<const N: usize>(bytes: &[u8; N], at: usize) -> u32 {
    let mut word = [0; 4];
    word.copy_from_slice(&bytes[at..at + 4]);
    u32::from_ne_bytes(word)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(frames: &[&[u8]]) -> Vec<u8> {
        let mut file = Vec::new();
        for value in [MICROSECONDS, 0x0004_0002, 0, 0, 262_144, ETHERNET] {
            file.extend(value.to_ne_bytes());
        }
        for frame in frames {
            let length = u32::try_from(frame.len()).unwrap_or_default();
            for value in [0, 0, length, length] {
                file.extend(value.to_ne_bytes());
            }
            file.extend(*frame);
        }
        file
    }

    #[test]
    fn frames_are_read_one_by_one_until_the_end() -> Result<()> {
        let file = file(&[b"first", b"", b"third"]);
        let mut reader = Reader::open(&file[..])?;
        assert_eq!(reader.next_frame()?, Some(&b"first"[..]));
        assert_eq!(reader.next_frame()?, Some(&b""[..]));
        assert_eq!(reader.next_frame()?, Some(&b"third"[..]));
        assert_eq!(reader.next_frame()?, None);
        Ok(())
    }

    #[test]
    fn a_frame_that_was_cut_is_an_error() -> Result<()> {
        let mut file = file(&[b"frame"]);
        file[24 + 12] = 9;
        assert!(Reader::open(&file[..])?.next_frame().is_err());
        Ok(())
    }
}
