//! Services: the virtual addresses that applications connect to, the endpoints behind them, and the order in which those are tried.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    sync::Arc,
};

use super::Workload;
use crate::identity::SpiffeId;

/// One host, with virtual addresses of its own or, if it is headless, that of each endpoint.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Service {
    /// As clients write it: `shop.default.svc.cluster.local`.
    pub host: String,
    pub namespace: String,
    pub addresses: Vec<IpAddr>,
    /// By the port that clients connect to. Clients of a headless service choose the endpoint themselves.
    pub ports: BTreeMap<u16, Vec<ServiceEndpoint>>,
    /// Who may answer, beside being the endpoint's own workload; nobody is named where that is enough.
    pub identities: Vec<SpiffeId>,
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

    /// The endpoints for a connection to one of the service's addresses, the best first: those of the client's zone, then those
    /// with the fewest connections; `turn` shares out what is equal. Addresses of the other family are a resort, and the last are
    /// endpoints without a count of connections: those that have refused lately. `None` if the service has no such port.
    pub fn endpoints(
        &self,
        to: SocketAddr,
        zone: Option<&str>,
        connections: impl Fn(SocketAddr) -> Option<usize>,
        turn: usize,
    ) -> Option<Vec<&ServiceEndpoint>> {
        let all = self.ports.get(&to.port())?;
        let mut order: Vec<_> = all.iter().collect();
        if !order.is_empty() {
            let start = turn % order.len();
            order.rotate_left(start);
        }
        // Counted once each: they change meanwhile, and a sort must not see that.
        order.sort_by_cached_key(|endpoint| {
            let far = zone.is_some() && endpoint.zone.as_deref() != zone;
            let connections = connections(endpoint.address);
            (connections.is_none(), endpoint.address.is_ipv4() != to.is_ipv4(), far, connections)
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
            identities: Vec::new(),
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
