//! ktls
