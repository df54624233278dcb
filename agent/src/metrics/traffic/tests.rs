//! What is counted against what was done.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use super::*;
use crate::{
    identity::{SpiffeId, TrustDomain},
    metrics::Metrics,
    metrics::{Others, table::KEPT},
    policy::{Labels, Policies, Service, ServiceEndpoint, Workload},
    words::Endpoint,
};

fn workload(name: &str, address: IpAddr, labels: &[(&str, &str)]) -> Arc<Workload> {
    Arc::new(Workload {
        name: name.into(),
        namespace: "shop".into(),
        service_account: name.into(),
        id: SpiffeId::new(&TrustDomain::default(), "shop", name).unwrap(),
        addresses: vec![address],
        in_mesh: true,
        labels: labels.iter().copied().collect::<Labels>(),
        host: Workload::host_of(name, "shop"),
    })
}

fn address(number: u32) -> SocketAddr {
    SocketAddr::new(IpAddr::V4(Ipv4Addr::from(0x0a00_0000 + number)), 80)
}

/// `web` at 10.0.0.1 behind a service, and its client at 10.0.0.2.
fn mesh() -> Snapshot {
    let web = workload("web-v4", address(1).ip(), &[("app", "web"), ("version", "v1")]);
    let client = workload("client", address(2).ip(), &[("service.istio.io/workload-name", "deployed")]);
    let endpoint = ServiceEndpoint { address: address(1), workload: Some(web.clone()), zone: None };
    let service = Service {
        host: "web.shop.svc.cluster.local".into(),
        namespace: "shop".into(),
        addresses: vec!["10.96.0.1".parse().unwrap()],
        ports: std::collections::BTreeMap::from([(80, vec![endpoint])]),
        ..Service::default()
    };
    Snapshot::new(Policies::default(), TrustDomain::default(), vec![web, client], Vec::new())
        .with_services(vec![Arc::new(service)])
}

fn end(snapshot: &Snapshot, address: SocketAddr) -> Endpoint {
    let workload = snapshot.workload(address.ip());
    Endpoint {
        address: Some(address),
        workload: workload.map(|workload| workload.name.clone()),
        namespace: workload.map(|workload| workload.namespace.clone()),
        identity: workload.map(|workload| workload.id.to_string()),
    }
}

fn open(metrics: &Metrics, snapshot: &Snapshot, direction: Direction, client: SocketAddr, mode: Mode) -> Open {
    let (source, destination) = (end(snapshot, client), end(snapshot, address(1)));
    let proved = (mode == Mode::Mtls).then(|| SpiffeId::new(&TrustDomain::default(), "shop", "client").unwrap());
    let seen = Seen {
        direction,
        source: &source,
        destination: &destination,
        service: None,
        mode: Some(mode),
        proved: proved.as_ref(),
    };
    metrics.opened(snapshot, &seen, Some(mode), Progress::default())
}

fn moved(sent: u64, received: u64) -> Progress {
    Progress { sent, received, ..Progress::default() }
}

fn text(metrics: &Metrics) -> String {
    metrics.render(Others::default())
}

/// The sum of a metric's series that carry all the labels.
fn sum(text: &str, name: &str, labels: &[&str]) -> f64 {
    let series = text.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('{')?.split_once("} "));
    series
        .filter(|(all, _)| labels.iter().all(|label| all.contains(label)))
        .map(|(_, v)| v.parse::<f64>().unwrap())
        .sum()
}

#[test]
fn labels_are_istios_at_either_reporter() {
    let (metrics, snapshot) = (Metrics::new(), mesh());
    let inbound = open(&metrics, &snapshot, Direction::Inbound, address(2), Mode::Mtls);
    let line = |text: &str| {
        text.lines().find(|line| line.starts_with("istio_tcp_connections_opened_total")).unwrap().to_owned()
    };
    let shown = line(&text(&metrics));
    let expected = [
        "reporter=\"destination\"",
        "source_workload=\"deployed\"",
        "source_workload_namespace=\"shop\"",
        "source_principal=\"spiffe://cluster.local/ns/shop/sa/client\"",
        "source_app=\"unknown\"",
        "source_canonical_service=\"deployed\"",
        "source_canonical_revision=\"latest\"",
        "destination_workload=\"web-v4\"",
        "destination_principal=\"spiffe://cluster.local/ns/shop/sa/web-v4\"",
        "destination_app=\"web\"",
        "destination_version=\"v1\"",
        "destination_canonical_service=\"web\"",
        "destination_canonical_revision=\"v1\"",
        "destination_service=\"web.shop.svc.cluster.local\"",
        "destination_service_name=\"web\"",
        "destination_service_namespace=\"shop\"",
        "request_protocol=\"tcp\"",
        "response_flags=\"-\"",
        "connection_security_policy=\"mutual_tls\"",
    ];
    for label in expected {
        assert!(shown.contains(label), "{label} in {shown}");
    }
    drop(inbound);
}

#[test]
fn in_plaintext_nobody_is_a_principal_and_a_stranger_is_unknown() {
    let (metrics, snapshot) = (Metrics::new(), mesh());
    let _live = open(&metrics, &snapshot, Direction::Inbound, address(99), Mode::Plaintext);
    let labels = [
        "source_workload=\"unknown\"",
        "source_principal=\"unknown\"",
        "destination_principal=\"unknown\"",
        "connection_security_policy=\"none\"",
    ];
    assert_eq!(sum(&text(&metrics), "istio_tcp_connections_opened_total", &labels), 1.0);
}

#[test]
fn bytes_are_counted_while_a_connection_lives_and_never_twice() {
    let (metrics, snapshot) = (Metrics::new(), mesh());
    let outbound = open(&metrics, &snapshot, Direction::Outbound, address(2), Mode::Mtls);
    let inbound = open(&metrics, &snapshot, Direction::Inbound, address(2), Mode::Mtls);
    let sums = || {
        let text = text(&metrics);
        ["source", "destination"].map(|reporter| {
            let label = format!("reporter=\"{reporter}\"");
            ["istio_tcp_received_bytes_total", "istio_tcp_sent_bytes_total"].map(|name| sum(&text, name, &[&label]))
        })
    };
    // The client has sent 100 and received 7: its agent's application is the source, the server's agent sees it from the other end.
    outbound.report(moved(100, 7));
    inbound.report(moved(7, 100));
    assert_eq!(sums(), [[100.0, 7.0]; 2]);
    outbound.report(moved(100, 7));
    assert_eq!(sums(), [[100.0, 7.0]; 2]);
    outbound.close(ResponseFlags::None, moved(150, 7));
    inbound.close(ResponseFlags::DownstreamTermination, moved(7, 150));
    assert_eq!(sums(), [[150.0, 7.0]; 2]);
    let text = text(&metrics);
    assert_eq!(
        sum(&text, "istio_tcp_connections_closed_total", &["response_flags=\"DC\"", "reporter=\"destination\""]),
        1.0
    );
    assert_eq!(sum(&text, "marline_workload_bytes_total", &["mode=\"mtls\""]), 314.0);
}

#[test]
fn what_is_opened_and_not_closed_lives_and_the_coverage_is_of_those() {
    let (metrics, snapshot) = (Metrics::new(), mesh());
    let mut live: Vec<Open> =
        (0..3).map(|_| open(&metrics, &snapshot, Direction::Inbound, address(2), Mode::Mtls)).collect();
    live.push(open(&metrics, &snapshot, Direction::Inbound, address(99), Mode::Plaintext));
    let state = |text: &str| {
        let opened = sum(text, "istio_tcp_connections_opened_total", &[]);
        let closed = sum(text, "istio_tcp_connections_closed_total", &[]);
        let live = text.lines().find_map(|line| line.strip_prefix("marline_connections_live ")).unwrap();
        (
            opened,
            closed,
            live.parse::<f64>().unwrap(),
            sum(text, "marline_mtls_coverage_ratio", &["workload=\"web-v4\""]),
        )
    };
    assert_eq!(state(&text(&metrics)), (4.0, 0.0, 4.0, 0.75));
    live.pop().unwrap().close(ResponseFlags::None, Progress::default());
    assert_eq!(state(&text(&metrics)), (4.0, 1.0, 3.0, 1.0));
    live.clear();
    assert_eq!(state(&text(&metrics)), (4.0, 4.0, 0.0, 0.0));
    assert!(!text(&metrics).contains("marline_mtls_coverage_ratio{"), "of nothing there is no share");
}

#[test]
fn a_hundred_thousand_peers_make_no_more_series_than_there_is_room_for_and_every_byte_is_counted() {
    const PEERS: u32 = 100_000;
    let metrics = Metrics::new();
    let peers =
        (0..PEERS).map(|number| workload(&format!("peer-{number}"), address(1000 + number).ip(), &[])).collect();
    let snapshot = Snapshot::new(Policies::default(), TrustDomain::default(), peers, Vec::new());
    for number in 0..PEERS {
        let (source, destination) = (end(&snapshot, address(1000 + number)), end(&snapshot, address(1)));
        let host = format!("host-{number}.example");
        let seen = Seen {
            direction: Direction::Inbound,
            source: &source,
            destination: &destination,
            service: Some(&host),
            mode: Some(Mode::Mtls),
            proved: None,
        };
        let live = metrics.opened(&snapshot, &seen, Some(Mode::Mtls), Progress::default());
        live.close(ResponseFlags::ALL[number as usize % ResponseFlags::ALL.len()], moved(1, 2));
        let policy = format!("AuthorizationPolicy shop/{number}");
        let ended =
            crate::metrics::Ended { mode: None, verdict: "refused", reason: Some("policy"), policy: Some(&policy) };
        metrics.ended(Direction::Inbound, &ended);
    }
    let text = text(&metrics);
    let series = |name: &str| text.lines().filter(|line| line.starts_with(name)).count();
    for name in ["istio_tcp_connections_opened_total", "istio_tcp_sent_bytes_total", "istio_tcp_received_bytes_total"] {
        assert_eq!(series(name), FLOWS + 1, "{name}");
    }
    assert!(series("istio_tcp_connections_closed_total") <= FLOWS + ResponseFlags::ALL.len());
    assert_eq!(series("marline_policy_denials_total"), DENIALS + 1);
    for (name, total) in [
        ("istio_tcp_connections_opened_total", 1.0),
        ("istio_tcp_connections_closed_total", 1.0),
        ("istio_tcp_sent_bytes_total", 1.0),
        ("istio_tcp_received_bytes_total", 2.0),
        ("marline_policy_denials_total", 1.0),
    ] {
        assert_eq!(sum(&text, name, &[]), total * f64::from(PEERS), "{name}");
    }
    assert_eq!(sum(&text, "marline_metrics_overflowed_total", &["table=\"flows\""]), f64::from(PEERS) - FLOWS as f64);

    // When they have all left, and some time has passed, there is room again.
    let now = Instant::now();
    metrics.forget(now, &|_, _| false);
    metrics.forget(now + KEPT, &|_, _| false);
    let text = metrics.render(Others::default());
    for name in ["istio_tcp_connections_opened_total", "marline_policy_denials_total"] {
        assert_eq!(text.lines().filter(|line| line.starts_with(name)).count(), 1, "{name}");
    }
}

#[test]
fn a_workload_that_speaks_plaintext_alone_has_a_share_of_zero() {
    let (metrics, snapshot) = (Metrics::new(), mesh());
    let _live = open(&metrics, &snapshot, Direction::Inbound, address(99), Mode::Plaintext);
    let text = text(&metrics);
    let of = |mode: &str| {
        let series =
            text.lines().find(|line| line.starts_with("marline_workload_connections_total") && line.contains(mode));
        series.and_then(|line| line.rsplit_once(' ')).map(|(_, value)| value.to_owned())
    };
    assert_eq!((of("mode=\"plaintext\"").as_deref(), of("mode=\"mtls\"").as_deref()), (Some("1"), Some("0")));
}

#[test]
fn reloads_of_either_result_have_a_series_before_the_first() {
    let text = text(&Metrics::new());
    for line in ["marline_config_reloads_total", "marline_trust_reloads_total"] {
        for result in ["accepted", "rejected"] {
            assert!(text.contains(&format!("{line}{{result=\"{result}\"}} 0")), "{line} {result}");
        }
    }
}
