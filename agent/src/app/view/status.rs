//! `/status`, `/connections/ended` and `/explain`: what an agent tells of itself for `marline status` and `marline check`, gathered from the
//! rooms that know it. Judging it is left to those commands.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::SystemTime,
};

use serde_json::{Value, json};

use super::Gathered;
use crate::{
    admin::{
        self,
        status::{Authority, Capture, Configuration, Hook, Keeper, Kernel, Listeners, Map, Pod, Reload, Status},
    },
    bpf::{PodNetns, facts::cgroup_fault},
    config::{AgentConfig, ConfigErrors, Finding, RecordsMode},
    control::{files::ReloadObserver, trust::LastRefusal},
    metrics::Metrics,
    proxy::PodState,
    state::explain::Question,
    sys::netns::Netns,
    words::PumpKind,
};

/// What the composition root knows and no room does.
pub(in crate::app) struct About {
    pub(in crate::app) started: SystemTime,
    pub(in crate::app) directory: PathBuf,
    pub(in crate::app) agent: AgentConfig,
    pub(in crate::app) reloads: Arc<Reloads>,
    pub(in crate::app) refusal: LastRefusal,
    pub(in crate::app) source: Option<super::source::Shown>,
}

/// Counts reloads, and remembers how the last one went.
pub(in crate::app) struct Reloads {
    metrics: Arc<Metrics>,
    last: Mutex<Last>,
}

#[derive(Clone, Default)]
struct Last {
    reload: Reload,
    warnings: Vec<String>,
    restart: Vec<String>,
}

impl Reloads {
    /// With what was read at the start.
    pub(in crate::app) fn new(metrics: Arc<Metrics>, warnings: &[Finding]) -> Self {
        let reload = Reload { at: seconds(SystemTime::now()), accepted: true, errors: Vec::new() };
        Self { metrics, last: Mutex::new(Last { reload, warnings: texts(warnings), restart: Vec::new() }) }
    }

    fn last(&self) -> MutexGuard<'_, Last> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReloadObserver for Reloads {
    fn accepted(&self, _generation: u64, warnings: &[Finding], restart: &[&'static str]) {
        *self.last() = Last {
            reload: Reload { at: seconds(SystemTime::now()), accepted: true, errors: Vec::new() },
            warnings: texts(warnings),
            restart: restart.iter().map(ToString::to_string).collect(),
        };
        self.metrics.reloaded(true);
    }

    fn rejected(&self, errors: &ConfigErrors) {
        self.last().reload = Reload { at: seconds(SystemTime::now()), accepted: false, errors: texts(&errors.errors) };
        self.metrics.reloaded(false);
    }
}

pub(super) fn status(shown: &Gathered) -> Value {
    let (ctx, about) = (shown.proxy.context(), &shown.about);
    let (snapshot, agent, last) = (ctx.state.load(), &about.agent, about.reloads.last().clone());
    let certificates = serde_json::from_value(json!(ctx.identities.list())).unwrap_or_default();
    json!(Status {
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
        started: seconds(about.started),
        not_ready: admin::View::ready(shown).err(),
        kernel: Kernel {
            release: crate::sys::release(),
            suites: ctx.kernel.suites.iter().map(|suite| format!("{suite:?}")).collect(),
            pump: if ctx.kernel.pump == PumpKind::Splice { "splice" } else { "copy" }.to_owned(),
            why: ctx.kernel.why.clone(),
            records: match agent.records.mode {
                RecordsMode::Auto => "auto",
                RecordsMode::Kernel => "kernel",
                RecordsMode::Userspace => "userspace",
            }
            .to_owned(),
        },
        capture: capture(shown),
        pods: pods(shown),
        keeper: match &ctx.direct {
            None => Keeper { mode: "off".into(), directory: None, connected: false, usable: false },
            Some(direct) => {
                let (directory, connected) = direct.keeper();
                let directory = Some(directory.to_path_buf());
                Keeper { mode: "auto".into(), directory, connected, usable: direct.usable() }
            }
        },
        authority: Authority {
            source: agent.ca.source.to_string(),
            refusal: about.refusal.lock().unwrap_or_else(PoisonError::into_inner).clone(),
        },
        certificates,
        configuration: Configuration {
            directory: about.directory.clone(),
            generation: snapshot.generation,
            mode: snapshot.policies.authentication.mesh_mode().to_string(),
            workloads: snapshot.workloads().len(),
            reload: last.reload,
            warnings: last.warnings,
            restart: last.restart,
        },
        source: about.source.as_ref().map(|source| source.facts(&snapshot)),
        listeners: Listeners { admin: agent.admin, metrics: agent.metrics, readiness: agent.readiness },
    })
}

/// The connections that have ended last, the oldest first.
pub(super) fn ended(shown: &Gathered) -> Value {
    json!(shown.proxy.context().connections.ended())
}

/// What becomes of a connection, by what is in force now.
pub(super) fn explain(shown: &Gathered, question: Question<'_>) -> Result<Value, String> {
    shown.proxy.context().state.load().answer(question).map(|answer| json!(answer))
}

fn capture(shown: &Gathered) -> Capture {
    let (capture, agent) = (&shown.proxy.context().capture, &shown.about.agent);
    let ready = shown.proxy.pods().into_iter().filter(|pod| pod.state == PodState::Ready);
    // One whose namespace is gone since has no hook to speak of: it is told of as a pod.
    let ready: Vec<_> = ready
        .filter_map(|pod| {
            let (cookie, name) = (Netns::open(&pod.netns).ok()?.cookie(), format!("{}/{}", pod.namespace, pod.name));
            Some(PodNetns { cookie, path: pod.netns.into(), pod: name })
        })
        .collect();
    let hooks = capture.hooks(&ready).into_iter();
    let maps = capture.occupancy().into_iter();
    let maps = maps.map(|(name, entries, capacity)| Map { name: name.to_owned(), entries, capacity });
    Capture {
        cgroup: agent.capture.cgroup.clone(),
        cgroup_fault: cgroup_fault(&agent.capture.cgroup),
        pin_path: agent.capture.pin_path.clone(),
        hooks: hooks.map(|hook| Hook { name: hook.name.to_owned(), target: hook.target, fault: hook.fault }).collect(),
        maps: maps.collect(),
    }
}

fn pods(shown: &Gathered) -> Vec<Pod> {
    let pod = |pod: crate::proxy::PodStatus| {
        let (ready, netns) = (pod.state == PodState::Ready, PathBuf::from(pod.netns));
        let gone = (ready && !netns.exists()).then(|| format!("its network namespace {} is gone", netns.display()));
        Pod {
            namespace: pod.namespace,
            name: pod.name,
            identity: pod.identity,
            netns,
            state: if ready { "ready" } else { "refused" }.to_owned(),
            reason: pod.reason.or(gone),
        }
    };
    shown.proxy.pods().into_iter().map(pod).collect()
}

fn texts(findings: &[Finding]) -> Vec<String> {
    findings.iter().map(ToString::to_string).collect()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default().as_secs()
}
