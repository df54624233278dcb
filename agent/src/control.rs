//! Where knowledge of the mesh comes from. Today that is a directory of files; each source ends in `state::State`, or
//! for what is trusted in `identity`, and knows nothing of sockets or kernels.

pub mod files;
pub mod follow;
pub mod trust;
mod watched;
