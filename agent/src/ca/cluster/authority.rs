//! The CA's key in a Secret and its roots in a ConfigMap. Whoever comes first to a new cluster makes them; all others take what is there. The
//! ConfigMap is kept as the Secret says, and nothing signs before its root is there for agents to read.

use std::{collections::BTreeMap, io, sync::Arc};

use arc_swap::ArcSwap;
use k8s_openapi::{
    ByteString,
    api::core::v1::{ConfigMap, Secret},
    apimachinery::pkg::apis::meta::v1::ObjectMeta,
};
use tokio::{sync::watch, time::sleep};

use super::{Cluster, Fault, TRIES, get, put};
use crate::{
    ca::{CaError, metrics::Metrics, serving::Serving},
    control::files::WatchSettings,
    identity::{Ca, TrustDomain, as_pem},
    words::with_causes,
};

/// Where agents find the roots, and beside them the revocation lists.
pub const ROOT: &str = "root.pem";
pub const LISTS: &str = "ca-crl.pem";

/// The CA in the Secret, after its roots were published. In a cluster that never had one it is made.
pub async fn open(cluster: &Cluster, domain: &TrustDomain) -> Result<Ca, CaError> {
    taken(cluster, domain, true, &mut None).await
}

/// Follows the Secret, and puts the ConfigMap right, until `shutdown` becomes true.
pub async fn follow(
    cluster: Cluster,
    domain: TrustDomain,
    authority: Arc<ArcSwap<Ca>>,
    serving: Serving,
    metrics: Arc<Metrics>,
    watching: WatchSettings,
    mut shutdown: watch::Receiver<bool>,
) {
    let (mut trouble, mut lists) = (None, None);
    loop {
        // Services that were started together shall not ask together for ever.
        let pause = watching.poll.mul_f64(rand::random_range(0.8..1.2));
        tokio::select! {
            () = sleep(pause) => {}
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        let found = taken(&cluster, &domain, false, &mut lists).await;
        match found {
            Ok(next) => {
                if trouble.take().is_some() {
                    tracing::info!("the CA's Secret and ConfigMap can be read and kept again");
                }
                let next = Arc::new(next);
                let before = authority.load_full();
                if !before.signs_like(&next) || before.root_certificates() != next.root_certificates() {
                    metrics.reloaded("ca", true);
                    let signs_anew = !before.signs_like(&next);
                    authority.store(next);
                    if signs_anew {
                        tracing::info!("another certificate of the CA signs from now on");
                        serving.renew();
                    }
                }
            }
            Err(error) => {
                metrics.reloaded("ca", false);
                let why = with_causes(&error);
                // Said once, however often it is tried.
                if trouble.as_ref() != Some(&why) {
                    tracing::error!("ca: refused, the last good one stays in force: {why}");
                    trouble = Some(why);
                }
            }
        }
    }
}

/// `lists` are the revocation lists that were there last: if somebody has taken them away they are put back.
async fn taken(
    cluster: &Cluster,
    domain: &TrustDomain,
    may_make: bool,
    lists: &mut Option<String>,
) -> Result<Ca, CaError> {
    let (root, secret) = (&cluster.names.root_config_map, &cluster.names.secret);
    let failed = |what: &str| {
        let what = what.to_owned();
        move |fault: Fault| CaError::Kubernetes { what, source: Some(Box::new(fault)) }
    };
    for _ in 0..TRIES {
        // First the ConfigMap: what the Secret says is newer then than the version that is written over, or the write fails.
        let published = get(&cluster.config_maps, root).await.map_err(failed(&format!("ConfigMap {root}")))?;
        let kept = get(&cluster.secrets, secret).await.map_err(failed(&format!("Secret {secret}")))?;
        let Some(kept) = kept else {
            let there = published.as_ref().and_then(root_of).is_some();
            if there || !may_make {
                return Err(CaError::Kubernetes {
                    what: format!(
                        "the Secret {secret} is gone, and the mesh believes the roots in ConfigMap {root}: bring the Secret \
                         back, or delete the ConfigMap too to begin with a new root"
                    ),
                    source: None,
                });
            }
            match put(&cluster.secrets, secret, &new_secret(cluster, domain)?).await {
                Ok(()) => tracing::info!("made a new CA in Secret {secret}"),
                // Somebody was faster: its root counts.
                Err(Fault::Conflict) => {}
                Err(fault) => return Err(failed(&format!("making Secret {secret}"))(fault)),
            }
            continue;
        };
        let ca = read(cluster, &kept)?;
        ca.require_trust_domain(domain).map_err(CaError::Identity)?;
        let roots: String = ca.root_certificates().iter().map(|der| as_pem(der)).collect();
        let there = published.as_ref().and_then(|found| found.data.as_ref()?.get(LISTS)).cloned();
        if published.as_ref().and_then(root_of) == Some(&roots) && (there.is_some() || lists.is_none()) {
            *lists = there;
            return Ok(ca);
        }
        if let (None, Some(_)) = (&there, &*lists) {
            tracing::error!("the revocation lists in ConfigMap {root} were taken away and are put back");
        } else if published.is_none() && !may_make {
            tracing::error!(
                "ConfigMap {root} was taken away: if nodes were shut out, run `marline ca revoke` again for each of them"
            );
        }
        // Agents refuse roots beside a list in the name of one of them that none of them has signed, as that of a root that has gone is: what
        // it took back is not believed any more anyway.
        let kept = there.or_else(|| lists.clone()).map(|lists| ca.lists_beside_roots(lists.as_bytes())).transpose();
        let kept = kept
            .map_err(|why| CaError::Kubernetes { what: format!("ConfigMap {root}, {LISTS}: {why}"), source: None })?;
        let kept = kept.filter(|lists| !lists.is_empty());
        let mut next = published.unwrap_or_else(|| object(root));
        let data = next.data.get_or_insert_default();
        data.insert(ROOT.to_owned(), roots);
        match &kept {
            Some(lists) => data.insert(LISTS.to_owned(), lists.clone()),
            None => data.remove(LISTS),
        };
        match put(&cluster.config_maps, root, &next).await {
            Ok(()) => {
                tracing::info!("the CA's roots are in ConfigMap {root}");
                *lists = kept;
            }
            Err(Fault::Conflict) => continue,
            Err(fault) => return Err(failed(&format!("writing ConfigMap {root}"))(fault)),
        }
        return Ok(ca);
    }
    Err(CaError::Kubernetes { what: format!("ConfigMap {root}: others write it all the time"), source: None })
}

/// The CA that a Secret holds, if what it signs will be believed.
pub(super) fn read(cluster: &Cluster, secret: &Secret) -> Result<Ca, CaError> {
    let place = cluster.secret_place();
    let file = |path: &std::path::Path| {
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let found = secret.data.as_ref().and_then(|data| data.get(name));
        found.map(|bytes| bytes.0.clone()).ok_or_else(|| io::ErrorKind::NotFound.into())
    };
    Ca::open_with(&place, &file).map_err(CaError::Identity)
}

fn root_of(published: &ConfigMap) -> Option<&String> {
    published.data.as_ref()?.get(ROOT)
}

fn new_secret(cluster: &Cluster, domain: &TrustDomain) -> Result<Secret, CaError> {
    let files = Ca::new_files(domain).map_err(CaError::Identity)?;
    let data: BTreeMap<_, _> =
        files.iter().map(|(name, bytes)| ((*name).to_owned(), ByteString(bytes.to_vec()))).collect();
    Ok(Secret {
        metadata: ObjectMeta {
            name: Some(cluster.names.secret.clone()),
            labels: Some(labels()),
            ..ObjectMeta::default()
        },
        data: Some(data),
        ..Secret::default()
    })
}

pub(super) fn object(name: &str) -> ConfigMap {
    ConfigMap {
        metadata: ObjectMeta { name: Some(name.to_owned()), labels: Some(labels()), ..ObjectMeta::default() },
        ..ConfigMap::default()
    }
}

fn labels() -> BTreeMap<String, String> {
    BTreeMap::from([("app.kubernetes.io/managed-by".to_owned(), "marline-ca".to_owned())])
}
