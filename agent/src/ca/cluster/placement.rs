//! Which service accounts run on which node, as the API server knows it at that moment. First its cache is asked, which costs it little; only
//! if that knows no such pod, which may be because it has just been made, what is stored is.

use k8s_openapi::{api::core::v1::Pod, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::api::{ListParams, VersionMatch};

use super::{Cluster, within};
use crate::ca::{
    placement::{Placement, Runs},
    refusal::Refusal,
};

pub struct Pods(pub Cluster);

impl Placement for Pods {
    fn runs<'a>(&'a self, node: &'a str, namespace: &'a str, account: &'a str) -> Runs<'a> {
        Box::pin(async move {
            // Names come from a request, and a selector is a text: one that is no name could select something else.
            if ![node, namespace, account].into_iter().all(is_name) {
                return Ok(false);
            }
            for cached in [true, false] {
                if self.listed(node, namespace, account, cached).await? {
                    return Ok(true);
                }
            }
            Ok(false)
        })
    }
}

impl Pods {
    async fn listed(&self, node: &str, namespace: &str, account: &str, cached: bool) -> Result<bool, Refusal> {
        let selector = format!(
            "spec.nodeName={node},spec.serviceAccountName={account},status.phase!=Succeeded,status.phase!=Failed"
        );
        let mut params = ListParams::default().fields(&selector).limit(10);
        if cached {
            params = params.match_any().matching(VersionMatch::NotOlderThan).at("0");
        }
        let pods = within(self.0.pods_of(namespace).list(&params)).await.map_err(|fault| {
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
