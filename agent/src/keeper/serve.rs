//! The process: takes descriptors from runtimes, gives them to the one agent, and answers for an agent that is gone.
//!
//! One thread and poll(2); nothing that a peer sends or leaves out makes it wait or end. It has no signal handling: it keeps
//! nothing that outlives it, so being killed is the way to end it.

mod sender;

use std::{
    collections::BTreeMap,
    fs::{self, DirBuilder, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::{
            fs::{DirBuilderExt, OpenOptionsExt},
            net::UnixListener,
        },
    },
    path::Path,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::{
        resource::{Resource, getrlimit, setrlimit},
        stat::{Mode, umask},
    },
};
use socket2::{Domain, SockAddr, Socket, Type};

pub(super) use self::sender::TAKEN;
use self::sender::{Progress, Refusal, Sender};
use super::{Container, KeeperError, ToAgent, VERSION, agent_socket, closer::Closer, ledger, seccomp_socket};
use crate::sys::{
    pass,
    seccomp::{Answer, Listener, Notification},
};

/// Peers that have connected and not said what they have to say; who has been silent for longest makes room for further ones.
const SENDERS: usize = 64;
/// Agents that wait for their turn.
const WAITING: usize = 8;
/// After an error that would come again at once, such as having no descriptors left.
const BREATH: Duration = Duration::from_millis(200);
/// Calls answered for one filter before others have their turn.
const AT_ONCE: usize = 64;

/// Serves the directory until the process is killed. `patience` is how long calls wait while there is no agent.
pub fn serve(dir: &Path, patience: Duration) -> Result<(), KeeperError> {
    generous_limits();
    let mut keeper = Keeper::open(dir, patience)?;
    tracing::info!(dir = %dir.display(), ?patience, "keeping");
    loop {
        keeper.turn()?;
    }
}

struct Keeper {
    patience: Duration,
    runtimes: UnixListener,
    agents: Socket,
    senders: Vec<Sender>,
    held: BTreeMap<u64, Kept>,
    agent: Option<Agent>,
    /// Agents that wait for their turn, in the order in which they came.
    waiting: BTreeMap<u64, OwnedFd>,
    /// For whatever is numbered here.
    next: u64,
    /// Since when there is no agent.
    alone: Instant,
    /// Nobody is let in, and the agent is told nothing, until then.
    rest: Option<Instant>,
    _lock: Flock<File>,
}

struct Kept {
    listener: Listener,
    container: Container,
    since: Instant,
    /// Calls that were received while there was no agent, and when each is answered at the latest.
    waiting: Vec<(u64, Instant)>,
    /// Started when it is needed first.
    closer: Option<Closer>,
}

impl Kept {
    fn goes_on(&mut self, call: Notification) -> io::Result<bool> {
        if call.call.ends_sockets() {
            if self.closer.is_none() {
                self.closer = Closer::start(&self.listener)
                    .inspect_err(|error| tracing::error!(%error, "sockets are closed without room for what they hold"))
                    .ok();
            }
            if let Some(closer) = &self.closer {
                closer.close(call);
                return Ok(true);
            }
        }
        self.listener.answer(call.id, Answer::Continue)
    }
}

struct Agent {
    socket: OwnedFd,
    ledger: OwnedFd,
    greeted: bool,
    /// The first descriptor that it may not have been given.
    next: u64,
}

/// What a place in the poll set belongs to.
#[derive(Clone, Copy)]
enum Whose {
    Runtimes,
    Agents,
    Sender(usize),
    Kept(u64),
    Agent,
    Waiting(u64),
}

impl Keeper {
    fn open(dir: &Path, patience: Duration) -> Result<Self, KeeperError> {
        let made = DirBuilder::new().recursive(true).mode(0o755).create(dir);
        made.map_err(|error| cannot("make", dir, error))?;
        let path = dir.join("keeper.lock");
        let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(&path);
        let file = file.map_err(|error| cannot("open", &path, error))?;
        let lock = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| match error {
            Errno::EWOULDBLOCK => KeeperError::Taken(dir.to_owned()),
            error => cannot("lock", &path, error.into()),
        })?;
        // The sockets are root's alone from their first moment.
        let mask = umask(Mode::from_bits_truncate(0o177));
        let sockets = listen(dir);
        umask(mask);
        let (runtimes, agents) = sockets?;
        Ok(Self {
            patience,
            runtimes,
            agents,
            senders: Vec::new(),
            held: BTreeMap::new(),
            agent: None,
            waiting: BTreeMap::new(),
            next: 1,
            alone: Instant::now(),
            rest: None,
            _lock: lock,
        })
    }

    /// Waits for something to do, and does it.
    fn turn(&mut self) -> Result<(), KeeperError> {
        let ready = self.wait().map_err(KeeperError::Wait)?;
        let now = Instant::now();
        let mut heard = Vec::new();
        for (whose, events) in ready {
            match whose {
                Whose::Runtimes => self.let_sender_in(now),
                Whose::Agents => self.let_agent_in(),
                Whose::Sender(index) => heard.push(index),
                Whose::Kept(id) => self.look_after(id, events, now),
                Whose::Agent => self.hear_agent(events),
                // It has nothing to say before its turn: this is its end.
                Whose::Waiting(number) => drop(self.waiting.remove(&number)),
            }
        }
        self.let_go(false, now);
        self.hear_senders(&heard, now);
        self.choose_agent();
        self.tell_agent(now);
        Ok(())
    }

    fn wait(&mut self) -> io::Result<Vec<(Whose, PollFlags)>> {
        let now = Instant::now();
        self.rest = self.rest.filter(|end| *end > now);
        let mut wake = self.rest;
        let mut at = |time: Instant| wake = Some(wake.map_or(time, |wake| wake.min(time)));
        let mut asked = Vec::new();
        if self.rest.is_none() {
            asked.push((Whose::Runtimes, PollFd::new(self.runtimes.as_fd(), PollFlags::POLLIN)));
            // Those beyond wait in the socket's queue.
            if self.waiting.len() < WAITING {
                asked.push((Whose::Agents, PollFd::new(self.agents.as_fd(), PollFlags::POLLIN)));
            }
        }
        for (index, sender) in self.senders.iter().enumerate() {
            at(sender.deadline);
            asked.push((Whose::Sender(index), PollFd::new(sender.as_fd(), PollFlags::POLLIN)));
        }
        for (number, socket) in &self.waiting {
            asked.push((Whose::Waiting(*number), PollFd::new(socket.as_fd(), PollFlags::POLLIN)));
        }
        if let Some(agent) = &self.agent {
            let behind = self.rest.is_none() && agent.behind(&self.held);
            let events = if behind { PollFlags::POLLIN | PollFlags::POLLOUT } else { PollFlags::POLLIN };
            asked.push((Whose::Agent, PollFd::new(agent.socket.as_fd(), events)));
        }
        for (id, kept) in &self.held {
            if let Some((_, deadline)) = kept.waiting.first() {
                at(*deadline);
            }
            // That the last task is gone is always told.
            let receives = self.agent.is_none() && self.rest.is_none();
            let events = if receives { PollFlags::POLLIN } else { PollFlags::empty() };
            asked.push((Whose::Kept(*id), PollFd::new(kept.listener.as_fd(), events)));
        }
        let timeout = wake.map_or(PollTimeout::NONE, |wake| {
            let millis = wake.saturating_duration_since(now).as_millis() + 1;
            PollTimeout::from(u16::try_from(millis).unwrap_or(u16::MAX))
        });
        let (whose, mut set): (Vec<Whose>, Vec<PollFd<'_>>) = asked.into_iter().unzip();
        match poll(&mut set, timeout) {
            Ok(_) | Err(Errno::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
        let events = set.iter().map(|asked| asked.revents().unwrap_or(PollFlags::empty()));
        Ok(whose.into_iter().zip(events).filter(|(_, events)| !events.is_empty()).collect())
    }

    /// Until when calls wait for an agent; none while there is one. It goes by the agent's absence and not by the call: a
    /// program whose every accept waited would stand still for as long as the agent is away.
    fn deadline(&self, kept: &Kept) -> Option<Instant> {
        self.agent.is_none().then(|| kept.since.max(self.alone) + self.patience)
    }

    fn let_sender_in(&mut self, now: Instant) {
        let accepted = self.runtimes.accept().and_then(|(stream, _)| Sender::new(stream, now));
        match accepted {
            Ok(sender) => self.senders.push(sender),
            Err(error) => self.breathe("no connection of a runtime can be accepted", &error),
        }
    }

    fn let_agent_in(&mut self) {
        let accepted = self.agents.accept().and_then(|(socket, _)| socket.set_nonblocking(true).map(|()| socket));
        match accepted {
            Ok(socket) => {
                let number = self.number();
                self.waiting.insert(number, socket.into());
            }
            Err(error) => self.breathe("no connection of an agent can be accepted", &error),
        }
    }

    fn hear_senders(&mut self, heard: &[usize], now: Instant) {
        let mut silent = Vec::new();
        let crowd = self.senders.len().saturating_sub(SENDERS);
        for (index, mut sender) in std::mem::take(&mut self.senders).into_iter().enumerate() {
            let progress = match heard.contains(&index) {
                true => sender.go_on(),
                false if sender.deadline <= now || index < crowd => Progress::Bad(Refusal::Late),
                false => Progress::More,
            };
            match progress {
                Progress::More => silent.push(sender),
                Progress::Silent => tracing::debug!("a peer left without a message: its container did not start"),
                Progress::Bad(refusal) => {
                    tracing::warn!(%refusal, "a message to the seccomp socket was not taken");
                    sender.answer(Some(&refusal));
                }
                Progress::Offered(container, listener) => {
                    let id = self.number();
                    tracing::info!(id, container = %container.id, pid = container.pid, "a filter's descriptor is held");
                    self.held.insert(id, Kept { listener, container, since: now, waiting: Vec::new(), closer: None });
                    sender.answer(None);
                }
            }
        }
        self.senders = silent;
    }

    fn look_after(&mut self, id: u64, events: PollFlags, now: Instant) {
        let Some(kept) = self.held.get(&id) else { return };
        if events.contains(PollFlags::POLLHUP) {
            tracing::info!(id, container = %kept.container.id, "no task is left under a filter");
            self.held.remove(&id);
            return;
        }
        // An agent may have come in this very turn: then it is the one who receives.
        let Some(deadline) = self.deadline(kept) else { return };
        let Some(kept) = self.held.get_mut(&id) else { return };
        for _ in 0..AT_ONCE {
            let taken = match kept.listener.recv() {
                Ok(None) => return,
                Ok(Some(call)) if call.call.goes_on() => kept.goes_on(call),
                Ok(Some(call)) if deadline <= now => kept.listener.answer(call.id, Answer::Continue),
                Ok(Some(call)) => {
                    kept.waiting.push((call.id, deadline));
                    Ok(true)
                }
                Err(error) => Err(error),
            };
            if let Err(error) = taken {
                self.breathe("a call that waits for an agent cannot be received or answered", &error);
                return;
            }
        }
    }

    /// Lets calls go that have waited long enough, or, if an agent is ready to serve what the kernel redirects, all of them.
    fn let_go(&mut self, all: bool, now: Instant) {
        for kept in self.held.values_mut() {
            let listener = &kept.listener;
            kept.waiting.retain(|(id, deadline)| {
                let stays = !all && *deadline > now;
                if !stays && let Err(error) = listener.answer(*id, Answer::Continue) {
                    tracing::error!(%error, "a call that has waited for an agent cannot be answered");
                }
                stays
            });
        }
    }

    fn hear_agent(&mut self, events: PollFlags) {
        let Some(agent) = &self.agent else { return };
        let mut said = false;
        let gone = events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR)
            || events.contains(PollFlags::POLLIN)
                && match pass::recv(&agent.socket, &mut [0; 64]) {
                    // All that it has to say is that it is ready.
                    Ok(message) => {
                        said = message.len > 0;
                        !said
                    }
                    Err(error) => error.kind() != io::ErrorKind::WouldBlock,
                };
        if said && !gone {
            self.let_go(true, Instant::now());
            return;
        }
        if !gone {
            return;
        }
        let listeners = self.held.iter().map(|(id, kept)| (*id, &kept.listener)).collect();
        match ledger::settle(&agent.ledger, &listeners) {
            Ok(answered) => tracing::warn!(answered, "the agent is gone; calls that it held were answered"),
            Err(error) => tracing::error!(%error, "the agent is gone, and its ledger cannot be read"),
        }
        self.agent = None;
        self.alone = Instant::now();
    }

    fn choose_agent(&mut self) {
        while self.agent.is_none()
            && let Some((_, socket)) = self.waiting.pop_first()
        {
            match ledger::create() {
                Ok(ledger) => self.agent = Some(Agent { socket, ledger, greeted: false, next: 0 }),
                Err(error) => self.breathe("there is no memory for an agent's ledger", &error),
            }
        }
    }

    /// Gives the agent what it has not been given yet, as far as it takes it now.
    fn tell_agent(&mut self, now: Instant) {
        if self.rest.is_some() {
            return;
        }
        let Some(agent) = &mut self.agent else { return };
        if let Err(error) = agent.tell(&self.held)
            && error.kind() != io::ErrorKind::WouldBlock
        {
            // One that is gone will be seen to be gone.
            tracing::warn!(%error, "the agent cannot be told");
            self.rest = Some(now + BREATH);
        }
    }

    fn number(&mut self) -> u64 {
        self.next += 1;
        self.next
    }

    fn breathe(&mut self, what: &str, error: &io::Error) {
        if error.kind() != io::ErrorKind::WouldBlock {
            tracing::error!(%error, "{what}");
            self.rest = Some(Instant::now() + BREATH);
        }
    }
}

impl Agent {
    fn behind(&self, held: &BTreeMap<u64, Kept>) -> bool {
        !self.greeted || held.range(self.next..).next().is_some()
    }

    fn tell(&mut self, held: &BTreeMap<u64, Kept>) -> io::Result<()> {
        let say = |what: &ToAgent, descriptor: BorrowedFd<'_>| {
            pass::send(&self.socket, &serde_json::to_vec(what)?, &[descriptor]).map(drop)
        };
        if !self.greeted {
            say(&ToAgent::Ledger { version: VERSION }, self.ledger.as_fd())?;
            self.greeted = true;
        }
        for (id, kept) in held.range(self.next..) {
            say(&ToAgent::Held { id: *id, container: kept.container.clone() }, kept.listener.as_fd())?;
            self.next = id + 1;
        }
        Ok(())
    }
}

fn listen(dir: &Path) -> Result<(UnixListener, Socket), KeeperError> {
    // What a keeper before this one has left is nobody's: the lock is ours.
    let path = seccomp_socket(dir);
    let _ = fs::remove_file(&path);
    let runtimes = UnixListener::bind(&path)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|error| cannot("listen at", &path, error))?;
    let path = agent_socket(dir);
    let _ = fs::remove_file(&path);
    let agents = listen_for_agents(&path).map_err(|error| cannot("listen at", &path, error))?;
    Ok((runtimes, agents))
}

fn listen_for_agents(path: &Path) -> io::Result<Socket> {
    let socket = Socket::new(Domain::UNIX, Type::SEQPACKET, None)?;
    socket.bind(&SockAddr::unix(path)?)?;
    socket.listen(16)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

fn cannot(what: &'static str, path: &Path, source: io::Error) -> KeeperError {
    KeeperError::Path { what, path: path.to_owned(), source }
}

/// A descriptor per container, and to be the last that is killed when memory is short: with the keeper goes every pod's network.
fn generous_limits() {
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, most)| setrlimit(Resource::RLIMIT_NOFILE, most, most));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
    if let Err(error) = fs::write("/proc/self/oom_score_adj", "-999") {
        tracing::warn!(%error, "the keeper is as likely as others to be killed when memory is short");
    }
}
