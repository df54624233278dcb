//! Tokens of Kubernetes service accounts, as the API server reviews them (authentication.k8s.io/v1, TokenReview). A token must be bound to
//! a pod, because then the review tells the pod's node. Nothing is remembered: a token counts for as long as the API server takes it.

use std::{net::IpAddr, time::Instant};

use k8s_openapi::api::{
    authentication::v1::{TokenReview, TokenReviewSpec, TokenReviewStatus},
    core::v1::Pod,
};
use kube::{Api, Client, api::PostParams};
use tokio::{sync::Semaphore, time::timeout};

use super::{Authenticate, Authenticated, Caller, CallerKind, Token};
use crate::{
    ca::{
        CaError,
        cluster::{self, PATIENCE},
        limits::Limiter,
        listener::network,
        refusal::Refusal,
    },
    config::KubernetesReview,
    words::with_causes,
};

/// Whoever sends many tokens shall not make the API server review them all at once.
const AT_ONCE: usize = 32;
/// Tokens from one address that the API server does not take, before others from there are not shown to it for a while.
const FAILURES_PER_MINUTE: u32 = 60;
const FAILURES_AT_ONCE: u32 = 60;
const NODE_NAME: &str = "authentication.kubernetes.io/node-name";
const POD_NAME: &str = "authentication.kubernetes.io/pod-name";
const POD_UID: &str = "authentication.kubernetes.io/pod-uid";

pub struct Kubernetes {
    client: Client,
    audience: String,
    /// Service accounts of agents.
    agents: Vec<(String, String)>,
    reviews: Semaphore,
    failures: Limiter,
}

impl Kubernetes {
    pub fn new(settings: &KubernetesReview, audience: &str) -> Result<Self, CaError> {
        let client = cluster::client(settings.server.as_ref())?;
        let agents = settings.agents.clone();
        Ok(Self {
            client,
            audience: audience.to_owned(),
            agents,
            reviews: Semaphore::new(AT_ONCE),
            failures: Limiter::new(FAILURES_PER_MINUTE, FAILURES_AT_ONCE),
        })
    }

    async fn review(&self, token: &Token) -> Result<Option<Caller>, Refusal> {
        let unavailable = |why: String| {
            tracing::error!("the API server does not review tokens: {why}");
            Refusal::unavailable(
                "the API server could not be asked about the token: try again; the CA's log has the reason",
            )
        };
        let review = TokenReview {
            spec: TokenReviewSpec {
                token: Some(token.secret().to_owned()),
                audiences: Some(vec![self.audience.clone()]),
            },
            ..TokenReview::default()
        };
        let api: Api<TokenReview> = Api::all(self.client.clone());
        let ask = async {
            let _turn = self.reviews.acquire().await;
            api.create(&PostParams::default(), &review).await
        };
        let answer = match timeout(PATIENCE, ask).await {
            Err(_) => return Err(unavailable(format!("no answer within {PATIENCE:?}"))),
            Ok(Err(error)) => return Err(unavailable(explain(&error))),
            Ok(Ok(answer)) => answer,
        };
        let status = answer.status.ok_or_else(|| unavailable("its answer has no status".to_owned()))?;
        let judged = judge(&status, &self.audience, &self.agents)?;
        let node = match judged.at {
            At::Node(node) => node,
            At::Pod { name, uid } => self.node_of(&judged.namespace, &judged.account, &name, &uid).await?,
        };
        Ok(Some(Caller { name: judged.name, node, kind: judged.kind }))
    }

    /// Where the pod runs that a token is bound to: API servers before 1.30 do not say so of themselves.
    async fn node_of(&self, namespace: &str, account: &str, name: &str, uid: &str) -> Result<String, Refusal> {
        let api: Api<Pod> = Api::namespaced(self.client.clone(), namespace);
        let gone =
            || Refusal::denied(format!("the token is bound to pod {namespace}/{name}, which is not there any more"));
        let pod = match cluster::get(&api, name).await {
            Ok(found) => found.ok_or_else(gone)?,
            Err(fault) => {
                tracing::error!(
                    "the API server does not tell of pod {namespace}/{name}, to which a token is bound: {fault}"
                );
                let text =
                    "the API server could not be asked about the token's pod: try again; the CA's log has the reason";
                return Err(Refusal::unavailable(text));
            }
        };
        let spec = pod.spec.unwrap_or_default();
        if pod.metadata.uid.as_deref() != Some(uid) || spec.service_account_name.as_deref() != Some(account) {
            return Err(gone());
        }
        spec.node_name.filter(|node| !node.is_empty()).ok_or_else(|| {
            Refusal::denied(format!("the token is bound to pod {namespace}/{name}, which runs on no node yet"))
        })
    }

    async fn judged(&self, token: &Token, peer: IpAddr) -> Result<Option<Caller>, Refusal> {
        // One of a file's that is not known any more: a secret that is none of the API server's business.
        if token.is_our_own() {
            return Ok(None);
        }
        let peer = network(peer).to_string();
        self.failures
            .look(&peer, Instant::now())
            .map_err(|after| Refusal::too_many_failures(&peer, FAILURES_PER_MINUTE, after))?;
        let judged = self.review(token).await;
        if judged.as_ref().is_err_and(Refusal::is_unauthenticated) {
            let _ = self.failures.take(&peer, Instant::now());
        }
        judged
    }
}

impl Authenticate for Kubernetes {
    fn authenticate<'a>(&'a self, token: &'a Token, peer: IpAddr) -> Authenticated<'a> {
        Box::pin(self.judged(token, peer))
    }
}

/// Who a caller is, and what tells its node.
#[derive(PartialEq, Eq, Debug)]
struct Judged {
    name: String,
    namespace: String,
    account: String,
    kind: CallerKind,
    at: At,
}

#[derive(PartialEq, Eq, Debug)]
enum At {
    Node(String),
    /// A pod of the account's namespace.
    Pod {
        name: String,
        uid: String,
    },
}

/// What a review says of who the caller is.
fn judge(status: &TokenReviewStatus, audience: &str, agents: &[(String, String)]) -> Result<Judged, Refusal> {
    if status.authenticated != Some(true) {
        let why = status.error.as_deref().unwrap_or("it gives no reason");
        return Err(Refusal::unauthenticated(format!("the API server does not take the token: {why}")));
    }
    // An authenticator that knows no audiences leaves them out, and then it has not looked at the token's.
    if !status.audiences.iter().flatten().any(|named| named == audience) {
        return Err(Refusal::unauthenticated(format!("the token is not meant for the audience {audience}")));
    }
    let user = status.user.clone().unwrap_or_default();
    let name = user.username.unwrap_or_default();
    let account = name.strip_prefix("system:serviceaccount:").and_then(|rest| rest.split_once(':'));
    let Some((namespace, account)) = account else {
        return Err(Refusal::denied("the token is not one of a service account"));
    };
    let said = |key: &str| user.extra.as_ref().and_then(|extra| extra.get(key)).map(Vec::as_slice).unwrap_or_default();
    let at = match (said(NODE_NAME), said(POD_NAME), said(POD_UID)) {
        // A token may be bound to a node alone: nobody projects such a one into a pod.
        ([node], [name], [uid]) if ![node, name, uid].into_iter().any(String::is_empty) => At::Node(node.clone()),
        ([], [name], [uid]) if !name.is_empty() && !uid.is_empty() => At::Pod { name: name.clone(), uid: uid.clone() },
        _ => {
            return Err(Refusal::denied(format!(
                "the token of {namespace}/{account} is not bound to a pod on a node: use one that is projected into a pod"
            )));
        }
    };
    let agent = agents.iter().any(|known| known.0 == namespace && known.1 == account);
    let kind = match agent {
        true => CallerKind::Agent,
        false => CallerKind::Workload(namespace.to_owned(), account.to_owned()),
    };
    Ok(Judged { namespace: namespace.to_owned(), account: account.to_owned(), name: name.clone(), kind, at })
}

fn explain(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) if status.code == 401 => {
            "it does not take this service's own token (401): see spec.authentication.kubernetes".to_owned()
        }
        kube::Error::Api(status) if status.code == 403 => {
            format!(
                "this service may not create TokenReviews (403): bind it to system:auth-delegator; {}",
                status.message
            )
        }
        error => with_causes(error),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use k8s_openapi::api::authentication::v1::UserInfo;

    use super::*;

    fn good() -> TokenReviewStatus {
        TokenReviewStatus {
            authenticated: Some(true),
            audiences: Some(vec!["marline-ca".into()]),
            error: None,
            user: Some(UserInfo {
                username: Some("system:serviceaccount:foo:sleep".into()),
                extra: Some(BTreeMap::from(
                    [(NODE_NAME, "node-a"), (POD_NAME, "sleep-1"), (POD_UID, "u")]
                        .map(|(key, value)| (key.to_owned(), vec![value.to_owned()])),
                )),
                ..UserInfo::default()
            }),
        }
    }

    fn judged(change: impl FnOnce(&mut TokenReviewStatus)) -> Result<Judged, String> {
        let mut status = good();
        change(&mut status);
        judge(&status, "marline-ca", &[("system".into(), "agent".into())]).map_err(|refusal| refusal.to_string())
    }

    #[test]
    fn a_review_names_the_workload_and_its_node_or_the_caller_is_refused() {
        let caller = judged(|_| {}).unwrap();
        let workload = CallerKind::Workload("foo".into(), "sleep".into());
        assert_eq!((caller.at, caller.kind), (At::Node("node-a".into()), workload));
        let user = |status: &mut TokenReviewStatus, name: &str| {
            status.user.as_mut().unwrap().username = Some(name.to_owned());
        };
        assert_eq!(
            judged(|status| user(status, "system:serviceaccount:system:agent")).unwrap().kind,
            CallerKind::Agent
        );
        assert!(judged(|status| status.authenticated = None).unwrap_err().contains("does not take the token"));
        assert!(judged(|status| status.audiences = None).unwrap_err().contains("audience"));
        assert!(judged(|status| status.audiences = Some(vec!["other".into()])).unwrap_err().contains("audience"));
        assert!(judged(|status| user(status, "system:admin")).unwrap_err().contains("service account"));
        let said = |status: &mut TokenReviewStatus, extra: &[(&str, &[&str])]| {
            let texts = |values: &[&str]| values.iter().map(|value| (*value).to_owned()).collect();
            let extra = extra.iter().map(|(key, values)| ((*key).to_owned(), texts(values))).collect();
            status.user.as_mut().unwrap().extra = Some(extra);
        };
        let bound = judged(|status| said(status, &[(POD_NAME, &["p"]), (POD_UID, &["u"])])).unwrap();
        assert_eq!(bound.at, At::Pod { name: "p".into(), uid: "u".into() }, "an older API server");
        let unbound: [&[(&str, &[&str])]; 6] = [
            &[],
            &[(NODE_NAME, &["a"])],
            &[(NODE_NAME, &["a", "b"]), (POD_NAME, &["p"]), (POD_UID, &["u"])],
            &[(NODE_NAME, &[""])],
            &[(POD_NAME, &["p"])],
            &[(POD_NAME, &["p"]), (POD_UID, &["u", "v"])],
        ];
        for extra in unbound {
            assert!(judged(|status| said(status, extra)).unwrap_err().contains("not bound"), "{extra:?}");
        }
    }
}
