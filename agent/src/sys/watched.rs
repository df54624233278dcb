//! Descriptors that the asynchronous runtime watches.
#![allow(unsafe_code)]

use std::{io, os::fd::OwnedFd};

use tokio::io::{Interest, unix::AsyncFd};

/// Watches a descriptor until the result is dropped, which takes it off the runtime's list before it is closed: the file may live
/// on in another process.
pub fn watched(descriptor: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd gives one descriptor, its own, for all of its life.
    Ok(unsafe { AsyncFd::register_with_interest(descriptor, interest)? })
}
