//! The CA service, `marline ca serve`: signs certificates for agents and workloads that prove who they are, over Istio's signing API.
//! What a CA signs and how is `identity::ca`'s; its settings are read by `config`; files are followed by `control`.

mod book;
pub mod caller;
pub mod cluster;
pub mod csr;
pub mod ledger;
mod limits;
mod listener;
mod metrics;
pub mod placement;
pub mod refusal;
pub mod revoke;
mod service;
mod serving;
mod shut_out;
mod status;

use std::{
    convert, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use arc_swap::ArcSwap;
use tokio::{
    net::TcpListener,
    signal::unix::{SignalKind, signal},
    sync::watch,
    task::{JoinHandle, JoinSet},
};
use tonic::transport::Server;

use crate::{
    config::{self, CaServerConfig, ConfigErrors, Keeping},
    control::{
        files::WatchSettings,
        follow::{Reader, Sources, follow},
    },
    identity::{
        Ca, IdentityError, TrustDomain, ca,
        wire::istio::istio_certificate_service_server::IstioCertificateServiceServer,
    },
    words::with_causes,
};
use book::Books;
use caller::{Authenticate, kubernetes::Kubernetes, tokens::Tokens};
use cluster::{Cluster, placement::Pods};
use ledger::Ledger;
use limits::Limiter;
use metrics::Metrics;
use placement::{Listed, Placement};
use service::Service;
use serving::Serving;

/// A request has less than 10 KiB.
const LARGEST_MESSAGE: usize = 64 << 10;
const STREAMS: u32 = 16;
/// For all of a request, a review by an API server included.
const REQUEST: Duration = Duration::from_secs(30);
/// Connections are made anew from time to time: nobody holds one for ever.
const CONNECTION: Duration = Duration::from_secs(600);
const KEEPALIVE: Duration = Duration::from_secs(30);
/// For requests that are in flight when the service is told to stop.
const FAREWELL: Duration = Duration::from_secs(15);

#[derive(Debug, thiserror::Error)]
pub enum CaError {
    #[error(transparent)]
    Config(#[from] ConfigErrors),
    #[error("the certificate authority")]
    Identity(#[source] IdentityError),
    #[error("cannot {action} {}", path.display())]
    Io { action: &'static str, path: PathBuf, source: io::Error },
    #[error("{}: is not the list of nodes that are shut out, which `marline ca revoke` writes; while it is wrong nobody gets a certificate", path.display())]
    ShutOut { path: PathBuf, source: serde_json::Error },
    #[error("the Kubernetes API server: {what}")]
    Kubernetes { what: String, source: Option<Box<dyn std::error::Error + Send + Sync>> },
    #[error("{field}: cannot listen on {address}; choose another address or stop what holds it")]
    Listen { field: &'static str, address: SocketAddr, source: io::Error },
    #[error("serving")]
    Serve(#[source] tonic::transport::Error),
    #[error("signals")]
    Signal(#[source] io::Error),
    #[error("a part of the service ended by itself: {0}")]
    Ended(String),
}

impl CaError {
    fn io(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { action, path: path.to_owned(), source }
    }
}

/// A service that runs. It stops when it is told to, or with this.
pub struct Running {
    /// Where it listens: port 0 in the settings takes any free one.
    pub address: SocketAddr,
    pub status: SocketAddr,
    stop: watch::Sender<bool>,
    served: JoinHandle<Result<(), CaError>>,
}

/// Runs the service until SIGTERM or SIGINT; requests in flight are answered first.
pub async fn run(config: CaServerConfig) -> Result<(), CaError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(CaError::Signal)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(CaError::Signal)?;
    let mut running = start(config, WatchSettings::default()).await?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        ended = &mut running.served => return ended.unwrap_or_else(|error| Err(CaError::Ended(error.to_string()))),
    }
    tracing::info!("told to stop: requests in flight are answered first");
    running.stop().await
}

/// Starts the service; when this returns it answers.
pub async fn start(config: CaServerConfig, watching: WatchSettings) -> Result<Running, CaError> {
    let (authority, cluster) = match &config.keeping {
        Keeping::Files(files) => (Ca::open(&files.ca).map_err(CaError::Identity)?, None),
        Keeping::Cluster(names) => {
            let cluster = Cluster::new(names)?;
            (cluster::authority::open(&cluster, &config.trust_domain).await?, Some(cluster))
        }
    };
    authority.require_trust_domain(&config.trust_domain).map_err(CaError::Identity)?;
    let authority = Arc::new(ArcSwap::from_pointee(authority));
    let serving = Serving::new(Arc::clone(&authority), config.names.clone())?;
    let metrics = Arc::new(Metrics::new());
    let (stop, shutdown) = watch::channel(false);
    let mut tasks = JoinSet::new();
    let follower = Follower { metrics: Arc::clone(&metrics), watching, shutdown: shutdown.clone() };

    let mut callers: Vec<Box<dyn Authenticate>> = Vec::new();
    if let Some(path) = &config.tokens {
        let tokens = Tokens::new(&config.audience, config::load_ca_tokens(path)?.0);
        callers.push(Box::new(tokens.clone()));
        let file = path.clone();
        let read = move || config::load_ca_tokens(&file).map(|(read, _)| read).map_err(|errors| errors.to_string());
        tasks.spawn(follower.follow("tokens", vec![path.clone()], Arc::new(read), move |read| tokens.replace(read)));
    }
    if let Some(settings) = &config.kubernetes {
        callers.push(Box::new(Kubernetes::new(settings, &config.audience)?));
    }
    let (placement, ledger): (Box<dyn Placement>, Books) = match (&config.keeping, cluster) {
        (Keeping::Files(files), _) => {
            let ledger = Ledger::open(&files.state)?;
            let listed = Listed::new(config::load_ca_nodes(&files.nodes)?.0);
            let (placement, file) = (listed.clone(), files.nodes.clone());
            let read = move || config::load_ca_nodes(&file).map(|(read, _)| read).map_err(|errors| errors.to_string());
            let paths = vec![files.nodes.clone()];
            tasks.spawn(follower.follow("nodes", paths, Arc::new(read), move |read| listed.replace(read)));
            tasks.spawn(follow_ca(&follower, &files.ca, &config.trust_domain, &authority, &serving));
            (Box::new(placement), Books::Files(ledger))
        }
        (Keeping::Cluster(names), cluster) => {
            let cluster = cluster.map_or_else(|| Cluster::new(names), Ok)?;
            tasks.spawn(cluster::authority::follow(
                cluster.clone(),
                config.trust_domain.clone(),
                Arc::clone(&authority),
                serving.clone(),
                Arc::clone(&metrics),
                watching,
                shutdown.clone(),
            ));
            tasks.spawn(cluster::sweep::run(cluster.clone(), watching.poll, shutdown.clone()));
            (Box::new(Pods::new(cluster.clone())), Books::Cluster(cluster::book::Books::new(cluster)))
        }
    };
    tasks.spawn(serving.clone().keep_fresh(shutdown.clone()));

    let service = Service {
        trust_domain: config.trust_domain.clone(),
        ca: Arc::clone(&authority),
        callers,
        placement,
        limiter: Limiter::new(config.limits.per_minute, config.limits.burst),
        per_minute: config.limits.per_minute,
        max_lifetime: config.max_lifetime,
        ledger: ledger.clone(),
        metrics: Arc::clone(&metrics),
    };
    let (listener, address) = listen("spec.listen.address", config.listen).await?;
    let (status_listener, status_address) = listen("spec.status.address", config.status).await?;
    let status_ends = shutdown.clone();
    let shown = Arc::clone(&metrics);
    tasks.spawn(status::serve(status_listener, shown, ledger, authority, status_ends));
    let limits = config.limits;
    let (tls, ends) = (serving.config()?, shutdown.clone());
    let incoming = listener::accept(listener, tls, limits.connections, limits.handshake, metrics, ends);
    tracing::info!(%address, status = %status_address, names = config.names.join(", "), "the CA service answers");
    let served = tokio::spawn(serve(service, incoming, shutdown, tasks));
    Ok(Running { address, status: status_address, stop, served })
}

impl Running {
    /// Takes no more requests, and returns when those in flight are answered.
    pub async fn stop(self) -> Result<(), CaError> {
        self.stop.send_replace(true);
        self.served.await.unwrap_or_else(|error| Err(CaError::Ended(error.to_string())))
    }
}

async fn serve(
    service: Service,
    incoming: tokio_stream::wrappers::ReceiverStream<io::Result<listener::Accepted>>,
    shutdown: watch::Receiver<bool>,
    mut tasks: JoinSet<()>,
) -> Result<(), CaError> {
    let service = IstioCertificateServiceServer::new(service)
        .max_decoding_message_size(LARGEST_MESSAGE)
        .max_encoding_message_size(1 << 20);
    let (mut told, mut hurry) = (shutdown.clone(), shutdown);
    let server = Server::builder()
        .timeout(REQUEST)
        .max_concurrent_streams(STREAMS)
        .concurrency_limit_per_connection(STREAMS as usize)
        .initial_stream_window_size(LARGEST_MESSAGE as u32)
        .initial_connection_window_size(2 * LARGEST_MESSAGE as u32)
        .http2_max_header_list_size(16 << 10)
        .http2_keepalive_interval(Some(KEEPALIVE))
        .http2_keepalive_timeout(Some(KEEPALIVE))
        .max_connection_age(CONNECTION)
        .max_connection_age_grace(REQUEST)
        .add_service(service)
        .serve_with_incoming_shutdown(incoming, async move {
            let _ = told.wait_for(|stop| *stop).await;
        });
    let farewell = async move {
        let _ = hurry.wait_for(|stop| *stop).await;
        tokio::time::sleep(FAREWELL).await;
    };
    let served = tokio::select! {
        served = server => served.map_err(CaError::Serve),
        () = farewell => {
            tracing::warn!("requests were not answered within {FAREWELL:?} and are given up");
            Ok(())
        }
        ended = first_panic(&mut tasks) => Err(CaError::Ended(ended)),
    };
    tasks.shutdown().await;
    served
}

/// Tasks that end in order are of no concern; without one that panicked the service would go on with old files.
async fn first_panic(tasks: &mut JoinSet<()>) -> String {
    while let Some(ended) = tasks.join_next().await {
        if let Err(error) = ended {
            return error.to_string();
        }
    }
    std::future::pending().await
}

async fn listen(field: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), CaError> {
    let wrong = |source| CaError::Listen { field, address, source };
    let listener = TcpListener::bind(address).await.map_err(wrong)?;
    let bound = listener.local_addr().map_err(wrong)?;
    Ok((listener, bound))
}

struct Follower {
    metrics: Arc<Metrics>,
    watching: WatchSettings,
    shutdown: watch::Receiver<bool>,
}

impl Follower {
    fn follow<T: Send + 'static>(
        &self,
        what: &'static str,
        paths: Vec<PathBuf>,
        read: Reader<T, String>,
        take: impl Fn(T) + Send + 'static,
    ) -> impl Future<Output = ()> + Send + 'static {
        let metrics = Arc::clone(&self.metrics);
        let took = move |result: Result<T, String>| {
            metrics.reloaded(what, result.is_ok());
            match result {
                Ok(read) => take(read),
                Err(why) => tracing::error!("{what}: refused, the last good ones stay in force: {why}"),
            }
        };
        follow(Sources::files(paths), read, convert::identity, took, self.watching, self.shutdown.clone())
    }
}

/// Another CA signs from the moment on when its files prove themselves, and signs the service's own certificate first.
fn follow_ca(
    follower: &Follower,
    dir: &Path,
    domain: &TrustDomain,
    authority: &Arc<ArcSwap<Ca>>,
    serving: &Serving,
) -> impl Future<Output = ()> + Send + 'static {
    let paths = ca::file_paths(dir);
    let (dir, domain) = (dir.to_owned(), domain.clone());
    let read = move || {
        let next = Ca::open(&dir).and_then(|next| next.require_trust_domain(&domain).map(|()| next));
        next.map_err(|error| with_causes(&error))
    };
    let (authority, serving) = (Arc::clone(authority), serving.clone());
    follower.follow("ca", paths, Arc::new(read), move |next: Ca| {
        let next = Arc::new(next);
        if !authority.swap(Arc::clone(&next)).signs_like(&next) {
            tracing::info!("another certificate of the CA signs from now on");
            serving.renew();
        }
    })
}
