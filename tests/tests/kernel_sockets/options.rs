//! Options of sockets that are an application's: which make them unfit, which an accepted socket would have had, and calls that
//! must not wait on sockets that block.

use std::{
    io::{self, Read, Write},
    net::{TcpListener, TcpStream, UdpSocket},
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use marline::{
    sys::options::{self, Purpose, accept_now, connect_now, disconnect, unsuited},
    tls::ktls,
};
use nix::{
    fcntl::{FcntlArg, OFlag, fcntl},
    sys::socket::{setsockopt, sockopt},
};
use socket2::{Domain, Protocol, SockFilter, SockRef, Socket, TcpKeepalive, Type};

use super::bed::{Bed, FAMILIES, kernel_tls};

fn tcp() -> Socket {
    Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()
}

#[test]
fn sockets_that_cannot_carry_records_of_their_own_are_told_apart() {
    let bed = Bed::new();
    let connect = |socket: &dyn AsFd| unsuited(socket.as_fd(), Purpose::Connect);
    assert_eq!(connect(&tcp()), None);
    assert_eq!(connect(&Socket::new(Domain::IPV6, Type::STREAM, None).unwrap()), None);
    assert_eq!(connect(&UdpSocket::bind("127.0.0.1:0").unwrap()), Some("not TCP"));
    assert_eq!(connect(&UnixStream::pair().unwrap().0), Some("not an internet socket"));
    assert_eq!(connect(&io::stdin()), Some("not an internet socket"));
    match Socket::new(Domain::IPV4, Type::STREAM, Some(Protocol::MPTCP)) {
        Ok(socket) => assert_eq!(connect(&socket), Some("MPTCP")),
        Err(error) => println!("SKIPPED: MPTCP: this kernel has none ({error})"),
    }

    let socket = tcp();
    socket.bind_device(Some(b"lo")).unwrap();
    assert_eq!(connect(&socket), Some("SO_BINDTODEVICE"));
    let socket = tcp();
    setsockopt(&socket, sockopt::TcpFastOpenConnect, &true).unwrap();
    assert_eq!(connect(&socket), Some("TCP_FASTOPEN_CONNECT"));
    let socket = tcp();
    setsockopt(&socket, sockopt::TcpRepair, &1).unwrap();
    assert_eq!(connect(&socket), Some("TCP_REPAIR"));
    let socket = tcp();
    // One instruction: take everything.
    socket.attach_filter(&[SockFilter::new(0x06, 0, 0, u32::MAX)]).unwrap();
    assert_eq!(connect(&socket), Some("SO_ATTACH_FILTER"));

    let ends = bed.connect(FAMILIES[0], false);
    assert_eq!(connect(&ends.client), Some("not unconnected"));
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    assert_eq!(connect(&listener), Some("not unconnected"));
    assert_eq!(unsuited(&listener, Purpose::Accept), None);
    assert_eq!(unsuited(tcp(), Purpose::Accept), Some("not listening"));
}

/// What is compared between a socket that was accepted and one that was made to look like it.
fn seen(socket: &Socket) -> Vec<(&'static str, String)> {
    let metadata = nix::sys::stat::fstat(socket).unwrap();
    let mut seen = vec![
        ("owner", format!("{}:{}", metadata.st_uid, metadata.st_gid)),
        ("keepalive", format!("{:?}", socket.keepalive().unwrap())),
        ("keepalive time", format!("{:?}", socket.tcp_keepalive_time().unwrap())),
        ("keepalive interval", format!("{:?}", socket.tcp_keepalive_interval().unwrap())),
        ("keepalive retries", format!("{:?}", socket.tcp_keepalive_retries().unwrap())),
        ("linger", format!("{:?}", socket.linger().unwrap())),
        ("nodelay", format!("{:?}", socket.tcp_nodelay().unwrap())),
        ("cork", format!("{:?}", socket.tcp_cork().unwrap())),
        ("out of band", format!("{:?}", socket.out_of_band_inline().unwrap())),
        ("reuse port", format!("{:?}", socket.reuse_port().unwrap())),
        ("read timeout", format!("{:?}", socket.read_timeout().unwrap())),
        ("write timeout", format!("{:?}", socket.write_timeout().unwrap())),
        ("mark", format!("{:?}", socket.mark().unwrap())),
        ("send buffer", format!("{:?}", socket.send_buffer_size().unwrap())),
        ("receive buffer", format!("{:?}", socket.recv_buffer_size().unwrap())),
        ("user timeout", format!("{:?}", socket.tcp_user_timeout().unwrap())),
        ("unsent at most", format!("{:?}", socket.tcp_notsent_lowat().unwrap())),
        ("congestion", format!("{:?}", socket.tcp_congestion().unwrap())),
        ("priority", format!("{:?}", nix::sys::socket::getsockopt(socket, sockopt::Priority).unwrap())),
    ];
    if socket.domain().unwrap() == Domain::IPV4 {
        seen.push(("TOS", format!("{:?}", socket.tos_v4().unwrap())));
        seen.push(("TTL", format!("{:?}", socket.ttl_v4().unwrap())));
    } else {
        seen.push(("class", format!("{:?}", socket.tclass_v6().unwrap())));
        seen.push(("hops", format!("{:?}", socket.unicast_hops_v6().unwrap())));
    }
    seen
}

#[test]
fn a_copy_of_a_listeners_options_makes_a_socket_as_if_it_had_accepted_it() {
    for (domain, address) in [(Domain::IPV4, "127.0.0.1:0"), (Domain::IPV6, "[::1]:0")] {
        let listen = |prepare: &dyn Fn(&Socket)| {
            let listener = Socket::new(domain, Type::STREAM, None).unwrap();
            prepare(&listener);
            listener.bind(&address.parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
            listener.listen(8).unwrap();
            listener
        };
        let accepted = |listener: &Socket| {
            let client = Socket::new(domain, Type::STREAM, None).unwrap();
            client.connect(&listener.local_addr().unwrap()).unwrap();
            (client, listener.accept().unwrap().0)
        };
        let applications = listen(&|socket| {
            let keepalive = TcpKeepalive::new()
                .with_time(Duration::from_secs(11))
                .with_interval(Duration::from_secs(12))
                .with_retries(5);
            socket.set_tcp_keepalive(&keepalive).unwrap();
            socket.set_linger(Some(Duration::from_secs(7))).unwrap();
            socket.set_out_of_band_inline(true).unwrap();
            socket.set_reuse_port(true).unwrap();
            socket.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
            socket.set_write_timeout(Some(Duration::from_secs(4))).unwrap();
            socket.set_mark(42).unwrap();
            socket.set_send_buffer_size(50_000).unwrap();
            socket.set_recv_buffer_size(60_000).unwrap();
            socket.set_tcp_user_timeout(Some(Duration::from_secs(9))).unwrap();
            socket.set_tcp_notsent_lowat(12_345).unwrap();
            socket.set_tcp_congestion(b"reno").unwrap();
            if domain == Domain::IPV4 {
                socket.set_tos_v4(0x28).unwrap();
                socket.set_ttl_v4(33).unwrap();
            } else {
                socket.set_tclass_v6(0x28).unwrap();
                socket.set_unicast_hops_v6(33).unwrap();
            }
            setsockopt(socket, sockopt::Priority, &3).unwrap();
        });
        // What the agent has set on its own sockets must not show either.
        let agents = listen(&|socket| {
            socket.set_linger(Some(Duration::ZERO)).unwrap();
            socket.set_tcp_nodelay(true).unwrap();
        });
        let ((_a, natural), (_b, made)) = (accepted(&applications), accepted(&agents));
        assert_ne!(seen(&natural), seen(&made));
        options::copy(&applications, &made).unwrap();
        assert_eq!(seen(&made), seen(&natural), "{domain:?}");

        let plain = listen(&|_| {});
        let ((_a, natural), (_b, made)) = (accepted(&plain), accepted(&agents));
        options::copy(&plain, &made).unwrap();
        let but_buffers = |socket| {
            let mut seen = seen(socket);
            // Those the kernel goes on choosing.
            seen.retain(|(name, _)| !name.contains("buffer"));
            seen
        };
        assert_eq!(but_buffers(&made), but_buffers(&natural), "{domain:?}: nothing set");
    }
    let (four, six) = (tcp(), Socket::new(Domain::IPV6, Type::STREAM, None).unwrap());
    assert_eq!(options::copy(&four, &six).unwrap_err().kind(), io::ErrorKind::InvalidInput);
}

#[test]
fn the_owner_of_a_listener_is_copied_so_that_its_port_can_be_shared_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    nix::unistd::fchown(&listener, Some(12345.into()), Some(12346.into())).unwrap();
    let socket = tcp();
    options::copy(&listener, &socket).unwrap();
    let owner = nix::sys::stat::fstat(&socket).unwrap();
    assert_eq!((owner.st_uid, owner.st_gid), (12345, 12346));
}

#[test]
fn a_disconnected_socket_connects_anew_and_keeps_its_options() {
    let (first, second) = (TcpListener::bind("127.0.0.1:0").unwrap(), TcpListener::bind("127.0.0.1:0").unwrap());
    let socket = tcp();
    socket.set_mark(7).unwrap();
    socket.connect(&first.local_addr().unwrap().into()).unwrap();
    let cookie = options::cookie(&socket).unwrap();
    disconnect(&socket).unwrap();
    assert_eq!(unsuited(&socket, Purpose::Connect), None);
    assert!(options::written(&socket, marline::sys::tcp_info::Opening::Active).is_err());
    let mut first = first.accept().unwrap().0;
    // As a reset, or as an end: its kernel says.
    assert!(matches!(first.read(&mut [0; 1]), Ok(0) | Err(_)));
    socket.connect(&second.local_addr().unwrap().into()).unwrap();
    let (mut second, from) = second.accept().unwrap();
    assert_eq!(Some(from), socket.local_addr().unwrap().as_socket());
    (&socket).write_all(b"hello").unwrap();
    second.read_exact(&mut [0; 5]).unwrap();
    assert_eq!((socket.mark().unwrap(), options::cookie(&socket).unwrap()), (7, cookie));
}

/// The point of no return on the way to records: before it the application's own connect can still be let through.
#[test]
fn with_kernel_tls_attached_there_is_no_way_back() {
    if !kernel_tls() {
        println!("SKIPPED: with_kernel_tls_attached_there_is_no_way_back: this kernel has no TLS");
        return;
    }
    let bed = Bed::new();
    let ends = bed.connect(FAMILIES[0], false);
    ktls::attach(&ends.client).unwrap();
    assert_eq!(disconnect(&ends.client).unwrap_err().raw_os_error(), Some(libc::EOPNOTSUPP));
    assert_eq!(unsuited(&ends.client, Purpose::Connect), Some("not unconnected"));
}

fn blocks(socket: impl AsFd) -> bool {
    !OFlag::from_bits_retain(fcntl(socket.as_fd(), FcntlArg::F_GETFL).unwrap()).contains(OFlag::O_NONBLOCK)
}

#[test]
fn connecting_and_accepting_never_wait_and_leave_the_mode_alone() {
    let bed = Bed::new();
    bed.netns
        .run(|| {
            for mode in [true, false] {
                let listener = tcp();
                listener.bind(&"127.0.0.1:0".parse::<std::net::SocketAddr>().unwrap().into()).unwrap();
                listener.listen(0).unwrap();
                let to = listener.local_addr().unwrap().as_socket().unwrap();
                listener.set_nonblocking(!mode).unwrap();
                assert_eq!(accept_now(&listener).unwrap_err().kind(), io::ErrorKind::WouldBlock);
                assert_eq!(blocks(&listener), mode);

                // With its queue full the listener answers no more.
                let mut waiting: Vec<Socket> = Vec::new();
                let start = Instant::now();
                for _ in 0..4 {
                    let socket = tcp();
                    socket.set_nonblocking(!mode).unwrap();
                    connect_now(&socket, to).unwrap();
                    assert_eq!(blocks(&socket), mode);
                    waiting.push(socket);
                }
                assert!(
                    start.elapsed() < Duration::from_millis(900),
                    "a connect has waited for its SYN to be sent again"
                );
                assert!(waiting.iter().any(|socket| socket.peer_addr().is_err()), "the queue is not full");

                super::bed::until("the first connection", || waiting[0].peer_addr().is_ok());
                let (accepted, from) = accept_now(&listener).unwrap();
                assert_eq!(from, waiting[0].local_addr().unwrap().as_socket());
                assert!(blocks(&accepted), "as accept() makes it");
                assert_eq!(blocks(&listener), mode);
            }
            let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
            let socket = tcp();
            if connect_now(&socket, gone).is_ok() {
                super::bed::until("the refusal", || SockRef::from(&socket).take_error().unwrap().is_some());
            }
            assert!(TcpStream::connect(gone).is_err());
        })
        .unwrap();
}
