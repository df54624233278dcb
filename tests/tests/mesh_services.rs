//! Services with virtual addresses: applications see the address that they asked for, and the agent chooses who answers.

use anyhow::{Result, ensure};
use marline_tests::{
    access_log::{Direction, Entry, Verdict},
    cluster::{Cluster, ClusterSpec, Direct, Family, Pod, Side},
    config::{self, Mode, NAMESPACE},
    direct::where_direct_works,
    process::Process,
    scenario::on_mesh,
    traffic::nginx::Nginx,
    wait::{Look, seconds, wait_for},
};

const HOST: &str = "pages.example";

#[test]
fn a_virtual_address_leads_to_endpoints_in_turn_and_past_those_that_refuse() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let client = cluster.pod("client-a")?;
        services(cluster, &client, "proxied")
    })
}

#[test]
fn direct_connections_go_to_endpoints_and_show_the_virtual_address() -> Result<()> {
    where_direct_works(Direct::default(), |cluster| {
        let client = cluster.filtered("client-a")?;
        services(cluster, &client, "direct")
    })
}

#[test]
fn destination_rules_are_heeded_by_the_clients_agent() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Permissive), |cluster| {
        let (client, server) = (cluster.pod("client-a")?, cluster.pod("server-b")?);
        let _pages = Nginx::start(&server, "from server-b")?;
        let at = |port: u16| [(server.v4.to_string(), port)];
        let text = [
            service(10, &at(80), "").replace(HOST, "limited.example"),
            service(11, &at(80), "").replace(HOST, "plain.example"),
            service(12, &at(80), "").replace(HOST, "named.example"),
            headless(&server.v6.to_string()),
            rule("headless", "tls: {mode: DISABLE}"),
            rule("limited", "connectionPool: {tcp: {maxConnections: 1, tcpKeepalive: {time: 7200s}}}"),
            rule("plain", "portLevelSettings: [{port: {number: 80}, tls: {mode: DISABLE}}]"),
            rule("named", "tls: {mode: ISTIO_MUTUAL, subjectAltNames: [\"spiffe://cluster.local/ns/demo/sa/nobody\"]}"),
        ];
        cluster.reload(|cluster| {
            let file = |side| cluster.config_directory(side).join("services.yaml");
            [Side::A, Side::B].into_iter().try_for_each(|side| config::replace(&file(side), &text.concat()))
        })?;
        let refused = |number: u8, reason: &str| -> Result<()> {
            let before = cluster.agent(Side::A)?.entries()?.len();
            let went = fetch(&client, Family::V4, number, 80);
            ensure!(went.is_err(), "{reason}: it went through: {went:?}");
            let with = |entry: &Entry| entry.reason.as_deref() == Some(reason);
            cluster.agent(Side::A)?.wait_entries(reason, before, 1, with).map(drop)
        };

        // One that is open, and then a second; after the first has ended there is room again.
        let script = format!(
            "exec 3<>/dev/tcp/{}/80; echo open; read -t 20 -u 3 line; echo closed",
            virtual_address(Family::V4, 10)
        );
        let mut command = client.command("bash");
        command.args(["-c", &script]);
        let mut open = Process::start("an open connection", &mut command, &client.directory.join("open.log"))?;
        wait_for("the first connection", seconds(20), || {
            let log = open.log();
            Ok(if log.contains("open") { Look::Done(()) } else { Look::NotYet(log) })
        })?;
        refused(10, "max_connections")?;
        open.kill()?;
        wait_for("room for another", seconds(20), || match fetch(&client, Family::V4, 10, 80) {
            Ok((page, _)) if page.contains("from server-b") => Ok(Look::Done(())),
            other => Ok(Look::NotYet(format!("{other:?}"))),
        })?;

        // PERMISSIVE takes plaintext of a pod of the mesh where a rule has told it to speak that, and from the same one mTLS.
        let of_pod = |family| if family == Family::V6 { format!("[{}]", server.v6) } else { server.v4.to_string() };
        for (address, host, mode) in [
            (virtual_address(Family::V4, 11), "plain.example", "plaintext"),
            (of_pod(Family::V6), "headless.example", "plaintext"),
            (of_pod(Family::V4), "", "mtls"),
        ] {
            let before =
                [Side::A, Side::B].map(|side| cluster.agent(side).and_then(|agent| Ok(agent.entries()?.len())));
            let [outbound, inbound] = before;
            let page =
                client.output("curl", &["-sS", "--fail", "-m", "20", &format!("http://{address}/")], seconds(30))?;
            ensure!(String::from_utf8_lossy(&page.stdout).contains("from server-b"), "{host}: {page:?}");
            let of_host = |entry: &Entry| entry.service.as_deref().unwrap_or_default() == host;
            let entries = cluster.agent(Side::A)?.wait_entries(host, outbound?, 1, of_host)?;
            ensure!(entries.iter().all(|entry| entry.mode.as_deref() == Some(mode)), "{entries:#?}");
            // The end of a connection before may be told only now, and is of another mode.
            cluster.agent(Side::B)?.wait_entries(host, inbound?, 1, |entry| entry.mode.as_deref() == Some(mode))?;
        }
        refused(12, "tls_config")
    })
}

fn rule(name: &str, policy: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: DestinationRule\nmetadata: {{name: {name}, namespace: {NAMESPACE}}}\n\
         spec: {{host: {name}.example, trafficPolicy: {{{policy}}}}}\n"
    )
}

/// A service at whose endpoint's own address clients call.
fn headless(endpoint: &str) -> String {
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: headless, namespace: {NAMESPACE}}}\n\
         spec: {{hosts: [headless.example], location: MESH_INTERNAL, resolution: STATIC,\n\
         ports: [{{number: 80, name: http}}], endpoints: [{{address: \"{endpoint}\"}}]}}\n"
    )
}

/// A virtual address for each thing that is tried.
fn virtual_address(family: Family, number: u8) -> String {
    match family {
        Family::V4 => format!("10.96.0.{number}"),
        Family::V6 => format!("fd96::{number}"),
    }
}

/// `endpoints` are addresses with the port where they listen.
fn service(number: u8, endpoints: &[(String, u16)], more: &str) -> String {
    let endpoints: Vec<String> = endpoints
        .iter()
        .map(|(address, port)| format!("{{address: \"{address}\", ports: {{http: {port}}}}}"))
        .collect();
    let (v4, v6) = (virtual_address(Family::V4, number), virtual_address(Family::V6, number));
    format!(
        "---\napiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: pages-{number}, namespace: {NAMESPACE}}}\n\
         spec: {{hosts: [{HOST}], addresses: [\"{v4}\", \"{v6}\"], location: MESH_INTERNAL, resolution: STATIC{more},\n\
         ports: [{{number: 80, name: http}}], endpoints: [{}]}}\n",
        endpoints.join(", ")
    )
}

/// What curl wrote, and the peer's address that it saw.
fn fetch(client: &Pod, family: Family, number: u8, port: u16) -> Result<(String, String)> {
    let address = virtual_address(family, number);
    let url =
        if family == Family::V6 { format!("http://[{address}]:{port}/") } else { format!("http://{address}:{port}/") };
    let output = client.output("curl", &["-sS", "--fail", "-m", "20", "-w", "\n%{remote_ip}", &url], seconds(30))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "curl {url}: {}{text}", String::from_utf8_lossy(&output.stderr));
    let (page, peer) = text.rsplit_once('\n').unwrap_or(("", ""));
    Ok((page.to_owned(), peer.to_owned()))
}

fn services(cluster: &mut Cluster, client: &Pod, path: &str) -> Result<()> {
    let (near, far) = (cluster.pod("server-a")?, cluster.pod("server-b")?);
    let outside = cluster.pod("outside")?;
    let _pages = [Nginx::start(&near, "from server-a")?, Nginx::start(&far, "from server-b")?];
    let both = |pod: &Pod, port: u16| [(pod.v4.to_string(), port), (pod.v6.to_string(), port)];
    let two = [both(&near, 80), both(&far, 80)].concat();
    // Where nobody listens, and no agent is before it.
    let refusing = [both(&outside, 81), both(&far, 80)].concat();
    let stranger = ", subjectAltNames: [\"spiffe://cluster.local/ns/demo/sa/somebody-else\"]";
    let text = [
        service(10, &two, ""),
        service(11, &refusing, ""),
        service(12, &both(&far, 80), stranger),
        service(13, &[], ""),
    ];
    cluster.reload(|cluster| {
        let file = |side| cluster.config_directory(side).join("services.yaml");
        [Side::A, Side::B].into_iter().try_for_each(|side| config::replace(&file(side), &text.concat()))
    })?;

    for family in Family::BOTH {
        let mut seen = [0, 0];
        for _ in 0..6 {
            let (page, peer) = fetch(client, family, 10, 80)?;
            ensure!(peer == virtual_address(family, 10), "curl saw {peer} at the other end");
            seen[0] += usize::from(page.contains("from server-a"));
            seen[1] += usize::from(page.contains("from server-b"));
        }
        ensure!(seen[0] + seen[1] == 6 && seen.iter().all(|count| *count >= 2), "not in turn: {seen:?}");
        for _ in 0..2 {
            let (page, _) = fetch(client, family, 11, 80)?;
            ensure!(page.contains("from server-b"), "past the one that refuses: {page}");
        }
    }
    let of = |entry: &Entry| entry.direction == Direction::Outbound && entry.service.as_deref() == Some(HOST);
    let entries = cluster.agent(Side::A)?.wait_entries("connections to the service", 0, 16, of)?;
    for server in [&near, &far] {
        let to = |entry: &&Entry| entry.destination.identity == Some(server.identity());
        ensure!(entries.iter().any(|entry| to(&entry)), "nothing to {}: {entries:#?}", server.name);
    }
    // The endpoint that refuses is not of the mesh, so that a connection that begins there cannot be direct.
    let way = |entry: &Entry| {
        let taken = entry.path.as_deref() == Some(path) || entry.path_reason.as_deref() == Some("plaintext");
        taken && entry.verdict == Verdict::Allowed
    };
    let direct = entries.iter().filter(|entry| entry.path.as_deref() == Some(path)).count();
    ensure!(direct >= 12, "{direct} of {} were {path}", entries.len());
    ensure!(entries.iter().all(way), "not all were {path}: {entries:#?}");

    for (number, port, reason) in [(12, 80, "tls_config"), (13, 80, "no_endpoint"), (10, 99, "no_port")] {
        let before = cluster.agent(Side::A)?.entries()?.len();
        let refused = fetch(client, Family::V4, number, port);
        ensure!(refused.is_err(), "{reason}: it went through: {refused:?}");
        let with = |entry: &Entry| entry.reason.as_deref() == Some(reason);
        let entries = cluster.agent(Side::A)?.wait_entries(reason, before, 1, with)?;
        ensure!(entries.iter().all(|entry| entry.verdict == Verdict::Refused), "{entries:#?}");
    }
    Ok(())
}
