//! Who the two ends of a captured connection are, from what is known about addresses. Under mTLS the certificate has the last
//! word about the peer.

use std::{net::SocketAddr, sync::Arc};

use crate::{policy::Workload, state::Snapshot, words::Endpoint};

/// Where the application wanted to go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct OrigDst(pub SocketAddr);

/// Who really called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ClientAddr(pub SocketAddr);

pub fn endpoint(snapshot: &Snapshot, address: SocketAddr) -> (Option<Arc<Workload>>, Endpoint) {
    let workload = snapshot.workload(address.ip()).cloned();
    let endpoint = of(workload.as_deref(), address);
    (workload, endpoint)
}

pub fn of(workload: Option<&Workload>, address: SocketAddr) -> Endpoint {
    Endpoint {
        address: Some(address),
        workload: workload.map(|workload| workload.name.clone()),
        namespace: workload.map(|workload| workload.namespace.clone()),
        identity: workload.filter(|workload| workload.in_mesh).map(|workload| workload.id.to_string()),
    }
}
