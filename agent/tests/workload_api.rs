//! Certificates and trust from a SPIFFE Workload API: what its stream tells is taken as a whole, what is no good in it is refused with the
//! reason, and what it leaves out is not used any more. The server here speaks the real protocol over a real Unix socket.
#![allow(clippy::unwrap_used, clippy::panic)]

#[path = "support/spire.rs"]
mod spire;

use std::{collections::BTreeSet, path::PathBuf, sync::Arc, time::Duration};

use marline::{
    control::{
        files::WatchSettings,
        trust::{self, Followed, LastRefusal, Origin},
    },
    identity::{
        Ca, CertState, Manager, ManagerSettings, SpiffeId, Svid, TrustDomain, TrustFiles, TrustStore,
        trust::files::Supplied,
        wire::spiffe::{X509Svid, X509SvidResponse},
        workload_api::WorkloadApi,
    },
    metrics::Metrics,
};
use proptest::prelude::*;
use rcgen::KeyPair;
use rustls::pki_types::UnixTime;
use spire::{Authority, LIFE, telling};
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinHandle};
use tonic::Status;

/// An agent's side, and a SPIRE that can be started and stopped.
struct Bed {
    dir: TempDir,
    api: WorkloadApi,
    manager: Manager,
    store: TrustStore,
    tell: watch::Sender<Result<X509SvidResponse, Status>>,
    serving: Option<JoinHandle<()>>,
    stop: watch::Sender<bool>,
}

impl Bed {
    fn new(domain: &TrustDomain, first: X509SvidResponse) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let files = TrustFiles { domains: domain.into(), ..TrustFiles::default() };
        let store = TrustStore::new(files.assemble(Supplied::nothing()).unwrap());
        let api = WorkloadApi::new(&dir.path().join("agent.sock"), store.clone());
        let manager = Manager::new(api.clone(), store.clone(), ManagerSettings { leaf_lifetime: LIFE });
        let (stop, stopped) = watch::channel(false);
        tokio::spawn(api.clone().run(domain.clone(), stopped.clone()));
        let followed = Followed {
            origin: Origin::Told(api.clone()),
            files,
            identities: manager.clone(),
            metrics: Arc::new(Metrics::new()),
            refusal: LastRefusal::default(),
        };
        let settings = WatchSettings { quiet: Duration::from_millis(5), poll: Duration::from_secs(10) };
        tokio::spawn(trust::watch(followed, settings, stopped.clone()));
        tokio::spawn({
            let manager = manager.clone();
            async move { manager.run(stopped).await }
        });
        Self { dir, api, manager, store, tell: watch::Sender::new(Ok(first)), serving: None, stop }
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("agent.sock")
    }

    fn start(&mut self) {
        let (socket, told) = (self.socket(), self.tell.subscribe());
        self.serving = Some(tokio::spawn(async move { spire::serve(&socket, told).await }));
    }

    async fn stop(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            let _ = serving.await;
        }
    }

    fn tell(&self, next: Result<X509SvidResponse, Status>) {
        drop(self.tell.send_replace(next));
    }

    async fn held(&self, id: &SpiffeId) -> Arc<Svid> {
        until(&format!("{id}"), || self.manager.svid(id)).await
    }

    fn believes(&self, svid: &Svid) -> bool {
        let (leaf, above) = svid.key.cert.split_first().unwrap();
        let usage = webpki::KeyUsage::server_auth();
        self.store.load().verify(svid.id.trust_domain(), leaf, above, UnixTime::now(), usage).is_ok()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.stop.send_replace(true);
        if let Some(serving) = &self.serving {
            serving.abort();
        }
    }
}

async fn until<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let found = async {
        loop {
            if let Some(found) = look() {
                return found;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(30), found).await.unwrap_or_else(|_| panic!("{what} did not come"))
}

fn present<const N: usize>(ids: [&SpiffeId; N]) -> BTreeSet<SpiffeId> {
    ids.into_iter().cloned().collect()
}

#[tokio::test]
async fn an_agent_that_starts_before_spire_has_its_certificates_when_that_is_there() {
    let mesh = Authority::of("mesh.example");
    let mut bed = Bed::new(&mesh.domain, telling(vec![mesh.svid("web"), mesh.svid("db")]));
    let (web, db) = (mesh.id("web"), mesh.id("db"));
    bed.manager.retain(&present([&web, &db]));
    let said = until("a reason", || bed.manager.last_error(&web)).await;
    assert!(said.contains(bed.socket().to_str().unwrap()), "{said}");
    bed.start();
    let held = bed.held(&web).await;
    assert!(bed.believes(&held) && bed.believes(&*bed.held(&db).await));
    assert_eq!(held.key.keys_match(), Ok(()));
    let info = bed.manager.list().into_iter().find(|info| info.id == web).unwrap();
    assert_eq!((info.state, info.renews_at), (CertState::Valid, None), "it is told when there is another");
    assert_eq!(info.source, format!("unix:{}", bed.socket().display()));
}

#[tokio::test]
async fn what_is_told_next_counts_alone_and_what_it_leaves_out_is_not_used_any_more() {
    let mesh = Authority::of("mesh.example");
    let mut bed = Bed::new(&mesh.domain, telling(vec![mesh.svid("web"), mesh.svid("db")]));
    bed.start();
    let (web, db) = (mesh.id("web"), mesh.id("db"));
    bed.manager.retain(&present([&web, &db]));
    let (first, _) = (bed.held(&web).await, bed.held(&db).await);
    bed.tell(Ok(telling(vec![mesh.svid("web")])));
    until("another certificate", || bed.manager.svid(&web).filter(|svid| svid.serial != first.serial)).await;
    until("the other to be dropped", || bed.manager.svid(&db).is_none().then_some(())).await;
    let said = until("a reason", || bed.manager.last_error(&db)).await;
    assert!(said.contains("no registration entry"), "{said}");
    // An identity that comes later is there at once.
    let late = mesh.id("late");
    bed.tell(Ok(telling(vec![mesh.svid("web"), mesh.svid("late"), mesh.svid("db")])));
    bed.manager.retain(&present([&web, &db, &late]));
    bed.held(&late).await;
    bed.held(&db).await;
}

#[tokio::test]
async fn roots_and_lists_are_trust_and_change_with_the_stream() {
    let (mesh, next, other) =
        (Authority::of("mesh.example"), Authority::of("mesh.example"), Authority::of("other.example"));
    let mut bed = Bed::new(&mesh.domain, telling(vec![mesh.svid("web")]));
    bed.start();
    let web = mesh.id("web");
    bed.manager.retain(&present([&web]));
    let first = bed.held(&web).await;
    let foreign = Ca::open(other.dir.path()).unwrap().issue(&other.id("api"), LIFE).unwrap();
    assert!(!bed.believes(&foreign));

    // Another root signs, and a neighbour is federated, by the name that SPIRE gives it.
    let mut message = telling(vec![next.svid("web")]);
    message.svids[0].bundle = [mesh.bundle(), next.bundle()].concat();
    message.federated_bundles.insert("spiffe://other.example".to_owned(), other.bundle());
    bed.tell(Ok(message.clone()));
    let second = until("the next root's", || bed.manager.svid(&web).filter(|svid| svid.serial != first.serial)).await;
    assert!(bed.believes(&first) && bed.believes(&second) && bed.believes(&foreign));

    // The old root goes, and the certificate is taken back.
    message.svids[0].bundle = next.bundle();
    message.crl = vec![next.list(&second.serial)];
    message.federated_bundles.clear();
    bed.tell(Ok(message));
    until("trust to change", || {
        (!bed.believes(&first) && !bed.believes(&second) && !bed.believes(&foreign)).then_some(())
    })
    .await;
    bed.tell(Ok(telling(vec![next.svid("web")])));
    until("another", || bed.manager.svid(&web).filter(|svid| bed.believes(svid) && svid.serial != second.serial)).await;
}

#[tokio::test]
async fn what_is_no_good_is_left_out_with_the_reason_and_the_rest_is_used() {
    let (mesh, other) = (Authority::of("mesh.example"), Authority::of("other.example"));
    let wrong_key = X509Svid { x509_svid_key: KeyPair::generate().unwrap().serialize_der(), ..mesh.svid("key") };
    let wrong_name = X509Svid { spiffe_id: mesh.id("name").to_string(), ..mesh.svid("else") };
    let stranger =
        X509Svid { x509_svid: other.named(&mesh.id("stranger").to_string()).x509_svid, ..mesh.svid("stranger") };
    let cut = X509Svid { x509_svid: mesh.svid("cut").x509_svid[..40].to_vec(), ..mesh.svid("cut") };
    let svids = vec![
        wrong_key,
        wrong_name,
        stranger,
        cut,
        other.svid("foreign"),
        mesh.named("spiffe://mesh.example/not/of/istios/form"),
        mesh.svid("web"),
    ];
    let mut bed = Bed::new(&mesh.domain, telling(svids));
    bed.start();
    let ids: Vec<_> = ["key", "name", "else", "stranger", "cut", "web"].map(|name| mesh.id(name)).into();
    bed.manager.retain(&ids.iter().cloned().collect());
    bed.held(&mesh.id("web")).await;
    for id in ids.iter().filter(|id| id.service_account() != "web") {
        until("a reason", || bed.manager.last_error(id)).await;
        assert!(bed.manager.svid(id).is_none(), "{id} was used");
    }
}

#[tokio::test]
async fn a_message_whose_roots_or_lists_are_no_good_changes_nothing() {
    let (mesh, other) = (Authority::of("mesh.example"), Authority::of("other.example"));
    let mut bed = Bed::new(&mesh.domain, telling(vec![mesh.svid("web"), mesh.svid("db")]));
    bed.start();
    let (web, db, late) = (mesh.id("web"), mesh.id("db"), mesh.id("late"));
    bed.manager.retain(&present([&web, &db]));
    let (first, _) = (bed.held(&web).await, bed.held(&db).await);
    let with_bundle = |bundle: Vec<u8>| telling(vec![X509Svid { bundle, ..mesh.svid("web") }]);
    let two = telling(vec![mesh.svid("web"), X509Svid { bundle: other.bundle(), ..mesh.svid("db") }]);
    let mut ours_federated = telling(vec![mesh.svid("web")]);
    ours_federated.federated_bundles.insert("mesh.example".to_owned(), other.bundle());
    for message in [
        with_bundle(Vec::new()),
        with_bundle(b"no certificate".to_vec()),
        with_bundle([mesh.bundle(), vec![0]].concat()),
        telling(Vec::new()),
        telling(vec![other.svid("web")]),
        two,
        ours_federated,
    ] {
        bed.tell(Ok(telling(vec![mesh.svid("web"), mesh.svid("db")])));
        until("good words", || bed.api.problem().is_none().then_some(())).await;
        bed.tell(Ok(message));
        // The stream is broken off and begun anew, and what comes then is taken.
        until("a complaint", || bed.api.problem()).await;
        assert!(bed.believes(&bed.manager.svid(&web).unwrap()) && bed.believes(&first));
    }
    // With a list that is none, nothing of the message counts: neither what it brings nor what it leaves out.
    bed.tell(Ok(telling(vec![mesh.svid("web"), mesh.svid("db")])));
    until("good words", || bed.api.problem().is_none().then_some(())).await;
    let message = telling(vec![mesh.svid("web"), mesh.svid("late")]);
    bed.tell(Ok(X509SvidResponse { crl: vec![b"no list".to_vec()], ..message }));
    let problem = until("a complaint", || bed.api.problem()).await;
    assert!(problem.contains("revocation list"), "{problem}");
    bed.manager.retain(&present([&web, &db, &late]));
    bed.manager.supplied();
    until("an answer", || bed.manager.last_error(&late)).await;
    assert!(bed.manager.svid(&late).is_none() && bed.manager.svid(&db).is_some());
    bed.tell(Ok(telling(vec![mesh.svid("late")])));
    bed.held(&late).await;
}

#[tokio::test]
async fn a_spire_that_is_away_or_knows_nobody_leaves_what_it_told_in_force() {
    let mesh = Authority::of("mesh.example");
    let mut bed = Bed::new(&mesh.domain, telling(vec![mesh.svid("web")]));
    bed.start();
    let web = mesh.id("web");
    bed.manager.retain(&present([&web]));
    let first = bed.held(&web).await;
    bed.stop().await;
    bed.tell(Err(Status::permission_denied("no identity issued")));
    bed.start();
    let problem = until("the complaint", || bed.api.problem().filter(|said| said.contains("no identity issued"))).await;
    assert!(problem.contains("make registration entries"), "{problem}");
    assert_eq!(bed.manager.svid(&web).unwrap().serial, first.serial);
    bed.tell(Ok(telling(vec![mesh.svid("web")])));
    until("what it tells when it is back", || bed.manager.svid(&web).filter(|svid| svid.serial != first.serial)).await;
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]
    #[test]
    fn bytes_that_are_changed_never_give_another_identity_or_an_unbelieved_certificate(
        at in any::<prop::sample::Index>(), bit in 0u8..8, part in 0usize..3,
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mesh = Authority::of("mesh.example");
            let (mut svid, good) = (mesh.svid("web"), mesh.svid("good"));
            let bytes = match part {
                0 => &mut svid.x509_svid,
                1 => &mut svid.x509_svid_key,
                _ => &mut svid.bundle,
            };
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            let mut bed = Bed::new(&mesh.domain, telling(vec![svid, good]));
            bed.start();
            let web = mesh.id("web");
            bed.manager.retain(&present([&web, &mesh.id("good")]));
            until("an answer", || bed.manager.svid(&web).map(drop).or_else(|| bed.manager.last_error(&web).map(drop))).await;
            if let Some(svid) = bed.manager.svid(&web) {
                assert!(bed.believes(&svid) && svid.key.keys_match().is_ok());
            }
        });
    }
}
