//! Inbound: what arrives at an enrolled pod goes to the agent's listener, or nowhere.
//!
//! Attached to the network namespace of each pod. Runs where the kernel looks for a listener, so once per connection.
use aya_ebpf::{bindings::bpf_sk_lookup, macros::sk_lookup, programs::SkLookupContext};
use aya_log_ebpf::debug;
use marline_common::{Address, Counter, Endpoint, POD_READY, PodEndpoint, PodPort};

use crate::{
    account::count,
    context::{AF_INET, IPPROTO_TCP, LOOPBACK_IFINDEX, read, read_address6},
    kubelet,
    maps::{ADDRESSES, LISTENERS, LISTENERS_MAPPED, MAPPED_PORTS, PODS, PROBES},
};

const DROP: u32 = 0;
const PASS: u32 = 1;
/// Of two agents' programs on one pod, as while one replaces the other, the newer one's choice holds.
const REPLACE: u64 = 1;

#[sk_lookup]
pub fn inbound(ctx: SkLookupContext) -> u32 {
    let lookup = ctx.lookup;
    if read!(lookup as bpf_sk_lookup, protocol) != IPPROTO_TCP
        || read!(lookup as bpf_sk_lookup, ingress_ifindex) == LOOPBACK_IFINDEX
    {
        return PASS;
    }
    let (local, remote) = if read!(lookup as bpf_sk_lookup, family) == AF_INET {
        (
            Address::v4(read!(lookup as bpf_sk_lookup, local_ip4)),
            Address::v4(read!(lookup as bpf_sk_lookup, remote_ip4)),
        )
    } else {
        (read_address6!(lookup as bpf_sk_lookup, local_ip6), read_address6!(lookup as bpf_sk_lookup, remote_ip6))
    };
    // The agent's own leg and the pod's connections to itself come over the loopback device, but show the interface that holds
    // the address.
    if local == remote {
        return PASS;
    }
    // SAFETY: the value is one aligned word, read whole.
    let Some(netns) = (unsafe { ADDRESSES.get(local) }).copied() else {
        count(Counter::InboundRefusedAddress);
        debug!(&ctx, "refused a connection to an address of the pod that is not configured");
        return DROP;
    };
    // SAFETY: as above.
    if unsafe { ADDRESSES.get(remote) } == Some(&netns) {
        return PASS;
    }
    let port = (read!(lookup as bpf_sk_lookup, local_port) as u16).to_be();
    // Also to a pod that no agent serves: a container shall not be restarted for the agent's sake.
    let client = Endpoint::new(remote, read!(lookup as bpf_sk_lookup, remote_port) as u16);
    if kubelet::admits(netns, client, Endpoint::new(local, port)) {
        count(Counter::KubeletAdmitted);
        return PASS;
    }
    // SAFETY: only the state is used, one aligned word.
    let ready = unsafe { PODS.get(netns) }.is_some_and(|pod| pod.state == POD_READY);
    if !ready {
        let probe = PodEndpoint::new(netns, Endpoint::new(local, port));
        // SAFETY: the value is not read.
        if unsafe { PROBES.get(probe) }.is_none() {
            count(Counter::InboundRefusedNotReady);
            return DROP;
        }
    }
    // Where there is no such listener, the application is served through the plain one.
    // SAFETY: the value is not read.
    if local.is_v4()
        && unsafe { MAPPED_PORTS.get(PodPort::new(netns, port)) }.is_some()
        && LISTENERS_MAPPED.redirect_sk_lookup(&ctx, local, REPLACE).is_ok()
    {
        count(Counter::InboundSteered);
        return PASS;
    }
    if LISTENERS.redirect_sk_lookup(&ctx, local, REPLACE).is_err() {
        count(Counter::InboundRefusedNoListener);
        return DROP;
    }
    count(Counter::InboundSteered);
    PASS
}
