//! The composition root: the only file that knows every room. Reads the configuration, starts the rooms in order, and stops
//! them when told to. Pods stay closed, not open, when it ends.

mod certificates;
mod enrol;
mod kubelet;
mod view;

use std::{io, path::PathBuf, sync::Arc, time::Duration};

use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::spawn_blocking,
};

use crate::{
    access_log::AccessLog,
    admin,
    bpf::{BpfError, Capture, CaptureSettings, Loader},
    cni::{self, CniError},
    config::{self, AgentConfig, ConfigErrors, DirectConfig, DirectMode, PumpMode, RecordsMode, SpareMode},
    control::{
        files::{self, WatchSettings},
        kubernetes::{Source, SourceError},
        trust::LastRefusal,
    },
    identity::{IdentityError, SpiffeId, TrustDomain, ca::Ca},
    logging::Levels,
    metrics::Metrics,
    proxy::{
        Parts, Proxy, Settings,
        direct::{Direct, DirectSettings},
        offload::{Capabilities, RecordsChoice},
        probe,
    },
    state::State,
    sys::vital::vital,
    tls::{
        config::{self as tls_config, WITHOUT_RECORDS},
        records::AES_GCM_BYTES,
    },
    words::PumpKind,
};
use view::status::{About, Reloads};

/// So often a successor looks whether it is its turn.
const TURN: Duration = Duration::from_millis(50);
/// How long the API server may take to list one object of each kind. The chart's `minReadySeconds` is twice as long, for what is done before.
pub const REHEARSAL: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum AppError {
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    #[error("the certificate authority")]
    Identity(#[from] IdentityError),
    #[error("the trust domain or the probe's identity")]
    Id(#[from] crate::identity::IdError),
    #[error("the API server as the source")]
    Source(#[from] SourceError),
    #[error("pods of this node")]
    Cni(#[from] CniError),
    #[error("capture")]
    Capture(#[from] BpfError),
    #[error(
        "spec.records.requireKtls is set and this kernel has no usable kernel TLS: {0}; load the module `tls`, or unset it"
    )]
    NoKtls(String),
    #[error("the access log {path}")]
    AccessLog { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Admin(#[from] admin::AdminError),
    #[error("a part of the agent ended by itself: {0}")]
    Ended(String),
    #[error("this agent could not follow the one that has this node, which goes on")]
    Rehearsal(#[source] Box<AppError>),
    #[error("signals")]
    Signal(#[source] io::Error),
    #[error("the asynchronous runtime")]
    Runtime(#[source] io::Error),
}

pub fn runtime() -> Result<tokio::runtime::Runtime, AppError> {
    // Threads that may wait are bounded for each pod: see `proxy::direct`. They are made when they are needed.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .max_blocking_threads(4096)
        .thread_name("marline")
        .build();
    runtime.map_err(AppError::Runtime)
}

/// What this kernel can do, without a configuration.
pub fn kernel_alone() -> Result<Capabilities, AppError> {
    runtime()?.block_on(probed())
}

/// Runs the agent until SIGTERM or SIGINT. With `wait` it first waits until the agent that has the pins, if one has, is gone.
pub async fn run(dir: PathBuf, levels: Levels, wait: bool) -> Result<(), AppError> {
    let started = std::time::SystemTime::now();
    // Beside the configuration, of which neither depends.
    tls_config::gather_entropy();
    let begun = Loader::begin();
    let mut terminate = signal(SignalKind::terminate()).map_err(AppError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(AppError::Signal)?;
    let loaded = config::load(&dir)?;
    files::log_warnings(&loaded.warnings);
    let agent = loaded.agent;
    raise_descriptor_limit();

    let metrics = Arc::new(Metrics::new());
    let log = AccessLog::open(agent.access_log.clone()).map_err(|source| {
        let path = agent.access_log.path.clone().unwrap_or_else(|| "-".into());
        AppError::AccessLog { path, source }
    })?;
    let certificates = certificates::Certificates::open(&agent)?;
    let kernel = kernel(&agent).await?;
    metrics
        .kernel
        .get_or_create(&[
            ("ktls", if kernel.suites.is_empty() { "no" } else { "yes" }),
            ("pump", if kernel.pump == PumpKind::Splice { "splice" } else { "copy" }),
            ("records", records_name(&agent)),
        ])
        .set(1);
    let identities = certificates.manager.clone();
    let place = CaptureSettings { cgroup: agent.capture.cgroup.clone(), pin_path: agent.capture.pin_path.clone() };
    let capture = tokio::select! {
        capture = captured(&place, begun, wait.then_some(&agent)) => capture?,
        _ = terminate.recv() => return Ok(()),
        _ = interrupt.recv() => return Ok(()),
    };
    let direct = match &agent.direct {
        DirectConfig { mode: DirectMode::Off, .. } => None,
        DirectConfig { keeper, hold, key_limit, .. } => {
            let keeper = keeper.clone().unwrap_or_else(|| crate::keeper::DIRECTORY.into());
            let settings =
                DirectSettings { keeper, hold: *hold, key_limit: key_limit.unwrap_or(u64::MAX).min(AES_GCM_BYTES) };
            Some(Direct::new(settings, &kernel))
        }
    };
    if WITHOUT_RECORDS {
        tracing::warn!("THIS BUILD DOES NOT ENCRYPT direct connections: it is for benches and tests alone");
    }
    let source = match &agent.kubernetes {
        None => None,
        Some(kubernetes) => Some(Source::open(kubernetes, agent.trust.domains.clone()).await?),
    };
    let enrolment = source.as_ref().map(|source| enrol::Enrolment::open(source, &agent)).transpose()?;
    let kubelet = kubelet::Kubelet::find(&agent, &capture)?;
    let shown_source = source.as_ref().zip(enrolment.clone()).zip(kubelet.clone());
    let shown_source =
        shown_source.map(|((source, enrolment), kubelet)| view::source::Shown::new(source, enrolment, kubelet));
    let state = State::new(loaded.snapshot);
    let proxy = Proxy::new(Parts {
        state: state.clone(),
        identities: identities.clone(),
        capture,
        kernel,
        settings: settings(&agent),
        metrics: metrics.clone(),
        log,
        direct,
    });

    let (stop, stopped) = watch::channel(false);
    let (reloads, refusal) = (Arc::new(Reloads::new(metrics.clone(), &loaded.warnings)), LastRefusal::default());
    let about = About {
        started,
        directory: dir.clone(),
        agent: agent.clone(),
        reloads: reloads.clone(),
        refusal: refusal.clone(),
        source: shown_source.clone(),
    };
    let shown: Arc<dyn admin::View> = Arc::new(view::Gathered::new(proxy.clone(), metrics.clone(), levels, about));
    let mut servers = admin::serve(&agent, &shown).await?;
    certificates.run(&mut servers, &agent, &metrics, refusal, &stopped);
    let (agent_kubernetes, enrolled) = (agent.kubernetes.clone(), stopped.clone());
    if let Some(source) = source {
        let (state, stopped) = (state.clone(), stopped.clone());
        servers.spawn(async move {
            source.run(state, stopped).await;
            Ok(())
        });
    }
    servers.spawn({
        async move {
            files::watch(dir, agent, state, reloads, WatchSettings::default(), stopped).await;
            Ok(())
        }
    });
    if let (Some(enrolment), Some(kubernetes)) = (&enrolment, &agent_kubernetes) {
        let socket = kubernetes.cni.socket.clone();
        let (listener, enroller) = (cni::server::listen(&socket)?, enrolment.enroller(proxy.clone()));
        let stopped = enrolled.clone();
        servers.spawn(async move {
            cni::server::serve(listener, socket, enroller, stopped).await;
            Ok(())
        });
    }
    if let Some(kubelet) = kubelet {
        tokio::spawn(vital(kubelet.run()));
    }
    servers.spawn({
        let (proxy, source) = (proxy.clone(), shown_source.clone());
        async move {
            known(source).await;
            if let Some(enrolment) = enrolment {
                enrolment.settle().await;
                tokio::spawn(enrolment.run(enrolled));
            }
            proxy.run().await;
            Ok(())
        }
    });
    let announced = tokio::spawn(announce(proxy.clone(), shown_source));

    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        Some(ended) = servers.join_next() => return Err(match ended {
            Ok(Ok(())) => AppError::Ended("it returned".into()),
            Ok(Err(error)) => error.into(),
            Err(error) => AppError::Ended(error.to_string()),
        }),
    }
    tracing::info!("stopping; enrolled pods stay closed until an agent runs again");
    proxy.rest().await;
    stop.send_replace(true);
    announced.abort();
    Ok(())
}

/// Takes the pins. There is one file system for them and one lock, so a successor can be there, with its image and its configuration, before
/// its predecessor has gone.
async fn captured(
    settings: &CaptureSettings,
    mut begun: Option<Loader>,
    waiting: Option<&AgentConfig>,
) -> Result<Capture, AppError> {
    loop {
        match (Capture::load_with(settings, &mut begun), waiting) {
            (Err(BpfError::PinsInUse { path }), Some(agent)) => {
                rehearse(settings, agent).await?;
                tracing::info!(pins = %path.display(), "waiting for the agent that has this node to end");
                while Capture::in_use(&path)? {
                    tokio::time::sleep(TURN).await;
                }
            }
            (loaded, _) => return Ok(loaded?),
        }
    }
}

/// What would fail only after the predecessor is gone shall fail before: its place is not waited for then, and it goes on.
async fn rehearse(settings: &CaptureSettings, agent: &AgentConfig) -> Result<(), AppError> {
    let failed = |error: AppError| AppError::Rehearsal(Box::new(error));
    let place = settings.clone();
    match spawn_blocking(move || Capture::rehearse(&place)).await {
        Ok(tried) => tried.map_err(|error| failed(error.into()))?,
        Err(error) => return Err(AppError::Ended(error.to_string())),
    }
    if let Some(kubernetes) = &agent.kubernetes {
        let source =
            Source::open(kubernetes, agent.trust.domains.clone()).await.map_err(|error| failed(error.into()))?;
        source.rehearse(REHEARSAL).await.map_err(|error| failed(error.into()))?;
    }
    Ok(())
}

/// What the kernel can do, of what the operator allows.
async fn kernel(agent: &AgentConfig) -> Result<Capabilities, AppError> {
    if agent.records.mode == RecordsMode::Userspace {
        return Ok(with_pump(Capabilities::none("spec.records is userspace"), agent));
    }
    let found = probed().await?;
    let suites: Vec<_> = found.suites.iter().map(|suite| format!("{suite:?}")).collect();
    let pump = if found.pump == PumpKind::Splice { "splice" } else { "copy" };
    tracing::info!(
        kernel_tls = !suites.is_empty(),
        suites = suites.join(" "),
        pump,
        "probed the kernel: {}",
        found.why
    );
    if agent.records.require_ktls && found.suites.is_empty() {
        return Err(AppError::NoKtls(found.why));
    }
    Ok(with_pump(found, agent))
}

/// With certificates that nobody else ever sees.
async fn probed() -> Result<Capabilities, AppError> {
    let domain = TrustDomain::parse("probe.marline.internal")?;
    let ca = Ca::ephemeral(&domain)?;
    let svid = ca.issue(&SpiffeId::new(&domain, "marline-system", "probe")?, Duration::from_secs(600))?;
    Ok(probe::probe(&svid, ca.trust(&domain)).await)
}

fn with_pump(found: Capabilities, agent: &AgentConfig) -> Capabilities {
    match agent.pump {
        PumpMode::Auto => found,
        PumpMode::Splice => Capabilities { pump: PumpKind::Splice, ..found },
        PumpMode::Copy => Capabilities { pump: PumpKind::Copy, ..found },
    }
}

fn settings(agent: &AgentConfig) -> Settings {
    let records = match agent.records.mode {
        _ if agent.records.require_ktls => RecordsChoice::Kernel,
        RecordsMode::Auto => RecordsChoice::Auto,
        RecordsMode::Kernel => RecordsChoice::Kernel,
        RecordsMode::Userspace => RecordsChoice::Userspace,
    };
    Settings {
        records,
        connect: agent.timeouts.connect,
        handshake: agent.timeouts.handshake,
        dead_peer: agent.timeouts.dead_peer,
        pqc_only: agent.tls.pqc_only,
        spares: agent.spares == SpareMode::Auto,
    }
}

fn records_name(agent: &AgentConfig) -> &'static str {
    match agent.records.mode {
        RecordsMode::Auto => "auto",
        RecordsMode::Kernel => "kernel",
        RecordsMode::Userspace => "userspace",
    }
}

/// Waits for the first complete list from the API server. Before that it is not known which pods there are, and those that an agent before
/// this one has closed must not be let go.
async fn known(source: Option<view::source::Shown>) {
    if let Some(source) = source {
        source.ready().await;
    }
}

/// One line whenever the agent becomes ready, for people and scripts that watch the log.
async fn announce(proxy: Proxy, source: Option<view::source::Shown>) {
    known(source).await;
    let (mut changes, mut was_ready) = (proxy.changes(), false);
    loop {
        let ready = proxy.ready().is_ok();
        if ready && !was_ready {
            tracing::info!("marline: ready");
        }
        was_ready = ready;
        if changes.changed().await.is_err() {
            return;
        }
    }
}

/// Each connection takes two descriptors or more; the soft limit of many systems is 1024.
pub fn raise_descriptor_limit() {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let raised =
        getrlimit(Resource::RLIMIT_NOFILE).and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
}
