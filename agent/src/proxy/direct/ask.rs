//! Questions to the kernel about a pod's sockets, on threads that may wait: the kernel locks each socket that it tells of or ends, and the
//! pod may hold a lock for as long as it likes. How many such threads a pod can hold up is bounded.

use std::{io, sync::Arc};

use tokio::sync::Semaphore;

use crate::{
    proxy::pod::Pod,
    sys::diag::{Diag, SocketId},
};

/// How many questions about one pod, and how many endings of its connections, are under way at once.
pub struct Turns {
    questions: Arc<Semaphore>,
    endings: Arc<Semaphore>,
}

const QUESTIONS: usize = 8;
/// More connections than that, of one pod and with locks that it holds, are ended only when it lets go.
const ENDINGS: usize = 256;

impl Default for Turns {
    fn default() -> Self {
        Self { questions: Arc::new(Semaphore::new(QUESTIONS)), endings: Arc::new(Semaphore::new(ENDINGS)) }
    }
}

pub(super) async fn ask<T: Send + 'static>(
    pod: &Arc<Pod>,
    question: impl FnOnce(&Diag) -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    apart(pod.turns.questions.clone(), asked(pod, question)).await
}

/// Resets a connection that the agent does not hold.
pub(super) async fn end(pod: &Arc<Pod>, id: SocketId) {
    told(apart(pod.turns.endings.clone(), asked(pod, move |diag| diag.destroy(&id))).await, id);
}

/// The same, for a thread that may wait.
pub(super) fn end_now(pod: &Pod, id: SocketId) {
    told(Diag::open(&pod.netns).and_then(|diag| diag.destroy(&id)), id);
}

fn told(ended: io::Result<bool>, id: SocketId) {
    match ended {
        Ok(true) => {}
        Ok(false) => tracing::debug!(?id, "a connection that was to be ended was gone already"),
        Err(error) => tracing::error!(%error, ?id, "a connection cannot be ended"),
    }
}

/// Does something that ends a connection and may wait.
pub(super) async fn finish(pod: &Arc<Pod>, ending: impl FnOnce() -> io::Result<()> + Send + 'static) -> io::Result<()> {
    apart(pod.turns.endings.clone(), ending).await
}

/// Each question has a netlink socket of its own, so that none waits for another's answer.
fn asked<T, Q: FnOnce(&Diag) -> io::Result<T>>(
    pod: &Arc<Pod>,
    question: Q,
) -> impl FnOnce() -> io::Result<T> + use<T, Q> {
    let pod = pod.clone();
    move || question(&Diag::open(&pod.netns)?)
}

async fn apart<T: Send + 'static>(
    turns: Arc<Semaphore>,
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    let turn = turns.acquire_owned().await.map_err(io::Error::other)?;
    let done = tokio::task::spawn_blocking(move || {
        // Given back when the kernel has answered, also if nobody waits for it any more.
        let _turn = turn;
        work()
    });
    done.await.map_err(io::Error::other)?
}
