//! Puts the plugin onto a node: its file into the directory of plugins, its entry into the CNI configuration that the runtime uses, which is the
//! first by its name. All is written beside and moved into place: a runtime sees the old or the new. `chain` knows the text.
//!
//! A configuration of a single plugin (`.conf`) becomes a list; it is kept beside under a name that runtimes do not read.

use std::{
    fs::{self, File, Metadata},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use notify::{
    EventKind, RecursiveMode, Watcher as _,
    event::{AccessKind, AccessMode},
};
use tokio::{sync::Notify, time::timeout};

use self::contest::{Contest, Round};
use super::{CniError, NAME, chain};

mod contest;

/// What is appended to the name of a configuration that a list has taken the place of.
const ORIGINAL: &str = ".marline-original";
/// Some entry: a list with it is compared without it.
const ENTRY: &str = "{\"type\":\"marline-cni\"}";
/// In the names of files that are being written.
const FRESH: &str = ".marline-new";
/// Nobody writes a file for so long.
const ABANDONED: Duration = Duration::from_secs(60);
/// How often to look, also where the kernel tells nothing.
const LOOK: Duration = Duration::from_secs(5);

#[derive(Clone, Debug)]
pub struct Place {
    /// As the runtime has it: /etc/cni/net.d
    pub configurations: PathBuf,
    /// /opt/cni/bin
    pub binaries: PathBuf,
}

/// Installs the plugin's file, and its entry where it is missing. Tells which configuration has it.
pub fn install(place: &Place, entry: &str) -> Result<PathBuf, CniError> {
    prepare(place)?;
    ensure(&place.configurations, entry).map(|(file, _)| file)
}

/// The entry alone. Tells the configuration that has it, and whether it was changed.
pub fn ensure(configurations: &Path, entry: &str) -> Result<(PathBuf, bool), CniError> {
    let first = first(configurations)?.ok_or_else(|| CniError::Nothing(configurations.to_owned()))?;
    let (text, metadata) = read(&first)?;
    if is_list(&first) {
        let changed = chain::add(&text, entry).map_err(wrong(&first))?;
        chain::spoken(&text).map_err(wrong(&first))?;
        if let Some(text) = &changed {
            put(&first, text.as_bytes(), Some(&metadata))?;
        }
        return Ok((first, changed.is_some()));
    }
    let list = first.with_extension("conflist");
    let wrapped = chain::wrap(&text, entry).map_err(wrong(&first))?;
    chain::spoken(&text).map_err(wrong(&first))?;
    let original = original_of(&first);
    // One that we had written when we were killed is ours to finish.
    let unfinished = || read(&list).is_ok_and(|(text, _)| text == wrapped);
    if list.exists() && !original.exists() && !unfinished() {
        let why = format!("there is {}, too, and it is not known which counts; remove one", list.display());
        return Err(wrong(&first)(why));
    }
    // The list comes after the original by its name, so until that has moved it is still the one that counts.
    put(&list, wrapped.as_bytes(), Some(&metadata))?;
    fs::rename(&first, &original).map_err(CniError::path("cannot move", &first))?;
    sync(configurations);
    Ok((list, true))
}

/// Takes the plugin out of every configuration, then its file away. Tells which configurations were changed.
pub fn uninstall(place: &Place, keep_program: bool) -> Result<Vec<PathBuf>, CniError> {
    let mut changed = Vec::new();
    for original in files(&place.configurations, &|name| name.ends_with(ORIGINAL))? {
        let Some(name) = original.to_str().and_then(|path| path.strip_suffix(ORIGINAL)).map(PathBuf::from) else {
            continue;
        };
        let list = name.with_extension("conflist");
        let wrapped =
            chain::wrap(&read(&original)?.0, ENTRY).and_then(|wrapped| chain::remove(&wrapped)).ok().flatten();
        let now = read(&list).ok().and_then(|(text, _)| chain::remove(&text).ok().flatten().or(Some(text)));
        if list != name && now.is_some() && now != wrapped {
            // The CNI has taken to a list of its own since: the original is old, and our entry is taken out below.
            fs::remove_file(&original).map_err(CniError::path("cannot remove", &original))?;
            continue;
        }
        // One that the CNI has written since is newer.
        let back = if name.exists() { fs::remove_file(&original) } else { fs::rename(&original, &name) };
        back.map_err(CniError::path("cannot move", &original))?;
        if list != name && list.exists() {
            fs::remove_file(&list).map_err(CniError::path("cannot remove", &list))?;
        }
        changed.push(name);
    }
    for file in files(&place.configurations, &|name| name.ends_with(".conflist"))? {
        let (text, metadata) = read(&file)?;
        // Another's list that cannot be read has no plugin of ours.
        if let Ok(Some(text)) = chain::remove(&text) {
            put(&file, text.as_bytes(), Some(&metadata))?;
            changed.push(file);
        }
    }
    // Whoever would put the plugin back is gone before it is taken away.
    for directory in [&place.configurations, &place.binaries] {
        sweep(directory, Duration::ZERO);
    }
    sync(&place.configurations);
    let program = place.binaries.join(NAME);
    match if keep_program { Ok(()) } else { fs::remove_file(&program) } {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(CniError::path("cannot remove", program)(error));
        }
        _ => {}
    }
    Ok(changed)
}

/// Installs, and puts the entry back whenever it is missing, until this is dropped. What fails is told, once, and tried again.
pub async fn watch(place: &Place, entry: &str) -> Result<(), CniError> {
    prepare(place)?;
    let (events, mut trouble, mut watched) = (Arc::new(Notify::new()), None, None);
    let mut contest = Contest::default();
    loop {
        if watched.is_none() {
            watched = watcher(&place.configurations, &events);
        }
        match ensure(&place.configurations, entry) {
            Ok((file, changed)) => {
                if changed {
                    told(contest.changed(Instant::now()), &file);
                }
                trouble = None;
            }
            Err(error) => {
                let why = crate::words::with_causes(&error);
                if trouble.as_ref() != Some(&why) {
                    tracing::warn!("the plugin is not in the chain: {why}");
                }
                trouble = Some(why);
            }
        }
        if timeout(LOOK, events.notified()).await.is_ok() {
            tokio::time::sleep(contest.pause(Instant::now())).await;
        } else if !place.configurations.exists() {
            watched = None;
        }
    }
}

fn told(round: Round, file: &Path) {
    let file = file.display();
    match round {
        Round::Well => tracing::info!(%file, "the plugin is in the chain"),
        Round::Contested => tracing::warn!(
            "another program keeps changing {file}, and pods that start meanwhile are not captured: the plugin is put back every {} s at most. Find what \
             writes the file, and let it leave others' plugins there (Cilium: cni.exclusive=false)",
            LOOK.as_secs()
        ),
        Round::Known => tracing::debug!(%file, "the plugin is in the chain again"),
    }
}

/// Why pods of this node start without the plugin, if they do.
pub fn fault(configurations: &Path) -> Option<String> {
    let directory = configurations.display();
    let first = match first(configurations) {
        Ok(Some(first)) => first,
        Ok(None) => return Some(format!("there is no CNI configuration in {directory}")),
        Err(error) => return Some(crate::words::with_causes(&error)),
    };
    let missing = || format!("{} does not end with {NAME}, so pods would start uncaptured", first.display());
    let because = |why: String| format!("{}: {why}", first.display());
    match read(&first) {
        Err(error) => Some(crate::words::with_causes(&error)),
        Ok((text, _)) if is_list(&first) => match chain::ends_with_it(&text) {
            Ok(true) => chain::spoken(&text).err().map(because),
            Ok(false) => Some(missing()),
            Err(why) => Some(because(why)),
        },
        Ok(_) => Some(missing()),
    }
}

/// The plugin's file. The first step of all, so it clears up as well.
fn prepare(place: &Place) -> Result<(), CniError> {
    for directory in [&place.configurations, &place.binaries] {
        sweep(directory, ABANDONED);
    }
    install_program(&place.binaries, Path::new("/proc/self/exe"))
}

fn install_program(binaries: &Path, program: &Path) -> Result<(), CniError> {
    let text = fs::read(program).map_err(CniError::Program)?;
    let target = binaries.join(NAME);
    let same =
        fs::metadata(&target).is_ok_and(|there| there.len() == text.len() as u64 && there.mode() & 0o111 == 0o111);
    if same && fs::read(&target).is_ok_and(|there| there == text) {
        return Ok(());
    }
    fs::create_dir_all(binaries).map_err(CniError::path("cannot make", binaries))?;
    let fresh = beside(&target);
    let written = write(&fresh, &text, 0o755).and_then(|()| fs::rename(&fresh, &target));
    written.map_err(|error| {
        let _ = fs::remove_file(&fresh);
        CniError::path("cannot write", target)(error)
    })?;
    sync(binaries);
    Ok(())
}

/// The configuration that a runtime uses.
fn first(configurations: &Path) -> Result<Option<PathBuf>, CniError> {
    let known = |name: &str| [".conf", ".conflist", ".json"].iter().any(|end| name.ends_with(end));
    Ok(files(configurations, &known)?.into_iter().next())
}

fn files(directory: &Path, wanted: &dyn Fn(&str) -> bool) -> Result<Vec<PathBuf>, CniError> {
    let entries = fs::read_dir(directory).map_err(CniError::path("cannot list", directory))?;
    let named = entries.flatten().filter(|entry| entry.file_name().to_str().is_some_and(wanted));
    let mut found: Vec<PathBuf> = named.map(|entry| entry.path()).filter(|path| path.is_file()).collect();
    found.sort();
    Ok(found)
}

fn is_list(file: &Path) -> bool {
    file.extension().is_some_and(|extension| extension == "conflist")
}

fn original_of(file: &Path) -> PathBuf {
    let mut name = file.as_os_str().to_owned();
    name.push(ORIGINAL);
    name.into()
}

fn wrong(path: &Path) -> impl Fn(String) -> CniError {
    let path = path.to_owned();
    move |why| CniError::Configuration { path: path.clone(), why }
}

fn read(file: &Path) -> Result<(String, Metadata), CniError> {
    let read = || Ok((fs::read_to_string(file)?, fs::metadata(file)?));
    read().map_err(CniError::path("cannot read", file))
}

/// Puts a file in place as a whole, with the owner and mode of the one before it.
fn put(file: &Path, text: &[u8], like: Option<&Metadata>) -> Result<(), CniError> {
    let fresh = beside(file);
    let written = write(&fresh, text, like.map_or(0o600, |like| like.permissions().mode() & 0o7777)).and_then(|()| {
        if let Some(like) = like {
            chown(&fresh, Some(like.uid()), Some(like.gid()))?;
        }
        fs::rename(&fresh, file)
    });
    written.map_err(|error| {
        let _ = fs::remove_file(&fresh);
        CniError::path("cannot write", file)(error)
    })?;
    if let Some(directory) = file.parent() {
        sync(directory);
    }
    Ok(())
}

fn write(file: &Path, text: &[u8], mode: u32) -> io::Result<()> {
    let mut out = File::create_new(file)?;
    out.write_all(text)?;
    out.set_permissions(fs::Permissions::from_mode(mode))?;
    out.sync_all()
}

/// A name that no runtime reads, and nobody else writes: during an update two of us have the directory, with one process id in their containers.
fn beside(file: &Path) -> PathBuf {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    file.with_file_name(format!(".{name}{FRESH}-{:016x}", rand::random::<u64>()))
}

/// Takes away what others who were killed have left half-written, which was so long ago.
fn sweep(directory: &Path, ago: Duration) {
    let left = files(directory, &|name| name.starts_with('.') && name.contains(FRESH)).unwrap_or_default();
    for file in left {
        let age = fs::metadata(&file).and_then(|file| file.modified()).map(|then| then.elapsed().unwrap_or_default());
        if age.is_ok_and(|age| age >= ago) {
            let _ = fs::remove_file(file);
        }
    }
}

/// The renames of a directory, on the disk. A filesystem that cannot do so does it sooner or later.
fn sync(directory: &Path) {
    let _ = File::open(directory).and_then(|directory| directory.sync_all());
}

fn watcher(directory: &Path, events: &Arc<Notify>) -> Option<notify::RecommendedWatcher> {
    let events = Arc::clone(events);
    let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
        // Our own reading opens files, too.
        let read_only = matches!(&event, Ok(event) if matches!(event.kind,
            EventKind::Access(kind) if kind != AccessKind::Close(AccessMode::Write)));
        if !read_only {
            events.notify_one();
        }
    })
    .ok()?;
    watcher.watch(directory, RecursiveMode::NonRecursive).ok()?;
    Some(watcher)
}

#[cfg(test)]
mod tests;
