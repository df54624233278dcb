//! Whether the kernel programs are attached now. Whoever has the rights can detach what another has attached; nobody is told of it, so
//! the agent looks from time to time, and is not ready while something is missing. What a hook is, and how it is asked for, is in `facts`.

use std::{fmt, io};

use super::{
    BpfError, Capture,
    facts::{Hook, PodNetns},
    pins::inbound_link,
};
use crate::sys::{links, netns::NetnsCookie};

impl Hook {
    /// Whether it is the one in this namespace.
    pub fn is_of(&self, netns: NetnsCookie) -> bool {
        self.pod.as_ref().is_some_and(|pod| pod.cookie == netns)
    }

    /// Whether all of a name are in force, each name once: pods come and go.
    pub fn by_name(hooks: &[Self]) -> Vec<(&'static str, bool)> {
        let mut found: Vec<(&'static str, bool)> = Vec::new();
        for hook in hooks {
            match found.iter_mut().find(|(name, _)| *name == hook.name) {
                Some((_, attached)) => *attached &= hook.fault.is_none(),
                None => found.push((hook.name, hook.fault.is_none())),
            }
        }
        found
    }
}

/// The name, and of a pod's the pod.
impl fmt::Display for Hook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)?;
        self.pod.as_ref().map_or(Ok(()), |pod| write!(f, " of pod {}", pod.pod))
    }
}

impl Capture {
    /// Those on the pods' cgroup, and those in the namespaces given. Takes a few system calls for each.
    pub fn attached(&self, served: &[PodNetns]) -> Vec<Hook> {
        let on_cgroup = self.hooks_on_cgroup().into_iter();
        on_cgroup.chain(served.iter().map(|pod| self.inbound(pod, None))).collect()
    }

    /// Whether a namespace that was enrolled is no more, and all that is pinned of it is left over.
    pub fn outlives(&self, netns: NetnsCookie) -> Result<bool, BpfError> {
        let pin = self.0.pins.link(&inbound_link(netns));
        match links::pinned(&pin) {
            Ok(facts) => Ok(facts.target.is_none()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
            Err(error) => Err(BpfError::file("cannot examine", pin)(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_share_a_name_that_stands_for_the_worst_of_them() {
        let hook = |name, pod: Option<&str>, fault: Option<&str>| Hook {
            name,
            pod: pod.map(|pod| PodNetns { cookie: NetnsCookie(7), path: "/n".into(), pod: pod.into() }),
            target: "/n".into(),
            fault: fault.map(str::to_owned),
        };
        let hooks = [
            hook("connect4", None, None),
            hook("inbound", Some("shop/a"), None),
            hook("inbound", Some("shop/b"), Some("gone")),
            hook("inbound", Some("shop/c"), None),
        ];
        assert_eq!(Hook::by_name(&hooks), [("connect4", true), ("inbound", false)]);
        assert_eq!((hooks[0].to_string(), hooks[2].to_string()), ("connect4".into(), "inbound of pod shop/b".into()));
    }
}
