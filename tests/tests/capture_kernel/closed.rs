//! Whatever cannot be handed to the agent is refused: pods that are not ready, agents that are gone, ways around them.
use std::{
    net::TcpListener,
    os::fd::AsFd,
    sync::atomic::{AtomicBool, Ordering},
};

use marline::bpf::{BpfError, PodListeners};

use super::{
    A4, ECONNREFUSED,
    bed::{Bed, Event, ip},
    from_node,
};

#[test]
fn a_pod_that_is_not_ready_is_refused_in_both_directions() {
    let bed = Bed::new();
    let agent = bed.agent();
    let _served = agent.serve(&bed.a, &bed.a.addresses());
    let mut pod = bed.a.helper();
    pod.ask("listen at=[::]:7060 as=service");
    for to in ["10.77.2.2:1", "[fd77:2::2]:1", "[::ffff:10.77.2.2]:1"] {
        assert_eq!(pod.ask(&format!("connect to={to}")).errno(), ECONNREFUSED, "{to}");
    }
    assert_eq!(agent.counter("outbound_refused_not_ready"), 3);
    for to in ["10.77.1.2:7060", "[fd77:1::2]:7060"] {
        assert_eq!(from_node(&bed, to), Err(libc::ECONNREFUSED), "{to}");
    }
    assert_eq!(agent.counter("inbound_refused_not_ready"), 2);
    agent.no_more_events();
}

#[test]
fn a_pod_the_agent_cannot_speak_for_is_refused_in_both_directions() {
    let bed = Bed::new();
    let agent = bed.agent();
    agent.capture.refuse(&bed.a.netns).unwrap();
    let mut pod = bed.a.helper();
    pod.ask("listen at=[::]:7070 as=service");
    assert_eq!(pod.ask("connect to=10.77.2.2:1").errno(), ECONNREFUSED);
    assert_eq!(from_node(&bed, "10.77.1.2:7070"), Err(libc::ECONNREFUSED));
}

#[test]
fn an_unknown_address_of_an_enrolled_pod_is_refused() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let mut pod = bed.a.helper();
    pod.ask("listen at=0.0.0.0:7080 as=service");
    let name = bed.a.netns.path().file_name().unwrap().to_str().unwrap().to_owned();
    ip(&format!("-n {name} addr add 10.77.1.9/24 dev eth0"));
    assert_eq!(from_node(&bed, "10.77.1.9:7080"), Err(libc::ECONNREFUSED));
    assert_eq!(agent.counter("inbound_refused_address"), 1);
    agent.no_more_events();
}

#[test]
fn a_pod_outside_the_mesh_is_left_alone() {
    let bed = Bed::new();
    let agent = bed.agent();
    let (mut client, mut server) = (bed.a.helper(), bed.b.helper());
    server.ask("listen at=10.77.2.2:7090 as=service");
    server.begin("accept on=service");
    assert_eq!(client.ask("connect to=10.77.2.2:7090").errno(), None);
    let accepted = server.finish();
    assert_eq!(accepted.address("accepted").ip(), A4);
    agent.no_more_events();
}

#[test]
fn a_withdrawn_pod_is_left_alone_again() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    for pod in [&bed.a, &bed.b] {
        agent.capture.withdraw(pod.netns.cookie()).unwrap();
    }
    assert_eq!(agent.capture.pods().unwrap(), []);
    let (mut client, mut server) = (bed.a.helper(), bed.b.helper());
    server.ask("listen at=10.77.2.2:7091 as=service");
    server.begin("accept on=service");
    assert_eq!(client.ask("connect to=10.77.2.2:7091").errno(), None);
    assert_eq!(server.finish().address("accepted").ip(), A4);
    agent.no_more_events();
}

#[test]
fn a_dead_agent_leaves_its_pods_refused_and_its_successor_opens_them() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let (mut client, mut server) = (bed.a.helper(), bed.b.helper());
    server.ask("listen at=[::]:7100 as=service");
    agent.die();
    for to in ["10.77.2.2:7100", "[fd77:2::2]:7100", "[::ffff:10.77.2.2]:7100"] {
        assert_eq!(client.ask(&format!("connect to={to}")).errno(), ECONNREFUSED, "{to}");
    }
    for to in ["10.77.2.2:7100", "[fd77:2::2]:7100"] {
        assert_eq!(from_node(&bed, to), Err(libc::ECONNREFUSED), "{to}");
    }

    let agent = bed.agent();
    let mut adopted = agent.capture.pods().unwrap();
    adopted.sort();
    let mut both = [bed.a.netns.cookie(), bed.b.netns.cookie()];
    both.sort();
    assert_eq!(adopted, both, "the successor knows whom it has to serve");
    assert_eq!(client.ask("connect to=10.77.2.2:7100").errno(), ECONNREFUSED, "but nobody is served yet");
    agent.open(&bed.a);
    agent.open(&bed.b);
    server.begin("accept on=service as=session");
    assert_eq!(client.ask("connect to=10.77.2.2:7100").errno(), None);
    assert_eq!(server.finish().errno(), None);
    client.ask("send on=it data=ahoy");
    assert_eq!(server.ask("receive on=session").word("data"), "ahoy");
}

#[test]
fn nothing_gets_through_while_one_agent_takes_over_from_another() {
    let bed = Bed::new();
    let mut agent = bed.ready_agent().0;
    let (mut client, mut server) = (bed.a.helper(), bed.b.helper());
    server.ask("listen at=[::]:7105 as=service");
    // A service outside the mesh: whoever reaches it without an agent got out.
    let outside = bed.node.run(|| TcpListener::bind("0.0.0.0:7106").unwrap()).unwrap();
    outside.set_nonblocking(true).unwrap();
    for _ in 0..3 {
        agent.die();
        // A successor starts, and is asked to die in turn.
        let stop = AtomicBool::new(false);
        agent = std::thread::scope(|scope| {
            let inbound = scope.spawn(|| {
                let tries = std::iter::repeat_with(|| from_node(&bed, "10.77.2.2:7105"));
                tries.take_while(|_| !stop.load(Ordering::Relaxed)).filter(Result::is_ok).count()
            });
            client.begin("hammer to=10.77.1.1:7106 millis=1500");
            let agent = bed.agent();
            let hammered = client.finish();
            stop.store(true, Ordering::Relaxed);
            assert_eq!(inbound.join().unwrap(), 0, "inbound");
            assert_eq!(hammered.word("connected"), "0");
            assert_ne!(hammered.word("tried"), "0");
            agent
        });
    }
    assert_eq!(outside.accept().unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
}

#[test]
fn a_pod_on_hold_is_closed_and_opens_again() {
    let bed = Bed::new();
    let agent = bed.agent();
    let served = agent.serve(&bed.a, &bed.a.addresses());
    let mut client = bed.a.helper();
    // Nothing listens there: the agent takes the connection and resets it, which on a slow machine connect() itself may hear.
    let taken = |errno: Option<i32>| matches!(errno, None | Some(libc::ECONNRESET));
    served.enrolment.ready().unwrap();
    assert!(taken(client.ask("connect to=10.77.2.2:7107").errno()));
    served.enrolment.hold().unwrap();
    assert_eq!(client.ask("connect to=10.77.2.2:7108").errno(), ECONNREFUSED);
    served.enrolment.ready().unwrap();
    assert!(taken(client.ask("connect to=10.77.2.2:7109").errno()));
}

#[test]
fn a_map_of_another_shape_is_not_taken_over() {
    let bed = Bed::new();
    bed.agent().die();
    let pin = bed.settings.pin_path.join("maps/PODS");
    std::fs::rename(bed.settings.pin_path.join("maps/PROBES"), &pin).unwrap();
    assert!(matches!(bed.try_agent().err(), Some(BpfError::Layout { path, .. }) if path == pin));
}

#[test]
fn two_agents_cannot_share_pins() {
    let bed = Bed::new();
    let _agent = bed.agent();
    assert!(matches!(bed.try_agent().err(), Some(BpfError::PinsInUse { .. })));
}

#[test]
fn two_agents_on_one_host_do_not_disturb_each_other() {
    let one = Bed::new();
    let other = one.another();
    let (agent, _) = one.ready_agent();
    let (neighbour, _) = other.ready_agent();
    let mut client = one.a.helper();
    let mut neighbours = other.a.helper();
    client.ask("connect to=10.77.2.2:7110");
    assert!(matches!(agent.event(), Event::Outbound { .. }));
    neighbour.no_more_events();
    agent.die();
    assert_eq!(client.ask("connect to=10.77.2.2:7111").errno(), ECONNREFUSED);
    // Taken, and reset because nothing listens there: a slow machine's connect() itself may hear of it.
    assert!(matches!(neighbours.ask("connect to=10.77.2.2:7111").errno(), None | Some(libc::ECONNRESET)));
    assert!(matches!(neighbour.event(), Event::Outbound { .. }));
}

#[test]
fn sockets_bound_to_a_device_are_refused() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let mut client = bed.a.helper();
    assert_eq!(client.ask("connect to=10.77.2.2:7120 device=eth0").errno(), ECONNREFUSED);
    assert_eq!(agent.counter("outbound_refused_device"), 1);
}

#[test]
fn link_local_destinations_are_refused() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let mut client = bed.a.helper();
    assert_eq!(client.ask("connect to=[fe80::1%2]:7130").errno(), ECONNREFUSED);
    assert_eq!(agent.counter("outbound_refused_link_local"), 1);
}

#[test]
fn mptcp_is_refused_so_that_programs_fall_back() {
    let bed = Bed::new();
    let mut client = bed.a.helper();
    let before = client.ask("open to=10.77.2.2:7140 mptcp=1 as=early");
    if before.errno().is_some() {
        eprintln!("skipped: this kernel has no MPTCP ({before:?})");
        return;
    }
    let (agent, _) = bed.ready_agent();
    let refused = client.ask("open to=10.77.2.2:7140 mptcp=1");
    assert_eq!(refused.errno(), Some(libc::EPROTONOSUPPORT));
    assert_eq!(agent.counter("mptcp_refused"), 1);
    // A socket from before the enrolment: whatever it does, it must not get past the agent.
    let mut server = bed.b.helper();
    server.ask("listen at=10.77.2.2:7140 as=service");
    client.ask("connect-on on=early to=10.77.2.2:7140");
    assert!(matches!(agent.event(), Event::Outbound { destination: Some(to), .. } if to.port() == 7140));
}

#[test]
fn connections_from_before_enrolment_are_cut() {
    let bed = Bed::new();
    let (mut client, mut server) = (bed.a.helper(), bed.b.helper());
    server.ask("listen at=10.77.2.2:7150 as=service");
    server.begin("accept on=service as=session");
    assert_eq!(client.ask("connect to=10.77.2.2:7150").errno(), None);
    server.finish();
    client.ask("send on=it data=before");
    assert_eq!(server.ask("receive on=session").word("data"), "before");

    let agent = bed.agent();
    agent.open(&bed.a);
    client.ask("send on=it data=after");
    assert_eq!(server.ask("receive on=session").errno(), Some(libc::EAGAIN), "nothing more arrives");
    assert!(agent.counter("egress_dropped") >= 1);
}

#[test]
fn two_pods_cannot_have_one_address() {
    let bed = Bed::new();
    let (agent, _) = bed.ready_agent();
    let listeners = bed.b.netns.run(|| TcpListener::bind("127.0.0.1:0").unwrap()).unwrap();
    let stolen = agent.capture.enrol(&PodListeners {
        netns: &bed.b.netns,
        outbound4: None,
        outbound6: None,
        inbound4: Some(listeners.as_fd()),
        inbound6: None,
        inbound4_mapped: None,
        addresses: &[A4],
    });
    assert!(matches!(stolen, Err(BpfError::AddressTaken { .. })), "{stolen:?}");
}

#[test]
fn the_self_test_fails_where_the_hooks_are_not_effective() {
    let bed = Bed::new();
    let agent = bed.agent();
    let served = agent.serve(&bed.a, &bed.a.addresses());
    // Someone takes the hook away: the pod's connects go wherever they like.
    let pin = bed.settings.pin_path.join("links/connect4");
    std::fs::remove_file(pin).unwrap();
    let error = agent.prove(&bed.a).unwrap_err();
    assert!(error.to_string().contains("outbound capture is not effective"), "{error}");
    drop(served);
}
