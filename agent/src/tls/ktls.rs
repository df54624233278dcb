//! Kernel TLS: attaching it to a connected socket and giving it keys (Documentation/networking/tls.rst). What the kernel can do
//! is found by trying, in `proxy::probe`; records that userspace seals are `records`'s.
#![allow(unsafe_code)]

use std::{
    io,
    os::fd::{AsFd, AsRawFd},
};

use ktls::CryptoInfo;
use rustls::{ConnectionTrafficSecrets, SupportedCipherSuite};

use crate::sys::options;

const SOL_TLS: libc::c_int = 282;
const TLS_RX_EXPECT_NO_PAD: libc::c_int = 4;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Transmit = 1,
    Receive = 2,
}

#[derive(Debug, thiserror::Error)]
pub enum KtlsError {
    #[error("the kernel has no TLS (CONFIG_TLS, module tls)")]
    NotThere(#[source] io::Error),
    #[error("kernel TLS does not know the cipher suite {0:?}")]
    Suite(rustls::CipherSuite),
    #[error("the kernel refused the keys for {direction:?}")]
    Keys { direction: Direction, source: io::Error },
}

/// Attaches the `tls` upper-layer protocol. Until keys are set the socket goes on as plain TCP; it must not have been closed by the
/// peer yet. One that has it keeps it.
pub fn attach(socket: impl AsFd) -> Result<(), KtlsError> {
    match set(socket, libc::SOL_TCP, libc::TCP_ULP, b"tls") {
        Err(error) if error.raw_os_error() != Some(libc::EEXIST) => Err(KtlsError::NotThere(error)),
        _ => Ok(()),
    }
}

/// Gives the kernel the keys of one direction; from the next byte on it seals or opens records with them.
pub fn install(
    socket: impl AsFd,
    direction: Direction,
    suite: SupportedCipherSuite,
    secrets: (u64, ConnectionTrafficSecrets),
) -> Result<(), KtlsError> {
    let info = CryptoInfo::from_rustls(suite, secrets).map_err(|_| KtlsError::Suite(suite.suite()))?;
    // SAFETY: `info` is the kernel's own structure for its cipher and `size` its length.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            SOL_TLS,
            direction as libc::c_int,
            info.as_ptr(),
            libc::socklen_t::try_from(info.size()).unwrap_or(0),
        )
    };
    if result < 0 {
        return Err(KtlsError::Keys { direction, source: io::Error::last_os_error() });
    }
    if direction == Direction::Receive {
        // Lets the kernel open records straight into the reader's buffer (since 6.0); a peer that pads costs a retry only.
        let _ = set(socket, SOL_TLS, TLS_RX_EXPECT_NO_PAD, &1u32.to_ne_bytes());
    }
    Ok(())
}

/// How many records the kernel has sealed with the present key, if the key's own count began with 0.
pub fn records_sealed(socket: impl AsFd, suite: SupportedCipherSuite) -> io::Result<u64> {
    // The kernel wants the length of the cipher's own structure (include/uapi/linux/tls.h); the sequence number is its last field.
    let length = match suite.suite() {
        rustls::CipherSuite::TLS13_AES_128_GCM_SHA256 => 40,
        rustls::CipherSuite::TLS13_AES_256_GCM_SHA384 | rustls::CipherSuite::TLS13_CHACHA20_POLY1305_SHA256 => 56,
        _ => return Err(io::ErrorKind::Unsupported.into()),
    };
    // It holds the key.
    let mut info = zeroize::Zeroizing::new([0; 56]);
    let mut told = length as libc::socklen_t;
    // SAFETY: the kernel writes at most `told` bytes, which `info` has room for.
    let result = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            SOL_TLS,
            Direction::Transmit as libc::c_int,
            info.as_mut_ptr().cast(),
            &raw mut told,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    info[..length].last_chunk().map(|sequence| u64::from_be_bytes(*sequence)).ok_or(io::ErrorKind::Unsupported.into())
}

/// Whether an attached socket stays the connection that it is, as kernels have it that refuse to disconnect it (6.15; 6.12.24 and
/// 6.1.135 of the stable ones). Ends the connection where they do not. A socket that the agent's listener has accepted is of
/// the agent's cgroup and not under the hooks: given to a pod, it must not become another connection.
pub fn stays_connected(attached: impl AsFd) -> io::Result<bool> {
    match options::disconnect(attached) {
        Ok(()) => Ok(false),
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(true),
        Err(error) => Err(error),
    }
}

fn set(socket: impl AsFd, level: libc::c_int, name: libc::c_int, value: &[u8]) -> io::Result<()> {
    // SAFETY: pointer and length are those of `value`.
    let result = unsafe {
        libc::setsockopt(
            socket.as_fd().as_raw_fd(),
            level,
            name,
            value.as_ptr().cast(),
            libc::socklen_t::try_from(value.len()).unwrap_or(0),
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
