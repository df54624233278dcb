//! Where knowledge of the mesh comes from. Today that is a directory of files; each source ends in `state::State` and
//! knows nothing of sockets or kernels.

pub mod files;
