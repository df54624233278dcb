//! Counting, and the last gate: what a pod's own socket sends must not leave past the agent.
use aya_ebpf::{
    bindings::{__sk_buff, bpf_sock},
    helpers::{bpf_sk_fullsock, bpf_skb_cgroup_id},
    macros::cgroup_skb,
    programs::SkBuffContext,
};
use marline_common::{Address, Counter};

use crate::{
    context::{IPPROTO_TCP, IPPROTO_UDP, LOOPBACK_IFINDEX, read, read_pointer},
    direct::{self, Standing},
    kubelet,
    maps::{ADDRESSES, AGENT_CGROUP, COUNTERS},
};

const PASS: i32 = 1;
const DROP: i32 = 0;

pub(crate) const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
pub(crate) const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;

#[inline(always)]
pub(crate) fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the slot is this CPU's own and lives as long as the program.
        unsafe { *slot += 1 };
    }
}

/// TCP of an enrolled pod stays in the pod: it goes to the agent's listeners or to the pod's own services. This holds also for
/// sockets that the connect hooks never saw: those connected before enrolment, and whatever finds another way to connect.
///
/// What answers the kubelet's own connections is let out: see `kubelet`.
///
/// A socket that the agent connected is judged by `direct`, wherever its packets go.
///
/// The pod is told by the packet's source address, which is all that Linux 6.1 offers here. The agent's own sockets live
/// outside the pods' cgroup, so they never come this way; those of an agent that is a pod do, and pass.
#[cgroup_skb]
pub fn egress(ctx: SkBuffContext) -> i32 {
    let skb = ctx.skb.skb;
    let agent = AGENT_CGROUP.load();
    // SAFETY: the context is this program's own. The id is that of the socket's cgroup, fixed when it was made.
    if agent != 0 && unsafe { bpf_skb_cgroup_id(skb) } == agent {
        return PASS;
    }
    match direct::standing(&ctx) {
        Standing::Other => {}
        Standing::Pass => return PASS,
        Standing::Drop(counter) => {
            count(counter);
            return DROP;
        }
    }
    // What goes to the loopback device comes back to this namespace, the pod's own address included.
    if read!(skb as __sk_buff, ifindex) == LOOPBACK_IFINDEX {
        return PASS;
    }
    let (protocol, source) = match read!(skb as __sk_buff, protocol) {
        ETH_P_IP => {
            let (Ok(protocol), Ok(source)) = (ctx.load::<u8>(9), ctx.load::<u32>(12)) else {
                return unreadable();
            };
            (u32::from(protocol), Address::v4(source))
        }
        ETH_P_IPV6 => {
            let (Ok(protocol), Ok(source)) = (ctx.load::<u8>(6), ctx.load::<[u32; 4]>(8)) else {
                return unreadable();
            };
            (u32::from(protocol), Address { words: source })
        }
        _ => return PASS,
    };
    // SAFETY: the value is one aligned word, read whole.
    let Some(netns) = (unsafe { ADDRESSES.get(source) }).copied() else {
        return PASS;
    };
    if protocol == IPPROTO_UDP {
        count(Counter::UdpPassed);
        return PASS;
    }
    if protocol != IPPROTO_TCP && !of_tcp_socket(&ctx) {
        return PASS;
    }
    if kubelet::is_answer(&ctx, netns, source) {
        return PASS;
    }
    count(Counter::EgressDropped);
    DROP
}

/// A packet without a whole IP header: nobody's that would miss it, and nobody can tell whose.
#[inline(always)]
fn unreadable() -> i32 {
    count(Counter::EgressDropped);
    DROP
}

/// Whether the sender is a TCP socket, however its packet is dressed (IPv6 extension headers come before the TCP header).
#[inline(always)]
fn of_tcp_socket(ctx: &SkBuffContext) -> bool {
    let skb = ctx.skb.skb;
    let sk = read_pointer!(skb as __sk_buff, __bindgen_anon_2);
    if sk.is_null() {
        return false;
    }
    // SAFETY: `sk` is the context's own socket and not null.
    let sk = unsafe { bpf_sk_fullsock(sk) };
    !sk.is_null() && read!(sk as bpf_sock, protocol) == IPPROTO_TCP
}
