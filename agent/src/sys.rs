//! Socket and kernel calls, behind safe functions.
pub mod clock;
pub mod netns;
pub mod socket;
pub mod splice;
