//! Notices peers that died with bytes in flight. TCP itself gives up after a quarter of an hour; TCP_USER_TIMEOUT would also end
//! a living peer that keeps its window shut, which an application may do for as long as it likes. So the kernel is asked:
//! segments or window probes that nobody answers, for longer than the time allowed.

use std::{sync::Arc, time::Duration};

use super::{Context, connections::Live, pump::DEAD_PEER};
use crate::sys::socket::{self, TcpInfo};

/// Unanswered window probes in a row before silence means death: probes are up to two minutes apart (tcp_timer.c).
const PROBES: u8 = 3;

pub async fn run(ctx: Arc<Context>) {
    let limit = ctx.settings.dead_peer;
    let mut tick = tokio::time::interval((limit / 4).max(Duration::from_millis(250)));
    loop {
        tick.tick().await;
        for live in ctx.connections.all() {
            if dead(&live, limit) {
                live.revoke(DEAD_PEER);
            }
        }
    }
}

fn dead(live: &Live, limit: Duration) -> bool {
    live.wire().and_then(|wire| socket::tcp_info(&wire).ok()).is_some_and(|info| silent(info, limit))
}

fn silent(info: TcpInfo, limit: Duration) -> bool {
    let unanswered = (info.unacked > 0 && info.retransmits > 0) || info.probes >= PROBES;
    unanswered && info.since_last_ack >= limit
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_secs(60);

    #[test]
    fn only_unanswered_segments_or_probes_count_as_death() {
        let idle = TcpInfo { since_last_ack: 100 * LIMIT, ..TcpInfo::default() };
        assert!(!silent(idle, LIMIT), "an idle connection is keepalive's");
        let lost = TcpInfo { unacked: 3, retransmits: 7, since_last_ack: LIMIT, ..TcpInfo::default() };
        assert!(silent(lost, LIMIT));
        assert!(!silent(TcpInfo { since_last_ack: LIMIT / 2, ..lost }, LIMIT));
        let shut_window = TcpInfo { probes: 1, since_last_ack: 2 * LIMIT, ..TcpInfo::default() };
        assert!(!silent(shut_window, LIMIT), "a reader that pauses is alive");
        assert!(silent(TcpInfo { probes: 3, ..shut_window }, LIMIT));
    }
}
