//! Metrics and readiness of the CA service over HTTP. Anybody may ask, so connections are bounded like the listener's: in number, of one
//! address, and in time.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use arc_swap::ArcSwap;
use axum::{Router, http::StatusCode, routing::get};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use super::{
    book::Books,
    listener::{BREATH, Places},
    metrics::Metrics,
};
use crate::identity::Ca;

const CONNECTIONS: u32 = 64;
/// For all that a client sends.
const HEADER: Duration = Duration::from_secs(5);
/// For all of a connection, which has one request.
const CONNECTION: Duration = Duration::from_secs(15);

/// Serves `/metrics`, `/readyz` and `/livez` until `shutdown` becomes true.
pub async fn serve(
    listener: TcpListener,
    metrics: Arc<Metrics>,
    ledger: Books,
    ca: Arc<ArcSwap<Ca>>,
    mut shutdown: watch::Receiver<bool>,
) {
    let authority = Arc::clone(&ca);
    let ready = move || {
        let (ledger, authority) = (ledger.clone(), Arc::clone(&authority));
        async move {
            let unready = |why| Err((StatusCode::SERVICE_UNAVAILABLE, why));
            if authority.load().not_after() <= SystemTime::now() {
                return unready("the CA's certificate has expired\n");
            }
            match ledger.is_writable().await {
                true => Ok("ready\n"),
                false => unready("the ledger cannot be written: no certificate is handed out\n"),
            }
        }
    };
    let content_type = [("content-type", "application/openmetrics-text; version=1.0.0; charset=utf-8")];
    let render = move || {
        let text = metrics.render(&ca.load());
        async move { (content_type, text) }
    };
    let router = Router::new()
        .route("/metrics", get(render))
        .route("/readyz", get(ready))
        .route("/livez", get(|| async { "alive\n" }));
    let slots = Arc::new(Semaphore::new(CONNECTIONS as usize));
    let places = Places::new(CONNECTIONS);
    loop {
        let next = async {
            let slot = Arc::clone(&slots).acquire_owned().await;
            (slot, listener.accept().await)
        };
        let (slot, accepted) = tokio::select! {
            next = next => next,
            _ = shutdown.wait_for(|stop| *stop) => return,
        };
        let Ok(slot) = slot else { return };
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!("a connection for metrics or readiness could not be accepted: {error}");
                sleep(BREATH).await;
                continue;
            }
        };
        let Some(place) = places.take(peer.ip(), slot) else { continue };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER)
            // Whoever looks every few seconds needs no place in between.
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
        tokio::spawn(async move {
            let _place = place;
            let _ = timeout(CONNECTION, connection).await;
        });
    }
}
