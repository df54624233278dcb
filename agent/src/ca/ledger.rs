//! The ledger: one JSON line for each certificate and each refusal. The line of a certificate is on the disk before the certificate is
//! handed out, because what was issued to a node must be known when the node is shut out; where it cannot be written, there is no
//! certificate. Lines are written by a thread of their own, many with one flush. Whether a node is shut out is looked up under the same
//! lock, so that no certificate falls between the list of its certificates and its being shut out (`revoke`).

pub mod entry;
pub mod file;

use std::{
    path::Path,
    sync::{
        Arc,
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
const REFUSALS_PER_MINUTE: u32 = 600;
const REFUSALS_AT_ONCE: u32 = 1000;

/// A handle on the thread that writes; it ends with the last one.
#[derive(Clone)]
pub struct Ledger {
    orders: mpsc::Sender<Order>,
    writable: Arc<AtomicBool>,
}

/// Why a certificate may not be handed out.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotNoted {
    /// Its node is shut out, since when.
    ShutOut(String),
    /// It could not be written.
    Failed,
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
        let writer = Writer {
            file,
            writable: Arc::clone(&writable),
            refusals: Refusals { limiter: Limiter::new(REFUSALS_PER_MINUTE, REFUSALS_AT_ONCE), unrecorded: 0 },
            failure: None,
        };
        thread::Builder::new()
            .name("ca-ledger".to_owned())
            .spawn(move || writer.run(receiver))
            .map_err(|source| CaError::Io { action: "start the thread for", path: dir.to_owned(), source })?;
        Ok(Self { orders, writable })
    }

    /// Notes a certificate that is about to be handed out, or a refusal.
    pub async fn note(&self, entry: Entry) -> Result<(), NotNoted> {
        self.order(Some(entry)).await
    }

    /// Whether certificates can be noted. After a failure this is tried: nobody may ask for any until it is known.
    pub async fn is_writable(&self) -> bool {
        self.writable.load(Ordering::Relaxed) || self.order(None).await.is_ok()
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
    refusals: Refusals,
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
        let refusals = &mut self.refusals;
        let certificate = |order: &Order| order.entry.as_ref().is_some_and(Entry::issued);
        let (certificates, probe) = (batch.iter().any(certificate), batch.iter().any(|order| order.entry.is_none()));
        let written = self.file.locked(|file, dir| {
            let shut_out = shut_out::read(dir)?;
            let mut lines = Vec::new();
            let mut results = Vec::with_capacity(batch.len());
            for entry in batch.iter_mut().map(|order| &mut order.entry) {
                let node = entry.as_ref().and_then(Entry::certificate_for);
                let since = node.and_then(|node| shut_out.get(node));
                results.push(since.map_or(Ok(()), |since| Err(NotNoted::ShutOut(since.clone()))));
                if let Some(entry) = entry.as_mut().filter(|_| since.is_none())
                    && refusals.note(entry)
                {
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
    /// Whether it gets a line.
    fn note(&mut self, entry: &mut Entry) -> bool {
        if entry.issued() {
            return true;
        }
        if self.limiter.take("", Instant::now()).is_err() {
            self.unrecorded += 1;
            return false;
        }
        entry.unrecorded = Some(std::mem::take(&mut self.unrecorded)).filter(|count| *count > 0);
        true
    }
}
