//! Namespaces, veth pairs, addresses and routes of a cluster.
//!
//! Link: 10.77.0.0/24 and fd77::/64, node a is .1 and b is .2. Pods: 10.77.N.I and fd77:0:0:N::I, with N the node's number.
//! The gateway that pods see is 10.77.N.1 and fd77:0:0:N::1 on every one of the node's veths.

use std::net::{Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result};

use super::Side;
use crate::netns;

/// The interface to the other node, in both nodes: where frames are captured.
pub const LINK: &str = "link0";
pub const LINK_BROADCAST: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 255);

#[must_use]
pub fn node_name(cluster: &str, side: Side) -> String {
    format!("{cluster}-{}", side.letter())
}

#[must_use]
pub fn pod_name(cluster: &str, pod: &str) -> String {
    format!("{cluster}-{pod}")
}

/// A node's address on the link.
#[must_use]
pub fn link_address(side: Side) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, side.number())
}

#[must_use]
pub fn pod_addresses(side: Side, index: u8) -> (Ipv4Addr, Ipv6Addr) {
    let node = side.number();
    (Ipv4Addr::new(10, 77, node, index), Ipv6Addr::new(0xfd77, 0, 0, node.into(), 0, 0, 0, index.into()))
}

/// Both nodes with the link between them, forwarding, each with the way to the other's pods.
pub fn create_nodes(cluster: &str) -> Result<()> {
    for side in Side::BOTH {
        let name = node_name(cluster, side);
        netns::create(&name)?;
        netns::inside(&netns::path(&name), || {
            netns::sysctl("ipv4/ip_forward", "1").and_then(|()| netns::sysctl("ipv6/conf/all/forwarding", "1"))
        })?
        .with_context(|| format!("letting {name} forward"))?;
    }
    let (a, b) = (node_name(cluster, Side::A), node_name(cluster, Side::B));
    netns::ip_batch(&a, &[format!("link add {LINK} type veth peer name {LINK} netns {b}")])?;
    for side in Side::BOTH {
        let (own, other) = (side.number(), side.other().number());
        let lines = [
            format!("addr add 10.77.0.{own}/24 broadcast {LINK_BROADCAST} dev {LINK}"),
            format!("addr add fd77::{own}/64 dev {LINK} nodad"),
            format!("link set {LINK} up"),
            format!("route add 10.77.{other}.0/24 via 10.77.0.{other}"),
            format!("route add fd77:0:0:{other}::/64 via fd77::{other}"),
        ];
        netns::ip_batch(&node_name(cluster, side), &lines)?;
    }
    Ok(())
}

/// A pod's namespace and its tie to its node.
pub fn create_pod(cluster: &str, side: Side, pod: &str, index: u8) -> Result<()> {
    let (node, name) = (node_name(cluster, side), pod_name(cluster, pod));
    let number = side.number();
    let (v4, v6) = pod_addresses(side, index);
    let (gateway4, gateway6) = (format!("10.77.{number}.1"), format!("fd77:0:0:{number}::1"));
    let veth = format!("pod{index}");
    netns::create(&name)?;
    let node_lines = [
        format!("link add {veth} type veth peer name eth0 netns {name}"),
        format!("addr add {gateway4}/32 dev {veth}"),
        format!("addr add {gateway6}/128 dev {veth} nodad"),
        format!("link set {veth} up"),
        format!("route add {v4}/32 dev {veth}"),
        format!("route add {v6}/128 dev {veth}"),
    ];
    netns::ip_batch(&node, &node_lines)?;
    let pod_lines = [
        format!("addr add {v4}/32 dev eth0"),
        format!("addr add {v6}/128 dev eth0 nodad"),
        "link set eth0 up".to_owned(),
        format!("route add {gateway4}/32 dev eth0 scope link"),
        format!("route add default via {gateway4}"),
        format!("route add {gateway6}/128 dev eth0"),
        format!("route add default via {gateway6}"),
    ];
    netns::ip_batch(&name, &pod_lines)
}
