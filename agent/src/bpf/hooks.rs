//! Whether the kernel programs are attached now. Whoever has the rights can detach what another has attached; nobody is told of it, so
//! the agent looks from time to time, and is not ready while something is missing.

use super::{Capture, load::CGROUP_LINKS, pins::inbound_link};
use crate::sys::{bpf_link, netns::NetnsCookie};

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
    pub fn hooks(&self, served: &[NetnsCookie]) -> Vec<Hook> {
        let names =
            CGROUP_LINKS.into_iter().map(str::to_owned).chain(served.iter().map(|cookie| inbound_link(*cookie)));
        names
            .map(|name| {
                let missing = match bpf_link::is_attached(&self.0.pins.link(&name)) {
                    Ok(true) => None,
                    Ok(false) => Some("it was detached".to_owned()),
                    Err(error) => Some(format!("its link is gone: {error}")),
                };
                Hook { name, missing }
            })
            .collect()
    }
}
