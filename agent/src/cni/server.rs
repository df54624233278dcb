//! The agent's socket for the plugin: root's alone, bounded in connections, bytes and time. What is answered is its `Enroller`'s to say.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::{UnixListener, UnixStream},
    sync::{Semaphore, watch},
    time::{sleep, timeout},
};

use super::{
    CniError,
    wire::{Answer, LINE, Request},
};

/// Calls that wait at one time. A node has a few hundred pods; what is beyond waits in the socket's queue.
const CALLS: usize = 1024;
/// For a question to come, and for an answer to be taken.
const PATIENCE: Duration = Duration::from_secs(5);
/// For an answer to be found, whatever the plugin would wait.
const LONGEST: Duration = Duration::from_secs(120);
/// After an accept that failed.
const BREATH: Duration = Duration::from_millis(200);

/// Who knows the answers.
pub trait Enroller: Send + Sync + 'static {
    fn answer(&self, request: Request) -> impl Future<Output = Answer> + Send;
}

/// Takes the place of whatever was at the path: who holds the pins is the one agent.
pub fn listen(path: &Path) -> Result<UnixListener, CniError> {
    if let Some(directory) = path.parent() {
        fs::create_dir_all(directory).map_err(CniError::path("cannot make", directory))?;
    }
    // Nobody may connect before it is root's alone; and the path leads somewhere at every moment.
    let fresh = path.with_extension(format!("new-{}", std::process::id()));
    let _ = fs::remove_file(&fresh);
    let listener = UnixListener::bind(&fresh).map_err(CniError::path("cannot listen at", &fresh))?;
    let placed = fs::set_permissions(&fresh, fs::Permissions::from_mode(0o600)).and_then(|()| fs::rename(&fresh, path));
    placed.map_err(CniError::path("cannot put in place", path))?;
    tracing::info!(path = %path.display(), "the CNI plugin may ask");
    Ok(listener)
}

/// Answers until `stopped` becomes true or its sender is gone.
pub async fn serve<E: Enroller>(
    listener: UnixListener,
    path: PathBuf,
    enroller: Arc<E>,
    mut stopped: watch::Receiver<bool>,
) {
    let calls = Arc::new(Semaphore::new(CALLS));
    loop {
        // Nobody closes the semaphore.
        let Ok(turn) = Arc::clone(&calls).acquire_owned().await else { return };
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            _ = stopped.wait_for(|stop| *stop) => return,
        };
        match accepted {
            Ok((stream, _)) => {
                let enroller = Arc::clone(&enroller);
                tokio::spawn(async move {
                    if let Err(why) = call(stream, &*enroller).await {
                        tracing::warn!("a call at the CNI socket was not answered: {why}");
                    }
                    drop(turn);
                });
            }
            Err(error) => {
                tracing::error!(path = %path.display(), %error, "no call of the CNI plugin can be taken");
                sleep(BREATH).await;
            }
        }
    }
}

async fn call<E: Enroller>(stream: UnixStream, enroller: &E) -> Result<(), String> {
    let caller = stream.peer_cred().map_err(|error| format!("who calls is not known: {error}"))?;
    if caller.uid() != 0 {
        return Err(format!("user {} is not root", caller.uid()));
    }
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    let read = timeout(PATIENCE, (&mut reader).take(LINE).read_until(b'\n', &mut line)).await;
    read.map_err(|_| "no question came".to_owned())?.map_err(|error| error.to_string())?;
    let answer = match serde_json::from_slice::<Request>(&line) {
        Err(error) => Answer::Refused { why: format!("the agent cannot read the question of this plugin: {error}") },
        Ok(request) => {
            // A plugin that has gone, as its runtime kills it, waits for nothing any more.
            let gone = async {
                let mut more = [0; 64];
                while reader.read(&mut more).await.is_ok_and(|count| count > 0) {}
            };
            tokio::select! {
                answer = timeout(LONGEST, enroller.answer(request)) => {
                    answer.unwrap_or_else(|_| Answer::Later { why: "the agent has found no answer in time".into() })
                }
                () = gone => return Ok(()),
            }
        }
    };
    let text = serde_json::to_vec(&answer).map_err(|error| error.to_string())?;
    let text = [&text[..], b"\n"].concat();
    timeout(PATIENCE, writer.write_all(&text)).await.map_err(|_| "nobody takes the answer")?.map_err(|e| e.to_string())
}
