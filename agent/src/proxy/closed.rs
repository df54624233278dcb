//! Namespaces that are enrolled and not served: they stay closed until it is known that they may be opened. Of a pod that has left the mesh
//! that is soon, of one that has ended when the state says so, and of one that was replaced at its path when it is no more: until then
//! processes may live in it. Whatever cannot be told or done is tried again.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Mutex,
};

use super::{Context, connections::lock};
use crate::{
    state::Snapshot,
    sys::netns::{Netns, NetnsCookie, leads_nowhere},
    words::with_causes,
};

#[derive(Default)]
pub(super) struct Closed(Mutex<HashMap<NetnsCookie, Left>>);

#[derive(Debug, Clone, PartialEq, Eq)]
struct Left {
    path: PathBuf,
    /// Another namespace is served, or was, at its path.
    replaced: bool,
    /// Why it could not be let go when that was tried last, which is said once.
    trouble: Option<String>,
}

/// What is to be done about one.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    /// It is to be opened.
    Leave,
    /// It is to be forgotten once it is no more.
    Expire,
}

impl Left {
    fn due(&self, snapshot: &Snapshot) -> Due {
        // What is to be served again is its task's.
        let stays =
            || snapshot.local.iter().any(|local| local.netns == self.path) || snapshot.closed.contains(&self.path);
        match self.replaced {
            true => Due::Expire,
            false if stays() => Due::Nothing,
            false => Due::Leave,
        }
    }
}

impl Closed {
    /// It is not served any more.
    pub fn keep(&self, cookie: NetnsCookie, path: PathBuf) {
        lock(&self.0).insert(cookie, Left { path, replaced: false, trouble: None });
    }

    /// A namespace is served at a path from here on, instead of `before` and of what else was there.
    pub fn replace(&self, path: &Path, cookie: NetnsCookie, before: Option<NetnsCookie>) {
        let mut all = lock(&self.0);
        if let Some(before) = before {
            all.insert(before, Left { path: path.to_path_buf(), replaced: true, trouble: None });
        }
        all.remove(&cookie);
        for left in all.values_mut().filter(|left| left.path == path) {
            left.replaced = true;
        }
    }

    fn all(&self) -> Vec<(NetnsCookie, Left)> {
        lock(&self.0).iter().map(|(cookie, left)| (*cookie, left.clone())).collect()
    }

    fn done(&self, cookie: NetnsCookie) {
        lock(&self.0).remove(&cookie);
    }

    /// True if it is news.
    fn failed(&self, cookie: NetnsCookie, why: &str) -> bool {
        let mut all = lock(&self.0);
        let Some(left) = all.get_mut(&cookie) else { return false };
        left.trouble.replace(why.to_owned()).is_none_or(|before| before != why)
    }
}

/// Lets go of those that need not be closed any more.
pub(super) fn let_go(ctx: &Context) {
    let snapshot = ctx.state.load();
    for (cookie, left) in ctx.closed.all() {
        let done = match left.due(&snapshot) {
            // Two paths may lead to one namespace.
            _ if lock(&ctx.served).contains_key(&cookie) => Ok(true),
            Due::Nothing => Ok(false),
            Due::Leave => leave(ctx, &snapshot, &left.path, cookie),
            Due::Expire => expire(ctx, &left.path, cookie),
        };
        match done {
            Ok(true) => ctx.closed.done(cookie),
            Ok(false) => {}
            Err(why) if ctx.closed.failed(cookie, &why) => {
                tracing::warn!(pod = %left.path.display(), netns = cookie.0, "the pod stays closed for now: {why}");
            }
            Err(_) => {}
        }
    }
}

/// Opens a pod that has left the mesh, unless its namespace is another wanted pod's, by another path. One whose path leads nowhere has none; if
/// it cannot be told where it leads, this may be the one.
fn leave(ctx: &Context, snapshot: &Snapshot, path: &Path, cookie: NetnsCookie) -> Result<bool, String> {
    let mut unknown = None;
    for other in &snapshot.local {
        match Netns::open(&other.netns) {
            Ok(netns) if netns.cookie() == cookie => return Ok(true),
            Err(error) if !leads_nowhere(&error) => unknown = Some((other, error)),
            Ok(_) | Err(_) => {}
        }
    }
    match unknown {
        Some((other, error)) => {
            Err(format!("its namespace may be that of another pod, {}: {error}", other.netns.display()))
        }
        None => withdraw(ctx, path, cookie, "pod has left the mesh"),
    }
}

/// A namespace is no more when nothing refers to it, by a process, a name or a descriptor.
fn expire(ctx: &Context, path: &Path, cookie: NetnsCookie) -> Result<bool, String> {
    match ctx.capture.outlives(cookie) {
        Ok(true) => withdraw(ctx, path, cookie, "a namespace that was replaced is no more"),
        Ok(false) => Ok(false),
        Err(error) => Err(format!("it cannot be told whether its namespace is there: {}", with_causes(&error))),
    }
}

fn withdraw(ctx: &Context, path: &Path, cookie: NetnsCookie, done: &str) -> Result<bool, String> {
    ctx.capture.withdraw(cookie).map_err(|error| with_causes(&error))?;
    tracing::info!(pod = %path.display(), netns = cookie.0, "{done}");
    Ok(true)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::{
        identity::{SpiffeId, TrustDomain},
        policy::{Policies, Workload},
        state::LocalPod,
    };

    fn snapshot(wanted: &[&str], closed: &[&str]) -> Snapshot {
        let workload = Arc::new(Workload {
            name: "web".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            id: SpiffeId::new(&TrustDomain::default(), "shop", "web").unwrap(),
            addresses: Vec::new(),
            in_mesh: true,
            labels: Default::default(),
            host: Workload::host_of("web", "shop"),
        });
        let local = |path: &&str| Arc::new(LocalPod { workload: workload.clone(), netns: path.into(), zone: None });
        let local = wanted.iter().map(local).collect();
        let mut snapshot = Snapshot::new(Policies::default(), TrustDomain::default(), Vec::new(), local);
        snapshot.closed = closed.iter().map(PathBuf::from).collect();
        snapshot
    }

    fn due(closed: &Closed, snapshot: &Snapshot) -> Vec<(u64, Due)> {
        let mut all: Vec<_> = closed.all().into_iter().map(|(cookie, left)| (cookie.0, left.due(snapshot))).collect();
        all.sort_by_key(|(cookie, _)| *cookie);
        all
    }

    #[test]
    fn what_has_left_is_let_go_and_what_is_wanted_or_has_ended_stays() {
        let closed = Closed::default();
        for (cookie, path) in [(1, "/left"), (2, "/wanted"), (3, "/ended")] {
            closed.keep(NetnsCookie(cookie), path.into());
        }
        let now = snapshot(&["/wanted"], &["/ended"]);
        assert_eq!(due(&closed, &now), [(1, Due::Leave), (2, Due::Nothing), (3, Due::Nothing)]);
        closed.done(NetnsCookie(1));
        assert_eq!(due(&closed, &snapshot(&[], &[])), [(2, Due::Leave), (3, Due::Leave)]);
    }

    #[test]
    fn every_namespace_that_was_replaced_at_a_path_is_remembered_until_it_is_no_more() {
        let (closed, path) = (Closed::default(), Path::new("/web"));
        closed.replace(path, NetnsCookie(1), None);
        assert!(closed.all().is_empty());
        closed.replace(path, NetnsCookie(2), Some(NetnsCookie(1)));
        closed.replace(path, NetnsCookie(3), Some(NetnsCookie(2)));
        // Its processes may live whatever becomes of the path.
        for now in [snapshot(&["/web"], &[]), snapshot(&[], &[])] {
            assert_eq!(due(&closed, &now), [(1, Due::Expire), (2, Due::Expire)]);
        }
        // It is back.
        closed.replace(path, NetnsCookie(1), Some(NetnsCookie(3)));
        assert_eq!(due(&closed, &snapshot(&["/web"], &[])), [(2, Due::Expire), (3, Due::Expire)]);
    }

    #[test]
    fn why_a_namespace_stays_closed_is_said_once() {
        let closed = Closed::default();
        closed.keep(NetnsCookie(1), "/left".into());
        let said = ["this", "this", "that", "this"].map(|why| closed.failed(NetnsCookie(1), why));
        assert_eq!(said, [true, false, true, true]);
        assert!(!closed.failed(NetnsCookie(2), "this"), "nobody's");
    }

    #[test]
    fn what_was_closed_is_replaced_when_its_path_is_wanted_again_and_leads_elsewhere() {
        let (closed, path) = (Closed::default(), Path::new("/web"));
        closed.keep(NetnsCookie(1), path.into());
        closed.keep(NetnsCookie(2), "/other".into());
        closed.replace(path, NetnsCookie(3), None);
        assert_eq!(due(&closed, &snapshot(&["/web"], &[])), [(1, Due::Expire), (2, Due::Leave)]);
        // The same one again is its task's.
        closed.keep(NetnsCookie(3), path.into());
        closed.replace(path, NetnsCookie(3), None);
        assert_eq!(due(&closed, &snapshot(&["/web"], &[])), [(1, Due::Expire), (2, Due::Leave)]);
    }
}
