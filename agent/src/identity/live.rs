//! The embedded CA as its directory is now: one that was loaded takes the place of the one before, in one step, while certificates are
//! asked for. What is in a directory `identity::ca` knows; noticing that it has changed is `control::trust`'s.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;

use super::{
    Ca, SpiffeId,
    manager::{Answer, Source},
};

/// A clone is another handle on the same CA.
#[derive(Clone, Debug)]
pub struct LiveCa(Arc<ArcSwap<Ca>>);

impl LiveCa {
    pub fn new(ca: Ca) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(ca)))
    }

    pub fn load(&self) -> Arc<Ca> {
        self.0.load_full()
    }

    /// True if the new one signs with another certificate: what the old one has signed is then to be replaced.
    pub fn replace(&self, next: Ca) -> bool {
        let next = Arc::new(next);
        !self.0.swap(next.clone()).signs_like(&next)
    }
}

impl Source for LiveCa {
    fn name(&self) -> Arc<str> {
        "embedded CA".into()
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId, lifetime: Duration) -> Answer<'a> {
        Box::pin(async move { self.load().issue(id, lifetime) })
    }
}
