//! How loading and deciding grow with the mesh: `cargo bench -p marline --bench policy`.
//!
//! The limits are those of the project: 100,000 workloads and 10,000 policies load in under 2 s and use under 200 MiB, and a decision
//! takes under 2 microseconds. A limit that is passed makes it fail.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    fmt::Write as _,
    fs,
    hint::black_box,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::{Duration, Instant},
};

use marline::{
    config,
    policy::{self, Attempt, Peer, Workload},
    state::Snapshot,
};

const AGENT: &str =
    "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\nspec:\n  ca: {path: ca}\n  capture: {cgroup: /c}\n";
const LOAD: Duration = Duration::from_secs(2);
const MEMORY: u64 = 200 << 20;
/// The pods of one node, as many as Kubernetes recommends.
const PODS: usize = 110;
const DECISION: Duration = Duration::from_micros(2);

fn main() -> ExitCode {
    let mut passed = true;
    println!("workloads  policies      load  (processor)   memory    outbound     arriving   admitted");
    for (workloads, policies) in
        [(10, 10), (100, 100), (1_000, 1_000), (10_000, 10_000), (100_000, 10_000), (100_000, 100_000)]
    {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("agent.yaml"), AGENT).unwrap();
        fs::write(dir.path().join("workloads.yaml"), yaml_of_workloads(workloads)).unwrap();
        fs::write(dir.path().join("policies.yaml"), yaml_of_policies(workloads, policies)).unwrap();
        let before = resident();
        let (start, work) = (Instant::now(), processor_time());
        let snapshot = config::load(dir.path()).unwrap_or_else(|errors| panic!("{errors}")).snapshot;
        let (load, work) = (start.elapsed(), processor_time() - work);
        let memory = resident().saturating_sub(before);
        let everybody = snapshot.workloads().len();
        let decisions = [
            decide(&snapshot, everybody, outbound),
            decide(&snapshot, PODS, arriving),
            decide(&snapshot, PODS, admitted),
        ];
        let [outbound, arriving, admitted] = decisions;
        println!(
            "{workloads:>9} {policies:>9} {load:>9.1?} {work:>12.1?} {:>5} MiB {outbound:>11.0?} {arriving:>12.0?} {admitted:>10.0?}",
            memory >> 20
        );
        if (workloads, policies) == (100_000, 10_000) {
            passed &= load < LOAD && memory < MEMORY;
        }
        passed &= decisions.iter().all(|decision| *decision < DECISION);
    }
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// The median of the mean times of batches. Callers are all workloads in turn; called are the first `reach` of them.
fn decide(snapshot: &Snapshot, reach: usize, ask: fn(&Snapshot, &Workload, &Workload)) -> Duration {
    let workloads = snapshot.workloads();
    let reach = reach.min(workloads.len());
    let mut batches: Vec<Duration> = (0..51)
        .map(|batch| {
            let start = Instant::now();
            for n in 0..1_000 {
                let at = batch * 7_919 + n * 31;
                ask(snapshot, &workloads[(at * 13) % workloads.len()], &workloads[at % reach]);
            }
            start.elapsed() / 1_000
        })
        .collect();
    batches.sort();
    batches[batches.len() / 2]
}

/// The client's side.
fn outbound(snapshot: &Snapshot, _: &Workload, to: &Workload) {
    black_box(policy::outbound(&snapshot.policies, Some(to), 8080));
}

/// What is asked of a pod of this node before the handshake.
fn arriving(snapshot: &Snapshot, from: &Workload, to: &Workload) {
    let local = SocketAddr::new(to.addresses[0], 8080);
    black_box(policy::inbound(&snapshot.policies, to, local, from.addresses[0], Some(from), false));
}

/// What is asked of a pod of this node when the certificate is known.
fn admitted(snapshot: &Snapshot, from: &Workload, to: &Workload) {
    let attempt = Attempt {
        source: from.addresses[0],
        destination: SocketAddr::new(to.addresses[0], 8080),
        peer: Peer::Proved { id: &from.id, sni: None },
    };
    black_box(snapshot.policies.authorization.decide(to, &attempt));
}

/// Fifty workloads a namespace, in services of five.
fn yaml_of_workloads(number: usize) -> String {
    let mut text = String::new();
    for n in 0..number {
        let address = IpAddr::from(Ipv4Addr::from_bits(0x0a00_0000 + u32::try_from(n).unwrap()));
        writeln!(
            text,
            "---\napiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: w{n}, namespace: ns-{}}}\n\
             spec: {{address: {address}, serviceAccount: app-{}, labels: {{app: app-{}, version: v1, tier: backend}}}}",
            n / 50,
            n / 5,
            n / 5
        )
        .unwrap();
    }
    text
}

/// For each namespace by turns: an ALLOW for an app with some callers and a port, a DENY of address blocks, a STRICT mode for an app.
fn yaml_of_policies(workloads: usize, number: usize) -> String {
    let (namespaces, apps) = (workloads.div_ceil(50), workloads.div_ceil(5));
    let mut text = String::new();
    for n in 0..number {
        let (namespace, app) = ((n % apps) / 10, n % apps);
        let selector = format!("selector: {{matchLabels: {{app: app-{app}}}}}");
        let caller =
            |k: usize| format!("cluster.local/ns/ns-{}/sa/app-{}", (namespace + k) % namespaces, (app + k) % apps);
        let (kind, spec) = match n % 3 {
            0 => {
                let callers: Vec<String> = (0..20).map(caller).collect();
                let rules = format!(
                    "rules: [{{from: [{{source: {{principals: [{}]}}}}], to: [{{operation: {{ports: [\"8080\"]}}}}]}}]",
                    callers.join(", ")
                );
                ("AuthorizationPolicy", format!("{selector}, {rules}"))
            }
            1 => {
                let rules = "action: DENY, rules: [{from: [{source: {ipBlocks: [192.0.2.0/24, 198.51.100.0/24, 203.0.113.7]}}]}]";
                ("AuthorizationPolicy", format!("{selector}, {rules}"))
            }
            _ => (
                "PeerAuthentication",
                format!("{selector}, mtls: {{mode: STRICT}}, portLevelMtls: {{9090: {{mode: DISABLE}}}}"),
            ),
        };
        writeln!(
            text,
            "---\napiVersion: security.istio.io/v1\nkind: {kind}\nmetadata: {{name: p{n}, namespace: ns-{namespace}}}\nspec: {{{spec}}}"
        )
        .unwrap();
    }
    text
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
