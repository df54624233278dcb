//! The plugin's side of the agent's socket: one question, one answer, within a time.

use std::{
    io::{self, BufRead as _, BufReader, Read as _, Write as _},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use super::wire::{Answer, LINE, Request};

/// Between tries to reach an agent that may be starting.
const AGAIN: Duration = Duration::from_millis(100);
/// What the agent's answer may take longer than it was told to wait.
pub const GRACE: Duration = Duration::from_secs(2);

#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error("the agent of this node does not answer at {}: {source}", path.display())]
    Absent { path: PathBuf, source: io::Error },
    #[error("the agent of this node has not answered within {} s", .0.as_secs())]
    Silent(Duration),
    #[error("the agent's answer cannot be read: {0}")]
    Strange(String),
}

/// Asks, and waits for an agent to come as long as there is time.
pub fn ask(socket: &Path, request: &Request, limit: Duration) -> Result<Answer, ClientError> {
    let end = Instant::now() + limit;
    loop {
        let error = match once(socket, request, end.saturating_duration_since(Instant::now()) + GRACE) {
            Err(error @ ClientError::Absent { .. }) => error,
            answered => return answered,
        };
        if Instant::now() + AGAIN >= end {
            return Err(error);
        }
        thread::sleep(AGAIN);
    }
}

/// On a thread of its own: connecting to a Unix socket has no limit of time.
fn once(socket: &Path, request: &Request, limit: Duration) -> Result<Answer, ClientError> {
    let (sender, answer) = mpsc::channel();
    let (path, line) = (socket.to_owned(), format!("{}\n", serde_json::json!(request)));
    thread::spawn(move || {
        // Nobody may listen any more.
        let _ = sender.send(exchange(&path, &line));
    });
    answer.recv_timeout(limit).unwrap_or(Err(ClientError::Silent(limit)))
}

fn exchange(path: &Path, line: &str) -> Result<Answer, ClientError> {
    let absent = |source| ClientError::Absent { path: path.to_owned(), source };
    let mut stream = UnixStream::connect(path).map_err(absent)?;
    stream.write_all(line.as_bytes()).map_err(absent)?;
    let mut answer = String::new();
    BufReader::new(stream).take(LINE).read_line(&mut answer).map_err(absent)?;
    if answer.is_empty() {
        // It has died, or been stopped; its successor may know more.
        return Err(absent(io::ErrorKind::UnexpectedEof.into()));
    }
    serde_json::from_str(&answer).map_err(|error| ClientError::Strange(error.to_string()))
}
