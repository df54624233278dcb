//! Socket and kernel calls, behind safe functions.
pub mod clock;
pub mod netns;
pub mod pass;
pub mod process;
pub mod seccomp;
pub mod slots;
pub mod socket;
pub mod splice;
