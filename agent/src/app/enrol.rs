//! Where the pods of this node run, and whether they are captured: what the CNI plugin tells, what a predecessor has written down, and what the cgroups
//! show of pods that nobody has told of. Who a pod is and whether it is in the mesh, the API server alone says.
//!
//! What the plugin hears, `answers` says. A place is kept until its namespace is gone, also after DEL: until then processes may live in there, and they stay captured.

mod answers;

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{sync::watch, task::spawn_blocking, time::sleep};

use crate::{
    cni::{
        CniError, cgroups, install,
        records::{Record, Records, is_uid},
        wire::{Gone, Valid},
    },
    config::AgentConfig,
    control::kubernetes::{Listed, Membership, Places, PodPlace, Roster, Source},
    proxy::Proxy,
    sys::netns::{Netns, leads_nowhere},
    words::with_causes,
};

use answers::Answers;

/// How often namespaces are looked at, and pods that nobody has told of are looked for.
const LOOK: Duration = Duration::from_secs(2);

/// All that is known of places. A clone is another handle on the same.
#[derive(Clone)]
pub(super) struct Enrolment(Arc<Shared>);

struct Shared {
    places: Places,
    roster: Roster,
    records: Records,
    /// Below which the pods' cgroups are.
    cgroup: PathBuf,
    configurations: Option<PathBuf>,
    known: Mutex<HashMap<String, Known>>,
    /// Whoever changes what is known has it, from before it is on the disk until it is in `known`: that one is held for moments only, or all
    /// questions would wait for a disk that is slow.
    turn: Mutex<()>,
    fault: Mutex<Option<String>>,
}

struct Known {
    record: Record,
    /// Of one that was found by its processes: it has no other path that lasts.
    held: Option<File>,
}

impl Enrolment {
    /// With the places that a predecessor has written down and that are what they were.
    pub(super) fn open(source: &Source, agent: &AgentConfig) -> Result<Self, CniError> {
        let cni = agent.kubernetes.as_ref().map(|kubernetes| kubernetes.cni.clone()).unwrap_or_default();
        let records = Records::open(&cni.records)?;
        let found = records.all()?;
        let shared = Shared {
            places: source.places.clone(),
            roster: source.roster.clone(),
            records,
            cgroup: agent.capture.cgroup.clone(),
            configurations: cni.configurations,
            known: Mutex::default(),
            turn: Mutex::default(),
            fault: Mutex::default(),
        };
        let this = Self(Arc::new(shared));
        let mut restored = 0_usize;
        for record in found {
            if leads(&record.netns).is_elsewhere(record.cookie) {
                // One that runs all the same is found by its processes.
                this.0.drop_record(&record.uid);
            } else {
                restored += 1;
                this.0.tell(Known { record, held: None })?;
            }
        }
        tracing::info!(pods = restored, "what a predecessor knew of this node's pods is known again");
        this.0.look_at_chain();
        Ok(this)
    }

    /// For the plugin's questions.
    pub(super) fn enroller(&self, proxy: Proxy) -> Arc<Answers> {
        Arc::new(Answers::new(self.0.clone(), proxy))
    }

    /// Finds the pods that belong into the mesh and that nobody has told of, and waits until the state knows what is known here: a
    /// predecessor's pods must not be let go. To be called when the cluster is known.
    pub(super) async fn settle(&self) {
        self.look().await;
        let told = self.0.places.changes();
        let mut listed = self.0.roster.subscribe();
        // Its sender lives in `shared`.
        let _ = listed.wait_for(|listed| listed.known && listed.places >= told).await;
    }

    /// Keeps up with namespaces that go and pods that were not told of, until `stopped`.
    pub(super) async fn run(self, mut stopped: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = sleep(LOOK) => {}
                _ = stopped.wait_for(|stop| *stop) => return,
            }
            self.look().await;
        }
    }

    /// Why pods of this node start without the plugin, if they do.
    pub(super) fn fault(&self) -> Option<String> {
        lock(&self.0.fault).clone()
    }

    async fn look(&self) {
        let shared = self.0.clone();
        if let Err(error) = spawn_blocking(move || shared.look()).await {
            tracing::error!(%error, "looking for this node's pods has failed");
        }
    }
}

impl Shared {
    fn look(&self) {
        self.look_at_chain();
        let listed = self.roster.now();
        if !listed.known {
            return;
        }
        let suspects = self.suspects();
        let lost: HashSet<&str> = wanted(&listed).filter(|uid| !lock(&self.known).contains_key(*uid)).collect();
        if suspects.is_empty() && lost.is_empty() {
            return self.note_uncaptured(&listed);
        }
        let cgroups: HashMap<String, PathBuf> = match cgroups::pods(&self.cgroup) {
            Ok(found) => found.into_iter().collect(),
            Err(error) => {
                // Nothing is forgotten for it: a pod that is taken for gone is let go.
                return tracing::error!(%error, cgroup = %self.cgroup.display(), "this node's pods cannot be looked for");
            }
        };
        for Suspect { uid, was, held } in suspects {
            let Ok(now) = cgroups.get(&uid).map_or(Ok(None), |pod| find(pod)) else { continue };
            let over = listed.members.get(uid.as_str()).is_none_or(|member| member.ended);
            let gone = match now {
                // A path may go and the pod live, as when somebody unmounts it: then it stays what it is.
                Some((_, now)) => now != was,
                // Held, a namespace lives for ever; without a process it may have one again as long as there is its pod.
                None => !held || over,
            };
            if gone {
                self.forget(&uid, was);
            }
        }
        for uid in lost {
            if let Some(Ok(Some((file, cookie)))) = cgroups.get(uid).map(|pod| find(pod)) {
                self.found(uid, file, cookie);
            }
        }
        self.note_uncaptured(&listed);
    }

    /// Known ones whose namespace may be gone: at its path there is none, or another; or there is no path.
    fn suspects(&self) -> Vec<Suspect> {
        let known: Vec<_> =
            lock(&self.known).values().map(|known| (known.record.clone(), known.held.is_some())).collect();
        let suspected =
            known.into_iter().filter(|(record, held)| *held || leads(&record.netns).is_elsewhere(record.cookie));
        suspected.map(|(record, held)| Suspect { uid: record.uid, was: record.cookie, held }).collect()
    }

    /// A pod that nobody has told of: from before the plugin, or from a time without it.
    fn found(&self, uid: &str, file: File, cookie: u64) {
        let turn = lock(&self.turn);
        // The plugin may have told of it meanwhile.
        if lock(&self.known).contains_key(uid) {
            return;
        }
        // By the descriptor, because a process's number is another process's one day.
        let netns = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
        tracing::warn!(pod = uid, "a pod has started uncaptured and is captured from now on; what it had open is cut");
        let (network, container, addresses) = Default::default();
        let record = Record { uid: uid.to_owned(), network, container, netns, cookie, addresses, late: true };
        if let Err(error) = self.put(&turn, Known { record, held: Some(file) }) {
            tracing::error!("a pod's place cannot be noted: {}", with_causes(&error));
        }
    }

    /// What is not in the mesh now and may be tomorrow has been uncaptured until then.
    fn note_uncaptured(&self, listed: &Listed) {
        let known = lock(&self.known);
        let outside = |uid: &str| listed.members.get(uid).is_some_and(|member| member.mesh == Membership::Outside);
        let now: Vec<Record> =
            known.values().map(|known| &known.record).filter(|it| !it.late && outside(&it.uid)).cloned().collect();
        drop(known);
        for record in now {
            self.mark_late(&record);
        }
    }

    fn mark_late(&self, record: &Record) {
        let _turn = lock(&self.turn);
        let of = |known: &Known| known.record.cookie == record.cookie && !known.record.late;
        let found = lock(&self.known).get(&record.uid).filter(|known| of(known)).map(|known| {
            let record = Record { late: true, ..known.record.clone() };
            (record, known.held.is_some())
        });
        let Some((record, held)) = found else { return };
        if let Err(error) = self.write(&record, held) {
            tracing::error!("that a pod is late cannot be written down: {}", with_causes(&error));
        }
        if let Some(known) = lock(&self.known).get_mut(&record.uid) {
            self.places.tell(&record.uid, place(&record));
            known.record = record;
        }
    }

    fn tell(&self, entry: Known) -> Result<(), CniError> {
        self.put(&lock(&self.turn), entry)
    }

    fn put(&self, _turn: &MutexGuard<'_, ()>, entry: Known) -> Result<(), CniError> {
        self.write(&entry.record, entry.held.is_some())?;
        let mut known = lock(&self.known);
        self.places.tell(&entry.record.uid, place(&entry.record));
        known.insert(entry.record.uid.clone(), entry);
        Ok(())
    }

    /// On the disk before anybody acts on it. One that is found by its processes, and held, is found so again.
    fn write(&self, record: &Record, held: bool) -> Result<(), CniError> {
        if held { Ok(()) } else { self.records.write(record) }
    }

    fn forget(&self, uid: &str, cookie: u64) {
        let _turn = lock(&self.turn);
        let mut known = lock(&self.known);
        if known.get(uid).is_none_or(|known| known.record.cookie != cookie) {
            return;
        }
        known.remove(uid);
        self.places.forget(uid);
        drop(known);
        self.drop_record(uid);
        tracing::debug!(pod = uid, "the pod's namespace is gone");
    }

    /// The runtime removes the namespace next; `look` finds it gone. Until then the pod stays as it is.
    fn del(&self, gone: &Gone) {
        let known = lock(&self.known);
        if let Some(known) = known.values().find(|known| known.record.container == gone.container) {
            tracing::debug!(pod = known.record.uid, "DEL: until its namespace is gone it stays captured");
        }
    }

    /// Whatever of a network is not valid any more has no namespace any more, or will have none: `look` finds out.
    fn gc(&self, network: &str, valid: &[Valid]) {
        let valid: HashSet<&str> = valid.iter().map(|valid| valid.container.as_str()).collect();
        let known = lock(&self.known);
        let of = known.values().filter(|known| known.record.network == network && known.held.is_none());
        let stale = of.filter(|known| !valid.contains(known.record.container.as_str())).count();
        tracing::debug!(network, stale, "GC: what has gone is let go with its namespace");
    }

    fn drop_record(&self, uid: &str) {
        if let Err(error) = self.records.remove(uid) {
            tracing::warn!("a record of a pod stays: {}", with_causes(&error));
        }
    }

    fn look_at_chain(&self) {
        let Some(configurations) = &self.configurations else { return };
        let now = install::fault(configurations);
        let mut fault = lock(&self.fault);
        match (&*fault, &now) {
            (was, Some(why)) if was.as_ref() != Some(why) => tracing::error!("the CNI plugin is missing: {why}"),
            (Some(_), None) => tracing::info!("the CNI plugin is in the chain"),
            _ => {}
        }
        *fault = now;
    }
}

struct Suspect {
    uid: String,
    was: u64,
    held: bool,
}

/// In the mesh by the API server's word, and with a namespace of their own.
fn wanted(listed: &Listed) -> impl Iterator<Item = &str> {
    let wanted = listed
        .members
        .iter()
        .filter(|(uid, it)| it.mesh == Membership::Inside && !it.host_network && !it.ended && is_uid(uid));
    wanted.map(|(uid, _)| &**uid)
}

fn place(record: &Record) -> PodPlace {
    let (netns, addresses, late) = (record.netns.clone(), record.addresses.clone().into(), record.late);
    PodPlace { netns, cgroup: None, addresses, late }
}

/// A pod's namespace by its processes.
fn find(pod: &Path) -> io::Result<Option<(File, u64)>> {
    let look = || {
        let Some(found) = cgroups::netns(pod, &cgroups::own())? else { return Ok(None) };
        let netns = Netns::open(format!("/proc/self/fd/{}", found.file.as_raw_fd()))?;
        Ok(Some((found.file, netns.cookie().0)))
    };
    look().inspect_err(|error| {
        tracing::warn!(pod = %pod.display(), %error, "a pod's network namespace cannot be found");
    })
}

/// Where a path leads that led to a namespace.
enum Leads {
    To(u64),
    Nowhere,
    /// It could not be looked at.
    Unknown,
}

impl Leads {
    /// For certain: what is not known may be as it was.
    fn is_elsewhere(&self, was: u64) -> bool {
        match self {
            Self::To(cookie) => *cookie != was,
            Self::Nowhere => true,
            Self::Unknown => false,
        }
    }
}

fn leads(path: &Path) -> Leads {
    match Netns::open(path) {
        Ok(netns) => Leads::To(netns.cookie().0),
        Err(error) if leads_nowhere(&error) => Leads::Nowhere,
        Err(_) => Leads::Unknown,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::{sync::mpsc, thread};

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    fn shared(records: &Path) -> Shared {
        Shared {
            places: Places::default(),
            roster: Roster::default(),
            records: Records::open(records).unwrap(),
            cgroup: PathBuf::new(),
            configurations: None,
            known: Mutex::default(),
            turn: Mutex::default(),
            fault: Mutex::default(),
        }
    }

    fn known(uid: &str) -> Known {
        let (network, container, netns) = ("pods".into(), format!("c-{uid}"), "/run/netns/x".into());
        let record =
            Record { uid: uid.into(), network, container, netns, cookie: 7, addresses: Vec::new(), late: false };
        Known { record, held: None }
    }

    #[test]
    fn questions_are_answered_while_a_disk_takes_its_time() {
        let dir = tempfile::tempdir().unwrap();
        let shared = Arc::new(shared(dir.path()));
        shared.tell(known("here")).unwrap();
        // What is written there waits until somebody reads.
        let slow = dir.path().join("slow.new");
        mkfifo(&slow, Mode::S_IRWXU).unwrap();
        let writer = thread::spawn({
            let shared = Arc::clone(&shared);
            move || shared.tell(known("slow"))
        });
        while shared.turn.try_lock().is_ok() {
            thread::yield_now();
        }
        let (answered, answers) = mpsc::channel();
        thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                shared.del(&Gone { container: "c-here".into(), uid: None });
                shared.gc("pods", &[]);
                let there = lock(&shared.known).contains_key("here");
                answered.send((there, shared.places.of("slow").is_some())).unwrap();
            }
        });
        let (there, early) = answers.recv_timeout(Duration::from_secs(20)).expect("questions wait for the disk");
        assert!(there && !early, "what is not on the disk counts for nothing yet");
        assert!(!writer.is_finished());
        std::fs::read(&slow).unwrap();
        writer.join().unwrap().unwrap();
        assert!(shared.places.of("slow").is_some() && lock(&shared.known).contains_key("slow"));
    }

    #[test]
    fn what_is_late_is_written_down_and_what_is_forgotten_leaves_no_record() {
        let dir = tempfile::tempdir().unwrap();
        let shared = shared(dir.path());
        shared.tell(known("a")).unwrap();
        shared.mark_late(&known("a").record);
        assert!(shared.places.of("a").unwrap().late && shared.records.all().unwrap()[0].late);
        shared.forget("a", 8);
        assert!(shared.places.of("a").is_some(), "another namespace's end is not its own");
        shared.forget("a", 7);
        assert!(shared.places.of("a").is_none() && shared.records.all().unwrap().is_empty());
    }
}
