//! Serving what others than this machine may ask: they bind no more threads, memory and descriptors than is said here.

use std::{
    collections::VecDeque,
    io,
    sync::{Arc, Weak},
    time::Duration,
};

use axum::{
    Router,
    body::Bytes,
    http::{
        StatusCode,
        header::{CONTENT_TYPE, RETRY_AFTER},
    },
    response::{IntoResponse, Response},
};
use hyper_util::{rt::TokioIo, service::TowerToHyperService};
use tokio::{
    net::TcpListener,
    sync::{Mutex, OwnedSemaphorePermit, Semaphore},
    task::{AbortHandle, JoinSet, spawn_blocking},
    time::{Instant, sleep, sleep_until, timeout},
};

/// How many connections there are at most; one more ends the oldest, so that who only holds them keeps nobody out.
const CONNECTIONS: usize = 128;
/// How long one may take, from its first byte to the last of the answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// How many expositions there are at most: one that is written down, and those that are being sent.
const EXPOSITIONS: usize = 2;
const CONTENT: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// One request a connection.
pub(super) async fn serve(listener: TcpListener, router: Router) -> io::Result<()> {
    let mut tasks = JoinSet::new();
    let mut oldest: VecDeque<AbortHandle> = VecDeque::new();
    loop {
        while tasks.try_join_next().is_some() {}
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot take a connection");
                sleep(Duration::from_secs(1)).await;
                continue;
            }
        };
        oldest.retain(|task| !task.is_finished());
        while oldest.len() >= CONNECTIONS {
            if let Some(task) = oldest.pop_front() {
                task.abort();
            }
        }
        let service = TowerToHyperService::new(router.clone());
        oldest.push_back(tasks.spawn(async move {
            let answer = hyper::server::conn::http1::Builder::new()
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // Whoever asks in no order, or does not take the answer, is not worth a line.
            let _ = timeout(PATIENCE, answer).await;
        }));
    }
}

/// What is counted, written down for all who asked before it was begun.
#[derive(Clone)]
pub(super) struct Expositions {
    room: Arc<Semaphore>,
    last: Arc<Mutex<Last>>,
}

#[derive(Default)]
struct Last {
    text: Weak<Exposition>,
    begun: Option<Instant>,
    /// Before this none is begun: about a fifth of one processor is spent on them at most, and nobody waits longer than a second.
    next: Option<Instant>,
}

struct Exposition {
    text: String,
    _room: OwnedSemaphorePermit,
}

/// In the hands of the connections that send it.
struct Shared(Arc<Exposition>);

impl AsRef<[u8]> for Shared {
    fn as_ref(&self) -> &[u8] {
        self.0.text.as_bytes()
    }
}

impl Default for Expositions {
    fn default() -> Self {
        Self { room: Arc::new(Semaphore::new(EXPOSITIONS)), last: Arc::default() }
    }
}

impl Expositions {
    pub(super) async fn answer(&self, render: impl FnOnce() -> String + Send + 'static) -> Response {
        let asked = Instant::now();
        let mut last = self.last.lock().await;
        if let Some(text) = last.text.upgrade().filter(|_| last.begun.is_some_and(|begun| begun >= asked)) {
            return sent(text);
        }
        if let Some(next) = last.next {
            sleep_until(next).await;
        }
        let Ok(room) = self.room.clone().try_acquire_owned() else {
            let why = "others are still being sent the metrics\n";
            return (StatusCode::SERVICE_UNAVAILABLE, [(RETRY_AFTER, "1")], why).into_response();
        };
        let begun = Instant::now();
        // The room goes with it: whoever asked may be gone before it is done.
        match spawn_blocking(move || Arc::new(Exposition { text: render(), _room: room })).await {
            Ok(text) => {
                let next = Instant::now() + (begun.elapsed() * 4).min(Duration::from_secs(1));
                *last = Last { text: Arc::downgrade(&text), begun: Some(begun), next: Some(next) };
                sent(text)
            }
            Err(error) => super::gone(&error),
        }
    }
}

fn sent(text: Arc<Exposition>) -> Response {
    ([(CONTENT_TYPE, CONTENT)], Bytes::from_owner(Shared(text))).into_response()
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt},
        net::TcpStream,
    };

    use super::*;

    #[tokio::test]
    async fn who_does_not_take_the_metrics_leaves_no_room_and_gives_it_back() {
        let expositions = Expositions::default();
        let ask = || expositions.answer(|| "text".to_owned());
        let held = [ask().await, ask().await];
        assert!(held.iter().all(|answer| answer.status() == StatusCode::OK));
        let refused = ask().await;
        assert_eq!(refused.status(), StatusCode::SERVICE_UNAVAILABLE);
        assert!(refused.headers().contains_key(RETRY_AFTER));
        drop(held);
        assert_eq!(ask().await.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn those_who_ask_meanwhile_share_one() {
        let expositions = Expositions::default();
        let ask = || expositions.answer(|| "text".to_owned());
        let turn = expositions.last.lock().await;
        let free = async move { drop(turn) };
        let (a, b, c, d, ()) = tokio::join!(ask(), ask(), ask(), ask(), free);
        assert!([a, b, c, d].iter().all(|answer| answer.status() == StatusCode::OK));
    }

    #[tokio::test]
    async fn connections_that_ask_nothing_keep_nobody_out() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().route("/", axum::routing::get(|| async { "alive" }));
        let server = tokio::spawn(serve(listener, router));
        let mut idle = Vec::new();
        for _ in 0..CONNECTIONS * 2 {
            idle.push(TcpStream::connect(address).await.unwrap());
        }
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("alive"), "{answer}");
        let mut byte = [0];
        assert!(!matches!(idle[0].read(&mut byte).await, Ok(1..)), "the oldest has been ended");
        server.abort();
    }
}
