//! Marline's agent as a library: the rooms of ARCHITECTURE.md. The binary is `main.rs`; tests use the rooms one by one.
pub mod access_log;
pub mod admin;
pub mod app;
pub mod bpf;
pub mod cli;
pub mod config;
pub mod control;
pub mod identity;
pub mod keeper;
pub mod logging;
pub mod metrics;
pub mod policy;
pub mod proxy;
pub mod state;
pub mod sys;
pub mod tls;
pub mod words;
