//! What is asked of the API server, and how its answers come apart: pages of a list, lines of a watch. Whether and when to ask again is
//! `follow`'s to say.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use http_body_util::BodyExt as _;
use hyper::{Request, Response, header};
use kube::{Client, client::Body};
use percent_encoding::{NON_ALPHANUMERIC, utf8_percent_encode};
use serde::{Deserialize, de::DeserializeOwned};
use tokio::time::timeout;

use super::model::Kind;
use crate::{config::ObjectKind, words::with_causes};

/// A page of a list, or an event.
const LARGEST: usize = 256 << 20;
/// Of an answer that says what is wrong.
const LARGEST_FAULT: usize = 64 << 10;
/// How long an API server may be silent in the middle of a list.
const PATIENCE: Duration = Duration::from_secs(30);
/// Nothing but metadata: a node's images and conditions are most of it.
const LIST_OF_METADATA: &str = "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io";
const METADATA: &str = "application/json;as=PartialObjectMetadata;v=v1;g=meta.k8s.io";

/// Why there is no answer, or not the one that was asked for.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// The version asked for is too old: only a list tells what is there now.
    #[error("what was asked for is too old (410)")]
    Gone,
    /// Nobody has told the API server of this kind.
    #[error("the API server does not know this kind (404)")]
    Absent,
    #[error("the API server does not take this agent's token (401): is it still valid, and of this cluster?")]
    Unauthenticated,
    #[error("this agent may not do that (403): {0}; see docs/kubernetes.md for the ClusterRole it needs")]
    Forbidden(String),
    #[error("the API server answers {code}: {message}")]
    Status {
        code: u16,
        message: String,
        /// For how long it asks to be left alone.
        retry_after: Option<Duration>,
    },
    #[error("the API server cannot be reached")]
    Unreachable(#[source] Box<kube::Error>),
    #[error("its answer was cut: {0}")]
    Cut(String),
    #[error("its answer cannot be read")]
    Unreadable(#[source] serde_json::Error),
    #[error("its answer is larger than {LARGEST} bytes")]
    TooLarge,
}

/// A way to ask. A clone is another handle on the same.
#[derive(Clone)]
pub struct Api {
    client: Client,
    node: Arc<str>,
    asked: Arc<Asked>,
}

/// What was asked of the API server so far.
#[derive(Default, Debug)]
pub struct Asked {
    pub pages: AtomicU64,
    pub watches: AtomicU64,
    /// As they were read, decompressed.
    pub bytes: AtomicU64,
}

pub struct Page<W> {
    pub items: Vec<W>,
    pub version: String,
    pub next: Option<String>,
}

pub struct Watch {
    body: Body,
    buffer: Vec<u8>,
    /// How much of the buffer has no line's end.
    searched: usize,
    asked: Arc<Asked>,
}

#[derive(Deserialize)]
#[serde(tag = "type", content = "object", rename_all = "UPPERCASE")]
pub enum Event<W> {
    Added(W),
    Modified(W),
    Deleted(W),
    Bookmark(Bookmark),
    Error(Status),
}

#[derive(Deserialize)]
pub struct Bookmark {
    pub metadata: ListMetadata,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct ListMetadata {
    pub resource_version: String,
    r#continue: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Status {
    code: u16,
    message: String,
    details: Option<Details>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Details {
    retry_after_seconds: Option<i64>,
}

#[derive(Deserialize)]
struct WireList<W> {
    #[serde(default)]
    metadata: ListMetadata,
    items: Option<Vec<W>>,
}

impl Kind {
    /// Where it is to be had, under each of the versions that an API server may know it by, the best first.
    pub fn paths(self) -> &'static [&'static str] {
        match self {
            Self::Namespaces => &["/api/v1/namespaces"],
            Self::Pods => &["/api/v1/pods"],
            Self::Services => &["/api/v1/services"],
            Self::EndpointSlices => &["/apis/discovery.k8s.io/v1/endpointslices"],
            Self::Nodes => &["/api/v1/nodes"],
            Self::Istio(ObjectKind::PeerAuthentication) => &[
                "/apis/security.istio.io/v1/peerauthentications",
                "/apis/security.istio.io/v1beta1/peerauthentications",
            ],
            Self::Istio(ObjectKind::AuthorizationPolicy) => &[
                "/apis/security.istio.io/v1/authorizationpolicies",
                "/apis/security.istio.io/v1beta1/authorizationpolicies",
            ],
            Self::Istio(ObjectKind::DestinationRule) => &[
                "/apis/networking.istio.io/v1/destinationrules",
                "/apis/networking.istio.io/v1beta1/destinationrules",
                "/apis/networking.istio.io/v1alpha3/destinationrules",
            ],
            Self::Istio(ObjectKind::ServiceEntry) => &[
                "/apis/networking.istio.io/v1/serviceentries",
                "/apis/networking.istio.io/v1beta1/serviceentries",
                "/apis/networking.istio.io/v1alpha3/serviceentries",
            ],
            Self::Istio(ObjectKind::WorkloadEntry) => &[
                "/apis/networking.istio.io/v1/workloadentries",
                "/apis/networking.istio.io/v1beta1/workloadentries",
                "/apis/networking.istio.io/v1alpha3/workloadentries",
            ],
        }
    }

    /// Whether a cluster can be without it.
    pub fn may_be_absent(self) -> bool {
        matches!(self, Self::Istio(_))
    }

    /// For people, and as RBAC has it.
    pub fn plural(self) -> &'static str {
        self.paths().first().and_then(|path| path.rsplit('/').next()).unwrap_or_default()
    }

    fn is_metadata_only(self) -> bool {
        matches!(self, Self::Namespaces | Self::Nodes)
    }
}

impl Api {
    pub fn new(client: Client, node: Arc<str>) -> Self {
        Self { client, node, asked: Arc::default() }
    }

    pub fn asked(&self) -> &Arc<Asked> {
        &self.asked
    }

    /// One page of a list, the first or the one that the last has named.
    pub async fn page<W: DeserializeOwned>(
        &self,
        kind: Kind,
        path: &str,
        limit: u32,
        next: Option<&str>,
    ) -> Result<Page<W>, WireError> {
        self.asked.pages.fetch_add(1, Relaxed);
        let next = next.map(|next| format!("&continue={}", utf8_percent_encode(next, NON_ALPHANUMERIC)));
        let query = format!("limit={limit}{}", next.unwrap_or_default());
        let accept = if kind.is_metadata_only() { LIST_OF_METADATA } else { "application/json" };
        let body = self.send(kind, path, &query, accept, false).await?;
        let bytes = collected(body, LARGEST, &self.asked).await?;
        let list: WireList<W> = serde_json::from_slice(&bytes).map_err(WireError::Unreadable)?;
        let next = list.metadata.r#continue.filter(|next| !next.is_empty());
        Ok(Page { items: list.items.unwrap_or_default(), version: list.metadata.resource_version, next })
    }

    /// Everything that happens after a version, for as long as the API server tells it.
    pub async fn watch(&self, kind: Kind, path: &str, version: &str, lasts: Duration) -> Result<Watch, WireError> {
        self.asked.watches.fetch_add(1, Relaxed);
        let version = utf8_percent_encode(version, NON_ALPHANUMERIC);
        let query = format!(
            "watch=1&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={}",
            lasts.as_secs().max(1)
        );
        let accept = if kind.is_metadata_only() { METADATA } else { "application/json" };
        let body = self.send(kind, path, &query, accept, true).await?;
        Ok(Watch { body, buffer: Vec::new(), searched: 0, asked: Arc::clone(&self.asked) })
    }

    async fn send(&self, kind: Kind, path: &str, query: &str, accept: &str, plain: bool) -> Result<Body, WireError> {
        let mut uri = format!("{path}?{query}");
        if kind == Kind::Nodes {
            let own = format!("metadata.name={}", self.node);
            uri += &format!("&fieldSelector={}", utf8_percent_encode(&own, NON_ALPHANUMERIC));
        }
        let mut request = Request::get(uri).header(header::ACCEPT, accept);
        if plain {
            // Events are told one by one: a compressor would keep some back.
            request = request.header(header::ACCEPT_ENCODING, "identity");
        }
        let request = request.body(Body::empty()).map_err(|error| WireError::Cut(error.to_string()))?;
        let answer = match timeout(PATIENCE, self.client.send(request)).await {
            Err(_) => return Err(WireError::Cut(format!("nothing came for {PATIENCE:?}"))),
            Ok(answer) => answer.map_err(|error| WireError::Unreachable(Box::new(error)))?,
        };
        let code = answer.status().as_u16();
        if code == 200 { Ok(answer.into_body()) } else { Err(self.fault(code, answer).await) }
    }

    async fn fault(&self, code: u16, answer: Response<Body>) -> WireError {
        // Proxies ask for it, too. In seconds: API servers write no dates.
        let asked = answer.headers().get(header::RETRY_AFTER).and_then(|text| text.to_str().ok()?.trim().parse().ok());
        let body = collected(answer.into_body(), LARGEST_FAULT, &self.asked).await.unwrap_or_default();
        fault(code, asked, &body)
    }
}

/// What the answer's head says counts before its body.
fn fault(code: u16, asked: Option<i64>, body: &[u8]) -> WireError {
    let status: Status = serde_json::from_slice(body).unwrap_or_default();
    let details = asked.map(|seconds| Details { retry_after_seconds: Some(seconds) }).or(status.details);
    Status { code, details, ..status }.into()
}

impl WireError {
    /// Whether the same may go well when it is asked again: nobody has refused it, or only for now.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Cut(_) | Self::Unreadable(_) => true,
            Self::Status { code, .. } => matches!(code, 408 | 429) || !(400..500).contains(code),
            Self::Gone | Self::Absent | Self::Unauthenticated | Self::Forbidden(_) | Self::TooLarge => false,
        }
    }

    pub fn retry_after(&self) -> Option<Duration> {
        if let Self::Status { retry_after, .. } = self { *retry_after } else { None }
    }
}

impl From<Status> for WireError {
    fn from(Status { code, message, details }: Status) -> Self {
        let retry_after = details.and_then(|details| u64::try_from(details.retry_after_seconds?).ok());
        match code {
            401 => Self::Unauthenticated,
            403 => Self::Forbidden(message),
            404 => Self::Absent,
            410 => Self::Gone,
            code => Self::Status { code, message, retry_after: retry_after.map(Duration::from_secs) },
        }
    }
}

impl Watch {
    /// The next event, or nothing at the end of the stream. What was cut off within an event is told again by the next watch.
    pub async fn next<W: DeserializeOwned>(&mut self, silence: Duration) -> Result<Option<Event<W>>, WireError> {
        loop {
            let rest = self.buffer.get(self.searched..).unwrap_or_default();
            if let Some(at) = rest.iter().position(|byte| *byte == b'\n') {
                let line: Vec<u8> = self.buffer.drain(..=self.searched + at).collect();
                self.searched = 0;
                if line.iter().all(u8::is_ascii_whitespace) {
                    continue;
                }
                return serde_json::from_slice(&line).map(Some).map_err(WireError::Unreadable);
            }
            self.searched = self.buffer.len();
            if self.searched > LARGEST {
                return Err(WireError::TooLarge);
            }
            match timeout(silence, self.body.frame()).await {
                // It may be quiet, or its connection dead: asking again from here tells.
                Err(_) | Ok(None) => return Ok(None),
                Ok(Some(Err(error))) => return Err(WireError::Cut(with_causes(&error))),
                Ok(Some(Ok(frame))) => {
                    if let Ok(data) = frame.into_data() {
                        self.asked.bytes.fetch_add(data.len() as u64, Relaxed);
                        self.buffer.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

async fn collected(mut body: Body, largest: usize, asked: &Asked) -> Result<Vec<u8>, WireError> {
    let mut bytes = Vec::new();
    loop {
        match timeout(PATIENCE, body.frame()).await {
            Err(_) => return Err(WireError::Cut(format!("nothing came for {PATIENCE:?}"))),
            Ok(None) => return Ok(bytes),
            Ok(Some(Err(error))) => return Err(WireError::Cut(with_causes(&error))),
            Ok(Some(Ok(frame))) => {
                if let Ok(data) = frame.into_data() {
                    asked.bytes.fetch_add(data.len() as u64, Relaxed);
                    bytes.extend_from_slice(&data);
                }
                if bytes.len() > largest {
                    return Err(WireError::TooLarge);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(error: &WireError) -> Option<u64> {
        error.retry_after().map(|wait| wait.as_secs())
    }

    #[test]
    fn how_long_to_stay_away_the_head_of_an_answer_says_or_its_body() {
        let body = br#"{"kind": "Status", "code": 429, "message": "busy", "details": {"retryAfterSeconds": 7}}"#;
        assert_eq!(asked(&fault(429, None, body)), Some(7));
        assert_eq!(asked(&fault(429, Some(2), body)), Some(2));
        assert_eq!(asked(&fault(503, Some(3), b"a proxy's")), Some(3));
        assert_eq!(asked(&fault(503, None, br#"{"details": {"kind": "pods"}}"#)), None);
        assert_eq!(asked(&fault(503, Some(-3), br#"{"message": "negative"}"#)), None);
        assert_eq!(asked(&fault(503, None, br#"{"details": null}"#)), None);
        assert!(fault(429, None, body).to_string().contains("busy"));
    }

    #[test]
    fn what_is_refused_for_good_is_not_asked_again() {
        let passing = |code| fault(code, None, b"").is_passing();
        assert!([408, 429, 500, 502, 503, 504].into_iter().all(passing));
        assert!(![400, 401, 403, 404, 406, 410, 422].into_iter().any(passing));
    }
}
