//! The sockets of capture: listeners in the pod's namespace, and the legs that the agent opens from there, so that the pod's
//! address and the rules of its network hold. What the kernel programs know of a connection is asked of `bpf`.

use std::{
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsFd,
    time::Duration,
};

use rustls::server::Acceptor;
use socket2::{Domain, Protocol, SockRef, Socket, TcpKeepalive, Type};
use tokio::{
    io::Interest,
    net::{TcpListener, TcpSocket, TcpStream},
};

use crate::{
    bpf::PodListeners,
    policy::Keepalive,
    sys::{netns::Netns, socket},
    tls::{config::ALPN, records::MAX_RECORD},
};

const BACKLOG: i32 = 4096;
/// How long a client of whom nothing is known may keep silent before it is taken for one that waits for the server's word.
const SILENCE: Duration = Duration::from_millis(100);

/// A pod's listeners. All are bound to loopback: what arrives with one of the pod's addresses was steered here.
pub struct Listeners {
    pub outbound4: TcpListener,
    pub outbound6: Option<TcpListener>,
    pub inbound4: TcpListener,
    /// For applications that listen for IPv6 and are handed the connections of IPv4 clients.
    pub inbound4_mapped: Option<TcpListener>,
    pub inbound6: Option<TcpListener>,
}

impl Listeners {
    /// IPv6 is left out where the pod has none (`net.ipv6.conf.*.disable_ipv6`); connects of that family are then refused.
    /// What is accepted is guarded: see `guard`.
    pub fn open(netns: &Netns, idle: Duration) -> io::Result<Self> {
        let sockets = netns.run(|| {
            let v4 = || listener(Ipv4Addr::LOCALHOST.into(), idle);
            let v6 = || match listener(Ipv6Addr::LOCALHOST.into(), idle) {
                Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::EAFNOSUPPORT)) => {
                    Ok(None)
                }
                other => other.map(Some),
            };
            let mapped = || listener(Ipv4Addr::LOCALHOST.to_ipv6_mapped().into(), idle).ok();
            Ok::<_, io::Error>((v4()?, v6()?, v4()?, mapped(), v6()?))
        })??;
        let (outbound4, outbound6, inbound4, inbound4_mapped, inbound6) = sockets;
        Ok(Self {
            outbound4: into_tokio(outbound4)?,
            outbound6: outbound6.map(into_tokio).transpose()?,
            inbound4: into_tokio(inbound4)?,
            inbound4_mapped: inbound4_mapped.map(into_tokio).transpose()?,
            inbound6: inbound6.map(into_tokio).transpose()?,
        })
    }

    pub fn for_capture<'a>(&'a self, netns: &'a Netns, addresses: &'a [IpAddr]) -> io::Result<PodListeners<'a>> {
        Ok(PodListeners {
            netns,
            outbound4: Some(self.outbound4.local_addr()?.port()),
            outbound6: self.outbound6.as_ref().map(|l| l.local_addr().map(|a| a.port())).transpose()?,
            inbound4: Some(self.inbound4.as_fd()),
            inbound6: self.inbound6.as_ref().map(AsFd::as_fd),
            inbound4_mapped: self.inbound4_mapped.as_ref().map(AsFd::as_fd),
            addresses,
        })
    }
}

/// Connects from the pod's namespace, from `source` where the application had chosen an address.
pub async fn connect(
    netns: &Netns,
    source: Option<IpAddr>,
    destination: SocketAddr,
    limit: Duration,
) -> io::Result<TcpStream> {
    let socket = leg(netns, destination)?;
    if let Some(source) = source {
        socket.bind(SocketAddr::new(source, 0))?;
    }
    tokio::time::timeout(limit, socket.connect(destination)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

/// A socket in the pod's namespace that is bound to the pod's address, and not yet connected: the kernel programs must
/// be told of its port first.
pub fn bound_leg(netns: &Netns, address: SocketAddr) -> io::Result<(TcpSocket, SocketAddr)> {
    let socket = leg(netns, address)?;
    socket.bind(SocketAddr::new(address.ip(), 0))?;
    let source = socket.local_addr()?;
    Ok((socket, source))
}

/// Until `settle`, every way in which a leg is closed, also by the kernel after the agent's death, is a reset: an application
/// must not take a cut stream for a whole one.
pub fn guard(leg: impl AsFd, idle: Duration) -> io::Result<()> {
    socket::abort_on_close(&leg)?;
    socket::tune(&leg, idle)
}

/// Keepalive as a DestinationRule wants it; what it leaves out stays as `guard` has it.
pub fn keep_alive(leg: &TcpStream, wanted: &Keepalive) -> io::Result<()> {
    let mut keepalive = TcpKeepalive::new();
    if let Some(time) = wanted.time {
        keepalive = keepalive.with_time(time);
    }
    if let Some(interval) = wanted.interval {
        keepalive = keepalive.with_interval(interval);
    }
    if let Some(probes) = wanted.probes {
        keepalive = keepalive.with_retries(probes);
    }
    SockRef::from(leg).set_tcp_keepalive(&keepalive)
}

/// Both directions have ended in order: what is still queued is delivered after the close.
pub fn settle(leg: &TcpStream) -> io::Result<()> {
    SockRef::from(leg).set_linger(None)
}

/// A self-test's connection was let through, and ends in order: a reset would tell the test that it was refused.
pub fn pass(probe: &TcpStream) {
    // If this fails the test fails, which is told.
    let _ = settle(probe);
}

/// Looks at a client's first bytes without taking them: true if it speaks the mesh's TLS, which its ALPN tells from an
/// application's own TLS (as Istio's PERMISSIVE inbound listener does).
pub async fn speaks_mesh_tls(client: &TcpStream, limit: Duration) -> io::Result<bool> {
    let mut bytes = vec![0; MAX_RECORD];
    match tokio::time::timeout(SILENCE, client.readable()).await {
        Ok(ready) => ready?,
        Err(_) => return Ok(false),
    }
    let look = async {
        loop {
            let ready = client.ready(Interest::READABLE).await?;
            let seen = client.try_io(Interest::READABLE, || match socket::peek(client, &mut bytes)? {
                0 => Ok(false),
                length => match judge(&bytes[..length]) {
                    Some(verdict) => Ok(verdict),
                    None if length == bytes.len() || ready.is_read_closed() => Ok(false),
                    // What was looked at stays; the next segment makes the next event.
                    None => Err(io::ErrorKind::WouldBlock.into()),
                },
            });
            match seen {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                seen => return seen,
            }
        }
    };
    tokio::time::timeout(limit, look).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
}

/// `None` while a ClientHello has not come whole.
fn judge(bytes: &[u8]) -> Option<bool> {
    if bytes.first() != Some(&22) {
        return Some(false);
    }
    let mut acceptor = Acceptor::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        if acceptor.read_tls(&mut rest).is_err() {
            return Some(false);
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => {
                let hello = accepted.client_hello();
                return Some(hello.alpn().is_some_and(|mut names| names.any(|name| ALPN.contains(&name))));
            }
            Ok(None) => {}
            Err(_) => return Some(false),
        }
    }
    None
}

fn leg(netns: &Netns, destination: SocketAddr) -> io::Result<TcpSocket> {
    netns.run(|| if destination.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() })?
}

fn listener(address: IpAddr, idle: Duration) -> io::Result<Socket> {
    let socket =
        Socket::new(Domain::for_address((address, 0).into()), Type::STREAM.nonblocking(), Some(Protocol::TCP))?;
    if let IpAddr::V6(v6) = address {
        socket.set_only_v6(v6.to_ipv4_mapped().is_none())?;
    }
    // Accepted connections inherit all of it (net/core/sock.c, sk_clone; six system calls less for each), and no accepted one is
    // ever unguarded. They hold the application's port, and a server that restarts must be able to bind it while some of them linger.
    socket.set_reuse_address(true)?;
    guard(&socket, idle)?;
    socket.bind(&SocketAddr::new(address, 0).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket)
}

fn into_tokio(socket: Socket) -> io::Result<TcpListener> {
    TcpListener::from_std(socket.into())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn what_is_accepted_is_guarded_from_its_first_moment() {
        for address in [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv4Addr::LOCALHOST.to_ipv6_mapped().into()] {
            let listener = into_tokio(listener(address, Duration::from_secs(60)).unwrap()).unwrap();
            let port = listener.local_addr().unwrap().port();
            let mut client = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            let socket = SockRef::from(&accepted);
            assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
            assert_eq!(socket.tcp_keepalive_time().unwrap(), Duration::from_secs(60));
            assert_eq!(socket.tcp_keepalive_interval().unwrap(), Duration::from_secs(20));
            assert_eq!(socket.tcp_keepalive_retries().unwrap(), 3);
            drop(accepted);
            let closed = client.read(&mut [0]).await.unwrap_err();
            assert_eq!(closed.kind(), io::ErrorKind::ConnectionReset, "a close is a reset");
        }
    }

    #[test]
    fn plaintext_and_foreign_tls_are_not_the_mesh() {
        assert_eq!(judge(b"GET / HTTP/1.1\r\n"), Some(false));
        assert_eq!(judge(&[22, 3, 1]), None);
        assert_eq!(judge(&[22, 9, 9, 0, 1, 0]), Some(false));
    }

    proptest! {
        #[test]
        fn any_first_bytes_are_judged_without_panic(bytes: Vec<u8>) {
            let _ = judge(&bytes);
            let mut hello = vec![22, 3, 1];
            hello.extend(bytes);
            let _ = judge(&hello);
        }
    }
}
