//! Direct sockets beyond their first use: connected elsewhere or again, given up, outliving the agent; and the two records that
//! go with the direct path: ports whose IPv4 clients are v4-mapped, and facts for the agent's successor.
use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener},
    os::fd::AsFd,
};

use marline::{
    bpf::BpfError,
    sys::options,
    tls::ktls::{self, KtlsError},
};
use marline_common::MAX_DIRECT_FACTS;
use socket2::{Domain, Socket, Type};

use super::{
    ECONNREFUSED,
    bed::{Bed, Event},
    direct::{Line, line, received_before_reset, until},
    framing::records,
    from_node,
};

const NODE: &str = "10.77.1.1:7300";
const SHOWN: &str = "10.96.0.10:80";

fn errno(result: std::io::Result<()>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

#[test]
fn a_socket_in_handshake_connects_nowhere_else() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let mut own = bed.a.helper();
    own.ask("listen at=[::]:7301 as=service");
    let to: SocketAddr = NODE.parse().unwrap();
    let _listener = bed.node.run(|| TcpListener::bind(to).unwrap()).unwrap();
    // Another port, another pod, and what would stay in the pod.
    for elsewhere in ["10.77.1.1:7302", "10.77.2.2:7300", "127.0.0.1:7301", "10.77.1.2:7301", "0.0.0.0:7301"] {
        let socket = bed.a.socket(to);
        let gate = agent.capture.direct(socket.as_fd(), to, to).unwrap();
        let before = agent.counter("direct_refused");
        let elsewhere: SocketAddr = elsewhere.parse().unwrap();
        assert_eq!(errno(socket.connect(&elsewhere.into())), ECONNREFUSED, "{elsewhere}");
        assert_eq!(agent.counter("direct_refused"), before + 1);
        assert!(gate.poisoned().unwrap());
        assert!(matches!(gate.release(), Err(BpfError::Poisoned)));
    }
    agent.no_more_events();
}

#[test]
fn a_socket_in_handshake_is_connected_once() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let Line { socket, gate, .. } = line(&bed, &agent, &bed.node, NODE, SHOWN);
    let to: SocketAddr = NODE.parse().unwrap();
    let _listener = bed.node.run(|| TcpListener::bind(to).unwrap()).unwrap();
    options::disconnect(&socket).unwrap();
    assert!(!gate.poisoned().unwrap());
    assert_eq!(errno(socket.connect(&to.into())), ECONNREFUSED);
    assert!(matches!(gate.release(), Err(BpfError::Poisoned)));
}

#[test]
fn a_socket_that_the_agent_gives_up_is_shut_until_it_is_connected_anew() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let Line { mut socket, mut gate, server } = line(&bed, &agent, &bed.node, NODE, SHOWN);
    gate.announce(b"hello").unwrap();
    drop(gate);
    // Not even what was announced, for nobody watches any more.
    socket.write_all(b"hello").unwrap();
    until("the drop", || agent.counter("direct_dropped") > 0);
    options::disconnect(&socket).unwrap();
    let mut server = server;
    assert_eq!(server.read(&mut [0; 8]).unwrap_err().raw_os_error(), Some(libc::ECONNRESET));

    // The way back to the proxied path: the kernel's own connect goes on.
    let service = bed.node.run(|| TcpListener::bind("10.77.1.1:7303").unwrap()).unwrap();
    let to = service.local_addr().unwrap();
    socket.connect(&to.into()).unwrap();
    assert!(matches!(agent.event(), Event::Outbound { destination: Some(destination), .. } if destination == to));
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(to));
    let (mut proxied, _) = service.accept().unwrap();
    proxied.set_read_timeout(Some(super::helper::PATIENCE)).unwrap();
    socket.write_all(b"ahoy").unwrap();
    let mut received = [0; 4];
    proxied.read_exact(&mut received).unwrap();
    assert_eq!(&received, b"ahoy");
}

#[test]
fn a_released_socket_that_is_connected_again_is_redirected() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let Line { socket, gate, .. } = line(&bed, &agent, &bed.node, NODE, SHOWN);
    gate.release().unwrap();
    options::disconnect(&socket).unwrap();
    let to: SocketAddr = NODE.parse().unwrap();
    let _listener = bed.node.run(|| TcpListener::bind(to).unwrap()).unwrap();
    socket.connect(&to.into()).unwrap();
    assert!(matches!(agent.event(), Event::Outbound { destination: Some(destination), .. } if destination == to));
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(to), "not what was shown before");
    // And it can be made direct once more.
    options::disconnect(&socket).unwrap();
    let again = agent.capture.direct(socket.as_fd(), to, SHOWN.parse().unwrap()).unwrap();
    socket.connect(&to.into()).unwrap();
    assert_eq!(socket.peer_addr().unwrap().as_socket(), Some(SHOWN.parse().unwrap()));
    again.release().unwrap();
    agent.no_more_events();
}

#[test]
fn released_sockets_outlive_the_agent_and_gated_ones_stay_shut() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let mut released = line(&bed, &agent, &bed.node, NODE, SHOWN);
    let gated = line(&bed, &agent, &bed.node, "10.77.1.1:7304", SHOWN);
    let Line { socket: mut shut, gate: mut unfinished, server: shuts_server } = gated;
    unfinished.announce(b"hello").unwrap();
    released.gate.release().unwrap();
    // A killed agent drops nothing.
    std::mem::forget(unfinished);
    agent.die();
    shut.write_all(b"secret").unwrap();
    assert!(errno(bed.a.socket(NODE.parse().unwrap()).connect(&NODE.parse::<SocketAddr>().unwrap().into())).is_some());
    for bytes in [records(100), records(20_000)] {
        released.socket.write_all(&bytes).unwrap();
        let mut received = vec![0; bytes.len()];
        released.server.read_exact(&mut received).unwrap();
        assert!(received == bytes);
    }
    // Nor does the gate.
    released.socket.write_all(b"secret").unwrap();
    assert_eq!(released.socket.peer_addr().unwrap().as_socket(), Some(SHOWN.parse().unwrap()));
    assert_eq!(received_before_reset(&released.socket, released.server), b"");
    assert_eq!(received_before_reset(&shut, shuts_server), b"");
}

#[test]
fn released_sockets_do_not_notice_that_an_agent_takes_over() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let Line { mut socket, gate, mut server } = line(&bed, &agent, &bed.node, NODE, SHOWN);
    gate.release().unwrap();
    agent.die();
    let successor = bed.agent();
    // The first ends within a record, which the successor's programs know of.
    let bytes = records(20_000);
    for part in [&bytes[..bytes.len() - 9000], &bytes[bytes.len() - 9000..]] {
        socket.write_all(part).unwrap();
        let mut received = vec![0; part.len()];
        server.read_exact(&mut received).unwrap();
        assert!(received == part);
        successor.open(&bed.a);
    }
    let dropped = ["direct_dropped", "direct_foreign", "direct_held_back", "egress_dropped"];
    assert_eq!(dropped.map(|counter| successor.counter(counter)), [0; 4]);
}

/// What a pod is given at accept was made by the agent and is not under the hooks: it must not become another connection.
#[test]
fn a_socket_with_kernel_tls_cannot_be_disconnected() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = std::net::TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (accepted, _) = listener.accept().unwrap();
    match ktls::attach(&accepted) {
        Err(KtlsError::NotThere(error)) => {
            println!("SKIPPED: a_socket_with_kernel_tls_cannot_be_disconnected: this kernel has no TLS ({error})");
            return;
        }
        attached => attached.unwrap(),
    }
    assert!(ktls::stays_connected(&accepted).unwrap());
    let to = listener.local_addr().unwrap();
    let accepted = Socket::from(accepted);
    assert!(accepted.connect(&to.into()).is_err());
    // Nor once the peer has cut it.
    Socket::from(client).set_linger(Some(std::time::Duration::ZERO)).unwrap();
    until("the reset", || accepted.take_error().unwrap().is_some() || accepted.peer_addr().is_err());
    assert!(ktls::stays_connected(&accepted).unwrap());
    assert!(accepted.connect(&to.into()).is_err());
    assert!(accepted.listen(1).is_err());
    assert!(
        !ktls::stays_connected(Socket::new(Domain::IPV4, Type::STREAM, None).unwrap()).unwrap(),
        "a plain one can be"
    );
}

#[test]
fn ipv4_clients_are_mapped_where_the_application_wants_it() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let mut server = bed.b.helper();
    server.ask("listen at=[::]:7310 as=service");
    server.ask("listen at=[::]:7311 as=other");
    let netns = bed.b.netns.cookie();
    let local_of = |to: &str, on: &str, server: &mut super::helper::Helper| {
        server.begin(&format!("accept on={on}"));
        from_node(&bed, to).unwrap();
        assert_eq!(server.finish().address("accepted").ip().to_canonical(), from(to), "{to}");
        let Event::Inbound { client, local } = agent.event() else { panic!("inbound") };
        assert_eq!(client.is_ipv6(), local.is_ipv6());
        local
    };
    let [v4, v6]: [SocketAddr; 2] = ["10.77.2.2:7310", "[fd77:2::2]:7310"].map(|local| local.parse().unwrap());
    let mapped = SocketAddr::new(Ipv4Addr::new(10, 77, 2, 2).to_ipv6_mapped().into(), 7310);

    assert_eq!(local_of("10.77.2.2:7310", "service", &mut server), v4);
    agent.capture.map_clients(netns, 7310, true).unwrap();
    assert_eq!(local_of("10.77.2.2:7310", "service", &mut server), mapped);
    assert_eq!(local_of("[fd77:2::2]:7310", "service", &mut server), v6);
    assert!(local_of("10.77.2.2:7311", "other", &mut server).is_ipv4(), "other ports are not meant");
    agent.capture.map_clients(netns, 7310, false).unwrap();
    assert_eq!(local_of("10.77.2.2:7310", "service", &mut server), v4);

    // A successor knows nothing of the application yet.
    agent.capture.map_clients(netns, 7310, true).unwrap();
    agent.die();
    let agent = bed.agent();
    agent.open(&bed.b);
    server.begin("accept on=service");
    from_node(&bed, "10.77.2.2:7310").unwrap();
    server.finish();
    assert!(matches!(agent.event(), Event::Inbound { local, .. } if local == v4));
}

/// The node's address towards pod b.
fn from(to: &str) -> std::net::IpAddr {
    if to.starts_with('[') {
        Ipv6Addr::new(0xfd77, 2, 0, 0, 0, 0, 0, 1).into()
    } else {
        Ipv4Addr::new(10, 77, 2, 1).into()
    }
}

#[test]
fn facts_of_direct_connections_pass_to_the_successor() {
    let bed = Bed::new();
    let agent = bed.agent();
    assert_eq!(agent.capture.direct_kept().unwrap(), []);
    let longest = vec![7; MAX_DIRECT_FACTS];
    agent.capture.keep_direct(1, b"one").unwrap();
    agent.capture.keep_direct(2, b"two").unwrap();
    agent.capture.keep_direct(2, &longest).unwrap();
    agent.capture.keep_direct(3, b"").unwrap();
    agent.capture.forget_direct(3).unwrap();
    agent.capture.forget_direct(4).unwrap();
    let longer = vec![7; MAX_DIRECT_FACTS + 1];
    assert!(matches!(agent.capture.keep_direct(5, &longer), Err(BpfError::TooLong { .. })));
    agent.die();
    let mut kept = bed.agent().capture.direct_kept().unwrap();
    kept.sort();
    assert_eq!(kept, [(1, b"one".to_vec()), (2, longest)]);
}
