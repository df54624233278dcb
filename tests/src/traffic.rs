//! Real programs that know nothing of the mesh: each server runs in a pod until dropped, each client says what it saw.
//!
//! Every client compares what it received with what was sent, byte by byte or by checksum: `Seen::exact`.

pub mod banner;
pub mod envoy;
pub mod haproxy;
pub mod iperf;
pub mod nginx;
pub mod postgres;
pub mod redis;

use std::{fs::File, io::Write, net::IpAddr, path::Path};

use anyhow::{Context, Result};

/// What a client program saw of a flow.
#[derive(Clone, Debug)]
pub struct Seen {
    /// The port that was connected to.
    pub port: u16,
    /// Whether what came out is what went in.
    pub exact: bool,
    /// In the client's words, for people.
    pub note: String,
}

/// Writes a file of `size` bytes in which every 64 bytes hold the marker, and no two lines are alike.
pub fn write_marked(file: &Path, marker: &str, size: u64) -> Result<()> {
    let write = || -> std::io::Result<()> {
        let mut out = std::io::BufWriter::with_capacity(1 << 20, File::create(file)?);
        let (mut line, mut left) = (0_u64, size);
        while left > 0 {
            let text = format!("{marker} {line:016x} {:>width$}\n", "", width = 45_usize.saturating_sub(marker.len()));
            let part = text.as_bytes().split_at(text.len().min(usize::try_from(left).unwrap_or(usize::MAX))).0;
            out.write_all(part)?;
            left -= part.len() as u64;
            line += 1;
        }
        out.flush()
    };
    write().with_context(|| format!("writing {}", file.display()))
}

/// An address as it stands in a URL.
#[must_use]
pub fn in_url(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    }
}
