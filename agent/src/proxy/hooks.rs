//! Looks from time to time whether capture is effective still: what was attached may have been detached by somebody else. What is found
//! makes the agent not ready; which hooks there are is `bpf`'s to know.

use std::{sync::Arc, time::Duration};

use tokio::{task::spawn_blocking, time::MissedTickBehavior};

use super::{Context, connections::lock};
use crate::bpf::Hook;

const LOOK: Duration = Duration::from_secs(2);

pub(super) async fn run(ctx: Arc<Context>) {
    let mut tick = tokio::time::interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let looking = ctx.clone();
        if let Ok(found) = spawn_blocking(move || look(&looking)).await {
            let before = std::mem::replace(&mut *lock(&ctx.hooks), found.clone());
            if missing(&before) != missing(&found) {
                for (hook, why) in missing(&found) {
                    tracing::error!(
                        %hook,
                        "capture is not effective: {why}; restart the agent, which attaches it again"
                    );
                }
                ctx.pods_changed.send_modify(|count| *count += 1);
            }
        }
    }
}

/// A pod that is not ready has a reason of its own, and its hook may not be there yet.
fn look(ctx: &Context) -> Vec<Hook> {
    let served: Vec<_> = lock(&ctx.captured).values().cloned().collect();
    let found = ctx.capture.attached(&served);
    // One that has left meanwhile took its hook with it.
    let captured = lock(&ctx.captured);
    let left = |hook: &Hook| served.iter().any(|pod| !captured.contains_key(&pod.cookie) && hook.is_of(pod.cookie));
    found.into_iter().filter(|hook| hook.fault.is_none() || !left(hook)).collect()
}

/// Those that are not in force, as they are told of, and why.
pub(super) fn missing(hooks: &[Hook]) -> Vec<(String, &str)> {
    hooks
        .iter()
        .filter_map(|hook| Some((hook.fault.as_deref()?, hook)))
        .map(|(why, hook)| (hook.to_string(), why))
        .collect()
}
