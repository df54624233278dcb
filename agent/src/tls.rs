//! TLS: configurations, verification of peers, records in the kernel and in userspace.
pub mod config;
pub mod ktls;
pub mod records;
pub mod verifier;
