//! What a thousand identities on one node cost: `cargo bench -p marline --bench identities`.
//!
//! The agent's side runs here, the CA service is a process of its own, as it would be. Told are the time until every identity has its
//! certificate, the processor time of both sides for each, and the memory that the agent holds for each. Nothing is asserted.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::{
    collections::BTreeSet,
    fs,
    io::{BufRead as _, BufReader},
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use marline::identity::{
    Ca, LiveCa, Manager, ManagerSettings, SpiffeId, Trust, TrustDomain, TrustStore,
    manager::Source,
    remote::{RemoteCa, RemoteSettings},
};

const IDENTITIES: [usize; 3] = [10, 100, 1_000];

fn main() {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    println!("source      identities  all there  agent's processor  CA's processor  agent's memory");
    println!("                                        for each        for each        for each");
    let dir = tempfile::tempdir().unwrap();
    let domain = TrustDomain::default();
    Ca::init(&dir.path().join("ca"), &domain).unwrap();
    let open = || Ca::open(&dir.path().join("ca")).unwrap();
    for count in IDENTITIES {
        let trust = TrustStore::new(Trust::new(domain.clone(), open().roots()));
        runtime.block_on(measure("embedded", count, LiveCa::new(open()), trust, None));
    }
    for count in IDENTITIES {
        let (mut service, address) = serve(dir.path(), count);
        let trust = TrustStore::new(Trust::new(domain.clone(), open().roots()));
        let settings = RemoteSettings {
            address,
            server_name: Some("127.0.0.1".to_owned()),
            token: dir.path().join("token"),
            cluster_id: None,
        };
        let source = runtime.block_on(async { RemoteCa::new(&settings, trust.clone()).unwrap() });
        runtime.block_on(measure("elsewhere", count, source, trust, Some(service.id())));
        service.kill().unwrap();
        service.wait().unwrap();
        fs::remove_dir_all(dir.path().join("state")).unwrap();
    }
}

async fn measure(name: &str, count: usize, source: impl Source + 'static, trust: TrustStore, service: Option<u32>) {
    let ids: BTreeSet<SpiffeId> = (0..count).map(account).collect();
    let manager = Manager::new(source, trust, ManagerSettings::default());
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let running = tokio::spawn({
        let manager = manager.clone();
        async move { manager.run(stopped).await }
    });
    let (memory, own, others) = (resident(), processor(std::process::id()), service.map(processor));
    let start = Instant::now();
    manager.retain(&ids);
    for id in &ids {
        manager.until_held(id).await;
    }
    let took = start.elapsed();
    let part = |total: Duration| total / u32::try_from(count).unwrap();
    let own = part(processor(std::process::id()) - own);
    let others = service.zip(others).map(|(pid, before)| format!("{:.0?}", part(processor(pid) - before)));
    let memory = resident().saturating_sub(memory) / u64::try_from(count).unwrap();
    let failures = manager.counters().failures;
    println!(
        "{name:<11} {count:>10} {:>10} {:>18} {:>15} {:>11.1} KiB{}",
        format!("{took:.0?}"),
        format!("{own:.0?}"),
        others.unwrap_or_else(|| "-".to_owned()),
        memory as f64 / 1024.0,
        if failures > 0 { format!("  {failures} attempts failed") } else { String::new() },
    );
    stop.send_replace(true);
    running.await.unwrap();
}

fn account(number: usize) -> SpiffeId {
    SpiffeId::new(&TrustDomain::default(), "shop", &format!("account-{number}")).unwrap()
}

/// `marline ca serve` for a node with so many service accounts, and its address.
fn serve(dir: &Path, count: usize) -> (Child, String) {
    let port = || TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let (address, status) = (port(), port());
    let program = env!("CARGO_BIN_EXE_marline");
    if !dir.join("token").exists() {
        let mut token = Command::new(program);
        token.args(["ca", "token", "--node", "here", "--out"]).arg(dir.join("token"));
        let entry = String::from_utf8(token.output().unwrap().stdout).unwrap();
        let head = "apiVersion: marline.io/v1alpha1\nkind: CaTokens\nspec:\n  tokens:\n";
        fs::write(dir.join("tokens.yaml"), format!("{head}{entry}")).unwrap();
    }
    let accounts: Vec<String> = (0..count).map(|number| format!("shop/account-{number}")).collect();
    let nodes = format!(
        "apiVersion: marline.io/v1alpha1\nkind: CaNodes\nspec:\n  nodes:\n  - name: here\n    serviceAccounts: [{}]\n",
        accounts.join(", ")
    );
    fs::write(dir.join("nodes.yaml"), nodes).unwrap();
    let settings = format!(
        "apiVersion: marline.io/v1alpha1\nkind: CaServer\nspec:\n  ca: {{path: ca}}\n  listen: {{address: '{address}', names: \
         [127.0.0.1]}}\n  status: {{address: '{status}'}}\n  state: state\n  authentication: {{tokens: tokens.yaml}}\n  nodes: nodes.yaml\n"
    );
    fs::write(dir.join("ca.yaml"), settings).unwrap();
    let mut command = Command::new(program);
    command.args(["--log", "info", "ca", "serve", "--config"]).arg(dir.join("ca.yaml")).stderr(Stdio::piped());
    let mut service = command.spawn().unwrap();
    let mut log = BufReader::new(service.stderr.take().unwrap()).lines();
    log.by_ref().map(Result::unwrap).find(|line| line.contains("answers")).unwrap_or_else(|| panic!("no CA service"));
    // What it says further is read, so that it can go on.
    std::thread::spawn(move || log.for_each(drop));
    (service, address.to_string())
}

fn resident() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// The processor time that a process has used so far.
fn processor(pid: u32) -> Duration {
    let schedstat = |task: &Path| {
        let text = fs::read_to_string(task.join("schedstat")).unwrap_or_default();
        text.split_whitespace().next().and_then(|nanoseconds| nanoseconds.parse().ok()).unwrap_or(0)
    };
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).unwrap();
    Duration::from_nanos(tasks.map(|task| schedstat(&task.unwrap().path())).sum())
}
