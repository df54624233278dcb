//! What an agent has received and not answered, in memory that it shares with the keeper: when the agent dies in the middle,
//! the keeper answers for it.
//!
//! The kernel itself writes notifications there ([`crate::sys::slots`]), so nothing falls between receiving and noting.

use std::{
    collections::BTreeMap,
    io,
    os::fd::{AsFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use crate::sys::{
    seccomp::{Answer, Call, Listener, Notification},
    slots::{self, Slot, Slots},
};

/// Calls that an agent can have in its hands. What comes beyond goes the proxied way.
const CALLS: usize = 1 << 16;

/// The agent's side. A clone is another handle on the same memory.
#[derive(Debug, Clone)]
pub struct Ledger {
    slots: Arc<Slots>,
    free: Arc<Mutex<Free>>,
}

/// Slots that were given back, and the first that was never used: little of the memory is touched.
#[derive(Debug, Default)]
struct Free {
    back: Vec<u32>,
    fresh: u32,
}

impl Ledger {
    pub(super) fn of(memory: OwnedFd) -> io::Result<Self> {
        Ok(Self { slots: Slots::map(memory)?, free: Arc::default() })
    }

    /// A place for one call of a listener; none if all are taken.
    pub(super) fn entry(&self, listener: u64) -> Option<Entry> {
        let mut free = self.free();
        let number = free.back.pop().unwrap_or(free.fresh);
        let slot = Slot::take(&self.slots, number, listener)?;
        free.fresh = free.fresh.max(number + 1);
        Some(Entry { slot: Some(slot), ledger: self.clone() })
    }

    fn free(&self) -> MutexGuard<'_, Free> {
        self.free.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A place for a call, given back when dropped.
#[derive(Debug)]
pub(super) struct Entry {
    /// Gone only while this is being dropped: the slot must be empty before another can take it.
    slot: Option<Slot>,
    ledger: Ledger,
}

impl Entry {
    pub(super) fn receive(&self, listener: &Listener) -> io::Result<Option<Notification>> {
        self.slot.as_ref().map_or(Ok(None), |slot| listener.recv_into(slot))
    }

    pub(super) fn begin(&self) {
        if let Some(slot) = &self.slot {
            slot.begin();
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        if let Some(slot) = self.slot.take() {
            let number = slot.number();
            drop(slot);
            self.ledger.free().back.push(number);
        }
    }
}

/// What is answered for whoever cannot answer any more: the kernel carries the call out, unless work on the socket has
/// begun, which then may be half way to a server and is of no use. An accept has nothing that could be half done.
pub fn last_word(call: Call, begun: bool) -> Answer {
    match call {
        Call::Connect { .. } if begun => Answer::Errno(libc::ECONNREFUSED),
        _ => Answer::Continue,
    }
}

/// The keeper's side: makes the memory.
pub(super) fn create() -> io::Result<OwnedFd> {
    slots::create(CALLS)
}

/// Answers all that a dead agent has left in its ledger, and says how many callers were waiting still.
pub(super) fn settle(memory: impl AsFd, listeners: &BTreeMap<u64, &Listener>) -> io::Result<usize> {
    let mut waiting = 0;
    for written in slots::written(memory)? {
        let Some(listener) = listeners.get(&written.listener) else { continue };
        let Notification { id, call, .. } = written.notification;
        match listener.answer(id, last_word(call, written.begun)) {
            Ok(waited) => waiting += usize::from(waited),
            Err(error) => tracing::error!(%error, listener = written.listener, "a call of a dead agent has no answer"),
        }
    }
    Ok(waiting)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(calls: usize) -> Ledger {
        Ledger::of(slots::create(calls).unwrap()).unwrap()
    }

    #[test]
    fn a_place_is_used_again_only_after_it_was_given_back() {
        let ledger = ledger(2);
        let number = |entry: &Entry| entry.slot.as_ref().unwrap().number();
        let (first, second) = (ledger.entry(1).unwrap(), ledger.entry(1).unwrap());
        assert_ne!(number(&first), number(&second));
        assert!(ledger.entry(1).is_none(), "both are taken");
        let freed = number(&first);
        drop(first);
        assert_eq!(number(&ledger.entry(2).unwrap()), freed);
        assert_eq!(number(&second), 1 - freed);
    }

    #[test]
    fn an_entry_without_a_notification_is_nobodys() {
        let memory = slots::create(4).unwrap();
        let ledger = Ledger::of(memory.try_clone().unwrap()).unwrap();
        let _entry = ledger.entry(7).unwrap();
        assert_eq!(slots::written(&memory).unwrap(), []);
    }

    #[test]
    fn memory_that_could_shrink_is_not_mapped() {
        use nix::sys::memfd::{MFdFlags, memfd_create};
        let memory = memfd_create("any", MFdFlags::MFD_CLOEXEC).unwrap();
        nix::unistd::ftruncate(&memory, 1 << 16).unwrap();
        assert!(Ledger::of(memory).is_err());
    }

    #[test]
    fn only_a_connect_that_was_begun_is_refused() {
        let connect = Call::Connect { fd: 3, address: 0, length: 16 };
        let accept = Call::Accept { fd: 3, address: 0, length: 0, flags: 0 };
        assert_eq!(last_word(connect, true), Answer::Errno(libc::ECONNREFUSED));
        for (call, begun) in [(connect, false), (accept, true), (accept, false), (Call::Other, true)] {
            assert_eq!(last_word(call, begun), Answer::Continue, "{call:?}");
        }
    }
}
