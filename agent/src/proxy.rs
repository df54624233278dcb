//! A connection's way through the agent, one file per stage: capture, identify, authorize, handshake, offload, pump, account.
pub mod account;
pub mod authorize;
pub mod connections;
pub mod handshake;
pub mod identify;
pub mod offload;
pub mod probe;
pub mod pump;
