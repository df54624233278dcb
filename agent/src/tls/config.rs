//! rustls configurations for the two ends of a connection: TLS 1.3 only, our certificate, the peer's identity checked.
//!
//! Made per connection, because the expected identities differ; everything that costs (keys, parsed chains, the
//! provider) is shared. Who is an acceptable peer is `tls::verifier`'s; the handshake and the records are others'.

use std::sync::{Arc, LazyLock, OnceLock};

use rustls::{
    ClientConfig, ServerConfig,
    client::Resumption,
    crypto::{CryptoProvider, aws_lc_rs},
    pki_types::{CertificateDer, DnsName, ServerName},
    server::{ClientHello, NoServerSessionStorage, ResolvesServerCert},
    sign::{CertifiedKey, SingleCertAndKey},
    version::TLS13,
};

use super::{
    records::Ending,
    verifier::{ExpectServer, MeshClient, PeerError},
};
use crate::identity::{SpiffeId, Svid, Trust, svid_identity, trust::Voucher};

/// A build for benches and for tests of the mechanism, on kernels without records: what is agreed under its names is not encrypted, be it
/// direct or, to have something to compare that with, proxied. The names are its own: so it never meets a real agent.
pub const WITHOUT_RECORDS: bool = cfg!(feature = "without-records");

/// The client's application holds the TLS connection itself. It knows nothing of records: see `Ending::Fin`.
pub const DIRECT: &[u8] = if WITHOUT_RECORDS { b"marline/direct-without-records" } else { b"marline/direct" };
/// The client's agent carries the bytes and accepts that the server's application may hold the connection itself.
pub const FIN: &[u8] = if WITHOUT_RECORDS { b"marline/fin-without-records" } else { b"marline/fin" };
/// An agent at each end.
pub const MARLINE: &[u8] = if WITHOUT_RECORDS { b"marline-without-records" } else { b"marline" };
/// An agent at each end, and no application yet: see `proxy::spare`.
pub const SPARE: &[u8] = b"marline/spare";
/// What Istio's sidecars speak.
pub const ISTIO: &[u8] = b"istio";
/// Every name by which the mesh's TLS is told from an application's own.
pub const ALPN: [&[u8]; 5] = [DIRECT, FIN, MARLINE, SPARE, ISTIO];

/// What a client can be, and can meet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Offer {
    /// The agent carries the bytes, and streams end by close_notify.
    Proxied,
    /// The agent carries the bytes; the server may be direct.
    ProxiedFinOk,
    /// The application holds the connection. Nothing else is offered, so that a server that is not up to it fails the handshake early.
    Direct,
    /// An application may come for the connection later. Nothing else is offered, so that no server takes it for an application's.
    Spare,
}

impl Offer {
    pub fn names(self) -> &'static [&'static [u8]] {
        match self {
            Self::Proxied => &[MARLINE, ISTIO],
            Self::ProxiedFinOk => &[FIN, MARLINE, ISTIO],
            Self::Direct => &[DIRECT],
            Self::Spare => &[SPARE],
        }
    }
}

/// What a server can be, and can meet. It chooses: the first of its names that the client offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accept {
    /// Only peers whose streams end by close_notify.
    Plain,
    /// The agent carries the bytes; clients may be direct.
    DirectClients,
    /// The application can be handed the connection, if the client is up to it.
    DirectReady,
}

impl Accept {
    pub fn names(self) -> &'static [&'static [u8]] {
        match self {
            Self::Plain => &[MARLINE, SPARE, ISTIO],
            Self::DirectClients => &[DIRECT, MARLINE, SPARE, ISTIO],
            Self::DirectReady => &[DIRECT, FIN, MARLINE, SPARE, ISTIO],
        }
    }
}

/// How the two ends of a connection that agreed on `alpn` tell each other that a stream is over.
pub fn ending(alpn: Option<&[u8]>) -> Ending {
    // What has no records has no alert either.
    let fin = |name: &[u8]| [DIRECT, FIN].contains(&name) || (WITHOUT_RECORDS && name == MARLINE);
    if alpn.is_some_and(fin) { Ending::Fin } else { Ending::CloseNotify }
}

/// Why there is no configuration, or no identity.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the TLS library refused the configuration")]
    Config(#[from] rustls::Error),
    #[error("no identity is acceptable at the other end, so no connection to it can be secured")]
    NobodyExpected,
    #[error(transparent)]
    Peer(#[from] PeerError),
}

/// Which suites come first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Ciphers {
    /// What processors have instructions for. One key seals a bounded number of blocks (`records::AES_GCM_BLOCKS`).
    #[default]
    Fastest,
    /// Those without such a bound, also if the peer would rather have another.
    Lasting,
}

/// How a connection's keys are agreed on and used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Parameters {
    pub ciphers: Ciphers,
    /// Nothing but X25519MLKEM768: what is recorded today cannot be read by a quantum computer later. A peer without it is refused.
    pub pqc_only: bool,
}

impl From<Ciphers> for Parameters {
    fn from(ciphers: Ciphers) -> Self {
        Self { ciphers, pqc_only: false }
    }
}

/// aws-lc-rs, narrowed to TLS 1.3: the suites that kernels encrypt, the cheapest first, and post-quantum key exchange
/// where the peer has it.
pub fn provider() -> Arc<CryptoProvider> {
    static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
        Arc::new(CryptoProvider {
            cipher_suites: vec![
                aws_lc_rs::cipher_suite::TLS13_AES_128_GCM_SHA256,
                aws_lc_rs::cipher_suite::TLS13_AES_256_GCM_SHA384,
                aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
            ],
            kx_groups: vec![
                aws_lc_rs::kx_group::X25519MLKEM768,
                aws_lc_rs::kx_group::X25519,
                aws_lc_rs::kx_group::SECP256R1,
                aws_lc_rs::kx_group::SECP384R1,
            ],
            ..aws_lc_rs::default_provider()
        })
    });
    Arc::clone(&PROVIDER)
}

/// Gathers what the library's random numbers are seeded with, on a thread of its own: whoever first wants a key would wait for it. It is
/// measured from the processor's jitter, which takes some 30 ms, once in a process.
pub fn gather_entropy() {
    let gather = || drop(aws_lc_rs::default_provider().secure_random.fill(&mut [0]));
    // Without a thread it is gathered when it is wanted.
    let _ = std::thread::Builder::new().name("entropy".to_owned()).spawn(gather);
}

fn provider_with(parameters: Parameters) -> Arc<CryptoProvider> {
    /// Both choices, by `ciphers` and then by `pqc_only`.
    static PROVIDERS: LazyLock<[[Arc<CryptoProvider>; 2]; 2]> = LazyLock::new(|| {
        let made = |lasting: bool, pqc_only: bool| {
            let mut provider = (*provider()).clone();
            if lasting {
                provider.cipher_suites.reverse();
            }
            if pqc_only {
                provider.kx_groups = vec![aws_lc_rs::kx_group::X25519MLKEM768];
            }
            Arc::new(provider)
        };
        [false, true].map(|lasting| [false, true].map(|pqc_only| made(lasting, pqc_only)))
    });
    let [fastest, lasting] = &*PROVIDERS;
    let [any, pqc] = if parameters.ciphers == Ciphers::Lasting { lasting } else { fastest };
    Arc::clone(if parameters.pqc_only { pqc } else { any })
}

/// For a connection to a server that must be one of `expect`.
pub fn client_config(
    svid: &Svid,
    trust: Arc<Trust>,
    expect: &[SpiffeId],
    offer: Offer,
) -> Result<Arc<ClientConfig>, TlsError> {
    client_config_with(Parameters::default(), svid, trust, expect, offer, Learned::default())
}

/// The same for one connection, of whose server is learned who vouches for it.
pub fn client_config_with(
    parameters: Parameters,
    svid: &Svid,
    trust: Arc<Trust>,
    expect: &[SpiffeId],
    offer: Offer,
    learned: Learned,
) -> Result<Arc<ClientConfig>, TlsError> {
    if expect.is_empty() {
        return Err(TlsError::NobodyExpected);
    }
    let mut config = ClientConfig::builder_with_provider(provider_with(parameters))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectServer::new(trust, expect.to_vec(), learned)))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(Arc::clone(&svid.key))));
    config.alpn_protocols = owned(offer.names());
    config.resumption = Resumption::disabled();
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// What is to be known of one handshake and rustls does not tell afterwards: the server name, which it tells to whoever chooses the
/// certificate, and by which chain the peer was believed, which it leaves to the verifier.
#[derive(Clone, Default, Debug)]
pub struct Learned(Arc<(OnceLock<String>, OnceLock<Voucher>)>);

impl Learned {
    pub fn sni(&self) -> Option<&str> {
        self.0.0.get().map(String::as_str)
    }

    pub fn voucher(&self) -> Option<&Voucher> {
        self.0.1.get()
    }

    pub(super) fn vouched(&self, voucher: Voucher) {
        let _ = self.0.1.set(voucher);
    }
}

#[derive(Debug)]
struct NotingSni(SingleCertAndKey, Learned);

impl ResolvesServerCert for NotingSni {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if let Some(name) = hello.server_name() {
            let _ = self.1.0.0.set(name.to_owned());
        }
        self.0.resolve(hello)
    }
}

/// For a connection from any workload that is vouched for; whether that one may connect is policy's to say.
pub fn server_config(svid: &Svid, trust: Arc<Trust>, accept: Accept) -> Result<Arc<ServerConfig>, TlsError> {
    server_config_with(Parameters::default(), svid, trust, accept, Learned::default())
}

/// The same for one connection, of whose client is learned what it asks for and who vouches for it.
pub fn server_config_with(
    parameters: Parameters,
    svid: &Svid,
    trust: Arc<Trust>,
    accept: Accept,
    learned: Learned,
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider_with(parameters))
        .with_protocol_versions(&[&TLS13])?
        .with_client_cert_verifier(Arc::new(MeshClient::new(trust, learned.clone())))
        .with_cert_resolver(Arc::new(NotingSni(SingleCertAndKey::from(Arc::clone(&svid.key)), learned)));
    config.ignore_client_order = parameters.ciphers == Ciphers::Lasting;
    config.alpn_protocols = owned(accept.names());
    // A ticket is a record that the pump would have to understand, and resumption would skip the identity checks.
    config.send_tls13_tickets = 0;
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.max_early_data_size = 0;
    config.enable_secret_extraction = true;
    Ok(Arc::new(config))
}

/// The SNI that Istio's sidecars send and route by: `outbound_.PORT_._.HOST`.
///
/// The peer is recognised by its identity, not by this name; a host that makes no DNS name is replaced, not refused.
pub fn server_name(port: u16, host: &str) -> ServerName<'static> {
    DnsName::try_from(format!("outbound_.{port}_._.{host}"))
        .or_else(|_| DnsName::try_from(format!("outbound_.{port}_._.unnamed")))
        .map_or_else(|_| ServerName::IpAddress(std::net::Ipv4Addr::UNSPECIFIED.into()), ServerName::DnsName)
}

/// The identity in a peer's verified chain: that of its leaf.
pub fn peer_id(chain: &[CertificateDer<'_>]) -> Result<SpiffeId, TlsError> {
    let leaf = chain.first().ok_or(PeerError::NoCertificate)?;
    Ok(svid_identity(leaf).map_err(PeerError::from)?)
}

fn owned(names: &[&[u8]]) -> Vec<Vec<u8>> {
    names.iter().map(|name| name.to_vec()).collect()
}
