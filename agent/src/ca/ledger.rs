//! The ledger: one JSON line for each certificate and each refusal. The line of a certificate is on the disk before the certificate is
//! handed out, because what was issued to a node must be known when the node is shut out; where it cannot be written, there is no
//! certificate. Lines are written by a thread of their own, many with one flush. Whether a node is shut out is looked up under the same
//! lock, so that no certificate falls between the list of its certificates and its being shut out (`revoke`).

pub mod entry;
pub mod file;

use std::{
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Instant,
};

use tokio::sync::{mpsc, oneshot};

use super::{CaError, limits::Limiter, shut_out};
use crate::words::with_causes;
use entry::Entry;
use file::LedgerFile;

/// Lines that wait. With more the disk is the bottleneck, and callers are told to come back.
const WAITING: usize = 1024;
/// Lines that are flushed together.
const TOGETHER: usize = 64;
/// Refusals that are noted: whoever is refused as often as it likes shall not fill the disk. The rest is counted.
pub(super) const REFUSALS_PER_MINUTE: u32 = 600;
pub(super) const REFUSALS_AT_ONCE: u32 = 1000;
/// Places that refusals leave to certificates.
const KEPT: usize = WAITING / 2;

/// A handle on the thread that writes; it ends with the last one.
#[derive(Clone)]
pub struct Ledger {
    orders: mpsc::Sender<Order>,
    writable: Arc<AtomicBool>,
    refusals: Arc<Mutex<Refusals>>,
}

/// Why a certificate may not be handed out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotNoted {
    /// Its node is shut out, since when.
    ShutOut(String),
    /// It could not be written.
    Failed,
    /// The node, or the identity there, has as many as can be kept in mind.
    TooMany,
}

struct Order {
    /// Without one it is to be tried whether there is room.
    entry: Option<Entry>,
    done: oneshot::Sender<Result<(), NotNoted>>,
}

impl Ledger {
    /// Opens the ledger in `dir` and starts its thread.
    pub fn open(dir: &Path) -> Result<Self, CaError> {
        let file = LedgerFile::open(dir)?;
        // A list that cannot be read shuts out everybody: better now than at the first request.
        shut_out::read(dir)?;
        let (orders, receiver) = mpsc::channel(WAITING);
        let writable = Arc::new(AtomicBool::new(true));
        let writer = Writer { file, writable: Arc::clone(&writable), failure: None };
        thread::Builder::new()
            .name("ca-ledger".to_owned())
            .spawn(move || writer.run(receiver))
            .map_err(|source| CaError::Io { action: "start the thread for", path: dir.to_owned(), source })?;
        let limiter = Limiter::new(REFUSALS_PER_MINUTE, REFUSALS_AT_ONCE);
        Ok(Self { orders, writable, refusals: Arc::new(Mutex::new(Refusals { limiter, unrecorded: 0 })) })
    }

    /// Notes a certificate that is about to be handed out, or a refusal.
    pub async fn note(&self, mut entry: Entry) -> Result<(), NotNoted> {
        // Before it waits with the certificates: whoever is refused over and over shall not take their places.
        if !entry.issued() {
            let room = self.orders.capacity() > KEPT;
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            if !refusals.note(&mut entry, room) {
                return Ok(());
            }
        }
        self.order(Some(entry)).await
    }

    /// Whether certificates can be noted. After a failure this is tried: nobody may ask for any until it is known.
    pub async fn is_writable(&self) -> bool {
        !self.orders.is_closed() && (self.writable.load(Ordering::Relaxed) || self.order(None).await.is_ok())
    }

    async fn order(&self, entry: Option<Entry>) -> Result<(), NotNoted> {
        let (done, result) = oneshot::channel();
        self.orders.try_send(Order { entry, done }).map_err(|_| NotNoted::Failed)?;
        result.await.unwrap_or(Err(NotNoted::Failed))
    }
}

struct Writer {
    file: LedgerFile,
    writable: Arc<AtomicBool>,
    /// Why the last lines could not be written.
    failure: Option<String>,
}

/// Bounds the lines of refusals.
struct Refusals {
    limiter: Limiter,
    /// Those without a line since the last one with one.
    unrecorded: u64,
}

impl Writer {
    fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        let mut batch = Vec::with_capacity(TOGETHER);
        while orders.blocking_recv_many(&mut batch, TOGETHER) > 0 {
            self.write(&mut batch);
        }
    }

    fn write(&mut self, batch: &mut Vec<Order>) {
        let certificate = |order: &Order| order.entry.as_ref().is_some_and(Entry::issued);
        let (certificates, probe) = (batch.iter().any(certificate), batch.iter().any(|order| order.entry.is_none()));
        let written = self.file.locked(|file, dir| {
            let shut_out = shut_out::read(dir)?;
            let mut lines = Vec::new();
            let mut results = Vec::with_capacity(batch.len());
            for entry in batch.iter().map(|order| &order.entry) {
                let node = entry.as_ref().and_then(Entry::certificate_for);
                let since = node.and_then(|node| shut_out.get(node));
                results.push(since.map_or(Ok(()), |since| Err(NotNoted::ShutOut(since.clone()))));
                if let Some(entry) = entry.as_ref().filter(|_| since.is_none()) {
                    entry.append_to(&mut lines);
                }
            }
            file.append(&lines, certificates)?;
            if probe {
                file.probe()?;
            }
            Ok(results)
        });
        let failure = match written {
            Ok(results) => {
                for (order, result) in batch.drain(..).zip(results) {
                    let _ = order.done.send(result);
                }
                None
            }
            Err(error) => {
                for order in batch.drain(..) {
                    let _ = order.done.send(Err(NotNoted::Failed));
                }
                Some(with_causes(&error))
            }
        };
        // There may be room for the short line of a refusal and for no certificate's.
        if failure.is_none() && !certificates && !probe {
            return;
        }
        self.writable.store(failure.is_none(), Ordering::Relaxed);
        // Said once, however often it is tried.
        match &failure {
            Some(why) if self.failure != failure => {
                tracing::error!("the ledger cannot be written, so no certificate is handed out: {why}");
            }
            None if self.failure.is_some() => tracing::info!("the ledger can be written again"),
            _ => {}
        }
        self.failure = failure;
    }
}

impl Refusals {
    /// Whether it gets a line, for which there must be room.
    fn note(&mut self, entry: &mut Entry, room: bool) -> bool {
        if !room || self.limiter.take("", Instant::now()).is_err() {
            self.unrecorded += 1;
            return false;
        }
        entry.unrecorded = Some(std::mem::take(&mut self.unrecorded)).filter(|count| *count > 0);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn without_the_thread_that_writes_nothing_can_be_noted() {
        let dir = tempfile::tempdir().unwrap();
        let mut ledger = Ledger::open(dir.path()).unwrap();
        assert!(ledger.is_writable().await);
        // As if the thread had ended.
        ledger.orders = mpsc::channel(1).0;
        assert!(!ledger.is_writable().await);
    }

    #[tokio::test]
    async fn refusals_leave_places_for_certificates() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::open(dir.path()).unwrap();
        let lock = file::lock(dir.path()).unwrap();
        let mut refused = Vec::new();
        for _ in 0..2 * WAITING {
            let mut entry = Entry::default();
            entry.refuse("unauthenticated", "no");
            let ledger = ledger.clone();
            refused.push(tokio::spawn(async move { ledger.note(entry).await }));
        }
        tokio::task::yield_now().await;
        assert!(ledger.orders.capacity() >= KEPT, "{}", ledger.orders.capacity());
        let issued = Entry { outcome: "issued".into(), node: Some("a".into()), ..Entry::default() };
        let there = ledger.clone();
        let noted = tokio::spawn(async move { there.note(issued).await });
        tokio::task::yield_now().await;
        drop(lock);
        assert_eq!(noted.await.unwrap(), Ok(()));
        for task in refused {
            assert_eq!(task.await.unwrap(), Ok(()));
        }
    }
}
