//! Clients that stall, and the deaths of the service itself.

use std::{
    fs,
    io::{BufRead as _, BufReader},
    net::SocketAddr,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use marline::identity::{Ca, TrustDomain};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpSocket, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tonic::Code;

use crate::{
    bed::*,
    kubernetes::{ApiServer, SLEEP, pods_token},
};

const LONG: Duration = Duration::from_secs(20);

/// `marline ca serve` as a process of its own.
pub struct Process {
    child: Child,
    pub address: SocketAddr,
}

impl Process {
    pub fn start(bed: &Bed) -> Self {
        // With few descriptors, as many systems give.
        let mut child = Command::new("sh")
            .args(["-c", "ulimit -Sn 256 && exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_marline")])
            .args(["--log-json", "ca", "serve", "--config"])
            .arg(bed.path("ca.yaml"))
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (sender, found) = mpsc::channel();
        let lines = BufReader::new(child.stderr.take().unwrap()).lines();
        thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let Ok(line) = serde_json::from_str::<Value>(&line) else {
                    eprintln!("{line}");
                    continue;
                };
                if line["fields"]["message"] == "the CA service answers" {
                    let _ = sender.send(line["fields"]["address"].as_str().unwrap().parse().unwrap());
                }
            }
        });
        let address = found.recv_timeout(LONG).expect("the service does not start");
        Self { child, address }
    }

    fn signal(&self, signal: Signal) {
        kill(Pid::from_raw(self.child.id().try_into().unwrap()), signal).unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

async fn client_of(bed: &Bed, address: SocketAddr) -> Client {
    connect(address, &bed.path("ca/root-cert.pem"), "127.0.0.1".parse().unwrap()).await.unwrap()
}

/// A service whose requests wait at the API server.
async fn held() -> (Bed, ApiServer, Process) {
    let bed = Bed::files("");
    let server = ApiServer::start(&bed).await;
    server.state.gate.forget_permits(Semaphore::MAX_PERMITS);
    bed.configure("127.0.0.1:0", &server.authentication("a/a", "marline-ca"));
    let process = Process::start(&bed);
    (bed, server, process)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_dies_in_the_middle_of_a_request_is_an_error_and_the_next_try_works() {
    let (bed, server, process) = held().await;
    let address = process.address;
    let mut client = client_of(&bed, address).await;
    let (_, csr) = new_csr(SLEEP);
    let asked = tokio::spawn({
        let csr = csr.clone();
        async move { send(&mut client, &pods_token(), None, &csr, 60).await }
    });
    timeout(LONG, server.state.arrived.notified()).await.unwrap();
    process.signal(Signal::SIGKILL);
    let status = timeout(LONG, asked).await.unwrap().unwrap().unwrap_err();
    assert!(matches!(status.code(), Code::Unavailable | Code::Unknown), "{status:?}");
    drop(process);

    server.state.gate.add_permits(1000);
    bed.configure(&address.to_string(), &server.authentication("a/a", "marline-ca"));
    let process = Process::start(&bed);
    assert_eq!(process.address, address);
    let chain = send(&mut client_of(&bed, address).await, &pods_token(), None, &csr, 60).await.unwrap();
    let issued: Vec<_> = bed.ledger().into_iter().filter(|line| line["outcome"] == "issued").collect();
    assert_eq!(issued.len(), 1);
    assert_eq!(issued[0]["serial"], serial(&chain));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_service_that_is_told_to_stop_answers_first_and_takes_nobody_new() {
    let (bed, server, mut process) = held().await;
    let address = process.address;
    let mut client = client_of(&bed, address).await;
    let (_, csr) = new_csr(SLEEP);
    let asked = tokio::spawn(async move { send(&mut client, &pods_token(), None, &csr, 60).await });
    timeout(LONG, server.state.arrived.notified()).await.unwrap();
    process.signal(Signal::SIGTERM);
    until("nobody new", async || TcpStream::connect(address).await.is_err()).await;
    assert!(process.child.try_wait().unwrap().is_none(), "it waits for the request");
    server.state.gate.add_permits(1);
    assert_eq!(timeout(LONG, asked).await.unwrap().unwrap().unwrap().len(), 2);
    let ended = tokio::task::spawn_blocking(move || process.child.wait().unwrap().code()).await.unwrap();
    assert_eq!(ended, Some(0));
}

#[tokio::test]
async fn clients_that_stall_keep_nobody_waiting_and_are_closed() {
    let bed = Bed::start("limits: {connections: 256, handshake: 300ms}").await;
    let mut stalled = Vec::new();
    for n in 0..24 {
        let mut stream = TcpStream::connect(bed.address()).await.unwrap();
        // Silent, within a record's header, within its body, or no TLS.
        let begin: &[u8] = match n % 4 {
            0 => b"",
            1 => &[22, 3, 1],
            2 => &[22, 3, 1, 1, 0, 1, 0, 0],
            _ => b"GET / HTTP/1.1\r\n\r\n",
        };
        stream.write_all(begin).await.unwrap();
        stalled.push(stream);
    }
    assert!(timeout(LONG, bed.ask(TOKEN_A, WEB)).await.unwrap().is_ok());
    for mut stream in stalled {
        let mut rest = Vec::new();
        // An alert at most.
        let _ = timeout(LONG, stream.read_to_end(&mut rest)).await.expect("it is not closed");
        assert!(rest.len() < 16, "{rest:?}");
    }
    let text = bed.status("/metrics").await.1;
    assert!(text.contains("marline_ca_connections_total{outcome=\"handshake_too_slow\"} 18"), "{text}");
    assert!(text.contains("marline_ca_connections_total{outcome=\"handshake_failed\"} 6"), "{text}");
}

#[tokio::test]
async fn one_address_cannot_take_all_connections() {
    let bed = Bed::start("limits: {connections: 16, handshake: 60s}").await;
    let mut held = Vec::new();
    for _ in 0..20 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        held.push(socket.connect(bed.address()).await.unwrap());
    }
    assert!(timeout(LONG, bed.ask(TOKEN_A, WEB)).await.unwrap().is_ok());
    let mut closed = 0;
    for mut stream in held {
        closed += usize::from(timeout(Duration::from_millis(50), stream.read_u8()).await.is_ok());
    }
    assert_eq!(closed, 18, "two of sixteen are for one address");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn openssl_takes_the_chain_that_is_shown() {
    if Command::new("openssl").arg("version").output().is_err() {
        println!("skipped: openssl is not installed");
        return;
    }
    let mut bed = Bed::files("");
    fs::rename(bed.path("ca"), bed.path("above")).unwrap();
    Ca::open(&bed.path("above"))
        .unwrap()
        .init_intermediate(&bed.path("above"), &bed.path("ca"), &TrustDomain::default())
        .unwrap();
    bed.run().await;
    let (address, root) = (bed.address().to_string(), bed.path("above/root-cert.pem"));
    for (option, name, well) in
        [("-verify_hostname", "ca.test", true), ("-verify_ip", "127.0.0.1", true), ("-verify_hostname", "other", false)]
    {
        let (address, root) = (address.clone(), root.clone());
        let output = tokio::task::spawn_blocking(move || {
            Command::new("openssl")
                .args(["s_client", "-connect", &address, "-alpn", "h2", "-showcerts", option, name, "-CAfile"])
                .arg(root)
                .stdin(Stdio::null())
                .output()
                .unwrap()
        })
        .await
        .unwrap();
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(text.contains("Verify return code: 0 (ok)"), well, "{option} {name}: {text}");
        assert_eq!(text.matches("BEGIN CERTIFICATE").count(), 2, "the service's own and the intermediate");
        assert!(text.contains("ALPN protocol: h2"), "{text}");
    }
}

#[tokio::test]
async fn the_service_takes_all_the_descriptors_that_it_may_have() {
    let bed = Bed::files("");
    let process = Process::start(&bed);
    let limits = fs::read_to_string(format!("/proc/{}/limits", process.child.id())).unwrap();
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files")).unwrap();
    let numbers: Vec<_> = line.split_whitespace().collect();
    assert_eq!(numbers[0], numbers[1], "{line}");
    assert_ne!(numbers[0], "256");
}

#[tokio::test]
async fn a_connection_on_which_nobody_proves_who_it_is_is_closed_and_others_stay() {
    let bed = Bed::start("limits: {handshake: 300ms}").await;
    let (_, csr) = new_csr(WEB);
    let mut proved = bed.client().await;
    send(&mut proved, TOKEN_A, Some(WEB), &csr, 60).await.unwrap();
    let mut failed = bed.client().await;
    refused(send(&mut failed, "unknown", Some(WEB), &csr, 60).await, Code::Unauthenticated, "not known");
    let _silent = bed.client().await;
    let count = async |outcome: &str| {
        let line = format!("marline_ca_connections_total{{outcome=\"{outcome}\"}} ");
        let text = bed.status("/metrics").await.1;
        text.lines().find_map(|found| found.strip_prefix(&line)?.parse::<u32>().ok()).unwrap_or_default()
    };
    until("both are closed", async || count("never_authenticated").await == 2).await;
    send(&mut proved, TOKEN_A, Some(WEB), &csr, 60).await.unwrap();
    assert_eq!(count("accepted").await, 3, "it is the same connection");
}

#[tokio::test]
async fn whoever_holds_connections_to_the_status_port_keeps_nobody_else_from_it() {
    let bed = Bed::start("").await;
    let address = bed.running.as_ref().unwrap().status;
    let mut held = Vec::new();
    for _ in 0..9 {
        let socket = TcpSocket::new_v4().unwrap();
        socket.bind("127.0.0.9:0".parse().unwrap()).unwrap();
        held.push(socket.connect(address).await.unwrap());
    }
    assert_eq!(timeout(LONG, bed.status("/livez")).await.unwrap().0, 200);
    // The ninth at once, and the others, which say nothing, after a while.
    for stream in held.iter_mut().rev() {
        assert!(timeout(LONG, stream.read(&mut [0; 256])).await.is_ok(), "it is not closed");
    }
}
