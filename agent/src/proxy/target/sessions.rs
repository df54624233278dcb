//! Session affinity: which endpoint a client's connections to a service go to. Pure but for the table. As kube-proxy has it, a session is one
//! client's, to one port of a service, of one IP family, and its time is counted from its last new connection.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use crate::{policy::ServiceEndpoint, sys::netns::NetnsCookie};

/// So many are remembered; beyond it those that were used last longest ago go.
const MOST: usize = 1 << 16;

/// One pod, and a service's port by the first of its addresses.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Client {
    pub pod: NetnsCookie,
    pub service: IpAddr,
    pub port: u16,
    pub is_v4: bool,
}

/// Whose session a connection belongs to, and how long it lasts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Affinity {
    pub(super) client: Client,
    pub(super) life: Duration,
}

struct Session {
    endpoint: SocketAddr,
    until: Instant,
}

#[derive(Default)]
pub(super) struct Sessions(HashMap<Client, Session>);

impl Sessions {
    /// Puts the session's endpoint first, if it is among those that there are. Whatever is first then has the session.
    pub fn lead(&mut self, affinity: Affinity, order: &mut [&ServiceEndpoint], now: Instant) {
        let held = self.0.get(&affinity.client).filter(|session| now < session.until).map(|session| session.endpoint);
        if let Some(at) = order.iter().position(|endpoint| Some(endpoint.address) == held) {
            order[..=at].rotate_right(1);
        }
        if let Some(first) = order.first() {
            self.hold(affinity, first.address, now);
        }
    }

    /// The session is the endpoint's, from now on.
    pub fn hold(&mut self, Affinity { client, life }: Affinity, endpoint: SocketAddr, now: Instant) {
        if self.0.len() >= MOST && !self.0.contains_key(&client) {
            self.make_room(now);
        }
        self.0.insert(client, Session { endpoint, until: now + life });
    }

    /// The endpoint has not taken a connection.
    pub fn lose(&mut self, client: &Client, endpoint: SocketAddr) {
        if self.0.get(client).is_some_and(|session| session.endpoint == endpoint) {
            self.0.remove(client);
        }
    }

    /// What has run out goes, and if that is less than half then those that would run out first.
    fn make_room(&mut self, now: Instant) {
        let mut ends: Vec<Instant> = self.0.values().map(|session| session.until).collect();
        let middle = ends.len() / 2;
        let median = *ends.select_nth_unstable(middle).1;
        self.0.retain(|_, session| session.until > median.max(now));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIFE: Duration = Duration::from_secs(60);

    fn of(pod: u64, port: u16) -> Affinity {
        let client = Client { pod: NetnsCookie(pod), service: "10.96.0.1".parse().unwrap(), port, is_v4: true };
        Affinity { client, life: LIFE }
    }

    fn endpoint(number: u8) -> ServiceEndpoint {
        ServiceEndpoint { address: SocketAddr::from(([10, 0, 0, number], 80)), workload: None, zone: None }
    }

    /// Who is asked first, where there are these endpoints in this order.
    fn first(sessions: &mut Sessions, affinity: Affinity, there: &[u8], now: Instant) -> Option<u8> {
        let all: Vec<_> = there.iter().map(|number| endpoint(*number)).collect();
        let mut order: Vec<_> = all.iter().collect();
        sessions.lead(affinity, &mut order, now);
        assert_eq!(order.len(), there.len());
        let IpAddr::V4(ip) = order.first()?.address.ip() else { return None };
        Some(ip.octets()[3])
    }

    #[test]
    fn a_client_stays_with_its_endpoint_and_others_have_their_own() {
        let (mut sessions, now) = (Sessions::default(), Instant::now());
        assert_eq!(first(&mut sessions, of(1, 80), &[1, 2, 3], now), Some(1));
        assert_eq!(first(&mut sessions, of(1, 80), &[3, 2, 1], now), Some(1));
        assert_eq!(first(&mut sessions, of(2, 80), &[3, 2, 1], now), Some(3), "another pod");
        assert_eq!(first(&mut sessions, of(1, 81), &[2, 3, 1], now), Some(2), "another port");
        let mut v6 = of(1, 80);
        v6.client.is_v4 = false;
        assert_eq!(first(&mut sessions, v6, &[2, 3, 1], now), Some(2), "another family");
    }

    #[test]
    fn time_counts_from_the_last_connection() {
        let (mut sessions, mut now) = (Sessions::default(), Instant::now());
        assert_eq!(first(&mut sessions, of(1, 80), &[1, 2], now), Some(1));
        for _ in 0..3 {
            now += LIFE - Duration::from_secs(1);
            assert_eq!(first(&mut sessions, of(1, 80), &[2, 1], now), Some(1));
        }
        assert_eq!(first(&mut sessions, of(1, 80), &[2, 1], now + LIFE), Some(2));
    }

    #[test]
    fn an_endpoint_that_is_gone_has_no_session_and_does_not_get_it_back() {
        let (mut sessions, now) = (Sessions::default(), Instant::now());
        assert_eq!(first(&mut sessions, of(1, 80), &[1, 2], now), Some(1));
        assert_eq!(first(&mut sessions, of(1, 80), &[2, 3], now), Some(2));
        assert_eq!(first(&mut sessions, of(1, 80), &[1, 2, 3], now), Some(2));
        assert_eq!(first(&mut sessions, of(1, 80), &[], now), None);
    }

    #[test]
    fn whoever_takes_the_connection_instead_has_the_session() {
        let (mut sessions, now) = (Sessions::default(), Instant::now());
        assert_eq!(first(&mut sessions, of(1, 80), &[1, 2], now), Some(1));
        sessions.lose(&of(1, 80).client, endpoint(1).address);
        sessions.hold(of(1, 80), endpoint(2).address, now);
        assert_eq!(first(&mut sessions, of(1, 80), &[1, 2], now), Some(2));
        sessions.lose(&of(1, 80).client, endpoint(1).address);
        assert_eq!(first(&mut sessions, of(1, 80), &[1, 2], now), Some(2), "another's failure is not its");
    }

    #[test]
    fn however_many_clients_there_are_so_many_are_remembered_and_the_latest_are_among_them() {
        let (mut sessions, start) = (Sessions::default(), Instant::now());
        let last = 2 * MOST as u64;
        for pod in 0..=last {
            let now = start + Duration::from_micros(pod);
            assert!(first(&mut sessions, of(pod, 80), &[1, 2], now).is_some());
        }
        assert!(sessions.0.len() <= MOST, "{}", sessions.0.len());
        assert_eq!(first(&mut sessions, of(last, 80), &[2, 1], start + Duration::from_secs(1)), Some(1));
    }

    proptest! {
        /// Only endpoints that there are come out, each once, and the one that had the session first, if it is there still.
        #[test]
        fn a_session_changes_the_order_alone(rounds in prop::collection::vec((0_u64..3, prop::collection::vec(0_u8..5, 0..5), 0_u64..40), 0..40)) {
            let (mut sessions, mut now) = (Sessions::default(), Instant::now());
            let mut expected: HashMap<u64, (u8, Instant)> = HashMap::new();
            for (pod, mut there, passed) in rounds {
                now += Duration::from_secs(passed);
                there.sort_unstable();
                there.dedup();
                let found = first(&mut sessions, of(pod, 80), &there, now);
                let held = expected.get(&pod).filter(|(number, until)| now < *until && there.contains(number));
                let should = held.map(|(number, _)| *number).or(there.first().copied());
                prop_assert_eq!(found, should);
                if let Some(number) = found {
                    expected.insert(pod, (number, now + LIFE));
                }
            }
        }
    }
}
