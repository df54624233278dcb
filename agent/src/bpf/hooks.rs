//! Whether the kernel programs are attached now. Whoever has the rights can detach what another has attached; nobody is told of it, so
//! the agent looks from time to time, and is not ready while something is missing.

use super::{Capture, pins::inbound_link};
use crate::sys::netns::NetnsCookie;

/// One kernel program in one place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    /// `connect4` and the like, or `inbound-COOKIE` for a pod's namespace.
    pub name: String,
    /// What is the matter, if it is not attached.
    pub missing: Option<String>,
}

impl Hook {
    /// Whether it is the one in this namespace.
    pub fn is_of(&self, netns: NetnsCookie) -> bool {
        self.name == inbound_link(netns)
    }
}

impl Capture {
    /// Those on the pods' cgroup, and those in the namespaces given. Takes a few system calls for each.
    pub fn attached(&self, served: &[NetnsCookie]) -> Vec<Hook> {
        let on_cgroup = self.hooks(&[]).into_iter().map(|hook| Hook { name: hook.name, missing: hook.fault });
        let in_pods =
            served.iter().map(|netns| Hook { name: inbound_link(*netns), missing: self.inbound_fault(*netns) });
        on_cgroup.chain(in_pods).collect()
    }
}
