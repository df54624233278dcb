//! Service, ServiceEntry and DestinationRule as they are written: what becomes of them, and every fault named.
#![allow(clippy::unwrap_used)]

use std::{fs, net::IpAddr, time::Duration};

use marline::{
    config::{self, Finding, LoadedPolicies},
    policy::{ClientTls, Service, Traffic},
    state::explain::Question,
};

const WORKLOADS: &str = "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-1, namespace: shop}
spec: {address: 10.0.0.1, serviceAccount: web, labels: {app: web}, locality: eu/eu-1/rack-7}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: web-2, namespace: shop, labels: {topology.kubernetes.io/region: eu, topology.kubernetes.io/zone: eu-2}}
spec: {address: 10.0.0.2, serviceAccount: web, labels: {app: web}, ports: {http: 9090}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: elsewhere, namespace: other}
spec: {address: 10.0.0.3, serviceAccount: web, labels: {app: web}}
";

fn load(text: &str) -> Result<LoadedPolicies, Vec<Finding>> {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("workloads.yaml"), WORKLOADS).unwrap();
    fs::write(dir.path().join("services.yaml"), text).unwrap();
    config::load_policies(dir.path()).map_err(|errors| errors.errors)
}

fn service(text: &str, address: &str) -> Service {
    let loaded = load(text).unwrap();
    (**loaded.snapshot.service(address.parse::<IpAddr>().unwrap()).unwrap()).clone()
}

fn endpoints(service: &Service, port: u16) -> Vec<String> {
    service.ports[&port].iter().map(|endpoint| endpoint.address.to_string()).collect()
}

fn errors(text: &str) -> String {
    load(text)
        .unwrap_err()
        .iter()
        .map(|finding| format!("{} {}\n", finding.field.clone().unwrap_or_default(), finding.message))
        .collect()
}

#[test]
fn a_kubernetes_service_is_its_selectors_workloads_of_its_namespace() {
    let text = "
apiVersion: v1
kind: Service
metadata: {name: web, namespace: shop}
spec:
  type: ClusterIP
  clusterIP: 10.96.0.10
  clusterIPs: [10.96.0.10, 'fd00::10']
  selector: {app: web}
  ports:
  - {name: http, port: 80, targetPort: 8080, protocol: TCP}
  - {name: admin, port: 81}
  - {name: dns, port: 53, protocol: UDP}
  - {name: named, port: 82, targetPort: http}
  sessionAffinity: None
";
    let service = service(text, "10.96.0.10");
    assert_eq!(service.host, "web.shop.svc.cluster.local");
    // Who has said where its port of this name is, is asked there.
    assert_eq!(endpoints(&service, 80), ["10.0.0.1:8080", "10.0.0.2:9090"]);
    assert_eq!(endpoints(&service, 81), ["10.0.0.1:81", "10.0.0.2:81"]);
    assert_eq!(endpoints(&service, 82), ["10.0.0.2:9090"]);
    assert!(!service.ports.contains_key(&53));
    let zones: Vec<_> = service.ports[&80].iter().map(|endpoint| endpoint.zone.as_deref()).collect();
    assert_eq!(zones, [Some("eu/eu-1"), Some("eu/eu-2")]);
    let identity = |n: usize| service.ports[&80][n].workload.as_ref().unwrap().id.to_string();
    assert_eq!(identity(0), "spiffe://cluster.local/ns/shop/sa/web");
    assert!(load(text).unwrap().snapshot.service("fd00::10".parse().unwrap()).is_some());
}

#[test]
fn a_service_without_an_address_is_called_at_its_endpoints() {
    for spec in ["{clusterIP: None, selector: {app: web}, ports: [PORT]}", "{selector: {app: web}, ports: [PORT]}"] {
        let spec = spec.replace("PORT", "{port: 80, targetPort: 9090}");
        let text = format!("apiVersion: v1\nkind: Service\nmetadata: {{name: web, namespace: shop}}\nspec: {spec}\n");
        let snapshot = load(&text).unwrap().snapshot;
        let client = snapshot.workload("10.0.0.1".parse().unwrap()).unwrap();
        assert!(snapshot.service("10.0.0.1".parse().unwrap()).is_none());
        let called = |to: &str| snapshot.called(client, to.parse().unwrap()).map(|called| called.service.host.clone());
        assert_eq!(called("10.0.0.2:80").as_deref(), Some("web.shop.svc.cluster.local"));
        assert_eq!(called("[::ffff:10.0.0.2]:80").as_deref(), Some("web.shop.svc.cluster.local"));
        assert_eq!((called("10.0.0.2:9090"), called("10.0.0.9:80")), (None, None));
    }
    // Nothing is behind it.
    let text = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {ports: [{port: 80}]}\n";
    let snapshot = load(text).unwrap().snapshot;
    let client = snapshot.workload("10.0.0.1".parse().unwrap()).unwrap();
    assert!(snapshot.called(client, "10.0.0.2:80".parse().unwrap()).is_none());
}

/// A server must know of whom it gets plaintext, where it is PERMISSIVE.
#[test]
fn who_is_told_to_call_an_endpoint_in_plaintext_is_known_at_the_endpoint() {
    let services = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
         spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{port: 80, targetPort: 8080}, {port: 81, targetPort: 8081}]}\n---\n\
         apiVersion: v1\nkind: Service\nmetadata: {name: headless, namespace: shop}\n\
         spec: {clusterIP: None, selector: {app: web}, ports: [{port: 70}]}\n---\n";
    let of_port = "{host: web, trafficPolicy: {portLevelSettings: [{port: {number: 80}, tls: {mode: DISABLE}}]}}";
    let of_some = "{host: web, workloadSelector: {matchLabels: {app: other}}, trafficPolicy: {tls: {mode: DISABLE}}}";
    let of_all = "{host: \"*.shop.svc.cluster.local\", trafficPolicy: {tls: {mode: DISABLE}}}";
    let mutual = "{host: web, trafficPolicy: {tls: {mode: ISTIO_MUTUAL}}}";
    for (rules, expected) in [
        (vec![], [false, false, false]),
        (vec![of_port], [true, false, false]),
        (vec![of_some], [false, false, false]),
        (vec![of_all], [true, true, true]),
        (vec![of_all, mutual], [false, false, true]),
    ] {
        let rule = |(n, spec)| format!("RULE: {{name: r{n}, namespace: shop}}\nspec: {spec}\n---\n");
        let text = rules.iter().enumerate().map(rule).collect::<String>();
        let snapshot = self::rules(&(services.to_owned() + &text)).unwrap().snapshot;
        let client = snapshot.workload("10.0.0.1".parse().unwrap()).unwrap();
        let told = ["10.0.0.1:8080", "10.0.0.1:8081", "10.0.0.1:70"]
            .map(|local| snapshot.told_plaintext(client, local.parse().unwrap()));
        assert_eq!(told, expected, "{rules:?}");
    }
}

/// Nobody says which was meant: what asks for mTLS is never overruled by what does not.
#[test]
fn of_headless_services_with_one_endpoint_the_strictest_rule_counts() {
    let service = |name: &str| {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}, namespace: shop}}\n\
             spec: {{clusterIP: None, selector: {{app: web}}, ports: [{{port: 80}}]}}\n---\n"
        )
    };
    let rule = |host: &str, mode: &str| {
        let spec = format!("{{host: {host}, trafficPolicy: {{tls: {{mode: {mode}}}}}}}");
        format!("RULE: {{name: {host}, namespace: shop}}\nspec: {spec}\n---\n")
    };
    for (text, host) in [
        ([rule("a", "DISABLE"), rule("b", "ISTIO_MUTUAL")].concat(), "b"),
        (rule("a", "DISABLE"), "b"),
        (rule("b", "DISABLE"), "a"),
        (String::new(), "a"),
    ] {
        let snapshot = rules(&[service("a"), service("b"), text.clone()].concat()).unwrap().snapshot;
        let client = snapshot.workload("10.0.0.1".parse().unwrap()).unwrap();
        let called = snapshot.called(client, "10.0.0.2:80".parse().unwrap()).unwrap();
        assert_eq!(called.service.host, format!("{host}.shop.svc.cluster.local"), "{text}");
    }
}

#[test]
fn who_may_answer_can_be_named_by_an_alias_of_the_trust_domain() {
    let agent = "apiVersion: marline.io/v1alpha1\nkind: AgentConfig\n\
         spec: {ca: {path: ca}, capture: {cgroup: /c}, trust: {aliases: [old.example]}}\n---\n";
    let named = |id: &str| {
        let spec = "hosts: [web.example], addresses: [10.96.0.1], resolution: STATIC, location: MESH_INTERNAL";
        let rest = format!(
            "ports: [{{number: 80, name: http}}], endpoints: [{{address: 10.0.0.1}}], subjectAltNames: [\"{id}\"]"
        );
        let text = format!("{agent}{}", entry(&format!("{{{spec}, {rest}}}")));
        service(&text, "10.96.0.1").identities[0].to_string()
    };
    assert_eq!(named("spiffe://old.example/ns/shop/sa/web"), "spiffe://cluster.local/ns/shop/sa/web");
    assert_eq!(named("spiffe://other.example/ns/shop/sa/web"), "spiffe://other.example/ns/shop/sa/web");
}

fn entry(spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: web, namespace: shop}}\nspec: {spec}\n"
    )
}

#[test]
fn a_service_entry_has_endpoints_or_a_selector_and_may_name_who_answers() {
    let text = entry(
        "{hosts: [web.example], addresses: [10.96.0.11], location: MESH_INTERNAL, resolution: STATIC, \
         ports: [{number: 80, name: http, protocol: HTTP, targetPort: 8080}], \
         subjectAltNames: ['spiffe://cluster.local/ns/shop/sa/web'], \
         endpoints: [{address: 10.0.0.2, ports: {http: 7070}, locality: eu/eu-9}, {address: 10.0.0.1}]}",
    );
    let found = service(&text, "10.96.0.11");
    assert_eq!(found.host, "web.example");
    assert_eq!(endpoints(&found, 80), ["10.0.0.2:7070", "10.0.0.1:8080"]);
    assert_eq!(found.ports[&80][0].zone.as_deref(), Some("eu/eu-9"));
    assert_eq!(found.identities.len(), 1);
    let text = entry(
        "{hosts: [web.example], addresses: [10.96.0.11], location: MESH_INTERNAL, resolution: STATIC, \
         ports: [{number: 80, name: http}], workloadSelector: {labels: {app: web}}}",
    );
    assert_eq!(endpoints(&service(&text, "10.96.0.11"), 80), ["10.0.0.1:80", "10.0.0.2:9090"]);
}

#[test]
fn what_cannot_be_one_is_refused_with_its_field() {
    let whole = "hosts: [a.example], addresses: [10.96.0.11], location: MESH_INTERNAL, resolution: STATIC, \
                 ports: [{number: 80, name: http}]";
    for (spec, said) in [
        ("{addresses: [10.96.0.11]}".to_owned(), "spec.hosts is missing"),
        (format!("{{{whole}, endpoints: [{{address: 10.9.9.9}}]}}"), "10.9.9.9 is no workload's address"),
        (whole.replace("STATIC", "DNS").replacen("hosts", "{hosts", 1) + "}", "does not look up host names"),
        (format!("{{{whole}, workloadSelector: {{labels: {{app: web}}}}, endpoints: []}}"), "cannot be together"),
        (format!("{{{}}}", whole.replace("10.96.0.11", "10.96.0.0/16")), "is no address that a service can have"),
        (format!("{{{}}}", whole.replace("10.96.0.11", "10.0.0.1")), "is the address of workload shop/web-1 too"),
        (format!("{{{}}}", whole.replace("number: 80", "number: 0")), "spec.ports[0].number is missing or no port"),
        (format!("{{{whole}, subjectAltNames: [web]}}"), "spec.subjectAltNames"),
        (format!("{{{whole}, endpoint: []}}"), "spec.endpoint"),
    ] {
        let said_now = errors(&entry(&spec));
        assert!(said_now.contains(said), "{spec}\n{said_now}");
    }
    let twice =
        format!("{}---\n{}", entry(&format!("{{{whole}}}")), entry(&format!("{{{whole}}}")).replace("web,", "again,"));
    assert!(errors(&twice).contains("is the address of ServiceEntry shop/web"), "{}", errors(&twice));
}

fn rules(text: &str) -> Result<LoadedPolicies, Vec<Finding>> {
    load(&text.replace("RULE", "apiVersion: networking.istio.io/v1beta1\nkind: DestinationRule\nmetadata"))
}

fn traffic(loaded: &LoadedPolicies, host: &str, port: u16) -> Option<Traffic> {
    let client = loaded.snapshot.workload("10.0.0.1".parse().unwrap()).unwrap();
    let rule = loaded.snapshot.policies.destinations.asked(client, "shop", host).next()?;
    Some((**rule.traffic_at(port)).clone())
}

#[test]
fn a_destination_rule_is_read_with_what_acts_on_tcp() {
    let text = "
RULE: {name: web, namespace: shop, creationTimestamp: '2024-01-31T12:00:00Z'}
spec:
  host: web
  trafficPolicy:
    loadBalancer: {simple: ROUND_ROBIN}
    connectionPool:
      tcp: {maxConnections: 3, connectTimeout: 300ms, tcpKeepalive: {time: 60s, interval: 20s, probes: 4}, idleTimeout: 1h}
      http: {http1MaxPendingRequests: 1}
    tls: {mode: ISTIO_MUTUAL, subjectAltNames: ['spiffe://cluster.local/ns/shop/sa/web']}
    portLevelSettings:
    - port: {number: 81}
      tls: {mode: DISABLE}
  subsets:
  - {name: v1, labels: {version: v1}}
---
RULE: {name: web-again, namespace: shop}
spec: {host: web.shop.svc.cluster.local, exportTo: ['.']}
";
    let loaded = rules(text).unwrap();
    // Of two the one without a time is the older, as in Istio: the other is void, and a warning says so.
    assert_eq!(traffic(&loaded, "web.shop.svc.cluster.local", 81), Some(Traffic::default()));
    let fields: Vec<_> = loaded.warnings.iter().map(|warning| warning.field.clone().unwrap_or_default()).collect();
    for field in [
        "spec.trafficPolicy.loadBalancer",
        "spec.trafficPolicy.connectionPool.http",
        "spec.trafficPolicy.connectionPool.tcp.idleTimeout",
        "spec.subsets",
        "metadata.name",
    ] {
        assert!(fields.iter().any(|warned| warned == field), "{field}: {fields:?}");
    }
    let one = rules(text.split("---").next().unwrap()).unwrap();
    let plain = Traffic { tls: Some(ClientTls::Disable), ..Traffic::default() };
    assert_eq!(traffic(&one, "web.shop.svc.cluster.local", 81), Some(plain));
    let found = traffic(&one, "web.shop.svc.cluster.local", 80).unwrap();
    assert_eq!((found.tls, found.max_connections), (Some(ClientTls::IstioMutual), Some(3)));
    assert_eq!(found.connect_timeout, Some(Duration::from_millis(300)));
    let keepalive = found.keepalive.unwrap();
    assert_eq!(
        (keepalive.probes, keepalive.time, keepalive.interval),
        (Some(4), Some(Duration::from_secs(60)), Some(Duration::from_secs(20)))
    );
    assert_eq!(found.identities.len(), 1);
    assert_eq!(traffic(&one, "db.shop.svc.cluster.local", 80), None);
}

#[test]
fn a_destination_rule_that_cannot_be_done_is_refused_with_its_field() {
    for (spec, said) in [
        ("{trafficPolicy: {}}", "spec.host is missing"),
        ("{host: 'w*b'}", "spec.host"),
        ("{host: '*web'}", "spec.host"),
        (
            "{host: web, trafficPolicy: {tls: {mode: SIMPLE}}}",
            "spec.trafficPolicy.tls.mode TLS towards servers outside",
        ),
        ("{host: web, trafficPolicy: {tls: {mode: NONE}}}", "spec.trafficPolicy.tls.mode"),
        ("{host: web, trafficPolicy: {tls: {mode: DISABLE, credentialName: x}}}", "credentialName means nothing"),
        ("{host: web, trafficPolicy: {connectionPool: {tcp: {maxConnections: 0}}}}", "maxConnections is not a number"),
        ("{host: web, trafficPolicy: {connectionPool: {tcp: {connectTimeout: soon}}}}", "connectTimeout"),
        ("{host: web, trafficPolicy: {portLevelSettings: [{tls: {mode: DISABLE}}]}}", "port.number is missing"),
        ("{host: web, trafficPolicy: {proxyProtocol: {version: V1}}}", "proxyProtocol is not done here"),
        ("{host: web, traficPolicy: {}}", "did you mean trafficPolicy"),
    ] {
        let errors = rules(&format!("RULE: {{name: web, namespace: shop}}\nspec: {spec}\n")).unwrap_err();
        let said_now: String = errors
            .iter()
            .map(|finding| {
                format!("{} {} {}\n", finding.field.clone().unwrap_or_default(), finding.message, finding.hint)
            })
            .collect();
        assert!(said_now.contains(said), "{spec}\n{said_now}");
    }
}

#[test]
fn what_becomes_of_a_call_is_told_of_the_endpoint_that_it_has_reached() {
    let text = "
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: one, namespace: shop}
spec: {address: 10.0.1.1, serviceAccount: one, labels: {app: one, of: pair}}
---
apiVersion: networking.istio.io/v1
kind: WorkloadEntry
metadata: {name: two, namespace: shop}
spec: {address: 10.0.1.2, serviceAccount: two, labels: {app: two, of: pair}}
---
apiVersion: v1
kind: Service
metadata: {name: pair, namespace: shop}
spec: {clusterIP: 10.96.0.20, selector: {of: pair}, ports: [{port: 80}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: not-two, namespace: shop}
spec: {selector: {matchLabels: {app: two}}, action: DENY, rules: [{}]}
";
    let snapshot = load(text).unwrap().snapshot;
    let question = Question { source: "shop/web-1", destination: "pair.shop:80", plaintext: false, strangers: true };
    let mut answer = snapshot.answer(question).unwrap();
    assert_eq!(answer.by_endpoint.len(), 2);
    assert!(answer.narrow("10.0.1.2:80".parse().unwrap()));
    assert!(!answer.allowed && answer.reason.contains("shop/not-two"), "{answer:?}");
    assert!(answer.narrow("10.0.1.1:80".parse().unwrap()));
    assert!(answer.allowed && !answer.reason.contains("not-two"), "{answer:?}");
    assert!(!answer.narrow("10.0.1.3:80".parse().unwrap()), "it is no endpoint");
}
