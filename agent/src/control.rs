//! Where knowledge of the mesh comes from: a directory of files, or the API server of a cluster. Each source ends in `state::State`, or
//! for what is trusted in `identity`, and knows nothing of sockets or kernels.

pub mod files;
pub mod follow;
pub mod kubernetes;
pub mod trust;
mod watched;
