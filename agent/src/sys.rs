//! Socket and kernel calls, behind safe functions.
pub mod clock;
pub mod diag;
pub mod netns;
pub mod options;
pub mod socket;
pub mod splice;
pub mod tcp_info;
