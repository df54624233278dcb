//! Where the pods of this node run, and whether they are captured: what the CNI plugin tells, what a predecessor has written down, and what the cgroups
//! show of pods that nobody has told of. Who a pod is and whether it is in the mesh, the API server alone says.
//!
//! A place is kept until its namespace is gone, also after DEL: until then processes may live in there, and they stay captured.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    net::IpAddr,
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::watch,
    task::spawn_blocking,
    time::{Instant, sleep, timeout_at},
};

use crate::{
    cni::{
        CniError, cgroups, install,
        records::{Record, Records, is_uid},
        server::Enroller,
        wire::{Answer, Attachment, Gone, PodRef, Request, Valid},
    },
    config::AgentConfig,
    control::kubernetes::{Listed, Member, Places, PodPlace, Roster, Source},
    proxy::{PodState, Proxy},
    sys::netns::{Netns, leads_nowhere},
    words::with_causes,
};

/// How often namespaces are looked at, and pods that nobody has told of are looked for.
const LOOK: Duration = Duration::from_secs(2);
/// The plugin shall hear an answer, and not end before it.
const MARGIN: Duration = Duration::from_millis(500);

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
        Arc::new(Answers { shared: self.0.clone(), proxy })
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
        // The plugin may have told of it meanwhile.
        if lock(&self.known).contains_key(uid) {
            return;
        }
        // By the descriptor, because a process's number is another process's one day.
        let netns = PathBuf::from(format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd()));
        tracing::warn!(pod = uid, "a pod has started uncaptured and is captured from now on; what it had open is cut");
        let (network, container, addresses) = Default::default();
        let record = Record { uid: uid.to_owned(), network, container, netns, cookie, addresses, late: true };
        if let Err(error) = self.tell(Known { record, held: Some(file) }) {
            tracing::error!("a pod's place cannot be noted: {}", with_causes(&error));
        }
    }

    /// What is not in the mesh now and may be tomorrow has been uncaptured until then.
    fn note_uncaptured(&self, listed: &Listed) {
        let known = lock(&self.known);
        let outside = |uid: &str| listed.members.get(uid).is_some_and(|member| !member.in_mesh);
        let now: Vec<Record> =
            known.values().map(|known| &known.record).filter(|it| !it.late && outside(&it.uid)).cloned().collect();
        drop(known);
        for record in now {
            self.mark_late(&record);
        }
    }

    fn mark_late(&self, record: &Record) {
        let mut known = lock(&self.known);
        let Some(entry) = known.get_mut(&record.uid).filter(|entry| entry.record.cookie == record.cookie) else {
            return;
        };
        if entry.record.late {
            return;
        }
        entry.record.late = true;
        if let Err(error) = self.write(entry) {
            tracing::error!("that a pod is late cannot be written down: {}", with_causes(&error));
        }
        self.places.tell(&entry.record.uid, place(&entry.record));
    }

    fn tell(&self, entry: Known) -> Result<(), CniError> {
        let mut known = lock(&self.known);
        self.write(&entry)?;
        self.places.tell(&entry.record.uid, place(&entry.record));
        known.insert(entry.record.uid.clone(), entry);
        Ok(())
    }

    /// On the disk before anybody acts on it. One that is found by its processes is found so again.
    fn write(&self, entry: &Known) -> Result<(), CniError> {
        if entry.held.is_none() { self.records.write(&entry.record) } else { Ok(()) }
    }

    fn forget(&self, uid: &str, cookie: u64) {
        let mut known = lock(&self.known);
        if known.get(uid).is_some_and(|known| known.record.cookie == cookie) {
            known.remove(uid);
            self.places.forget(uid);
            self.drop_record(uid);
            tracing::debug!(pod = uid, "the pod's namespace is gone");
        }
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

/// The plugin's questions, answered.
pub(super) struct Answers {
    shared: Arc<Shared>,
    proxy: Proxy,
}

impl Enroller for Answers {
    async fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Add(attachment) => self.add(attachment).await,
            Request::Check(attachment) => self.check(&attachment),
            Request::Del(gone) => self.del(&gone),
            Request::Gc { network, valid } => self.gc(&network, &valid),
            Request::Status => self.status(),
        }
    }
}

impl Answers {
    async fn add(&self, attachment: Attachment) -> Answer {
        let began = Instant::now();
        if attachment.pod.uid.is_none() {
            // Of two pods of one name, one after the other, the name does not tell which.
            let why = "the container runtime does not tell the pod's UID (K8S_POD_UID)".into();
            return Answer::Refused { why };
        }
        let patience = Duration::from_millis(attachment.wait_ms);
        let end = began + patience.saturating_sub(MARGIN.min(patience / 4));
        let path = attachment.netns.clone();
        let cookie = match spawn_blocking(move || own_netns(&path)).await {
            Ok(Ok(cookie)) => cookie,
            Ok(Err(why)) => return Answer::Refused { why },
            Err(error) => return Answer::Later { why: error.to_string() },
        };
        let (mut listed, mut changes) = (self.shared.roster.subscribe(), self.proxy.changes());
        let mut told = false;
        loop {
            let now = listed.borrow_and_update().clone();
            changes.borrow_and_update();
            let why = match member(&now, &attachment.pod) {
                Found::Not(why) => why,
                Found::Pod(_, member) if member.host_network => return Answer::Outside,
                Found::Pod(uid, member) => {
                    if !told {
                        let record = record(&attachment, uid, cookie, !member.in_mesh);
                        let shared = self.shared.clone();
                        match spawn_blocking(move || shared.tell(Known { record, held: None })).await {
                            Ok(Ok(())) => told = true,
                            Ok(Err(error)) => return Answer::Later { why: with_causes(&error) },
                            Err(error) => return Answer::Later { why: error.to_string() },
                        }
                    }
                    if !member.in_mesh {
                        let record = record(&attachment, uid, cookie, true);
                        let shared = self.shared.clone();
                        return match spawn_blocking(move || shared.mark_late(&record)).await {
                            Ok(()) => Answer::Outside,
                            Err(error) => Answer::Later { why: error.to_string() },
                        };
                    }
                    if attachment.addresses.is_empty() {
                        let why = "the plugins before marline-cni have given the pod no address".into();
                        return Answer::Refused { why };
                    }
                    match self.captured(&attachment.netns, cookie, &attachment.pod, &attachment.addresses) {
                        Ok(()) => {
                            tracing::info!(pod = %named(&attachment.pod), took = ?began.elapsed(), "ADD: captured");
                            return Answer::Captured;
                        }
                        Err(why) => why,
                    }
                }
            };
            let news = async {
                tokio::select! { _ = listed.changed() => {} _ = changes.changed() => {} }
            };
            if timeout_at(end, news).await.is_err() {
                let why = format!("pod {} is not captured, and does not start: {why}", named(&attachment.pod));
                tracing::warn!("ADD: {why}");
                return Answer::Later { why };
            }
        }
    }

    fn check(&self, attachment: &Attachment) -> Answer {
        let listed = self.shared.roster.now();
        let (uid, member) = match member(&listed, &attachment.pod) {
            Found::Not(why) => return Answer::Later { why },
            Found::Pod(uid, member) => (uid, member),
        };
        if member.host_network || !member.in_mesh {
            return Answer::Outside;
        }
        let known = lock(&self.shared.known).get(uid).map(|known| known.record.clone());
        let why = match known {
            None => "the agent was not told where it runs".to_owned(),
            Some(record) if record.container != attachment.container && !record.container.is_empty() => {
                format!("the agent knows it as the container {}", record.container)
            }
            Some(record) => match self.captured(&record.netns, record.cookie, &attachment.pod, &attachment.addresses) {
                Ok(()) => return Answer::Captured,
                Err(why) => why,
            },
        };
        Answer::Refused { why: format!("pod {} is not captured: {why}", named(&attachment.pod)) }
    }

    /// The runtime removes the namespace next; `look` finds it gone. Until then the pod stays as it is.
    fn del(&self, gone: &Gone) -> Answer {
        let known = lock(&self.shared.known);
        let of = known.values().find(|known| known.record.container == gone.container);
        if let Some(known) = of {
            tracing::debug!(pod = known.record.uid, "DEL: until its namespace is gone it stays captured");
        }
        Answer::Done
    }

    /// Whatever of a network is not valid any more has no namespace any more, or will have none: `look` finds out.
    fn gc(&self, network: &str, valid: &[Valid]) -> Answer {
        let valid: HashSet<&str> = valid.iter().map(|valid| valid.container.as_str()).collect();
        let known = lock(&self.shared.known);
        let of = known.values().filter(|known| known.record.network == network && known.held.is_none());
        let stale = of.filter(|known| !valid.contains(known.record.container.as_str())).count();
        tracing::debug!(network, stale, "GC: what has gone is let go with its namespace");
        Answer::Done
    }

    fn status(&self) -> Answer {
        match self.shared.roster.now().known {
            true => Answer::Done,
            false => {
                Answer::Later { why: "nothing is known of the cluster yet: the API server has not answered".into() }
            }
        }
    }

    /// Whether the namespace is served for this pod, at these addresses, and has passed its test.
    fn captured(&self, netns: &Path, cookie: u64, pod: &PodRef, addresses: &[IpAddr]) -> Result<(), String> {
        let Some((local, status)) = self.proxy.pod_at(netns) else {
            return Err("it is not enrolled yet".into());
        };
        let workload = &local.workload;
        if (workload.namespace.as_str(), workload.name.as_str()) != (pod.namespace.as_str(), pod.name.as_str()) {
            return Err(format!("its namespace is still that of {workload}"));
        }
        if let Some(address) = addresses.iter().find(|address| !workload.addresses.contains(address)) {
            return Err(format!("it is not known by its address {address} yet"));
        }
        match status.state {
            // Paths come again, and what is served there may be what was there before.
            PodState::Ready if status.served.is_none_or(|served| served.0 != cookie) => {
                Err("another namespace was at its path and is served still".into())
            }
            PodState::Ready => Ok(()),
            PodState::Refused => Err(status.reason.unwrap_or_else(|| "it is refused".into())),
        }
    }
}

enum Found<'a> {
    Pod(&'a str, &'a Member),
    Not(String),
}

/// Looks a pod up that the kubelet has named. One of the same name and another UID is another pod.
fn member<'a>(listed: &'a Listed, pod: &PodRef) -> Found<'a> {
    if !listed.known {
        return Found::Not("nothing is known of the cluster yet: the API server has not answered".into());
    }
    let is_named = |member: &Member| *member.namespace == *pod.namespace && *member.name == *pod.name;
    let found = match &pod.uid {
        Some(uid) => listed.members.get_key_value(uid.as_str()),
        None => listed.members.iter().find(|(_, member)| is_named(member) && !member.ended),
    };
    match found {
        Some((uid, member)) if is_named(member) => Found::Pod(uid, member),
        Some((uid, member)) => {
            let (namespace, name) = (&member.namespace, &member.name);
            Found::Not(format!("the API server knows the UID {uid} as {namespace}/{name}"))
        }
        None => Found::Not("the API server has not told of this pod on this node yet".into()),
    }
}

/// In the mesh by the API server's word, and with a namespace of their own.
fn wanted(listed: &Listed) -> impl Iterator<Item = &str> {
    let wanted = listed
        .members
        .iter()
        .filter(|(uid, member)| member.in_mesh && !member.host_network && !member.ended && is_uid(uid));
    wanted.map(|(uid, _)| &**uid)
}

fn record(attachment: &Attachment, uid: &str, cookie: u64, late: bool) -> Record {
    Record {
        uid: uid.to_owned(),
        network: attachment.network.clone(),
        container: attachment.container.clone(),
        netns: attachment.netns.clone(),
        cookie,
        addresses: attachment.addresses.clone(),
        late,
    }
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

/// A namespace that is no pod's would put the node itself under a pod's name.
fn own_netns(path: &Path) -> Result<u64, String> {
    let open = |path: &Path| {
        Netns::open(path).map(|netns| netns.cookie()).map_err(|error| {
            let hint = "the agent must see the node's /run/netns and its processes (hostPID)";
            format!("the network namespace {} cannot be opened: {error}; {hint}", path.display())
        })
    };
    let found = open(path)?;
    let nodes = ["/proc/self/ns/net", "/proc/1/ns/net"];
    if nodes.iter().any(|node| Netns::open(*node).is_ok_and(|netns| netns.cookie() == found)) {
        return Err(format!("{} is the node's own network namespace", path.display()));
    }
    Ok(found.0)
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

fn named(pod: &PodRef) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
