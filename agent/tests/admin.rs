//! The admin address over a real socket: whatever is sent to it is answered or refused, never with an error of the server's own, and it
//! goes on answering. What the pages show of a running agent is the scenarios' (`tests/tests/native_visibility.rs`).
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    io::{Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, OnceLock},
    time::Duration,
};

use marline::{
    admin::{self, View},
    config,
    state::explain::Question,
};
use proptest::prelude::*;
use serde_json::{Value, json};

/// An agent of which everything is known; it notes what was set.
#[derive(Default)]
struct Shown(Mutex<Vec<Option<String>>>);

impl View for Shown {
    fn ready(&self) -> Result<(), String> {
        Ok(())
    }
    fn metrics(&self) -> String {
        "# EOF\n".into()
    }
    fn pods(&self) -> Value {
        json!("pods")
    }
    fn connections(&self) -> Value {
        json!("connections")
    }
    fn ended(&self) -> Value {
        json!("ended")
    }
    fn status(&self) -> Value {
        json!("status")
    }
    fn explain(&self, question: Question<'_>) -> Result<Value, String> {
        match question.source {
            "WHO" => Ok(json!("explain")),
            other => Err(format!("{other:?} is nobody")),
        }
    }
    fn workloads(&self) -> Value {
        json!("workloads")
    }
    fn services(&self) -> Value {
        json!("services")
    }
    fn policies(&self) -> Value {
        json!("policies")
    }
    fn certs(&self) -> Value {
        json!("certs")
    }
    fn chain(&self, id: &str) -> Option<String> {
        (id == "spiffe://a/ns/b/sa/c").then(|| "chain".into())
    }
    fn config_dump(&self) -> Value {
        json!("config_dump")
    }
    fn runtime(&self) -> Value {
        json!("runtime")
    }
    fn logging(&self) -> Result<String, String> {
        Ok("info".into())
    }
    fn set_logging(&self, levels: Option<&str>) -> Result<String, String> {
        self.0.lock().unwrap().push(levels.map(str::to_owned));
        match levels {
            Some("loud") => Err("\"loud\" is no level".into()),
            levels => Ok(levels.unwrap_or("info").into()),
        }
    }
}

/// A free port; the test's agent takes it at once.
fn free() -> SocketAddr {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap()
}

struct Bed {
    admin: SocketAddr,
    shown: Arc<Shown>,
}

/// One server for all that is made up.
fn bed() -> &'static Bed {
    static BED: OnceLock<Bed> = OnceLock::new();
    BED.get_or_init(Bed::new)
}

impl Bed {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (admin, metrics, readiness) = (free(), free(), free());
        let text = format!(
            "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nmetadata: {{name: a}}\nspec:\n  ca: {{path: ca}}\n  \
             capture: {{cgroup: /cg}}\n  admin: {{address: \"{admin}\"}}\n  metrics: {{address: \"{metrics}\"}}\n  \
             readiness: {{address: \"{readiness}\"}}\n"
        );
        std::fs::write(dir.path().join("agent.yaml"), text).unwrap();
        let agent = config::load(dir.path()).unwrap().agent;
        let shown = Arc::new(Shown::default());
        let view: Arc<dyn View> = shown.clone();
        let (ready, told) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
            runtime.block_on(async {
                let mut servers = admin::serve(&agent, &view).await.unwrap();
                ready.send(()).unwrap();
                panic!("a server ended: {:?}", servers.join_next().await);
            });
        });
        told.recv().unwrap();
        Self { admin, shown }
    }

    fn ask(&self, method: &str, target: &str, headers: &str) -> (u16, String) {
        let request = format!("{method} {target} HTTP/1.1\r\nConnection: close\r\n{headers}\r\n");
        let answer = raw(self.admin, request.as_bytes());
        let text = String::from_utf8_lossy(&answer).into_owned();
        let body = text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default();
        (status(&answer).unwrap_or_else(|| panic!("{method} {target} was answered with {text:?}")), body)
    }

    fn is_well(&self) -> bool {
        self.ask("GET", "/pods", "Host: localhost\r\n") == (200, "\"pods\"".into())
    }
}

/// Sends bytes and gives all that comes back. A request that is not answered, because it is not whole, is ended after a moment.
fn raw(address: SocketAddr, request: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).unwrap();
    // A server that has heard enough may close before the end.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    stream.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    if stream.read_to_end(&mut answer).is_err() {
        let _ = stream.shutdown(Shutdown::Write);
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let _ = stream.read_to_end(&mut answer);
    }
    answer
}

fn status(answer: &[u8]) -> Option<u16> {
    let text = String::from_utf8_lossy(answer);
    text.strip_prefix("HTTP/1.")?.split_whitespace().nth(1)?.parse().ok()
}

#[test]
fn every_page_is_listed_and_is_there() {
    let bed = Bed::new();
    let (status, list) = bed.ask("GET", "/", "Host: localhost\r\n");
    assert_eq!(status, 200);
    let pages: Vec<&str> = list.lines().filter_map(|line| line.split_whitespace().next()).collect();
    assert!(pages.contains(&"/config_dump") && pages.contains(&"/debug/runtime") && pages.len() >= 10, "{list}");
    for page in pages {
        let page = page.replace("SPIFFE_ID", "spiffe://a/ns/b/sa/c");
        assert_eq!(bed.ask("GET", &page, "Host: localhost\r\n").0, 200, "{page}");
    }
    let (status, text) = bed.ask("GET", "/nothing", "Host: localhost\r\n");
    assert!(status == 404 && text.contains("/config_dump"), "{status} {text}");
}

#[test]
fn levels_are_changed_by_post_and_put_alone_and_by_nobody_from_elsewhere() {
    let bed = Bed::new();
    let set = || bed.shown.0.lock().unwrap().clone();
    assert_eq!(bed.ask("POST", "/logging?level=marline::proxy=debug", "Host: localhost\r\n").0, 200);
    assert_eq!(bed.ask("PUT", "/logging?reset", "Host: 127.0.0.1:15000\r\n").0, 200);
    assert_eq!(bed.ask("POST", "/logging?level=loud", "Host: [::1]\r\n"), (400, "\"loud\" is no level\n".into()));
    assert_eq!(set(), [Some("marline::proxy=debug".into()), None, Some("loud".into())]);
    let after = set().len();
    for (method, headers, wanted) in [
        ("GET", "Host: localhost\r\n", 405),
        ("DELETE", "Host: localhost\r\n", 405),
        ("POST", "Host: evil.example\r\n", 403),
        ("GET", "Host: evil.example\r\n", 403),
        ("POST", "Host: localhost\r\nOrigin: http://evil.example\r\n", 403),
        ("POST", "Host: localhost\r\nSec-Fetch-Site: cross-site\r\n", 403),
        ("POST", "Host: localhost\r\nHost: evil.example\r\n", 403),
    ] {
        assert_eq!(bed.ask(method, "/logging?level=trace", headers).0, wanted, "{method} {headers}");
    }
    assert_eq!(set().len(), after, "{:?}", set());
    assert_eq!(bed.ask("GET", "/config_dump", "Host: evil.example:15000\r\n").0, 403);
}

#[test]
fn giant_and_unfinished_requests_do_no_harm() {
    let bed = Bed::new();
    let admin = bed.admin;
    let huge = "x".repeat(1 << 20);
    for request in [
        format!("GET /{huge} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: {huge}\r\n\r\n"),
        format!("GET / HTTP/1.1\r\nHost: localhost\r\nX: {huge}\r\n\r\n"),
        format!("POST /logging?level={huge} HTTP/1.1\r\nHost: localhost\r\n\r\n"),
        format!("POST /logging HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999999999\r\n\r\n{huge}"),
        "GET / HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n".to_owned(),
        "GET / HTTP/1.1\r\nHost: loc".to_owned(),
        "POST /logging HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFFFFFF\r\n"
            .to_owned(),
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_owned(),
    ] {
        let answer = raw(admin, request.as_bytes());
        let shown = &request[..request.len().min(60)];
        assert!(status(&answer).is_none_or(|status| status < 500), "{shown}: {:?}", status(&answer));
    }
    // Many that never end, all at once.
    let silent: Vec<TcpStream> = (0..200)
        .map(|_| {
            let mut stream = TcpStream::connect(admin).unwrap();
            stream.write_all(b"GET /pods HTTP/1.1\r\nHo").unwrap();
            stream
        })
        .collect();
    assert!(bed.is_well());
    drop(silent);
}

fn path() -> impl Strategy<Value = String> {
    let known = [
        "/",
        "/help",
        "/pods",
        "/status",
        "/connections",
        "/connections/ended",
        "/explain",
        "/workloads",
        "/services",
        "/policies",
        "/certs",
        "/certs/chain",
        "/config_dump",
        "/logging",
        "/debug/runtime",
    ];
    let query = prop_oneof![Just(String::new()), "\\?[ -~&&[^ ]]{0,40}", "\\?(level|id|reset)=[ -~&&[^ ]]{0,20}"];
    let path = prop_oneof![prop::sample::select(known.to_vec()).prop_map(str::to_owned), "/[ -~&&[^ ?#]]{0,30}"];
    (path, query).prop_map(|(path, query)| path + &query)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 400, ..ProptestConfig::default() })]

    #[test]
    fn no_request_makes_an_error_of_the_servers_own(
        method in prop_oneof![
            prop::sample::select(vec!["GET", "POST", "PUT", "HEAD", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT"])
                .prop_map(str::to_owned),
            "[A-Z!#$%&'*+.^_`|~-]{1,12}",
        ],
        target in path(),
        host in prop_oneof![Just("localhost".to_owned()), "[ -~]{0,30}"],
        headers in prop::collection::vec(("[A-Za-z][A-Za-z0-9-]{0,15}", "[ -~]{0,40}"), 0..4),
        body in prop::collection::vec(any::<u8>(), 0..64),
    ) {
        let lines: String = headers.iter().map(|(name, value)| format!("{name}: {value}\r\n")).collect();
        let length = body.len();
        let head = format!("{method} {target} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n{lines}\r\n");
        let answer = raw(bed().admin, &[head.as_bytes(), &body].concat());
        prop_assert!(status(&answer).is_none_or(|status| status < 500), "{}: {:?}", head, status(&answer));
        prop_assert!(bed().is_well());
    }

    #[test]
    fn no_bytes_make_an_error_of_the_servers_own(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let answer = raw(bed().admin, &bytes);
        prop_assert!(status(&answer).is_none_or(|status| status < 500), "{:?}", status(&answer));
        prop_assert!(bed().is_well());
    }
}
