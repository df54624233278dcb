//! The ledger of a CA in a cluster: one ConfigMap for each node, with the certificates that it has and that have not expired, and with whether
//! it is shut out. Both are one object, and a write counts only for the version that it was made of. So a certificate is on the list before
//! it is handed out, whichever service signs it, and none falls between the list of a node that is shut out and its being so. An API server
//! that cannot be asked, and a ledger that cannot be read, mean no certificate.

use std::{
    collections::{BTreeMap, HashMap},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use aws_lc_rs::digest::{SHA256, digest};
use k8s_openapi::api::core::v1::ConfigMap;
use serde::{Deserialize, Serialize};
use tokio::{
    sync::oneshot,
    time::{sleep, timeout},
};

use super::{Cluster, Fault, TRIES, authority::object, get, put};
use crate::{
    ca::{
        ledger::{NotNoted, REFUSALS_AT_ONCE, REFUSALS_PER_MINUTE, entry::Entry},
        limits::Limiter,
    },
    identity::hex,
};

pub const LABEL: &str = "marline.io/ca-ledger";
const DATA: &str = "ledger.json";
const PREFIX: &str = "marline-ca.";
const LONGEST_NAME: usize = 253;
/// Many times what a node needs, and a small part of what an object may hold (1 MiB): those of several nodes may have to go on one list. An
/// agent that dies over and over shall not use it up for the node's other identities, and pods that ask for themselves not for their agent.
const OF_ONE_IDENTITY: usize = 256;
const OF_ONE_NODE: usize = 2048;
/// How many of them pods may have that ask for themselves, of one identity and of a node.
const ASKED_BY_PODS: usize = 64;
const OF_PODS: usize = OF_ONE_NODE / 2;
/// For one batch to be written.
const WRITE: Duration = Duration::from_secs(25);
/// The clocks of services, and of whoever believes a certificate, differ.
const SKEW: Duration = Duration::from_secs(600);
/// After it what a ledger lists has expired whatever somebody's clock says.
const SPENT: Duration = Duration::from_secs(86_400);
/// As much of a signing key's fingerprint tells it from all others.
const SIGNER: usize = 16;

/// What is known of one node.
#[derive(Clone, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Book {
    pub node: String,
    /// Since when it gets no certificates.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub shut_out: Option<String>,
    /// By identity: those that may count still.
    #[serde(default)]
    pub certificates: BTreeMap<String, Vec<Certificate>>,
}

/// Serial, the second in which it expires, and the beginning of the fingerprint of the key that signed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Certificate(pub String, pub u64, pub String);

/// All nodes' ledgers. A clone is another handle on the same.
#[derive(Clone)]
pub struct Books(Arc<Shared>);

struct Shared {
    cluster: Cluster,
    nodes: Mutex<HashMap<String, Arc<Node>>>,
    reachable: AtomicBool,
    refusals: Limiter,
}

/// Certificates of one node that come at the same time are one write.
#[derive(Default)]
struct Node {
    waiting: Mutex<Vec<Waiting>>,
    turn: tokio::sync::Mutex<()>,
}

type Waiting = (Entry, oneshot::Sender<Result<(), NotNoted>>);

impl Books {
    pub fn new(cluster: Cluster) -> Self {
        let refusals = Limiter::new(REFUSALS_PER_MINUTE, REFUSALS_AT_ONCE);
        Self(Arc::new(Shared { cluster, nodes: Mutex::default(), reachable: AtomicBool::new(true), refusals }))
    }

    /// Notes a certificate that is about to be handed out. Refusals are for the log.
    pub async fn note(&self, entry: Entry) -> Result<(), NotNoted> {
        if !entry.issued() {
            self.log(&entry);
            return Ok(());
        }
        let Some(name) = entry.node.clone() else { return Err(NotNoted::Failed) };
        let node = Arc::clone(lock(&self.0.nodes).entry(name.clone()).or_default());
        let (done, result) = oneshot::channel();
        lock(&node.waiting).push((entry, done));
        // In a task of its own: a caller that goes away takes nobody else's certificate with it.
        tokio::spawn(self.clone().write_waiting(name, node));
        result.await.unwrap_or(Err(NotNoted::Failed))
    }

    async fn write_waiting(self, name: String, node: Arc<Node>) {
        let turn = node.turn.lock().await;
        let mut batch = std::mem::take(&mut *lock(&node.waiting));
        batch.retain(|(_, done)| !done.is_closed());
        if !batch.is_empty() {
            self.write(&name, batch).await;
        }
        drop(turn);
        let mut nodes = lock(&self.0.nodes);
        // Only the map has it, and this: nobody waits.
        if Arc::strong_count(&node) <= 2 {
            nodes.remove(&name);
        }
    }

    /// Whether certificates can be noted. After a failure this is tried.
    pub async fn is_writable(&self) -> bool {
        if self.0.reachable.load(Ordering::Relaxed) {
            return true;
        }
        let there = get(&self.0.cluster.config_maps, &self.0.cluster.names.root_config_map).await.is_ok();
        self.0.reachable.store(there, Ordering::Relaxed);
        there
    }

    async fn write(&self, node: &str, batch: Vec<Waiting>) {
        let entries: Vec<&Entry> = batch.iter().map(|(entry, _)| entry).collect();
        let change = change(&self.0.cluster, node, |book| book.add(&entries, SystemTime::now()));
        let late = || Fault::Other(format!("not written within {WRITE:?}"));
        let written = timeout(WRITE, change).await.unwrap_or_else(|_| Err(late()));
        self.0.reachable.store(written.is_ok(), Ordering::Relaxed);
        let results = written.unwrap_or_else(|fault| {
            tracing::error!("the ledger of node {node} cannot be kept, so it gets no certificate: {fault}");
            vec![Err(NotNoted::Failed); batch.len()]
        });
        for ((_, done), result) in batch.into_iter().zip(results) {
            let _ = done.send(result);
        }
    }

    fn log(&self, entry: &Entry) {
        if self.0.refusals.take("", Instant::now()).is_ok() {
            let Entry { caller, node, peer, identity, code, reason, .. } = entry;
            tracing::info!(?caller, ?node, peer, ?identity, ?code, ?reason, "certificate refused");
        }
    }
}

/// Changes a node's ledger, on top of whatever it is by then. What `change` told of the last try counts; None of it leaves all as it is.
pub(super) async fn change<T>(
    cluster: &Cluster,
    node: &str,
    mut change: impl FnMut(&mut Book) -> (T, bool),
) -> Result<T, Fault> {
    let name = name_of(node);
    for tried in 0..TRIES {
        let found = get(&cluster.config_maps, &name).await?;
        let mut object = found.unwrap_or_else(|| {
            let mut new = object(&name);
            new.metadata.labels.get_or_insert_default().insert(LABEL.to_owned(), "true".to_owned());
            new
        });
        let mut book = read(&object, &name, node)?;
        let (told, changed) = change(&mut book);
        if !changed {
            return Ok(told);
        }
        let text = serde_json::to_string(&book).map_err(|error| Fault::Other(error.to_string()))?;
        object.data.get_or_insert_default().insert(DATA.to_owned(), text);
        match put(&cluster.config_maps, &name, &object).await {
            Ok(()) => return Ok(told),
            Err(Fault::Conflict) => sleep(Duration::from_millis(rand::random_range(0..10 << tried.min(5)))).await,
            Err(fault) => return Err(fault),
        }
    }
    Err(Fault::Conflict)
}

/// The ledger that an object is, if it can be read and has that ledger's name.
pub(super) fn of(object: &ConfigMap) -> Option<Book> {
    let book: Book = serde_json::from_str(object.data.as_ref()?.get(DATA)?).ok()?;
    (object.metadata.name.as_ref()? == &name_of(&book.node)).then_some(book)
}

fn read(object: &ConfigMap, name: &str, node: &str) -> Result<Book, Fault> {
    let Some(text) = object.data.as_ref().and_then(|data| data.get(DATA)) else {
        // One that was there without it is nobody's work of ours.
        return match object.metadata.resource_version {
            None => Ok(Book { node: node.to_owned(), ..Book::default() }),
            Some(_) => {
                Err(Fault::Other(format!("ConfigMap {name} has no {DATA}: bring it back, or delete the object")))
            }
        };
    };
    let book: Book = serde_json::from_str(text)
        .map_err(|error| Fault::Other(format!("ConfigMap {name}, {DATA}: is no ledger: {error}; mend it")))?;
    match book.node == node {
        true => Ok(book),
        false => Err(Fault::Other(format!("ConfigMap {name} is the ledger of node {}", book.node))),
    }
}

impl Book {
    /// What becomes of each certificate, and whether anything is different now.
    fn add(&mut self, entries: &[&Entry], now: SystemTime) -> (Vec<Result<(), NotNoted>>, bool) {
        if let Some(since) = &self.shut_out {
            return (vec![Err(NotNoted::ShutOut(since.clone())); entries.len()], false);
        }
        self.forget_expired(now);
        let mut left = OF_ONE_NODE.saturating_sub(self.certificates.values().map(Vec::len).sum());
        let results: Vec<_> = entries.iter().map(|entry| self.add_one(entry, &mut left)).collect();
        let changed = results.iter().any(Result::is_ok);
        (results, changed)
    }

    fn add_one(&mut self, entry: &Entry, left: &mut usize) -> Result<(), NotNoted> {
        let (Some(identity), Some(serial), Some(signer)) = (&entry.identity, &entry.serial, &entry.signer) else {
            return Err(NotNoted::Failed);
        };
        let end = entry.expires().ok_or(NotNoted::Failed)?;
        let (keep, most) = if entry.by_agent { (0, OF_ONE_IDENTITY) } else { (OF_PODS, ASKED_BY_PODS) };
        let of_it = self.certificates.get(identity).map_or(0, Vec::len);
        if *left <= keep || of_it >= most {
            return Err(NotNoted::TooMany);
        }
        let of_it = self.certificates.entry(identity.clone()).or_default();
        *left -= 1;
        let signer = signer.chars().take(SIGNER).collect();
        of_it.push(Certificate(serial.clone(), seconds(end), signer));
        Ok(())
    }

    pub fn forget_expired(&mut self, now: SystemTime) {
        let now = seconds(now.checked_sub(SKEW).unwrap_or(UNIX_EPOCH));
        for certificates in self.certificates.values_mut() {
            certificates.retain(|certificate| certificate.1 > now);
        }
        self.certificates.retain(|_, certificates| !certificates.is_empty());
    }

    /// Whether nothing would be forgotten with it: neither that its node is shut out, nor a certificate that could count.
    pub(super) fn is_spent(&self, now: SystemTime) -> bool {
        let then = seconds(now.checked_sub(SPENT).unwrap_or(UNIX_EPOCH));
        self.shut_out.is_none() && self.certificates.values().flatten().all(|certificate| certificate.1 <= then)
    }

    pub fn is_signed_by(certificate: &Certificate, fingerprint: &str) -> bool {
        certificate.2.len() == SIGNER && fingerprint.starts_with(&certificate.2)
    }
}

/// The name of a node's ledger. A name that is none of a Kubernetes node, or too long, goes by its hash.
fn name_of(node: &str) -> String {
    let fits = node.len() + PREFIX.len() <= LONGEST_NAME;
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    let ends = |byte: Option<&u8>| byte.is_some_and(u8::is_ascii_alphanumeric);
    let bytes = node.as_bytes();
    if fits && bytes.iter().copied().all(known) && ends(bytes.first()) && ends(bytes.last()) && !node.contains("..") {
        return format!("{PREFIX}{node}");
    }
    format!("{PREFIX}sha256-{}", hex::lower(digest(&SHA256, bytes).as_ref()))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(identity: &str, serial: usize, end: &str) -> Entry {
        Entry {
            outcome: "issued".into(),
            node: Some("node-a".into()),
            identity: Some(identity.into()),
            serial: Some(format!("{serial:032X}")),
            not_after: Some(end.into()),
            signer: Some("ab".repeat(32)),
            by_agent: true,
            ..Entry::default()
        }
    }

    #[test]
    fn a_ledger_holds_what_may_count_still_and_no_more_than_an_object_can() {
        let now = humantime::parse_rfc3339("2030-01-01T12:00:00Z").unwrap();
        let mut book = Book { node: "node-a".into(), ..Book::default() };
        let one = entry("web", 1, "2030-01-01T13:00:00Z");
        assert_eq!(book.add(&[&one], now), (vec![Ok(())], true));
        let hours = |hours: u64| now + Duration::from_secs(hours * 3600);
        book.forget_expired(hours(1));
        assert_eq!(book.certificates["web"].len(), 1, "clocks differ");
        book.forget_expired(hours(2));
        assert!(book.certificates.is_empty());

        let of_one: Vec<Entry> = (0..OF_ONE_IDENTITY + 1).map(|n| entry("web", n, "2030-01-02T12:00:00Z")).collect();
        let (results, _) = book.add(&of_one.iter().collect::<Vec<_>>(), now);
        assert_eq!(results.iter().filter(|result| result.is_ok()).count(), OF_ONE_IDENTITY);
        assert_eq!(results.last(), Some(&Err(NotNoted::TooMany)));
        assert_eq!(book.add(&[&entry("db", 1, "2030-01-02T12:00:00Z")], now).0, [Ok(())], "others have their places");
        let mut asked_by_pods: Vec<Entry> =
            (0..OF_ONE_NODE).map(|n| entry(&format!("pod-{}", n % 40), n, "2030-01-02T12:00:00Z")).collect();
        asked_by_pods.iter_mut().for_each(|entry| entry.by_agent = false);
        let (results, _) = book.add(&asked_by_pods.iter().collect::<Vec<_>>(), now);
        assert!(results.contains(&Err(NotNoted::TooMany)));
        assert!(book.certificates["pod-0"].len() <= ASKED_BY_PODS);
        let held = book.certificates.values().map(Vec::len).sum::<usize>();
        assert_eq!(held, OF_PODS, "pods leave their agent its places");
        let all: Vec<Entry> = (0..OF_ONE_NODE)
            .map(|n| entry(&format!("spiffe://cluster.local/ns/namespace/sa/{}", n % 100), n, "2030-01-02T12:00:00Z"))
            .collect();
        book.add(&all.iter().collect::<Vec<_>>(), now);
        assert_eq!(book.certificates.values().map(Vec::len).sum::<usize>(), OF_ONE_NODE);
        assert!(serde_json::to_vec(&book).unwrap().len() < 200 << 10, "an object has room for it");
    }

    #[test]
    fn what_cannot_be_told_of_a_certificate_is_not_noted_and_a_node_that_is_shut_out_has_none() {
        let now = SystemTime::now();
        let mut book = Book::default();
        for change in [
            |entry: &mut Entry| entry.serial = None,
            |entry: &mut Entry| entry.identity = None,
            |entry: &mut Entry| entry.signer = None,
            |entry: &mut Entry| entry.not_after = Some("soon".into()),
        ] {
            let mut one = entry("web", 1, "2030-01-01T13:00:00Z");
            change(&mut one);
            assert_eq!(book.add(&[&one], now), (vec![Err(NotNoted::Failed)], false));
        }
        book.shut_out = Some("then".into());
        let one = entry("web", 1, "2130-01-01T13:00:00Z");
        assert_eq!(book.add(&[&one], now), (vec![Err(NotNoted::ShutOut("then".into()))], false));
    }

    #[test]
    fn each_nodes_ledger_has_a_name_that_an_object_can_have() {
        assert_eq!(name_of("node-a.example"), "marline-ca.node-a.example");
        for strange in ["Node", "a/b", "", "-a", "a..b", &"a".repeat(250)] {
            let name = name_of(strange);
            assert!(name.starts_with("marline-ca.sha256-") && name.len() <= LONGEST_NAME, "{name}");
        }
        assert_ne!(name_of("A"), name_of("B"));
    }

    #[test]
    fn a_ledger_that_is_not_whole_is_no_ledger() {
        let with = |text: Option<&str>, version: Option<&str>| {
            let mut found = object("x");
            found.metadata.resource_version = version.map(str::to_owned);
            found.data = text.map(|text| BTreeMap::from([(DATA.to_owned(), text.to_owned())]));
            read(&found, "x", "node-a").map_err(|fault| fault.to_string())
        };
        assert!(with(None, None).unwrap().certificates.is_empty());
        assert!(with(None, Some("1")).unwrap_err().contains("has no ledger.json"));
        assert!(with(Some("{"), Some("1")).unwrap_err().contains("is no ledger"));
        assert!(with(Some(r#"{"node": "node-a", "shutout": "x"}"#), Some("1")).unwrap_err().contains("is no ledger"));
        assert!(with(Some(r#"{"node": "node-b"}"#), Some("1")).unwrap_err().contains("node node-b"));
        assert_eq!(with(Some(r#"{"node": "node-a"}"#), Some("1")).unwrap().node, "node-a");
    }
}
