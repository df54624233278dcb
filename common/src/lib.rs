//! What the kernel program and the agent share, defined once: map keys and values, counters, limits.
#![no_std]
