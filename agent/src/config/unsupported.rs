//! What to say about a resource that is not acted on. None is passed over: what it protects would not be protected.

/// The kinds that are read, their groups, and an apiVersion of each.
const READ: [(&str, &str, &str); 7] = [
    ("AgentConfig", "marline.io", "marline.io/v1alpha1"),
    ("WorkloadEntry", "networking.istio.io", "networking.istio.io/v1"),
    ("ServiceEntry", "networking.istio.io", "networking.istio.io/v1"),
    ("Service", "", "v1"),
    ("DestinationRule", "networking.istio.io", "networking.istio.io/v1"),
    ("PeerAuthentication", "security.istio.io", "security.istio.io/v1"),
    ("AuthorizationPolicy", "security.istio.io", "security.istio.io/v1"),
];

const OUT: &str = "move it out of the directory";

/// Kind, group, what is the matter with it, what to do instead.
const KNOWN: &[(&str, &str, &str, &str)] = &[
    // Ours, and not an agent's.
    ("CaServer", "marline.io", "is for `marline ca serve`", OUT),
    ("CaTokens", "marline.io", "is for `marline ca serve`", OUT),
    ("CaNodes", "marline.io", "is for `marline ca serve`", OUT),
    // Gone from Istio itself: https://istio.io/latest/blog/2021/migrate-alpha-policy/
    (
        "MeshPolicy",
        "authentication.istio.io",
        "left Istio with 1.6",
        "write a PeerAuthentication in istio-system without selector",
    ),
    ("Policy", "authentication.istio.io", "left Istio with 1.6", "write a PeerAuthentication in the same namespace"),
    (
        "ClusterRbacConfig",
        "rbac.istio.io",
        "left Istio with 1.6",
        "write AuthorizationPolicies: one that applies is all it takes",
    ),
    (
        "RbacConfig",
        "rbac.istio.io",
        "left Istio with 1.6",
        "write AuthorizationPolicies: one that applies is all it takes",
    ),
    ("ServiceRole", "rbac.istio.io", "left Istio with 1.6", "write an AuthorizationPolicy: its rules' `to` and `when`"),
    ("ServiceRoleBinding", "rbac.istio.io", "left Istio with 1.6", "write an AuthorizationPolicy: its rules' `from`"),
    // Of Istio's own installation and of Envoy, which is not here.
    (
        "IstioOperator",
        "install.istio.io",
        "installs Istio, and there is no Istio here",
        "move it out of the directory; Marline's own settings are in AgentConfig",
    ),
    ("EnvoyFilter", "networking.istio.io", "changes Envoy's configuration, and there is no Envoy here", OUT),
    ("WasmPlugin", "extensions.istio.io", "extends Envoy, and there is no Envoy here", OUT),
    ("TrafficExtension", "extensions.istio.io", "extends Envoy, and there is no Envoy here", OUT),
    (
        "ProxyConfig",
        "networking.istio.io",
        "configures sidecars, and there are none here",
        "move it out of the directory; Marline's own settings are in AgentConfig",
    ),
    // Not acted on yet.
    (
        "VirtualService",
        "networking.istio.io",
        "is not acted on yet: connections go where the application sent them",
        OUT,
    ),
    ("WorkloadGroup", "networking.istio.io", "is not acted on", "write a WorkloadEntry for each of its workloads"),
    (
        "Sidecar",
        "networking.istio.io",
        "is not acted on yet: every workload may call every other that the policies let it",
        "limit who may call whom by AuthorizationPolicies",
    ),
    ("Gateway", "networking.istio.io", "is not acted on yet: Marline has no gateways", OUT),
    (
        "RequestAuthentication",
        "security.istio.io",
        "is not acted on yet: it takes HTTP, which Marline does not look into, and tokens would go unchecked",
        OUT,
    ),
    (
        "Telemetry",
        "telemetry.istio.io",
        "is not acted on: what is logged and counted is the same for all",
        "move it out of the directory; the log is set in AgentConfig, spec.accessLog",
    ),
    ("Gateway", "gateway.networking.k8s.io", "is not acted on: Marline has no gateways", OUT),
    ("HTTPRoute", "gateway.networking.k8s.io", "is not acted on: it takes HTTP, which Marline does not look into", OUT),
    ("NetworkPolicy", "networking.k8s.io", "is enforced by the network plugin, not by Marline", OUT),
    (
        "Service",
        "",
        "is not read from files yet: destinations are known by their WorkloadEntries",
        "write a WorkloadEntry for each endpoint",
    ),
    ("Pod", "", "is not read from files", "write a WorkloadEntry with the annotation marline.io/netns"),
];

/// Message and hint.
pub(super) fn unsupported(kind: &str, group: &str, version: &str) -> (String, String) {
    if let Some((_, right, example)) = READ.iter().find(|(known, _, _)| *known == kind) {
        let what = match *right == group {
            true => format!("version {version} of this kind is not known"),
            false => format!("this kind is not one of the group {group:?}"),
        };
        return (what, format!("write apiVersion: {example}"));
    }
    if let Some((_, _, what, hint)) = KNOWN.iter().find(|(known, of, _, _)| (*known, *of) == (kind, group)) {
        return (format!("{kind} {what}"), (*hint).to_owned());
    }
    if group == "istio.io" || group.ends_with(".istio.io") {
        let message = "Marline does not act on this kind, and to pass over it could protect less than it asks for";
        return (message.to_owned(), OUT.to_owned());
    }
    let known: Vec<&str> = READ.iter().map(|(kind, _, _)| *kind).collect();
    let hint = format!("known are {}: correct kind and apiVersion, or {OUT}", known.join(", "));
    ("this kind of resource is not known".to_owned(), hint)
}
