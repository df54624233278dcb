//! Which service accounts run on which node: a node's agent gets certificates for those alone. Today a file says so; whoever knows it better
//! (an API server) can stand behind the same trait.

use std::sync::Arc;

use arc_swap::ArcSwap;

use crate::config::Placements;

pub trait Placement: Send + Sync {
    fn runs(&self, node: &str, namespace: &str, service_account: &str) -> bool;
}

/// As the file of kind CaNodes has it now. A clone is another handle on the same.
#[derive(Clone, Debug)]
pub struct Listed(Arc<ArcSwap<Placements>>);

impl Listed {
    pub fn new(placements: Placements) -> Self {
        Self(Arc::new(ArcSwap::from_pointee(placements)))
    }

    pub fn replace(&self, placements: Placements) {
        self.0.store(Arc::new(placements));
    }
}

impl Placement for Listed {
    fn runs(&self, node: &str, namespace: &str, service_account: &str) -> bool {
        let placements = self.0.load();
        let account = (namespace.to_owned(), service_account.to_owned());
        placements.get(node).is_some_and(|accounts| accounts.contains(&account))
    }
}
