//! One record per connection, written when its account is dropped, whatever the way it ended: to the metrics and to the access
//! log. The facts are gathered by the stages as they learn them.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use super::{
    Context,
    connections::{self, Connections, Facts, Live},
    identify,
    offload::Records,
    pump::PumpError,
    target::{InUse, Slot, Target},
};
use crate::{
    access_log::{AccessLog, Record},
    metrics::{Ended, Metrics, Progress, ResponseFlags, Seen},
    state::State,
    words::{Direction, Endpoint, KUBELET_PROBE, Mode, Path, with_causes},
};

pub struct Account {
    pub live: Arc<Live>,
    connections: Connections,
    state: State,
    metrics: Arc<Metrics>,
    log: AccessLog,
    end: End,
    /// Counted at an endpoint of a service.
    load: Option<(InUse, Option<Arc<Slot>>)>,
    /// Whether it has become a connection: an attempt that gave way to another leaves no trace.
    counted: bool,
}

enum End {
    /// Dropped on the way: its task was ended with the agent or the pod.
    Abandoned,
    Refused {
        reason: &'static str,
        text: String,
    },
    Closed,
    /// The kubelet's own, which the kernel programs have let in and told of so long after its end.
    Probed {
        ago: Duration,
        established: bool,
    },
    Failed {
        reason: &'static str,
        text: String,
    },
}

impl Account {
    pub fn open(ctx: &Context, direction: Direction) -> Self {
        let mut account = Self::attempt(ctx, direction);
        account.count();
        account
    }

    /// Of something that may give way to the proxied path, which then has an account of its own.
    pub fn attempt(ctx: &Context, direction: Direction) -> Self {
        Self::resume(ctx, direction, SystemTime::now())
    }

    /// Of a connection that an earlier agent has made.
    pub fn resume(ctx: &Context, direction: Direction, since: SystemTime) -> Self {
        Self {
            live: ctx.connections.open(direction, since),
            connections: ctx.connections.clone(),
            state: ctx.state.clone(),
            metrics: ctx.metrics.clone(),
            log: ctx.log.clone(),
            end: End::Abandoned,
            load: None,
            counted: false,
        }
    }

    /// An attempt has become a connection.
    pub fn count(&mut self) {
        if !std::mem::replace(&mut self.counted, true) {
            self.metrics.pending.inc();
        }
    }

    /// It is a connection that no application has come for yet, and leaves no trace until one does. What is known of it is given back.
    pub fn set_aside(mut self) -> Facts {
        if std::mem::replace(&mut self.counted, false) {
            self.metrics.pending.dec();
        }
        self.live.facts()
    }

    /// It is known who talks to whom: from here on it counts as opened. What was moved until now was counted by an earlier agent.
    fn opened(&self, established: bool) {
        if self.live.is_counted() {
            return;
        }
        let facts = self.live.facts();
        let seen = Seen {
            direction: self.live.direction,
            source: &facts.source,
            destination: &facts.destination,
            service: facts.service.as_deref(),
            mode: facts.mode.or(facts.tls.as_ref().map(|_| Mode::Mtls)),
            proved: facts.proved.as_ref(),
        };
        let since = Progress { updates_sent: 0, updates_received: 0, ..self.live.progress() };
        let established = facts.mode.filter(|_| established);
        self.live.count(self.metrics.opened(&self.state.load(), &seen, established, since));
        self.metrics.pending.dec();
    }

    /// A direct connection that an earlier agent has made, and of which all is known that it left.
    pub fn adopted(&self) {
        self.opened(true);
    }

    /// It is on its way there. An endpoint of a service counts it for as long as this lives.
    pub fn aims_at(&mut self, ctx: &Context, target: &Target) {
        self.load = target.service.is_some().then(|| (ctx.loads.taken(target), target.slot.clone()));
        self.live.learn(|facts| {
            facts.destination = identify::of(target.workload.as_deref(), target.address);
            facts.service = target.service.as_ref().map(|service| service.host.clone());
            facts.called = target.service.is_some().then_some(target.called);
        });
    }

    /// The application has the connection itself.
    pub fn handed_over(&mut self, records: &'static str) {
        self.count();
        self.live.learn(|facts| {
            facts.mode = Some(Mode::Mtls);
            facts.records = Some(records);
            facts.path = Some(Path::Direct);
            facts.path_reason = None;
        });
        self.opened(true);
        self.metrics.carried(self.live.direction, Mode::Mtls, records, Path::Direct, None);
    }

    /// A direct connection ended while no agent was there to see it: how much it carried is not known.
    pub fn unobserved(mut self) {
        let text = "it ended while no agent ran".to_owned();
        self.end = End::Failed { reason: "unobserved", text };
    }

    pub fn offloaded(&self, mode: Mode, records: &Records) {
        let pump = records.pump();
        let mut why = None;
        self.live.learn(|facts| {
            facts.mode = Some(mode);
            facts.records = Some(records.name_in(mode));
            facts.pump = Some(pump);
            facts.path = Some(Path::Proxied);
            why = facts.path_reason;
        });
        if let Some(session) = records.session() {
            self.live.keyed_by(session);
        }
        self.opened(true);
        self.metrics.carried(self.live.direction, mode, records.name_in(mode), Path::Proxied, why);
    }

    /// Nothing of the application's was let through. Writes a warning that names the reason and both ends.
    pub fn refused(mut self, reason: &'static str, error: &(dyn std::error::Error + 'static)) {
        let text = with_causes(error);
        self.warn("refused", reason, &text);
        self.end = End::Refused { reason, text };
    }

    /// It was the kubelet's, and ended a while ago.
    pub fn probed(mut self, ago: Duration, established: bool) {
        self.opened(true);
        self.metrics.carried(self.live.direction, Mode::Plaintext, "plaintext", Path::Direct, None);
        self.end = End::Probed { ago, established };
    }

    pub fn finished(mut self, result: &Result<(), PumpError>) {
        self.end = match result {
            Ok(()) => End::Closed,
            Err(error) => End::Failed { reason: error.reason(), text: with_causes(error) },
        };
        if let End::Failed { reason, text } = &self.end
            && !matches!(*reason, "application_reset" | "peer_reset")
        {
            self.warn("cut", reason, text);
        }
    }

    fn warn(&self, what: &str, reason: &str, text: &str) {
        let facts = self.live.facts();
        tracing::warn!(
            direction = self.live.direction.as_str(),
            source = %describe(&facts.source),
            destination = %describe(&facts.destination),
            reason,
            "connection {what}: {text}"
        );
    }
}

impl Drop for Account {
    fn drop(&mut self) {
        if !self.counted {
            self.connections.close(&self.live);
            return;
        }
        let facts = self.live.facts();
        let (verdict, reason, close) = match &self.end {
            End::Abandoned => {
                let verdict = if facts.mode.is_some() { "allowed" } else { "refused" };
                (verdict, Some("abandoned"), "its task was ended".to_owned())
            }
            End::Refused { reason, text } => ("refused", Some(*reason), text.clone()),
            End::Closed => ("allowed", None, "closed".to_owned()),
            End::Probed { established, .. } => {
                let close = if *established { "closed" } else { "the application did not take it" };
                ("allowed", Some(KUBELET_PROBE), close.to_owned())
            }
            End::Failed { reason, text } => ("allowed", Some(*reason), text.clone()),
        };
        let (direction, refused) = (self.live.direction, verdict == "refused");
        let flags = ResponseFlags::of(direction, refused, reason);
        // What was refused is opened and closed at once.
        self.opened(false);
        let progress = self.live.progress();
        if let Some(open) = self.live.counted() {
            open.close(flags, progress);
        }
        let policy = facts.policy.as_deref();
        self.metrics.ended(direction, &Ended { mode: facts.mode, verdict, reason, policy });
        let ago = if let End::Probed { ago, .. } = self.end { ago } else { Duration::ZERO };
        let lasted = self.live.started.elapsed().saturating_sub(ago);
        let duration_ms = u64::try_from(lasted.as_millis()).unwrap_or(u64::MAX);
        // Remembered before it is gone from those that live: who asks for both in this order misses none.
        self.connections.remember(connections::Ended {
            id: self.live.id,
            direction: self.live.direction,
            started_ms: since_epoch_ms(self.live.since),
            duration_ms,
            bytes_sent: progress.sent,
            bytes_received: progress.received,
            verdict,
            reason,
            close: close.clone(),
            facts: facts.clone(),
            wire: self.live.ends(),
        });
        self.connections.close(&self.live);
        self.log.write(&Record {
            time: self.live.since,
            end: SystemTime::now().checked_sub(ago).unwrap_or(self.live.since),
            direction: self.live.direction,
            source: &facts.source,
            destination: &facts.destination,
            service: facts.service.as_deref(),
            mode: facts.mode,
            records: facts.records.unwrap_or("none"),
            pump: facts.pump,
            path: facts.path,
            path_reason: facts.path_reason,
            verdict,
            reason,
            policy: facts.policy.as_deref(),
            audit: facts.audit.as_deref(),
            dry_run: facts.dry_run.as_deref(),
            close: &close,
            response_flags: flags,
            bytes_sent: progress.sent,
            bytes_received: progress.received,
            duration_ms,
            tls: facts.tls.as_ref(),
        });
    }
}

fn since_epoch_ms(time: SystemTime) -> u64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

fn describe(end: &Endpoint) -> String {
    let address = end.address.map_or_else(|| "unknown address".to_owned(), |address| address.to_string());
    match &end.identity {
        Some(identity) => format!("{address} ({identity})"),
        None => address,
    }
}
