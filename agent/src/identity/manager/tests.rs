//! What the manager does with a CA that comes and goes, and with clocks that are set.

use std::sync::atomic::AtomicBool;

use super::entry::{LAST_RETRY, retry_after};
use super::*;
use crate::identity::{Ca, LiveCa, TrustDomain};

const LIFE: Duration = Duration::from_secs(24 * 3_600);

/// A CA that can be out of order.
struct Flaky {
    ca: LiveCa,
    down: Arc<AtomicBool>,
}

impl Source for Flaky {
    fn name(&self) -> Arc<str> {
        "flaky".into()
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId, lifetime: Duration) -> Answer<'a> {
        match self.down.load(Ordering::SeqCst) {
            true => Box::pin(async { Err(IdentityError::CaExpired(Duration::from_secs(1))) }),
            false => self.ca.issue(id, lifetime),
        }
    }
}

fn manager(life: Duration) -> (Manager, Arc<AtomicBool>) {
    let dir = tempfile::tempdir().unwrap();
    Ca::init(dir.path(), &TrustDomain::parse("cluster.local").unwrap()).unwrap();
    let down = Arc::new(AtomicBool::new(false));
    let ca = LiveCa::new(Ca::open(dir.path()).unwrap());
    let domain = TrustDomain::parse("cluster.local").unwrap();
    let trust = TrustStore::new(Trust::new(domain, ca.load().roots()));
    let source = Flaky { ca, down: Arc::clone(&down) };
    (Manager::new(source, trust, ManagerSettings { leaf_lifetime: life }), down)
}

/// Asks for all that is due, and waits for the answers.
async fn renew_due(manager: &Manager, now: SystemTime) -> Option<SystemTime> {
    loop {
        let mut asked = JoinSet::new();
        let next = manager.ask(now, &mut asked);
        if asked.is_empty() {
            return next;
        }
        while asked.join_next().await.is_some() {}
    }
}

async fn retain(manager: &Manager, present: &BTreeSet<SpiffeId>) {
    manager.retain(present);
    renew_due(manager, SystemTime::now()).await;
}

fn id(account: &str) -> SpiffeId {
    SpiffeId::new(&TrustDomain::parse("cluster.local").unwrap(), "shop", account).unwrap()
}

fn ids(accounts: &[&str]) -> BTreeSet<SpiffeId> {
    accounts.iter().map(|account| id(account)).collect()
}

#[tokio::test]
async fn a_certificate_that_nobody_believes_any_more_is_replaced_at_once_and_others_are_not() {
    let (manager, _) = manager(LIFE);
    retain(&manager, &ids(&["web"])).await;
    let now = SystemTime::now();
    manager.renew_unbelieved();
    renew_due(&manager, now + Duration::from_secs(1)).await;
    assert_eq!(manager.counters().issued, 1);
    let dir = tempfile::tempdir().unwrap();
    let domain = TrustDomain::parse("cluster.local").unwrap();
    Ca::init(dir.path(), &domain).unwrap();
    manager.trust_store().replace(Trust::new(domain, Ca::open(dir.path()).unwrap().roots()));
    manager.renew_unbelieved();
    renew_due(&manager, now + Duration::from_secs(1)).await;
    assert_eq!(manager.counters().issued, 2);
}

#[tokio::test]
async fn certificates_come_and_go_with_their_workloads() {
    let (manager, _) = manager(LIFE);
    assert!(manager.svid(&id("web")).is_none());
    retain(&manager, &ids(&["web", "db"])).await;
    let web = manager.svid(&id("web")).unwrap();
    assert_eq!(web.id, id("web"));
    retain(&manager, &ids(&["web", "client"])).await;
    assert!(manager.svid(&id("db")).is_none(), "gone with its last workload");
    assert_eq!(manager.svid(&id("web")).unwrap().serial, web.serial, "not made again");
    let listed: Vec<_> = manager.list().into_iter().map(|info| (info.id, info.valid)).collect();
    assert_eq!(listed, [(id("client"), true), (id("web"), true)]);
    assert_eq!(manager.counters(), ManagerCounters { issued: 3, failures: 0 });
}

#[tokio::test]
async fn a_certificate_is_renewed_at_half_of_its_life_and_not_before() {
    let (manager, _) = manager(LIFE);
    retain(&manager, &ids(&["web"])).await;
    let first = manager.svid(&id("web")).unwrap().serial.clone();
    let now = SystemTime::now();
    let due = renew_due(&manager, now + LIFE.mul_f64(0.44)).await.unwrap();
    assert_eq!(manager.svid(&id("web")).unwrap().serial, first);
    assert!(due >= now + LIFE.mul_f64(0.44) && due <= now + LIFE.mul_f64(0.56));
    renew_due(&manager, now + LIFE.mul_f64(0.56)).await;
    assert_ne!(manager.svid(&id("web")).unwrap().serial, first);
}

#[tokio::test]
async fn many_certificates_do_not_come_due_together() {
    let (manager, _) = manager(LIFE);
    retain(&manager, &(0..50).map(|n| id(&format!("a{n}"))).collect()).await;
    let due: BTreeSet<_> = manager.entries().values().map(|entry| entry.due.unwrap()).collect();
    let spread = due.last().unwrap().duration_since(*due.first().unwrap()).unwrap();
    assert!(spread > LIFE / 40, "only {spread:?} apart");
}

#[tokio::test]
async fn a_failed_renewal_keeps_the_certificate_until_it_expires() {
    let (manager, down) = manager(LIFE);
    retain(&manager, &ids(&["web"])).await;
    let first = manager.svid(&id("web")).unwrap().serial.clone();
    down.store(true, Ordering::SeqCst);
    let mut now = SystemTime::now() + LIFE.mul_f64(0.56);
    let mut attempts = 0;
    while now < SystemTime::now() + LIFE.mul_f64(0.99) {
        let next = renew_due(&manager, now).await.unwrap();
        assert!(next > now && next <= now + LAST_RETRY, "it waits, and not for ever");
        attempts += 1;
        now = next;
    }
    assert!((100..400).contains(&attempts), "{attempts} attempts in ten hours are neither a storm nor a sleep");
    assert_eq!(manager.svid(&id("web")).unwrap().serial, first, "still good, still used");
    let info = manager.list().remove(0);
    assert_eq!((info.failed_renewals, info.valid), (attempts, true));
    assert!(info.last_error.unwrap().contains("expired"));
    assert_eq!(manager.counters().failures, u64::from(attempts));

    down.store(false, Ordering::SeqCst);
    renew_due(&manager, now).await;
    assert_ne!(manager.svid(&id("web")).unwrap().serial, first);
    assert_eq!(manager.list().remove(0).failed_renewals, 0);
}

#[tokio::test]
async fn an_identity_that_could_not_be_had_is_tried_again() {
    let (manager, down) = manager(LIFE);
    down.store(true, Ordering::SeqCst);
    retain(&manager, &ids(&["web"])).await;
    assert!(manager.svid(&id("web")).is_none());
    assert!(!manager.list().remove(0).valid);
    down.store(false, Ordering::SeqCst);
    let soon = renew_due(&manager, SystemTime::now()).await.unwrap();
    renew_due(&manager, soon).await;
    assert!(manager.svid(&id("web")).is_some());
}

#[tokio::test]
async fn a_clock_that_is_set_back_gets_a_certificate_of_the_new_time() {
    let (manager, _) = manager(LIFE);
    retain(&manager, &ids(&["web"])).await;
    let first = manager.svid(&id("web")).unwrap().serial.clone();
    renew_due(&manager, SystemTime::now() - Duration::from_secs(3_600)).await;
    assert_ne!(manager.svid(&id("web")).unwrap().serial, first);
}

#[tokio::test]
async fn a_clock_that_is_set_forward_gets_a_certificate_at_once_and_the_expired_one_is_not_used() {
    let (manager, down) = manager(Duration::from_secs(1_800));
    retain(&manager, &ids(&["web"])).await;
    let first = manager.svid(&id("web")).unwrap();
    let later = SystemTime::now() + Duration::from_secs(3_600);
    assert!(!first.is_valid_at(later));
    assert_eq!(manager.entries()[&id("web")].state(later), CertState::Expired);
    down.store(true, Ordering::SeqCst);
    renew_due(&manager, later).await;
    assert_eq!(manager.entries()[&id("web")].state(later), CertState::Expired, "and said so while the CA is away");
    down.store(false, Ordering::SeqCst);
    manager.entries().get_mut(&id("web")).unwrap().due = Some(later);
    renew_due(&manager, later).await;
    assert_ne!(manager.svid(&id("web")).unwrap().serial, first.serial);
}

#[tokio::test]
async fn a_certificate_goes_from_valid_to_due_to_expiring_to_expired() {
    let (manager, down) = manager(LIFE);
    down.store(true, Ordering::SeqCst);
    retain(&manager, &ids(&["db"])).await;
    assert_eq!(manager.list().remove(0).state, CertState::Missing);
    down.store(false, Ordering::SeqCst);
    retain(&manager, &ids(&["web"])).await;
    let now = SystemTime::now();
    let state = |part: f64| manager.entries()[&id("web")].state(now + LIFE.mul_f64(part));
    let states = [0.1, 0.6, 0.8, 1.1].map(state);
    assert_eq!(states, [CertState::Valid, CertState::Due, CertState::Expiring, CertState::Expired]);
}

#[tokio::test]
async fn what_another_signer_has_signed_is_replaced_soon_and_not_all_at_once() {
    let (manager, _) = manager(LIFE);
    retain(&manager, &(0..20).map(|n| id(&format!("a{n}"))).collect()).await;
    let now = SystemTime::now();
    manager.resign();
    assert!(manager.list().iter().all(|info| info.signer_replaced));
    let due: BTreeSet<_> = manager.entries().values().map(|entry| entry.due.unwrap()).collect();
    assert!(due.len() > 10 && due.last().unwrap() < &(now + LONGEST_RESIGN + Duration::from_secs(1)));
    renew_due(&manager, now + LONGEST_RESIGN + Duration::from_secs(1)).await;
    assert!(manager.list().iter().all(|info| !info.signer_replaced));
    assert_eq!(manager.counters().issued, 40);
}

#[tokio::test]
async fn an_expired_certificate_is_not_given_out() {
    let (manager, _) = manager(LIFE);
    retain(&manager, &ids(&["web"])).await;
    let old = manager.svid(&id("web")).unwrap();
    let now = SystemTime::now();
    let expired = Svid {
        id: id("web"),
        key: Arc::clone(&old.key),
        serial: String::new(),
        not_before: now - LIFE,
        not_after: now,
    };
    manager.entries().get_mut(&id("web")).unwrap().svid = Some(Arc::new(expired));
    assert!(manager.svid(&id("web")).is_none());
    assert!(!manager.list().remove(0).valid);
}

#[test]
fn retries_grow_and_stay_in_bounds() {
    for (failed, lifetime, least, most) in [
        (0, LIFE, 500, 1_000),
        (3, LIFE, 4_000, 8_000),
        (40, LIFE, 150_000, 300_000),
        (40, Duration::from_secs(4), 100, 200),
    ] {
        for _ in 0..50 {
            let wait = retry_after(failed, lifetime);
            assert!(wait >= Duration::from_millis(least) && wait <= Duration::from_millis(most), "{failed}: {wait:?}");
        }
    }
}

#[tokio::test]
async fn the_running_manager_renews_by_itself_and_stops_when_told() {
    let (manager, _) = manager(Duration::from_secs(2));
    let (stop, stopped) = watch::channel(false);
    let running = tokio::spawn({
        let manager = manager.clone();
        async move { manager.run(stopped).await }
    });
    manager.retain(&ids(&["web"]));
    tokio::time::timeout(Duration::from_secs(5), manager.until_held(&id("web"))).await.unwrap();
    let first = manager.svid(&id("web")).unwrap().serial.clone();
    let renewed = async {
        while manager.counters().issued < 3 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), renewed).await.unwrap();
    assert_ne!(manager.list().remove(0).serial.unwrap(), first);
    stop.send(true).unwrap();
    tokio::time::timeout(Duration::from_secs(5), running).await.unwrap().unwrap();
}

/// A source that tells by itself, and answers when it is let.
struct Telling {
    ca: LiveCa,
    asked: Arc<AtomicU64>,
    answers: Arc<tokio::sync::Semaphore>,
}

impl Source for Telling {
    fn name(&self) -> Arc<str> {
        "telling".into()
    }

    fn issue<'a>(&'a self, id: &'a SpiffeId, lifetime: Duration) -> Answer<'a> {
        self.asked.fetch_add(1, Ordering::SeqCst);
        Box::pin(async move {
            self.answers.acquire().await.unwrap().forget();
            self.ca.issue(id, lifetime).await
        })
    }

    fn tells(&self) -> bool {
        true
    }
}

#[tokio::test]
async fn what_is_told_while_an_answer_is_on_its_way_is_asked_for_again() {
    let domain = TrustDomain::default();
    let ca = LiveCa::new(Ca::ephemeral(&domain).unwrap());
    let trust = TrustStore::new(Trust::new(domain, ca.load().roots()));
    let (asked, answers) = (Arc::new(AtomicU64::new(0)), Arc::new(tokio::sync::Semaphore::new(0)));
    let source = Telling { ca, asked: asked.clone(), answers: answers.clone() };
    let manager = Manager::new(source, trust, ManagerSettings::default());
    manager.retain(&ids(&["web"]));
    let (mut first, now) = (JoinSet::new(), SystemTime::now());
    manager.ask(now, &mut first);
    while asked.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    manager.supplied();
    answers.add_permits(2);
    while first.join_next().await.is_some() {}
    assert!(manager.svid(&id("web")).is_some());
    renew_due(&manager, SystemTime::now()).await;
    assert_eq!(asked.load(Ordering::SeqCst), 2, "the first answer was of before");
    assert_eq!(manager.entries()[&id("web")].due, None, "and the second is not");
}
