//! What a full mutual handshake costs: `cargo bench -p marline --bench handshakes`.
//!
//! Both ends run here on one thread, over a pipe in memory, as the agents have them: TLS 1.3, P-256 certificates, both verified. Told are
//! handshakes for each second of processor time, both sides together, and what each of its parts costs alone. And what a resumed session
//! would cost, which agents do not have: with rustls's own connections, and a full one of those to compare it with.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{sync::Arc, time::Duration};

use marline::{
    identity::{Ca, SpiffeId, Svid, Trust, TrustDomain},
    proxy::handshake,
    tls::config::{Accept, Learned, Offer, Parameters, client_config_with, provider, server_config_with, server_name},
};
use rustls::{
    ClientConnection, HandshakeKind, ServerConnection, client::Resumption, crypto::SupportedKxGroup,
    pki_types::UnixTime, server::ServerSessionMemoryCache,
};

const LIMIT: Duration = Duration::from_secs(10);
const COUNT: u32 = 1_000;
const ROUNDS: usize = 5;

struct Ends {
    client: Svid,
    server: Svid,
    expect: [SpiffeId; 1],
}

fn main() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let dir = tempfile::tempdir().unwrap();
    let domain = TrustDomain::default();
    Ca::init(dir.path(), &domain).unwrap();
    let ca = Ca::open(dir.path()).unwrap();
    let svid = |account: &str| {
        let id = SpiffeId::new(&domain, "bench", account).unwrap();
        (ca.issue(&id, Duration::from_secs(3_600)).unwrap(), id)
    };
    let ((client, _), (server, id)) = (svid("client"), svid("server"));
    let ends = Ends { client, server, expect: [id] };
    let trust = || Arc::new(Trust::new(domain.clone(), ca.roots()));
    println!("{:<56} {:>12} {:>16}", "", "us, median", "a core-second");
    let known = trust();
    let once = |trust: Arc<Trust>| runtime.block_on(shake(&ends, trust));
    told("handshake, chains verified before", median(|| once(known.clone())));
    told("handshake, chains never seen before", median(|| once(trust())));
    for (what, kind) in [("full", HandshakeKind::Full), ("resumed (agents do not)", HandshakeKind::Resumed)] {
        let mut once = buffered(&ends, known.clone(), kind);
        told(&format!("  rustls's own connections, {what}"), median(&mut once));
    }
    for group in &provider().kx_groups {
        told(&format!("  key exchange {:?}, both sides", group.name()), median(|| exchange(*group)));
    }
    let leaf = ends.client.key.cert.first().unwrap();
    let chain = ends.client.key.cert.get(1..).unwrap();
    let usage = webpki::KeyUsage::client_auth();
    let verify = || known.verify(&domain, leaf, chain, UnixTime::now(), usage).unwrap();
    told("  a chain verified (each side does it once)", median(|| drop(verify())));
    let signer = ends.client.key.key.choose_scheme(&[rustls::SignatureScheme::ECDSA_NISTP256_SHA256]).unwrap();
    told("  a signature made (each side does it once)", median(|| drop(signer.sign(&[7; 130]).unwrap())));
}

async fn shake(ends: &Ends, trust: Arc<Trust>) {
    let learned = Learned::default;
    let parameters = Parameters::default();
    let client =
        client_config_with(parameters, &ends.client, trust.clone(), &ends.expect, Offer::Proxied, learned()).unwrap();
    let server = server_config_with(parameters, &ends.server, trust, Accept::Plain, learned()).unwrap();
    let (mut near, mut far) = tokio::io::duplex(64 << 10);
    let name = server_name(80, "server.bench.svc.cluster.local");
    let both =
        tokio::join!(handshake::connect(&mut near, client, name, LIMIT), handshake::accept(&mut far, server, LIMIT));
    both.0.unwrap();
    both.1.unwrap();
}

/// Handshakes of this kind.
fn buffered(ends: &Ends, trust: Arc<Trust>, kind: HandshakeKind) -> impl FnMut() {
    let (parameters, learned) = (Parameters::default(), Learned::default);
    let client = client_config_with(parameters, &ends.client, trust.clone(), &ends.expect, Offer::Proxied, learned());
    let server = server_config_with(parameters, &ends.server, trust, Accept::Plain, learned());
    let (mut client, mut server) = ((*client.unwrap()).clone(), (*server.unwrap()).clone());
    if kind == HandshakeKind::Resumed {
        client.resumption = Resumption::in_memory_sessions(8);
        server.session_storage = ServerSessionMemoryCache::new(8);
        server.send_tls13_tickets = 1;
    }
    let (client, server) = (Arc::new(client), Arc::new(server));
    // The first one cannot be a resumed one, and the warm-up makes it.
    let mut first = true;
    move || {
        let name = server_name(80, "server.bench.svc.cluster.local");
        let mut near = ClientConnection::new(client.clone(), name).unwrap();
        let mut far = ServerConnection::new(server.clone()).unwrap();
        let mut bytes = Vec::new();
        while near.wants_write() || far.wants_write() {
            near.write_tls(&mut bytes).unwrap();
            far.read_tls(&mut bytes.as_slice()).unwrap();
            far.process_new_packets().unwrap();
            bytes.clear();
            while far.wants_write() {
                far.write_tls(&mut bytes).unwrap();
            }
            near.read_tls(&mut bytes.as_slice()).unwrap();
            near.process_new_packets().unwrap();
            bytes.clear();
        }
        assert!(first || near.handshake_kind() == Some(kind), "not {kind:?}");
        first = false;
    }
}

fn exchange(group: &dyn SupportedKxGroup) {
    let client = group.start().unwrap();
    let server = group.start_and_complete(client.pub_key()).unwrap();
    client.complete(&server.pub_key).unwrap();
}

/// Of the rounds, the microseconds of this thread's processor time for each.
fn median(mut f: impl FnMut()) -> f64 {
    f();
    let mut rounds: Vec<f64> = (0..ROUNDS)
        .map(|_| {
            let started = spent();
            (0..COUNT).for_each(|_| f());
            (spent() - started).as_secs_f64() * 1e6 / f64::from(COUNT)
        })
        .collect();
    rounds.sort_by(f64::total_cmp);
    rounds[ROUNDS / 2]
}

fn spent() -> Duration {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap();
    Duration::from(time)
}

fn told(what: &str, micros: f64) {
    println!("{what:<56} {micros:>12.1} {:>16.0}", 1e6 / micros);
}
