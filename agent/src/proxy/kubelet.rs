//! The kubelet's own connections to local pods: which ports it may probe is told to the kernel programs, which let it through to the
//! application, past the agent; what they tell of its connections afterwards becomes the records that others have.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, atomic::Ordering},
    time::{Duration, Instant, SystemTime},
};

use tokio::time::MissedTickBehavior;

use super::{Context, account::Account, connections::lock, identify};
use crate::{
    bpf::EndedProbe,
    state::Snapshot,
    sys::netns::NetnsCookie,
    words::{Direction, Endpoint, Mode, Path as Way, with_causes},
};

const LOOK: Duration = Duration::from_secs(1);
/// Each probe that comes from another port would be a line, every few seconds for each pod.
const SAID_FOR: Duration = Duration::from_mins(10);

/// What was declared, and for which pod, by its path. It stays while the pod is wanted, also when it is not served for a while.
pub(super) type Declared = Mutex<HashMap<NetnsCookie, (PathBuf, Arc<[u16]>)>>;

/// For a pod that is being served, before it is opened.
pub(super) fn declare(ctx: &Context, cookie: NetnsCookie, path: &Path) {
    let mut declared = lock(&ctx.declared);
    let ports = of(&ctx.state.load(), path);
    // What was there before is gone, or another namespace.
    for (old, _) in declared.extract_if(|other, (at, _)| at == path && *other != cookie) {
        tell(ctx, old, &[]);
    }
    // What could not be told is tried again with the next change.
    let told = if tell(ctx, cookie, &ports) { ports } else { Arc::default() };
    declared.insert(cookie, (path.to_path_buf(), told));
}

/// For all that were declared, as the present state has it.
pub(super) fn follow(ctx: &Context) {
    let mut declared = lock(&ctx.declared);
    let snapshot = ctx.state.load();
    declared.retain(|cookie, (path, ports)| {
        let now = of(&snapshot, path);
        if *now != **ports && tell(ctx, *cookie, &now) {
            *ports = now;
        }
        // What could not be taken back is tried again with the next change.
        !ports.is_empty() || snapshot.local.iter().any(|local| local.netns == *path)
    });
}

/// Writes down the connections that have ended.
pub(super) async fn run(ctx: Arc<Context>) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut said: Option<Instant> = None;
    loop {
        tick.tick().await;
        match ctx.capture.ended_probes() {
            Ok(ended) => {
                ended.admitted.iter().for_each(|probe| record(&ctx, probe));
                let due = said.is_none_or(|said| said.elapsed() > SAID_FOR);
                if let Some(probe) = ended.translated.first().filter(|_| due) {
                    said = Some(Instant::now());
                    warn(probe);
                }
            }
            Err(error) => tracing::error!("the kubelet's connections cannot be read: {}", with_causes(&error)),
        }
    }
}

/// The agent's record of it is that of any plaintext: who it was is known only on this side of the translation.
fn warn(probe: &EndedProbe) {
    tracing::warn!(
        from = %probe.client,
        to = %probe.server,
        "the node's NAT gives the kubelet's probes another source port, by which they are not known: where plaintext is refused, they are. Exempt what the \
         node itself sends to its pods from masquerading (kube-proxy: masqueradeAll: false); marline_capture_refusals_total, \
         reason kubelet_translated, counts them"
    );
}

/// Nothing for what is no local pod any more.
fn of(snapshot: &Snapshot, path: &Path) -> Arc<[u16]> {
    snapshot.probes.get(path).map(Arc::clone).unwrap_or_default()
}

fn tell(ctx: &Context, cookie: NetnsCookie, ports: &[u16]) -> bool {
    let told = ctx.capture.declare_probes(cookie, ports);
    if let Err(error) = &told {
        tracing::error!(
            netns = cookie.0,
            "the kubelet's probes of a pod cannot be let in, or not kept out: {}",
            with_causes(error)
        );
    }
    told.is_ok()
}

fn record(ctx: &Context, probe: &EndedProbe) {
    let now = SystemTime::now();
    let since = now.checked_sub(probe.ago + probe.lasted).unwrap_or(now);
    let mut account = Account::resume(ctx, Direction::Inbound, since);
    account.count();
    let snapshot = ctx.state.load();
    let workload = snapshot.workload(probe.server.ip());
    let live = &account.live;
    live.learn(|facts| {
        // Nobody has proved anything in TLS: it has no identity.
        facts.source = Endpoint { address: Some(probe.client), ..Endpoint::default() };
        facts.destination = identify::of(workload.map(|workload| &**workload), probe.server);
        facts.served = workload.cloned();
        facts.mode = Some(Mode::Plaintext);
        facts.records = Some("plaintext");
        facts.path = Some(Way::Direct);
    });
    live.moved.sent.store(probe.sent, Ordering::Relaxed);
    live.moved.received.store(probe.received, Ordering::Relaxed);
    account.probed(probe.ago, probe.established);
}
