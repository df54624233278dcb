//! What a connection must be: mTLS, plaintext, or nothing. Pure functions of compiled policies and of what is known about
//! both ends; finding the ends is `state`'s business, reading the policies `config`'s, carrying the decision out `proxy`'s.

mod aliases;
pub mod authentication;
pub mod authorization;
pub mod destination;
pub mod evaluate;
pub mod explain;
pub mod matching;
pub mod model;
pub mod select;
pub mod service;

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

use crate::identity::SpiffeId;
pub use authentication::{Authentication, PeerAuthentication};
pub use authorization::{Attempt, AuthorizationPolicy, Peer};
pub use destination::{ClientTls, DestinationRule, DestinationRules, Keepalive, Subset, Traffic};
pub use evaluate::{Authorization, Denial, Verdict};
pub use model::{Labels, MtlsMode, Workload};
pub use select::{Header, PolicyName, ROOT_NAMESPACE};
pub use service::{Service, ServiceEndpoint};

/// All policies of the mesh, compiled.
#[derive(PartialEq, Default, Debug)]
pub struct Policies {
    pub authentication: Authentication,
    pub authorization: Authorization,
    pub destinations: DestinationRules,
}

impl Policies {
    /// How many policies there are that can have an effect.
    pub fn len(&self) -> usize {
        self.authentication.len() + self.authorization.len() + self.destinations.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// What an outbound connection must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outbound {
    /// TLS, and the server must hold one of these identities.
    Mtls {
        expect: Vec<SpiffeId>,
    },
    Plaintext,
    Deny(DenyReason),
}

/// What an inbound connection must be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Inbound {
    Mtls,
    Plaintext,
    /// Either: look at the first bytes, because nothing is known about the source. A client that waits for the
    /// server to speak first cannot be told apart this way, so this is the last resort and not the rule.
    Sniff,
    Deny(DenyReason),
}

/// Why a connection may not be made at all, whatever its encryption.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DenyReason {
    /// A rule forbids it; the text names the rule.
    Rule(String),
    /// ALLOW policies apply and none allows it; the text names them.
    NothingAllows(String),
    /// Not enough is known to decide, and nothing is left that could be learned.
    Undecided,
}

impl DenyReason {
    /// The policies that decided.
    pub fn policy(&self) -> Option<&str> {
        match self {
            Self::Rule(text) | Self::NothingAllows(text) => Some(text),
            Self::Undecided => None,
        }
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Rule(rule) => write!(f, "forbidden by {rule}"),
            Self::NothingAllows(policies) => write!(f, "allowed by no rule of {policies}"),
            Self::Undecided => f.write_str("not enough is known of the connection"),
        }
    }
}

impl From<Denial<'_>> for DenyReason {
    fn from(denial: Denial<'_>) -> Self {
        match denial {
            Denial::Rule(cited) => Self::Rule(cited.to_string()),
            Denial::NothingAllows(policies) => {
                let names: Vec<String> = policies.iter().take(3).map(|name| name.to_string()).collect();
                let more = if policies.len() > names.len() { " and others" } else { "" };
                Self::NothingAllows(format!("{}{more}", names.join(", ")))
            }
        }
    }
}

/// The client's side, as Istio's auto mTLS has it: TLS towards what is in the mesh unless the destination's port is
/// DISABLE, plaintext towards all else (istio/istio pilot/pkg/xds/endpoints/mtls_checker.go, `checkMtlsEnabled`). STRICT
/// is a demand on servers and changes nothing here.
pub fn outbound(policies: &Policies, destination: Option<&Workload>, port: u16) -> Outbound {
    match destination.filter(|workload| workload.in_mesh) {
        None => Outbound::Plaintext,
        Some(workload) => match policies.authentication.mode(workload, port) {
            MtlsMode::Disable => Outbound::Plaintext,
            MtlsMode::Strict | MtlsMode::Permissive => Outbound::Mtls { expect: vec![workload.id.clone()] },
        },
    }
}

/// The same towards an endpoint of a service: with what the service and the DestinationRule for it say, which can ask for plaintext or for
/// mTLS, and allow nothing that is denied.
pub fn towards(
    policies: &Policies,
    endpoint: Option<&Workload>,
    port: u16,
    service: Option<&Service>,
    traffic: &Traffic,
) -> Outbound {
    let expect = match (traffic.tls, outbound(policies, endpoint, port)) {
        (_, Outbound::Deny(reason)) => return Outbound::Deny(reason),
        (Some(ClientTls::Disable), _) => return Outbound::Plaintext,
        (_, Outbound::Mtls { expect }) => expect,
        (_, Outbound::Plaintext) if !demands_mtls(service, traffic) => return Outbound::Plaintext,
        (_, Outbound::Plaintext) => match endpoint {
            Some(workload) => vec![workload.id.clone()],
            // No workload of this mesh; perhaps one of a mesh that is federated with it. Then who may answer is whom the user names.
            None => {
                let service = service.map_or(&[][..], |service| &service.identities);
                let named = if traffic.identities.is_empty() { service } else { &traffic.identities };
                named.to_vec()
            }
        },
    };
    Outbound::Mtls { expect: expect.into_iter().filter(|id| may_answer(id, service, traffic)).collect() }
}

/// Whether a rule asks for mTLS, or somebody says who may answer, which plaintext cannot show.
pub fn demands_mtls(service: Option<&Service>, traffic: &Traffic) -> bool {
    let named = !traffic.identities.is_empty() || service.is_some_and(|service| !service.identities.is_empty());
    match traffic.tls {
        Some(tls) => tls == ClientTls::IstioMutual,
        None => named,
    }
}

/// Whether the service and the rule for it, where they name identities, name this one.
fn may_answer(id: &SpiffeId, service: Option<&Service>, traffic: &Traffic) -> bool {
    let named = [service.map_or(&[][..], |service| &service.identities), &traffic.identities];
    named.iter().all(|identities| identities.is_empty() || identities.contains(id))
}

/// The server's side: what a connection to `local`, an address of `destination`, must be, if it comes from `client`, which
/// is the address of `source`. Under STRICT the handshake decides, so that a plaintext client is refused with a reason.
///
/// Rules that go by addresses alone deny here already; for all others `Authorization::decide` is asked again when it is
/// known who calls. `told_plaintext` is whether a DestinationRule makes the source speak plaintext to some service that this is an endpoint
/// of: then it may do either, as it may have called the endpoint as such.
pub fn inbound(
    policies: &Policies,
    destination: &Workload,
    local: SocketAddr,
    client: IpAddr,
    source: Option<&Workload>,
    told_plaintext: bool,
) -> Inbound {
    let attempt = Attempt { source: client, destination: local, peer: Peer::NotYetKnown };
    if let Verdict::Denied(denial) = policies.authorization.decide(destination, &attempt).verdict {
        return Inbound::Deny(denial.into());
    }
    match (policies.authentication.mode(destination, local.port()), source) {
        (MtlsMode::Strict, _) => Inbound::Mtls,
        (MtlsMode::Permissive, Some(workload)) if workload.in_mesh && told_plaintext => Inbound::Sniff,
        (MtlsMode::Permissive, Some(workload)) if workload.in_mesh => Inbound::Mtls,
        (MtlsMode::Permissive, Some(_)) => Inbound::Plaintext,
        (MtlsMode::Permissive, None) => Inbound::Sniff,
        (MtlsMode::Disable, _) => Inbound::Plaintext,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;

    fn workload(in_mesh: bool) -> Workload {
        let id = SpiffeId::new(&TrustDomain::parse("cluster.local").unwrap(), "shop", "web").unwrap();
        Workload {
            name: "web-1".into(),
            namespace: "shop".into(),
            service_account: "web".into(),
            id,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            in_mesh,
            labels: Default::default(),
            host: Workload::host_of("web-1", "shop"),
        }
    }

    fn mesh_wide(mode: MtlsMode) -> Policies {
        let name = PolicyName { kind: "PeerAuthentication", namespace: ROOT_NAMESPACE.into(), name: "default".into() };
        let header = Header { name, created: None, selector: Default::default() };
        let policy = PeerAuthentication { header, mode: Some(mode), ports: Default::default() };
        Policies { authentication: Authentication::compile(vec![policy]), ..Policies::default() }
    }

    #[test]
    fn outbound_is_mtls_exactly_towards_the_mesh_and_unless_disabled() {
        use MtlsMode::*;
        let mtls = Outbound::Mtls { expect: vec![workload(true).id] };
        let table = [
            (Strict, Some(true), mtls.clone()),
            (Strict, Some(false), Outbound::Plaintext),
            (Strict, None, Outbound::Plaintext),
            (Permissive, Some(true), mtls),
            (Permissive, Some(false), Outbound::Plaintext),
            (Permissive, None, Outbound::Plaintext),
            (Disable, Some(true), Outbound::Plaintext),
            (Disable, Some(false), Outbound::Plaintext),
            (Disable, None, Outbound::Plaintext),
        ];
        for (mode, in_mesh, expected) in table {
            let destination = in_mesh.map(workload);
            let decided = outbound(&mesh_wide(mode), destination.as_ref(), 80);
            assert_eq!(decided, expected, "{mode} towards {in_mesh:?}");
        }
    }

    #[test]
    fn inbound_demands_mtls_under_strict_and_sniffs_only_the_unknown() {
        use MtlsMode::*;
        let table = [
            (Strict, Some(true), Inbound::Mtls),
            (Strict, Some(false), Inbound::Mtls),
            (Strict, None, Inbound::Mtls),
            (Permissive, Some(true), Inbound::Mtls),
            (Permissive, Some(false), Inbound::Plaintext),
            (Permissive, None, Inbound::Sniff),
            (Disable, Some(true), Inbound::Plaintext),
            (Disable, Some(false), Inbound::Plaintext),
            (Disable, None, Inbound::Plaintext),
        ];
        for (mode, in_mesh, expected) in table {
            let source = in_mesh.map(workload);
            let (local, client) = ("10.0.0.1:80".parse().unwrap(), "10.0.0.2".parse().unwrap());
            let decided = |told| inbound(&mesh_wide(mode), &workload(true), local, client, source.as_ref(), told);
            assert_eq!(decided(false), expected, "{mode} from {in_mesh:?}");
            let told = if (mode, in_mesh) == (Permissive, Some(true)) { Inbound::Sniff } else { expected };
            assert_eq!(decided(true), told, "{mode} from {in_mesh:?}, told to speak plaintext");
        }
    }

    #[test]
    fn the_default_mode_is_istios() {
        assert_eq!(MtlsMode::default(), MtlsMode::Permissive);
    }
}
