//! What the kernel programs count. Every refusal has a counter of its own: a connection that fails must say why.

macro_rules! counters {
    ($($(#[doc = $doc:literal])+ $variant:ident = $name:literal,)+) => {
        /// Index into the per-CPU array `COUNTERS`.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum Counter {
            $($(#[doc = $doc])+ $variant,)+
        }

        impl Counter {
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The name in metrics.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name),+ }
            }
        }
    };
}

counters! {
    /// connect() was rewritten to the agent's listener.
    OutboundRedirected = "outbound_redirected",
    /// The pod is enrolled but not ready.
    OutboundRefusedNotReady = "outbound_refused_not_ready",
    /// The destination refused less than a second ago.
    OutboundRefusedRecently = "outbound_refused_recently",
    /// The agent has no listener of this family in the pod.
    OutboundRefusedNoListener = "outbound_refused_no_listener",
    /// IPv6 link-local destinations cannot be reached through the agent.
    OutboundRefusedLinkLocal = "outbound_refused_link_local",
    /// A socket bound to a device cannot reach the agent's listener, and must not go around it.
    OutboundRefusedDevice = "outbound_refused_device",
    /// The kernel had no memory for the socket's entry.
    OutboundRefusedStorage = "outbound_refused_storage",
    /// The original destination could not be recorded: the agent refuses the connection it belongs to.
    OriginLost = "origin_lost",
    /// An MPTCP socket was refused, so that the program falls back to TCP.
    MptcpRefused = "mptcp_refused",
    /// SYNs for the pod that were given to the agent's listener.
    InboundSteered = "inbound_steered",
    /// SYNs for a pod that is enrolled but not ready.
    InboundRefusedNotReady = "inbound_refused_not_ready",
    /// SYNs for an address in the pod that the agent does not know.
    InboundRefusedAddress = "inbound_refused_address",
    /// SYNs for a pod whose agent is not there.
    InboundRefusedNoListener = "inbound_refused_no_listener",
    /// TCP packets that a pod's own socket tried to send past the agent.
    EgressDropped = "egress_dropped",
    /// UDP packets that left a pod: they are outside the mesh.
    UdpPassed = "udp_passed",
    /// Segments of a socket in handshake that held something else than what the agent announced. The socket is poisoned then.
    DirectDropped = "direct_dropped",
    /// A socket in handshake was connected a second time, or elsewhere.
    DirectRefused = "direct_refused",
    /// Segments of a released socket that held something else than TLS records. The socket is poisoned then.
    DirectForeign = "direct_foreign",
    /// Segments that TCP has to send again, which speaks against nobody: the socket was released while they were on their way, or
    /// one before them was lost on its way to the gate.
    DirectHeldBack = "direct_held_back",
    /// The kubelet's SYNs for a port that the pod declares in a probe: they go to the application, past the agent.
    KubeletAdmitted = "kubelet_admitted",
    /// The kubelet connects to such a port and cannot be followed: it is refused as anybody's plaintext would be.
    KubeletLost = "kubelet_lost",
    /// A connection of the kubelet's came to a pod from another port than it left with: the node's NAT. It is refused likewise.
    KubeletTranslated = "kubelet_translated",
}

const _: () = assert!(Counter::ALL.len() <= crate::MAX_COUNTERS as usize);

#[cfg(test)]
mod tests {
    use super::Counter;

    #[test]
    fn every_counter_has_its_own_slot_and_name() {
        for (index, counter) in Counter::ALL.iter().enumerate() {
            assert_eq!(*counter as usize, index);
            assert_eq!(Counter::ALL.iter().filter(|other| other.name() == counter.name()).count(), 1);
        }
    }
}
