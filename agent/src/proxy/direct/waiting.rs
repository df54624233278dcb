//! Calls of accept() on listeners that block, while there is nobody to be accepted. The listener is waited for without being held,
//! so that its port is free when its last process ends; and whoever is waited for is looked at now and then: a held call does
//! not hear of signals, so one that has a signal coming is given back to the kernel, which interrupts it.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    io,
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{
    filter::Filter,
    server::{self, Wanted},
};
use crate::{
    keeper::Pending,
    proxy::connections::lock,
    sys::{options, process::Caller, seccomp::Answer, wakeup::Wakeups},
};

/// A held accept().
pub(super) struct Waiter {
    pub call: Pending,
    pub caller: Caller,
    pub wanted: Wanted,
    /// SO_RCVTIMEO bounds accept().
    pub deadline: Option<std::time::Instant>,
}

pub(super) struct Waiting {
    wakeups: Wakeups,
    queues: Mutex<Queues>,
    /// Counts what `wakeups` has told: who has just found nothing looks again if it has changed.
    told: AtomicU64,
}

#[derive(Default)]
struct Queues {
    /// By the listener's cookie; first come, first served.
    waiters: HashMap<u64, VecDeque<Box<Waiter>>>,
    added: HashSet<u64>,
}

/// How soon a signal is noticed where few wait, and how many waiters are looked at in a second at most.
const LOOK: Duration = Duration::from_millis(50);
const LOOKS_PER_SECOND: u32 = 400;
const REMEMBERED: usize = 1 << 16;

impl Waiting {
    pub fn new() -> io::Result<Self> {
        Ok(Self { wakeups: Wakeups::new()?, queues: Mutex::default(), told: AtomicU64::new(0) })
    }

    /// Waits for a connection in the caller's place.
    pub fn enter(&self, filter: &Arc<Filter>, waiter: Box<Waiter>, listener: &OwnedFd) {
        let Ok(cookie) = options::cookie(listener) else {
            let _ = waiter.call.answer(Answer::Continue);
            return;
        };
        let mut queues = lock(&self.queues);
        if queues.added.len() >= REMEMBERED {
            queues.added.clear();
        }
        if queues.added.insert(cookie)
            && let Err(error) = self.wakeups.add(listener, cookie)
        {
            tracing::warn!(%error, "a listener cannot be waited for");
            queues.added.remove(&cookie);
            drop(queues);
            let _ = waiter.call.answer(Answer::Continue);
            return;
        }
        queues.waiters.entry(cookie).or_default().push_back(waiter);
        drop(queues);
        // Somebody may have been there before.
        self.serve(filter, cookie);
    }

    /// Serves those who wait for this listener, as far as there are connections.
    fn serve(&self, filter: &Arc<Filter>, cookie: u64) {
        loop {
            let told = self.told.load(Ordering::SeqCst);
            let Some(waiter) = self.first(cookie) else { return };
            let Some((_, listener)) = server::listener(&waiter.call, waiter.wanted) else { continue };
            // The descriptor may be another listener's by now.
            if options::cookie(&listener).ok() != Some(cookie) {
                let _ = waiter.call.answer(Answer::Continue);
                continue;
            }
            if let Err(waiter) = server::take(filter, waiter, &listener) {
                lock(&self.queues).waiters.entry(cookie).or_default().push_front(waiter);
                if self.told.load(Ordering::SeqCst) == told {
                    return;
                }
            }
        }
    }

    fn first(&self, cookie: u64) -> Option<Box<Waiter>> {
        let mut queues = lock(&self.queues);
        let waiting = queues.waiters.get_mut(&cookie)?;
        let first = waiting.pop_front();
        if waiting.is_empty() {
            queues.waiters.remove(&cookie);
        }
        first
    }

    /// Gives all back to the kernel.
    pub fn give_back(&self) {
        for waiter in lock(&self.queues).waiters.drain().flat_map(|(_, waiting)| waiting) {
            let _ = waiter.call.answer(Answer::Continue);
        }
    }

    /// Gives back whoever has a signal coming or is gone. Returns how many wait.
    fn look(&self) -> usize {
        let mut over = Vec::new();
        let mut queues = lock(&self.queues);
        for waiting in queues.waiters.values_mut() {
            let mut staying = VecDeque::with_capacity(waiting.len());
            for waiter in waiting.drain(..) {
                let late = waiter.deadline.is_some_and(|deadline| deadline <= std::time::Instant::now());
                let stays = waiter.call.valid() && !waiter.caller.interrupted().unwrap_or(true);
                match (late, stays) {
                    (true, _) => over.push((waiter, Answer::Errno(libc::EAGAIN))),
                    (false, true) => staying.push_back(waiter),
                    (false, false) => over.push((waiter, Answer::Continue)),
                }
            }
            *waiting = staying;
        }
        queues.waiters.retain(|_, waiting| !waiting.is_empty());
        let left = queues.waiters.values().map(VecDeque::len).sum();
        drop(queues);
        for (waiter, answer) in over {
            let _ = waiter.call.answer(answer);
        }
        left
    }
}

/// Runs as long as the filter is served.
pub(super) async fn run(filter: &Arc<Filter>) {
    let waiting = &filter.waiting;
    let mut next = Instant::now() + LOOK;
    loop {
        tokio::select! {
            ready = waiting.wakeups.next() => match ready {
                Ok(ready) => {
                    waiting.told.fetch_add(1, Ordering::SeqCst);
                    ready.into_iter().for_each(|cookie| waiting.serve(filter, cookie));
                }
                Err(error) => {
                    tracing::error!(%error, "listeners cannot be waited for");
                    tokio::time::sleep(LOOK).await;
                }
            },
            () = tokio::time::sleep_until(next) => {
                let waiters = u32::try_from(waiting.look()).unwrap_or(u32::MAX);
                next = Instant::now() + LOOK.max(Duration::from_secs(1) * waiters / LOOKS_PER_SECOND);
            }
        }
    }
}
