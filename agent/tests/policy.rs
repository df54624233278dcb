//! What Istio's policies decide, from their YAML to the verdict: tables of decisions taken from Istio's documentation and
//! from its own tests, each block with a pointer to its source, and properties that hold for all policies.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "policy/bed.rs"]
mod bed;
#[path = "policy/commands.rs"]
mod commands;
#[path = "policy/modes.rs"]
mod modes;
#[path = "policy/nine_pairs.rs"]
mod nine_pairs;
#[path = "policy/properties.rs"]
mod properties;
#[path = "policy/reading.rs"]
mod reading;
#[path = "policy/rules.rs"]
mod rules;
