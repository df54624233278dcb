//! A network namespace of the test's own, and connections within it whose two ends keep count of what they write.

use std::{
    future::Future,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use marline::{
    sys::{
        diag::{Destruction, DiagSocket, Event},
        netns::Netns,
    },
    tls::{
        ktls::{self, Direction},
        records::{MAX_PLAINTEXT, OVERHEAD},
    },
};
use marline_tests::{amount::in_vm, netns};
use rustls::{
    ConnectionTrafficSecrets,
    crypto::{
        aws_lc_rs::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
        cipher::{AeadKey, Iv},
    },
};
use tokio::runtime::{Builder, Runtime};

pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What the listener is bound to, and what is connected to: IPv4, IPv6, and IPv4 on an IPv6 socket.
pub(crate) type Family = (&'static str, &'static str);
pub(crate) const FAMILIES: [Family; 3] =
    [("127.0.0.1:0", "127.0.0.1"), ("[::1]:0", "::1"), ("[::]:0", "::ffff:127.0.0.1")];

pub(crate) struct Bed {
    name: String,
    pub netns: Netns,
}

impl Bed {
    pub(crate) fn new() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("mks{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        netns::create(&name).expect("a namespace");
        let netns = Netns::open(netns::path(&name)).expect("the namespace");
        Self { name, netns }
    }

    pub(crate) fn connect(&self, (bound, to): Family, kernel_tls: bool) -> Ends {
        let (client, server) = self
            .netns
            .run(|| {
                let listener = TcpListener::bind(bound).unwrap();
                let port = listener.local_addr().unwrap().port();
                let client = TcpStream::connect(SocketAddr::new(to.parse().unwrap(), port)).unwrap();
                (client, listener.accept().unwrap().0)
            })
            .unwrap();
        if kernel_tls {
            seal(&client, &server);
        }
        Ends { client, server, kernel_tls, up: 0, down: 0 }
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if let Err(error) = netns::remove(&self.name) {
            eprintln!("{error:#}");
        }
    }
}

/// Both ends of a connection, and how many bytes of TCP payload each has written.
pub(crate) struct Ends {
    pub client: TcpStream,
    pub server: TcpStream,
    pub kernel_tls: bool,
    pub up: u64,
    pub down: u64,
}

impl Ends {
    /// The client writes, the server reads.
    pub(crate) fn up(&mut self, bytes: usize) {
        self.write_up(bytes);
        self.server.read_exact(&mut vec![0; bytes]).unwrap();
    }

    pub(crate) fn down(&mut self, bytes: usize) {
        self.write_down(bytes);
        self.client.read_exact(&mut vec![0; bytes]).unwrap();
    }

    /// Written and not read. Few enough that TCP takes it at once.
    pub(crate) fn write_up(&mut self, bytes: usize) {
        self.client.write_all(&vec![1; bytes]).unwrap();
        self.up += self.on_the_wire(bytes);
    }

    pub(crate) fn write_down(&mut self, bytes: usize) {
        self.server.write_all(&vec![2; bytes]).unwrap();
        self.down += self.on_the_wire(bytes);
    }

    fn on_the_wire(&self, bytes: usize) -> u64 {
        let records = if self.kernel_tls { bytes.div_ceil(MAX_PLAINTEXT) as u64 } else { 0 };
        bytes as u64 + records * OVERHEAD
    }
}

/// Whether this kernel has TLS. The VM's kernels are known to.
pub(crate) fn kernel_tls() -> bool {
    let bed = Bed::new();
    let ends = bed.connect(FAMILIES[0], false);
    let there = ktls::attach(&ends.client);
    assert!(!in_vm() || there.is_ok(), "{there:?}");
    there.is_ok()
}

/// Keys for both, which no handshake has made.
fn seal(client: &TcpStream, server: &TcpStream) {
    let secrets = |key: u8| {
        (0, ConnectionTrafficSecrets::Chacha20Poly1305 { key: AeadKey::from([key; 32]), iv: Iv::copy(&[key; 12]) })
    };
    for (end, transmit, receive) in [(client, 1, 2), (server, 2, 1)] {
        ktls::attach(end).unwrap();
        let suite = TLS13_CHACHA20_POLY1305_SHA256;
        ktls::install(end, Direction::Transmit, suite, secrets(transmit)).unwrap();
        ktls::install(end, Direction::Receive, suite, secrets(receive)).unwrap();
    }
}

pub(crate) fn runtime() -> Runtime {
    Builder::new_current_thread().enable_all().build().expect("a runtime")
}

pub(crate) async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("it takes too long")
}

/// Waits for the end of one socket, passing over others'.
pub(crate) async fn destroyed(ended: &mut Destruction, cookie: u64) -> DiagSocket {
    let told = until_destroyed(ended, cookie).await;
    told.into_iter().next_back().unwrap()
}

/// The same, with all that was told before it.
pub(crate) async fn until_destroyed(ended: &mut Destruction, cookie: u64) -> Vec<DiagSocket> {
    let mut told = Vec::new();
    loop {
        if let Event::Destroyed(socket) = within(ended.next()).await.unwrap() {
            told.push(*socket);
            if told.last().is_some_and(|last| last.id.cookie == cookie) {
                return told;
            }
        }
    }
}

pub(crate) fn inode(socket: impl AsFd) -> u32 {
    u32::try_from(nix::sys::stat::fstat(socket.as_fd()).unwrap().st_ino).unwrap()
}

/// Looks until it holds: for what the network stack does by itself.
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}
