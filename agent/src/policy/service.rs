//! Services: the virtual addresses that applications connect to, the endpoints behind them, and the order in which those are tried.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use super::Workload;
use crate::identity::SpiffeId;

/// One host, with virtual addresses of its own or, if it is headless, that of each endpoint.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Service {
    /// As clients write it: `shop.default.svc.cluster.local`.
    pub host: String,
    pub namespace: String,
    pub addresses: Vec<IpAddr>,
    /// By the port that clients connect to. Clients of a headless service choose the endpoint themselves.
    pub ports: BTreeMap<u16, Vec<ServiceEndpoint>>,
    /// Who may answer, beside being the endpoint's own workload; nobody is named where that is enough.
    pub identities: Vec<SpiffeId>,
    /// The service's port by that of every node which leads to it, too.
    pub node_ports: BTreeMap<u16, u16>,
    /// Addresses for clients outside, at which its ports are, too: others may have other ports there.
    pub outside: Vec<IpAddr>,
    /// Where its ports lead at those and at the nodes', if not as in `ports`.
    pub exposed: Option<BTreeMap<u16, Vec<ServiceEndpoint>>>,
    /// A client's connections to one port go to one endpoint for as long as it is there, unless none was made for so long.
    pub affinity: Option<Duration>,
    /// An IPv4 address leads to IPv4 endpoints alone, and an IPv6 one to IPv6 endpoints.
    pub families_apart: bool,
}

/// Where a connection to a service can go.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceEndpoint {
    pub address: SocketAddr,
    /// `None` outside of what is known of the mesh.
    pub workload: Option<Arc<Workload>>,
    pub zone: Option<String>,
}

impl Service {
    pub fn is_headless(&self) -> bool {
        self.addresses.is_empty()
    }

    /// Which of the service's ports a connection is for, and where it can go. An address that is not the service's, nor one for outside, is a
    /// node's; one for outside may be a node's, too. `None` if there is no such port.
    pub fn leads(&self, to: SocketAddr) -> Option<(u16, &[ServiceEndpoint])> {
        let is_of = |addresses: &[IpAddr]| addresses.iter().any(|it| it.to_canonical() == to.ip().to_canonical());
        if self.is_headless() || is_of(&self.addresses) {
            return self.ports.get(&to.port()).map(|all| (to.port(), all.as_slice()));
        }
        let exposed = self.exposed.as_ref().unwrap_or(&self.ports);
        let at_outside = exposed.get_key_value(&to.port()).filter(|_| is_of(&self.outside));
        let found = at_outside.or_else(|| exposed.get_key_value(self.node_ports.get(&to.port())?));
        found.map(|(port, all)| (*port, all.as_slice()))
    }

    /// All endpoints, each with the service's port.
    pub fn all_endpoints(&self) -> impl Iterator<Item = (u16, &ServiceEndpoint)> {
        let all = self.ports.iter().chain(self.exposed.iter().flatten());
        all.flat_map(|(port, all)| all.iter().map(move |endpoint| (*port, endpoint)))
    }

    /// The endpoints for a connection to one of the addresses that lead to the service, or to a node port, the best first: those of the client's
    /// zone, then those with the fewest connections; `turn` shares out what is equal. Addresses of the other family are a resort, unless the
    /// service keeps the families apart, and the last are endpoints without a count of connections: those that have refused lately. `None`
    /// if the service has no such port.
    pub fn endpoints(
        &self,
        to: SocketAddr,
        zone: Option<&str>,
        connections: impl Fn(SocketAddr) -> Option<usize>,
        turn: usize,
    ) -> Option<Vec<&ServiceEndpoint>> {
        let is_v4 = to.ip().to_canonical().is_ipv4();
        let same = |endpoint: &ServiceEndpoint| endpoint.address.is_ipv4() == is_v4;
        let (_, all) = self.leads(to)?;
        let mut order: Vec<_> = all.iter().filter(|endpoint| !self.families_apart || same(endpoint)).collect();
        if !order.is_empty() {
            let start = turn % order.len();
            order.rotate_left(start);
        }
        // Counted once each: they change meanwhile, and a sort must not see that.
        order.sort_by_cached_key(|endpoint| {
            let far = zone.is_some() && endpoint.zone.as_deref() != zone;
            let connections = connections(endpoint.address);
            (connections.is_none(), !same(endpoint), far, connections)
        });
        Some(order)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn service(endpoints: &[(&str, Option<&str>)]) -> Service {
        let endpoints = endpoints.iter().map(|(address, zone)| ServiceEndpoint {
            address: address.parse().unwrap(),
            workload: None,
            zone: zone.map(str::to_owned),
        });
        Service {
            host: "shop.default.svc.cluster.local".to_owned(),
            namespace: "default".to_owned(),
            addresses: vec!["10.96.0.10".parse().unwrap()],
            ports: BTreeMap::from([(80, endpoints.collect())]),
            ..Service::default()
        }
    }

    fn order(service: &Service, zone: Option<&str>, busy: &[&str], turn: usize) -> Vec<String> {
        let busy: Vec<SocketAddr> = busy.iter().map(|address| address.parse().unwrap()).collect();
        let count = |address| Some(busy.iter().filter(|busy| **busy == address).count()).filter(|count| *count < 9);
        let order = service.endpoints("10.96.0.10:80".parse().unwrap(), zone, count, turn).unwrap();
        order.iter().map(|endpoint| endpoint.address.to_string()).collect()
    }

    #[test]
    fn the_own_zone_comes_first_and_then_who_has_the_fewest_connections() {
        let service =
            service(&[("10.0.0.1:8080", Some("a")), ("10.0.0.2:8080", Some("b")), ("10.0.0.3:8080", Some("a"))]);
        let busy = ["10.0.0.1:8080", "10.0.0.1:8080", "10.0.0.3:8080"];
        assert_eq!(order(&service, Some("a"), &busy, 0), ["10.0.0.3:8080", "10.0.0.1:8080", "10.0.0.2:8080"]);
        assert_eq!(order(&service, None, &busy, 0), ["10.0.0.2:8080", "10.0.0.3:8080", "10.0.0.1:8080"]);
    }

    #[test]
    fn equals_take_turns() {
        let service = service(&[("10.0.0.1:8080", None), ("10.0.0.2:8080", None)]);
        assert_eq!(order(&service, None, &[], 0)[0], "10.0.0.1:8080");
        assert_eq!(order(&service, None, &[], 1)[0], "10.0.0.2:8080");
        assert_eq!(order(&service, None, &[], usize::MAX).len(), 2);
    }

    #[test]
    fn the_other_family_is_the_last_resort() {
        let service = service(&[("[fd00::1]:8080", Some("a")), ("10.0.0.2:8080", Some("b"))]);
        assert_eq!(order(&service, Some("a"), &[], 0), ["10.0.0.2:8080", "[fd00::1]:8080"]);
    }

    #[test]
    fn a_service_that_keeps_the_families_apart_has_no_such_resort() {
        let apart = Service {
            addresses: vec!["10.96.0.10".parse().unwrap(), "fd96::10".parse().unwrap()],
            families_apart: true,
            ..service(&[("[fd00::1]:8080", None), ("10.0.0.2:8080", None)])
        };
        assert_eq!(order(&apart, None, &["10.0.0.2:8080"; 9], 0), ["10.0.0.2:8080"]);
        let v6 = apart.endpoints("[fd96::10]:80".parse().unwrap(), None, |_| Some(0), 0).unwrap();
        assert_eq!(v6.iter().map(|it| it.address.to_string()).collect::<Vec<_>>(), ["[fd00::1]:8080"]);
    }

    #[test]
    fn nodes_ports_and_addresses_for_outside_lead_to_endpoints_of_their_own_or_to_those_of_the_services_port() {
        let mut service = service(&[("10.0.0.1:8080", None)]);
        service.node_ports.insert(30080, 80);
        let led = |service: &Service, to: &str| {
            let (port, all) = service.leads(to.parse().unwrap())?;
            Some((port, all.iter().map(|endpoint| endpoint.address.to_string()).collect::<Vec<_>>()))
        };
        assert_eq!(led(&service, "192.0.2.1:30080"), Some((80, vec!["10.0.0.1:8080".into()])));
        assert_eq!(led(&service, "[::ffff:10.96.0.10]:80"), Some((80, vec!["10.0.0.1:8080".into()])));
        for other in ["192.0.2.1:80", "10.96.0.10:30080"] {
            assert_eq!(led(&service, other), None, "{other}");
        }
        let wider = ["10.0.0.1:8080", "10.0.0.2:8080"].map(|address| ServiceEndpoint {
            address: address.parse().unwrap(),
            workload: None,
            zone: None,
        });
        service.exposed = Some(BTreeMap::from([(80, wider.to_vec())]));
        service.outside = vec!["203.0.113.5".parse().unwrap()];
        for exposed in ["192.0.2.1:30080", "203.0.113.5:80", "203.0.113.5:30080", "[::ffff:203.0.113.5]:80"] {
            let (port, all) = led(&service, exposed).unwrap();
            assert_eq!((port, all.len()), (80, 2), "{exposed}");
        }
        assert_eq!(led(&service, "203.0.113.5:81"), None);
        assert_eq!(led(&service, "10.96.0.10:80").unwrap().1.len(), 1);
        assert_eq!(service.all_endpoints().map(|(port, _)| port).collect::<Vec<_>>(), [80, 80, 80]);
    }

    #[test]
    fn a_port_that_the_service_has_not_is_told_from_one_without_endpoints() {
        let service = service(&[]);
        assert!(service.endpoints("10.96.0.10:81".parse().unwrap(), None, |_| None, 0).is_none());
        assert_eq!(service.endpoints("10.96.0.10:80".parse().unwrap(), None, |_| None, 0), Some(Vec::new()));
    }

    #[test]
    fn who_has_refused_lately_comes_last_also_in_the_own_zone() {
        let service = service(&[("10.0.0.1:8080", Some("a")), ("10.0.0.2:8080", Some("b"))]);
        assert_eq!(order(&service, Some("a"), &["10.0.0.1:8080"; 9], 0), ["10.0.0.2:8080", "10.0.0.1:8080"]);
    }

    proptest! {
        #[test]
        fn every_endpoint_is_there_once(count in 0_usize..20, turn: usize, load: Vec<u8>) {
            let addresses: Vec<String> = (0..count).map(|n| format!("10.0.0.{n}:80")).collect();
            let pairs: Vec<_> = addresses.iter().map(|address| (address.as_str(), None)).collect();
            let service = service(&pairs);
            let load = |address: SocketAddr| match address.ip() {
                IpAddr::V4(ip) => load.get(usize::from(ip.octets()[3])).map(|load| (*load).into()),
                IpAddr::V6(_) => None,
            };
            let mut order: Vec<_> = service.endpoints("10.96.0.10:80".parse().unwrap(), None, load, turn).unwrap()
                .iter().map(|endpoint| endpoint.address).collect();
            order.sort();
            order.dedup();
            prop_assert_eq!(order.len(), count);
        }
    }
}
