//! Rules that change while connections are made as fast as this machine makes them: nobody who may connect fails, and nobody who
//! may not gets through, from the moment in which both agents have the rules.

use std::{
    env,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpStream},
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    access_log::Entry,
    cluster::{Cluster, ClusterSpec, Family, Pod, Side},
    config::{self, Mode, NAMESPACE},
    process::Process,
    rotation,
    scenario::on_mesh,
    wait::{Look, seconds, wait_for},
};

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const PORT: u16 = 7300;
const ECHO: u16 = 7301;
/// `ADDRESS SECONDS`, for the process that connects.
const LOAD: &str = "MARLINE_TEST_LOAD";
const THREADS: usize = 8;
const LINE: &[u8] = b"is anybody there?\n";

/// One connection: when it began and ended, since the epoch, and whether it got its answer.
#[derive(Clone, Copy, Debug)]
struct Try {
    began: Duration,
    ended: Duration,
    answered: bool,
}

fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// No test but the process inside a pod that connects again and again, and writes down what came of it.
#[test]
fn load() -> Result<()> {
    let Ok(task) = env::var(LOAD) else {
        println!("SKIPPED: load: it is no test but what the tests run inside pods");
        return Ok(());
    };
    let (address, duration) = task.split_once(' ').context("ADDRESS SECONDS")?;
    let (address, end) = (address.parse()?, Instant::now() + Duration::from_secs(duration.parse()?));
    let workers: Vec<_> = (0..THREADS)
        .map(|_| {
            thread::spawn(move || {
                while Instant::now() < end {
                    let (began, answer) = (now(), ask(address));
                    let outcome = if answer.is_ok() { "answered" } else { "failed" };
                    println!("try {} {} {outcome}", began.as_micros(), now().as_micros());
                    if answer.is_err() {
                        // Who is refused at once would do nothing else.
                        thread::sleep(Duration::from_millis(1));
                    }
                }
            })
        })
        .collect();
    workers.into_iter().for_each(|worker| drop(worker.join()));
    println!("over");
    Ok(())
}

fn ask(address: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(10))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(LINE)?;
    let mut answer = vec![0; LINE.len()];
    stream.read_exact(&mut answer)?;
    ensure!(answer == LINE, "another answer");
    Ok(())
}

/// A server in one pod and the load in another.
struct Load {
    _server: Process,
    client: Process,
    log: PathBuf,
}

impl Load {
    fn start(client: &Pod, server: &Pod, lasts: u64) -> Result<Self> {
        let mut command = server.command("/usr/bin/python3");
        let program = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/steady.py");
        command.arg(program).args(["serve", &PORT.to_string()]);
        let served = server.serve("steady", &mut command, PORT)?;
        let mut command: Command = client.command(env::current_exe()?);
        command.args(["load", "--exact", "--nocapture", "--test-threads=1"]);
        command.env(LOAD, format!("{} {lasts}", server.socket(Family::V4, PORT)));
        let log = client.directory.join("load.log");
        let called = Process::start("load", &mut command, &log)?;
        Ok(Self { _server: served, client: called, log })
    }

    /// All that was tried.
    fn tries(self) -> Result<Vec<Try>> {
        wait_for("the load to be over", seconds(60), || {
            let log = self.client.log();
            Ok(if log.lines().any(|line| line == "over") { Look::Done(()) } else { Look::NotYet("not yet".to_owned()) })
        })?;
        let file = std::fs::File::open(&self.log)?;
        let mut tries = Vec::new();
        for line in BufReader::new(file).lines() {
            let line = line?;
            let words: Vec<&str> = line.split(' ').collect();
            let ["try", began, ended, outcome] = words[..] else { continue };
            let at = |text: &str| -> Result<Duration> { Ok(Duration::from_micros(text.parse()?)) };
            tries.push(Try { began: at(began)?, ended: at(ended)?, answered: outcome == "answered" });
        }
        Ok(tries)
    }
}

fn rate(tries: &[Try], lasts: u64) -> u64 {
    tries.len() as u64 / lasts
}

#[test]
fn going_from_permissive_to_strict_under_load_fails_no_connection_within_the_mesh() -> Result<()> {
    const LASTS: u64 = 8;
    on_mesh(&ClusterSpec::pairs(Mode::Permissive), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let load = Load::start(&client, &server, LASTS)?;
        let end = Instant::now() + Duration::from_secs(LASTS - 2);
        let mut changes = 0;
        while Instant::now() < end {
            for mode in [Mode::Strict, Mode::Permissive] {
                cluster.change_mode(mode)?;
                changes += 1;
            }
        }
        cluster.change_mode(Mode::Strict)?;
        let tries = load.tries()?;
        println!("{changes} changes, {} connections, {} a second", tries.len(), rate(&tries, LASTS));
        let failed: Vec<_> = tries.iter().filter(|one| !one.answered).collect();
        ensure!(failed.is_empty(), "{} of {} failed: {failed:?}", failed.len(), tries.len());
        ensure!(
            tries.len() > 100 && changes >= 4,
            "too little was tried: {} connections, {changes} changes",
            tries.len()
        );
        Ok(())
    })
}

#[test]
fn a_reload_under_load_lets_nobody_through_who_is_forbidden() -> Result<()> {
    const LASTS: u64 = 10;
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        // By who the client is, which only its certificate tells, and by where it comes from.
        let principal = format!("principals: [\"cluster.local/ns/{NAMESPACE}/sa/{}\"]", client.name);
        let block = format!("ipBlocks: [\"{}\"]", client.v4);
        let load = Load::start(&client, &server, LASTS)?;
        let end = Instant::now() + Duration::from_secs(LASTS - 2);
        let (mut closed, mut open) = (Vec::new(), Vec::new());
        let mut sources = [&principal, &block].into_iter().cycle();
        while Instant::now() < end {
            let source = sources.next().context("a source")?;
            put(cluster, &deny(&server, source))?;
            let since = now();
            thread::sleep(Duration::from_millis(300));
            closed.push((since, now()));
            put(cluster, "")?;
            let since = now();
            thread::sleep(Duration::from_millis(300));
            open.push((since, now()));
        }
        let tries = load.tries()?;
        let within = |times: &[(Duration, Duration)]| -> Vec<Try> {
            let one = |one: &&Try| times.iter().any(|(since, until)| one.began >= *since && one.ended < *until);
            tries.iter().filter(one).copied().collect()
        };
        let (forbidden, allowed) = (within(&closed), within(&open));
        let through = forbidden.iter().filter(|one| one.answered).count();
        println!(
            "{} connections, {} a second; {} while {} times forbidden, {through} got through; {} while allowed",
            tries.len(),
            rate(&tries, LASTS),
            forbidden.len(),
            closed.len(),
            allowed.len()
        );
        ensure!(through == 0, "{through} of {} that were forbidden got through", forbidden.len());
        ensure!(forbidden.len() > 50, "too few were tried while it was forbidden: {}", forbidden.len());
        ensure!(allowed.iter().any(|one| one.answered), "nobody got through when it was allowed: this shows nothing");
        Ok(())
    })
}

/// As an operator of databases does it when a replica takes over; and a node may be told to be elsewhere.
#[test]
fn a_pod_that_is_labelled_anew_under_load_fails_no_connection_and_rules_find_it_by_its_labels() -> Result<()> {
    const LASTS: u64 = 6;
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        put(cluster, &deny_by("role: fenced", &format!("ipBlocks: [\"{}\"]", client.v4)))?;
        let load = Load::start(&client, &server, LASTS)?;
        let end = Instant::now() + Duration::from_secs(LASTS - 2);
        let mut changes = 0;
        while Instant::now() < end {
            for (role, zone) in [("replica", "one"), ("primary", "two")] {
                relabel(cluster, &[&client, &server], role, zone)?;
                changes += 1;
            }
        }
        let tries = load.tries()?;
        println!("{changes} changes, {} connections, {} a second", tries.len(), rate(&tries, LASTS));
        let failed: Vec<_> = tries.iter().filter(|one| !one.answered).collect();
        ensure!(failed.is_empty(), "{} of {} failed: {failed:?}", failed.len(), tries.len());
        ensure!(tries.len() > 100 && changes >= 4, "too little was tried: {} connections", tries.len());

        let mut command = server.command(TALKER);
        let _echo = server.serve("echo", command.args(["echo", &ECHO.to_string()]), ECHO)?;
        let _served = rotation::serve(&server)?;
        let live = rotation::call(&client, &server, "live")?;
        relabel(cluster, &[&server], "fenced", "two")?;
        wait_for("the live connection to end", seconds(20), || {
            let log = live.log();
            Ok(if log.contains("ended") { Look::Done(()) } else { Look::NotYet(log.lines().count().to_string()) })
        })?;
        let address = server.socket(Family::V4, ECHO).to_string();
        let ask = || client.succeed(TALKER, &["ask", &address], seconds(20));
        ensure!(ask().is_err(), "a new connection got through");
        let denied = |entry: &Entry| entry.reason.as_deref() == Some("policy");
        cluster.agent(Side::B)?.wait_entries("the denial", 0, 1, denied)?;
        relabel(cluster, &[&server], "primary", "two")?;
        ask().map(drop)
    })
}

/// Both agents have it when this returns.
fn relabel(cluster: &Cluster, pods: &[&Pod], role: &str, zone: &str) -> Result<()> {
    cluster.reload(|cluster| {
        Side::BOTH.iter().try_for_each(|side| {
            let file = cluster.config_directory(*side).join("workloads.yaml");
            let mut text = String::new();
            for line in std::fs::read_to_string(&file)?.lines() {
                if !line.contains("  role: ") && !line.contains("  topology.kubernetes.io/zone: ") {
                    text += &format!("{line}\n");
                }
                if pods.iter().any(|pod| line == format!("    app: {}", pod.name)) {
                    text += &format!("    role: {role}\n    topology.kubernetes.io/zone: {zone}\n");
                }
            }
            config::replace(&file, &text)
        })
    })
}

fn deny(server: &Pod, source: &str) -> String {
    deny_by(&format!("app: {}", server.name), source)
}

fn deny_by(label: &str, source: &str) -> String {
    format!(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: closed, namespace: {NAMESPACE}}}\n\
         spec: {{selector: {{matchLabels: {{{label}}}}}, action: DENY, rules: [{{from: [{{source: {{{source}}}}}]}}]}}\n"
    )
}

/// Both agents have it when this returns.
fn put(cluster: &Cluster, rules: &str) -> Result<()> {
    cluster.reload(|cluster| {
        let file = |side| cluster.config_directory(side).join("rules.yaml");
        [Side::A, Side::B].into_iter().try_for_each(|side| config::replace(&file(side), rules))
    })
}
