//! The kubelet's own connections: the hook on its cgroup, the ports that it may probe, and what has become of its connections.
//!
//! Which ports pods declare is `control`'s to know, and what is written of a connection `proxy`'s. The programs are
//! `ebpf/src/kubelet.rs`. Whatever is not sure lets nothing in: a cgroup that may hold others, a hook that was away for a while.
use std::{
    collections::BTreeSet,
    fs::{self, File},
    io,
    net::SocketAddr,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
    sync::PoisonError,
    time::Duration,
};

use marline_common::{Flow, KubeletEntry, PodPort};
use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs, statfs};

use super::{
    BpfError, Capture,
    entries::absent_is_fine,
    load::{self, KUBELET, Maps},
};
use crate::sys::{
    clock,
    links::{self, LinkFacts},
    netns::NetnsCookie,
    tcp_info::TcpState,
};

/// Where distributions have the kubelet, below the mount of cgroup2: systemd's unit in the slices of kubeadm, kind, and Bottlerocket and Amazon
/// Linux; then Talos; then a kubelet that was told `--kubelet-cgroups=/kubelet`.
pub const WELL_KNOWN: [&str; 5] = [
    "system.slice/kubelet.service",
    "kubelet.slice/kubelet.service",
    "runtime.slice/kubelet.service",
    "podruntime/kubelet",
    "kubelet",
];

#[derive(Debug, thiserror::Error)]
pub enum KubeletFault {
    #[error("{} is no directory of cgroup2", .0.display())]
    NotACgroup(PathBuf),
    #[error("{} cannot be looked at", path.display())]
    Unseen { path: PathBuf, source: io::Error },
    #[error("{} has cgroups below it, so others than the kubelet may be in there", .0.display())]
    NotALeaf(PathBuf),
    #[error("{} is among the pods' cgroups, and proves nothing", .0.display())]
    AmongPods(PathBuf),
    #[error("none of the usual cgroups of the kubelet is there ({})", WELL_KNOWN.map(|place| root.join(place).display().to_string()).join(", "))]
    NotFound { root: PathBuf },
    #[error(transparent)]
    Bpf(#[from] BpfError),
}

/// A connection of the kubelet's that has ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct EndedProbe {
    pub client: SocketAddr,
    pub server: SocketAddr,
    pub lasted: Duration,
    /// Whether the pod has taken it.
    pub established: bool,
    /// How long ago it ended.
    pub ago: Duration,
    /// Bytes of the pod's, and of the kubelet's.
    pub sent: u64,
    pub received: u64,
}

/// What has become of the kubelet's connections since it was asked.
#[derive(Default)]
pub struct EndedProbes {
    /// Those that were let in.
    pub admitted: Vec<EndedProbe>,
    /// Those that were not, because pods have seen them from another port than they left with.
    pub translated: Vec<EndedProbe>,
}

impl Capture {
    /// Sees to it that the hook is on the kubelet's cgroup as it is now: at `place`, or where it usually is. Otherwise there is no hook, and
    /// none of its connections is let in.
    pub fn follow_kubelet(&self, place: Option<&Path>) -> Result<PathBuf, KubeletFault> {
        let found = match find(self.cgroup(), place) {
            Ok(found) => found,
            Err(fault) => {
                self.forget_kubelet()?;
                return Err(fault);
            }
        };
        let pinned = links::pinned(&self.0.pins.link(KUBELET));
        match judge(&pinned, self.program_id(KUBELET), found.inode) {
            Hooked::InForce => return Ok(found.path),
            Hooked::Predecessors => {}
            // While there was no hook, sockets may have ended unseen.
            Hooked::Not => self.forget_kubelet()?,
        }
        let mut ebpf = self.0.ebpf.lock().unwrap_or_else(PoisonError::into_inner);
        load::attach_kubelet(&mut ebpf, &self.0.pins, &found.file, &found.path)?;
        Ok(found.path)
    }

    /// From now on none of the kubelet's connections is let in, nor goes on.
    pub fn forget_kubelet(&self) -> Result<(), BpfError> {
        self.0.pins.remove_link(KUBELET)?;
        let mut maps = self.maps();
        let flows: Vec<_> = maps.kubelet.keys().collect::<Result<_, _>>().map_err(BpfError::map("KUBELET"))?;
        for flow in flows {
            absent_is_fine(maps.kubelet.remove(&flow)).map_err(BpfError::map("KUBELET"))?;
        }
        Ok(())
    }

    /// The ports of the pod that the kubelet may connect to are these and no others.
    pub fn declare_probes(&self, netns: NetnsCookie, ports: &[u16]) -> Result<(), BpfError> {
        let wanted: BTreeSet<u16> = ports.iter().map(|port| port.to_be()).collect();
        let mut maps = self.maps();
        forget_probed(&mut maps, |key| key.netns == netns && !wanted.contains(&key.port))?;
        for port in wanted {
            if let Err(source) = maps.probed_ports.insert(PodPort::new(netns, port), 1, 0) {
                // Half of them would be told of to nobody, and stay.
                forget_probed(&mut maps, |key| key.netns == netns)?;
                return Err(BpfError::Map { name: "PROBED_PORTS", source });
            }
        }
        Ok(())
    }

    /// Forgets what a predecessor has declared for others than these.
    pub fn retain_probes(&self, wanted: impl Fn(NetnsCookie) -> bool) -> Result<(), BpfError> {
        forget_probed(&mut self.maps(), |key| !wanted(key.netns))
    }

    /// The kubelet's connections that have ended, each told once, when nothing of it is let out any more.
    pub fn ended_probes(&self) -> Result<EndedProbes, BpfError> {
        let (now, mut ended) = (clock::monotonic_nanos(), EndedProbes::default());
        let mut maps = self.maps();
        let lost = |entry: &KubeletEntry| entry.is_lost(now);
        let over = |entry: &KubeletEntry| !entry.may_be_answered(now) || lost(entry);
        let found: Vec<(Flow, KubeletEntry)> =
            maps.kubelet.iter().filter_map(Result::ok).filter(|(_, entry)| over(entry)).collect();
        for (flow, entry) in found {
            // The kubelet may have connected from the same port again.
            if maps.kubelet.get(&flow, 0).is_ok_and(|now| now == entry) {
                absent_is_fine(maps.kubelet.remove(&flow)).map_err(BpfError::map("KUBELET"))?;
                if lost(&entry) {
                    tracing::warn!(
                        "the end of a connection of the kubelet's was missed; does another program use its cgroup's sock_ops?"
                    );
                    continue;
                }
                if entry.admitted != 0 {
                    ended.admitted.push(told(flow, &entry, now));
                } else if entry.was_translated() {
                    ended.translated.push(told(flow, &entry, now));
                }
            }
        }
        Ok(ended)
    }
}

pub(super) fn forget_probed(maps: &mut Maps, gone: impl Fn(&PodPort) -> bool) -> Result<(), BpfError> {
    let ports: Vec<_> = maps.probed_ports.keys().collect::<Result<_, _>>().map_err(BpfError::map("PROBED_PORTS"))?;
    for port in ports.into_iter().filter(gone) {
        absent_is_fine(maps.probed_ports.remove(&port)).map_err(BpfError::map("PROBED_PORTS"))?;
    }
    Ok(())
}

fn told(flow: Flow, entry: &KubeletEntry, now: u64) -> EndedProbe {
    let between = |from: u64, to: u64| Duration::from_nanos(to.saturating_sub(from));
    let state = TcpState(u8::try_from(entry.state).unwrap_or_default());
    // SYN and FIN are counted with the bytes. In FIN_WAIT2 and behind it the own FIN was acknowledged.
    let fin_acked = matches!(state, TcpState::FIN_WAIT2 | TcpState::LAST_ACK | TcpState::TIME_WAIT | TcpState::CLOSING);
    EndedProbe {
        client: flow.client.into(),
        server: flow.server.into(),
        lasted: between(entry.opened, entry.closed),
        established: state != TcpState::SYN_SENT,
        ago: between(entry.closed, now),
        sent: entry.bytes_received.saturating_sub(u64::from(state.fin_received() == Some(true))),
        received: entry.bytes_acked.saturating_sub(1 + u64::from(fin_acked)),
    }
}

enum Hooked {
    InForce,
    /// A predecessor's program, on the same cgroup: it sees what happens until ours does.
    Predecessors,
    Not,
}

fn judge(pinned: &io::Result<LinkFacts>, own: Option<u32>, wanted: u64) -> Hooked {
    match pinned {
        Ok(facts) if facts.target == Some(wanted) && own == Some(facts.program) => Hooked::InForce,
        Ok(facts) if facts.target == Some(wanted) => Hooked::Predecessors,
        _ => Hooked::Not,
    }
}

struct Found {
    path: PathBuf,
    file: File,
    inode: u64,
}

fn find(pods: &Path, place: Option<&Path>) -> Result<Found, KubeletFault> {
    if let Some(place) = place {
        return open(place, pods);
    }
    let root = root_of(pods).to_path_buf();
    let mut fault = None;
    for place in usual(&root) {
        match open(&place, pods) {
            Ok(found) => return Ok(found),
            Err(error) => fault = fault.or(Some(error)),
        }
    }
    Err(fault.unwrap_or(KubeletFault::NotFound { root }))
}

/// The usual places that somebody is in: a kubelet that has moved elsewhere may leave its unit's cgroup behind.
fn usual(root: &Path) -> impl Iterator<Item = PathBuf> {
    let used = |place: &PathBuf| fs::read_to_string(place.join("cgroup.procs")).is_ok_and(|list| !list.is_empty());
    WELL_KNOWN.map(|place| root.join(place)).into_iter().filter(used)
}

/// The highest directory above the pods' that is of cgroup2 still: where it is mounted.
fn root_of(pods: &Path) -> &Path {
    let of_cgroup2 = |path: &&Path| statfs(*path).is_ok_and(|found| found.filesystem_type() == CGROUP2_SUPER_MAGIC);
    pods.ancestors().take_while(of_cgroup2).last().unwrap_or(pods)
}

/// A hook sees all that is below its cgroup, so there must be nothing below, and pods nowhere near.
fn open(path: &Path, pods: &Path) -> Result<Found, KubeletFault> {
    let unseen = |source| KubeletFault::Unseen { path: path.to_path_buf(), source };
    let file = File::open(path).map_err(unseen)?;
    let filesystem = fstatfs(file.as_fd()).map_err(|errno| unseen(errno.into()))?;
    if filesystem.filesystem_type() != CGROUP2_SUPER_MAGIC {
        return Err(KubeletFault::NotACgroup(path.to_path_buf()));
    }
    let (real, pods) = (fs::canonicalize(path).map_err(unseen)?, fs::canonicalize(pods).map_err(unseen)?);
    if real.starts_with(&pods) {
        return Err(KubeletFault::AmongPods(path.to_path_buf()));
    }
    for entry in fs::read_dir(path).map_err(unseen)? {
        if entry.and_then(|entry| entry.file_type()).map_err(unseen)?.is_dir() {
            return Err(KubeletFault::NotALeaf(path.to_path_buf()));
        }
    }
    let inode = file.metadata().map_err(unseen)?.ino();
    Ok(Found { path: path.to_path_buf(), file, inode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hook_is_the_kubelets_only_on_its_cgroup_of_now() {
        let facts = |program, target| Ok(LinkFacts { program, target });
        assert!(matches!(judge(&facts(7, Some(42)), Some(7), 42), Hooked::InForce));
        assert!(matches!(judge(&facts(6, Some(42)), Some(7), 42), Hooked::Predecessors));
        for gone in [facts(7, Some(41)), facts(7, None), facts(6, Some(41)), Err(io::ErrorKind::NotFound.into())] {
            assert!(matches!(judge(&gone, Some(7), 42), Hooked::Not), "{gone:?}");
        }
    }

    #[test]
    fn what_is_no_cgroup_is_not_the_kubelets_and_says_so() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(open(dir.path(), dir.path()), Err(KubeletFault::NotACgroup(_))));
        let gone = dir.path().join("gone");
        assert!(matches!(find(dir.path(), Some(&gone)), Err(KubeletFault::Unseen { .. })));
        let nowhere = find(dir.path(), None).map(|found| found.path).unwrap_err().to_string();
        assert!(nowhere.contains("system.slice/kubelet.service"), "{nowhere}");
    }

    #[test]
    fn a_place_that_nobody_is_in_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        for (place, processes) in [("system.slice/kubelet.service", ""), ("kubelet", "1\n")] {
            fs::create_dir_all(dir.path().join(place)).unwrap();
            fs::write(dir.path().join(place).join("cgroup.procs"), processes).unwrap();
        }
        assert_eq!(usual(dir.path()).collect::<Vec<_>>(), [dir.path().join("kubelet")]);
    }

    #[test]
    fn a_connection_is_told_of_without_its_syn_and_fin() {
        let end = |address: &str| marline_common::Endpoint::from(address.parse::<SocketAddr>().unwrap());
        let flow = Flow::new(end("10.0.0.1:4000"), end("10.0.0.2:80"));
        let entry = KubeletEntry {
            opened: 1_000,
            closed: 3_000,
            admitted: 1,
            state: 9,
            bytes_acked: 12,
            bytes_received: 21,
            ..KubeletEntry::default()
        };
        let ended = told(flow, &entry, 10_000);
        assert_eq!((ended.sent, ended.received), (20, 10));
        assert_eq!((ended.lasted, ended.ago), (Duration::from_nanos(2_000), Duration::from_nanos(7_000)));
        assert!(ended.established && !told(flow, &KubeletEntry { state: 2, ..entry }, 10_000).established);
        assert_eq!((ended.client.to_string(), ended.server.port()), ("10.0.0.1:4000".into(), 80));
        assert_eq!(told(flow, &KubeletEntry::default(), 0).received, 0, "it never came to be");
    }
}
