//! The agent comes, goes, dies and is told nonsense: enrolled pods are closed rather than open, applications are told the truth,
//! and what has worked goes on working.

use std::{fs, os::unix::fs::symlink};

use anyhow::{Result, ensure};
use marline_tests::{
    agent::check_config,
    capture::LinkCapture,
    cluster::{Cluster, ClusterSpec, Family, Membership, PodSpec, Side, network, remains},
    config::{Mode, NAMESPACE, replace},
    netns,
    process::Process,
    scenario::{on_mesh, on_network},
    traffic::redis::Redis,
    wait::{Look, seconds, wait_for},
};

const TALKER: &str = env!("CARGO_BIN_EXE_talker");
const MARKER: &str = "marker-of-the-lifecycle";
const PORT: u16 = 7000;

/// The mode in which it is easiest to speak plaintext by mistake.
fn permissive() -> ClusterSpec {
    ClusterSpec::pairs(Mode::Permissive)
}

#[test]
fn without_its_agent_a_pod_reaches_nobody_and_nobody_reaches_it_until_the_agent_is_back() -> Result<()> {
    on_mesh(&permissive(), |cluster| {
        let (client, server, outside) = (cluster.pod("client-a")?, cluster.pod("server-b")?, cluster.pod("outside")?);
        let (redis, public) = (Redis::start(&server, MARKER)?, Redis::start(&outside, MARKER)?);
        let mut capture = LinkCapture::start(cluster, &[MARKER])?;
        for family in Family::BOTH {
            ensure!(redis.set_and_get(&client, server.address(family))?.exact, "before");
        }
        let before = capture.wire()?.streams.len();

        cluster.agent_mut(Side::A)?.kill()?;
        for family in Family::BOTH {
            // To a member of the mesh, to a pod outside of it on the same node, and nowhere.
            for address in [server.socket(family, redis.port()), outside.socket(family, public.port())] {
                let said = client.output(TALKER, &["ask", &address.to_string()], seconds(20))?;
                let said = String::from_utf8_lossy(&said.stdout).trim().to_owned();
                ensure!(said == "connect: ECONNREFUSED", "{address}, agent a is dead: {said}");
            }
        }
        let wire = capture.wire()?;
        ensure!(wire.streams.len() == before, "something left: {:#?}", &wire.streams[before..]);
        cluster.start_agent(Side::A)?;
        for family in Family::BOTH {
            ensure!(redis.set_and_get(&client, server.address(family))?.exact, "agent a is back");
        }

        cluster.agent_mut(Side::B)?.kill()?;
        for family in Family::BOTH {
            let address = server.address(family);
            // PERMISSIVE would let both in; nobody is there to decide it.
            for from in [&outside, &client] {
                let outcome = redis.set_and_get(from, address);
                ensure!(outcome.is_err(), "agent b is dead and {} reaches {address}: {outcome:?}", from.name);
            }
        }
        cluster.start_agent(Side::B)?;
        for family in Family::BOTH {
            // Agent a may still hold for a second that it was refused.
            wait_for("client-a to reach server-b again", seconds(10), || {
                Ok(match redis.set_and_get(&client, server.address(family)) {
                    Ok(seen) if seen.exact => Look::Done(()),
                    Ok(seen) => Look::NotYet(format!("{seen:?}")),
                    Err(error) => Look::NotYet(format!("{error:#}")),
                })
            })?;
            ensure!(redis.set_and_get(&outside, server.address(family))?.exact, "agent b is back, from outside");
        }
        // The pod outside was let in by PERMISSIVE just now: everything of the members is TLS.
        let wire = capture.finish()?;
        let members = wire.streams.iter().filter(|stream| stream.client.ip() != outside.address(Family::V4));
        let members = members.filter(|stream| stream.client.ip() != outside.address(Family::V6));
        for stream in members {
            ensure!(stream.not_tls() == 0, "plaintext of a member: {stream:?}");
        }
        Ok(())
    })
}

#[test]
fn an_agent_that_is_stopped_or_killed_resets_transfers_and_does_not_end_them() -> Result<()> {
    on_mesh(&permissive(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let mut command = server.command(TALKER);
        let _spout = server.serve("spout", command.args(["spout", &PORT.to_string()]), PORT)?;
        for (round, (side, kill)) in
            [(Side::A, false), (Side::A, true), (Side::B, false), (Side::B, true)].into_iter().enumerate()
        {
            let family = Family::BOTH[round % 2];
            let log = client.directory.join(format!("drink-{round}.log"));
            let address = server.socket(family, PORT).to_string();
            let mut drinker = Process::start("drinker", client.command(TALKER).args(["drink", &address]), &log)?;
            wait_log(&drinker, "drinking")?;
            let agent = cluster.agent_mut(side)?;
            if kill {
                agent.kill()?;
            } else {
                let status = agent.stop()?;
                ensure!(status.success(), "told to stop, agent {} ended with {status}", side.letter());
            }
            let status = drinker.wait(seconds(20))?;
            let how = format!("agent {} {}", side.letter(), if kill { "killed" } else { "stopped" });
            ensure!(!status.success() && drinker.log().contains("read: ECONNRESET"), "{how}: {}", drinker.log());
            cluster.start_agent(side)?;
        }
        Ok(())
    })
}

#[test]
fn pods_come_and_go_while_the_agents_run_and_others_do_not_notice() -> Result<()> {
    on_mesh(&permissive(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let mut command = server.command(TALKER);
        let _spout = server.serve("spout", command.args(["spout", &PORT.to_string()]), PORT)?;
        let log = client.directory.join("drink.log");
        let address = server.socket(Family::V4, PORT).to_string();
        let mut drinker = Process::start("drinker", client.command(TALKER).args(["drink", &address]), &log)?;
        wait_log(&drinker, "drinking")?;

        // Twice the same name: another namespace, another address.
        for round in 1..=2 {
            let guest = cluster.create_pod(&PodSpec::new("guest", Side::B, Membership::Mesh))?;
            cluster.reload(Cluster::write_config)?;
            cluster.agent(Side::B)?.wait_pod("guest", true)?;
            let redis = Redis::start(&guest, MARKER)?;
            for family in Family::BOTH {
                let before = entries_of(cluster, Side::A)?;
                ensure!(redis.set_and_get(&client, guest.address(family))?.exact, "round {round}");
                let to = guest.socket(family, redis.port());
                let entries = cluster
                    .agent(Side::A)?
                    .wait_entries("the guest", before, 1, |entry| entry.connects(&client, to))?;
                let proven = entries.iter().all(|entry| entry.destination.identity.as_ref() == Some(&guest.identity()));
                ensure!(proven, "round {round}: {entries:#?}");
            }
            cluster.remove_pod("guest")?;
            cluster.reload(Cluster::write_config)?;
            cluster.agent(Side::B)?.wait_pod("guest", false)?;
        }
        ensure!(drinker.ended()?.is_none(), "another pod's transfer was disturbed: {}", drinker.log());
        Ok(())
    })
}

#[test]
fn a_pod_that_could_not_be_let_go_at_first_is_as_soon_as_it_can_be() -> Result<()> {
    on_mesh(&permissive(), |cluster| {
        let guest = cluster.create_pod(&PodSpec::new("guest", Side::B, Membership::Mesh))?;
        cluster.reload(Cluster::write_config)?;
        cluster.agent(Side::B)?.wait_pod("guest", true)?;
        let outside = cluster.pod("outside")?;
        let mut command = outside.command(TALKER);
        let _echo = outside.serve("echo", command.args(["echo", &PORT.to_string()]), PORT)?;

        // While it cannot be told where another pod's path leads, it may lead to the guest.
        let (nowhere, agent) = (cluster.directory().join("nowhere"), cluster.agent(Side::B)?);
        symlink(&nowhere, &nowhere)?;
        let said = agent.log().len();
        cluster.reload(|cluster| {
            let directory = cluster.config_directory(Side::B);
            let unknown = format!(
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: unknown\n  namespace: {NAMESPACE}\n  \
                 annotations:\n    marline.io/netns: {}\nspec:\n  address: 10.77.9.9\n  serviceAccount: unknown\n",
                nowhere.display()
            );
            fs::write(directory.join("unknown.yaml"), unknown)?;
            let (workloads, label) = (directory.join("workloads.yaml"), "    app: guest\n");
            let text = fs::read_to_string(&workloads)?.replace(label, &format!("{label}    marline.io/mesh: disabled\n"));
            replace(&workloads, &text)?;
            // `reload` waits for a change on both nodes.
            let rules = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: none, namespace: nowhere}\nspec: {}\n";
            fs::write(cluster.config_directory(Side::A).join("rules.yaml"), rules).map_err(Into::into)
        })?;
        agent.wait_pod("guest", false)?;
        agent.wait_log("that the guest stays closed", said, |log| log.contains("stays closed for now"))?;
        let ask = || -> Result<String> {
            let address = outside.socket(Family::V4, PORT).to_string();
            let said = guest.output(TALKER, &["ask", &address], seconds(20))?;
            Ok(String::from_utf8_lossy(&said.stdout).trim().to_owned())
        };
        let refused = ask()?;
        ensure!(!refused.starts_with("answer"), "it was opened: {refused}");

        fs::remove_file(&nowhere)?;
        wait_for("the guest to be let go", seconds(20), || {
            let said = ask()?;
            Ok(if said.starts_with("answer") { Look::Done(()) } else { Look::NotYet(said) })
        })
    })
}

#[test]
fn of_a_namespace_that_was_replaced_at_its_path_nothing_is_left_once_it_is_no_more() -> Result<()> {
    on_mesh(&permissive(), |cluster| {
        let guest = cluster.create_pod(&PodSpec::new("guest", Side::B, Membership::Mesh))?;
        cluster.reload(Cluster::write_config)?;
        let agent = cluster.agent(Side::B)?;
        agent.wait_pod("guest", true)?;
        let links = remains::pins(&network::node_name(cluster.name(), Side::B)).join("links");
        let enrolled = || -> Result<usize> {
            let mut names = fs::read_dir(&links)?.map(|entry| Ok(entry?.file_name()));
            names.try_fold(0, |count, name: Result<_>| {
                Ok(count + usize::from(name?.to_string_lossy().starts_with("inbound-")))
            })
        };
        let pods = enrolled()?;
        let mut command = guest.command(TALKER);
        let mut lives = guest.serve("echo", command.args(["echo", &PORT.to_string()]), PORT)?;
        for _ in 0..2 {
            let said = agent.log().len();
            let (node, name) =
                (network::node_name(cluster.name(), Side::B), network::pod_name(cluster.name(), &guest.name));
            let index = guest.v4.octets()[3];
            // Its tie would live as long as the namespace.
            netns::ip_batch(&node, &[format!("link del pod{index}")])?;
            netns::remove(&name)?;
            network::create_pod(cluster.name(), guest.side, &guest.name, index)?;
            agent.wait_log("that it was replaced", said, |log| log.contains("namespace was replaced"))?;
            agent.wait_pod("guest", true)?;
        }
        // The second has nobody in it, the first a program.
        let wait = |what: &str, count: usize| {
            wait_for(what, seconds(20), || {
                let now = enrolled()?;
                Ok(if now == count { Look::Done(()) } else { Look::NotYet(format!("{now} are enrolled")) })
            })
        };
        wait("the second to be forgotten", pods + 1)?;
        lives.kill()?;
        wait("the first to be forgotten", pods)
    })
}

#[test]
fn a_change_that_is_wrong_is_refused_by_name_and_the_last_good_one_stays() -> Result<()> {
    on_mesh(&permissive(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let redis = Redis::start(&server, MARKER)?;
        let works = |cluster: &Cluster| -> Result<()> {
            for family in Family::BOTH {
                ensure!(redis.set_and_get(&client, server.address(family))?.exact);
            }
            Side::BOTH.iter().try_for_each(|side| {
                ensure!(cluster.agent(*side)?.is_ready()?, "agent {} is not ready any more", side.letter());
                Ok(())
            })
        };
        works(cluster)?;
        let wrong = cluster.config_directory(Side::B).join("wrong.yaml");
        for (text, field) in [
            ("kind: [", "wrong.yaml"),
            (
                "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata:\n  name: x\n  namespace: istio-system\nspec:\n  mtls:\n    mode: STRCT\n",
                "mtls.mode",
            ),
            (
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: x\n  namespace: demo\nspec:\n  address: nowhere\n",
                "spec.address",
            ),
        ] {
            let agent = cluster.agent(Side::B)?;
            let (before, said) = (agent.reloads()?, agent.log().len());
            fs::write(&wrong, text)?;
            agent.wait_rejected(before)?;
            agent.wait_log(field, said, |said| said.contains("wrong.yaml") && said.contains(field))?;
            works(cluster)?;
        }
        fs::remove_file(&wrong)?;
        cluster.change_mode(Mode::Strict)?;
        works(cluster)
    })
}

#[test]
fn a_configuration_that_is_wrong_at_the_start_ends_the_agent_with_2_and_every_error() -> Result<()> {
    on_network(&permissive(), |cluster| {
        let directory = cluster.config_directory(Side::A);
        let cases = [
            ("one.yaml", "kind: [", "one.yaml"),
            (
                "two.yaml",
                "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: x\n  namespace: demo\nspec:\n  address: nowhere\n",
                "spec.address",
            ),
            ("three.yaml", "apiVersion: v1\nkind: Unheard\nmetadata:\n  name: y\n", "three.yaml"),
        ];
        for (file, text, _) in cases {
            fs::write(directory.join(file), text)?;
        }
        let agent = cluster.launch_agent(Side::A)?;
        let status = agent.wait_end(seconds(20))?;
        ensure!(status.code() == Some(2), "the agent ended with {status}");
        let checked = check_config(&directory)?;
        ensure!(checked.status.code() == Some(2), "check-config ended with {}", checked.status);
        let checked = String::from_utf8_lossy(&[checked.stdout, checked.stderr].concat()).into_owned();
        for said in [agent.log(), checked] {
            for (file, _, named) in cases {
                ensure!(said.contains(file) && said.contains(named), "{file}: {named} is not named: {said}");
            }
        }
        for (file, ..) in cases {
            fs::remove_file(directory.join(file))?;
        }
        cluster.start_agent(Side::A).map(|_| ())
    })
}

#[test]
fn a_second_agent_for_the_same_pods_is_turned_away_and_the_first_goes_on() -> Result<()> {
    on_mesh(&permissive(), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let redis = Redis::start(&server, MARKER)?;
        let node = cluster.node(Side::A);
        let config = cluster.config_directory(Side::A);
        let mut second = node.command(marline_tests::agent::binary()?);
        let output = marline_tests::process::output(second.args(["agent", "--config"]).arg(&config), seconds(20))?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success(), "a second agent runs: {said}");
        ensure!(said.contains(&node_pins(cluster)), "it does not say what is in use: {said}");
        ensure!(redis.set_and_get(&client, server.address(Family::V6))?.exact, "the first was disturbed");
        Ok(())
    })
}

fn node_pins(cluster: &Cluster) -> String {
    format!("{}-a", cluster.name())
}

fn entries_of(cluster: &Cluster, side: Side) -> Result<usize> {
    Ok(cluster.agent(side)?.entries()?.len())
}

fn wait_log(process: &Process, text: &str) -> Result<()> {
    wait_for(format!("{} to say {text}", process.name()), seconds(20), || {
        let said = process.log();
        Ok(if said.contains(text) { Look::Done(()) } else { Look::NotYet(said) })
    })
}
