//! Two pumps in a row as two agents have them: client, near pump, wire with real TLS, far pump, server. All sockets are real;
//! only capture is left out.

use std::{io, net::Ipv4Addr, sync::Arc, time::Duration};

use marline::{
    identity::{SpiffeId, Svid, Trust, TrustDomain, ca::Ca},
    proxy::{
        handshake::{self, Secured},
        offload::{self, Capabilities, Records, RecordsChoice},
        probe,
        pump::{self, Moved, PumpError},
    },
    tls::{
        config::{self, Accept, Offer},
        records::Ending,
    },
    words::PumpKind,
};
use marline_tests::amount::in_vm;
use socket2::SockRef;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinHandle,
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(120);

/// Who keeps the records of a line, and how its bytes are moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Carrier {
    Plain(PumpKind),
    Userspace(Ending),
    Kernel(PumpKind, Ending),
}

impl Carrier {
    /// How the ends of its streams are told, which the two ends agree on in the handshake.
    pub(crate) fn ending(self) -> Ending {
        match self {
            Self::Plain(_) => Ending::Fin,
            Self::Userspace(ending) | Self::Kernel(_, ending) => ending,
        }
    }
}

const ENDINGS: [Ending; 2] = [Ending::CloseNotify, Ending::Fin];

/// Socket buffers of every leg; the kernel's own where `None`.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Buffers {
    pub send: Option<usize>,
    pub receive: Option<usize>,
}

pub(crate) struct World {
    pub svid: Svid,
    pub trust: Arc<Trust>,
    pub kernel: Capabilities,
}

pub(crate) struct Line {
    pub client: TcpStream,
    pub server: TcpStream,
    pub near: JoinHandle<Result<(), PumpError>>,
    pub far: JoinHandle<Result<(), PumpError>>,
}

impl World {
    pub(crate) async fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let domain = TrustDomain::parse("cluster.local").expect("a trust domain");
        let place = dir.path().join("ca");
        Ca::init(&place, &domain).expect("a new CA");
        let ca = Ca::open(&place).expect("the CA");
        let id = SpiffeId::new(&domain, "test", "pump").expect("an identity");
        let svid = ca.issue(&id, Duration::from_secs(3600)).expect("an SVID");
        let trust = ca.trust(&domain);
        let kernel = probe::probe(&svid, trust.clone()).await;
        Self { svid, trust, kernel }
    }

    /// What is to be tested on this kernel. In the VM, whose kernel is known to have kernel TLS, that is all there is to test:
    /// the rest runs natively, and faster.
    pub(crate) fn carriers(&self) -> Vec<Carrier> {
        let mut carriers = Vec::new();
        if !in_vm() {
            carriers.extend([Carrier::Plain(PumpKind::Copy), Carrier::Plain(PumpKind::Splice)]);
            carriers.extend(ENDINGS.map(Carrier::Userspace));
        }
        if self.kernel.suites.is_empty() {
            assert!(!in_vm(), "the VM's kernel does not do kernel TLS: {}", self.kernel.why);
            println!("SKIPPED: kernel TLS: this kernel has none ({})", self.kernel.why);
        } else {
            carriers.extend(ENDINGS.map(|ending| Carrier::Kernel(PumpKind::Copy, ending)));
            if self.kernel.pump == PumpKind::Splice {
                carriers.extend(ENDINGS.map(|ending| Carrier::Kernel(PumpKind::Splice, ending)));
            } else {
                println!("SKIPPED: kernel TLS by splice: {}", self.kernel.why);
            }
        }
        carriers
    }

    /// The carriers that have records.
    pub(crate) fn record_carriers(&self) -> Vec<Carrier> {
        self.carriers().into_iter().filter(|carrier| !matches!(carrier, Carrier::Plain(_))).collect()
    }

    pub(crate) async fn secured(
        &self,
        near: &mut TcpStream,
        far: &mut TcpStream,
        ending: Ending,
    ) -> (Secured, Secured) {
        let (offer, accept) = match ending {
            Ending::CloseNotify => (Offer::Proxied, Accept::Plain),
            Ending::Fin => (Offer::ProxiedFinOk, Accept::DirectReady),
        };
        let client = config::client_config(&self.svid, self.trust.clone(), std::slice::from_ref(&self.svid.id), offer)
            .expect("a client configuration");
        let server = config::server_config(&self.svid, self.trust.clone(), accept).expect("a server configuration");
        let name = config::server_name(1, "test");
        let (near, far) =
            tokio::join!(handshake::connect(near, client, name, PATIENCE), handshake::accept(far, server, PATIENCE));
        (near.expect("the client's handshake"), far.expect("the server's handshake"))
    }

    pub(crate) fn records(&self, socket: &TcpStream, secured: Secured, carrier: Carrier) -> Records {
        let (choice, pump) = match carrier {
            Carrier::Plain(pump) => return Records::Plain(pump),
            Carrier::Userspace(_) => (RecordsChoice::Userspace, PumpKind::Copy),
            Carrier::Kernel(pump, _) => (RecordsChoice::Kernel, pump),
        };
        let kernel = Capabilities { pump, ..self.kernel.clone() };
        let records = offload::offload(socket, secured, choice, &kernel).expect("records");
        assert_eq!(records.ending(), carrier.ending());
        assert_eq!(records.name(), if choice == RecordsChoice::Kernel { "ktls" } else { "userspace" });
        records
    }

    pub(crate) async fn line(&self, carrier: Carrier, buffers: Buffers) -> Line {
        let (client, app) = pair(buffers).await;
        let (mut wire, mut peer) = pair(buffers).await;
        let (peer_app, server) = pair(buffers).await;
        let (near, far) = if let Carrier::Plain(pump) = carrier {
            (Records::Plain(pump), Records::Plain(pump))
        } else {
            let (near, far) = self.secured(&mut wire, &mut peer, carrier.ending()).await;
            (self.records(&wire, near, carrier), self.records(&peer, far, carrier))
        };
        Line { client, server, near: spawn(app, wire, near), far: spawn(peer_app, peer, far) }
    }

    /// A pump whose peer on the wire is the test itself: the client's socket, the raw wire, and the peer's keys.
    pub(crate) async fn half(
        &self,
        carrier: Carrier,
    ) -> (TcpStream, JoinHandle<Result<(), PumpError>>, TcpStream, Secured) {
        let (client, app) = pair(Buffers::default()).await;
        let (mut wire, mut peer) = pair(Buffers::default()).await;
        let (near, far) = self.secured(&mut wire, &mut peer, carrier.ending()).await;
        let near = self.records(&wire, near, carrier);
        (client, spawn(app, wire, near), peer, far)
    }
}

/// Runs a pump and ends its sockets as the agent does.
pub(crate) fn spawn(app: TcpStream, wire: TcpStream, records: Records) -> JoinHandle<Result<(), PumpError>> {
    tokio::spawn(async move {
        let (_keep, mut revoked) = watch::channel(None);
        let result = pump::run(&app, &wire, records, &Moved::default(), &mut revoked).await;
        if result.is_err() {
            for leg in [&app, &wire] {
                SockRef::from(leg).set_linger(Some(Duration::ZERO)).expect("linger");
            }
        }
        result
    })
}

pub(crate) async fn pair(buffers: Buffers) -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    set(&listener, buffers);
    let near = TcpStream::connect(listener.local_addr().expect("an address")).await.expect("a connection");
    set(&near, buffers);
    loop {
        let (far, from) = listener.accept().await.expect("the connection");
        if from == near.local_addr().expect("an address") {
            set(&far, buffers);
            return (near, far);
        }
    }
}

fn set<S: std::os::fd::AsFd>(socket: &S, buffers: Buffers) {
    let set = || -> io::Result<()> {
        let socket = SockRef::from(socket);
        buffers.send.map_or(Ok(()), |size| socket.set_send_buffer_size(size))?;
        buffers.receive.map_or(Ok(()), |size| socket.set_recv_buffer_size(size))
    };
    set().expect("socket buffers");
}
