//! Reading and writing the kernel's context structures, one field at a time.
//!
//! The verifier allows each field in its own width only, so the compiler must not join two accesses: they are volatile.

/// Reads a field of a context structure that the kernel gave the program.
macro_rules! read {
    ($pointer:expr, $($field:tt)+) => {
        // SAFETY: the kernel passes a valid context, and the verifier rejects any access outside of it.
        unsafe { core::ptr::read_volatile(core::ptr::addr_of!((*$pointer).$($field)+)) }
    };
}

/// Writes a field of a context structure that the kernel gave the program.
macro_rules! write {
    ($pointer:expr, $($field:ident).+ $([$index:literal])?, $value:expr) => {
        // SAFETY: as for `read!`; fields that must not be written are rejected by the verifier.
        unsafe { core::ptr::write_volatile(core::ptr::addr_of_mut!((*$pointer).$($field).+ $([$index])?), $value) }
    };
}

/// Reads an IPv6 address out of a context structure.
macro_rules! read_address6 {
    ($pointer:expr, $field:ident) => {
        marline_common::Address {
            words: [
                crate::context::read!($pointer, $field[0]),
                crate::context::read!($pointer, $field[1]),
                crate::context::read!($pointer, $field[2]),
                crate::context::read!($pointer, $field[3]),
            ],
        }
    };
}

pub(crate) use {read, read_address6, write};

pub(crate) const AF_INET: u32 = 2;
pub(crate) const SOCK_STREAM: u32 = 1;
pub(crate) const IPPROTO_TCP: u32 = 6;
pub(crate) const IPPROTO_UDP: u32 = 17;
pub(crate) const IPPROTO_MPTCP: u32 = 262;
/// The loopback device has this index in every network namespace.
pub(crate) const LOOPBACK_IFINDEX: u32 = 1;

pub(crate) const ECONNREFUSED: i32 = 111;
pub(crate) const EPROTONOSUPPORT: i32 = 93;
