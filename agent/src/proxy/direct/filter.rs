//! One filter's calls, answered on a thread of its own.
//!
//! The kernel takes a socket's lock for nearly all that is done with it, and the application may hold that lock for as long as it likes,
//! by sending from memory that does not come, say. Taking a descriptor, it may be kept from running. So whatever is done with an
//! application's own sockets is done here, where nobody's calls wait but its own.

use std::{
    collections::HashSet,
    io,
    os::fd::AsFd,
    path::Path,
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use tokio::{
    runtime::{Builder, Handle},
    sync::Notify,
};

use super::{Direct, RETRY, client, close, server, waiting, waiting::Waiting};
use crate::{
    keeper::{Held, Offer, Receiver},
    proxy::{Context, connections::lock},
    sys::{
        netns::{Netns, NetnsCookie},
        seccomp::{Answer, Call},
        vital::vital,
    },
    words::with_causes,
};

/// How often to see whether calls in hand have ended.
const LOOK: Duration = Duration::from_millis(50);
/// How long an agent that ends waits for them.
const PATIENCE: Duration = Duration::from_secs(2);

pub(in crate::proxy::direct) struct Filter {
    pub ctx: Arc<Context>,
    pub waiting: Waiting,
    /// The runtime of the filter's thread.
    pub home: Handle,
    seen: Mutex<Seen>,
    /// Told when there is a new keeper, which does not know of it.
    moved: Notify,
    /// Nothing is received any more, and nothing in hand.
    rests: AtomicBool,
}

/// Namespaces from which a filter's calls have come, or will. A container has one, as a rule, but what runs in it may make as many of its
/// own as it likes: of those only some are noted.
#[derive(Default)]
struct Seen(HashSet<NetnsCookie>);

impl Seen {
    const STRANGERS: usize = 64;

    /// True if it is new, and there is room for it. For pods there always is, of which there are not many.
    fn note(&mut self, netns: NetnsCookie, is_pod: impl FnOnce() -> bool) -> bool {
        !self.0.contains(&netns) && (self.0.len() < Self::STRANGERS || is_pod()) && self.0.insert(netns)
    }
}

impl Filter {
    fn new(ctx: Arc<Context>) -> io::Result<Self> {
        Ok(Self {
            ctx,
            waiting: Waiting::new()?,
            home: Handle::current(),
            seen: Mutex::default(),
            moved: Notify::new(),
            rests: AtomicBool::new(false),
        })
    }

    /// Under this filter there are sockets of that namespace.
    pub fn at(&self, netns: NetnsCookie) {
        let Some(direct) = &self.ctx.direct else { return };
        if lock(&self.seen).note(netns, || direct.pod(netns).is_some()) {
            *lock(&direct.filters).entry(netns).or_default() += 1;
        }
    }

    /// Whether there may be direct connections among its sockets; where nothing is known of them there may be.
    fn has_direct(&self) -> bool {
        let (Some(direct), seen) = (&self.ctx.direct, lock(&self.seen)) else { return true };
        // What a predecessor has left is not known at once.
        let may_have = |netns: &NetnsCookie| !direct.watch.adopted(*netns) || direct.watch.any(*netns);
        seen.0.is_empty() || seen.0.iter().any(may_have)
    }
}

impl Drop for Filter {
    fn drop(&mut self) {
        let Some(direct) = &self.ctx.direct else { return };
        for netns in lock(&self.seen).0.drain() {
            let mut filters = lock(&direct.filters);
            if let Some(count) = filters.get_mut(&netns) {
                *count -= 1;
                if *count == 0 {
                    filters.remove(&netns);
                }
            }
            drop(filters);
            direct.tidy(netns);
        }
    }
}

/// Answers the calls until the last task under the filter is gone.
pub(super) fn start(ctx: &Arc<Context>, held: Held) {
    let held = Arc::new(held);
    let calls = vital(serve(ctx.clone(), held.clone()));
    let started = Builder::new_current_thread().enable_all().build().and_then(|runtime| {
        let thread = thread::Builder::new().name("marline-filter".into());
        thread.spawn(move || runtime.block_on(calls))
    });
    if let Err(error) = started {
        // Nobody else would answer them.
        tracing::error!(%error, container = %held.container.id, "a filter has no thread of its own: its calls may make others wait");
        tokio::spawn(vital(serve(ctx.clone(), held)));
    }
}

async fn serve(ctx: Arc<Context>, held: Arc<Held>) {
    let Some(direct) = &ctx.direct else { return };
    let container = &held.container;
    let (filter, calls) = loop {
        match Filter::new(ctx.clone()).and_then(|filter| Ok((filter, held.receiver()?))) {
            Ok(ready) => break ready,
            Err(error) => tracing::error!(%error, container = %container.id, "calls of a filter cannot be received"),
        }
        tokio::time::sleep(RETRY).await;
    };
    // The first process may have ended, or not be known; then the first call tells.
    if container.pid != 0
        && let Ok(netns) = Netns::open(format!("/proc/{}/ns/net", container.pid))
    {
        filter.at(netns.cookie());
    }
    let filter = Arc::new(filter);
    {
        let mut served = lock(&direct.served);
        served.retain(|filter| filter.strong_count() > 0);
        served.push(Arc::downgrade(&filter));
    }
    tracing::info!(container = %container.id, pid = container.pid, "a filter's calls are served");
    let mut ending = direct.ending.subscribe();
    loop {
        tokio::select! {
            () = async { let _ = ending.wait_for(|ending| *ending).await; } => return rest(&filter, &held).await,
            () = receive(&filter, &calls, &container.id) => break,
            () = waiting::run(&filter) => break,
            () = filter.moved.notified() => {
                if give(&filter, &held, &direct.settings.keeper).await {
                    return;
                }
                // It may be busy, or its successor be on its way.
                let again = filter.clone();
                tokio::spawn(async move {
                    tokio::time::sleep(RETRY).await;
                    again.moved.notify_one();
                });
            }
        }
    }
    tracing::info!(container = %container.id, "the last task under a filter has ended");
}

/// Hands the filter to a new keeper, from which it comes back to be served anew. Calls in hand stand in the memory of a keeper that is
/// gone, so nobody would answer them if this agent died: what waits is given back to the kernel first, the rest is brought to its end.
async fn give(filter: &Filter, held: &Held, keeper: &Path) -> bool {
    filter.waiting.give_back();
    let given = Offer::connect(keeper).and_then(|offer| offer.hand_over(held.as_fd(), &held.container));
    if let Err(error) = given {
        tracing::error!(container = %held.container.id, "a new keeper has not got a filter: {}", with_causes(&error));
        return false;
    }
    answered(held).await;
    true
}

/// Receives nothing more: calls that come from now on wait in the kernel for the next agent. Those in hand are brought to their end while pods
/// are served still; what waits for a connection is given back.
async fn rest(filter: &Filter, held: &Held) {
    filter.waiting.give_back();
    answered(held).await;
    filter.rests.store(true, Ordering::Release);
}

async fn answered(held: &Held) {
    while held.in_hand() {
        tokio::time::sleep(LOOK).await;
    }
}

impl Direct {
    /// There is a new keeper: it is given the filters that its predecessor held.
    pub(super) fn moved(&self) {
        for filter in lock(&self.served).iter().filter_map(Weak::upgrade) {
            filter.moved.notify_one();
        }
    }

    /// Before pods are closed, or the calls in hand would be cut off, or let on to what is closed.
    pub(in crate::proxy) async fn rest(&self) {
        self.ending.send_replace(true);
        let all_rest = || {
            let served = lock(&self.served);
            served.iter().filter_map(Weak::upgrade).all(|filter| filter.rests.load(Ordering::Acquire))
        };
        let rested = async {
            while !all_rest() {
                tokio::time::sleep(LOOK).await;
            }
        };
        if tokio::time::timeout(PATIENCE, rested).await.is_err() {
            tracing::warn!("calls that last are left to the keeper: a connect among them is refused");
        }
    }
}

async fn receive(filter: &Arc<Filter>, calls: &Receiver, container: &str) {
    loop {
        let pending = match calls.recv().await {
            Ok(Some(pending)) => pending,
            Ok(None) => return,
            Err(error) => {
                tracing::error!(%error, container, "calls of a filter cannot be received");
                tokio::time::sleep(RETRY).await;
                continue;
            }
        };
        match pending.notification.call {
            Call::Connect { fd, address, length } => {
                let filter = filter.clone();
                tokio::spawn(async move { client::connect(&filter, pending, fd, address, length).await });
            }
            Call::Accept { fd, address, length, flags } => {
                server::accept(filter, pending, server::Wanted { fd, address, length, flags });
            }
            Call::Listen { fd } => server::listens(filter, pending, fd),
            Call::Shutdown { fd, how } if filter.has_direct() => {
                tokio::spawn(close::shutting(pending, fd, how));
            }
            ending @ (Call::Close { .. } | Call::CloseRange { .. }) if filter.has_direct() => {
                close::closing(pending, ending);
            }
            _ => {
                let _ = pending.answer(Answer::Continue);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_that_a_container_makes_for_itself_are_not_all_noted_and_pods_are() {
        let mut seen = Seen::default();
        assert!(seen.note(NetnsCookie(1), || false), "that of a container whose pod is not known yet");
        let noted = (2..10_000).filter(|cookie| seen.note(NetnsCookie(*cookie), || false)).count();
        assert_eq!(noted + 1, Seen::STRANGERS);
        assert!(!seen.note(NetnsCookie(1), || true), "counted once");
        assert!(seen.note(NetnsCookie(10_000), || true));
        assert_eq!(seen.0.len(), Seen::STRANGERS + 1);
    }
}
