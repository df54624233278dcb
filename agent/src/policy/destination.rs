//! DestinationRule: what a client's side does towards a service, found as Istio finds it: in the client's namespace, then in the
//! service's, then in the root namespace (istio/istio pilot/pkg/model/push_context.go, `destinationRule`); within one the most specific host,
//! a rule for certain clients before one for all, the oldest of equals.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, HashMap},
    fmt,
    sync::Arc,
    time::Duration,
};

use super::{
    Labels, Workload,
    select::{Header, PolicyName, ROOT_NAMESPACE},
};
use crate::identity::SpiffeId;

/// One rule, as it was written.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DestinationRule {
    /// Its selector chooses clients.
    pub header: Header,
    /// In full: `web.shop.svc.cluster.local`, `*.shop.svc.cluster.local`, `*`.
    pub host: String,
    /// Namespaces whose clients know of it beside its own; none is all.
    pub exported_to: Option<Vec<String>>,
    pub traffic: Arc<Traffic>,
    /// For single ports of the service. What is left out here is not taken from `traffic`.
    pub ports: BTreeMap<u16, Arc<Traffic>>,
    /// Endpoints with certain labels. What would send a connection to one is a route, and there are none.
    pub subsets: Vec<Subset>,
}

#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Subset {
    pub name: String,
    pub labels: Labels,
}

/// What is to be done on connections to a service.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Traffic {
    pub tls: Option<ClientTls>,
    /// Who may answer, where somebody is named.
    pub identities: Vec<SpiffeId>,
    pub connect_timeout: Option<Duration>,
    /// How many connections one pod may have to the host.
    pub max_connections: Option<usize>,
    pub keepalive: Option<Keepalive>,
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut parts = Vec::new();
        parts.extend(self.tls.map(|tls| match tls {
            ClientTls::Disable => "tls.mode DISABLE".to_owned(),
            ClientTls::IstioMutual => "tls.mode ISTIO_MUTUAL".to_owned(),
        }));
        if !self.identities.is_empty() {
            let names: Vec<_> = self.identities.iter().map(ToString::to_string).collect();
            parts.push(format!("answered by {}", names.join(" or ")));
        }
        parts.extend(self.max_connections.map(|limit| format!("at most {limit} connections of each pod")));
        parts.extend(self.connect_timeout.map(|limit| format!("connect timeout {limit:?}")));
        parts.extend(self.keepalive.map(|_| "keepalive".to_owned()));
        f.write_str(if parts.is_empty() { "nothing that Marline acts on" } else { "" })?;
        f.write_str(&parts.join(", "))
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClientTls {
    /// Plaintext, also to workloads of the mesh.
    Disable,
    /// mTLS, whatever is known of the server.
    IstioMutual,
}

/// What is left out is the kernel's choice.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Keepalive {
    pub probes: Option<u32>,
    pub time: Option<Duration>,
    pub interval: Option<Duration>,
}

/// All of them, by namespace; in each the one that counts first.
#[derive(PartialEq, Eq, Default, Debug)]
pub struct DestinationRules(HashMap<String, Vec<DestinationRule>>);

impl DestinationRules {
    pub fn compile(rules: Vec<DestinationRule>) -> Self {
        let mut namespaces: HashMap<String, Vec<DestinationRule>> = HashMap::new();
        for rule in rules {
            namespaces.entry(rule.header.name.namespace.clone()).or_default().push(rule);
        }
        for rules in namespaces.values_mut() {
            rules.sort_by(|a, b| {
                let key = |rule: &DestinationRule| {
                    (rule.host.starts_with('*'), Reverse(rule.host.len()), rule.header.selector.is_empty())
                };
                key(a).cmp(&key(b)).then_with(|| a.header.by_age(&b.header))
            });
        }
        Self(namespaces)
    }

    /// All rules.
    pub fn written(&self) -> impl Iterator<Item = &DestinationRule> {
        self.0.values().flatten()
    }

    /// The rules with a say on a client's connections to a service, in order of precedence: the first counts, and it alone.
    pub fn asked<'a>(
        &'a self,
        client: &'a Workload,
        service_namespace: &'a str,
        host: &'a str,
    ) -> impl Iterator<Item = &'a DestinationRule> {
        let mut namespaces = vec![client.namespace.as_str()];
        for namespace in [service_namespace, ROOT_NAMESPACE] {
            if !namespaces.contains(&namespace) {
                namespaces.push(namespace);
            }
        }
        let rules = namespaces.into_iter().filter_map(|namespace| self.0.get(namespace)).flatten();
        rules.filter(move |rule| rule.is_known_to(client) && rule.is_for(host))
    }

    /// Those that ask for plaintext, at least on some port.
    pub fn disabling(&self) -> Vec<&DestinationRule> {
        let disables = |traffic: &Arc<Traffic>| traffic.tls == Some(ClientTls::Disable);
        let all = self.0.values().flatten();
        all.filter(|rule| disables(&rule.traffic) || rule.ports.values().any(disables)).collect()
    }

    /// Rules that never count, each with the older one of the same host and clients.
    pub fn superseded(&self) -> impl Iterator<Item = (&PolicyName, &PolicyName)> {
        self.0.values().flat_map(|rules| {
            rules.windows(2).filter_map(|pair| {
                let [first, second] = pair else { return None };
                let same = first.host == second.host && first.header.selector == second.header.selector;
                same.then_some((&second.header.name, &first.header.name))
            })
        })
    }

    pub fn len(&self) -> usize {
        self.0.values().map(Vec::len).sum()
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl DestinationRule {
    /// What it says of a port of the service.
    pub fn traffic_at(&self, port: u16) -> &Arc<Traffic> {
        self.ports.get(&port).unwrap_or(&self.traffic)
    }

    fn is_known_to(&self, client: &Workload) -> bool {
        let namespace = &self.header.name.namespace;
        let exported = self.exported_to.as_ref().is_none_or(|to| to.contains(&client.namespace));
        // As in Istio, a rule that chooses clients chooses among those of its own namespace.
        let chosen = self.header.selector.is_empty() || *namespace == client.namespace;
        (exported || *namespace == client.namespace) && chosen && self.header.selects(&client.labels)
    }

    pub fn is_for(&self, host: &str) -> bool {
        match self.host.strip_prefix('*') {
            Some(suffix) => host.ends_with(suffix),
            None => host == self.host,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;

    const HOST: &str = "web.shop.svc.cluster.local";

    fn rule(namespace: &str, name: &str, host: &str, created: u64) -> DestinationRule {
        let name = PolicyName { kind: "DestinationRule", namespace: namespace.into(), name: name.into() };
        // The name is told by the limit.
        let traffic = Traffic { max_connections: Some(name.name.parse().unwrap()), ..Traffic::default() };
        DestinationRule {
            header: Header { name, created: Some(Duration::from_secs(created)), selector: Labels::default() },
            host: host.into(),
            exported_to: None,
            traffic: Arc::new(traffic),
            ports: BTreeMap::new(),
            subsets: Vec::new(),
        }
    }

    fn client(namespace: &str) -> Workload {
        Workload {
            name: "client".into(),
            namespace: namespace.into(),
            service_account: "client".into(),
            id: SpiffeId::new(&TrustDomain::default(), namespace, "client").unwrap(),
            addresses: Vec::new(),
            in_mesh: true,
            labels: Labels::from([("app", "client")]),
            host: Workload::host_of("client", namespace),
        }
    }

    fn found(rules: Vec<DestinationRule>, from: &str) -> Option<usize> {
        let rules = DestinationRules::compile(rules);
        rules.asked(&client(from), "shop", HOST).next().and_then(|rule| rule.traffic_at(80).max_connections)
    }

    #[test]
    fn the_clients_namespace_counts_before_the_services_and_that_before_the_root() {
        let all = || vec![rule(ROOT_NAMESPACE, "1", HOST, 1), rule("shop", "2", HOST, 1), rule("front", "3", "*", 1)];
        assert_eq!(found(all(), "front"), Some(3), "also with a host that is less specific");
        assert_eq!(found(all(), "elsewhere"), Some(2));
        assert_eq!(found(all(), "shop"), Some(2));
        assert_eq!(found(vec![rule(ROOT_NAMESPACE, "1", HOST, 1)], "elsewhere"), Some(1));
        assert_eq!(found(vec![rule("elsewhere", "1", HOST, 1)], "front"), None, "another's rule is nobody's");
    }

    #[test]
    fn the_most_specific_host_counts_then_the_oldest() {
        let hosts = || {
            vec![
                rule("shop", "1", "*", 1),
                rule("shop", "2", "*.shop.svc.cluster.local", 1),
                rule("shop", "3", "*.svc.cluster.local", 1),
            ]
        };
        assert_eq!(found(hosts(), "shop"), Some(2));
        let exact = vec![rule("shop", "4", HOST, 9), rule("shop", "5", HOST, 8)];
        assert_eq!(found([hosts(), exact.clone()].concat(), "shop"), Some(5));
        let rules = DestinationRules::compile(exact);
        let superseded: Vec<_> = rules.superseded().map(|(void, by)| (void.name.as_str(), by.name.as_str())).collect();
        assert_eq!(superseded, [("4", "5")]);
        assert_eq!(found(vec![rule("shop", "1", "eb.shop.svc.cluster.local", 1)], "shop"), None);
    }

    #[test]
    fn a_rule_for_certain_clients_counts_before_one_for_all_and_only_in_its_namespace() {
        let mut chosen = rule("shop", "1", HOST, 9);
        chosen.header.selector = Labels::from([("app", "client")]);
        let mut others = rule("shop", "2", HOST, 1);
        others.header.selector = Labels::from([("app", "other")]);
        let rules = vec![chosen, others, rule("shop", "3", HOST, 1)];
        assert_eq!(found(rules.clone(), "shop"), Some(1));
        assert_eq!(found(rules, "front"), Some(3));
    }

    #[test]
    fn a_rule_that_is_not_exported_is_known_in_its_own_namespace_alone() {
        let mut private = rule("shop", "1", HOST, 1);
        private.exported_to = Some(vec!["back".into()]);
        assert_eq!(found(vec![private.clone()], "shop"), Some(1));
        assert_eq!(found(vec![private.clone()], "back"), Some(1));
        assert_eq!(found(vec![private], "front"), None);
    }

    #[test]
    fn what_is_said_of_a_port_stands_alone() {
        let mut rule = rule("shop", "1", HOST, 1);
        rule.ports.insert(80, Arc::new(Traffic { tls: Some(ClientTls::Disable), ..Traffic::default() }));
        let rules = DestinationRules::compile(vec![rule]);
        let client = client("shop");
        let traffic = |port| rules.asked(&client, "shop", HOST).next().unwrap().traffic_at(port).clone();
        assert_eq!((traffic(80).tls, traffic(80).max_connections), (Some(ClientTls::Disable), None));
        assert_eq!((traffic(81).tls, traffic(81).max_connections), (None, Some(1)));
    }
}
