//! Follows a few files that are read as a whole: when one changes all are read again. What is good is handed on, and what is not is told
//! of once; whoever was handed the last good ones keeps them. What good files are, the reader knows.

use std::{collections::BTreeSet, path::Path, path::PathBuf, sync::Arc};

use tokio::{sync::watch, task::spawn_blocking, time::sleep};

use super::{
    files::WatchSettings,
    trust::{any_changed, fingerprint},
    watched::WatchedDirectory,
};

/// Reads the files, or says why they cannot be taken.
pub type Reader<T> = Arc<dyn Fn() -> Result<T, String> + Send + Sync>;

/// Of files that change while they are read, before that is told.
const READINGS: usize = 10;

/// Follows until `shutdown` becomes true or its sender is gone. `took` hears of every good reading, the first one included, and of each
/// refusal that is a new one.
pub async fn follow<T: Send + 'static>(
    paths: Vec<PathBuf>,
    read: Reader<T>,
    mut took: impl FnMut(Result<T, String>) + Send,
    settings: WatchSettings,
    mut shutdown: watch::Receiver<bool>,
) {
    let places: BTreeSet<&Path> = paths.iter().filter_map(|path| path.parent()).collect();
    let mut directories: Vec<_> = places.into_iter().map(|place| WatchedDirectory::new(place.to_owned())).collect();
    let (mut seen, mut refused) = (None, None);
    loop {
        // Before reading: what changes from here on is an event for the next round.
        directories.iter_mut().for_each(WatchedDirectory::renew);
        for reading in 1..=READINGS {
            let before = print(&paths).await;
            if seen.is_some() && seen == before {
                break;
            }
            let reader = Arc::clone(&read);
            let result = match spawn_blocking(move || reader()).await {
                Ok(result) => result,
                // Not the end of following: what is taken out of the files later must count.
                Err(error) if error.is_panic() => Err(format!("reading them failed: {error}")),
                // The runtime is being shut down.
                Err(_) => return,
            };
            // What changed while it was read may be half of the old and half of the new.
            if print(&paths).await != before {
                if reading == READINGS {
                    let why = format!("they changed {READINGS} times while they were read; they are looked at again");
                    tell(&mut refused, None, why, &mut took);
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
            () = any_changed(&directories) => {}
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
fn tell<T>(
    refused: &mut Option<(Option<u64>, String)>,
    print: Option<u64>,
    why: String,
    took: &mut impl FnMut(Result<T, String>),
) {
    let refusal = Some((print, why.clone()));
    if *refused != refusal {
        *refused = refusal;
        took(Err(why));
    }
}

async fn print(paths: &[PathBuf]) -> Option<u64> {
    let paths = paths.to_vec();
    spawn_blocking(move || fingerprint(&paths, 0)).await.ok()
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
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
        let following =
            follow(vec![path], Arc::new(move || read(&file)), move |read| drop(sender.send(read)), settings, shutdown);
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
        assert!(told[0].as_ref().unwrap_err().contains("reading them failed"), "{told:?}");
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
        assert!(told[0].as_ref().unwrap_err().contains("they changed 10 times"), "{told:?}");
        assert_eq!(told[1], Ok(READINGS));
    }
}
