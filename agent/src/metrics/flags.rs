//! Envoy's response flags for the ways in which connections end here, as Istio's metrics and access logs have them. Upstream is the
//! server's side of an agent, downstream the client's: for outbound connections the application is downstream, for inbound ones the peer.

use std::fmt;

use serde::{Serialize, Serializer};

use crate::words::{Direction, KUBELET_PROBE};

macro_rules! flags {
    ($($(#[doc = $doc:literal])+ $flag:ident = $text:literal,)+) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum ResponseFlags {
            $($(#[doc = $doc])+ $flag,)+
        }

        impl ResponseFlags {
            pub const ALL: &'static [Self] = &[$(Self::$flag),+];

            pub fn as_str(self) -> &'static str {
                match self { $(Self::$flag => $text),+ }
            }
        }
    };
}

flags! {
    /// Nothing to remark.
    None = "-",
    /// The server's side could not be connected to, or no handshake with it succeeded.
    UpstreamFailure = "UF",
    /// The service has no endpoint.
    NoHealthyUpstream = "UH",
    /// More connections than a DestinationRule allows.
    UpstreamOverflow = "UO",
    /// No such port, or nothing that takes such a connection.
    NoRoute = "NR",
    /// The server's side ended it.
    UpstreamTermination = "UC",
    /// The client's side ended it.
    DownstreamTermination = "DC",
    /// The server's side did not keep to TLS.
    UpstreamProtocol = "UPE",
    /// The client's side did not keep to TLS.
    DownstreamProtocol = "DPE",
    /// Policy forbids it.
    Unauthorized = "UAEX",
    /// The agent itself ended it.
    LocalReset = "LR",
}

impl ResponseFlags {
    /// By the reason that is counted and logged, if it did not end in order.
    pub fn of(direction: Direction, refused: bool, reason: Option<&str>) -> Self {
        let Some(reason) = reason else { return Self::None };
        let outbound = direction == Direction::Outbound;
        let side = |up, down, at_server: bool| if at_server { up } else { down };
        let ended = |at_server| side(Self::UpstreamTermination, Self::DownstreamTermination, at_server);
        let broken = |at_server| side(Self::UpstreamProtocol, Self::DownstreamProtocol, at_server);
        match reason {
            "policy" | "revoked" => Self::Unauthorized,
            // Envoy finds no filter chain for it.
            "plaintext_under_strict" | "not_captured" | "no_port" => Self::NoRoute,
            "no_endpoint" | "pod_not_told" => Self::NoHealthyUpstream,
            "max_connections" => Self::UpstreamOverflow,
            "refused" | "unreachable" => Self::UpstreamFailure,
            "client" => Self::DownstreamTermination,
            "application_reset" => ended(!outbound),
            "peer_reset" | "peer_dead" | "peer_alert" | "truncated" if !refused => ended(outbound),
            "bad_record" => broken(outbound),
            "no_svid" if outbound => Self::UpstreamFailure,
            "capture" | "tls_config" | "ktls_required" | "offload" | "no_svid" | "cannot_rekey" | "record_limit"
            | "no_pipe" | "abandoned" => Self::LocalReset,
            "unobserved" | KUBELET_PROBE => Self::None,
            // What is left are handshakes that failed.
            _ if outbound => Self::UpstreamFailure,
            "truncated" | "io" => Self::DownstreamTermination,
            _ => Self::DownstreamProtocol,
        }
    }

    pub(super) fn index(self) -> usize {
        Self::ALL.iter().position(|flag| *flag == self).unwrap_or_default()
    }
}

impl fmt::Display for ResponseFlags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl Serialize for ResponseFlags {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_ending_has_envoys_flag_from_the_agents_own_point_of_view() {
        let table = [
            // reason, refused, at the client's agent, at the server's
            (None, false, "-", "-"),
            (Some("policy"), true, "UAEX", "UAEX"),
            (Some("revoked"), false, "UAEX", "UAEX"),
            (Some("plaintext_under_strict"), true, "NR", "NR"),
            (Some("no_endpoint"), true, "UH", "UH"),
            (Some("pod_not_told"), true, "UH", "UH"),
            (Some("no_port"), true, "NR", "NR"),
            (Some("max_connections"), true, "UO", "UO"),
            (Some("refused"), true, "UF", "UF"),
            (Some("unreachable"), true, "UF", "UF"),
            (Some("client"), true, "DC", "DC"),
            (Some("application_reset"), false, "DC", "UC"),
            (Some("peer_reset"), false, "UC", "DC"),
            (Some("peer_dead"), false, "UC", "DC"),
            (Some("truncated"), false, "UC", "DC"),
            (Some("truncated"), true, "UF", "DC"),
            (Some("peer_alert"), false, "UC", "DC"),
            (Some("peer_alert"), true, "UF", "DPE"),
            (Some("bad_record"), false, "UPE", "DPE"),
            (Some("no_svid"), true, "UF", "LR"),
            (Some("expired"), true, "UF", "DPE"),
            (Some("wrong_identity"), true, "UF", "DPE"),
            (Some("timeout"), true, "UF", "DPE"),
            (Some("abandoned"), false, "LR", "LR"),
            (Some("unobserved"), false, "-", "-"),
        ];
        for (reason, refused, outbound, inbound) in table {
            let of = |direction| ResponseFlags::of(direction, refused, reason).as_str();
            assert_eq!((of(Direction::Outbound), of(Direction::Inbound)), (outbound, inbound), "{reason:?} {refused}");
        }
    }

    #[test]
    fn each_flag_has_a_place_of_its_own() {
        for (place, flag) in ResponseFlags::ALL.iter().enumerate() {
            assert_eq!(flag.index(), place);
        }
    }
}
