//! What there is to be told of capture at this moment: whether its hooks are attached still, and, without an agent, what the kernel can do
//! and what an agent has left pinned. It changes nothing.
use std::{
    fs, io,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use aya::{maps::MapType, programs::ProgramType};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg},
    sys::statfs::{CGROUP2_SUPER_MAGIC, statfs},
};

use super::{
    Capture,
    load::{ADDRESS_HOOKS, INBOUND},
    pins::{BPF_FS_MAGIC, inbound_link},
};
use crate::{
    sys::{
        links::{self, LinkFacts},
        netns::{Netns, NetnsCookie},
    },
    words::with_causes,
};

/// A pod's network namespace, which has a hook of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodNetns {
    pub cookie: NetnsCookie,
    pub path: PathBuf,
    /// NAMESPACE/NAME.
    pub pod: String,
}

/// One kernel program, where it should be attached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// `connect4` and the like, or `inbound`, which each pod has.
    pub name: &'static str,
    /// Of `inbound`: whose it is.
    pub pod: Option<PodNetns>,
    /// The pods' cgroup, or a pod's network namespace.
    pub target: PathBuf,
    /// Why it is not effective, if it is not.
    pub fault: Option<String>,
}

/// What can be seen of the kernel and of an agent's pins without an agent.
#[derive(Clone, Debug, Default)]
pub struct Outside {
    /// Kinds of program and of map that the kernel does not have.
    pub missing: Vec<&'static str>,
    /// Why the kernel could not be asked.
    pub unasked: Option<String>,
    pub bpffs: bool,
    /// Whether somebody holds the pins: an agent that lives.
    pub held: bool,
    /// Why the pins could not be looked at: then these here mean nothing.
    pub unseen: Option<String>,
    /// Hooks that are pinned: those of the cgroup, and those of pods.
    pub hooks: usize,
    pub pods: usize,
}

impl Capture {
    /// Every hook that should be in force for these pods, as the kernel tells at this moment.
    pub fn hooks(&self, pods: &[PodNetns]) -> Vec<Hook> {
        let on_cgroup = self.hooks_on_cgroup().into_iter();
        on_cgroup.chain(pods.iter().map(|pod| self.inbound(pod, Some((&pod.path, &inode(&pod.path)))))).collect()
    }

    pub(super) fn hooks_on_cgroup(&self) -> Vec<Hook> {
        let cgroup = self.cgroup();
        let wanted = inode(cgroup);
        let names = ["connecting", "create", "egress"].into_iter().chain(ADDRESS_HOOKS);
        let hook = |name| Hook {
            name,
            pod: None,
            target: cgroup.to_path_buf(),
            fault: self.fault(name, name, Some((cgroup, &wanted))),
        };
        names.map(hook).collect()
    }

    /// A pod's; without `wanted` wherever it is attached, for another namespace may be at the pod's path by now.
    pub(super) fn inbound(&self, pod: &PodNetns, wanted: Option<(&Path, &io::Result<u64>)>) -> Hook {
        let fault = self.fault(INBOUND, &inbound_link(pod.cookie), wanted);
        Hook { name: INBOUND, pod: Some(pod.clone()), target: pod.path.clone(), fault }
    }

    fn fault(&self, program: &str, pin: &str, wanted: Option<(&Path, &io::Result<u64>)>) -> Option<String> {
        let pin = self.0.pins.link(pin);
        fault(&links::pinned(&pin), self.program_id(program), wanted, &pin)
    }

    /// Whether the inbound hook of this agent is in force in a namespace.
    pub(super) fn has_inbound(&self, netns: &Netns) -> bool {
        self.program_id(INBOUND).is_some()
            && self.fault(INBOUND, &inbound_link(netns.cookie()), Some((netns.path(), &netns.inode()))).is_none()
    }

    /// The number that the kernel has given to the program that this agent loaded.
    pub(super) fn program_id(&self, name: &str) -> Option<u32> {
        self.0.programs.get(name).copied()
    }
}

/// Why a hook is not in force.
fn fault(
    found: &io::Result<LinkFacts>,
    own: Option<u32>,
    wanted: Option<(&Path, &io::Result<u64>)>,
    pin: &Path,
) -> Option<String> {
    let facts = match found {
        Ok(facts) => facts,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Some(format!("its pin {} is gone: somebody has removed it", pin.display()));
        }
        Err(error) => return Some(format!("its pin {} cannot be asked: {error}", pin.display())),
    };
    if let Some((target, Err(error))) = wanted {
        return Some(format!("{} cannot be found: {error}", target.display()));
    }
    let Some(present) = facts.target else {
        return Some("it is attached to nothing: somebody has detached it, or what it hung on is gone".to_owned());
    };
    match wanted {
        Some((target, Ok(wanted))) if present != *wanted => {
            Some(format!("it is attached to something else than what {} is now", target.display()))
        }
        _ if own.is_some_and(|own| own != facts.program) => {
            Some("somebody has put another program in its place".to_owned())
        }
        _ => None,
    }
}

fn inode(path: &Path) -> io::Result<u64> {
    fs::metadata(path).map(|metadata| metadata.ino())
}

/// Whether `path` is a directory of cgroup2, in words if it is not.
pub fn cgroup_fault(path: &Path) -> Option<String> {
    match statfs(path) {
        Err(errno) => Some(format!("{} cannot be opened: {errno}", path.display())),
        Ok(found) if found.filesystem_type() != CGROUP2_SUPER_MAGIC => {
            Some(format!("{} is no directory of cgroup2", path.display()))
        }
        Ok(_) => None,
    }
}

/// Looks from outside, whether an agent runs or not.
pub fn outside(pin_path: &Path) -> Outside {
    let mut found = Outside::default();
    let there = pin_path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    found.bpffs = statfs(there).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC);
    if let Err(error) = look_at_pins(pin_path, &mut found) {
        found.unseen = Some(format!("{}: {error}", pin_path.display()));
    }
    let programs = [
        ("programs on connect() (cgroup_sock_addr)", ProgramType::CgroupSockAddr),
        ("programs on TCP's events (sock_ops)", ProgramType::SockOps),
        ("programs on new sockets (cgroup_sock)", ProgramType::CgroupSock),
        ("programs on packets (cgroup_skb)", ProgramType::CgroupSkb),
        ("programs on socket lookup (sk_lookup)", ProgramType::SkLookup),
    ];
    for (name, kind) in programs {
        match aya::sys::is_program_supported(kind) {
            Ok(true) => {}
            Ok(false) => found.missing.push(name),
            Err(error) => found.unasked = Some(with_causes(&error)),
        }
    }
    let maps = [
        ("maps of sockets (sockhash)", MapType::SockHash),
        ("storage on sockets (sk_storage)", MapType::SkStorage),
        ("maps that make room (lru_hash)", MapType::LruHash),
    ];
    for (name, kind) in maps {
        match aya::sys::is_map_supported(kind) {
            Ok(true) => {}
            Ok(false) => found.missing.push(name),
            Err(error) => found.unasked = Some(with_causes(&error)),
        }
    }
    found
}

/// Nothing there is no error: then nothing is pinned.
fn look_at_pins(pin_path: &Path, found: &mut Outside) -> io::Result<()> {
    let there = |outcome: io::Error| match outcome.kind() {
        io::ErrorKind::NotFound => Ok(()),
        _ => Err(outcome),
    };
    match fs::read_dir(pin_path.join("links")) {
        Ok(entries) => {
            for entry in entries {
                match entry?.file_name().to_string_lossy().starts_with("inbound-") {
                    true => found.pods += 1,
                    false => found.hooks += 1,
                }
            }
        }
        Err(error) => there(error)?,
    }
    let directory = match fs::File::open(pin_path) {
        Ok(directory) => directory,
        Err(error) => return there(error),
    };
    // Shared, so that two who look do not take each other for an agent. An agent that starts at this moment tries again.
    match Flock::lock(directory, FlockArg::LockSharedNonblock) {
        Ok(_) => Ok(()),
        Err((_, Errno::EWOULDBLOCK)) => {
            found.held = true;
            Ok(())
        }
        Err((_, errno)) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looking_tells_an_agent_from_others_who_look_and_says_what_it_cannot_see() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("links")).unwrap();
        for name in ["connect4", "inbound-7"] {
            fs::write(dir.path().join("links").join(name), "").unwrap();
        }
        let look = || {
            let mut found = Outside::default();
            look_at_pins(dir.path(), &mut found).map(|()| (found.held, found.hooks, found.pods)).unwrap()
        };
        let lock = |how| Flock::lock(fs::File::open(dir.path()).unwrap(), how).unwrap();
        assert_eq!(look(), (false, 1, 1));
        let other = lock(FlockArg::LockSharedNonblock);
        assert_eq!(look(), (false, 1, 1), "somebody looks, too");
        drop(other);
        let _agent = lock(FlockArg::LockExclusiveNonblock);
        assert_eq!(look(), (true, 1, 1));
        let mut found = Outside::default();
        assert!(look_at_pins(Path::new("/dev/null"), &mut found).is_err());
        assert!(look_at_pins(Path::new("/nowhere/at/all"), &mut found).is_ok());
    }

    fn ask(found: io::Result<LinkFacts>, own: u32, wanted: io::Result<u64>) -> Option<String> {
        let wanted = (Path::new("/sys/fs/cgroup/pods"), &wanted);
        fault(&found, Some(own), Some(wanted), Path::new("/sys/fs/bpf/m/links/connect4"))
    }

    #[test]
    fn a_hook_is_in_force_only_if_it_holds_our_program_where_it_should_be() {
        let facts = |program, target| Ok(LinkFacts { program, target });
        assert_eq!(ask(facts(7, Some(42)), 7, Ok(42)), None);
        let says = |outcome: Option<String>, text: &str| {
            assert!(outcome.as_ref().is_some_and(|f| f.contains(text)), "{outcome:?}")
        };
        says(ask(facts(7, None), 7, Ok(42)), "attached to nothing");
        says(ask(facts(7, Some(43)), 7, Ok(42)), "something else");
        says(ask(facts(8, Some(42)), 7, Ok(42)), "another program");
        says(ask(Err(io::ErrorKind::NotFound.into()), 7, Ok(42)), "is gone");
        says(ask(facts(7, Some(42)), 7, Err(io::ErrorKind::NotFound.into())), "/sys/fs/cgroup/pods cannot be found");
    }

    #[test]
    fn what_is_no_cgroup_is_told_in_words() {
        assert!(cgroup_fault(Path::new("/proc")).is_some_and(|fault| fault.contains("no directory of cgroup2")));
        assert!(cgroup_fault(Path::new("/nowhere")).is_some_and(|fault| fault.contains("cannot be opened")));
    }
}
