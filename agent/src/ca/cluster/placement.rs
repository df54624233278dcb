//! Which service accounts run on which node, as the API server knows it at that moment: what is stored and not what a cache had, because a pod
//! that has left its node must not have a certificate, and one that was just made must.

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::api::ListParams;
use tokio::sync::Semaphore;

use super::{Cluster, within};
use crate::ca::{
    placement::{Placement, Runs},
    refusal::Refusal,
};

/// Questions at one time: each makes an API server that is not new read the pods of a namespace.
const AT_ONCE: usize = 16;

pub struct Pods {
    cluster: Cluster,
    places: Semaphore,
}

impl Placement for Pods {
    fn runs<'a>(&'a self, node: &'a str, namespace: &'a str, account: &'a str) -> Runs<'a> {
        Box::pin(async move {
            // Names come from a request, and a selector is a text: one that is no name could select something else.
            if ![node, namespace, account].into_iter().all(is_name) {
                return Ok(false);
            }
            self.listed(node, namespace, account).await
        })
    }
}

impl Pods {
    pub fn new(cluster: Cluster) -> Self {
        Self { cluster, places: Semaphore::new(AT_ONCE) }
    }

    async fn listed(&self, node: &str, namespace: &str, account: &str) -> Result<bool, Refusal> {
        let selector = format!(
            "spec.nodeName={node},spec.serviceAccountName={account},status.phase!=Succeeded,status.phase!=Failed"
        );
        let params = ListParams::default().fields(&selector).limit(10);
        // Nobody closes the semaphore.
        let _place = self.places.acquire().await;
        let pods = within(self.cluster.pods_of(namespace).list(&params)).await.map_err(|fault| {
            tracing::error!("the API server does not say which pods node {node} has: {fault}");
            Refusal::unavailable(
                "the API server could not be asked which pods the node has: try again; the CA's log has the reason",
            )
        })?;
        // Selected by the API server, and looked at here: what it knows no selector for it might leave unselected.
        Ok(pods.items.iter().any(|pod| is_there(pod, node, namespace, account)))
    }
}

fn is_there(pod: &Pod, node: &str, namespace: &str, account: &str) -> bool {
    let ObjectMeta { namespace: of, .. } = &pod.metadata;
    let spec = pod.spec.as_ref();
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    of.as_deref() == Some(namespace)
        && spec.and_then(|spec| spec.node_name.as_deref()) == Some(node)
        && spec.and_then(|spec| spec.service_account_name.as_deref()) == Some(account)
        && !matches!(phase, Some("Succeeded" | "Failed"))
}

/// As Kubernetes has it for objects.
fn is_name(text: &str) -> bool {
    let known = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-' || byte == b'.';
    !text.is_empty() && text.len() <= 253 && text.bytes().all(known)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_could_be_more_of_a_selector_is_no_name() {
        assert!(is_name("node-a.example") && is_name("0"));
        for not in ["", "x,spec.nodeName=node-b", "a=b", "a!b", "A", "a b", &"a".repeat(254)] {
            assert!(!is_name(not), "{not}");
        }
    }
}
