//! One local pod: its namespace, its listeners, and the loops that accept from them. A pod is captured first, closed, then
//! self-tested, and only then opened; whatever fails leaves it closed and is tried again.

use std::{
    collections::{HashMap, hash_map::Entry},
    future::poll_fn,
    io,
    panic::{AssertUnwindSafe, catch_unwind},
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    task::Poll,
    time::Duration,
};

use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore, watch},
    task::JoinSet,
};

use super::{
    Context,
    capture::Listeners,
    connections::lock,
    direct::{Enrolled, Turns},
    identify::ClientAddr,
    inbound, kubelet, outbound,
    pool::Pool,
};
use crate::{
    bpf::{
        BpfError, PodNetns,
        selftest::{Family, ProbedPod, SelfTestError},
    },
    policy::Workload,
    state::LocalPod,
    sys::netns::{Netns, NetnsCookie},
    words::with_causes,
};

const RETRY: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(10)];
/// How often to see whether the pod's path still leads to the same namespace.
const LOOK: Duration = Duration::from_secs(2);

/// How long a certificate may take before it is said that there is none.
const FIRST_CERTIFICATE: Duration = Duration::from_secs(1);

/// How many connections of one pod may be on their way to be established, in each direction. Those beyond wait in the listeners'
/// queues, so that a pod cannot take what the node's other pods need, nor its peers what it needs to call out.
const PENDING: usize = 1024;
/// How many connections may wait at one pod for a peer's application to come for them.
const SPARES: usize = 256;
/// After an accept that failed.
const BREATH: Duration = Duration::from_millis(200);

/// A pod that is served.
pub struct Pod {
    pub workload: Arc<Workload>,
    pub netns: Netns,
    /// Places for connections that are not established yet, in each direction.
    pub outbound: Arc<Semaphore>,
    pub inbound: Arc<Semaphore>,
    /// Of questions to the kernel about the pod's sockets.
    pub turns: Turns,
    /// Connections to others that are made before they are asked for.
    pub(super) pool: Pool,
    /// Places for those that others have made to this pod.
    pub spares: Arc<Semaphore>,
    /// Its sender goes when the pod is served no more.
    pub served: watch::Receiver<()>,
    /// Which of the pod's ports want IPv4 clients v4-mapped.
    pub mapped: Mutex<HashMap<u16, bool>>,
}

impl Pod {
    fn new(workload: Arc<Workload>, netns: Netns, served: watch::Receiver<()>) -> Self {
        let places = |count| Arc::new(Semaphore::new(count));
        Self {
            workload,
            netns,
            outbound: places(PENDING),
            inbound: places(PENDING),
            turns: Turns::default(),
            pool: Pool::default(),
            spares: places(SPARES),
            served,
            mapped: Mutex::default(),
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum EnrolError {
    #[error("the network namespace {path} cannot be entered")]
    Netns { path: String, source: io::Error },
    #[error("no listeners could be made in the pod")]
    Listen(#[source] io::Error),
    #[error(transparent)]
    Bpf(#[from] BpfError),
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    #[error("it is the same network namespace as {}, which another workload has; give each pod its own", .0.display())]
    SameNetns(PathBuf),
    #[error("there is no certificate for {id} yet{}", .why.as_ref().map(|why| format!(": {why}")).unwrap_or_default())]
    NoSvid { id: crate::identity::SpiffeId, why: Option<String> },
    #[error("serving it has panicked, which is a fault of the agent: its log says more")]
    Panicked,
}

#[derive(Debug, Clone, Serialize)]
pub struct PodStatus {
    pub namespace: String,
    pub name: String,
    pub netns: String,
    pub identity: String,
    pub state: PodState,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The namespace that is served, where the pod is ready: another may be at its path by now.
    #[serde(skip)]
    pub served: Option<NetnsCookie>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum PodState {
    Ready,
    /// Enrolled and closed: nothing goes in or out.
    Refused,
}

/// What is to be seen of a pod from outside.
#[derive(Clone)]
pub struct Status(Arc<Mutex<PodStatus>>);

impl Status {
    pub fn new(local: &LocalPod) -> Self {
        Self(Arc::new(Mutex::new(PodStatus {
            namespace: local.workload.namespace.clone(),
            name: local.workload.name.clone(),
            netns: local.netns.display().to_string(),
            identity: local.workload.id.to_string(),
            state: PodState::Refused,
            reason: Some("not enrolled yet".into()),
            served: None,
        })))
    }

    pub fn get(&self) -> PodStatus {
        lock(&self.0).clone()
    }

    fn ready(&self, cookie: NetnsCookie) {
        let mut status = lock(&self.0);
        (status.state, status.reason, status.served) = (PodState::Ready, None, Some(cookie));
    }

    fn refuse(&self, reason: String) {
        let mut status = lock(&self.0);
        (status.state, status.reason, status.served) = (PodState::Refused, Some(reason), None);
    }
}

/// What is to become of a pod that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Serve,
    /// Close it: it is not in the mesh any more, or is served anew, as another workload or with other addresses.
    Close,
}

/// Whether nothing has changed by which a pod is captured. What else may change, as labels, connections take from the state.
pub(super) fn is_same(before: &LocalPod, now: &LocalPod) -> bool {
    let by = |local: &LocalPod| {
        let Workload { namespace, name, id, addresses, .. } = &*local.workload;
        (local.netns.clone(), namespace.clone(), name.clone(), id.clone(), addresses.clone())
    };
    by(before) == by(now)
}

/// Serves the pod until it is ordered otherwise, whatever happens to its namespace meanwhile. Returns the namespace that stays closed.
pub(super) async fn run(
    ctx: Arc<Context>,
    local: Arc<LocalPod>,
    status: Status,
    mut order: watch::Receiver<Order>,
) -> Option<NetnsCookie> {
    let (mut tries, mut held) = (0, None);
    loop {
        let pause = match contained(serve(&ctx, &local, &status, &mut order, &mut held)).await {
            Ok(Left::Ordered) => break,
            Ok(Left::Replaced) => {
                tries = 0;
                Duration::ZERO
            }
            Err(error) => {
                let text = with_causes(&error);
                tracing::warn!(pod = %local.netns.display(), identity = %local.workload.id, "pod is refused: {text}");
                status.refuse(text);
                RETRY[tries.min(RETRY.len() - 1)]
            }
        };
        ctx.pods_changed.send_modify(|count| *count += 1);
        tries += 1;
        let id = &local.workload.id;
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            // What was missing may be here sooner.
            () = ctx.identities.until_held(id), if ctx.identities.svid(id).is_none() => {}
            _ = order.wait_for(|order| *order != Order::Serve) => break,
        }
    }
    held
}

/// A panic leaves the pod closed, as any failure does: it is shown, and tried again.
async fn contained<T>(serving: impl Future<Output = Result<T, EnrolError>>) -> Result<T, EnrolError> {
    let mut serving = std::pin::pin!(serving);
    poll_fn(|task| {
        let polled = catch_unwind(AssertUnwindSafe(|| serving.as_mut().poll(task)));
        polled.unwrap_or(Poll::Ready(Err(EnrolError::Panicked)))
    })
    .await
}

enum Left {
    /// Ordered to end; the pod is closed.
    Ordered,
    /// The path leads to another namespace now; the old one stays closed, for its processes may live.
    Replaced,
}

async fn serve(
    ctx: &Arc<Context>,
    local: &Arc<LocalPod>,
    status: &Status,
    order: &mut watch::Receiver<Order>,
    held: &mut Option<NetnsCookie>,
) -> Result<Left, EnrolError> {
    let netns = open(local)?;
    let _served = Served::claim(ctx, netns.cookie(), &local.netns)?;
    let before = held.replace(netns.cookie()).filter(|before| *before != netns.cookie());
    ctx.closed.replace(&local.netns, netns.cookie(), before);
    let addresses = &local.workload.addresses;
    ctx.capture.refuse(&netns)?;
    ctx.capture.cover(&netns, addresses, |owner| lock(&ctx.served).contains_key(&owner))?;
    kubelet::declare(ctx, netns.cookie(), &local.netns);
    let id = &local.workload.id;
    tokio::select! {
        () = ctx.identities.until_held(id) => {}
        () = tokio::time::sleep(FIRST_CERTIFICATE) => {
            return Err(EnrolError::NoSvid { id: id.clone(), why: ctx.identities.last_error(id) });
        }
        _ = order.wait_for(|order| *order != Order::Serve) => return Ok(Left::Ordered),
    }
    let (serving, served) = watch::channel(());
    let pod = Arc::new(Pod::new(local.workload.clone(), netns, served));
    let _spares = SparesOf(&pod, serving);
    let listeners = Listeners::open(&pod.netns, ctx.settings.dead_peer).map_err(EnrolError::Listen)?;
    let captured = listeners.for_capture(&pod.netns, addresses).map_err(EnrolError::Listen)?;
    let enrolment = ctx.capture.enrol(&captured)?;

    // Dropped with this function's end: the loops end with it, connections that live go on.
    let mut loops = JoinSet::new();
    let mut families = vec![Family::V4];
    families.extend(listeners.outbound6.is_some().then_some(Family::V6));
    let Listeners { outbound4, outbound6, inbound4, inbound4_mapped, inbound6 } = listeners;
    for listener in [Some(outbound4), outbound6].into_iter().flatten() {
        loops.spawn(accept(
            ctx.clone(),
            pod.clone(),
            listener,
            pod.outbound.clone(),
            |ctx, pod, stream, client, turn| {
                tokio::spawn(outbound::serve(ctx, pod, stream, client, turn));
            },
        ));
    }
    for listener in [Some(inbound4), inbound4_mapped, inbound6].into_iter().flatten() {
        loops.spawn(accept(
            ctx.clone(),
            pod.clone(),
            listener,
            pod.inbound.clone(),
            |ctx, pod, stream, client, turn| {
                tokio::spawn(inbound::serve(ctx, pod, stream, client, turn));
            },
        ));
    }
    let probed = ProbedPod { netns: &pod.netns, outbound: &families, addresses };
    tokio::select! {
        tested = ctx.selftest.run(&probed) => tested?,
        _ = order.wait_for(|order| *order != Order::Serve) => return Ok(Left::Ordered),
    }
    enrolment.ready()?;
    let enrolled = Enrolled::new(ctx, &pod).await;
    let named = format!("{}/{}", local.workload.namespace, local.workload.name);
    let hooked = PodNetns { cookie: pod.netns.cookie(), path: local.netns.clone(), pod: named };
    let captured = Captured::new(ctx, hooked);
    status.ready(pod.netns.cookie());
    ctx.pods_changed.send_modify(|count| *count += 1);
    tracing::info!(pod = %local.netns.display(), identity = %local.workload.id, "pod is captured");
    let left = loop {
        tokio::select! {
            _ = order.wait_for(|order| *order != Order::Serve) => break Left::Ordered,
            // An accept loop never ends; if one panicked the pod is served anew.
            _ = loops.join_next() => break Left::Replaced,
            () = tokio::time::sleep(LOOK) => {
                let elsewhere = !pod.netns.is_at(&local.netns).unwrap_or(false);
                // An empty file, or none, is what a namespace that has lost its name leaves.
                if elsewhere && open(local).is_ok_and(|now| now.cookie() != pod.netns.cookie()) {
                    tracing::info!(pod = %local.netns.display(), "the pod's namespace was replaced");
                    break Left::Replaced;
                }
            }
        }
    };
    drop((enrolled, captured));
    status.refuse("being enrolled anew".into());
    enrolment.hold()?;
    Ok(left)
}

/// That this pod and no other is served for a namespace, as long as it lives.
struct Served<'a>(&'a Context, NetnsCookie);

impl<'a> Served<'a> {
    fn claim(ctx: &'a Context, cookie: NetnsCookie, path: &Path) -> Result<Self, EnrolError> {
        match lock(&ctx.served).entry(cookie) {
            Entry::Occupied(other) => Err(EnrolError::SameNetns(other.get().clone())),
            Entry::Vacant(free) => {
                free.insert(path.to_path_buf());
                Ok(Self(ctx, cookie))
            }
        }
    }
}

impl Drop for Served<'_> {
    fn drop(&mut self) {
        lock(&self.0.served).remove(&self.1);
    }
}

/// That a pod's spare connections may be used, as long as it lives: those to it hear of its sender's end.
struct SparesOf<'a>(&'a Pod, #[expect(dead_code, reason = "dropping it is what it is for")] watch::Sender<()>);

impl Drop for SparesOf<'_> {
    fn drop(&mut self) {
        self.0.pool.close();
    }
}

/// That a pod is ready, and its namespace's hook must be there, as long as it lives.
struct Captured<'a>(&'a Context, NetnsCookie);

impl<'a> Captured<'a> {
    fn new(ctx: &'a Context, pod: PodNetns) -> Self {
        let cookie = pod.cookie;
        lock(&ctx.captured).insert(cookie, pod);
        Self(ctx, cookie)
    }
}

impl Drop for Captured<'_> {
    fn drop(&mut self) {
        lock(&self.0.captured).remove(&self.1);
    }
}

fn open(local: &LocalPod) -> Result<Netns, EnrolError> {
    Netns::open(&local.netns).map_err(|source| EnrolError::Netns { path: local.netns.display().to_string(), source })
}

/// A place among the connections of a pod that are not established yet.
pub(super) type Turn = OwnedSemaphorePermit;

async fn accept(
    ctx: Arc<Context>,
    pod: Arc<Pod>,
    listener: TcpListener,
    turns: Arc<Semaphore>,
    serve: fn(Arc<Context>, Arc<Pod>, TcpStream, ClientAddr, Turn),
) {
    loop {
        // Nobody closes the semaphore.
        let Ok(turn) = turns.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, client)) => serve(ctx.clone(), pod.clone(), stream, ClientAddr(client), turn),
            Err(error) => {
                // Out of descriptors or memory: what waits in the queue waits a little longer.
                tracing::error!(%error, pod = %pod.netns.path().display(), "no connection can be accepted");
                tokio::time::sleep(BREATH).await;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        identity::{SpiffeId, TrustDomain},
        policy::Labels,
    };

    fn local(name: &str, address: &str, label: &str, zone: &str) -> LocalPod {
        let workload = Workload {
            name: name.into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            id: SpiffeId::new(&TrustDomain::default(), "shop", "web").unwrap(),
            addresses: vec![address.parse().unwrap()],
            in_mesh: true,
            labels: Labels::from([("role", label)]),
            host: Workload::host_of(name, "shop"),
        };
        LocalPod { workload: Arc::new(workload), netns: "/run/netns/web".into(), zone: Some(zone.into()) }
    }

    #[test]
    fn labels_and_zone_may_change_under_a_pod_that_is_served_and_nothing_else_may() {
        let before = local("web", "10.0.0.1", "replica", "r/a");
        assert!(is_same(&before, &local("web", "10.0.0.1", "primary", "r/a")));
        assert!(is_same(&before, &local("web", "10.0.0.1", "replica", "r/b")));
        assert!(!is_same(&before, &local("web", "10.0.0.2", "replica", "r/a")));
        assert!(!is_same(&before, &local("other", "10.0.0.1", "replica", "r/a")));
        let moved = LocalPod { netns: "/run/netns/other".into(), ..local("web", "10.0.0.1", "replica", "r/a") };
        assert!(!is_same(&before, &moved));
        let mut other = (*before.workload).clone();
        other.id = SpiffeId::new(&TrustDomain::default(), "shop", "db").unwrap();
        let other = LocalPod { workload: Arc::new(other), ..local("web", "10.0.0.1", "replica", "r/a") };
        assert!(!is_same(&before, &other));
    }

    #[tokio::test]
    async fn a_panic_is_a_failure_that_is_shown_and_tried_again() {
        let panics = async {
            tokio::task::yield_now().await;
            if true {
                panic!("a fault");
            }
            Ok(())
        };
        assert!(matches!(contained(panics).await, Err(EnrolError::Panicked)));
        assert!(matches!(contained(async { Ok(7) }).await, Ok(7)));
    }
}
