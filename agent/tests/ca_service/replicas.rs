//! An agent and the two services of a cluster behind the one address of their Kubernetes Service: when one dies, however it dies, the next
//! certificate is the other's, and none that the agent has is lost.

use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use axum::http::Method;
use marline::identity::{
    Manager, ManagerSettings, SpiffeId, TrustStore,
    remote::{RemoteCa, RemoteSettings},
};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

use crate::{
    bed::*,
    cluster::{AGENT_A, cluster, listed, running, trust},
    fake_cluster::FakeCluster,
};

const LIFE: Duration = Duration::from_secs(3_600);

/// What becomes of connections that stand.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Now {
    Carried,
    /// As when a process dies: its kernel ends them.
    Closed,
    /// As when a machine dies: nobody says a word any more.
    Silent,
}

/// The address of a Kubernetes Service: a connection stays where it was led when it was made.
struct Address {
    at: SocketAddr,
    leads_to: Arc<Mutex<SocketAddr>>,
    /// Of those that were made until then.
    before: Arc<Mutex<watch::Sender<Now>>>,
    made: Arc<AtomicUsize>,
    /// Of those, the ones that nothing is carried for any more.
    over: Arc<AtomicUsize>,
}

impl Address {
    async fn new(first: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let this = Self {
            at: listener.local_addr().unwrap(),
            leads_to: Arc::new(Mutex::new(first)),
            before: Arc::new(Mutex::new(watch::Sender::new(Now::Carried))),
            made: Arc::default(),
            over: Arc::default(),
        };
        let (leads_to, before) = (this.leads_to.clone(), this.before.clone());
        let (made, over) = (this.made.clone(), this.over.clone());
        tokio::spawn(async move {
            let mut carried = JoinSet::new();
            while let Ok((mut client, _)) = listener.accept().await {
                made.fetch_add(1, Ordering::SeqCst);
                let (to, mut now) = (*leads_to.lock().unwrap(), before.lock().unwrap().subscribe());
                let over = over.clone();
                carried.spawn(async move {
                    let Ok(mut service) = TcpStream::connect(to).await else { return };
                    tokio::select! {
                        _ = copy_bidirectional(&mut client, &mut service) => {}
                        _ = now.wait_for(|now| *now != Now::Carried) => {}
                    }
                    over.fetch_add(1, Ordering::SeqCst);
                    if *now.borrow() == Now::Silent {
                        std::future::pending::<()>().await;
                    }
                });
            }
        });
        this
    }

    /// New connections are led elsewhere, and those that stand end so. Returns when they have.
    async fn follow(&self, to: SocketAddr, end: Now) {
        *self.leads_to.lock().unwrap() = to;
        let before = std::mem::replace(&mut *self.before.lock().unwrap(), watch::Sender::new(Now::Carried));
        before.send_replace(end);
        let all = || self.over.load(Ordering::SeqCst) == self.made.load(Ordering::SeqCst);
        until("the end of connections", async || all()).await;
    }
}

struct Agent {
    manager: Manager,
    stop: watch::Sender<bool>,
}

impl Agent {
    fn new(files: &Bed, address: &Address, roots: marline::identity::Trust) -> Self {
        files.write("token", AGENT_A);
        let settings = RemoteSettings {
            address: address.at.to_string(),
            server_name: Some("ca.test".to_owned()),
            token: files.path("token"),
            cluster_id: None,
        };
        let trust = TrustStore::new(roots);
        let source = RemoteCa::new(&settings, trust.clone()).unwrap();
        let manager = Manager::new(source, trust, ManagerSettings { leaf_lifetime: LIFE });
        let (stop, stopped) = watch::channel(false);
        tokio::spawn({
            let manager = manager.clone();
            async move { manager.run(stopped).await }
        });
        Self { manager, stop }
    }

    fn wants(&self, ids: &[&str]) {
        self.manager.retain(&ids.iter().map(|id| parsed(id)).collect());
    }

    /// `IDENTITY SERIAL`, as the ledger has it.
    fn holds(&self, id: &str) -> Option<String> {
        let serial = self.manager.svid(&parsed(id))?.serial.replace(':', "").to_uppercase();
        Some(format!("{id} {serial}"))
    }

    /// Another than that, while that one stays until then.
    async fn another(&self, id: &str, than: Option<&String>) -> String {
        until(&format!("another certificate of {id}: {:?}", self.manager.last_error(&parsed(id))), async || {
            let now = self.holds(id);
            assert!(than.is_none() || now.is_some(), "the certificate that was there is lost");
            now.is_some() && now.as_ref() != than
        })
        .await;
        self.holds(id).unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        self.stop.send_replace(true);
    }
}

/// Two services, and an agent that has got its first certificate from one of them.
struct Scene {
    cluster: Arc<FakeCluster>,
    one: Bed,
    two: Bed,
    address: Address,
    agent: Agent,
    first: String,
}

impl Scene {
    async fn new() -> Self {
        let cluster = cluster().await;
        let (one, two) = (running(&cluster).await, running(&cluster).await);
        let address = Address::new(one.address()).await;
        let agent = Agent::new(&one, &address, trust(&cluster));
        agent.wants(&[WEB]);
        let first = agent.another(WEB, None).await;
        assert_eq!(agent.manager.counters().failures, 0);
        Self { cluster, one, two, address, agent, first }
    }

    /// The first service dies.
    async fn dies(&mut self, end: Now) {
        self.address.follow(self.two.address(), end).await;
        drop(self.one.running.take());
    }
}

fn parsed(id: &str) -> SpiffeId {
    id.parse().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn when_a_service_dies_the_next_certificate_is_the_others_and_none_is_lost() {
    for end in [Now::Closed, Now::Silent] {
        let mut scene = Scene::new().await;
        scene.dies(end).await;
        let Scene { cluster, address, agent, first, .. } = &scene;
        // One that is new, and the renewal of one that is there.
        agent.wants(&[WEB, DB]);
        let other = agent.another(DB, None).await;
        agent.manager.supplied();
        let second = agent.another(WEB, Some(first)).await;
        assert_eq!(address.made.load(Ordering::SeqCst), 2, "{end:?}: a connection for each service");
        // Without a word a request waits in vain, once; with one it may have gone before the word came.
        let failures = agent.manager.counters().failures;
        assert!(failures == 1 || failures == 0 && end == Now::Closed, "{end:?}: {failures} requests have failed");
        let ledger = listed(cluster, "node-a");
        for held in [first, &other, &second] {
            assert!(ledger.contains(held), "{end:?}: {held} is in no ledger: {ledger:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_request_that_dies_with_its_service_is_made_again_at_the_other() {
    let mut scene = Scene::new().await;
    let cluster = &scene.cluster;
    // The service asks for the ledger and hears nothing until somebody else asks, too.
    let ledger = "/api/v1/namespaces/marline-system/configmaps/marline-ca.node-a";
    let before = cluster.asked(&format!("GET {ledger}"));
    cluster.gathers(Method::GET, ledger, 2);
    scene.agent.manager.supplied();
    until("a request in flight", async || cluster.asked(&format!("GET {ledger}")) > before).await;
    scene.dies(Now::Closed).await;
    let Scene { cluster, agent, first, .. } = &scene;
    let second = agent.another(WEB, Some(first)).await;
    assert!(listed(cluster, "node-a").contains(&second));
    assert_eq!(agent.manager.counters().failures, 1, "the one that died");
}
