//! What bounds direct connections: how much one key may seal, and how far a pod that holds its sockets' locks can hold up others.

use std::{path::PathBuf, time::Instant};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    access_log::{Direction, Entry, Verdict},
    agent,
    cluster::{Direct, Family, Pod, Side},
    config::{self, NAMESPACE},
    direct::where_direct_works,
    process::{Process, output},
    wait::{Look, seconds, wait_for},
};

const PYTHON: &str = "/usr/bin/python3";
const PORT: u16 = 7200;
/// Bytes that one key may seal here.
const LIMIT: u64 = 256 << 10;

fn steady(pod: &Pod, words: &[&str]) -> std::process::Command {
    let mut command = pod.command(PYTHON);
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/steady.py")).args(words);
    command
}

fn serve(pod: &Pod) -> Result<Process> {
    pod.serve("steady", &mut steady(pod, &["serve", &PORT.to_string()]), PORT)
}

fn call(client: &Pod, server: &Pod, what: &str, name: &str) -> Result<Process> {
    let (host, port) = (server.address(Family::V4).to_string(), PORT.to_string());
    let log = client.directory.join(format!("{name}.log"));
    Process::start(format!("{name} on {}", client.name), &mut steady(client, &[what, &host, &port]), &log)
}

fn wait_said(process: &Process, text: &str) -> Result<()> {
    wait_for(format!("{} to say {text:?}", process.name()), seconds(30), || {
        let log = process.log();
        Ok(if log.contains(text) { Look::Done(()) } else { Look::NotYet(log) })
    })
}

#[test]
fn a_key_that_has_sealed_enough_ends_its_connection_in_good_order_and_later_ones_last() -> Result<()> {
    let limited = Direct { extra: vec![format!("    keyLimit: {}Ki", LIMIT >> 10)], ..Direct::default() };
    where_direct_works(limited, |cluster| {
        let (client, server) = (cluster.filtered("client-a")?, cluster.filtered("server-b")?);
        let _server = serve(&server)?;
        let (host, port) = (server.address(Family::V4).to_string(), PORT.to_string());
        // A cipher without a limit is the kernel's, and it keeps none here.
        let sealed = agent::kernel_keeps_records()?;
        let more = if sealed { 4 * LIMIT } else { LIMIT / 4 };
        let said = output(&mut steady(&client, &["fill", &host, &port, &more.to_string()]), seconds(120))?;
        let said = String::from_utf8_lossy(&said.stdout).into_owned();
        println!("{}", said.trim());
        let rounds: Vec<(u64, &str)> = said
            .lines()
            .filter_map(|line| line.strip_prefix("rounds ")?.split_once(' '))
            .map(|(count, end)| Ok((count.parse()?, end)))
            .collect::<Result<_>>()?;
        let [first, second] = rounds[..] else { anyhow::bail!("two connections expected:\n{said}") };
        ensure!(["BrokenPipeError", "the end came"].contains(&first.1), "the first ended by {first:?}, no good order");
        ensure!(first.0 * 4096 >= LIMIT - LIMIT / 8, "the first ended too early: {first:?}");
        ensure!(second == (more / 4096, "enough"), "the second did not last: {second:?}");

        for (side, direction) in [(Side::A, Direction::Outbound), (Side::B, Direction::Inbound)] {
            let of = |entry: &Entry| {
                entry.direction == direction && entry.connects(&client, server.socket(Family::V4, PORT))
            };
            let entries = cluster.agent(side)?.wait_entries("both connections", 0, 2, of)?;
            let cipher = |entry: &Entry| entry.tls.as_ref().and_then(|tls| tls.cipher.clone()).unwrap_or_default();
            ensure!(entries.iter().all(|entry| entry.path.as_deref() == Some("direct")), "{entries:#?}");
            ensure!(entries[0].verdict == Verdict::Allowed && cipher(&entries[0]).contains("AES"), "{entries:#?}");
            if sealed {
                ensure!(cipher(&entries[1]).contains("CHACHA20"), "{entries:#?}");
            }
        }
        // Whose key was spent first is the schedulers' affair.
        let spent = [Side::A, Side::B].into_iter().filter_map(|side| cluster.agent(side).ok()?.entries().ok());
        let spent = spent.flatten().filter(|entry| entry.reason.as_deref() == Some("record_limit")).count();
        ensure!(spent >= 1, "nobody says that a key was spent");
        Ok(())
    })
}

#[test]
fn a_pod_that_holds_a_sockets_lock_holds_up_nobody_else() -> Result<()> {
    where_direct_works(Direct::default(), |cluster| {
        let (hostile, its_server) = (cluster.filtered("client-a")?, cluster.filtered("server-b")?);
        let (client, server) = (cluster.filtered("client-b")?, cluster.filtered("server-a")?);
        let _servers = [serve(&its_server)?, serve(&server)?];
        // More than the agent has threads for its own work.
        let mut holding: Vec<_> = (0..6)
            .map(|number| call(&hostile, &its_server, "hold", &format!("hold-{number}")))
            .collect::<Result<_>>()?;
        for held in &holding {
            wait_said(held, "holding")?;
        }
        let talk = call(&client, &server, "call", "talk").context("beside a pod that holds locks")?;
        wait_said(&talk, "echoes 3")?;
        let rule = |name: &str, app: &str| {
            format!(
                "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
                 spec: {{selector: {{matchLabels: {{app: {app}}}}}, action: DENY, rules: [{{}}]}}\n"
            )
        };
        // Also the hostile pod's own connections are to be ended: those of others do not wait for that.
        let rules = format!("{}---\n{}", rule("its-own", &its_server.name), rule("nobody", &server.name));
        cluster.reload(|cluster| {
            [Side::A, Side::B]
                .into_iter()
                .try_for_each(|side| config::replace(&cluster.config_directory(side).join("rules.yaml"), &rules))
        })?;
        let since = Instant::now();
        wait_said(&talk, "ended")?;
        println!("ended {:?} after the agents had the rules", since.elapsed());
        for held in &mut holding {
            ensure!(!held.log().contains("SHUT DOWN"), "the lock was not held, so this shows nothing:\n{}", held.log());
            held.kill()?;
        }
        // The pod itself is served again as soon as its locks are free.
        cluster.reload(|cluster| {
            [Side::A, Side::B]
                .into_iter()
                .try_for_each(|side| config::replace(&cluster.config_directory(side).join("rules.yaml"), ""))
        })?;
        let again = call(&hostile, &its_server, "call", "again")?;
        wait_said(&again, "echoes 3")?;
        let to = its_server.socket(Family::V4, PORT);
        let held = |entry: &Entry| entry.path.as_deref() == Some("direct") && entry.connects(&hostile, to);
        cluster.agent(Side::A)?.wait_entries("the held connections", 0, holding.len(), held).map(drop)
    })
}
