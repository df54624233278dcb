//! Socket and kernel calls, behind safe functions.
pub mod bpf_link;
pub mod clock;
pub mod diag;
pub mod memory;
pub mod netns;
pub mod options;
pub mod pass;
pub mod process;
pub mod seccomp;
pub mod slots;
pub mod socket;
pub mod splice;
pub mod tcp_info;
pub mod unsent;
pub mod vital;
pub mod wakeup;
pub mod watched;
