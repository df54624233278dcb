//! The certificate that the service shows of itself: made by the CA whose certificates it hands out, in memory, and made anew at half of
//! its life and when the CA is another.

use std::{
    fmt,
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use rustls::{
    crypto::aws_lc_rs::default_provider,
    server::{ClientHello, ResolvesServerCert, ServerConfig},
    sign::CertifiedKey,
};
use tokio::{sync::watch, time::sleep};

use super::CaError;
use crate::{
    identity::{Ca, IdentityError},
    words::with_causes,
};

const LIFETIME: Duration = Duration::from_secs(24 * 3_600);
/// The calendar is looked at this often, whatever a timer says: clocks are set.
const LOOK: Duration = Duration::from_secs(30);

/// A clone is another handle on the same certificate.
#[derive(Clone)]
pub struct Serving(Arc<Shared>);

struct Shared {
    ca: Arc<ArcSwap<Ca>>,
    names: Vec<String>,
    current: ArcSwap<Shown>,
}

struct Shown {
    key: Arc<CertifiedKey>,
    made: SystemTime,
    not_after: SystemTime,
}

impl Serving {
    pub fn new(ca: Arc<ArcSwap<Ca>>, names: Vec<String>) -> Result<Self, CaError> {
        let first = shown(&ca.load(), &names).map_err(CaError::Identity)?;
        Ok(Self(Arc::new(Shared { ca, names, current: ArcSwap::from_pointee(first) })))
    }

    /// TLS 1.3 alone: ztunnel, istio-agent and our own agent all speak it.
    pub fn config(&self) -> Result<Arc<ServerConfig>, CaError> {
        let mut config = ServerConfig::builder_with_provider(Arc::new(default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| CaError::Identity(error.into()))?
            .with_no_client_auth()
            .with_cert_resolver(Arc::new(self.clone()));
        config.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Arc::new(config))
    }

    /// Makes another one. The old one is shown for as long as that fails.
    pub fn renew(&self) {
        match shown(&self.0.ca.load(), &self.0.names) {
            Ok(next) => self.0.current.store(Arc::new(next)),
            Err(error) => tracing::error!(
                "the service's own certificate could not be renewed, the old one is shown: {}",
                with_causes(&error)
            ),
        }
    }

    /// Renews until `shutdown` becomes true.
    pub async fn keep_fresh(self, mut shutdown: watch::Receiver<bool>) {
        loop {
            tokio::select! {
                () = sleep(LOOK) => {}
                _ = shutdown.wait_for(|stop| *stop) => return,
            }
            if self.is_due(SystemTime::now()) {
                self.renew();
            }
        }
    }

    fn is_due(&self, now: SystemTime) -> bool {
        let current = self.0.current.load();
        let life = current.not_after.duration_since(current.made).unwrap_or_default();
        now < current.made || now >= current.made + life / 2
    }
}

impl ResolvesServerCert for Serving {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0.current.load().key))
    }
}

impl fmt::Debug for Serving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Serving").field("names", &self.0.names).finish_non_exhaustive()
    }
}

fn shown(ca: &Ca, names: &[String]) -> Result<Shown, IdentityError> {
    let made = SystemTime::now();
    let (key, not_after) = ca.issue_server(names, LIFETIME)?;
    Ok(Shown { key: Arc::new(key), made, not_after })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::TrustDomain;

    #[test]
    fn the_certificate_is_due_at_half_of_its_life_and_when_the_clock_was_set_back() {
        let dir = tempfile::tempdir().unwrap();
        Ca::init(dir.path(), &TrustDomain::default()).unwrap();
        let ca = Arc::new(ArcSwap::from_pointee(Ca::open(dir.path()).unwrap()));
        let serving = Serving::new(ca, vec!["ca.test".into(), "127.0.0.1".into()]).unwrap();
        let now = SystemTime::now();
        assert!(!serving.is_due(now));
        assert!(!serving.is_due(now + LIFETIME * 2 / 5));
        assert!(serving.is_due(now + LIFETIME * 3 / 5));
        assert!(serving.is_due(now - Duration::from_secs(60)));
        let before = Arc::clone(&serving.0.current.load().key);
        serving.renew();
        assert_ne!(before.cert, serving.0.current.load().key.cert);
    }
}
