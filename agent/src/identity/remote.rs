//! Certificates from a CA elsewhere, by Istio's signing API: `marline ca serve`, or istiod. The key is made here and stays here; the CA
//! sees a request that is signed with it. What comes back is checked as if a stranger had sent it, before anybody uses it.
//!
//! The CA is known by the pinned roots, and told who asks by a token; `verifier` is the look at its own certificate. When to ask is
//! `identity::manager`'s.

mod verifier;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime},
};

use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DistinguishedName, KeyPair, PublicKeyData as _};
use rustls::{
    crypto::aws_lc_rs::sign::any_ecdsa_type,
    pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName, UnixTime, pem::PemObject as _},
    sign::CertifiedKey,
};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;
use tonic::{
    Code, Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint, Uri},
};
use tower::service_fn;
use x509_parser::prelude::{FromDer as _, X509Certificate};
use zeroize::{Zeroize as _, Zeroizing};

use super::{
    IdentityError, SpiffeId, Svid, Trust, TrustDomain, TrustStore, Validity,
    ca::uri_san,
    humantime,
    manager::{Answer, Source},
    svid_identity,
    wire::istio::{
        CertificateRequest, CertificateResponse, IMPERSONATED_IDENTITY,
        istio_certificate_service_client::IstioCertificateServiceClient,
    },
};
use crate::words::with_causes;

/// For a connection to the CA, and for an answer.
const CONNECT: Duration = Duration::from_secs(5);
const PATIENCE: Duration = Duration::from_secs(10);
/// A CA that is gone without a word is noticed after this and `CONNECT`.
const KEEPALIVE: Duration = Duration::from_secs(20);
const LONGEST_ANSWER: usize = 256 << 10;
const LONGEST_CHAIN: usize = 10;
const LONGEST_TOKEN: usize = 64 << 10;

/// Where the CA is, and how we and it know each other.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RemoteSettings {
    /// `HOST:PORT`.
    pub address: String,
    /// The name that its certificate must be for, if it is not the host's.
    pub server_name: Option<String>,
    /// A file with what is sent as a bearer token. Read anew each time, as those of Kubernetes change.
    pub token: PathBuf,
    /// Istio's name for this cluster, where the CA serves several.
    pub cluster_id: Option<String>,
}

/// A CA elsewhere.
pub struct RemoteCa {
    address: Arc<str>,
    dial: Dial,
    connection: Mutex<Dialed>,
    token: PathBuf,
    cluster_id: Option<MetadataValue<Ascii>>,
    trust: TrustStore,
}

/// A connection, which is made when it is needed.
#[derive(Clone)]
struct Dialed {
    /// Which one it is.
    which: u64,
    client: Client,
    /// What was trusted when it was made: the CA's certificate is verified by that, or by what came after it.
    trust: Arc<Trust>,
}

type Client = IstioCertificateServiceClient<Channel>;

/// How connections are made.
struct Dial {
    endpoint: Endpoint,
    address: String,
    name: ServerName<'static>,
    roots: TrustStore,
    domain: TrustDomain,
}

impl Dial {
    /// Connects when it is used.
    fn dialed(&self, which: u64) -> Dialed {
        let trust = self.roots.load();
        let (address, name, roots, domain) =
            (self.address.clone(), self.name.clone(), self.roots.clone(), self.domain.clone());
        let connector = service_fn(move |_: Uri| connect(address.clone(), name.clone(), roots.clone(), domain.clone()));
        let channel = self.endpoint.connect_with_connector_lazy(connector);
        Dialed { which, client: Client::new(channel).max_decoding_message_size(LONGEST_ANSWER), trust }
    }
}

impl RemoteCa {
    /// Connects when a certificate is asked for. Must be called within a runtime.
    pub fn new(settings: &RemoteSettings, trust: TrustStore) -> Result<Self, IdentityError> {
        let address: Arc<str> = settings.address.as_str().into();
        let wrong = |what: String| IdentityError::Remote { address: Arc::clone(&address), what };
        let host = host_of(&settings.address);
        let name = settings.server_name.as_deref().unwrap_or(host).to_owned();
        let name = ServerName::try_from(name).map_err(|error| wrong(format!("has no usable name: {error}")))?;
        let uri = |scheme: &str| format!("{scheme}://{}", settings.address).parse::<Uri>();
        let no_address = |error| wrong(format!("has no usable address: {error}"));
        // TLS is ours, so that the present roots are asked: towards the library this is a plain transport.
        let endpoint = Endpoint::from(uri("http").map_err(no_address)?)
            .origin(uri("https").map_err(no_address)?)
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(CONNECT);
        let domain = trust.load().domains().own().clone();
        let dial = Dial { endpoint, address: settings.address.clone(), name, roots: trust.clone(), domain };
        let connection = Mutex::new(dial.dialed(0));
        let cluster_id = match &settings.cluster_id {
            Some(id) => Some(id.parse().map_err(|_| wrong(format!("cannot be told the cluster's name {id:?}")))?),
            None => None,
        };
        Ok(Self { address, dial, connection, token: settings.token.clone(), cluster_id, trust })
    }

    async fn ask(&self, id: &SpiffeId, lifetime: Duration) -> Result<Svid, IdentityError> {
        let mut key = KeyPair::generate()?;
        let made = request(&key, id);
        let public = key.subject_public_key_info();
        let mut der = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialized_der().to_vec()));
        key.zeroize();
        let signing_key = any_ecdsa_type(&der);
        der.zeroize();
        let (signing_key, csr) = (signing_key?, made?);

        let message = CertificateRequest {
            csr,
            validity_duration: i64::try_from(lifetime.as_secs()).unwrap_or(i64::MAX),
            metadata: Some(impersonating(id)),
        };
        let mut request = Request::new(message);
        request.metadata_mut().insert("authorization", self.bearer().await?);
        if let Some(cluster_id) = &self.cluster_id {
            request.metadata_mut().insert("clusterid", cluster_id.clone());
        }
        let Dialed { which, mut client, .. } = self.believed();
        let answer = tokio::time::timeout(PATIENCE, client.create_certificate(request)).await;
        // Several may answer at the address. A connection stays with one, be it of no use: the next attempt gets to another.
        if answer.as_ref().map_or(true, |answer| answer.as_ref().is_err_and(|status| is_its_trouble(status.code()))) {
            self.leave(which);
        }
        let answer = answer.map_err(|_| self.wrong(format!("gave no answer within {}", humantime(PATIENCE))))?;
        let answer = answer.map_err(|status| self.wrong(explain(&status, id, &self.token)))?;
        let chain = checked(&answer.into_inner(), id, &public, &self.trust).map_err(|what| self.wrong(what))?;
        let (leaf, times) = chain;
        Ok(Svid {
            id: id.clone(),
            key: Arc::new(CertifiedKey::new(leaf, signing_key)),
            not_before: times.not_before,
            not_after: times.not_after,
            serial: times.serial,
        })
    }

    /// The connection, unless trust has changed since it was made: its other end may not be believed any more, and would be told the token.
    fn believed(&self) -> Dialed {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&connection.trust, &self.trust.load()) {
            *connection = self.dial.dialed(connection.which + 1);
        }
        connection.clone()
    }

    /// Connects anew next time, unless somebody has done so already. Requests that wait on the connection are left to it.
    fn leave(&self, which: u64) {
        let mut connection = self.connection.lock().unwrap_or_else(PoisonError::into_inner);
        if connection.which == which {
            *connection = self.dial.dialed(which + 1);
        }
    }

    async fn bearer(&self) -> Result<MetadataValue<Ascii>, IdentityError> {
        let unreadable =
            |source| IdentityError::Token { address: Arc::clone(&self.address), path: self.token.clone(), source };
        let bytes = Zeroizing::new(tokio::fs::read(&self.token).await.map_err(unreadable)?);
        let text = std::str::from_utf8(&bytes).unwrap_or_default().trim();
        if text.is_empty() || text.len() > LONGEST_TOKEN {
            return Err(self.wrong(format!("cannot be asked: {} holds no token", self.token.display())));
        }
        let bearer = Zeroizing::new(format!("Bearer {text}"));
        let mut value: MetadataValue<Ascii> = bearer
            .parse()
            .map_err(|_| self.wrong(format!("cannot be asked: {} holds no token", self.token.display())))?;
        value.set_sensitive(true);
        Ok(value)
    }

    fn wrong(&self, what: String) -> IdentityError {
        IdentityError::Remote { address: Arc::clone(&self.address), what }
    }
}

impl Source for RemoteCa {
    fn name(&self) -> Arc<str> {
        Arc::clone(&self.address)
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId, lifetime: Duration) -> Answer<'a> {
        Box::pin(self.ask(id, lifetime))
    }
}

type Connection = TokioIo<tokio_rustls::client::TlsStream<TcpStream>>;

async fn connect(
    address: String,
    name: ServerName<'static>,
    roots: TrustStore,
    domain: TrustDomain,
) -> Result<Connection, std::io::Error> {
    let config = verifier::config(roots.load(), domain).map_err(std::io::Error::other)?;
    let dialed = async {
        let stream = TcpStream::connect(&address).await?;
        stream.set_nodelay(true)?;
        TlsConnector::from(Arc::new(config)).connect(name, stream).await
    };
    // The time limit of the library is for the connection alone.
    let dialed = tokio::time::timeout(CONNECT, dialed).await;
    dialed.unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into())).map(TokioIo::new)
}

fn request(key: &KeyPair, id: &SpiffeId) -> Result<String, IdentityError> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.subject_alt_names = vec![uri_san(id.to_string())?];
    Ok(params.serialize_request(key)?.pem()?)
}

fn impersonating(id: &SpiffeId) -> prost_types::Struct {
    let value = prost_types::Value { kind: Some(prost_types::value::Kind::StringValue(id.to_string())) };
    prost_types::Struct { fields: BTreeMap::from([(IMPERSONATED_IDENTITY.to_owned(), value)]) }
}

/// The chain to show to peers, if it is what was asked for, and believed here.
fn checked(
    answer: &CertificateResponse,
    id: &SpiffeId,
    public: &[u8],
    trust: &TrustStore,
) -> Result<(Vec<CertificateDer<'static>>, Validity), String> {
    let mut chain = Vec::new();
    for pem in &answer.cert_chain {
        for certificate in CertificateDer::pem_slice_iter(pem.as_bytes()) {
            chain.push(certificate.map_err(|error| format!("sent a certificate that is not PEM: {error}"))?);
        }
        if chain.len() > LONGEST_CHAIN {
            return Err(format!("sent more than {LONGEST_CHAIN} certificates"));
        }
    }
    let leaf = chain.first().ok_or("sent no certificate")?.clone();
    // Its root goes with the answer and not with what peers are shown: they have it.
    chain.retain(|der| *der == leaf || !is_self_issued(der));
    let named = svid_identity(&leaf).map_err(|fault| format!("sent what is no workload's certificate: {fault}"))?;
    if named != *id {
        return Err(format!("sent a certificate of {named} when asked for one of {id}"));
    }
    let (_, parsed) = X509Certificate::from_der(&leaf).map_err(|_| "sent a certificate that cannot be read")?;
    if parsed.public_key().raw != public {
        return Err("sent a certificate for another key than ours".to_owned());
    }
    let times = Validity::of(&parsed);
    let now = SystemTime::now();
    if let Ok(early) = times.not_before.duration_since(now) {
        let ahead = humantime(early);
        return Err(format!("sent a certificate that is not valid for another {ahead}: set the clocks of both"));
    }
    if let Ok(late) = now.duration_since(times.not_after) {
        return Err(format!("sent a certificate that expired {} ago: set the clocks of both", humantime(late)));
    }
    let intermediates = chain.get(1..).unwrap_or_default();
    let usage = webpki::KeyUsage::client_auth();
    trust.load().verify(id.trust_domain(), &leaf, intermediates, UnixTime::now(), usage).map_err(|error| {
        format!("sent a certificate that the roots in spec.ca.rootCert do not vouch for ({error}): are they this CA's?")
    })?;
    Ok((chain, times))
}

fn is_self_issued(der: &CertificateDer<'_>) -> bool {
    X509Certificate::from_der(der).is_ok_and(|(_, one)| one.subject().as_raw() == one.issuer().as_raw())
}

/// Whether it is the service's fault, or that of the way to it.
fn is_its_trouble(code: Code) -> bool {
    matches!(
        code,
        Code::Unavailable
            | Code::Unknown
            | Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Internal
            | Code::Unimplemented
    )
}

/// What the CA said, and what can be done about it.
fn explain(status: &Status, id: &SpiffeId, token: &std::path::Path) -> String {
    let said = status.message();
    match status.code() {
        Code::Unauthenticated => {
            format!("does not accept the token in {}: {said}; is it this CA's, and for its audience?", token.display())
        }
        Code::PermissionDenied => format!("will not sign for {id} on this node: {said}"),
        Code::ResourceExhausted => format!("has more to do than it takes from this node: {said}"),
        Code::Unimplemented => format!("does not speak istio.v1.auth.IstioCertificateService: {said}"),
        Code::Unavailable | Code::Unknown | Code::Cancelled | Code::DeadlineExceeded => {
            format!("cannot be reached: {}", with_causes(status))
        }
        code => format!("refused ({code:?}): {said}"),
    }
}

/// Of `HOST:PORT`, with an IPv6 host in brackets.
fn host_of(address: &str) -> &str {
    let host = address.rsplit_once(':').map_or(address, |(host, _)| host);
    host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host)
}
