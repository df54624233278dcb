//! The pods of this node as the API server knows them, by their UIDs, also those that have no address yet: for whoever is told of a pod by the
//! node and must know who it is.

use std::{collections::HashMap, sync::Arc};

use tokio::sync::watch;

/// A pod of this node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Member {
    pub namespace: Arc<str>,
    pub name: Arc<str>,
    pub mesh: Membership,
    pub host_network: bool,
    /// It has run to its end.
    pub ended: bool,
}

/// Whether a pod belongs into the mesh.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Membership {
    Inside,
    Outside,
    /// The pod does not say it, and of its namespace nothing was told. It may belong into the mesh, so nobody speaks plaintext to it and nobody
    /// starts it; it may not, so it gets no certificate.
    NotKnown,
}

pub type Members = HashMap<Box<str>, Member>;

/// The pods at one moment, and which of the places were known when the snapshot of that moment was made.
#[derive(Clone, Default, Debug)]
pub struct Listed {
    pub members: Arc<Members>,
    /// As `Places::changes` counts.
    pub places: u64,
    /// Whether there was a complete list of everything.
    pub known: bool,
}

/// A clone is another handle on the same.
#[derive(Clone, Debug)]
pub struct Roster(Arc<watch::Sender<Listed>>);

impl Member {
    /// For certain: it is nothing that would have to be captured.
    pub fn is_outside(&self) -> bool {
        self.host_network || self.mesh == Membership::Outside
    }
}

impl Default for Roster {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(Listed::default())))
    }
}

impl Roster {
    pub fn now(&self) -> Listed {
        self.0.borrow().clone()
    }

    /// Hears of every snapshot, after it can be loaded.
    pub fn subscribe(&self) -> watch::Receiver<Listed> {
        self.0.subscribe()
    }

    pub fn set(&self, members: Members, places: u64) {
        self.0.send_modify(|listed| {
            if *listed.members != members {
                listed.members = Arc::new(members);
            }
            (listed.places, listed.known) = (places, true);
        });
    }
}
