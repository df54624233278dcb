//! The kubelet's own connections: its probes go to the pod's application in the clear, past the agent, where a probe of the pod's
//! object says so.
//!
//! No address proves the kubelet, because all of the node has it. Its cgroup does: `kubelet` is attached there and sees each of its
//! connects before the SYN leaves, so the two ends that it notes are those of a socket of the kubelet's. The pod's side (`lookup`)
//! asks for exactly these; the last gate (`account`) lets out what answers them. When the socket is gone nothing is let in by it.
use aya_ebpf::{
    EbpfContext as _,
    bindings::{__sk_buff, bpf_sock_ops},
    helpers::{bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_sock_ops_cb_flags_set},
    macros::sock_ops,
    programs::{SkBuffContext, SockOpsContext},
};
use marline_common::{Address, Counter, Endpoint, Flow, KubeletEntry, NetnsCookie, PodPort, TCP_ESTABLISHED};

use crate::{
    account::{ETH_P_IP, count},
    context::{AF_INET, IPPROTO_TCP, read, read_address6, read64},
    maps::{ADDRESSES, KUBELET, NODE_NETNS, PROBED_PORTS},
};

/// `BPF_SOCK_OPS_TCP_CONNECT_CB`: called before the SYN leaves, with both ends chosen.
const TCP_CONNECT_CB: u32 = 3;
/// `BPF_SOCK_OPS_STATE_CB`: called at each change of state, for sockets that have the flag.
const STATE_CB: u32 = 10;
const STATE_CB_FLAG: u32 = 1 << 2;
const TCP_CLOSE: u32 = 7;

/// Runs on the kubelet's cgroup.
#[sock_ops]
pub fn kubelet(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    match read!(ops as bpf_sock_ops, op) {
        TCP_CONNECT_CB => began(&ctx),
        STATE_CB => match read!(ops as bpf_sock_ops, __bindgen_anon_1[1]) {
            TCP_ESTABLISHED => stands(&ctx),
            TCP_CLOSE => ended(&ctx),
            _ => {}
        },
        _ => {}
    }
    1
}

/// Whether a SYN is of a connection of the kubelet's to a port of the pod that a probe is declared for.
#[inline(always)]
pub(crate) fn admits(netns: NetnsCookie, client: Endpoint, server: Endpoint) -> bool {
    if !is_probed(netns, server.port) {
        return false;
    }
    let Some(entry) = KUBELET.get_ptr_mut(Flow::new(client, server)) else {
        return false;
    };
    // SAFETY: takes nothing and gives a number.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the map frees no entry before the program is done, and each word is written alone.
    unsafe {
        if !(*entry).proves_syn(now) {
            return false;
        }
        (*entry).admitted = 1;
    }
    true
}

/// Whether a TCP packet that leaves a pod belongs to such a connection. `source` is its source address, and the pod's.
#[inline(always)]
pub(crate) fn is_answer(ctx: &SkBuffContext, netns: NetnsCookie, source: Address) -> bool {
    let skb = ctx.skb.skb;
    let (protocol, destination, header) = if read!(skb as __sk_buff, protocol) == ETH_P_IP {
        let (Ok(version), Ok(protocol), Ok(destination)) = (ctx.load::<u8>(0), ctx.load::<u8>(9), ctx.load::<u32>(16))
        else {
            return false;
        };
        (protocol, Address::v4(destination), 4 * usize::from(version & 0xf))
    } else {
        let (Ok(protocol), Ok(destination)) = (ctx.load::<u8>(6), ctx.load::<[u32; 4]>(24)) else {
            return false;
        };
        (protocol, Address { words: destination }, 40)
    };
    if u32::from(protocol) != IPPROTO_TCP {
        return false;
    }
    let Ok([from, to]) = ctx.load::<[u16; 2]>(header) else {
        return false;
    };
    if !is_probed(netns, from) {
        return false;
    }
    let flow = Flow::new(Endpoint::new(destination, to), Endpoint::new(source, from));
    // SAFETY: takes nothing and gives a number.
    let now = unsafe { bpf_ktime_get_ns() };
    // SAFETY: the map frees no entry before the program is done, and each word is written alone.
    unsafe { KUBELET.get(flow) }.is_some_and(|entry| entry.admitted != 0 && entry.may_be_answered(now))
}

#[inline(always)]
fn is_probed(netns: NetnsCookie, port: u16) -> bool {
    // SAFETY: the value is not read.
    unsafe { PROBED_PORTS.get(PodPort::new(netns, port)) }.is_some()
}

/// Notes the connection, if it can be known when it ends: what is not noted is refused.
#[inline(always)]
fn began(ctx: &SockOpsContext) {
    let ops = ctx.ops;
    // SAFETY: the context is this program's own. No namespace has the cookie 0.
    if unsafe { bpf_get_netns_cookie(ctx.as_ptr()) } != NODE_NETNS.load() {
        return;
    }
    let flow = flow(ctx);
    // SAFETY: the value is one aligned word, read whole.
    let Some(netns) = (unsafe { ADDRESSES.get(flow.server.address) }).copied() else {
        return;
    };
    if !is_probed(netns, flow.server.port) {
        return;
    }
    let flags = read!(ops as bpf_sock_ops, bpf_sock_ops_cb_flags) | STATE_CB_FLAG;
    // SAFETY: the context is this program's own.
    if unsafe { bpf_sock_ops_cb_flags_set(ops, flags as i32) } != 0 {
        let _ = KUBELET.remove(flow);
        return count(Counter::KubeletLost);
    }
    let entry = KubeletEntry {
        socket_cookie: cookie(ctx),
        // SAFETY: takes nothing and gives a number.
        opened: unsafe { bpf_ktime_get_ns() },
        ..KubeletEntry::default()
    };
    if KUBELET.insert(flow, entry, 0).is_err() {
        let _ = KUBELET.remove(flow);
        count(Counter::KubeletLost);
    }
}

/// From here on no SYN is this connection's.
#[inline(always)]
fn stands(ctx: &SockOpsContext) {
    let Some(entry) = KUBELET.get_ptr_mut(flow(ctx)) else {
        return;
    };
    let own = cookie(ctx);
    // SAFETY: the map frees no entry before the program is done, and each word is written alone.
    unsafe {
        if (*entry).socket_cookie == own {
            (*entry).state = TCP_ESTABLISHED;
        }
    }
}

/// Called before the socket lets go of its ends.
#[inline(always)]
fn ended(ctx: &SockOpsContext) {
    let ops = ctx.ops;
    let Some(entry) = KUBELET.get_ptr_mut(flow(ctx)) else {
        return;
    };
    let (own, state) = (cookie(ctx), read!(ops as bpf_sock_ops, __bindgen_anon_1[0]));
    let (acked, received) = (read64!(ops as bpf_sock_ops, bytes_acked), read64!(ops as bpf_sock_ops, bytes_received));
    // SAFETY: the map frees no entry before the program is done, and each word is written alone.
    unsafe {
        if (*entry).socket_cookie != own {
            return;
        }
        (*entry).closed = bpf_ktime_get_ns();
        (*entry).state = state;
        (*entry).bytes_acked = acked;
        (*entry).bytes_received = received;
        if (*entry).was_translated() {
            count(Counter::KubeletTranslated);
        }
    }
}

/// The socket's two ends, itself the client.
#[inline(always)]
fn flow(ctx: &SockOpsContext) -> Flow {
    let ops = ctx.ops;
    // An IPv6 socket may go to a v4-mapped address; its own address is not v4-mapped yet when it connects.
    let four = read!(ops as bpf_sock_ops, family) == AF_INET || read_address6!(ops as bpf_sock_ops, remote_ip6).is_v4();
    let (local, remote) = if four {
        let remote = if read!(ops as bpf_sock_ops, family) == AF_INET {
            Address::v4(read!(ops as bpf_sock_ops, remote_ip4))
        } else {
            read_address6!(ops as bpf_sock_ops, remote_ip6)
        };
        (Address::v4(read!(ops as bpf_sock_ops, local_ip4)), remote)
    } else {
        (read_address6!(ops as bpf_sock_ops, local_ip6), read_address6!(ops as bpf_sock_ops, remote_ip6))
    };
    // The one is a number, the other has network byte order in its upper half.
    let local_port = (read!(ops as bpf_sock_ops, local_port) as u16).to_be();
    let remote_port = (read!(ops as bpf_sock_ops, remote_port) >> 16) as u16;
    Flow::new(Endpoint::new(local, local_port), Endpoint::new(remote, remote_port))
}

#[inline(always)]
fn cookie(ctx: &SockOpsContext) -> u64 {
    // SAFETY: the context is this program's own.
    unsafe { bpf_get_socket_cookie(ctx.as_ptr()) }
}
