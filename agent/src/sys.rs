//! Socket and kernel calls, behind safe functions.
pub mod netns;
pub mod socket;
pub mod splice;
