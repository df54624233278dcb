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
        for _ in 0..10 {
            let before = print(&paths).await;
            if seen.is_some() && seen == before {
                break;
            }
            let reader = Arc::clone(&read);
            let Ok(result) = spawn_blocking(move || reader()).await else { return };
            // What changed while it was read may be half of the old and half of the new.
            if print(&paths).await != before {
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
                    let refusal = Some((before, why.clone()));
                    if refused != refusal {
                        refused = refusal;
                        took(Err(why));
                    }
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

async fn print(paths: &[PathBuf]) -> Option<u64> {
    let paths = paths.to_vec();
    spawn_blocking(move || fingerprint(&paths, 0)).await.ok()
}
