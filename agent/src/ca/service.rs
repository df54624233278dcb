//! One request for a certificate, from its first byte to its line in the ledger: who asks, how often, with which key, for whom, and may
//! they; then it is signed, noted, and only then handed out.

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use arc_swap::ArcSwap;
use tonic::{Request, Response, Status, metadata::MetadataMap};

use super::{
    book::Books,
    caller::{Authenticate, Caller, CallerKind, Token},
    csr,
    ledger::{NotNoted, entry::Entry},
    limits::Limiter,
    listener::{Peer, Pending},
    metrics::Metrics,
    placement::Placement,
    refusal::Refusal,
};
use crate::{
    identity::{
        Ca, IdentityError, SpiffeId, TrustDomain, as_pem,
        wire::istio::{
            CertificateRequest, CertificateResponse, IMPERSONATED_IDENTITY,
            istio_certificate_service_server::IstioCertificateService,
        },
    },
    words::with_causes,
};

/// X.509 counts in seconds, and who asks for less would have nothing.
const SHORTEST: i64 = 2;

/// What requests are judged by.
pub struct Service {
    pub trust_domain: TrustDomain,
    pub ca: Arc<ArcSwap<Ca>>,
    /// Asked in this order.
    pub callers: Vec<Box<dyn Authenticate>>,
    pub placement: Box<dyn Placement>,
    pub limiter: Limiter,
    pub per_minute: u32,
    pub max_lifetime: Duration,
    pub ledger: Books,
    pub metrics: Arc<Metrics>,
}

#[tonic::async_trait]
impl IstioCertificateService for Service {
    async fn create_certificate(
        &self,
        request: Request<CertificateRequest>,
    ) -> Result<Response<CertificateResponse>, Status> {
        let connection = request.extensions().get::<Peer>();
        let (peer, pending) = (connection.map(|peer| peer.address), connection.map(Peer::request));
        let mut entry = Entry {
            time: humantime::format_rfc3339_millis(SystemTime::now()).to_string(),
            peer: peer
                .map(|peer| SocketAddr::new(peer.ip().to_canonical(), peer.port()).to_string())
                .unwrap_or_default(),
            ..Entry::default()
        };
        match self.answer(peer, pending.as_ref(), &request, &mut entry).await {
            Ok(cert_chain) => {
                self.metrics.request("issued");
                let Entry { peer, node, identity, serial, .. } = entry;
                tracing::info!(peer, node, identity, serial, "certificate issued");
                Ok(Response::new(CertificateResponse { cert_chain }))
            }
            Err(refusal) => {
                self.metrics.request(refusal.label());
                entry.refuse(refusal.label(), &refusal.to_string());
                tracing::debug!(
                    peer = entry.peer,
                    caller = entry.caller,
                    node = entry.node,
                    identity = entry.identity,
                    code = entry.code,
                    "certificate refused: {refusal}"
                );
                // A refusal counts without its line; that lines cannot be written is logged where that is found.
                let _ = self.ledger.note(entry).await;
                Err(refusal.into())
            }
        }
    }
}

impl Service {
    async fn answer(
        &self,
        peer: Option<SocketAddr>,
        pending: Option<&Pending>,
        request: &Request<CertificateRequest>,
        entry: &mut Entry,
    ) -> Result<Vec<String>, Refusal> {
        let caller = self.authenticate(peer, request.metadata()).await?;
        if let Some(pending) = pending {
            pending.authenticated();
        }
        entry.caller = Some(caller.name.clone());
        entry.node = Some(caller.node.clone());
        entry.by_agent = caller.kind == CallerKind::Agent;
        let drawn = self.limiter.take(&caller.bucket(), Instant::now());
        drawn.map_err(|after| Refusal::too_many(&caller.words(), self.per_minute, after))?;

        let asked = request.get_ref();
        let id = self.wanted(&caller, asked)?;
        entry.identity = Some(id.to_string());
        self.check_allowed(&caller, &id).await?;
        let invalid = |error: csr::CsrError| Refusal::invalid(error.to_string());
        let csr = csr::read(&asked.csr).map_err(invalid)?;
        csr.is_for(&id).map_err(invalid)?;
        let lifetime = self.lifetime(asked.validity_duration)?;

        let ca = self.ca.load_full();
        let signed = ca.certify(&id, &csr.public_key, lifetime).map_err(|error| unsigned(&error))?;
        "issued".clone_into(&mut entry.outcome);
        entry.serial = Some(signed.serial);
        entry.not_after = Some(humantime::format_rfc3339_seconds(signed.not_after).to_string());
        entry.signer = Some(ca.key_fingerprint());
        self.ledger.note(entry.clone()).await.map_err(|why| match why {
            NotNoted::ShutOut(since) => Refusal::denied(format!(
                "node {} was shut out at {since}: it gets no certificates until `marline ca revoke --undo`",
                caller.node
            )),
            NotNoted::TooMany => Refusal::too_many_certificates(&caller.node, &id.to_string()),
            NotNoted::Failed => Refusal::unavailable(
                "the CA cannot write down which certificates it issues, and so issues none: try again; its log has the reason",
            ),
        })?;
        // Clients take the last text for the roots, all of them.
        let roots: String = ca.root_certificates().iter().map(|der| as_pem(der)).collect();
        Ok(signed.chain.iter().map(|der| as_pem(der)).chain([roots]).collect())
    }

    async fn authenticate(&self, peer: Option<SocketAddr>, metadata: &MetadataMap) -> Result<Caller, Refusal> {
        let peer = peer.ok_or_else(|| Refusal::unavailable("the connection has no peer"))?;
        let token = metadata
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(Token::from_header)
            .ok_or_else(|| {
                Refusal::unauthenticated("there is no token: send the header `authorization: Bearer TOKEN`")
            })?;
        for way in &self.callers {
            if let Some(caller) = way.authenticate(&token, peer.ip()).await? {
                return Ok(caller);
            }
        }
        Err(Refusal::unauthenticated(
            "the token is not known here: make one with `marline ca token` and add its entry to the file of tokens",
        ))
    }

    /// Whom the certificate shall be for.
    fn wanted(&self, caller: &Caller, asked: &CertificateRequest) -> Result<SpiffeId, Refusal> {
        let field = asked.metadata.as_ref().and_then(|metadata| metadata.fields.get(IMPERSONATED_IDENTITY));
        let named = match field.map(|value| &value.kind) {
            None => None,
            Some(Some(prost_types::value::Kind::StringValue(text))) => Some(
                text.parse::<SpiffeId>()
                    .map_err(|error| Refusal::invalid(format!("metadata.{IMPERSONATED_IDENTITY}: {error}")))?,
            ),
            Some(_) => return Err(Refusal::invalid(format!("metadata.{IMPERSONATED_IDENTITY}: must be a text"))),
        };
        match (&caller.kind, named) {
            (_, Some(named)) => Ok(named),
            (CallerKind::Workload(namespace, account), None) => SpiffeId::new(&self.trust_domain, namespace, account)
                .map_err(|error| Refusal::denied(error.to_string())),
            (CallerKind::Agent, None) => Err(Refusal::invalid(format!(
                "metadata.{IMPERSONATED_IDENTITY} is missing: an agent says there which workload's SPIFFE ID it wants"
            ))),
        }
    }

    async fn check_allowed(&self, caller: &Caller, id: &SpiffeId) -> Result<(), Refusal> {
        if *id.trust_domain() != self.trust_domain {
            return Err(Refusal::denied(format!("{id} is not of this CA's trust domain, {}", self.trust_domain)));
        }
        let (namespace, account) = (id.namespace(), id.service_account());
        match &caller.kind {
            CallerKind::Workload(own_namespace, own) if own_namespace == namespace && own == account => Ok(()),
            CallerKind::Workload(own_namespace, own) => Err(Refusal::denied(format!(
                "{own_namespace}/{own} may have its own certificate alone, and not that of {namespace}/{account}"
            ))),
            CallerKind::Agent if self.placement.runs(&caller.node, namespace, account).await? => Ok(()),
            CallerKind::Agent => Err(Refusal::denied(format!(
                "node {} runs no workload of {namespace}/{account}: {}",
                caller.node,
                self.placement.hint()
            ))),
        }
    }

    /// Nothing asked for is the most that there is.
    fn lifetime(&self, seconds: i64) -> Result<Duration, Refusal> {
        match u64::try_from(seconds) {
            Ok(0) => Ok(self.max_lifetime),
            Ok(some) if seconds >= SHORTEST => Ok(Duration::from_secs(some).min(self.max_lifetime)),
            _ => Err(Refusal::invalid(format!("validity_duration: {seconds} s; ask for at least {SHORTEST}"))),
        }
    }
}

fn unsigned(error: &IdentityError) -> Refusal {
    match error {
        IdentityError::ForeignTrustDomain { .. } => Refusal::denied(error.to_string()),
        IdentityError::Rcgen(_) => Refusal::invalid(format!("csr: {}", with_causes(error))),
        error => {
            tracing::error!("a certificate could not be signed: {}", with_causes(error));
            Refusal::unavailable(format!("the CA cannot sign: {error}"))
        }
    }
}
