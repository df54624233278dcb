//! Whether all connections went through both sidecars, encrypted: what the kernel counts must add up to what the sidecars count, and each
//! connection between the sidecars must have had a handshake. Pure: counts in, a judgement out.

use std::collections::BTreeMap;

use super::{
    Layer, WORKERS,
    configuration::{CLUSTER_IN, CLUSTER_OUT, LISTENER_IN, LISTENER_OUT},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    Client,
    Server,
}

/// What is known at one end.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Connections that the kernel opened (client) or took (server), whoever's.
    pub kernel: u64,
    /// Those that were redirected to the sidecar's listener.
    pub taken: u64,
    /// Those that the sidecar made, to the other sidecar or to its application.
    pub made: u64,
    /// Those to ask it for its statistics.
    pub asked: u64,
    /// TLS handshakes that came to their end, and those of them that took up a session that was there.
    pub handshakes: u64,
    pub resumed: u64,
    /// Handshakes that did not, by what Envoy calls it.
    pub failed: BTreeMap<String, u64>,
    /// Handshakes by their version, and by their cipher.
    pub versions: BTreeMap<String, u64>,
    pub ciphers: BTreeMap<String, u64>,
    /// Requests, where it reads them.
    pub requests: u64,
}

/// How connections were carried, by what Envoy calls it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Carried {
    pub layer: Layer,
    /// Of the client's application.
    pub connections: u64,
    /// Between the sidecars, and those of them whose session had been there before.
    pub between: u64,
    pub resumed: u64,
    pub requests: u64,
    pub version: String,
    pub ciphers: Vec<String>,
}

impl Carried {
    /// In words, with a number for each.
    #[must_use]
    pub fn ways(&self, version: &str) -> BTreeMap<String, usize> {
        let kind = match self.layer {
            Layer::Tcp => "as TCP proxy",
            Layer::Http => "with Istio's HTTP filters",
        };
        let tls = format!("mTLS {} {}", self.version, self.ciphers.join(", "));
        let number = |count: u64| usize::try_from(count).unwrap_or(usize::MAX);
        let mut ways = BTreeMap::from([
            (
                format!("Envoy {version} {kind} in each pod, --concurrency {WORKERS}, by nftables"),
                number(self.connections),
            ),
            (format!("between them {tls}"), number(self.between)),
            ("of these with a TLS session taken up again".to_owned(), number(self.resumed)),
        ]);
        if self.layer == Layer::Http {
            ways.insert("requests".to_owned(), number(self.requests));
        }
        ways
    }
}

impl Counts {
    pub(super) fn new(end: End, kernel: u64, statistics: &BTreeMap<String, u64>) -> Self {
        let (listener, cluster) = match end {
            End::Client => (LISTENER_OUT, CLUSTER_OUT),
            End::Server => (LISTENER_IN, CLUSTER_IN),
        };
        let of = |name: &str| statistics.get(name).copied().unwrap_or_default();
        // TLS is between the sidecars: at the client's cluster, at the server's listener.
        let tls = match end {
            End::Client => format!("cluster.{cluster}.ssl."),
            End::Server => format!("listener.{listener}.ssl."),
        };
        let below = |kind: &str| -> BTreeMap<String, u64> {
            let prefix = format!("{tls}{kind}");
            let named = statistics.iter().filter_map(|(name, count)| Some((name.strip_prefix(&prefix)?, *count)));
            named.filter(|(_, count)| *count > 0).map(|(name, count)| (name.to_owned(), count)).collect()
        };
        let mut failed = below("fail_");
        for name in ["connection_error", "no_certificate"] {
            failed.extend(Some(of(&format!("{tls}{name}"))).filter(|count| *count > 0).map(|it| (name.to_owned(), it)));
        }
        Self {
            kernel,
            taken: of(&format!("listener.{listener}.downstream_cx_total")),
            made: of(&format!("cluster.{cluster}.upstream_cx_total")),
            asked: of("http.admin.downstream_cx_total"),
            handshakes: of(&format!("{tls}handshake")),
            resumed: of(&format!("{tls}session_reused")),
            failed,
            versions: below("versions."),
            ciphers: below("ciphers."),
            requests: of(&format!("cluster.{cluster}.upstream_rq_total")),
        }
    }
}

/// A fault in words, or how it was.
pub(super) fn judge(layer: Layer, client: &Counts, server: &Counts) -> Result<Carried, String> {
    for (name, counts) in [("client", client), ("server", server)] {
        let known = counts.taken + counts.made + counts.asked;
        if counts.kernel != known {
            return Err(format!(
                "in the {name}'s pod the kernel has counted {} connections, but its sidecar knows of {known}: {} of others were taken, {} \
                 made, {} asked for these numbers",
                counts.kernel, counts.taken, counts.made, counts.asked
            ));
        }
        if !counts.failed.is_empty() {
            return Err(format!("handshakes of the {name}'s sidecar failed: {:?}", counts.failed));
        }
    }
    if client.taken == 0 {
        return Err("no connection was redirected to the client's sidecar".to_owned());
    }
    let between = [client.made, client.handshakes, server.taken, server.handshakes];
    if between.iter().any(|count| *count != client.made) || client.made == 0 {
        return Err(format!(
            "connections, handshakes, connections taken, handshakes taken are not as many: {between:?}"
        ));
    }
    match layer {
        Layer::Tcp if client.made != client.taken || server.made != server.taken => {
            return Err(format!(
                "of {} connections {} went on, and {} of them to the server",
                client.taken, client.made, server.made
            ));
        }
        Layer::Http if client.requests == 0 || client.requests != server.requests => {
            return Err(format!("the sidecars saw {} and {} requests", client.requests, server.requests));
        }
        Layer::Tcp | Layer::Http => {}
    }
    let version = |counts: &Counts| counts.versions.keys().next().cloned().filter(|_| counts.versions.len() == 1);
    match (version(client), version(server)) {
        (Some(one), Some(other)) if one == other => Ok(Carried {
            layer,
            connections: client.taken,
            between: client.made,
            resumed: client.resumed,
            requests: client.requests,
            version: one,
            ciphers: client.ciphers.keys().cloned().collect(),
        }),
        _ => Err(format!("TLS was of different versions: {:?} and {:?}", client.versions, server.versions)),
    }
}

/// A line of Envoy's statistics; nothing for those that are no counters.
pub(super) fn statistic(line: &str) -> Option<(String, u64)> {
    let (name, value) = line.rsplit_once(": ")?;
    Some((name.to_owned(), value.trim().parse().ok()?))
}

/// A count of TCP by its name, out of /proc/net/snmp: a line of names, and one of values.
pub(super) fn of_kernel(text: &str, name: &str) -> Option<u64> {
    let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: "));
    let (names, values) = (lines.next()?, lines.next()?);
    let position = names.split_whitespace().position(|known| known == name)?;
    values.split_whitespace().nth(position)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts() -> Counts {
        let one = |name: &str| BTreeMap::from([(name.to_owned(), 10)]);
        Counts {
            kernel: 21,
            taken: 10,
            made: 10,
            asked: 1,
            handshakes: 10,
            versions: one("TLSv1.3"),
            ciphers: one("TLS_AES_128_GCM_SHA256"),
            ..Counts::default()
        }
    }

    fn fault(layer: Layer, change: impl FnOnce(&mut Counts, &mut Counts)) -> String {
        let (mut client, mut server) = (counts(), counts());
        change(&mut client, &mut server);
        judge(layer, &client, &server).expect_err("it was taken for well")
    }

    #[test]
    fn connections_that_were_all_redirected_and_encrypted_are_well() {
        let carried = judge(Layer::Tcp, &counts(), &counts()).unwrap();
        assert_eq!((carried.connections, carried.between, carried.version.as_str()), (10, 10, "TLSv1.3"));
        assert!(carried.ways("1").keys().any(|way| way.contains("TLS_AES_128_GCM_SHA256")));
    }

    #[test]
    fn a_connection_that_only_the_kernel_knows_is_a_fault() {
        assert!(fault(Layer::Tcp, |client, _| client.kernel += 1).contains("client's pod"));
        assert!(fault(Layer::Tcp, |_, server| server.kernel += 1).contains("server's pod"));
    }

    #[test]
    fn no_connections_are_a_fault_and_not_a_success() {
        let none = Counts::default();
        assert!(judge(Layer::Tcp, &none, &none).is_err());
        assert!(judge(Layer::Http, &none, &none).is_err());
    }

    #[test]
    fn a_connection_without_a_handshake_is_a_fault() {
        assert!(fault(Layer::Tcp, |client, _| client.handshakes -= 1).contains("not as many"));
        assert!(fault(Layer::Tcp, |_, server| server.handshakes -= 1).contains("not as many"));
        let refused = fault(Layer::Tcp, |_, server| {
            server.failed.insert("fail_verify_san".to_owned(), 1);
        });
        assert!(refused.contains("fail_verify_san"));
    }

    #[test]
    fn versions_that_differ_are_a_fault() {
        let old = |_: &mut Counts, server: &mut Counts| {
            server.versions.insert("TLSv1.2".to_owned(), 1);
        };
        assert!(fault(Layer::Tcp, old).contains("versions"));
    }

    #[test]
    fn over_http_fewer_connections_go_on_but_all_requests_do() {
        let (mut client, mut server) = (counts(), counts());
        (client.taken, client.kernel, client.requests, server.requests) = (50, 61, 500, 500);
        assert_eq!(judge(Layer::Http, &client, &server).unwrap().between, 10);
        assert!(judge(Layer::Tcp, &client, &server).is_err());
        server.requests = 499;
        assert!(judge(Layer::Http, &client, &server).is_err());
    }

    #[test]
    fn envoys_and_the_kernels_numbers_are_found_by_name() {
        let text = "Ip: A B\nIp: 1 2\nTcp: RtoMin ActiveOpens PassiveOpens\nTcp: 200 7 9\n";
        assert_eq!((of_kernel(text, "PassiveOpens"), of_kernel(text, "None")), (Some(9), None));
        assert_eq!(statistic("listener.a.ssl.handshake: 12"), Some(("listener.a.ssl.handshake".to_owned(), 12)));
        assert_eq!(statistic("cluster.a.upstream_cx_length_ms: P0(nan,1) P25(nan,1)"), None);
        let lines =
            ["listener.virtualInbound.downstream_cx_total: 4", "listener.virtualInbound.ssl.versions.TLSv1.3: 4"];
        let counted = Counts::new(End::Server, 9, &lines.into_iter().filter_map(statistic).collect());
        assert_eq!((counted.taken, counted.versions.get("TLSv1.3")), (4, Some(&4)));
    }
}
