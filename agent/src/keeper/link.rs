//! The agent's side: gets the notify descriptors from the keeper, and receives calls from them.
//!
//! The keeper takes an agent for dead when its connection is closed, and receives from the descriptors itself from then on.
//! So the connection stays open as long as anything is left that can receive: the [`Link`], or any [`Held`].

use std::{
    io,
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

use socket2::{Domain, SockAddr, Socket, Type};
use tokio::io::{Interest, unix::AsyncFd};

use super::{
    Container, KeeperError, MESSAGE, ToAgent, VERSION, agent_socket,
    ledger::{Entry, Ledger, last_word},
};
use crate::sys::{
    pass,
    seccomp::{Answer, Listener, Notification},
    watched::watched,
};

/// Calls of one filter that the agent has in its hands at once; what comes beyond goes the proxied way. So one pod cannot
/// take the whole ledger, nor the time that the kernel needs to look through a filter's held calls at each receive.
const CALLS: u64 = 1024;

/// A connection to the keeper.
#[derive(Debug)]
pub struct Link {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    socket: AsyncFd<OwnedFd>,
    ledger: Ledger,
}

impl Link {
    /// Connects, and waits for the turn: while another agent has the descriptors (one that is being replaced, say), this waits.
    pub async fn open(dir: &Path) -> Result<Self, KeeperError> {
        let path = agent_socket(dir);
        let absent = |source| KeeperError::Absent { path: path.clone(), source };
        let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None).map_err(KeeperError::Link)?;
        socket.connect(&SockAddr::unix(&path).map_err(absent)?).map_err(absent)?;
        socket.set_nonblocking(true).map_err(KeeperError::Link)?;
        let socket = watched(socket.into(), Interest::READABLE).map_err(KeeperError::Link)?;
        match receive(&socket).await? {
            Some((ToAgent::Ledger { version: VERSION }, memory)) => {
                let ledger = Ledger::of(memory).map_err(KeeperError::Link)?;
                Ok(Self { shared: Arc::new(Shared { socket, ledger }) })
            }
            Some((other, _)) => Err(KeeperError::Strange(format!("{other:?}"))),
            None => Err(absent(io::ErrorKind::ConnectionReset.into())),
        }
    }

    /// Tells the keeper that what the kernel redirects is served: calls that have waited for an agent go on.
    pub fn ready(&self) -> Result<(), KeeperError> {
        pass::send(self.shared.socket.get_ref(), b"ready", &[]).map(drop).map_err(KeeperError::Link)
    }

    /// The next descriptor: those that the keeper held before come first. None when the keeper is gone; what was held works on,
    /// and can be given to a new keeper with [`super::Offer`].
    pub async fn next(&self) -> Result<Option<Held>, KeeperError> {
        match receive(&self.shared.socket).await? {
            None => Ok(None),
            Some((ToAgent::Held { id, container }, descriptor)) => {
                let listener = Listener::new(descriptor).map_err(KeeperError::Link)?;
                let spare = Mutex::default();
                let calls = Arc::default();
                Ok(Some(Held {
                    id,
                    container,
                    listener,
                    spare,
                    calls,
                    beyond: AtomicU64::new(0),
                    link: self.shared.clone(),
                }))
            }
            Some((other, _)) => Err(KeeperError::Strange(format!("{other:?}"))),
        }
    }
}

/// A notify descriptor, and who is under its filter.
#[derive(Debug)]
pub struct Held {
    /// The keeper's number of it; a successor of this agent hears the same.
    pub id: u64,
    pub container: Container,
    listener: Listener,
    /// A place for the next notification. Its lock is also what makes receivers take turns.
    spare: Mutex<Option<Entry>>,
    /// How many calls are in the agent's hands; the Arc of each `Pending` counts.
    calls: Arc<()>,
    beyond: AtomicU64,
    link: Arc<Shared>,
}

impl Held {
    /// Waits for calls in the runtime of the caller.
    pub fn receiver(self: &Arc<Self>) -> io::Result<Receiver> {
        let ready = self.listener.as_fd().try_clone_to_owned()?;
        Ok(Receiver { held: self.clone(), ready: watched(ready, Interest::READABLE)? })
    }

    /// The next call that is there already; for threads that wait with poll(2), as this is readable when there is something to receive.
    pub fn try_recv(self: &Arc<Self>) -> io::Result<Option<Pending>> {
        let mut spare = self.spare.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            let room = Arc::strong_count(&self.calls) as u64 <= CALLS;
            let entry = spare.take().or_else(|| room.then(|| self.link.ledger.entry(self.id)).flatten());
            let Some(entry) = entry else {
                // A pod that has more calls than there are places has them carried out by the kernel.
                let Some(notification) = self.listener().recv()? else { return Ok(None) };
                self.beyond.fetch_add(1, Ordering::Relaxed);
                self.listener().answer(notification.id, Answer::Continue)?;
                continue;
            };
            let received = entry.receive(self.listener());
            let Ok(Some(notification)) = received else {
                *spare = Some(entry);
                return received.map(|_| None);
            };
            let (held, call) = (self.clone(), self.calls.clone());
            return Ok(Some(Pending { notification, held, _entry: entry, begun: false, answered: false, _call: call }));
        }
    }

    pub fn listener(&self) -> &Listener {
        &self.listener
    }

    /// Whether calls have been received and not been answered.
    pub fn in_hand(&self) -> bool {
        Arc::strong_count(&self.calls) > 1
    }

    /// How many calls were more than there were places for, and were left to the kernel.
    pub fn beyond(&self) -> u64 {
        self.beyond.load(Ordering::Relaxed)
    }
}

/// Receives the calls of one filter.
#[derive(Debug)]
pub struct Receiver {
    held: Arc<Held>,
    ready: AsyncFd<OwnedFd>,
}

impl Receiver {
    /// The next call; none when no task is left under the filter.
    pub async fn recv(&self) -> io::Result<Option<Pending>> {
        loop {
            if let Some(pending) = self.held.try_recv()? {
                return Ok(Some(pending));
            }
            let mut ready = self.ready.readable().await?;
            if let Some(pending) = self.held.try_recv()? {
                return Ok(Some(pending));
            }
            if self.held.listener().abandoned()? {
                return Ok(None);
            }
            ready.clear_ready();
        }
    }
}

impl AsFd for Held {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener().as_fd()
    }
}

/// A call that waits for its answer. Dropped without one, it is given the keeper's: see [`last_word`].
#[derive(Debug)]
pub struct Pending {
    pub notification: Notification,
    held: Arc<Held>,
    _entry: Entry,
    begun: bool,
    answered: bool,
    _call: Arc<()>,
}

impl Pending {
    pub fn held(&self) -> &Arc<Held> {
        &self.held
    }

    /// Whether the caller still waits; see [`Listener::valid`].
    pub fn valid(&self) -> bool {
        self.held.listener().valid(self.notification.id)
    }

    /// To be called before the caller's socket is touched: from then on, if this process dies, a connect is refused and not
    /// carried out by the kernel.
    pub fn begin(&mut self) {
        self.begun = true;
        self._entry.begin();
    }

    /// Ends the caller's waiting. False if it does not wait any more.
    pub fn answer(mut self, answer: Answer) -> io::Result<bool> {
        let answered = self.held.listener().answer(self.notification.id, answer)?;
        self.answered = true;
        Ok(answered)
    }

    /// Answers with a duplicate of `fd`; see [`Listener::give`]. After an error the call still waits.
    pub fn give(&mut self, fd: BorrowedFd<'_>, cloexec: bool) -> io::Result<bool> {
        let given = self.held.listener().give(self.notification.id, fd, cloexec)?;
        self.answered = true;
        Ok(given)
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.answered {
            return;
        }
        let answer = last_word(self.notification.call, self.begun);
        if let Err(error) = self.held.listener().answer(self.notification.id, answer) {
            tracing::error!(%error, container = %self.held.container.id, "a held call has no answer");
        }
    }
}

/// One message; none at the end.
async fn receive(socket: &AsyncFd<OwnedFd>) -> Result<Option<(ToAgent, OwnedFd)>, KeeperError> {
    let mut buffer = vec![0; MESSAGE];
    let received = socket.async_io(Interest::READABLE, |socket| pass::recv(socket, &mut buffer)).await;
    let mut message = match received {
        Ok(message) => message,
        Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(None),
        Err(error) => return Err(KeeperError::Link(error)),
    };
    if message.len == 0 && message.descriptors.is_empty() {
        return Ok(None);
    }
    let text = &buffer[..message.len];
    let strange = || KeeperError::Strange(String::from_utf8_lossy(text).into_owned());
    let said = serde_json::from_slice(text).map_err(|_| strange())?;
    match (message.descriptors.pop(), message.descriptors.is_empty(), message.cut) {
        (Some(descriptor), true, false) => Ok(Some((said, descriptor))),
        _ => Err(strange()),
    }
}
