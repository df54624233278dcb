//! Certificates and trust from a SPIFFE Workload API (SPIRE's agent) over its Unix socket. One stream tells all that there is, anew with each
//! change; what is told last counts as a whole. A registration entry for the agent's own process gives it a certificate for each identity.
//!
//! What is told becomes trust in `control::trust`, together with the files; which certificates are needed is `identity::manager`'s.

mod update;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use hyper_util::rt::TokioIo;
use rustls::pki_types::UnixTime;
use tokio::{net::UnixStream, sync::watch, time::timeout};
use tonic::{
    Code, Request, Status,
    metadata::MetadataValue,
    transport::{Endpoint, Uri},
};
use tower::service_fn;

use super::{
    IdentityError, SpiffeId, Svid, TrustDomain, TrustStore, humantime,
    manager::{Answer, Source},
    trust::files::Supplied,
    wire::spiffe::{Client, SECURITY_HEADER, X509SvidRequest},
};
use crate::words::with_causes;
use update::Update;

const CONNECT: Duration = Duration::from_secs(5);
/// For the first word of a stream. SPIRE may ask a kubelet for half a minute which pod it is talking to.
const PATIENCE: Duration = Duration::from_secs(45);
/// A server that was stopped in the middle of a stream is noticed after this and `CONNECT`. SPIRE's hangs up on whoever pings more often than
/// every five minutes, as all of Go's library do that are not told otherwise, or without a call.
const KEEPALIVE: Duration = Duration::from_secs(360);
const FIRST_RETRY: Duration = Duration::from_millis(200);
const LAST_RETRY: Duration = Duration::from_secs(15);
/// A thousand identities with their chains, and as many roots.
const LONGEST_MESSAGE: usize = 32 << 20;

/// A clone is another handle on the same stream's words.
#[derive(Clone)]
pub struct WorkloadApi {
    name: Arc<str>,
    path: PathBuf,
    trust: TrustStore,
    told: Arc<Mutex<Told>>,
    changes: Arc<watch::Sender<u64>>,
    patience: Duration,
    keepalive: Duration,
}

/// What was told last.
#[derive(Default)]
struct Told {
    update: Option<Update>,
    /// Why nothing, or nothing new, comes.
    problem: Option<String>,
}

impl WorkloadApi {
    pub fn new(path: &Path, trust: TrustStore) -> Self {
        Self {
            name: format!("unix:{}", path.display()).into(),
            path: path.to_owned(),
            trust,
            told: Arc::default(),
            changes: Arc::new(watch::Sender::new(0)),
            patience: PATIENCE,
            keepalive: KEEPALIVE,
        }
    }

    /// Counts what was told.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// The roots and lists that were told last, if anything was.
    pub fn supplied(&self) -> Option<Supplied> {
        self.told().update.as_ref().map(Update::supplied)
    }

    /// Why nothing, or nothing new, comes, if that is so.
    pub fn problem(&self) -> Option<String> {
        self.told().problem.clone()
    }

    /// Listens until `shutdown` becomes true or its sender is gone, again and again.
    pub async fn run(self, own: TrustDomain, mut shutdown: watch::Receiver<bool>) {
        let mut wait = FIRST_RETRY;
        loop {
            let ended = tokio::select! {
                ended = self.listen(&own, &mut wait) => ended,
                _ = shutdown.wait_for(|stop| *stop) => return,
            };
            wait = (wait * 2).min(LAST_RETRY);
            let pause = wait.mul_f64(0.5 + rand::random::<f64>() / 2.0);
            let problem = match ended {
                Ok(()) => "it ended the stream".to_owned(),
                Err(problem) => problem,
            };
            if self.told().problem.replace(problem.clone()) != Some(problem.clone()) {
                tracing::warn!(
                    socket = %self.name,
                    retry = humantime(pause),
                    "the Workload API tells nothing: {problem}; what it told before stays in force until it expires"
                );
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                _ = shutdown.wait_for(|stop| *stop) => return,
            }
        }
    }

    async fn listen(&self, own: &TrustDomain, wait: &mut Duration) -> Result<(), String> {
        let path = self.path.clone();
        let connector = service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The address means nothing: it is what the library sends as the authority.
        let endpoint = Endpoint::from_static("http://localhost")
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(self.keepalive)
            .keep_alive_timeout(CONNECT);
        let channel = endpoint.connect_with_connector(connector).await.map_err(|error| with_causes(&error))?;
        let mut client = Client::new(channel).max_decoding_message_size(LONGEST_MESSAGE);
        let mut request = Request::new(X509SvidRequest {});
        request.metadata_mut().insert(SECURITY_HEADER.0, MetadataValue::from_static(SECURITY_HEADER.1));
        let began = async {
            let mut stream = client.fetch_x509_svid(request).await?.into_inner();
            Ok((stream.message().await?, stream))
        };
        let began = timeout(self.patience, began).await;
        let began = began.map_err(|_| format!("it says nothing within {}", humantime(self.patience)))?;
        let (mut next, mut stream) = began.map_err(|status: Status| explain(&status))?;
        while let Some(message) = next {
            let update = Update::read(message, own).map_err(|what| format!("what it told was refused: {what}"))?;
            for refused in &update.refused {
                tracing::warn!(socket = %self.name, "one certificate of the Workload API is not used: {refused}");
            }
            tracing::info!(socket = %self.name, certificates = update.svids.len(), "the Workload API told what there is");
            *wait = FIRST_RETRY;
            *self.told() = Told { update: Some(update), problem: None };
            self.changes.send_modify(|count| *count += 1);
            next = stream.message().await.map_err(|status| explain(&status))?;
        }
        Ok(())
    }

    fn find(&self, id: &SpiffeId) -> Result<Svid, IdentityError> {
        let told = self.told();
        let missing = |what: String, withdrawn| IdentityError::NotSupplied {
            socket: Arc::clone(&self.name),
            id: id.clone(),
            what,
            withdrawn,
        };
        let Some(update) = &told.update else {
            let problem = told.problem.clone().unwrap_or_else(|| "it has told nothing yet".to_owned());
            return Err(missing(problem, false));
        };
        let Some(svid) = update.svids.get(id) else {
            // What a message leaves out is taken back (SPIFFE_Workload_API.md, section 4.4).
            let what = "it has no registration entry of that name for this agent; make one";
            return Err(missing(what.to_owned(), true));
        };
        if let Some((leaf, intermediates)) = svid.key.cert.split_first() {
            let usage = webpki::KeyUsage::client_auth();
            let verified = self.trust.load().verify(id.trust_domain(), leaf, intermediates, UnixTime::now(), usage);
            verified.map_err(|error| missing(format!("the one it has is not believed here: {error}"), false))?;
        }
        Ok(svid.clone())
    }

    fn told(&self) -> MutexGuard<'_, Told> {
        // Replaced as a whole: what a panicking holder left is good.
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Source for WorkloadApi {
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.name)
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId, _lifetime: Duration) -> Answer<'a> {
        Box::pin(async move { self.find(id) })
    }

    fn tells(&self) -> bool {
        true
    }
}

/// Certificates by identity.
type Svids = BTreeMap<SpiffeId, Svid>;

fn explain(status: &Status) -> String {
    match status.code() {
        Code::PermissionDenied => {
            format!(
                "it knows no identity for this agent ({}); make registration entries for its process",
                status.message()
            )
        }
        _ => with_causes(status),
    }
}

#[cfg(test)]
mod tests {
    use tokio::{io::AsyncReadExt as _, net::UnixListener};

    use super::*;
    use crate::identity::Trust;

    /// What is said of a server that takes connections and bytes, and never says a word.
    async fn said_of_silence(patience: Duration, keepalive: Duration) -> String {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("agent.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let silent = async {
            let mut taken = Vec::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                taken.push(tokio::spawn(async move {
                    while stream.read(&mut [0; 512]).await.is_ok_and(|count| count > 0) {}
                }));
            }
        };
        let own = TrustDomain::default();
        let trust = TrustStore::new(Trust::new(&own, Arc::new(rustls::RootCertStore::empty())));
        let api = WorkloadApi { patience, keepalive, ..WorkloadApi::new(&socket, trust) };
        let (_stop, stopped) = watch::channel(false);
        let told = async {
            while api.problem().is_none() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            () = silent => {}
            () = api.clone().run(own, stopped) => {}
            told = timeout(Duration::from_secs(20), told) => told.unwrap(),
        }
        let id = SpiffeId::new(&TrustDomain::default(), "shop", "web").unwrap();
        let error = api.find(&id).unwrap_err().to_string();
        let problem = api.problem().unwrap();
        assert!(error.contains(&problem), "{error}");
        problem
    }

    #[tokio::test]
    async fn a_workload_api_that_takes_a_call_and_says_nothing_is_told_of() {
        let said = said_of_silence(Duration::from_millis(100), KEEPALIVE).await;
        assert_eq!(said, "it says nothing within 100ms");
        let said = said_of_silence(PATIENCE, Duration::from_millis(100)).await;
        assert!(said.contains("keep-alive") || said.contains("keepalive"), "{said}");
    }
}
