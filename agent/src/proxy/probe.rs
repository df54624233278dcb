//! Finds out what this kernel can do by doing it: a handshake, keys to the kernel, and a transfer through both ends of the real
//! pump, checked byte for byte, over loopback. Versions are not compared: backports and configurations decide.

use std::{io, net::Ipv4Addr, sync::Arc, time::Duration};

use rustls::{ClientConfig, SupportedCipherSuite, crypto::CryptoProvider, sign::SingleCertAndKey, version::TLS13};
use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    time::error::Elapsed,
};

use super::{
    handshake,
    offload::{self, Capabilities, Records, RecordsChoice},
    pump::{self, Moved},
};
use crate::{
    identity::{Svid, Trust},
    tls::{
        config::{self, Accept, Learned},
        ktls,
        verifier::ExpectServer,
    },
    words::{PumpKind, with_causes},
};

const BYTES: usize = 256 << 10;
/// Smaller than a record, so that the kernel must stop and go on in the middle of one: where some kernels stall. Receive buffers
/// stay as they are: TCP itself crawls where they are smaller than a segment.
const SEND_BUFFER: usize = 4096;
const LIMIT: Duration = Duration::from_secs(10);
/// A transfer that makes no progress for so long has stalled for good.
const STALL: Duration = Duration::from_millis(1500);

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Tries kernel TLS with each cipher suite, then the faster pump. Takes a fraction of a second, natively.
pub async fn probe(svid: &Svid, trust: Arc<Trust>) -> Capabilities {
    if let Err(error) = attachable().await {
        return Capabilities::none(with_causes(&*error));
    }
    let mut capabilities = Capabilities::none("");
    let mut why = Vec::new();
    for suite in &config::provider().cipher_suites {
        match transfer(svid, &trust, *suite, PumpKind::Copy).await {
            Ok(()) => capabilities.suites.push(suite.suite()),
            Err(error) => why.push(format!("{:?}: {}", suite.suite(), with_causes(&*error))),
        }
    }
    let first = config::provider().cipher_suites.iter().copied().find(|suite| capabilities.kernel(*suite));
    if let Some(suite) = first {
        match transfer(svid, &trust, suite, PumpKind::Splice).await {
            Ok(()) => {
                capabilities.pump = PumpKind::Splice;
                why.push("splice moves records soundly under back pressure".into());
            }
            Err(error) => why.push(format!("copying, because splice: {}", with_causes(&*error))),
        }
    }
    capabilities.why = why.join("; ");
    capabilities
}

async fn attachable() -> Result<(), Failure> {
    let (near, _far) = pair().await?;
    Ok(ktls::attach(&near)?)
}

/// Application, pump, wire, pump, application; the bytes that come out must be those that went in, and the end in order.
async fn transfer(svid: &Svid, trust: &Arc<Trust>, suite: SupportedCipherSuite, kind: PumpKind) -> Result<(), Failure> {
    let (client, server) = configs(svid, trust, suite)?;
    let ((mut source, app), (mut wire, mut peer)) = (pair().await?, pair().await?);
    let (peer_app, mut sink) = pair().await?;
    for socket in [&app, &wire, &peer, &peer_app] {
        SockRef::from(socket).set_send_buffer_size(SEND_BUFFER)?;
    }
    let name = config::server_name(1, "probe.marline.internal");
    let (near, far) =
        tokio::join!(handshake::connect(&mut wire, client, name, LIMIT), handshake::accept(&mut peer, server, LIMIT));
    let capabilities = Capabilities { suites: vec![suite.suite()], pump: kind, why: String::new() };
    let near = offload::offload(&wire, near?, RecordsChoice::Kernel, &capabilities)?;
    let far = offload::offload(&peer, far?, RecordsChoice::Kernel, &capabilities)?;

    let sent: Vec<u8> = (0..BYTES).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    let write = async {
        source.write_all(&sent).await?;
        source.shutdown().await
    };
    let read = async {
        let mut received = Vec::with_capacity(BYTES);
        while tokio::time::timeout(STALL, sink.read_buf(&mut received)).await?? > 0 {}
        sink.shutdown().await?;
        Ok::<_, Failure>(received)
    };
    let pumps = async {
        let (written, near, far) = tokio::join!(write, run(&app, &wire, near), run(&peer_app, &peer, far));
        written?;
        near?;
        far?;
        Ok::<_, Failure>(())
    };
    tokio::pin!(pumps);
    let received = tokio::select! {
        biased;
        received = read => received.map_err(|error| -> Failure {
            if error.is::<Elapsed>() { "a transfer with small send buffers stalls".into() } else { error }
        })?,
        result = &mut pumps => return Err(result.err().unwrap_or_else(|| "the transfer ended before its reader".into())),
    };
    tokio::time::timeout(LIMIT, pumps).await??;
    if received == sent { Ok(()) } else { Err("the bytes that came out are not those that went in".into()) }
}

async fn run(app: &TcpStream, wire: &TcpStream, records: Records) -> Result<(), pump::PumpError> {
    let (_keep, mut revoked) = watch::channel(None);
    pump::run(app, wire, records, &Moved::default(), &mut revoked).await
}

fn configs(
    svid: &Svid,
    trust: &Arc<Trust>,
    suite: SupportedCipherSuite,
) -> Result<(Arc<ClientConfig>, Arc<rustls::ServerConfig>), Failure> {
    let provider = CryptoProvider { cipher_suites: vec![suite], ..(*config::provider()).clone() };
    let mut client = ClientConfig::builder_with_provider(Arc::new(provider))
        .with_protocol_versions(&[&TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(ExpectServer::new(
            trust.clone(),
            vec![svid.id.clone()],
            Learned::default(),
        )))
        .with_client_cert_resolver(Arc::new(SingleCertAndKey::from(svid.key.clone())));
    client.enable_secret_extraction = true;
    let server = config::server_config(svid, trust.clone(), Accept::Plain)?;
    Ok((Arc::new(client), server))
}

async fn pair() -> io::Result<(TcpStream, TcpStream)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
    let near = TcpStream::connect(listener.local_addr()?).await?;
    loop {
        let (far, from) = listener.accept().await?;
        // Another process may connect to the port as well.
        if from == near.local_addr()? {
            return Ok((near, far));
        }
    }
}
