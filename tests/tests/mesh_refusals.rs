//! What cannot be reached is refused, at once and truthfully; what need not go through the mesh does not.

use anyhow::{Context, Result, ensure};
use marline_tests::{
    access_log::Verdict,
    amount::amount,
    cluster::{ClusterSpec, Family, Pod},
    config::Mode,
    flow::{Before, Route},
    netns,
    process::Process,
    scenario::on_mesh,
    wait::seconds,
};

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const PORT: u16 = 7000;
const NOBODY: u16 = 7001;

fn strict() -> ClusterSpec {
    ClusterSpec::pairs(Mode::Strict)
}

fn echo(pod: &Pod) -> Result<Process> {
    pod.serve("echo", pod.command(TALKER).args(["echo", &PORT.to_string()]), PORT)
}

/// What the talker says in a pod, whatever its exit code.
fn talk(pod: &Pod, words: &[&str]) -> Result<String> {
    let output = pod.output(TALKER, words, seconds(60))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

#[test]
fn a_dead_port_is_refused_not_hung_and_the_second_try_is_told_by_connect_itself() -> Result<()> {
    on_mesh(&strict(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        for family in Family::BOTH {
            let address = server.socket(family, NOBODY);
            let route = Route { client: &client, server: &server, family, connections: 1 };
            let before = Before::now(cluster, route)?;
            let script = r#""$0" ask "$1"; "$0" ask "$1""#;
            let output = client.output("sh", &["-c", script, TALKER, &address.to_string()], seconds(20))?;
            let said = String::from_utf8_lossy(&output.stdout).into_owned();
            let (first, second) =
                said.trim().split_once('\n').with_context(|| format!("two lines expected: {said}"))?;
            // The agent accepts before it knows; then the connection is reset, never ended as if it had been served.
            let refused = ["connect: ECONNREFUSED", "write: ECONNRESET", "write: EPIPE", "read: ECONNRESET"];
            ensure!(refused.contains(&first), "{address}: the first try: {first}");
            ensure!(second == "connect: ECONNREFUSED", "{address}: the second try: {second}");
            let (outbound, _) = before.entries(cluster, NOBODY)?;
            ensure!(outbound.iter().all(|entry| entry.bytes_received == 0), "{outbound:#?}");
        }
        Ok(())
    })
}

#[test]
fn a_pod_reaches_its_own_service_without_the_mesh() -> Result<()> {
    on_mesh(&strict(), |cluster| {
        let server = cluster.pod("server-b")?;
        let _echo = echo(&server)?;
        let addresses = ["127.0.0.1:7000".parse()?, "[::1]:7000".parse()?];
        for address in Family::BOTH.map(|family| server.socket(family, PORT)).into_iter().chain(addresses) {
            let said = talk(&server, &["ask", &address.to_string()])?;
            ensure!(said == r#"answer "hello?\n""#, "{address}: {said}");
        }
        let entries = cluster.agent(server.side)?.entries()?;
        ensure!(entries.is_empty(), "the agent had a part in it: {entries:#?}");
        Ok(())
    })
}

#[test]
fn many_threads_at_once_all_get_their_own_bytes() -> Result<()> {
    on_mesh(&strict(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _echo = echo(&server)?;
        let count = amount("300", "60");
        for family in Family::BOTH {
            let said = talk(&client, &["many", &server.socket(family, PORT).to_string(), count, "50"])?;
            ensure!(said == format!("{count} echoes"), "over {}: {said}", family.as_str());
        }
        Ok(())
    })
}

#[test]
fn a_program_that_connects_to_the_agents_listeners_itself_gets_nothing() -> Result<()> {
    on_mesh(&strict(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-a")?);
        let _echo = echo(&server)?;
        // Nobody else listens in the client.
        let mut ports = netns::listening(&client.place.netns)?;
        ports.sort_unstable();
        ports.dedup();
        ensure!(!ports.is_empty(), "the agent does not listen in the pod");
        for port in ports {
            for host in ["127.0.0.1".to_owned(), "[::1]".to_owned(), client.v4.to_string(), format!("[{}]", client.v6)]
            {
                let address = format!("{host}:{port}");
                let said = talk(&client, &["ask", &address])?;
                ensure!(!said.starts_with("answer") || said == r#"answer """#, "{address} answers: {said}");
            }
            // From a neighbour, whose connection goes through the mesh, that port is one like any other: nobody serves it.
            let said = talk(&server, &["ask", &format!("{}:{port}", client.v4)])?;
            ensure!(!said.starts_with("answer"), "{port}, from a neighbour: {said}");
        }
        let entries = cluster.agent(client.side)?.entries()?;
        ensure!(entries.iter().all(|entry| entry.bytes_received == 0), "bytes came back: {entries:#?}");
        let direct = entries.iter().filter(|entry| entry.reason.as_deref() == Some("not_captured"));
        ensure!(direct.clone().count() > 0, "no entry tells of a program that came by itself: {entries:#?}");
        ensure!(direct.clone().all(|entry| entry.verdict == Verdict::Refused));
        Ok(())
    })
}

#[test]
fn a_server_binds_its_port_again_while_connections_of_its_predecessor_linger() -> Result<()> {
    on_mesh(&strict(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        for family in Family::BOTH {
            let address = server.socket(family, PORT).to_string();
            let mut spout = server.serve("spout", server.command(TALKER).args(["spout", &PORT.to_string()]), PORT)?;
            let log = client.directory.join(format!("drink-{}.log", family.as_str()));
            let mut command = client.command(TALKER);
            let mut drinker = Process::start("drinker", command.args(["drink", &address]), &log)?;
            marline_tests::wait::wait_for("the transfer to be under way", seconds(20), || {
                use marline_tests::wait::Look;
                let said = drinker.log();
                Ok(if said.contains("drinking") { Look::Done(()) } else { Look::NotYet(said) })
            })?;
            spout.kill()?;
            drop(echo(&server)?);
            drinker.kill()?;
        }
        Ok(())
    })
}
