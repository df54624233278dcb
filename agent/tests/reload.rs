//! Changes of the configuration directory while the agent runs: sound ones are swapped in, others leave the last good
//! one in force, and somebody hears of both.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::{
    fs,
    io::Write,
    net::IpAddr,
    os::unix::fs::symlink,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use marline::{
    config::{self, ConfigErrors, Finding},
    control::files::{ReloadObserver, WatchSettings, watch},
    state::State,
};
use tempfile::TempDir;
use tokio::{
    sync::{mpsc, watch as watch_channel},
    task::JoinHandle,
    time::timeout,
};

const AGENT: &str = "apiVersion: marline.io/v1alpha1
kind: AgentConfig
spec:
  ca: {path: ca}
  capture: {cgroup: /sys/fs/cgroup/pods}
";
const NEVER: Duration = Duration::from_secs(3_600);
const SOON: Duration = Duration::from_millis(50);

fn entry(address: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: web}}\nspec: {{address: {address}}}\n"
    )
}

#[derive(Debug, PartialEq)]
enum Event {
    Accepted(u64),
    Rejected(usize),
}

struct Observer(mpsc::UnboundedSender<Event>);

impl ReloadObserver for Observer {
    fn accepted(&self, generation: u64, _warnings: &[Finding], _restart: &[&'static str]) {
        self.0.send(Event::Accepted(generation)).unwrap();
    }

    fn rejected(&self, errors: &ConfigErrors) {
        self.0.send(Event::Rejected(errors.errors.len())).unwrap();
    }
}

/// A watched directory.
struct Watched {
    state: State,
    events: mpsc::UnboundedReceiver<Event>,
    stop: watch_channel::Sender<bool>,
    task: JoinHandle<()>,
}

impl Watched {
    /// Begins to watch, and waits until it does.
    async fn start(dir: &Path, poll: Duration) -> Self {
        let loaded = config::load(dir).unwrap();
        let state = State::new(loaded.snapshot);
        let (sender, events) = mpsc::unbounded_channel();
        let (stop, stopped) = watch_channel::channel(false);
        let settings = WatchSettings { quiet: Duration::from_millis(30), poll };
        let observer = Arc::new(Observer(sender));
        let task = tokio::spawn(watch(dir.to_owned(), loaded.agent, state.clone(), observer, settings, stopped));
        let mut watched = Self { state, events, stop, task };
        assert_eq!(watched.next().await, Event::Accepted(1), "the first look finds what the start found");
        watched
    }

    async fn next(&mut self) -> Event {
        timeout(Duration::from_secs(20), self.events.recv()).await.expect("nothing was noticed").unwrap()
    }

    fn knows(&self, address: &str) -> bool {
        self.state.load().workload(address.parse::<IpAddr>().unwrap()).is_some()
    }

    async fn stop(self) {
        self.stop.send(true).unwrap();
        timeout(Duration::from_secs(5), self.task).await.unwrap().unwrap();
    }
}

fn directory() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("agent.yaml"), AGENT).unwrap();
    fs::write(dir.path().join("web.yaml"), entry("10.0.0.1")).unwrap();
    dir
}

/// As editors and `kubectl` do.
fn replace(dir: &Path, name: &str, text: &str) {
    let new = dir.join(format!(".{name}.new"));
    fs::write(&new, text).unwrap();
    fs::rename(new, dir.join(name)).unwrap();
}

#[tokio::test]
async fn a_changed_a_new_and_a_removed_file_take_effect() {
    let dir = directory();
    let mut watched = Watched::start(dir.path(), NEVER).await;
    replace(dir.path(), "web.yaml", &entry("10.0.0.2"));
    assert_eq!(watched.next().await, Event::Accepted(2));
    assert!(watched.knows("10.0.0.2") && !watched.knows("10.0.0.1"));
    replace(dir.path(), "more.json", &entry("10.0.0.3").replace("web", "more"));
    assert_eq!(watched.next().await, Event::Accepted(3));
    assert!(watched.knows("10.0.0.2") && watched.knows("10.0.0.3"));
    fs::remove_file(dir.path().join("web.yaml")).unwrap();
    assert_eq!(watched.next().await, Event::Accepted(4));
    assert!(!watched.knows("10.0.0.2") && watched.knows("10.0.0.3"));
    watched.stop().await;
}

#[tokio::test]
async fn a_bad_change_leaves_the_last_good_one_and_is_told_once() {
    let dir = directory();
    let mut watched = Watched::start(dir.path(), SOON).await;
    let both_bad = format!("{}---\n{}", entry("nowhere"), entry("10.0.0.9").replace("web", "BAD"));
    replace(dir.path(), "web.yaml", &both_bad);
    assert_eq!(watched.next().await, Event::Rejected(2));
    assert!(watched.knows("10.0.0.1") && !watched.knows("10.0.0.9"), "not even the sound half of a bad file");
    assert_eq!(watched.state.load().generation, 1);
    replace(dir.path(), "web.yaml", &entry("10.0.0.2"));
    assert_eq!(watched.next().await, Event::Accepted(2), "and not the same rejection again at each look");
    assert!(watched.knows("10.0.0.2"));
    watched.stop().await;
}

#[tokio::test]
async fn a_change_that_says_the_same_swaps_nothing() {
    let dir = directory();
    let mut watched = Watched::start(dir.path(), NEVER).await;
    let before = watched.state.load();
    replace(dir.path(), "web.yaml", &format!("# the same in other words\n{}", entry("\"10.0.0.1\"")));
    assert_eq!(watched.next().await, Event::Accepted(1));
    assert!(Arc::ptr_eq(&before, &watched.state.load()));
    watched.stop().await;
}

#[tokio::test]
async fn a_config_map_that_is_swapped_by_its_link_takes_effect() {
    let dir = tempfile::tempdir().unwrap();
    let version = |name: &str, address: &str| {
        fs::create_dir(dir.path().join(name)).unwrap();
        fs::write(dir.path().join(name).join("agent.yaml"), AGENT).unwrap();
        fs::write(dir.path().join(name).join("web.yaml"), entry(address)).unwrap();
    };
    version("..1", "10.0.0.1");
    symlink("..1", dir.path().join("..data")).unwrap();
    symlink("..data/agent.yaml", dir.path().join("agent.yaml")).unwrap();
    symlink("..data/web.yaml", dir.path().join("web.yaml")).unwrap();
    let mut watched = Watched::start(dir.path(), NEVER).await;
    version("..2", "10.0.0.2");
    symlink("..2", dir.path().join("..data_tmp")).unwrap();
    fs::rename(dir.path().join("..data_tmp"), dir.path().join("..data")).unwrap();
    assert_eq!(watched.next().await, Event::Accepted(2));
    assert!(watched.knows("10.0.0.2"));
    watched.stop().await;
}

#[tokio::test]
async fn what_the_kernel_does_not_tell_is_found_by_looking() {
    let dir = directory();
    let elsewhere = tempfile::tempdir().unwrap();
    let target = elsewhere.path().join("web");
    fs::write(&target, entry("10.0.0.1")).unwrap();
    fs::remove_file(dir.path().join("web.yaml")).unwrap();
    symlink(&target, dir.path().join("web.yaml")).unwrap();
    let mut watched = Watched::start(dir.path(), SOON).await;
    fs::write(&target, entry("10.0.0.2")).unwrap();
    // A look between the truncation and the writing sees an empty file, which is sound: the entry is gone.
    while !watched.knows("10.0.0.2") {
        assert!(matches!(watched.next().await, Event::Accepted(_)));
    }
    watched.stop().await;
}

#[tokio::test]
async fn a_directory_that_is_replaced_is_followed() {
    let parent = tempfile::tempdir().unwrap();
    let dir = parent.path().join("config");
    let fill = |dir: &Path, address: &str| {
        fs::create_dir(dir).unwrap();
        fs::write(dir.join("agent.yaml"), AGENT).unwrap();
        fs::write(dir.join("web.yaml"), entry(address)).unwrap();
    };
    fill(&dir, "10.0.0.1");
    let mut watched = Watched::start(&dir, SOON).await;
    fs::rename(&dir, parent.path().join("old")).unwrap();
    assert_eq!(watched.next().await, Event::Rejected(1));
    assert!(watched.knows("10.0.0.1"), "a directory that is gone takes nothing with it");
    let next = parent.path().join("next");
    fill(&next, "10.0.0.2");
    fs::rename(next, &dir).unwrap();
    while !watched.knows("10.0.0.2") {
        watched.next().await;
    }
    watched.stop().await;
}

/// Collects what is logged in this process, by other tests too: a subscriber for one thread misses events that another
/// thread met first.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Write for Log {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn settings_that_need_a_restart_are_named_and_rejections_are_logged() {
    let log = Log::default();
    let writer = log.clone();
    let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
    tracing::subscriber::set_global_default(subscriber).unwrap();
    let logged = || String::from_utf8(log.0.lock().unwrap().clone()).unwrap();

    let dir = directory();
    let mut watched = Watched::start(dir.path(), NEVER).await;
    let changed = AGENT.replace("spec:", "spec:\n  pump: copy\n  trustDomain: other.org");
    replace(dir.path(), "agent.yaml", &changed);
    assert_eq!(watched.next().await, Event::Accepted(1), "workloads keep the identities that the agent can serve");
    let text = logged();
    assert!(text.contains("needs a restart") && text.contains("spec.trustDomain, spec.pump"), "{text}");

    replace(dir.path(), "web.yaml", "kind: [");
    assert_eq!(watched.next().await, Event::Rejected(1));
    let text = logged();
    assert!(text.contains(&format!("{}/web.yaml:1", dir.path().display())), "{text}");
    let ours = text.lines().find(|line| line.contains("stays in force") && line.contains(dir.path().to_str().unwrap()));
    assert!(ours.is_some_and(|line| line.contains("ERROR") && line.contains("errors=1")), "{text}");
    assert_eq!(text.matches("needs a restart").count(), 1, "said once: {text}");
    watched.stop().await;
}
