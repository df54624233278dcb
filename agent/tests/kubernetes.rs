//! The API server as the source of resources, with what a real one has answered (`kubernetes/recorded`), over HTTPS: what the agent
//! believes afterwards is what is true.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "kubernetes/bed.rs"]
mod bed;
#[path = "kubernetes/faults.rs"]
mod faults;
#[path = "kubernetes/lists.rs"]
mod lists;
#[path = "support/rights.rs"]
mod rights;
#[path = "kubernetes/rights.rs"]
mod rights_of_the_agent;
#[path = "kubernetes/watches.rs"]
mod watches;
