//! The ports of a pod that its kubelet connects to by itself, as the pod's object declares them: those of probes and of lifecycle hooks, to
//! the pod's own address. What is run inside of a container (`exec`) connects to nothing.

use std::{collections::BTreeSet, sync::Arc};

use serde::Deserialize;

use super::objects::Names;

/// A container, as far as the kubelet probes it.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct WireContainer {
    restart_policy: Option<String>,
    ports: Option<Vec<WireContainerPort>>,
    liveness_probe: Option<WireHandler>,
    readiness_probe: Option<WireHandler>,
    startup_probe: Option<WireHandler>,
    lifecycle: Option<WireLifecycle>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireContainerPort {
    name: Option<String>,
    container_port: Option<i64>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireLifecycle {
    post_start: Option<WireHandler>,
    pre_stop: Option<WireHandler>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct WireHandler {
    http_get: Option<WireTarget>,
    tcp_socket: Option<WireTarget>,
    grpc: Option<WireTarget>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct WireTarget {
    /// Elsewhere than at the pod's address, if it is not empty.
    host: Option<String>,
    port: Option<WirePortRef>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum WirePortRef {
    Number(i64),
    Name(String),
}

/// The most ports of one pod, so that none takes what the node's others need.
const MOST: usize = 64;

/// The ports of all containers, sorted; of more than are kept the lowest. Init containers count that go on beside the others.
pub fn ports(containers: &[WireContainer], init: &[WireContainer], names: &mut Names) -> Arc<[u16]> {
    let sidecars = init.iter().filter(|container| container.restart_policy.as_deref() == Some("Always"));
    let all: BTreeSet<u16> = containers.iter().chain(sidecars).flat_map(WireContainer::probed).collect();
    names.shared_ports(&all.into_iter().take(MOST).collect::<Vec<_>>())
}

impl WireContainer {
    fn probed(&self) -> impl Iterator<Item = u16> {
        let hooks = self.lifecycle.iter().flat_map(|lifecycle| [&lifecycle.post_start, &lifecycle.pre_stop]).flatten();
        let probes = [&self.liveness_probe, &self.readiness_probe, &self.startup_probe].into_iter().flatten();
        let probes = probes.flat_map(|probe| [&probe.http_get, &probe.tcp_socket, &probe.grpc]);
        // The kubelet runs no other hook than HTTP ones by itself.
        let targets = probes.chain(hooks.map(|hook| &hook.http_get)).flatten();
        targets.filter_map(|target| self.port_of(target))
    }

    /// As the kubelet resolves it: a number, or the name of one of the container's own ports, or a number that is written as a text.
    fn port_of(&self, target: &WireTarget) -> Option<u16> {
        if target.host.as_deref().is_some_and(|host| !host.is_empty()) {
            return None;
        }
        let number = match target.port.as_ref()? {
            WirePortRef::Number(number) => *number,
            WirePortRef::Name(name) => {
                let named = self.ports.iter().flatten().find(|port| port.name.as_ref() == Some(name));
                named.map_or_else(|| name.parse().ok(), |port| port.container_port)?
            }
        };
        u16::try_from(number).ok().filter(|port| *port != 0)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value as Json, json};

    use super::*;

    fn of(spec: Json) -> Vec<u16> {
        let read = |key: &str| -> Vec<WireContainer> {
            serde_json::from_value(spec.get(key).cloned().unwrap_or_else(|| json!([]))).unwrap()
        };
        ports(&read("containers"), &read("initContainers"), &mut Names::default()).to_vec()
    }

    fn container(probe: Json) -> Json {
        json!({"containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 8080}, {"name": "dns", "protocol": "UDP", "containerPort": 53}],
                               "livenessProbe": probe}]})
    }

    #[test]
    fn every_kind_of_probe_declares_its_port() {
        let cases = [
            (json!({"httpGet": {"path": "/", "port": 80, "scheme": "HTTPS"}}), vec![80]),
            (json!({"tcpSocket": {"port": 81}}), vec![81]),
            (json!({"grpc": {"port": 82, "service": "x"}}), vec![82]),
            (json!({"exec": {"command": ["curl", "http://localhost:9999"]}}), vec![]),
            (json!({"httpGet": {"port": "web"}}), vec![8080]),
            (json!({"tcpSocket": {"port": "web"}}), vec![8080]),
            // The kubelet looks for the name alone.
            (json!({"tcpSocket": {"port": "dns"}}), vec![53]),
            (json!({"httpGet": {"port": "9090"}}), vec![9090]),
            (json!({"httpGet": {"port": "another"}}), vec![]),
            (json!({"httpGet": {"port": 0}}), vec![]),
            (json!({"httpGet": {"port": 65536}}), vec![]),
            (json!({"httpGet": {"port": -1}}), vec![]),
            (json!({"httpGet": {}}), vec![]),
            (json!({"httpGet": null}), vec![]),
            (json!({}), vec![]),
            // Not to this pod.
            (json!({"httpGet": {"host": "10.0.0.9", "port": 80}}), vec![]),
            (json!({"tcpSocket": {"host": "localhost", "port": 80}}), vec![]),
            (json!({"httpGet": {"host": "", "port": 80}}), vec![80]),
        ];
        for (probe, expected) in cases {
            assert_eq!(of(container(probe.clone())), expected, "{probe}");
        }
    }

    #[test]
    fn of_more_ports_than_one_pod_may_have_the_lowest_count() {
        let containers: Vec<_> =
            (1..=100).rev().map(|port| json!({"livenessProbe": {"tcpSocket": {"port": port}}})).collect();
        assert_eq!(of(json!({"containers": containers})), (1..=64).collect::<Vec<u16>>());
    }

    #[test]
    fn what_objects_that_are_gone_had_in_common_is_forgotten_and_what_is_in_use_is_shared() {
        let mut names = Names::default();
        let address = |port: u16| [std::net::IpAddr::from([10, 1, port.to_be_bytes()[0], port.to_be_bytes()[1]])];
        let kept = (names.shared("7"), names.shared_addresses(&address(7)), names.shared_ports(&[7]));
        for port in 0..u16::MAX {
            drop((names.shared(&format!("of {port}")), names.shared_addresses(&address(port))));
            drop(names.shared_ports(&[port, port]));
        }
        assert!(names.counts().into_iter().all(|count| count <= 2048), "{:?}", names.counts());
        assert!(Arc::ptr_eq(&kept.0, &names.shared("7")));
        assert!(Arc::ptr_eq(&kept.1, &names.shared_addresses(&address(7))));
        assert!(Arc::ptr_eq(&kept.2, &names.shared_ports(&[7])));
    }

    #[test]
    fn all_probes_and_hooks_of_all_containers_that_go_on_count_once() {
        let get = |port: Json| json!({"httpGet": {"port": port}});
        let spec = json!({
            "containers": [
                {"readinessProbe": get(json!(3)), "startupProbe": get(json!(1)), "livenessProbe": get(json!(3))},
                {"ports": [{"name": "web", "containerPort": 7}], "lifecycle": {"postStart": get(json!("web")), "preStop": get(json!(5))}},
                {"lifecycle": {"preStop": {"tcpSocket": {"port": 11}}, "postStart": {"exec": {"command": []}}}},
                // A name is of the container's own ports.
                {"livenessProbe": get(json!("web"))},
                {"name": "none", "ports": [{"containerPort": 9}]},
            ],
            "initContainers": [
                {"restartPolicy": "Always", "startupProbe": get(json!(2))},
                {"startupProbe": get(json!(4))},
                {"restartPolicy": "OnFailure", "startupProbe": get(json!(6))},
            ],
        });
        assert_eq!(of(spec), [1, 2, 3, 5, 7]);
        assert_eq!(of(json!({"containers": [{"livenessProbe": null, "lifecycle": null, "ports": null}]})), [0_u16; 0]);
    }

    proptest! {
        #[test]
        fn whatever_port_is_written_only_real_ones_are_declared(number: i64, name: String) {
            let declared = of(json!({"containers": [
                {"livenessProbe": {"httpGet": {"port": number}}}, {"livenessProbe": {"httpGet": {"port": name.clone()}}},
            ]}));
            let named = name.parse::<i64>().ok();
            for port in declared {
                prop_assert!(port != 0 && (i64::from(port) == number || Some(i64::from(port)) == named));
            }
        }
    }
}
