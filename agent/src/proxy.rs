//! A connection's way through the agent, one file per stage: capture, identify, authorize, handshake, offload, pump, account.
//! `outbound` and `inbound` are the way itself, read from its two ends; `pod` keeps a local pod captured. What is known of
//! the mesh comes from `state`; who may talk to whom is `policy`'s.

use std::{
    collections::HashMap,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, Instant, SystemTime},
};

use tokio::sync::{Semaphore, watch};

use crate::{
    access_log::AccessLog,
    bpf::{Capture, Hook, PodNetns, selftest::SelfTest},
    identity::{SpiffeId, Svid, Trust, manager::Manager, trust::Voucher},
    metrics::Metrics,
    state::{LocalPod, Snapshot, State},
    sys::{
        netns::{Netns, NetnsCookie},
        vital::vital,
    },
    tls::config::{Ciphers, Learned, Parameters},
    words::{Direction, TlsFacts, with_causes},
};

pub mod account;
pub mod authorize;
mod capture;
mod carry;
mod closed;
pub mod connections;
pub mod direct;
pub mod handshake;
mod hooks;
pub mod identify;
mod inbound;
mod kubelet;
pub mod offload;
mod outbound;
mod pod;
mod pool;
pub mod probe;
pub mod pump;
mod refusal;
mod spare;
mod target;
mod watchdog;

pub use pod::{PodState, PodStatus};

use account::Account;
use closed::Closed;
use connections::{Connections, Live, lock};
use direct::Direct;
use handshake::{HandshakeError, Secured};
use offload::{Capabilities, RecordsChoice};
use pump::PumpError;
use refusal::Refusal;
use target::Loads;

#[derive(Debug, Clone)]
pub struct Settings {
    pub records: RecordsChoice,
    pub connect: Duration,
    pub handshake: Duration,
    pub dead_peer: Duration,
    /// Nothing but post-quantum key exchange.
    pub pqc_only: bool,
    /// Whether connections are made before they are asked for.
    pub spares: bool,
}

/// All that the stages share.
pub struct Context {
    pub state: State,
    pub identities: Manager,
    pub capture: Capture,
    pub selftest: SelfTest,
    pub kernel: Capabilities,
    pub settings: Settings,
    pub connections: Connections,
    pub loads: Loads,
    /// Places for spare connections, of all pods.
    spares: Arc<Semaphore>,
    pub metrics: Arc<Metrics>,
    pub log: AccessLog,
    /// `None` where direct connections are off.
    pub direct: Option<Direct>,
    /// Where tasks live as long as the agent, from whatever thread they are started.
    runtime: tokio::runtime::Handle,
    pods_changed: watch::Sender<u64>,
    /// Which pod, by its path, each namespace is served for: two paths may lead to one namespace.
    served: Mutex<HashMap<NetnsCookie, PathBuf>>,
    /// The namespaces whose pods are ready.
    captured: Mutex<HashMap<NetnsCookie, PodNetns>>,
    /// Those that are enrolled, and neither served nor to be.
    closed: Closed,
    /// Which ports the kubelet is let in at.
    declared: kubelet::Declared,
    /// As they were found last.
    hooks: Mutex<Vec<Hook>>,
}

/// Everything that is needed to make a proxy.
pub struct Parts {
    pub state: State,
    pub identities: Manager,
    pub capture: Capture,
    pub kernel: Capabilities,
    pub settings: Settings,
    pub metrics: Arc<Metrics>,
    pub log: AccessLog,
    pub direct: Option<Direct>,
}

/// Keeps the local pods captured and serves their connections. Cheap to clone.
#[derive(Clone)]
pub struct Proxy {
    ctx: Arc<Context>,
    pods: Arc<Mutex<HashMap<PathBuf, Running>>>,
}

struct Running {
    local: Arc<LocalPod>,
    status: pod::Status,
    order: watch::Sender<pod::Order>,
    /// Ends with the namespace that it leaves closed.
    task: tokio::task::JoinHandle<Option<NetnsCookie>>,
}

/// When to try again what could not be let go.
const AGAIN: Duration = Duration::from_secs(5);

impl Proxy {
    /// To be called within a tokio runtime.
    pub fn new(parts: Parts) -> Self {
        let Parts { state, identities, capture, kernel, settings, metrics, log, direct } = parts;
        let spares = if settings.spares { pool::SPARES } else { 0 };
        let ctx = Context {
            state,
            identities,
            selftest: SelfTest::new(capture.clone()),
            capture,
            kernel,
            settings,
            connections: Connections::default(),
            loads: Loads::default(),
            spares: Arc::new(Semaphore::new(spares)),
            metrics,
            log,
            direct,
            runtime: tokio::runtime::Handle::current(),
            pods_changed: watch::Sender::new(0),
            served: Mutex::default(),
            captured: Mutex::default(),
            closed: Closed::default(),
            declared: Mutex::default(),
            hooks: Mutex::default(),
        };
        Self { ctx: Arc::new(ctx), pods: Arc::default() }
    }

    /// Follows the state until its sender is gone.
    pub async fn run(&self) {
        tokio::spawn(vital(watchdog::run(self.ctx.clone())));
        tokio::spawn(vital(hooks::run(self.ctx.clone())));
        tokio::spawn(vital(direct::run(self.ctx.clone())));
        tokio::spawn(vital(kubelet::run(self.ctx.clone())));
        let mut changes = self.ctx.state.subscribe();
        let mut trust = self.ctx.identities.trust_store().subscribe();
        let mut strangers = true;
        loop {
            self.reevaluate();
            strangers = strangers && !self.forget_strangers();
            self.reconcile().await;
            kubelet::follow(&self.ctx);
            self.ctx.pods_changed.send_modify(|count| *count += 1);
            let changed = loop {
                tokio::select! {
                    changed = changes.changed() => break changed,
                    changed = trust.changed() => break changed,
                    () = tokio::time::sleep(AGAIN) => closed::let_go(&self.ctx),
                }
            };
            if changed.is_err() {
                return;
            }
        }
    }

    pub fn pods(&self) -> Vec<PodStatus> {
        let mut pods: Vec<_> = lock(&self.pods).values().map(|running| running.status.get()).collect();
        pods.sort_by(|a, b| (&a.namespace, &a.name).cmp(&(&b.namespace, &b.name)));
        pods
    }

    /// The pod that is served, or is to be, for the namespace at a path, and how it is.
    pub fn pod_at(&self, netns: &Path) -> Option<(Arc<LocalPod>, PodStatus)> {
        lock(&self.pods).get(netns).map(|running| (running.local.clone(), running.status.get()))
    }

    /// The kernel programs, as they were found a moment ago.
    pub fn hooks(&self) -> Vec<Hook> {
        lock(&self.ctx.hooks).clone()
    }

    /// The kernel programs are attached, and every local pod of the present state is captured and has a certificate that is valid now.
    pub fn ready(&self) -> Result<(), String> {
        if let Some((name, why)) = hooks::missing(&lock(&self.ctx.hooks)).first() {
            return Err(format!("the kernel program {name} does not capture any more: {why}; restart the agent"));
        }
        let wanted = self.ctx.state.load();
        let pods = lock(&self.pods);
        for local in &wanted.local {
            let name = format!("{}/{}", local.workload.namespace, local.workload.name);
            let status = pods.get(&local.netns).filter(|running| running.local == *local).map(|r| r.status.get());
            match status {
                Some(status) if status.state == PodState::Ready => {}
                Some(status) => {
                    return Err(format!("pod {name} is refused: {}", status.reason.unwrap_or_default()));
                }
                None => return Err(format!("pod {name} is not enrolled yet")),
            }
            self.ctx.svid(&local.workload.id).map_err(|refusal| format!("pod {name}: {refusal}"))?;
        }
        Ok(())
    }

    /// This agent ends: it takes no more held calls, and brings those that it has to their end.
    pub async fn rest(&self) {
        if let Some(direct) = &self.ctx.direct {
            direct.rest().await;
        }
    }

    /// Tells whenever a pod's state has changed.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.ctx.pods_changed.subscribe()
    }

    pub fn context(&self) -> &Arc<Context> {
        &self.ctx
    }

    /// Lets go of the pods that an earlier agent enrolled and that are not wanted any more. Where a wanted pod's namespace cannot be
    /// told, it could be any of them: then all stay closed, until a later change. True when it is done.
    fn forget_strangers(&self) -> bool {
        let snapshot = self.ctx.state.load();
        if snapshot.unplaced {
            return false;
        }
        let cookie = |path: &PathBuf| Netns::open(path).map(|netns| netns.cookie());
        let wanted: Result<Vec<_>, _> = snapshot.local.iter().map(|local| cookie(&local.netns)).collect();
        let with_path = |path: &PathBuf| cookie(path).map(|cookie| (path.clone(), cookie));
        let closed: Result<Vec<_>, _> = snapshot.closed.iter().map(with_path).collect();
        let wanted = wanted.and_then(|wanted| Ok((wanted, closed?)));
        match (wanted, self.ctx.capture.pods()) {
            (Ok((wanted, closed)), Ok(enrolled)) => {
                let closed: HashMap<_, _> =
                    closed.into_iter().filter(|(_, cookie)| enrolled.contains(cookie)).collect();
                let stays = |cookie: &NetnsCookie| wanted.contains(cookie) || closed.values().any(|it| it == cookie);
                for cookie in enrolled.iter().copied().filter(|cookie| !stays(cookie)) {
                    match self.ctx.capture.withdraw(cookie) {
                        Ok(()) => tracing::info!(netns = cookie.0, "a pod of an earlier agent is let go"),
                        Err(error) => {
                            tracing::error!("a pod of an earlier agent could not be let go: {}", with_causes(&error));
                        }
                    }
                }
                closed.into_iter().for_each(|(path, cookie)| self.ctx.closed.keep(cookie, path));
                if let Err(error) = self.ctx.capture.retain_probes(|cookie| wanted.contains(&cookie)) {
                    tracing::error!("what an earlier agent let the kubelet in for stays: {}", with_causes(&error));
                    return false;
                }
                true
            }
            (Err(error), _) => {
                tracing::warn!(
                    "pods of an earlier agent stay closed, because a pod's namespace cannot be opened: {error}"
                );
                false
            }
            (_, Err(error)) => {
                tracing::error!("the pods of an earlier agent cannot be listed: {}", with_causes(&error));
                false
            }
        }
    }

    async fn reconcile(&self) {
        let snapshot = self.ctx.state.load();
        self.ctx.identities.retain(&snapshot.local_identities());
        let wanted: HashMap<_, _> = snapshot.local.iter().map(|local| (local.netns.clone(), local.clone())).collect();
        let gone: Vec<_> = lock(&self.pods)
            .extract_if(|path, running| wanted.get(path).is_none_or(|local| !pod::is_same(&running.local, local)))
            .map(|(_, running)| running)
            .collect();
        for running in &gone {
            running.order.send_replace(pod::Order::Close);
        }
        for running in gone {
            match running.task.await {
                Ok(Some(cookie)) => self.ctx.closed.keep(cookie, running.local.netns.clone()),
                Ok(None) => {}
                Err(_) => tracing::error!(pod = %running.local.netns.display(), "serving the pod had panicked"),
            }
        }
        closed::let_go(&self.ctx);
        let mut pods = lock(&self.pods);
        for (path, local) in wanted {
            // One that goes on may have other labels, or be elsewhere: connections go by what the state says of it.
            pods.entry(path).and_modify(|running| running.local = local.clone()).or_insert_with(|| {
                let (status, order) = (pod::Status::new(&local), watch::Sender::new(pod::Order::Serve));
                let task = tokio::spawn(pod::run(self.ctx.clone(), local.clone(), status.clone(), order.subscribe()));
                Running { local, status, order, task }
            });
        }
    }

    /// Takes back what the present state would not let in.
    fn reevaluate(&self) {
        let (snapshot, trust) = (self.ctx.state.load(), self.ctx.identities.trust());
        for live in self.ctx.connections.all() {
            self.ctx.judge(&snapshot, &trust, &live);
        }
    }
}

impl Context {
    pub fn runtime(&self) -> &tokio::runtime::Handle {
        &self.runtime
    }

    /// After a connection to, or at, this end.
    fn learn_from(&self, result: &Result<(), PumpError>, direction: Direction, end: SocketAddr) {
        if let (Some(direct), Err(PumpError::KeySpent)) = (&self.direct, result) {
            direct.lasts(direction, end);
        }
    }

    /// What a connection should be sealed with: see `direct::Direct::ciphers`.
    fn parameters(&self, direction: Direction, end: SocketAddr) -> Parameters {
        let ciphers = self.direct.as_ref().map_or(Ciphers::Fastest, |direct| direct.ciphers(direction, end));
        Parameters { ciphers, pqc_only: self.settings.pqc_only }
    }

    /// Takes a live connection back if the rules would not let it in any more, or if nobody vouches for its peer any more.
    fn judge(&self, snapshot: &Snapshot, trust: &Trust, live: &Live) {
        if live.revoked().is_some() {
            return;
        }
        let facts = live.facts();
        // What has no permit yet is judged when it has.
        if facts.mode.is_some()
            && let Some(withdrawn) = authorize::withdrawn(trust, &facts)
        {
            self.metrics.trust_withdrawn(live.direction, withdrawn.label());
            live.revoke(withdrawn.reason());
        } else if let Some(revoked) = authorize::revoked_by(snapshot, live.direction, &facts) {
            revoked.enforce(live);
        }
    }

    fn judge_now(&self, live: &Live) {
        self.judge(&self.state.load(), &self.identities.trust(), live);
    }

    fn svid(&self, id: &SpiffeId) -> Result<Arc<Svid>, Refusal> {
        self.identities
            .svid(id)
            .filter(|svid| svid.is_valid_at(SystemTime::now()))
            .ok_or_else(|| Refusal::NoSvid(id.clone()))
    }

    /// Counts a handshake and notes whom it proved.
    fn handshaken(
        &self,
        account: &Account,
        direction: Direction,
        since: Instant,
        learned: &Learned,
        result: Result<Secured, HandshakeError>,
    ) -> Result<Secured, Refusal> {
        let secured = self.count_handshake(direction, since, result)?;
        Proved::new(&secured, learned).note(direction, &account.live);
        Ok(secured)
    }

    fn count_handshake(
        &self,
        direction: Direction,
        since: Instant,
        result: Result<Secured, HandshakeError>,
    ) -> Result<Secured, Refusal> {
        match result {
            Ok(secured) => {
                self.metrics.handshake(direction, Ok(since.elapsed()));
                Ok(secured)
            }
            Err(error) => {
                let refusal = Refusal::Handshake(error);
                self.metrics.handshake(direction, Err(refusal.reason()));
                Err(refusal)
            }
        }
    }
}

/// What a handshake has told of the peer.
struct Proved {
    peer: SpiffeId,
    voucher: Option<Voucher>,
    tls: TlsFacts,
}

impl Proved {
    fn new(secured: &Secured, learned: &Learned) -> Self {
        Self {
            peer: secured.peer.clone(),
            voucher: learned.voucher().cloned(),
            tls: TlsFacts {
                cipher: format!("{:?}", secured.suite.suite()),
                group: secured.group.map(|group| format!("{group:?}")),
                alpn: secured.alpn.as_deref().map(|name| String::from_utf8_lossy(name).into_owned()),
            },
        }
    }

    fn note(self, direction: Direction, live: &Live) {
        live.learn(|facts| {
            let end = match direction {
                Direction::Outbound => &mut facts.destination,
                Direction::Inbound => &mut facts.source,
            };
            end.identity = Some(self.peer.to_string());
            (facts.proved, facts.voucher, facts.tls) = (Some(self.peer), self.voucher, Some(self.tls));
        });
    }
}
