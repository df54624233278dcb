//! Ledgers that hold nothing any more are deleted: an autoscaler gives nodes new names for ever. Such a ledger forbids nothing and lists
//! nothing that could count, so its node is as one that was never there, should it come back. A delete is for the version that was
//! looked at, as every write is: what somebody writes meanwhile stays. So all services may look, and nobody has to lead.

use std::time::{Duration, SystemTime};

use k8s_openapi::{api::core::v1::ConfigMap, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::api::{DeleteParams, ListParams, Preconditions};
use tokio::{sync::watch, time::sleep};

use super::{
    Cluster, Fault,
    book::{self, LABEL},
    within,
};

/// From one look at all ledgers to the next.
const PAUSE: Duration = Duration::from_secs(3_600);
/// Read together: a full one has some 200 KiB.
const AT_ONCE: u32 = 20;

/// Looks after `first`, and then every hour, until `shutdown` becomes true.
pub async fn run(cluster: Cluster, first: Duration, mut shutdown: watch::Receiver<bool>) {
    let mut pause = first;
    loop {
        // Services that were started together shall not look together for ever.
        tokio::select! {
            () = sleep(pause.mul_f64(rand::random_range(0.8..1.2))) => {}
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        match sweep(&cluster, SystemTime::now()).await {
            Ok(0) => {}
            Ok(deleted) => tracing::info!(deleted, "ledgers of nodes that held nothing any more were deleted"),
            Err(fault) => tracing::warn!("ledgers of nodes that hold nothing any more cannot be deleted: {fault}"),
        }
        pause = PAUSE;
    }
}

async fn sweep(cluster: &Cluster, now: SystemTime) -> Result<usize, Fault> {
    let mut params = ListParams::default().labels(&format!("{LABEL}=true")).limit(AT_ONCE);
    let mut deleted = 0;
    loop {
        let page = within(cluster.config_maps.list(&params)).await?;
        // What cannot be read may say anything.
        let is_spent = |object: &&ConfigMap| book::of(object).is_some_and(|book| book.is_spent(now));
        for object in page.items.iter().filter(is_spent) {
            match delete(cluster, &object.metadata).await {
                Ok(()) => deleted += 1,
                // Somebody was faster, or it is in use again.
                Err(Fault::Absent | Fault::Conflict) => {}
                Err(fault) => return Err(fault),
            }
        }
        match page.metadata.continue_.filter(|next| !next.is_empty()) {
            Some(next) => params.continue_token = Some(next),
            None => return Ok(deleted),
        }
    }
}

/// Deletes that object in that version, or nothing.
async fn delete(cluster: &Cluster, of: &ObjectMeta) -> Result<(), Fault> {
    let ObjectMeta { name: Some(name), uid: Some(uid), resource_version: Some(version), .. } = of else {
        return Err(Fault::Absent);
    };
    let preconditions = Preconditions { uid: Some(uid.clone()), resource_version: Some(version.clone()) };
    let params = DeleteParams::default().preconditions(preconditions);
    within(cluster.config_maps.delete(name, &params)).await.map(drop)
}
