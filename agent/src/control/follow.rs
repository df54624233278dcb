//! Follows files that are read as a whole, with what is told from elsewhere if anything is: when one changes all are read again. What is
//! good is handed on, and what is not is told of once; whoever was handed the last good ones keeps them. What good files are, the
//! reader knows.

use std::{
    collections::BTreeSet,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    io,
    path::{Path, PathBuf},
    sync::Arc,
};

use tokio::{sync::watch, task::spawn_blocking, time::sleep};
use zeroize::Zeroize as _;

use super::{files::WatchSettings, watched::WatchedDirectory};
use crate::config;

/// Reads what is followed, or says why it cannot be taken.
pub type Reader<T, E> = Arc<dyn Fn() -> Result<T, E> + Send + Sync>;

/// Of what changes while it is read, before that is told.
const READINGS: usize = 10;

/// What is followed.
pub struct Sources {
    /// Directories in which an event may mean a change.
    places: BTreeSet<PathBuf>,
    files: Arc<dyn Fn() -> io::Result<Vec<PathBuf>> + Send + Sync>,
    /// Counts what comes as a whole by another way, and is read with the files.
    told: Option<watch::Receiver<u64>>,
}

impl Sources {
    pub fn files(paths: Vec<PathBuf>) -> Self {
        let places = paths.iter().filter_map(|path| path.parent()).map(Path::to_owned).collect();
        Self { places, files: Arc::new(move || Ok(paths.clone())), told: None }
    }

    /// The files that `list` finds in `dir` at each look.
    pub fn directory(dir: PathBuf, list: fn(&Path) -> io::Result<Vec<PathBuf>>) -> Self {
        Self { places: BTreeSet::from([dir.clone()]), files: Arc::new(move || list(&dir)), told: None }
    }

    pub fn and_told(self, told: watch::Receiver<u64>) -> Self {
        Self { told: Some(told), ..self }
    }
}

/// Follows until `shutdown` becomes true or its sender is gone. `took` hears of every good reading, the first one included, and of each
/// refusal that is a new one; `unread` makes a refusal of what kept the reader from reading.
pub async fn follow<T: Send + 'static, E: Clone + PartialEq + Send + 'static>(
    mut sources: Sources,
    read: Reader<T, E>,
    unread: impl Fn(String) -> E + Send,
    mut took: impl FnMut(Result<T, E>) + Send,
    settings: WatchSettings,
    mut shutdown: watch::Receiver<bool>,
) {
    let mut directories: Vec<_> = sources.places.iter().cloned().map(WatchedDirectory::new).collect();
    let (mut seen, mut refused) = (None, None);
    loop {
        // Before reading: what changes from here on is an event for the next round.
        directories.iter_mut().for_each(WatchedDirectory::renew);
        let count = sources.told.as_mut().map_or(0, |told| *told.borrow_and_update());
        for reading in 1..=READINGS {
            let before = print(&sources, count).await;
            if seen.is_some() && seen == before {
                break;
            }
            let reader = Arc::clone(&read);
            let result = match spawn_blocking(move || reader()).await {
                Ok(result) => result,
                // Not the end of following: what is taken out of the files later must count.
                Err(error) if error.is_panic() => Err(unread(format!("reading it failed: {error}"))),
                // The runtime is being shut down.
                Err(_) => return,
            };
            // What changed while it was read may be half of the old and half of the new.
            if print(&sources, count).await != before {
                if reading == READINGS {
                    let why = format!("it changed {READINGS} times while it was read; it is looked at again");
                    tell(&mut refused, None, unread(why), &mut took);
                }
                sleep(settings.quiet).await;
                continue;
            }
            match result {
                Ok(good) => {
                    (seen, refused) = (before, None);
                    took(Ok(good));
                }
                // Tried again at each look: what is wrong need not be in the files.
                Err(why) => {
                    seen = None;
                    tell(&mut refused, before, why, &mut took);
                }
            }
            break;
        }
        tokio::select! {
            () = any_changed(&directories), if !directories.is_empty() => {}
            // It comes as a whole.
            () = told_more(sources.told.as_mut()) => continue,
            () = sleep(settings.poll) => continue,
            _ = shutdown.wait_for(|stop| *stop) => return,
        }
        // More events put the reading off, but not for ever.
        for _ in 0..10 {
            tokio::select! {
                () = any_changed(&directories) => {}
                () = sleep(settings.quiet) => break,
            }
        }
    }
}

/// Tells of a refusal that is a new one.
fn tell<T, E: Clone + PartialEq>(
    refused: &mut Option<(Option<u64>, E)>,
    print: Option<u64>,
    why: E,
    took: &mut impl FnMut(Result<T, E>),
) {
    let refusal = Some((print, why.clone()));
    if *refused != refusal {
        *refused = refusal;
        took(Err(why));
    }
}

/// Waits for ever where nothing is told, or nobody tells any more.
async fn told_more(told: Option<&mut watch::Receiver<u64>>) {
    if let Some(told) = told
        && told.changed().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

async fn any_changed(directories: &[WatchedDirectory]) {
    let mut waiting: Vec<_> = directories.iter().map(|directory| Box::pin(directory.changed())).collect();
    std::future::poll_fn(|context| {
        let ready = waiting.iter_mut().any(|one| one.as_mut().poll(context).is_ready());
        if ready { std::task::Poll::Ready(()) } else { std::task::Poll::Pending }
    })
    .await;
}

/// None if it cannot be found out which files there are: that is worth a try each time, until it can.
async fn print(sources: &Sources, told: u64) -> Option<u64> {
    let files = Arc::clone(&sources.files);
    spawn_blocking(move || files().ok().map(|files| fingerprint(&files, told))).await.ok().flatten()
}

fn fingerprint(files: &[PathBuf], told: u64) -> u64 {
    let mut hasher = DefaultHasher::new();
    told.hash(&mut hasher);
    for file in files {
        file.hash(&mut hasher);
        // A file that is not there, or cannot be read, is part of what was seen.
        match config::read_file(file).map_err(|error| error.kind()) {
            // One of them may be a CA's key.
            Ok(mut bytes) => {
                bytes.hash(&mut hasher);
                bytes.zeroize();
            }
            Err(kind) => kind.hash(&mut hasher),
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use std::{
        convert, fs,
        sync::atomic::{AtomicUsize, Ordering},
        time::Duration,
    };

    use tokio::{sync::mpsc, time::timeout};

    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    /// What is told of one file that is read so.
    fn told(
        read: impl Fn(&Path) -> Result<usize, String> + Send + Sync + 'static,
    ) -> impl Future<Output = Vec<Result<usize, String>>> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        fs::write(&path, "").unwrap();
        let (sender, mut receiver) = mpsc::unbounded_channel();
        let (stop, shutdown) = watch::channel(false);
        let settings = WatchSettings { quiet: Duration::from_millis(1), poll: Duration::from_millis(10) };
        let file = path.clone();
        let took = move |read| drop(sender.send(read));
        let following = follow(
            Sources::files(vec![path]),
            Arc::new(move || read(&file)),
            convert::identity,
            took,
            settings,
            shutdown,
        );
        tokio::spawn(following);
        async move {
            let mut told = Vec::new();
            while told.len() < 2 {
                told.push(timeout(LONG, receiver.recv()).await.expect("nothing more is told").expect("it has ended"));
            }
            drop((stop, dir));
            told
        }
    }

    #[tokio::test]
    async fn a_reader_that_panics_is_told_of_and_asked_again() {
        let count = AtomicUsize::new(0);
        let told = told(move |_| match count.fetch_add(1, Ordering::Relaxed) {
            0 => panic!("a fault"),
            more => Ok(more),
        });
        let told = told.await;
        assert!(told[0].as_ref().unwrap_err().contains("reading it failed"), "{told:?}");
        assert_eq!(told[1], Ok(1));
    }

    #[tokio::test]
    async fn files_that_are_never_quiet_are_told_of_and_taken_when_they_are() {
        let count = AtomicUsize::new(0);
        let told = told(move |path| {
            let now = count.fetch_add(1, Ordering::Relaxed);
            if now < READINGS {
                fs::write(path, "x".repeat(now + 1)).unwrap();
            }
            Ok(now)
        });
        let told = told.await;
        assert!(told[0].as_ref().unwrap_err().contains("it changed 10 times"), "{told:?}");
        assert_eq!(told[1], Ok(READINGS));
    }
}
