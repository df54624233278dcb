//! Which service accounts run on which node: a node's agent gets certificates for those alone. Here a file says so; in a cluster the API
//! server (`cluster::placement`).

use std::{pin::Pin, sync::Arc};

use arc_swap::ArcSwap;

use super::refusal::Refusal;
use crate::config::Placements;

/// Whether it does, or why that cannot be known.
pub type Runs<'a> = Pin<Box<dyn Future<Output = Result<bool, Refusal>> + Send + 'a>>;

pub trait Placement: Send + Sync {
    fn runs<'a>(&'a self, node: &'a str, namespace: &'a str, service_account: &'a str) -> Runs<'a>;

    /// What to do about a workload that is not known to be there.
    fn hint(&self) -> &'static str {
        "is its pod bound to that node?"
    }
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
    fn runs<'a>(&'a self, node: &'a str, namespace: &'a str, service_account: &'a str) -> Runs<'a> {
        let placements = self.0.load();
        let account = (namespace.to_owned(), service_account.to_owned());
        let runs = placements.get(node).is_some_and(|accounts| accounts.contains(&account));
        Box::pin(std::future::ready(Ok(runs)))
    }

    fn hint(&self) -> &'static str {
        "list it under spec.nodes if it does"
    }
}
