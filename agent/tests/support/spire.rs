//! A Workload API as SPIRE has it, for tests: what it tells is set by the test, and signed by a CA of its own.
#![allow(dead_code, clippy::unwrap_used)]

use std::{
    fs,
    path::Path,
    pin::Pin,
    time::{Duration, SystemTime},
};

use marline::identity::{
    Ca, SpiffeId, TrustDomain,
    wire::spiffe::{
        SECURITY_HEADER, Server, Service, X509BundlesRequest, X509BundlesResponse, X509Svid, X509SvidRequest,
        X509SvidResponse,
    },
};
use rcgen::{
    CertificateParams, CertificateRevocationListParams, DistinguishedName, Issuer, KeyIdMethod, KeyPair,
    RevokedCertParams, SanType, SerialNumber,
};
use rustls::pki_types::{CertificateDer, pem::PemObject as _};
use tempfile::TempDir;
use tokio::{net::UnixListener, sync::watch, task::JoinSet};
use tokio_stream::{Stream, wrappers::WatchStream};
use tonic::{Request, Response, Status};

pub const LIFE: Duration = Duration::from_secs(3_600);

/// What SPIRE tells to whoever listens, and to whoever comes.
pub type Telling = watch::Receiver<Result<X509SvidResponse, Status>>;

struct Spire(Telling);

#[tonic::async_trait]
impl Service for Spire {
    type FetchX509SVIDStream = Pin<Box<dyn Stream<Item = Result<X509SvidResponse, Status>> + Send>>;
    type FetchX509BundlesStream = Pin<Box<dyn Stream<Item = Result<X509BundlesResponse, Status>> + Send>>;

    async fn fetch_x509_svid(
        &self,
        request: Request<X509SvidRequest>,
    ) -> Result<Response<Self::FetchX509SVIDStream>, Status> {
        if request.metadata().get(SECURITY_HEADER.0).is_none_or(|value| value != SECURITY_HEADER.1) {
            return Err(Status::invalid_argument("security header missing from request"));
        }
        Ok(Response::new(Box::pin(WatchStream::new(self.0.clone()))))
    }

    async fn fetch_x509_bundles(
        &self,
        _request: Request<X509BundlesRequest>,
    ) -> Result<Response<Self::FetchX509BundlesStream>, Status> {
        Ok(Response::new(Box::pin(tokio_stream::empty())))
    }
}

/// A trust domain's CA as SPIRE has it.
pub struct Authority {
    pub dir: TempDir,
    pub domain: TrustDomain,
}

impl Authority {
    pub fn of(domain: &str) -> Self {
        let (dir, domain) = (tempfile::tempdir().unwrap(), TrustDomain::parse(domain).unwrap());
        Ca::init(dir.path(), &domain).unwrap();
        Self { dir, domain }
    }

    pub fn read(&self, name: &str) -> String {
        fs::read_to_string(self.dir.path().join(name)).unwrap()
    }

    pub fn bundle(&self) -> Vec<u8> {
        CertificateDer::from_pem_slice(self.read("root-cert.pem").as_bytes()).unwrap().to_vec()
    }

    pub fn issuer(&self) -> Issuer<'static, KeyPair> {
        Issuer::from_ca_cert_pem(&self.read("ca-cert.pem"), KeyPair::from_pem(&self.read("ca-key.pem")).unwrap())
            .unwrap()
    }

    pub fn id(&self, account: &str) -> SpiffeId {
        SpiffeId::new(&self.domain, "shop", account).unwrap()
    }

    pub fn svid(&self, account: &str) -> X509Svid {
        self.named(&self.id(account).to_string())
    }

    pub fn named(&self, uri: &str) -> X509Svid {
        let (key, mut params) = (KeyPair::generate().unwrap(), CertificateParams::default());
        let now = SystemTime::now();
        params.not_before = (now - Duration::from_secs(60)).into();
        params.not_after = (now + LIFE).into();
        params.distinguished_name = DistinguishedName::new();
        params.subject_alt_names = vec![SanType::URI(uri.try_into().unwrap())];
        X509Svid {
            spiffe_id: uri.to_owned(),
            x509_svid: params.signed_by(&key, &self.issuer()).unwrap().der().to_vec(),
            x509_svid_key: key.serialize_der(),
            bundle: self.bundle(),
            hint: String::new(),
        }
    }

    /// A list that takes one certificate back.
    pub fn list(&self, serial: &str) -> Vec<u8> {
        let serial: Vec<u8> =
            (0..serial.len()).step_by(2).map(|at| u8::from_str_radix(&serial[at..at + 2], 16).unwrap()).collect();
        let now = SystemTime::now();
        let params = CertificateRevocationListParams {
            this_update: now.into(),
            next_update: (now + LIFE).into(),
            crl_number: SerialNumber::from(1),
            issuing_distribution_point: None,
            revoked_certs: vec![RevokedCertParams {
                serial_number: SerialNumber::from_slice(&serial),
                revocation_time: now.into(),
                reason_code: None,
                invalidity_date: None,
            }],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        params.signed_by(&self.issuer()).unwrap().der().to_vec()
    }
}

pub fn telling(svids: Vec<X509Svid>) -> X509SvidResponse {
    X509SvidResponse { svids, ..X509SvidResponse::default() }
}

/// Serves on `socket` for as long as this runs; connections end with it, as with a process.
pub async fn serve(socket: &Path, told: Telling) {
    let _ = fs::remove_file(socket);
    let listener = UnixListener::bind(socket).unwrap();
    let mut connections = JoinSet::new();
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        let service = hyper_util::service::TowerToHyperService::new(Server::new(Spire(told.clone())));
        connections.spawn(async move {
            let http = hyper::server::conn::http2::Builder::new(hyper_util::rt::TokioExecutor::new());
            let _ = http.serve_connection(hyper_util::rt::TokioIo::new(stream), service).await;
        });
    }
}
