//! The spare connections of one pod: handshaken with the pod's identity, to places that it was seen to connect to again and again, and
//! each given to one connection of the pod's. They go soon if nobody comes for them, and with the pod, its certificate or the
//! trust that they were made under. What a spare connection is on the wire is `spare`'s.

use std::{
    collections::HashMap,
    net::SocketAddr,
    sync::{Arc, Mutex, Weak},
    time::{Duration, Instant},
};

use tokio::{net::TcpStream, sync::OwnedSemaphorePermit};

use super::{
    Context, Proved, capture,
    connections::lock,
    handshake,
    offload::{self, Records},
    pod::Pod,
    refusal::Refusal,
    spare,
};
use crate::{
    identity::{SpiffeId, Svid, Trust},
    tls::config::{self, Learned, Offer},
    words::Direction,
};

/// How long one waits for a connection of the pod's.
const LIFE: Duration = Duration::from_secs(10);
/// What a connection counts of `Line::demand` after this time is a half.
const HALF: f64 = 1.0;
/// From how much demand on the next connection is expected: two within about a second.
const WARM: f64 = 1.5;
/// One spare connection more for so much demand.
const EACH: f64 = 40.0;
/// The most to one place.
const MOST: usize = 8;
/// How many places of a pod's are watched for demand.
const PLACES: usize = 1024;
/// After a failure, as of a peer that has no spare connections.
const REST: Duration = Duration::from_secs(30);
/// While there are others, one that was taken is made up for after this time: its handshake is not to take the processor from the
/// connection that took it.
const PAUSE: Duration = Duration::from_millis(5);
/// How often is looked for what has become of them.
const LOOK: Duration = Duration::from_secs(1);

/// Of one agent.
pub const SPARES: usize = 512;

/// Where a connection is to go, and whom it is to meet there.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Aim {
    pub address: SocketAddr,
    /// Port and host of the server name.
    pub port: u16,
    pub host: String,
    pub expect: Vec<SpiffeId>,
}

pub(super) struct Spare {
    pub wire: TcpStream,
    pub records: Records,
    pub proved: Proved,
    made: Instant,
    svid: Arc<Svid>,
    trust: Arc<Trust>,
    _place: OwnedSemaphorePermit,
}

impl Spare {
    /// Nothing has changed that a handshake of now would heed.
    fn is_fit(&self, svid: &Arc<Svid>, trust: &Arc<Trust>, now: Instant) -> bool {
        Arc::ptr_eq(&self.svid, svid) && Arc::ptr_eq(&self.trust, trust) && now.duration_since(self.made) < LIFE
    }
}

/// What is known of one place.
struct Line {
    ready: Vec<Spare>,
    making: usize,
    demand: f64,
    asked: Instant,
    rests_until: Option<Instant>,
}

impl Line {
    fn new(now: Instant) -> Self {
        Self { ready: Vec::new(), making: 0, demand: 0.0, asked: now, rests_until: None }
    }

    /// Takes out those whose peer has ended them, which holds none for us then: it is restarted, or has no room for more.
    fn drop_dead(&mut self, now: Instant) {
        let before = self.ready.len();
        self.ready.retain(|spare| spare::lives(&spare.wire));
        if self.ready.len() < before {
            self.rests_until = Some(now + REST);
        }
    }

    fn ask(&mut self, now: Instant) {
        let passed = now.duration_since(self.asked).as_secs_f64();
        self.demand = self.demand * 0.5f64.powf(passed / HALF) + 1.0;
        self.asked = now;
    }

    /// How many to make.
    fn missing(&self, now: Instant) -> usize {
        if self.rests_until.is_some_and(|until| now < until) {
            return 0;
        }
        wanted(self.demand).saturating_sub(self.ready.len() + self.making)
    }
}

/// How many spare connections so much demand is worth.
fn wanted(demand: f64) -> usize {
    // Demand is never negative, and what does not fit is the most.
    if demand < WARM { 0 } else { ((1.0 + demand / EACH) as usize).min(MOST) }
}

#[derive(Default)]
pub(super) struct Pool(Mutex<Lines>);

#[derive(Default)]
struct Lines {
    places: HashMap<Aim, Line>,
    watched: bool,
    closed: bool,
}

impl Pool {
    /// One that is as good as a connection made now.
    fn take(&self, aim: &Aim, svid: &Arc<Svid>, trust: &Arc<Trust>) -> Option<Spare> {
        let now = Instant::now();
        let mut lines = lock(&self.0);
        let line = lines.places.get_mut(aim)?;
        while let Some(spare) = line.ready.pop() {
            if !spare::lives(&spare.wire) {
                line.rests_until = Some(now + REST);
            } else if spare.is_fit(svid, trust, now) {
                return Some(spare);
            }
        }
        None
    }

    /// The pod is served no more.
    pub(super) fn close(&self) {
        let mut lines = lock(&self.0);
        lines.closed = true;
        lines.places.clear();
    }

    /// A connection of the pod's went there: how many spare ones to make, and after what time.
    fn asked(&self, aim: &Aim, now: Instant) -> (usize, Duration) {
        let mut lines = lock(&self.0);
        if lines.closed || (lines.places.len() >= PLACES && !lines.places.contains_key(aim)) {
            return (0, Duration::ZERO);
        }
        let line = lines.places.entry(aim.clone()).or_insert_with(|| Line::new(now));
        line.ask(now);
        let missing = line.missing(now);
        line.making += missing;
        (missing, if line.ready.is_empty() { Duration::ZERO } else { PAUSE })
    }

    fn made(&self, aim: &Aim, made: Option<Spare>) {
        let mut lines = lock(&self.0);
        if lines.closed {
            return;
        }
        let Some(line) = lines.places.get_mut(aim) else { return };
        line.making = line.making.saturating_sub(1);
        match made {
            Some(spare) => line.ready.push(spare),
            None => line.rests_until = Some(Instant::now() + REST),
        }
    }

    /// Takes out what nobody came for; false when nothing is left to look after.
    fn sweep(&self, now: Instant) -> (usize, bool) {
        let mut lines = lock(&self.0);
        let mut unused = 0;
        lines.places.retain(|_, line| {
            let before = line.ready.len();
            line.drop_dead(now);
            line.ready.retain(|spare| now.duration_since(spare.made) < LIFE);
            unused += before - line.ready.len();
            let rests = line.rests_until.is_some_and(|until| now < until);
            rests || line.making > 0 || !line.ready.is_empty() || now.duration_since(line.asked) < LIFE
        });
        lines.watched = !lines.places.is_empty();
        (unused, lines.watched)
    }

    fn begin_watch(&self) -> bool {
        !std::mem::replace(&mut lock(&self.0).watched, true)
    }
}

/// One that was made before the pod's connection, and is that connection's from now on.
pub(super) fn claim(ctx: &Context, pod: &Pod, aim: &Aim, app: &TcpStream) -> Result<Option<Spare>, Refusal> {
    let svid = ctx.svid(&pod.workload.id)?;
    while let Some(mut spare) = pod.pool.take(aim, &svid, &ctx.identities.trust()) {
        match spare::claim(&spare.wire, &mut spare.records, app) {
            Ok(()) => {
                ctx.metrics.spare("used", 1);
                return Ok(Some(spare));
            }
            Err(error) => tracing::debug!(destination = %aim.address, %error, "a spare connection was gone"),
        }
    }
    Ok(None)
}

/// A connection of the pod's went there, to a peer that is up to spare ones: so the next may find one.
pub(super) fn asked(ctx: &Arc<Context>, pod: &Arc<Pod>, aim: &Aim) {
    if !ctx.settings.spares || config::WITHOUT_RECORDS {
        return;
    }
    let (missing, after) = pod.pool.asked(aim, Instant::now());
    if pod.pool.begin_watch() {
        tokio::spawn(watch(ctx.clone(), Arc::downgrade(pod)));
    }
    for _ in 0..missing {
        let (ctx, pod, aim) = (ctx.clone(), pod.clone(), aim.clone());
        tokio::spawn(async move {
            if !after.is_zero() {
                tokio::time::sleep(after).await;
            }
            let made = match ctx.spares.clone().try_acquire_owned() {
                Err(_) => None,
                Ok(place) => make(&ctx, &pod, &aim, place).await.unwrap_or_else(|error| {
                    tracing::debug!(destination = %aim.address, %error, "no spare connection could be made");
                    None
                }),
            };
            ctx.metrics.spare(if made.is_some() { "made" } else { "failed" }, 1);
            pod.pool.made(&aim, made);
        });
    }
}

async fn watch(ctx: Arc<Context>, pod: Weak<Pod>) {
    loop {
        tokio::time::sleep(LOOK).await;
        let Some(pod) = pod.upgrade() else { return };
        let (unused, more) = pod.pool.sweep(Instant::now());
        ctx.metrics.spare("unused", unused as u64);
        if !more {
            return;
        }
    }
}

/// `None` if the peer does not know what that is.
async fn make(ctx: &Context, pod: &Pod, aim: &Aim, place: OwnedSemaphorePermit) -> Result<Option<Spare>, Refusal> {
    let (svid, trust, learned) = (ctx.svid(&pod.workload.id)?, ctx.identities.trust(), Learned::default());
    let mut wire =
        capture::connect(&pod.netns, None, aim.address, ctx.settings.connect).await.map_err(Refusal::connecting)?;
    capture::guard(&wire, ctx.settings.dead_peer).map_err(Refusal::Unreachable)?;
    let parameters = ctx.parameters(Direction::Outbound, aim.address);
    let config =
        config::client_config_with(parameters, &svid, trust.clone(), &aim.expect, Offer::Spare, learned.clone())?;
    let since = Instant::now();
    let name = config::server_name(aim.port, &aim.host);
    let result = handshake::connect(&mut wire, config, name, ctx.settings.handshake).await;
    let secured = ctx.count_handshake(Direction::Outbound, since, result)?;
    // Istio's sidecars go on without a common name; what they would make of the claim nobody knows.
    if secured.alpn.as_deref() != Some(config::SPARE) {
        return Ok(None);
    }
    let proved = Proved::new(&secured, &learned);
    let records = offload::offload(&wire, secured, ctx.settings.records, &ctx.kernel)?;
    Ok(Some(Spare { wire, records, proved, made: Instant::now(), svid, trust, _place: place }))
}

#[cfg(test)]
mod tests {
    use rustls::RootCertStore;
    use tokio::{io::AsyncWriteExt as _, net::TcpListener, sync::Semaphore};

    use super::*;
    use crate::{
        identity::{Ca, TrustDomain},
        words::{PumpKind, TlsFacts},
    };

    fn aim(port: u16) -> Aim {
        Aim { address: SocketAddr::new([10, 0, 0, 1].into(), port), port, host: "web".into(), expect: Vec::new() }
    }

    /// What a handshake would go by.
    fn grounds() -> (Arc<Svid>, Arc<Trust>) {
        let ca = Ca::ephemeral(&TrustDomain::default()).unwrap();
        let id = SpiffeId::new(&TrustDomain::default(), "shop", "web").unwrap();
        let trust = Trust::new(TrustDomain::default(), Arc::new(RootCertStore::empty()));
        (Arc::new(ca.issue(&id, Duration::from_secs(3600)).unwrap()), Arc::new(trust))
    }

    /// A pool with one spare connection to port 1, and its peer's end.
    async fn pool(svid: &Arc<Svid>, trust: &Arc<Trust>, made: Instant) -> (Pool, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let wire = TcpStream::connect(listener.local_addr().unwrap()).await.unwrap();
        let (peer, _) = listener.accept().await.unwrap();
        let tls = TlsFacts { cipher: String::new(), group: None, alpn: None };
        let spare = Spare {
            wire,
            records: Records::Plain(PumpKind::Copy),
            proved: Proved { peer: svid.id.clone(), voucher: None, tls },
            made,
            svid: svid.clone(),
            trust: trust.clone(),
            _place: Arc::new(Semaphore::new(1)).acquire_owned().await.unwrap(),
        };
        let pool = Pool::default();
        pool.asked(&aim(1), made);
        pool.made(&aim(1), Some(spare));
        (pool, peer)
    }

    #[tokio::test]
    async fn one_is_used_once_and_only_as_it_was_made() {
        let ((svid, trust), now) = (grounds(), Instant::now());
        let (as_made, _peer) = pool(&svid, &trust, now).await;
        assert!(as_made.take(&aim(2), &svid, &trust).is_none(), "another place");
        let other = Aim { expect: vec![svid.id.clone()], ..aim(1) };
        assert!(as_made.take(&other, &svid, &trust).is_none(), "somebody else is to be met there");
        assert!(as_made.take(&aim(1), &svid, &trust).is_some());
        assert!(as_made.take(&aim(1), &svid, &trust).is_none(), "it was given away");

        let (renewed, renewed_trust) = grounds();
        for (svid_now, trust_now, age) in
            [(&renewed, &trust, Duration::ZERO), (&svid, &renewed_trust, Duration::ZERO), (&svid, &trust, LIFE)]
        {
            let (pool, _peer) = pool(&svid, &trust, now.checked_sub(age).unwrap()).await;
            assert!(pool.take(&aim(1), svid_now, trust_now).is_none(), "{age:?}");
        }
    }

    #[tokio::test]
    async fn one_whose_peer_has_spoken_or_gone_is_not_used_and_no_other_is_made_for_a_while() {
        let ((svid, trust), now) = (grounds(), Instant::now());
        for speaks in [true, false] {
            let (pool, mut peer) = pool(&svid, &trust, now).await;
            if speaks {
                peer.write_all(b"x").await.unwrap();
            } else {
                drop(peer);
            }
            // Loopback delivers before the call returns.
            assert!(pool.take(&aim(1), &svid, &trust).is_none(), "speaks: {speaks}");
            assert_eq!(pool.asked(&aim(1), Instant::now()).0, 0, "speaks: {speaks}");
        }
    }

    #[test]
    fn one_connection_alone_warms_nothing_and_two_in_a_second_do() {
        let start = Instant::now();
        let mut line = Line::new(start);
        line.ask(start);
        assert_eq!(line.missing(start), 0);
        line.ask(start + Duration::from_millis(800));
        assert_eq!(line.missing(start), 1);
        let mut rare = Line::new(start);
        for second in 0..100 {
            rare.ask(start + Duration::from_secs(2 * second));
            assert_eq!(rare.missing(start), 0, "one every two seconds");
        }
    }

    #[test]
    fn demand_is_worth_more_the_greater_it_is_and_never_more_than_the_most() {
        let steady = |rate: f64| (0..1000).fold(0.0, |demand: f64, _| demand * 0.5f64.powf(1.0 / rate / HALF) + 1.0);
        let wanted: Vec<_> = [1.0, 10.0, 60.0, 150.0, 100_000.0].map(|rate| wanted(steady(rate))).into();
        assert_eq!(wanted[0], 1);
        assert!(wanted.is_sorted() && wanted[3] > wanted[1], "{wanted:?}");
        assert_eq!(wanted[4], MOST);
        assert_eq!(super::wanted(f64::INFINITY), MOST);
    }

    #[test]
    fn what_is_being_made_is_not_made_twice_and_a_failure_is_not_repeated_at_once() {
        let (pool, now) = (Pool::default(), Instant::now());
        let asked = |now| pool.asked(&aim(80), now).0;
        assert_eq!([asked(now), asked(now), asked(now)], [0, 1, 0]);
        pool.made(&aim(80), None);
        assert_eq!(asked(now), 0, "it rests");
        let rested = now + REST + Duration::from_secs(1);
        assert_eq!([asked(rested), asked(rested)], [0, 1], "demand had gone meanwhile");
    }

    #[tokio::test]
    async fn one_that_was_taken_is_made_up_for_later_while_there_are_others() {
        let ((svid, trust), now) = (grounds(), Instant::now());
        let (pool, _peer) = pool(&svid, &trust, now).await;
        // Enough demand for more than one.
        let after: Vec<_> = (0..80).map(|_| pool.asked(&aim(1), now)).filter(|(missing, _)| *missing > 0).collect();
        assert!(!after.is_empty() && after.iter().all(|(_, after)| *after == PAUSE), "{after:?}");
        assert!(pool.take(&aim(1), &svid, &trust).is_some());
        assert_eq!(pool.asked(&aim(1), now), (1, Duration::ZERO), "none is left");
    }

    #[test]
    fn places_that_nobody_asks_for_are_forgotten_and_a_closed_pool_takes_nothing() {
        let (pool, now) = (Pool::default(), Instant::now());
        for port in 0..2000 {
            pool.asked(&aim(port), now);
        }
        assert_eq!(lock(&pool.0).places.len(), PLACES);
        assert_eq!(pool.sweep(now + LIFE), (0, false));
        assert!(lock(&pool.0).places.is_empty());
        pool.close();
        assert_eq!([pool.asked(&aim(1), now).0, pool.asked(&aim(1), now).0], [0, 0]);
    }
}
