//! The ledger's file: lines are appended whole or not at all, under a lock that `revoke` takes as well. A file that was moved away
//! (logrotate) is followed by a new one; those beside it whose names begin alike are read with it.

use std::{
    fs::{self, File, OpenOptions, Permissions},
    io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
};

use nix::fcntl::{Flock, FlockArg};

use super::entry::Entry;
use crate::ca::{CaError, shut_out::open_kept};

const NAME: &str = "ledger.jsonl";
const LOCK: &str = "lock";
/// More than the longest line.
const ROOM: usize = 8 << 10;

pub(super) struct LedgerFile {
    dir: PathBuf,
    file: Option<File>,
}

/// What a ledger says, and how many of its lines cannot be read.
#[derive(Default, Debug)]
pub struct Read {
    pub entries: Vec<Entry>,
    pub unreadable: usize,
    /// FILE:LINE.
    pub first_unreadable: Option<String>,
}

/// Holds off the writing of lines until it is dropped. Made also where no service ever ran.
pub fn lock(dir: &Path) -> Result<Flock<File>, CaError> {
    let path = dir.join(LOCK);
    let file = (|| {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        open_kept(&path, 0o600)
    })();
    let file = file.map_err(CaError::io("open", &path))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| CaError::io("lock", &path)(error.into()))
}

/// The lines that `keep` wants, of all files of the ledger in `dir`.
pub fn read(dir: &Path, keep: impl Fn(&Entry) -> bool) -> Result<Read, CaError> {
    let mut read = Read::default();
    let listed = fs::read_dir(dir).and_then(Iterator::collect::<io::Result<Vec<_>>>);
    for found in listed.map_err(CaError::io("read", dir))? {
        if !found.file_name().as_encoded_bytes().starts_with(NAME.as_bytes()) {
            continue;
        }
        let path = found.path();
        let file = File::open(&path).map_err(CaError::io("read", &path))?;
        for (number, line) in BufReader::new(file).split(b'\n').enumerate() {
            let line = line.map_err(CaError::io("read", &path))?;
            match serde_json::from_slice::<Entry>(&line) {
                Ok(entry) if keep(&entry) => read.entries.push(entry),
                Ok(_) => {}
                Err(_) if line.is_empty() => {}
                Err(_) => {
                    read.unreadable += 1;
                    read.first_unreadable.get_or_insert_with(|| format!("{}:{}", path.display(), number + 1));
                }
            }
        }
    }
    Ok(read)
}

impl LedgerFile {
    pub(super) fn open(dir: &Path) -> Result<Self, CaError> {
        let mut ledger = Self { dir: dir.to_owned(), file: None };
        ledger.locked(|file, _| file.append(b"", true))?;
        Ok(ledger)
    }

    /// Does something under the lock.
    pub(super) fn locked<T>(
        &mut self,
        work: impl FnOnce(&mut Self, &Path) -> Result<T, CaError>,
    ) -> Result<T, CaError> {
        let dir = self.dir.clone();
        let _lock = lock(&dir)?;
        work(self, &dir)
    }

    /// Appends all of it, and with `flush` waits until the disk has it.
    pub(super) fn append(&mut self, lines: &[u8], flush: bool) -> Result<(), CaError> {
        let path = self.dir.join(NAME);
        let result = self.try_append(&path, lines, flush);
        if result.is_err() {
            // After a failed flush nobody knows what the kernel holds for this descriptor.
            self.file = None;
        }
        result.map_err(CaError::io("write", &path))
    }

    /// Tries whether there is room for some lines, and leaves none.
    pub(super) fn probe(&mut self) -> Result<(), CaError> {
        // Empty lines mean nothing, should the machine die between the two.
        self.append(&[b'\n'; ROOM], true)?;
        let file = self.file.as_ref();
        let undone = file.map_or(Ok(()), |file| file.set_len(file.metadata()?.len().saturating_sub(ROOM as u64)));
        undone.map_err(CaError::io("write", &self.dir.join(NAME)))
    }

    fn try_append(&mut self, path: &Path, lines: &[u8], flush: bool) -> io::Result<()> {
        let there = fs::metadata(path).ok().map(|metadata| (metadata.dev(), metadata.ino()));
        let same = |file: &File| file.metadata().is_ok_and(|metadata| there == Some((metadata.dev(), metadata.ino())));
        let file = match self.file.take().filter(same) {
            Some(file) => self.file.insert(file),
            None => self.file.insert(open(path)?),
        };
        let before = file.metadata()?.len();
        let written = file.write_all(lines).and_then(|()| if flush { file.sync_data() } else { Ok(()) });
        if written.is_err() {
            // Half a line would spoil the next one, and a whole one would tell of a certificate that nobody has.
            let _ = file.set_len(before);
        }
        written
    }
}

fn open(path: &Path) -> io::Result<File> {
    let mut file = OpenOptions::new().create(true).append(true).read(true).mode(0o600).open(path)?;
    if file.metadata()?.is_file() {
        file.set_permissions(Permissions::from_mode(0o600))?;
        if let Some(dir) = path.parent() {
            File::open(dir)?.sync_all()?;
        }
        // A machine that died while it wrote has left half a line.
        if file.seek(SeekFrom::End(0))? > 0 {
            file.seek(SeekFrom::End(-1))?;
            let mut last = [0];
            file.read_exact(&mut last)?;
            if last != *b"\n" {
                file.write_all(b"\n")?;
            }
        }
    }
    Ok(file)
}
