//! Probes that are running: a few for all pods, started when a pod is to be tested and ended when none is. What they do is `probe`'s.
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{self, Stdio},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines},
    process::{Child, ChildStdin, ChildStdout, Command},
    sync::Semaphore,
    time::timeout,
};

use super::probe::{ANSWER, ProbeArgs, Request};

/// At once. A pod whose test hangs holds one for seconds.
const MOST: usize = 8;
/// How long one that is told to end may take.
const END: Duration = Duration::from_secs(2);

type Start = dyn Fn(&ProbeArgs) -> Command + Send + Sync;

pub(super) struct Probers {
    pods: PathBuf,
    start: Box<Start>,
    turns: Semaphore,
    idle: Mutex<Vec<Prober>>,
}

struct Prober {
    child: Child,
    requests: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
    // Only an empty cgroup can be removed: see `end`.
    cgroup: ProbeCgroup,
}

impl Probers {
    /// Below the cgroup of all pods, by a command that runs [`super::probe::probe_main`].
    pub fn new(pods: PathBuf, start: impl Fn(&ProbeArgs) -> Command + Send + Sync + 'static) -> Arc<Self> {
        sweep(&pods);
        Arc::new(Self { pods, start: Box::new(start), turns: Semaphore::new(MOST), idle: Mutex::default() })
    }

    /// Has one connect within so much time from when it is its turn; the inner error is what it found wrong.
    pub async fn ask(self: &Arc<Self>, request: Request, limit: Duration) -> io::Result<Result<(), String>> {
        // Whoever asks may be cut off; a probe's process is to be ended all the same, and then its cgroup.
        let this = self.clone();
        tokio::spawn(async move { this.asked(&request, limit).await }).await.map_err(io::Error::other)?
    }

    async fn asked(&self, request: &Request, limit: Duration) -> io::Result<Result<(), String>> {
        // Where pods that hang have all of them, the others go on without one.
        let turn = timeout(limit, self.turns.acquire()).await.ok();
        let idle = self.idle().pop();
        let mut prober = match idle {
            Some(prober) => prober,
            None => Prober::start(&self.pods, &self.start)?,
        };
        let answer = match timeout(limit, prober.ask(request)).await {
            Ok(Ok(answer)) => {
                self.idle().push(prober);
                Ok(answer)
            }
            Ok(Err(error)) => {
                prober.end().await;
                Err(error)
            }
            Err(_) => {
                prober.end().await;
                Ok(Err("the probe did not end in time".into()))
            }
        };
        drop(turn);
        if self.turns.available_permits() == MOST {
            // Whoever comes now starts another.
            let unneeded = std::mem::take(&mut *self.idle());
            for prober in unneeded {
                prober.end().await;
            }
        }
        answer
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Prober>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Prober {
    fn start(pods: &Path, start: &Start) -> io::Result<Self> {
        let cgroup = ProbeCgroup::create(pods)?;
        let mut command = start(&ProbeArgs { cgroup: cgroup.path().to_path_buf() });
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.kill_on_drop(true).spawn()?;
        let (Some(requests), Some(answers)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(io::Error::other("a process without pipes"));
        };
        Ok(Self { child, requests, answers: BufReader::new(answers).lines(), cgroup })
    }

    async fn ask(&mut self, request: &Request) -> io::Result<Result<(), String>> {
        let line = serde_json::to_string(request)? + "\n";
        // If it has ended, the answer tells.
        let _ = self.requests.write_all(line.as_bytes()).await;
        while let Some(line) = self.answers.next_line().await? {
            match line.strip_prefix(ANSWER) {
                Some("") => return Ok(Ok(())),
                Some(wrong) => return Ok(Err(wrong.to_owned())),
                None => {}
            }
        }
        let mut said = String::new();
        if let Some(errors) = &mut self.child.stderr {
            errors.read_to_string(&mut said).await?;
        }
        Err(io::Error::other(format!("it ended: {}", said.trim())))
    }

    async fn end(mut self) {
        drop(self.requests);
        if timeout(END, self.child.wait()).await.is_err()
            && let Ok(Err(error)) = timeout(END, self.child.kill()).await
        {
            tracing::warn!(%error, "a probe could not be ended");
        }
        drop(self.cgroup);
    }
}

const PREFIX: &str = "marline-probe-";

/// Removes what an agent that was killed has left. One that is in use cannot be removed.
fn sweep(pods: &Path) {
    for entry in fs::read_dir(pods).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) {
            let _ = fs::remove_dir(entry.path());
        }
    }
}

/// A cgroup below the pods' for probes, so that they are subject to the same hooks and to no pod's limits.
pub struct ProbeCgroup(PathBuf);

impl ProbeCgroup {
    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn create(pods: &Path) -> io::Result<Self> {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        let path = pods.join(format!("{PREFIX}{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed)));
        fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for ProbeCgroup {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir(&self.0) {
            tracing::warn!(path = %self.0.display(), %error, "the probe's cgroup could not be removed");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Probes of a shell's, and the directory that their cgroups would be in.
    fn probers(script: &'static str) -> (Arc<Probers>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let start = move |_: &ProbeArgs| {
            let mut command = Command::new("sh");
            command.args(["-c", script]);
            command
        };
        (Probers::new(dir.path().to_path_buf(), start), dir)
    }

    fn request() -> Request {
        Request { netns: "/netns".into(), connect: ([192, 0, 2, 1], 80).into() }
    }

    fn left(dir: &tempfile::TempDir) -> usize {
        fs::read_dir(dir.path()).unwrap().count()
    }

    const LIMIT: Duration = Duration::from_secs(20);

    #[tokio::test]
    async fn answers_are_told_whatever_else_is_written_and_nothing_is_left() {
        for (script, expected) in [
            ("while read -r line; do echo noise; echo 'probe: '; done", Ok(())),
            ("while read -r line; do echo 'probe: refused'; done", Err("refused".to_owned())),
        ] {
            let (probers, dir) = probers(script);
            let several = (0..20).map(|_| {
                tokio::spawn({
                    let probers = probers.clone();
                    async move { probers.ask(request(), LIMIT).await }
                })
            });
            for asked in several.collect::<Vec<_>>() {
                assert_eq!(asked.await.unwrap().unwrap(), expected, "{script}");
            }
            assert_eq!((left(&dir), probers.idle().len()), (0, 0), "{script}");
        }
    }

    #[tokio::test]
    async fn a_probe_that_ends_or_hangs_is_an_error_and_is_not_asked_again() {
        let (ends, dir) = probers("echo no such cgroup >&2; exit 1");
        let said = ends.ask(request(), LIMIT).await.unwrap_err().to_string();
        assert!(said.contains("no such cgroup"), "{said}");
        assert_eq!(left(&dir), 0);
        let (hangs, dir) = probers("exec sleep 1000");
        let said = hangs.ask(request(), Duration::from_millis(50)).await.unwrap();
        assert_eq!((said, left(&dir)), (Err("the probe did not end in time".to_owned()), 0));
    }

    #[tokio::test]
    async fn whoever_asks_may_be_cut_off_and_nothing_is_left() {
        let (probers, dir) = probers("exec sleep 1000");
        let asking = tokio::spawn({
            let probers = probers.clone();
            async move { probers.ask(request(), Duration::from_millis(50)).await }
        });
        while left(&dir) == 0 {
            tokio::task::yield_now().await;
        }
        asking.abort();
        assert!(asking.await.unwrap_err().is_cancelled());
        while left(&dir) != 0 || probers.turns.available_permits() != MOST {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    #[test]
    fn what_a_killed_agent_has_left_is_removed_unless_it_is_in_use() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["marline-probe-1-0", "marline-probe-2-0/in-use", "pod-1"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        sweep(dir.path());
        assert!(!dir.path().join("marline-probe-1-0").exists());
        assert!(dir.path().join("marline-probe-2-0").exists() && dir.path().join("pod-1").exists());
    }
}
