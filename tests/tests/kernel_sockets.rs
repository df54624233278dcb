//! What the agent believes of sockets that it does not hold or that are an application's, held against the kernel: counts at their
//! end, finding and ending them, options. Kernel TLS is part of it where there is some.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

#[path = "kernel_sockets/bed.rs"]
mod bed;
#[path = "kernel_sockets/counts.rs"]
mod counts;
#[path = "kernel_sockets/options.rs"]
mod options;

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    os::fd::AsRawFd,
    time::Duration,
};

use bed::{Bed, FAMILIES, runtime, within};
use marline::sys::{
    diag::{Destruction, Diag, Event, SocketId},
    options::cookie,
    tcp_info::TcpState,
};
use nix::sys::socket::{AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, sendto, socket};
use socket2::SockRef;

#[test]
fn a_connection_is_found_by_its_addresses_and_a_listener_is_not_taken_for_it() {
    let bed = Bed::new();
    let diag = Diag::open(&bed.netns).unwrap();
    for family in FAMILIES {
        let mut ends = bed.connect(family, false);
        ends.up(1000);
        for (what, end) in [("client", &ends.client), ("server", &ends.server)] {
            let (local, remote) = (end.local_addr().unwrap(), end.peer_addr().unwrap());
            let found = diag.find(local, remote).unwrap().unwrap_or_else(|| panic!("{family:?}: the {what}"));
            assert_eq!(found.id.cookie, cookie(end).unwrap(), "{family:?}: {what}");
            assert_eq!(found.state, TcpState::ESTABLISHED, "{family:?}: {what}");
            assert_eq!(found.inode, bed::inode(end), "{family:?}: {what}");
            assert!(found.counts.is_some(), "{family:?}: {what}");
            // A v4-mapped connection is found by its IPv4 addresses too.
            let plain = |address: SocketAddr| SocketAddr::new(address.ip().to_canonical(), address.port());
            assert_eq!(diag.find(plain(local), plain(remote)).unwrap().map(|found| found.id), Some(found.id));
            assert!(diag.all().unwrap().iter().any(|socket| socket.id == found.id), "{family:?}: {what} in a dump");
        }
        let server = ends.server.local_addr().unwrap();
        let nobody = SocketAddr::new(server.ip(), 9);
        assert_eq!(diag.find(server, nobody).unwrap(), None, "{family:?}: only the listener would match");
    }
}

#[test]
fn ending_a_connection_resets_both_ends_and_never_hits_a_successor() {
    let bed = Bed::new();
    let diag = Diag::open(&bed.netns).unwrap();
    for family in FAMILIES {
        let mut ends = bed.connect(family, false);
        ends.up(10);
        let found = diag.find(ends.server.local_addr().unwrap(), ends.server.peer_addr().unwrap()).unwrap().unwrap();
        let stale = SocketId { cookie: found.id.cookie + 1_000_000, ..found.id };
        assert!(!diag.destroy(&stale).unwrap(), "{family:?}: the same addresses, another socket");
        ends.up(10);
        assert!(diag.destroy(&found.id).unwrap(), "{family:?}");
        let error = |end: &mut TcpStream| end.read(&mut [0; 1]).map_err(|error| error.raw_os_error());
        assert_eq!(error(&mut ends.server), Err(Some(libc::ECONNABORTED)), "{family:?}");
        assert_eq!(error(&mut ends.client), Err(Some(libc::ECONNRESET)), "{family:?}");
        assert!(!diag.destroy(&found.id).unwrap(), "{family:?}: it is gone");
    }
}

#[test]
fn a_socket_in_time_wait_was_told_of_already() {
    let bed = Bed::new();
    let diag = Diag::open(&bed.netns).unwrap();
    runtime().block_on(async {
        let mut ended = Destruction::open(&bed.netns).unwrap();
        let ends = bed.connect(FAMILIES[0], false);
        let (local, remote) = (ends.client.local_addr().unwrap(), ends.client.peer_addr().unwrap());
        let before = cookie(&ends.client).unwrap();
        drop(ends.client);
        let mut server = ends.server;
        server.read_to_end(&mut Vec::new()).unwrap();
        drop(server);
        // TIME_WAIT takes a minute, the notification does not.
        bed::destroyed(&mut ended, before).await;
        let left = diag.find(local, remote).unwrap().expect("TIME_WAIT");
        assert_eq!((left.state, left.counts, left.inode), (TcpState::TIME_WAIT, None, 0));
        // Whether that ends it early is the kernel's to say.
        diag.destroy(&SocketId { cookie: before, ..left.id }).unwrap();
        assert!(diag.all().unwrap().iter().all(|socket| socket.id.local != local));
    });
}

#[test]
fn other_namespaces_are_not_told_of() {
    let (here, there) = (Bed::new(), Bed::new());
    runtime().block_on(async {
        let mut ended = Destruction::open(&here.netns).unwrap();
        let theirs = there.connect(FAMILIES[0], false);
        let cookies = [cookie(&theirs.client).unwrap(), cookie(&theirs.server).unwrap()];
        drop(theirs);
        let ours = here.connect(FAMILIES[0], false);
        let last = cookie(&ours.client).unwrap();
        drop(ours);
        let before = bed::until_destroyed(&mut ended, last).await;
        assert!(before.iter().all(|socket| !cookies.contains(&socket.id.cookie)), "{before:?}");
    });
}

#[test]
fn nobody_but_the_kernel_is_believed() {
    let bed = Bed::new();
    runtime().block_on(async {
        let mut ended = Destruction::open(&bed.netns).unwrap();
        let port = listeners_to_destruction(&bed).pop().expect("the agent's socket").port;
        // A whole message as the kernel writes it, from a process that rules the namespace.
        let mut forged = [0; 16 + 72];
        forged[0] = 16 + 72;
        forged[4] = 20;
        forged[16] = libc::AF_INET as u8;
        let liar = bed
            .netns
            .run(|| {
                socket(AddressFamily::Netlink, SockType::Datagram, SockFlag::empty(), SockProtocol::NetlinkSockDiag)
            })
            .unwrap()
            .unwrap();
        bind(liar.as_raw_fd(), &NetlinkAddr::new(0, 0)).unwrap();
        sendto(liar.as_raw_fd(), &forged, &NetlinkAddr::new(port, 0), MsgFlags::empty()).unwrap();
        let ends = bed.connect(FAMILIES[0], false);
        let last = cookie(&ends.client).unwrap();
        drop(ends);
        let before = bed::until_destroyed(&mut ended, last).await;
        assert!(before.iter().all(|socket| socket.id.cookie != 0), "{before:?}");
    });
}

/// One socket that listens to destruction.
struct Listener {
    port: u32,
    drops: u64,
}

fn listeners_to_destruction(bed: &Bed) -> Vec<Listener> {
    let table = bed.netns.run(|| std::fs::read_to_string("/proc/thread-self/net/netlink")).unwrap().unwrap();
    let rows = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    // The columns are sk, Eth (the protocol), Pid (the port), Groups, Rmem, Wmem, Dump, Locks, Drops, Inode.
    rows.filter(|row| row.get(1) == Some(&"4") && row.get(3) == Some(&"00000005"))
        .filter_map(|row| Some(Listener { port: row.get(2)?.parse().ok()?, drops: row.get(8)?.parse().ok()? }))
        .collect()
}

#[test]
fn more_than_was_taken_in_time_is_told_as_a_loss_and_then_it_goes_on() {
    let bed = Bed::new();
    runtime().block_on(async {
        let mut ended = Destruction::open(&bed.netns).unwrap();
        let listener = bed.netns.run(|| TcpListener::bind("127.0.0.1:0")).unwrap().unwrap();
        let to = listener.local_addr().unwrap();
        let churn = || {
            for _ in 0..500 {
                let client = TcpStream::connect(to).unwrap();
                let (server, _) = listener.accept().unwrap();
                // No TIME_WAIT, of which there may be few.
                SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
                drop((client, server));
            }
        };
        bed::until("the queue to run over", || {
            bed.netns.run(churn).unwrap();
            listeners_to_destruction(&bed).iter().any(|listener| listener.drops > 0)
        });
        while within(ended.next()).await.unwrap() != Event::Lost {}
        let ends = bed.connect(FAMILIES[0], false);
        let last = cookie(&ends.client).unwrap();
        drop(ends);
        bed::destroyed(&mut ended, last).await;
    });
}

#[test]
fn what_is_held_elsewhere_is_told_of_when_the_last_holder_lets_go() {
    let bed = Bed::new();
    runtime().block_on(async {
        let mut ended = Destruction::open(&bed.netns).unwrap();
        let mut ends = bed.connect(FAMILIES[0], false);
        let duplicate = ends.client.try_clone().unwrap();
        let of_client = cookie(&ends.client).unwrap();
        drop(ends.client);
        ends.server.write_all(b"still there").unwrap();
        (&duplicate).read_exact(&mut [0; 11]).unwrap();
        let of_server = cookie(&ends.server).unwrap();
        drop(ends.server);
        (&duplicate).read_to_end(&mut Vec::new()).unwrap();
        duplicate.shutdown(Shutdown::Write).unwrap();
        // The server's is first: the client's connection is over too, but it is held.
        let before = bed::until_destroyed(&mut ended, of_server).await;
        assert!(before.iter().all(|socket| socket.id.cookie != of_client), "{before:?}");
        drop(duplicate);
        bed::destroyed(&mut ended, of_client).await;
    });
}
