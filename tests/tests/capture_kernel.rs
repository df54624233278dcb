//! Capture on the running kernel: what a pod's programs see, what the agent gets, and what is refused.
//!
//! Needs root, cgroup2 and `ip`; makes its own network namespaces. `bed` builds them, `helper` is the program in a pod.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#[path = "capture_kernel/bed.rs"]
mod bed;
#[path = "capture_kernel/closed.rs"]
mod closed;
#[path = "capture_kernel/direct.rs"]
mod direct;
#[path = "capture_kernel/framing.rs"]
mod framing;
#[path = "capture_kernel/helper.rs"]
mod helper;
#[path = "capture_kernel/used_again.rs"]
mod used_again;

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream},
    os::fd::AsFd,
    time::Duration,
};

use bed::{Agent, Bed, Event};
use marline::bpf::PodListeners;

const ECONNREFUSED: Option<i32> = Some(libc::ECONNREFUSED);

#[test]
fn helper() {
    helper::main();
}

/// Connects from pod a to a service in pod b, says something, and checks every name on both sides.
fn talks(connect: &str, destination: SocketAddr, source: IpAddr) {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let (mut client, mut server) = (bed.a.helper(), bed.b.helper());
    let port = destination.port();
    server.ask(&format!("listen at=[::]:{port} as=service"));
    server.begin("accept on=service as=session");

    let connected = client.ask(connect);
    assert_eq!(connected.errno(), None);
    assert_eq!(connected.address("peer"), destination);
    let canonical = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
    assert_eq!(canonical(connected.address("local")).ip(), source);

    let accepted = server.finish();
    assert_eq!(canonical(accepted.address("accepted")).ip(), source, "accept() shows the client");
    assert_eq!(accepted.address("peer"), accepted.address("accepted"), "getpeername() agrees with accept()");
    assert_eq!(canonical(accepted.address("local")), canonical(destination));

    client.ask("send on=it data=ahoy");
    assert_eq!(server.ask("receive on=session").word("data"), "ahoy");
    server.ask("send on=session data=aye");
    assert_eq!(client.ask("receive on=it").word("data"), "aye");
    client.ask("close on=it");
    assert_eq!(server.ask("receive on=session").word("bytes"), "0");

    let Event::Outbound { destination: origin, .. } = agent.event() else { panic!("outbound comes first") };
    assert_eq!(origin, Some(canonical(destination)));
    let Event::Inbound { client, local } = agent.event() else { panic!("then inbound") };
    assert_eq!((client.ip(), local), (source, canonical(destination)));
    assert_eq!(canonical(accepted.address("accepted")), client, "with its port");
    agent.no_more_events();
    assert_eq!(agent.counter("egress_dropped"), 0);
}

const A4: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 77, 1, 2));

#[test]
fn ipv4_connections_are_captured_at_both_ends_and_nobody_can_tell() {
    talks("connect to=10.77.2.2:7001", "10.77.2.2:7001".parse().unwrap(), A4);
}

#[test]
fn ipv6_connections_are_captured_at_both_ends_and_nobody_can_tell() {
    talks("connect to=[fd77:2::2]:7002", "[fd77:2::2]:7002".parse().unwrap(), "fd77:1::2".parse().unwrap());
}

#[test]
fn v4_mapped_connections_are_captured_at_both_ends_and_nobody_can_tell() {
    let mapped = "[::ffff:10.77.2.2]:7003";
    talks(&format!("connect to={mapped}"), mapped.parse().unwrap(), A4);
}

#[test]
fn non_blocking_connections_are_captured() {
    talks("connect to=10.77.2.2:7004 nonblock=1", "10.77.2.2:7004".parse().unwrap(), A4);
}

#[test]
fn sockets_bound_to_the_pods_address_are_captured() {
    talks("connect to=10.77.2.2:7005 bind=10.77.1.2:0", "10.77.2.2:7005".parse().unwrap(), A4);
}

#[test]
fn ipv6_sockets_bound_to_the_pods_address_are_captured() {
    let to = "[fd77:2::2]:7006";
    talks(&format!("connect to={to} bind=[fd77:1::2]:0"), to.parse().unwrap(), "fd77:1::2".parse().unwrap());
}

#[test]
fn v4_mapped_sockets_bound_to_the_pods_address_are_captured() {
    let to = "[::ffff:10.77.2.2]:7007";
    talks(&format!("connect to={to} bind=[::ffff:10.77.1.2]:0"), to.parse().unwrap(), A4);
}

#[test]
fn a_pod_reaches_its_own_services_without_the_agent() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let (mut client, mut server) = (bed.a.helper(), bed.a.helper());
    server.ask("listen at=[::]:7010 as=service");
    for to in ["127.0.0.1:7010", "[::1]:7010", "10.77.1.2:7010", "[fd77:1::2]:7010", "0.0.0.0:7010", "[::]:7010"] {
        server.begin("accept on=service");
        assert_eq!(client.ask(&format!("connect to={to}")).errno(), None, "{to}");
        assert_eq!(server.finish().errno(), None, "{to}");
    }
    agent.no_more_events();
    assert_eq!(agent.counter("egress_dropped"), 0);
}

#[test]
fn a_program_that_connects_to_the_agents_listener_itself_has_no_destination() {
    let bed = Bed::new();
    let (agent, listener) = bed.ready_agent();
    let mut client = bed.a.helper();
    client.ask(&format!("connect to={listener}"));
    let Event::Outbound { destination, .. } = agent.event() else { panic!("it is an outbound listener") };
    assert_eq!(destination, None);
    assert_eq!(agent.counter("outbound_refused_no_origin"), 1);
}

#[test]
fn a_stale_destination_cannot_be_replayed_from_the_same_port() {
    let bed = Bed::new();
    let agent = bed.agent();
    let [out4, ..] = idle_listeners(&bed, &agent);
    let listener = out4.local_addr().unwrap();
    let mut client = bed.a.helper();
    let redirected = client.ask("connect to=10.77.2.2:7020");
    assert_eq!(redirected.errno(), None);
    let (first, address) = out4.accept().unwrap();
    assert!(address.ip().is_loopback());
    // The entry is there and not taken; the agent closes first, so the port is free for the pod at once.
    drop(first);
    client.ask("close on=it");
    let port = address.port();
    let forged = client.ask(&format!("connect to={listener} bind=127.0.0.1:{port}"));
    assert_eq!(forged.errno(), None);
    let (_second, again) = out4.accept().unwrap();
    assert_eq!(again, address, "the forged connection has the same endpoints");
    assert_eq!(agent.capture.original_destination(bed.a.netns.cookie(), again).unwrap(), None);
}

#[test]
fn a_socket_that_is_used_again_forgets_where_it_went_before() {
    let bed = Bed::new();
    let agent = bed.agent();
    let [out4, ..] = idle_listeners(&bed, &agent);
    let service = bed.a.netns.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let to = service.local_addr().unwrap();
    let mut client = bed.a.helper();
    client.ask("open to=10.77.2.2:7030 as=again");
    // Redirected, and refused on the way: the socket may be connected anew.
    drop(out4);
    assert_eq!(client.ask("connect-on on=again to=10.77.2.2:7030").errno(), ECONNREFUSED);
    let second = client.ask(&format!("connect-on on=again to={to}"));
    assert_eq!(second.errno(), None);
    assert_eq!(second.address("peer"), to);
    assert!(second.address("local").ip().is_loopback());
    let (_stream, source) = service.accept().unwrap();
    assert_eq!(agent.capture.original_destination(bed.a.netns.cookie(), source).unwrap(), None);
}

#[test]
fn a_client_on_record_outlives_the_entry_of_the_ports_last_owner() {
    let bed = Bed::new();
    let agent = bed.agent();
    let _listeners = idle_listeners(&bed, &agent);
    let mut server = bed.a.helper();
    server.ask("listen at=10.77.1.2:7035 as=service");
    server.begin("accept on=service");
    let leg = || socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    let leg = bed.a.netns.run(leg).unwrap();
    leg.bind(&"10.77.1.2:0".parse::<SocketAddr>().unwrap().into()).unwrap();
    let source = leg.local_addr().unwrap().as_socket().unwrap();
    let [former, latter]: [SocketAddr; 2] = ["10.77.2.2:1", "10.77.2.2:2"].map(|client| client.parse().unwrap());
    let entry = agent.capture.announce_client(bed.a.netns.cookie(), source, former).unwrap();
    let _current = agent.capture.announce_client(bed.a.netns.cookie(), source, latter).unwrap();
    drop(entry);
    leg.connect(&"10.77.1.2:7035".parse::<SocketAddr>().unwrap().into()).unwrap();
    assert_eq!(server.finish().address("accepted"), latter);
}

#[test]
fn a_destination_that_just_refused_refuses_from_connect_itself() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let mut client = bed.a.helper();
    // The first try learns it by a reset, which may overtake the end of connect().
    let first = client.ask("connect to=10.77.1.1:7040").errno();
    let first = first.or_else(|| client.ask("receive on=it").errno());
    assert_eq!(first, Some(libc::ECONNRESET));
    for to in ["10.77.1.1:7040", "[::ffff:10.77.1.1]:7040"] {
        assert_eq!(client.ask(&format!("connect to={to}")).errno(), ECONNREFUSED);
    }
    assert_eq!(agent.counter("outbound_refused_recently"), 2);
    assert_ne!(client.ask("connect to=10.77.1.1:7041").errno(), ECONNREFUSED, "other ports are not meant");
    std::thread::sleep(Duration::from_millis(1100));
    assert_ne!(client.ask("connect to=10.77.1.1:7040").errno(), ECONNREFUSED, "a second later it is tried again");
}

#[test]
fn udp_passes_and_is_counted() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let (mut client, mut server) = (bed.a.helper(), bed.b.helper());
    server.ask("udp-echo at=0.0.0.0:7050");
    assert_eq!(client.ask("udp to=10.77.2.2:7050").word("data"), "ping");
    assert!(agent.counter("udp_passed") >= 2);
    agent.no_more_events();
}

/// Opens pod a, but nobody takes connections, nor their entries, from its listeners: outbound 4, 6, inbound 4, 6.
fn idle_listeners(bed: &Bed, agent: &Agent) -> [TcpListener; 4] {
    let listeners = ["127.0.0.1:0", "[::1]:0", "127.0.0.1:0", "[::1]:0"]
        .map(|at| bed.a.netns.run(|| TcpListener::bind(at).unwrap()).unwrap());
    let [out4, out6, in4, in6] = &listeners;
    let pod = PodListeners {
        netns: &bed.a.netns,
        outbound4: Some(out4.local_addr().unwrap().port()),
        outbound6: Some(out6.local_addr().unwrap().port()),
        inbound4: Some(in4.as_fd()),
        inbound6: Some(in6.as_fd()),
        inbound4_mapped: None,
        addresses: &bed.a.addresses(),
    };
    agent.capture.enrol(&pod).unwrap().ready().unwrap();
    listeners
}

/// Connects from the node, outside every pod; gives the errno of a refusal.
fn from_node(bed: &Bed, to: &str) -> Result<(), i32> {
    let to: SocketAddr = to.parse().unwrap();
    let connected = bed.node.run(|| TcpStream::connect_timeout(&to, Duration::from_secs(8))).unwrap();
    connected.map(drop).map_err(|error| error.raw_os_error().unwrap_or(libc::ETIMEDOUT))
}
