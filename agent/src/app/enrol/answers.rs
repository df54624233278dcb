//! The plugin's questions, answered from what is known here: ADD waits until the pod is captured, all others say what is so.

use std::{net::IpAddr, path::Path, sync::Arc, time::Duration};

use tokio::{
    task::spawn_blocking,
    time::{Instant, timeout_at},
};

use super::{Known, Shared, lock};
use crate::{
    cni::{
        records::Record,
        server::Enroller,
        wire::{Answer, Attachment, PodRef, Request},
    },
    control::kubernetes::{Listed, Member, Membership},
    proxy::{PodState, Proxy},
    sys::netns::Netns,
    words::with_causes,
};

/// The plugin shall hear an answer, and not end before it.
const MARGIN: Duration = Duration::from_millis(500);

/// The plugin's questions, answered.
pub(in crate::app) struct Answers {
    shared: Arc<Shared>,
    proxy: Proxy,
}

impl Enroller for Answers {
    async fn answer(&self, request: Request) -> Answer {
        match request {
            Request::Add(attachment) => self.add(attachment).await,
            Request::Check(attachment) => self.check(&attachment),
            Request::Del(gone) => {
                self.shared.del(&gone);
                Answer::Done
            }
            Request::Gc { network, valid } => {
                self.shared.gc(&network, &valid);
                Answer::Done
            }
            Request::Status => self.status(),
        }
    }
}

impl Answers {
    pub(super) fn new(shared: Arc<Shared>, proxy: Proxy) -> Self {
        Self { shared, proxy }
    }

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
                        let record = record(&attachment, uid, cookie, member.is_outside());
                        let shared = self.shared.clone();
                        match spawn_blocking(move || shared.tell(Known { record, held: None })).await {
                            Ok(Ok(())) => told = true,
                            Ok(Err(error)) => return Answer::Later { why: with_causes(&error) },
                            Err(error) => return Answer::Later { why: error.to_string() },
                        }
                    }
                    if member.is_outside() {
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
        if member.is_outside() {
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

/// Looks a pod up that the kubelet has named, of which it is known whether it is in the mesh. One of the same name and another UID is another
/// pod.
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
        // To be taken for one outside it would have to be known as such: it would start uncaptured.
        Some((_, member)) if is_named(member) && member.mesh == Membership::NotKnown && !member.host_network => {
            Found::Not(format!("the API server has not told of the namespace {} yet", member.namespace))
        }
        Some((uid, member)) if is_named(member) => Found::Pod(uid, member),
        Some((uid, member)) => {
            let (namespace, name) = (&member.namespace, &member.name);
            Found::Not(format!("the API server knows the UID {uid} as {namespace}/{name}"))
        }
        None => Found::Not("the API server has not told of this pod on this node yet".into()),
    }
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

fn named(pod: &PodRef) -> String {
    format!("{}/{}", pod.namespace, pod.name)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Of this node's pod `foo/web`, and of its namespace, this was told.
    fn listed(mesh: Membership, host_network: bool) -> Listed {
        let member = Member { namespace: "foo".into(), name: "web".into(), mesh, host_network, ended: false };
        Listed { members: Arc::new([("uid-web".into(), member)].into()), places: 0, known: true }
    }

    fn found(listed: &Listed) -> Result<bool, String> {
        let pod = PodRef { namespace: "foo".into(), name: "web".into(), uid: Some("uid-web".into()) };
        match member(listed, &pod) {
            Found::Pod(_, member) => Ok(member.is_outside()),
            Found::Not(why) => Err(why),
        }
    }

    #[test]
    fn a_pod_is_outside_only_if_that_is_known_and_else_waits_for_its_namespace() {
        assert_eq!(found(&listed(Membership::Inside, false)), Ok(false));
        assert_eq!(found(&listed(Membership::Outside, false)), Ok(true));
        let why = found(&listed(Membership::NotKnown, false)).unwrap_err();
        assert!(why.contains("not told of the namespace foo yet"), "{why}");
        // It cannot be captured whatever its namespace says.
        assert_eq!(found(&listed(Membership::NotKnown, true)), Ok(true));
    }
}
