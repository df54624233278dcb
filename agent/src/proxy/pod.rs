//! One local pod: its namespace, its listeners, and the loops that accept from them. A pod is captured first, closed, then
//! self-tested, and only then opened; whatever fails leaves it closed and is tried again.

use std::{
    collections::hash_map::Entry,
    io,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use serde::Serialize;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use super::{
    Context, account::with_causes, capture::Listeners, connections::lock, identify::ClientAddr, inbound, outbound,
};
use crate::{
    bpf::{
        BpfError,
        selftest::{Family, ProbedPod, SelfTestError},
    },
    policy::Workload,
    state::LocalPod,
    sys::netns::{Netns, NetnsCookie},
};

const RETRY: [Duration; 4] =
    [Duration::from_millis(200), Duration::from_secs(1), Duration::from_secs(3), Duration::from_secs(10)];
/// How often to see whether the pod's path still leads to the same namespace.
const LOOK: Duration = Duration::from_secs(2);

/// A pod that is served.
pub struct Pod {
    pub workload: Arc<Workload>,
    pub netns: Netns,
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
    #[error("there is no certificate for {0} yet")]
    NoSvid(crate::identity::SpiffeId),
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
        })))
    }

    pub fn get(&self) -> PodStatus {
        lock(&self.0).clone()
    }

    fn set(&self, state: PodState, reason: Option<String>) {
        let mut status = lock(&self.0);
        (status.state, status.reason) = (state, reason);
    }
}

/// Serves the pod until `stop`, whatever happens to its namespace meanwhile; then lets go of it.
pub async fn run(ctx: Arc<Context>, local: Arc<LocalPod>, status: Status, mut stop: watch::Receiver<bool>) {
    let mut tries = 0;
    loop {
        let pause = match serve(&ctx, &local, &status, &mut stop).await {
            Ok(Left::Stopped) => return,
            Ok(Left::Replaced) => {
                tries = 0;
                Duration::ZERO
            }
            Err(error) => {
                let text = with_causes(&error);
                tracing::warn!(pod = %local.netns.display(), identity = %local.workload.id, "pod is refused: {text}");
                status.set(PodState::Refused, Some(text));
                ctx.pods_changed.send_modify(|count| *count += 1);
                RETRY[tries.min(RETRY.len() - 1)]
            }
        };
        tries += 1;
        tokio::select! {
            () = tokio::time::sleep(pause) => {}
            _ = stop.wait_for(|stop| *stop) => {
                withdraw(&ctx, &local);
                return;
            }
        }
    }
}

enum Left {
    /// The pod is no longer wanted.
    Stopped,
    /// The path leads to another namespace now.
    Replaced,
}

async fn serve(
    ctx: &Arc<Context>,
    local: &Arc<LocalPod>,
    status: &Status,
    stop: &mut watch::Receiver<bool>,
) -> Result<Left, EnrolError> {
    let netns = open(local)?;
    let _served = Served::claim(ctx, netns.cookie(), &local.netns)?;
    ctx.capture.refuse(&netns)?;
    if ctx.svid(&local.workload.id).is_err() {
        return Err(EnrolError::NoSvid(local.workload.id.clone()));
    }
    let pod = Arc::new(Pod { workload: local.workload.clone(), netns });
    let listeners = Listeners::open(&pod.netns).map_err(EnrolError::Listen)?;
    let addresses = &pod.workload.addresses;
    let captured = listeners.for_capture(&pod.netns, addresses).map_err(EnrolError::Listen)?;
    let enrolment = ctx.capture.enrol(&captured)?;

    // Dropped with this function's end: the loops end with it, connections that live go on.
    let mut loops = JoinSet::new();
    let mut families = vec![Family::V4];
    families.extend(listeners.outbound6.is_some().then_some(Family::V6));
    let Listeners { outbound4, outbound6, inbound4, inbound6 } = listeners;
    for listener in [Some(outbound4), outbound6].into_iter().flatten() {
        loops.spawn(accept(ctx.clone(), pod.clone(), listener, |ctx, pod, stream, client| {
            tokio::spawn(outbound::serve(ctx, pod, stream, client));
        }));
    }
    for listener in [Some(inbound4), inbound6].into_iter().flatten() {
        loops.spawn(accept(ctx.clone(), pod.clone(), listener, |ctx, pod, stream, client| {
            tokio::spawn(inbound::serve(ctx, pod, stream, client));
        }));
    }
    ctx.selftest.run(&ProbedPod { netns: &pod.netns, outbound: &families, addresses }).await?;
    enrolment.ready()?;
    status.set(PodState::Ready, None);
    ctx.pods_changed.send_modify(|count| *count += 1);
    tracing::info!(pod = %local.netns.display(), identity = %local.workload.id, "pod is captured");
    loop {
        tokio::select! {
            _ = stop.wait_for(|stop| *stop) => {
                ctx.capture.withdraw(pod.netns.cookie())?;
                tracing::info!(pod = %local.netns.display(), "pod has left the mesh");
                return Ok(Left::Stopped);
            }
            () = tokio::time::sleep(LOOK) => {
                if open(local).is_ok_and(|now| now.cookie() != pod.netns.cookie()) {
                    tracing::info!(pod = %local.netns.display(), "the pod's namespace was replaced");
                    ctx.capture.withdraw(pod.netns.cookie())?;
                    return Ok(Left::Replaced);
                }
            }
        }
    }
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

fn open(local: &LocalPod) -> Result<Netns, EnrolError> {
    Netns::open(&local.netns).map_err(|source| EnrolError::Netns { path: local.netns.display().to_string(), source })
}

/// A pod that is removed while it could not be served.
fn withdraw(ctx: &Context, local: &LocalPod) {
    if let Ok(netns) = open(local)
        && let Err(error) = ctx.capture.withdraw(netns.cookie())
    {
        tracing::error!(%error, pod = %local.netns.display(), "the pod could not be let go");
    }
}

async fn accept(
    ctx: Arc<Context>,
    pod: Arc<Pod>,
    listener: TcpListener,
    serve: fn(Arc<Context>, Arc<Pod>, TcpStream, ClientAddr),
) {
    loop {
        match listener.accept().await {
            Ok((stream, client)) => serve(ctx.clone(), pod.clone(), stream, ClientAddr(client)),
            Err(error) => {
                // Out of descriptors or memory: what waits in the queue waits a little longer.
                tracing::error!(%error, pod = %pod.netns.path().display(), "no connection can be accepted");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}
