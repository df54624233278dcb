//! Counters against the truth: what programs have sent and received is what both agents count, to the byte, whoever moved it and
//! however the connections ended.
//!
//! Exact are connections of which both ends have received all that was sent before they ended, be it by a reset or by a kill. Of bytes
//! that were still on their way, the agents count what they have handed on.

use std::{path::PathBuf, process::Command};

use anyhow::{Context, Result, bail, ensure};
use marline_tests::{
    agent::Agent,
    amount::amount,
    cluster::{Cluster, ClusterSpec, Family, Pod, Side},
    config::Mode,
    metrics::Exposition,
    process::{Process, succeed},
    scenario::on_mesh,
    wait::{Look, seconds, wait_for},
};

const PORT: u16 = 7200;

fn program(pod: &Pod, words: &[&str]) -> Command {
    let mut command = pod.command("python3");
    command.arg(PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("programs/counted.py")).args(words);
    command
}

fn serve(pod: &Pod) -> Result<Process> {
    pod.serve("counted", &mut program(pod, &["serve", &PORT.to_string()]), PORT)
}

/// Bytes from the client and back.
fn moved(text: &str) -> Option<(f64, f64)> {
    let mut words = text.lines().find_map(|line| line.strip_prefix("moved "))?.split(' ');
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

/// One pair of workloads as an agent counts it.
struct Flow<'a> {
    agent: &'a Agent,
    labels: Vec<(&'static str, String)>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Count {
    opened: f64,
    closed: f64,
    up: f64,
    down: f64,
}

impl<'a> Flow<'a> {
    fn new(cluster: &'a Cluster, reporter: &str, from: &Pod, to: &Pod, policy: &str) -> Result<Self> {
        let side = if reporter == "source" { from.side } else { to.side };
        let labels = vec![
            ("reporter", reporter.to_owned()),
            ("source_workload", format!("{}-v4", from.name)),
            ("destination_workload", format!("{}-v4", to.name)),
            ("connection_security_policy", policy.to_owned()),
        ];
        Ok(Self { agent: cluster.agent(side)?, labels })
    }

    fn sum(&self, all: &Exposition, name: &str, more: &[(&str, &str)]) -> f64 {
        let labels: Vec<(&str, &str)> = self.labels.iter().map(|(key, value)| (*key, value.as_str())).collect();
        all.sum(name, &[&labels, more].concat())
    }

    fn count(&self, all: &Exposition) -> Count {
        Count {
            opened: self.sum(all, "istio_tcp_connections_opened_total", &[]),
            closed: self.sum(all, "istio_tcp_connections_closed_total", &[]),
            // Istio's words, at either reporter: received by the server, sent by the server.
            up: self.sum(all, "istio_tcp_received_bytes_total", &[]),
            down: self.sum(all, "istio_tcp_sent_bytes_total", &[]),
        }
    }

    /// Waits until it is counted so, and fails as soon as it is counted beyond that.
    fn wait(&self, what: &str, wanted: Count) -> Result<()> {
        wait_for(format!("{what} to be counted as {wanted:?}: {:?}", self.labels), seconds(30), || {
            let now = self.count(&self.agent.exposition()?);
            let beyond = now.opened > wanted.opened || now.closed > wanted.closed;
            if beyond || now.up > wanted.up || now.down > wanted.down {
                bail!("{what}: counted too much: {now:?} and not {wanted:?}");
            }
            Ok(if now == wanted { Look::Done(()) } else { Look::NotYet(format!("{now:?}")) })
        })
    }

    fn closed_with(&self, flags: &str) -> Result<f64> {
        let all = self.agent.exposition()?;
        Ok(self.sum(&all, "istio_tcp_connections_closed_total", &[("response_flags", flags)]))
    }
}

/// Programs that keep connections, until they are killed.
fn hold(pod: &Pod, to: &Pod, count: u32) -> Result<(Process, (f64, f64))> {
    let log = pod.directory.join(format!("hold-{}-{count}.log", to.name));
    let address = to.v4.to_string();
    let mut command = program(pod, &["hold", &address, &PORT.to_string(), &count.to_string()]);
    let process = Process::start(format!("a holder in {}", pod.name), &mut command, &log)?;
    let sums = wait_for(format!("{count} connections of {} to be held", pod.name), seconds(60), || {
        Ok(moved(&process.log()).map_or_else(|| Look::NotYet(process.log()), Look::Done))
    })?;
    Ok((process, sums))
}

fn counted_as_done(pump: &str, count: u32) -> Result<()> {
    let spec = ClusterSpec { extra: vec![format!("  pump: {pump}")], ..ClusterSpec::pairs(Mode::Permissive) };
    on_mesh(&spec, |cluster| {
        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let mut serving = serve(&server)?;
        let _plain = serve(&outside)?;
        let mtls = |reporter| Flow::new(cluster, reporter, &client, &server, "mutual_tls");
        let (at_source, at_destination) = (mtls("source")?, mtls("destination")?);
        let from_outside = Flow::new(cluster, "destination", &outside, &server, "none")?;
        let to_outside = Flow::new(cluster, "source", &client, &outside, "none")?;

        let plain = count / 5;
        for (from, to, count, flows) in [
            (&client, &server, count, vec![&at_source, &at_destination]),
            (&outside, &server, plain, vec![&from_outside]),
            (&client, &outside, plain, vec![&to_outside]),
        ] {
            let (address, port) = (to.v4.to_string(), PORT.to_string());
            let mut command = program(from, &["call", &address, &port, &count.to_string()]);
            let said = succeed(&mut command, seconds(240))?;
            let (up, down) = moved(&said).with_context(|| said.clone())?;
            let all = f64::from(count);
            for flow in flows {
                flow.wait(&format!("{count} connections"), Count { opened: all, closed: all, up, down })?;
                // A quarter each was reset by the client and by the server, wherever one looks from.
                let flags = ["-", "DC", "UC"].map(|flags| flow.closed_with(flags));
                let flags = flags.into_iter().collect::<Result<Vec<_>>>()?;
                ensure!(flags == [all / 2.0, all / 4.0, all / 4.0], "{:?} of {count}: {flags:?}", flow.labels);
            }
        }

        // Those that live are counted while they live, and once.
        let before = [&at_source, &at_destination, &from_outside]
            .map(|flow| Ok::<_, anyhow::Error>(flow.count(&flow.agent.exposition()?)));
        let [source, destination, plain] = before;
        let (source, destination, plain) = (source?, destination?, plain?);
        let (mut held, (up, down)) = hold(&client, &server, 12)?;
        let (mut held_plain, (plain_up, plain_down)) = hold(&outside, &server, 4)?;
        let more = |count: Count, opened, closed, up, down| Count {
            opened: count.opened + opened,
            closed: count.closed + closed,
            up: count.up + up,
            down: count.down + down,
        };
        at_source.wait("live ones", more(source, 12.0, 0.0, up, down))?;
        at_destination.wait("live ones", more(destination, 12.0, 0.0, up, down))?;
        from_outside.wait("live ones", more(plain, 4.0, 0.0, plain_up, plain_down))?;
        for (side, live, coverage, workload) in
            [(Side::A, 12.0, 1.0, "client-a-v4"), (Side::B, 16.0, 0.75, "server-b-v4")]
        {
            let all = cluster.agent(side)?.exposition()?;
            let (opened, closed) = (
                all.sum("istio_tcp_connections_opened_total", &[]),
                all.sum("istio_tcp_connections_closed_total", &[]),
            );
            let shown = all.sum("marline_connections_live", &[]);
            ensure!(opened - closed == live && shown == live, "{side:?}: {opened} - {closed}, {shown}, not {live}");
            let ratio = all.sum("marline_mtls_coverage_ratio", &[("workload", workload)]);
            ensure!(ratio == coverage, "{side:?}: mTLS covers {ratio} of {workload}, not {coverage}");
        }

        // A client that is killed, then a server.
        held.kill()?;
        held_plain.kill()?;
        at_source.wait("a killed client's", more(source, 12.0, 12.0, up, down))?;
        at_destination.wait("a killed client's", more(destination, 12.0, 12.0, up, down))?;
        from_outside.wait("a killed client's", more(plain, 4.0, 4.0, plain_up, plain_down))?;
        let (mut held, (again_up, again_down)) = hold(&client, &server, 9)?;
        at_destination.wait("another's", more(destination, 21.0, 12.0, up + again_up, down + again_down))?;
        serving.kill()?;
        held.kill()?;
        for (flow, before) in [(&at_source, source), (&at_destination, destination)] {
            flow.wait("a killed server's", more(before, 21.0, 21.0, up + again_up, down + again_down))?;
        }
        for side in Side::BOTH {
            let all = cluster.agent(side)?.exposition()?;
            ensure!(all.sum("marline_connections_live", &[]) == 0.0, "something lives on {side:?}");
            ensure!(all.series("marline_mtls_coverage_ratio", &[]).count() == 0, "of nothing there is no share");
            ensure!(all.sum("marline_connections_pending", &[]) == 0.0, "something is pending on {side:?}");
        }
        // The access log has the same sums, by the application's view.
        let log = cluster.agent(Side::B)?.entries()?;
        let inbound = log.iter().filter(|entry| entry.connects(&client, server.socket(Family::V4, PORT)));
        let received: u64 = inbound.map(|entry| entry.bytes_received).sum();
        let counted = destination.up + up + again_up;
        ensure!(received as f64 == counted, "the access log says {received} bytes, the metrics {counted}");
        Ok(())
    })
}

#[test]
fn every_byte_of_a_thousand_connections_is_counted_at_both_ends_while_the_kernel_splices() -> Result<()> {
    counted_as_done("splice", amount(1000, 40))
}

#[test]
fn the_same_where_the_agent_copies() -> Result<()> {
    counted_as_done("copy", amount(400, 40))
}
