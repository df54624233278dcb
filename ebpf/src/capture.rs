//! Outbound: an enrolled pod's TCP connects go to the agent's listener in the pod, and the application does not see it.
//!
//! The connect hooks decide and rewrite; sock_ops tells the agent where the connection wanted to go; the name hooks keep up
//! appearances. All run on the socket's cgroup, fixed when it was made, so the agent's own sockets are never turned around;
//! where the agent is a pod itself, by `AGENT_CGROUP`.
use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock, bpf_sock_addr, bpf_sock_ops},
    helpers::{
        bpf_get_current_cgroup_id, bpf_get_netns_cookie, bpf_get_socket_cookie, bpf_ktime_get_ns, bpf_set_retval,
        bpf_sk_storage_get,
    },
    macros::{cgroup_sock, cgroup_sock_addr, sock_ops},
    programs::{SockAddrContext, SockContext, SockOpsContext},
};
use aya_log_ebpf::{debug, error};
use marline_common::{
    Address, Counter, Endpoint, NetnsCookie, Origin, POD_READY, PodEndpoint, REFUSED_FOR_NANOS, SocketEntry,
};

use crate::{
    account::count,
    context::{
        AF_INET, ECONNREFUSED, EPROTONOSUPPORT, IPPROTO_MPTCP, IPPROTO_TCP, SOCK_STREAM, read, read_address6,
        read_pointer, write,
    },
    direct::{self, Connect},
    maps::{AGENT_CGROUP, CLIENTS, ORIGINS, PODS, PROBES, REFUSED, SOCKETS},
};

const PASS: i32 = 1;
const REFUSE: i32 = 0;
/// `BPF_SOCK_OPS_TCP_CONNECT_CB`: called before the SYN leaves, with the local port chosen.
const TCP_CONNECT_CB: u32 = 3;

#[cgroup_sock_addr(connect4)]
pub fn connect4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    let destination =
        Endpoint::new(Address::v4(read!(sa as bpf_sock_addr, user_ip4)), read!(sa as bpf_sock_addr, user_port) as u16);
    match verdict(&ctx, &destination) {
        Verdict::Pass => PASS,
        Verdict::Refuse => refuse(ECONNREFUSED),
        Verdict::Redirect(port) => {
            write!(sa as bpf_sock_addr, user_ip4, Address::LOOPBACK4.words[3]);
            write!(sa as bpf_sock_addr, user_port, u32::from(port));
            PASS
        }
    }
}

#[cgroup_sock_addr(connect6)]
pub fn connect6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    let destination =
        Endpoint::new(read_address6!(sa as bpf_sock_addr, user_ip6), read!(sa as bpf_sock_addr, user_port) as u16);
    match verdict(&ctx, &destination) {
        Verdict::Pass => PASS,
        Verdict::Refuse => refuse(ECONNREFUSED),
        Verdict::Redirect(port) => {
            // A v4-mapped destination keeps the socket an IPv4 one underneath.
            let target = if destination.address.is_v4() { Address::LOOPBACK4 } else { Address::LOOPBACK6 };
            show6(&ctx, &Endpoint::new(target, port));
            PASS
        }
    }
}

enum Verdict {
    Pass,
    Refuse,
    /// To this port (network byte order) at the loopback address of the destination's family.
    Redirect(u16),
}

#[inline(always)]
fn verdict(ctx: &SockAddrContext, destination: &Endpoint) -> Verdict {
    let sa = ctx.sock_addr;
    if read!(sa as bpf_sock_addr, type_) != SOCK_STREAM || read!(sa as bpf_sock_addr, protocol) != IPPROTO_TCP {
        return Verdict::Pass;
    }
    let netns = netns(ctx);
    // SAFETY: the agent replaces entries whole, and the map frees none before the program is done.
    let Some(pod) = (unsafe { PODS.get(netns) }) else {
        return Verdict::Pass;
    };
    match direct::connect(ctx, destination) {
        Connect::Other => {}
        // SAFETY: the context's own socket, which may have been redirected before.
        Connect::Agents => unsafe {
            let _ = SOCKETS.delete(socket(ctx));
            return Verdict::Pass;
        },
        Connect::NotAgents => {
            count(Counter::DirectRefused);
            debug!(ctx, "refused a second or another connection of a socket that the agent handshakes on");
            return Verdict::Refuse;
        }
    }
    // What it does to a pod's own socket is judged above. Nothing of a pod's is ever in the agent's cgroup, so nothing else is left out.
    let agent = AGENT_CGROUP.load();
    // SAFETY: takes nothing and gives a number.
    if agent != 0 && unsafe { bpf_get_current_cgroup_id() } == agent {
        return Verdict::Pass;
    }
    if stays_in_pod(netns, &destination.address) {
        // The socket may have been redirected before and be used again.
        // SAFETY: the context's own socket.
        let _ = unsafe { SOCKETS.delete(socket(ctx)) };
        return Verdict::Pass;
    }
    let key = PodEndpoint::new(netns, *destination);
    // SAFETY: the value is not read.
    if pod.state != POD_READY && unsafe { PROBES.get(key) }.is_none() {
        count(Counter::OutboundRefusedNotReady);
        return Verdict::Refuse;
    }
    if destination.address.is_link_local6() {
        count(Counter::OutboundRefusedLinkLocal);
        debug!(ctx, "refused a connection to an IPv6 link-local address");
        return Verdict::Refuse;
    }
    let sk = socket(ctx);
    if read!(sk as bpf_sock, bound_dev_if) != 0 {
        count(Counter::OutboundRefusedDevice);
        debug!(ctx, "refused a connection from a socket that is bound to a device");
        return Verdict::Refuse;
    }
    // SAFETY: the value is one aligned word, read whole.
    if let Some(at) = unsafe { REFUSED.get(key) } {
        // SAFETY: takes nothing and gives a number.
        let now = unsafe { bpf_ktime_get_ns() };
        if now.wrapping_sub(*at) < REFUSED_FOR_NANOS {
            count(Counter::OutboundRefusedRecently);
            return Verdict::Refuse;
        }
    }
    let port = if destination.address.is_v4() { pod.port4 } else { pod.port6 };
    if port == 0 {
        count(Counter::OutboundRefusedNoListener);
        return Verdict::Refuse;
    }
    if !remember(ctx, destination) {
        count(Counter::OutboundRefusedStorage);
        error!(ctx, "refused a connection: no memory for the socket's entry");
        return Verdict::Refuse;
    }
    count(Counter::OutboundRedirected);
    Verdict::Redirect(port)
}

/// Loopback, "this host", and the pod's own addresses.
#[inline(always)]
fn stays_in_pod(netns: NetnsCookie, address: &Address) -> bool {
    address.is_loopback()
        || address.is_unspecified()
        // SAFETY: the value is one aligned word, read whole.
        || unsafe { crate::maps::ADDRESSES.get(address) } == Some(&netns)
}

#[inline(always)]
fn remember(ctx: &SockAddrContext, destination: &Endpoint) -> bool {
    // SAFETY: takes nothing and gives a number.
    let cgroup_id = unsafe { bpf_get_current_cgroup_id() };
    let mut entry = SocketEntry { destination: *destination, pad: [0; 4], cgroup_id };
    // SAFETY: the context's own socket; the storage lives as long as the socket, which is locked by its connect().
    unsafe {
        let slot = SOCKETS.get_or_insert_ptr_mut(ctx, Some(&mut entry));
        if slot.is_null() {
            return false;
        }
        *slot = entry;
    }
    true
}

/// Makes connect() fail with this error.
#[inline(always)]
fn refuse(errno: i32) -> i32 {
    // SAFETY: takes a number; on kernels that do not let it be set the error is EPERM, refused all the same.
    let _ = unsafe { bpf_set_retval(-errno) };
    REFUSE
}

/// Tells the agent where the connection wanted to go. A connect that was not turned around removes what an earlier owner of
/// the port may have left, so an entry always belongs to the connection that the agent accepts.
#[sock_ops]
pub fn connecting(ctx: SockOpsContext) -> u32 {
    let ops = ctx.ops;
    if read!(ops as bpf_sock_ops, op) != TCP_CONNECT_CB {
        return 1;
    }
    // SAFETY: the context is this program's own.
    let netns = NetnsCookie(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) });
    // SAFETY: the value is not read.
    if unsafe { PODS.get(netns) }.is_none() {
        return 1;
    }
    let sk = read_pointer!(ops as bpf_sock_ops, __bindgen_anon_2);
    if sk.is_null() {
        return 1;
    }
    let local = if read!(ops as bpf_sock_ops, family) == AF_INET {
        Address::v4(read!(ops as bpf_sock_ops, local_ip4))
    } else if read_address6!(ops as bpf_sock_ops, remote_ip6).is_v4() {
        // The IPv4 address is set by now, its v4-mapped copy is not.
        Address::v4(read!(ops as bpf_sock_ops, local_ip4))
    } else {
        read_address6!(ops as bpf_sock_ops, local_ip6)
    };
    let key = PodEndpoint::new(netns, Endpoint::new(local, (read!(ops as bpf_sock_ops, local_port) as u16).to_be()));
    // SAFETY: the context's own socket, not null.
    let entry: *mut SocketEntry = unsafe {
        bpf_sk_storage_get(core::ptr::from_ref(&SOCKETS).cast_mut().cast(), sk.cast(), core::ptr::null_mut(), 0)
    }
    .cast();
    if entry.is_null() {
        let _ = ORIGINS.remove(key);
        return 1;
    }
    // SAFETY: not null, and lives as long as the socket, which is locked by its connect().
    let entry = unsafe { *entry };
    let origin = Origin {
        destination: entry.destination,
        pad: [0; 4],
        // SAFETY: the context is this program's own.
        socket_cookie: unsafe { bpf_get_socket_cookie(ctx.as_ptr()) },
        cgroup_id: entry.cgroup_id,
    };
    if ORIGINS.insert(key, origin, 0).is_err() {
        // A leftover under this key must not be taken for this connection's.
        let _ = ORIGINS.remove(key);
        count(Counter::OriginLost);
        error!(&ctx, "a connection's destination could not be recorded: the agent will refuse it");
    }
    1
}

#[cgroup_sock_addr(getpeername4)]
pub fn getpeername4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    let shown =
        Endpoint::new(Address::v4(read!(sa as bpf_sock_addr, user_ip4)), read!(sa as bpf_sock_addr, user_port) as u16);
    if let Some(peer) = true_peer(&ctx, shown)
        && peer.address.is_v4()
    {
        write!(sa as bpf_sock_addr, user_ip4, peer.address.words[3]);
        write!(sa as bpf_sock_addr, user_port, u32::from(peer.port));
    }
    PASS
}

#[cgroup_sock_addr(getpeername6)]
pub fn getpeername6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    let shown =
        Endpoint::new(read_address6!(sa as bpf_sock_addr, user_ip6), read!(sa as bpf_sock_addr, user_port) as u16);
    if let Some(peer) = true_peer(&ctx, shown) {
        show6(&ctx, &peer);
    }
    PASS
}

/// The original destination of a redirected socket or of a direct one, the true client of an accepted one.
#[inline(always)]
fn true_peer(ctx: &SockAddrContext, shown: Endpoint) -> Option<Endpoint> {
    // SAFETY: the context's own socket.
    let entry = unsafe { SOCKETS.get_ptr_mut(ctx) };
    if !entry.is_null() {
        // SAFETY: not null, and lives as long as the socket.
        return Some(unsafe { (*entry).destination });
    }
    if let Some(shown) = direct::shown(ctx) {
        return Some(shown);
    }
    // SAFETY: the agent replaces entries whole, and the map frees none before the program is done.
    unsafe { CLIENTS.get(PodEndpoint::new(netns(ctx), shown)) }.copied()
}

#[cgroup_sock_addr(getsockname4)]
pub fn getsockname4(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    if let Some(own) = own_address(&ctx, Address::v4(read!(sa as bpf_sock_addr, user_ip4))) {
        write!(sa as bpf_sock_addr, user_ip4, own.words[3]);
    }
    PASS
}

#[cgroup_sock_addr(getsockname6)]
pub fn getsockname6(ctx: SockAddrContext) -> i32 {
    let sa = ctx.sock_addr;
    if let Some(own) = own_address(&ctx, read_address6!(sa as bpf_sock_addr, user_ip6)) {
        show6(&ctx, &Endpoint::new(own, read!(sa as bpf_sock_addr, user_port) as u16));
    }
    PASS
}

/// What a redirected socket calls itself: the pod's address in place of the loopback address it really has.
#[inline(always)]
fn own_address(ctx: &SockAddrContext, shown: Address) -> Option<Address> {
    // SAFETY: the context's own socket.
    if !shown.is_loopback() || unsafe { SOCKETS.get_ptr_mut(ctx) }.is_null() {
        return None;
    }
    // SAFETY: the agent replaces entries whole, and the map frees none before the program is done.
    let pod = unsafe { PODS.get(netns(ctx)) }?;
    let own = if shown.is_v4() { pod.own4 } else { pod.own6 };
    if own.is_unspecified() { None } else { Some(own) }
}

/// MPTCP can open further paths that no hook sees. Refused like on a kernel without it, which programs are used to.
#[cgroup_sock(sock_create)]
pub fn create(ctx: SockContext) -> i32 {
    let sk = ctx.sock;
    if read!(sk as bpf_sock, protocol) != IPPROTO_MPTCP {
        return PASS;
    }
    // SAFETY: the context is this program's own.
    let netns = NetnsCookie(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) });
    // SAFETY: the value is not read.
    if unsafe { PODS.get(netns) }.is_none() {
        return PASS;
    }
    count(Counter::MptcpRefused);
    refuse(EPROTONOSUPPORT)
}

#[inline(always)]
fn netns(ctx: &SockAddrContext) -> NetnsCookie {
    // SAFETY: the context is the program's own.
    NetnsCookie(unsafe { bpf_get_netns_cookie(ctx.as_ptr()) })
}

#[inline(always)]
pub(crate) fn socket(ctx: &SockAddrContext) -> *mut bpf_sock {
    let sa = ctx.sock_addr;
    read_pointer!(sa as bpf_sock_addr, __bindgen_anon_1)
}

#[inline(always)]
fn show6(ctx: &SockAddrContext, endpoint: &Endpoint) {
    let sa = ctx.sock_addr;
    write!(sa as bpf_sock_addr, user_ip6[0], endpoint.address.words[0]);
    write!(sa as bpf_sock_addr, user_ip6[1], endpoint.address.words[1]);
    write!(sa as bpf_sock_addr, user_ip6[2], endpoint.address.words[2]);
    write!(sa as bpf_sock_addr, user_ip6[3], endpoint.address.words[3]);
    write!(sa as bpf_sock_addr, user_port, u32::from(endpoint.port));
}
