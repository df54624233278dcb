//! Where a service notes what it hands out: in files of its own (`ledger`), or with a cluster's API server (`cluster::book`).

use super::{
    cluster,
    ledger::{Ledger, NotNoted, entry::Entry},
};

/// A clone is another handle on the same.
#[derive(Clone)]
pub enum Books {
    Files(Ledger),
    Cluster(cluster::book::Books),
}

impl Books {
    /// Notes a certificate that is about to be handed out, or a refusal.
    pub async fn note(&self, entry: Entry) -> Result<(), NotNoted> {
        match self {
            Self::Files(ledger) => ledger.note(entry).await,
            Self::Cluster(books) => books.note(entry).await,
        }
    }

    /// Whether certificates can be noted.
    pub async fn is_writable(&self) -> bool {
        match self {
            Self::Files(ledger) => ledger.is_writable().await,
            Self::Cluster(books) => books.is_writable().await,
        }
    }
}
