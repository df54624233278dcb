//! Buffers that are borrowed from a per-thread store while bytes are in flight: an idle connection holds none.

use std::{
    cell::RefCell,
    ops::{Deref, DerefMut},
};

use crate::tls::records::{MAX_PLAINTEXT, MAX_RECORD};

/// Records that one buffer holds.
pub(super) const RECORDS: usize = 4;
/// The plaintext that is read at once, so that it fills whole records.
pub(super) const PLAINTEXT: usize = RECORDS * MAX_PLAINTEXT;
const SIZE: usize = RECORDS * MAX_RECORD;
const KEPT: usize = 16;

thread_local! {
    static STORE: RefCell<Vec<Box<[u8]>>> = const { RefCell::new(Vec::new()) };
}

pub(super) struct Buffer(Box<[u8]>);

impl Buffer {
    pub(super) fn take() -> Self {
        Self(STORE.with_borrow_mut(Vec::pop).unwrap_or_else(|| vec![0; SIZE].into_boxed_slice()))
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.0
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let bytes = std::mem::take(&mut self.0);
        // Fails only while the thread is ending.
        let _ = STORE.try_with(|store| {
            let mut store = store.borrow_mut();
            if store.len() < KEPT {
                store.push(bytes);
            }
        });
    }
}
