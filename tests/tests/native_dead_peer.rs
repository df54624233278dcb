//! A node that dies in the middle of a transfer is noticed in bounded time; a reader that merely takes its time is not taken for
//! dead, however long it pauses.

use std::time::Duration;

use anyhow::{Result, ensure};
use marline_tests::{
    cluster::{ClusterSpec, Family, Side},
    config::Mode,
    process::{Process, succeed},
    scenario::on_mesh,
};

const DEAD_PEER: Duration = Duration::from_secs(2);

fn spec() -> ClusterSpec {
    let mut spec = ClusterSpec::pairs(Mode::Strict);
    spec.extra = vec!["  timeouts:".into(), format!("    deadPeer: {}s", DEAD_PEER.as_secs())];
    spec
}

/// Accepts once and reads nothing until told by a file; then everything, and prints how much.
fn sink(bind: &str) -> String {
    format!(
        "import socket,sys,time,os
l=socket.socket(); l.setsockopt(1,2,1); l.bind(('{bind}',9000)); l.listen()
c,_=l.accept()
while not os.path.exists(sys.argv[1]): time.sleep(0.05)
n=0
while True:
    b=c.recv(1<<20)
    if not b: break
    n+=len(b)
print(n,flush=True)
"
    )
}

#[test]
fn a_node_that_dies_in_a_transfer_is_noticed_and_the_application_is_reset() -> Result<()> {
    on_mesh(&spec(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let go = server.directory.join("go");
        let address = server.address(Family::V4).to_string();
        let _sink = server.serve("sink", server.command("python3").args(["-c", &sink(&address)]).arg(&go), 9000)?;
        let script = format!(
            "import socket
s=socket.create_connection(('{address}',9000)); print('connected',flush=True)
try:
    while True: s.sendall(b'x'*65536)
except ConnectionResetError: print('reset',flush=True)
"
        );
        let log = client.directory.join("writer.log");
        let mut writer = Process::start("writer", client.command("python3").args(["-c", &script]), &log)?;
        marline_tests::wait::wait_for("the writer's connection", Duration::from_secs(20), || {
            use marline_tests::wait::Look;
            let connected = writer.log().contains("connected");
            Ok(if connected { Look::Done(()) } else { Look::NotYet(String::new()) })
        })?;
        // Let bytes flow, then let the other node vanish without a word.
        std::fs::write(&go, "")?;
        std::thread::sleep(Duration::from_millis(300));
        succeed(cluster.node(Side::B).command("ip").args(["link", "set", "link0", "down"]), Duration::from_secs(5))?;
        let start = std::time::Instant::now();
        writer.wait(10 * DEAD_PEER)?;
        ensure!(writer.log().contains("reset"), "the writer saw no reset: {}", writer.log());
        ensure!(start.elapsed() >= DEAD_PEER / 2, "given up after {:?} already", start.elapsed());
        Ok(())
    })
}

#[test]
fn a_reader_that_pauses_for_longer_than_a_dead_peer_may_is_served() -> Result<()> {
    on_mesh(&spec(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let go = server.directory.join("go");
        let address = server.address(Family::V4).to_string();
        let mut sink = server.serve("sink", server.command("python3").args(["-c", &sink(&address)]).arg(&go), 9000)?;
        let bytes = 64 << 20;
        let script = format!(
            "import socket
s=socket.create_connection(('{address}',9000))
s.sendall(b'x'*{bytes}); s.shutdown(1); s.recv(1)
"
        );
        let log = client.directory.join("writer.log");
        let mut writer = Process::start("writer", client.command("python3").args(["-c", &script]), &log)?;
        // All buffers on the way are full long before; nothing is acknowledged but window probes.
        std::thread::sleep(4 * DEAD_PEER);
        ensure!(writer.ended()?.is_none(), "the writer was cut off: {}", writer.log());
        std::fs::write(&go, "")?;
        ensure!(sink.wait(Duration::from_secs(60))?.success(), "{}", sink.log());
        ensure!(sink.log().trim() == bytes.to_string(), "{} of {bytes} bytes came", sink.log().trim());
        ensure!(writer.wait(Duration::from_secs(10))?.success(), "{}", writer.log());
        Ok(())
    })
}
