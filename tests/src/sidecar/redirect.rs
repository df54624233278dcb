//! What Istio's init container does to a pod's network: connections out of the pod and into it are redirected to the sidecar, those of the
//! sidecar itself are not. The same rules as istio-iptables writes (istio/istio tools/istio-iptables/pkg/capture/run.go), for nftables.

use std::{fs, path::Path};

use anyhow::{Context, Result};

use super::{INBOUND, OUTBOUND, USER};
use crate::{
    process::{Place, succeed},
    wait::seconds,
};

/// Redirects what comes to the place's network namespace and what leaves it. `file` holds the rules.
pub(super) fn redirect(place: &Place, file: &Path) -> Result<()> {
    fs::write(file, rules()).with_context(|| format!("writing {}", file.display()))?;
    succeed(place.command("nft").arg("-f").arg(file), seconds(20)).map(drop).context("redirecting to the sidecar")
}

/// 127.0.0.6 is what the sidecar calls its application from. Istio leaves alone the ports of its own telemetry and readiness, which are the
/// first rule of the chain `inbound`. IPv6 is refused: nothing here is measured over it, and nothing shall pass the sidecar by.
fn rules() -> String {
    format!(
        "table ip sidecar {{
  chain outbound {{
    type nat hook output priority -100; policy accept;
    meta l4proto != tcp accept
    ip saddr 127.0.0.6 oifname \"lo\" accept
    meta l4proto tcp meta skuid {USER} oifname \"lo\" ip daddr != 127.0.0.1 redirect to :{INBOUND}
    meta skuid != {USER} oifname \"lo\" accept
    meta skuid {USER} accept
    ip daddr 127.0.0.1 accept
    meta l4proto tcp redirect to :{OUTBOUND}
  }}
  chain inbound {{
    type nat hook prerouting priority dstnat; policy accept;
    tcp dport {{ 15008, 15020, 15021, 15090 }} accept
    meta l4proto tcp redirect to :{INBOUND}
  }}
}}
table ip6 sidecar {{
  chain outbound {{
    type filter hook output priority filter; policy accept;
    meta l4proto tcp oifname != \"lo\" reject with tcp reset
  }}
  chain inbound {{
    type filter hook input priority filter; policy accept;
    meta l4proto tcp iifname != \"lo\" reject with tcp reset
  }}
}}
"
    )
}
