//! The harness: two nodes made of network namespaces, real programs in their pods, real agents, and an eye on the link between.
//!
//! Scenarios in `tests/` and the `demo`, `up`, `exec` and `down` commands of xtask are built on it. It starts the agent as
//! a program and never links it: what is tested is what ships. The transfer matrix and the kernel tests of single rooms
//! (`tests/transfer_*.rs`, `tests/capture_kernel.rs`) use the agent's library instead.

pub mod access_log;
pub mod agent;
pub mod amount;
pub mod authority;
pub mod bench;
pub mod capture;
pub mod certificates;
pub mod cgroup;
pub mod chart;
pub mod cluster;
pub mod config;
pub mod container;
pub mod direct;
pub mod external;
pub mod flow;
pub mod http;
pub mod keeper;
pub mod metrics;
pub mod netns;
pub mod process;
pub mod rotation;
pub mod scenario;
pub mod sidecar;
pub mod traffic;
pub mod wait;
