//! What a large cluster costs one agent: `cargo bench -p marline --bench kubernetes`. Pods are as large as the recorded ones of the tests.
//! Told are the time and the processor's until everything is known, the memory held, what was asked of the API server, and how long the change
//! of a pod takes to be in force. Nothing is asserted of them.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fs,
    sync::{Arc, Mutex, atomic::Ordering::Relaxed},
    time::{Duration, Instant},
};

use axum::{
    Router,
    body::{Body, Bytes},
    extract::State as Shared,
    http::{Response, Uri},
};
use marline::{
    config::{CniConfig, KubernetesConfig},
    control::kubernetes::{Settings, Source},
    identity::{TrustDomain, TrustDomains},
    policy::Policies,
    state::{Snapshot, State},
};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{mpsc, watch},
};
use tokio_stream::wrappers::UnboundedReceiverStream;

/// How large the cluster is. Fifty pods a namespace, ten a service.
#[derive(Clone, Copy)]
struct Size {
    pods: usize,
    nodes: usize,
}

type Pieces = mpsc::UnboundedSender<Result<Bytes, std::io::Error>>;

struct Cluster {
    size: Size,
    pod: String,
    slice: String,
    watches: Mutex<Vec<(String, Pieces)>>,
    /// What making the answers has taken, of the processor.
    made: Mutex<Duration>,
}

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    println!("    pods  nodes   known in  (processor)   memory       read  requests   a change");
    for size in
        [Size { pods: 1_000, nodes: 50 }, Size { pods: 10_000, nodes: 500 }, Size { pods: 100_000, nodes: 5_000 }]
    {
        runtime.block_on(measure(size));
    }
}

async fn measure(size: Size) {
    let template = |name: &str| {
        let path = format!("{}/tests/kubernetes/recorded/list-{name}.json", env!("CARGO_MANIFEST_DIR"));
        let list: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
        list["response"]["body"]["items"][0].to_string()
    };
    let cluster = Arc::new(Cluster {
        size,
        pod: template("pods"),
        slice: template("endpointslices"),
        watches: Mutex::default(),
        made: Mutex::default(),
    });
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let router = Router::new().fallback(answer).with_state(Arc::clone(&cluster));
    tokio::spawn(async move { axum::serve(listener, router).await });

    let dir = tempfile::tempdir().unwrap();
    let kubeconfig = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "c",
        "clusters": [{"name": "c", "cluster": {"server": format!("http://{address}")}}],
        "users": [{"name": "u", "user": {"token": "t"}}],
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
    });
    fs::write(dir.path().join("kubeconfig"), kubeconfig.to_string()).unwrap();
    let config = KubernetesConfig {
        node_name: Some("node-0".into()),
        kubeconfig: Some(dir.path().join("kubeconfig")),
        cni: CniConfig::default(),
        kubelet_cgroup: None,
    };
    let before = resident();
    let (start, work) = (Instant::now(), processor_time());
    let mut source = Source::open(&config, TrustDomains::default()).await.unwrap();
    source.settings = Settings { backoff: Duration::from_millis(50), ..Settings::default() };
    let (health, asked) = (source.health.clone(), source.api.asked().clone());
    let empty = Snapshot::new(Policies::default(), TrustDomain::default(), Vec::new(), Vec::new());
    let (state, (stop, stopped)) = (State::new(empty), watch::channel(false));
    let running = tokio::spawn(source.run(state.clone(), stopped));
    health.ready().wait_for(|ready| *ready).await.unwrap();
    let (known, work) = (start.elapsed(), (processor_time() - work).saturating_sub(*cluster.made.lock().unwrap()));
    assert_eq!(state.load().workloads().len(), size.pods);
    let memory = resident().saturating_sub(before);

    // The dearest change: a pod's, with all services made anew. Twice, because the first waits for the rest after the long beginning.
    let mut change = Duration::MAX;
    for version in [2_000_000, 2_000_001] {
        let watch = loop {
            let found = cluster.watches.lock().unwrap().iter().find(|(path, _)| path == "/api/v1/pods").cloned();
            match found {
                Some((_, watch)) => break watch,
                None => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        let changed = pod(&cluster, version - 2_000_000)
            .replace("\"resourceVersion\":\"1\"", &format!("\"resourceVersion\":\"{version}\""));
        let changed = changed.replace("\"app\":\"httpbin\"", &format!("\"app\":\"changed-{version}\""));
        let mut generations = state.subscribe();
        generations.mark_unchanged();
        let since = Instant::now();
        watch.send(Ok(format!("{{\"type\":\"MODIFIED\",\"object\":{changed}}}\n").into())).unwrap();
        generations.changed().await.unwrap();
        change = since.elapsed();
    }
    println!(
        "{:>8} {:>6} {known:>10.1?} {work:>12.1?} {:>5} MiB {:>6} MiB {:>9} {change:>10.0?}",
        size.pods,
        size.nodes,
        memory >> 20,
        asked.bytes.load(Relaxed) >> 20,
        asked.pages.load(Relaxed) + asked.watches.load(Relaxed),
    );
    stop.send_replace(true);
    running.await.unwrap();
}

async fn answer(Shared(cluster): Shared<Arc<Cluster>>, uri: Uri) -> Response<Body> {
    let query = uri.query().unwrap_or_default();
    if query.contains("watch=1") {
        let (pieces, stream) = mpsc::unbounded_channel();
        cluster.watches.lock().unwrap().push((uri.path().to_owned(), pieces));
        return Response::new(Body::from_stream(UnboundedReceiverStream::new(stream)));
    }
    let work = Instant::now();
    let parameter = |name: &str| {
        query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')?.parse::<usize>().ok())
    };
    let (limit, from) = (parameter("limit").unwrap_or(500), parameter("continue").unwrap_or(0));
    let Size { pods, nodes: _ } = cluster.size;
    type Make = fn(&Cluster, usize) -> String;
    let (number, make): (usize, Make) = match uri.path() {
        "/api/v1/pods" => (pods, pod),
        "/api/v1/services" => (pods / 10, service),
        "/apis/discovery.k8s.io/v1/endpointslices" => (pods / 10, slice),
        "/api/v1/namespaces" => (pods / 50, |_, n| {
            format!(
                r#"{{"metadata":{{"name":"ns-{n}","resourceVersion":"1","labels":{{"marline.io/mesh":"enabled"}}}}}}"#
            )
        }),
        "/api/v1/nodes" => (1, |_, n| format!(r#"{{"metadata":{{"name":"node-{n}","resourceVersion":"1"}}}}"#)),
        "/apis/security.istio.io/v1/authorizationpolicies" => (pods / 50, |_, n| {
            format!(
                r#"{{"metadata":{{"name":"p","namespace":"ns-{n}","resourceVersion":"1"}},"spec":{{"rules":[{{"from":[{{"source":{{"namespaces":["ns-{n}"]}}}}]}}]}}}}"#
            )
        }),
        _ => {
            let mut absent = Response::new(Body::from("404 page not found\n"));
            *absent.status_mut() = axum::http::StatusCode::NOT_FOUND;
            return absent;
        }
    };
    let until = (from + limit).min(number);
    let items: Vec<String> = (from..until).map(|n| make(&cluster, n)).collect();
    let more = if until < number { format!(r#","continue":"{until}""#) } else { String::new() };
    let body = format!(r#"{{"metadata":{{"resourceVersion":"1000000"{more}}},"items":[{}]}}"#, items.join(","));
    *cluster.made.lock().unwrap() += work.elapsed();
    Response::new(Body::from(body))
}

fn address(n: usize) -> String {
    format!("10.{}.{}.{}", 1 + n / 65_536, n / 256 % 256, n % 256)
}

/// The recorded pod of bar/httpbin-a, with a name, namespace, node and addresses of its own.
fn pod(cluster: &Cluster, n: usize) -> String {
    cluster
        .pod
        .replace("\"name\":\"httpbin-a\"", &format!("\"name\":\"httpbin-5d9c7b6f4d-{n:05x}\""))
        .replace("\"namespace\":\"bar\"", &format!("\"namespace\":\"ns-{}\"", n / 50))
        .replace("\"uid\":\"1e6f2ace", &format!("\"uid\":\"{n:08x}"))
        .replace("\"resourceVersion\":\"292\"", "\"resourceVersion\":\"1\"")
        .replace("\"nodeName\":\"node-a\"", &format!("\"nodeName\":\"node-{}\"", n % cluster.size.nodes))
        .replace("\"serviceAccountName\":\"httpbin\"", &format!("\"serviceAccountName\":\"app-{}\"", n / 10))
        .replace("10.244.0.14", &address(n))
        .replace("fd00:10:244::e\"", &format!("fd00:10::{:x}:{:x}\"", n / 65_536, n % 65_536))
}

fn service(_: &Cluster, n: usize) -> String {
    format!(
        r#"{{"metadata":{{"name":"s-{n}","namespace":"ns-{}","resourceVersion":"1"}},"spec":{{"clusterIP":"172.{}.{}.{}","ports":[{{"name":"http","port":80,"targetPort":8080}}]}}}}"#,
        n / 5,
        16 + n / 65_536,
        n / 256 % 256,
        n % 256
    )
}

fn slice(cluster: &Cluster, n: usize) -> String {
    let mut slice: Value = serde_json::from_str(&cluster.slice).unwrap();
    slice["metadata"]["name"] = json!(format!("s-{n}-abc"));
    slice["metadata"]["namespace"] = json!(format!("ns-{}", n / 5));
    slice["metadata"]["resourceVersion"] = json!("1");
    slice["metadata"]["labels"]["kubernetes.io/service-name"] = json!(format!("s-{n}"));
    let mut endpoint = slice["endpoints"][0].clone();
    let endpoint = |at: usize| {
        endpoint["addresses"] = json!([address(at)]);
        endpoint["nodeName"] = json!(format!("node-{}", at % cluster.size.nodes));
        endpoint.clone()
    };
    slice["endpoints"] = (10 * n..10 * n + 10).map(endpoint).collect();
    slice.to_string()
}

/// What this process has computed so far: on a busy machine the time that passes says little.
fn processor_time() -> Duration {
    let stat = fs::read_to_string("/proc/self/stat").unwrap();
    let after_name = stat.rsplit_once(") ").unwrap().1;
    let ticks: u64 = after_name.split(' ').skip(11).take(2).map(|ticks| ticks.parse::<u64>().unwrap()).sum();
    // USER_HZ is 100 on every Linux.
    Duration::from_millis(ticks * 10)
}

/// Bytes of this process in memory.
fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() << 10
}
