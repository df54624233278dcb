//! Nodes that get no more certificates: a small file beside the ledger, written by `marline ca revoke` and read for each certificate.

use std::{
    collections::BTreeMap,
    fs::{self, File, Metadata, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _, fchown},
    path::Path,
};

use nix::{fcntl::OFlag, unistd::Uid};

use super::CaError;

const NAME: &str = "revoked-nodes.json";

/// Since when, by node.
pub type ShutOut = BTreeMap<String, String>;

pub fn read(dir: &Path) -> Result<ShutOut, CaError> {
    let path = dir.join(NAME);
    match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(ShutOut::new()),
        Err(error) => Err(CaError::io("read", &path)(error)),
        Ok(bytes) => serde_json::from_slice(&bytes).map_err(|source| CaError::ShutOut { path, source }),
    }
}

pub fn write(dir: &Path, nodes: &ShutOut) -> Result<(), CaError> {
    let path = dir.join(NAME);
    let text = serde_json::to_vec_pretty(nodes).map_err(|source| CaError::ShutOut { path: path.clone(), source })?;
    replace(&path, &text, 0o600).map_err(CaError::io("write", &path))
}

/// Puts a whole new file in the place of another, so that readers have the one or the other, also after the machine has died.
pub fn replace(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".new");
    let beside = path.with_file_name(name);
    // What an earlier attempt has left, and anything else that is called so: it is not followed, it may lead anywhere.
    match fs::remove_file(&beside) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&beside)?;
    let written = owned_as(&file, path)
        .and_then(|()| file.write_all(bytes))
        .and_then(|()| file.sync_all())
        .and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}

/// Opens a file for writing that is kept for good, as the service's own if it is made now. The folder is the service's, which may have put a
/// link there: it is not followed, and what was there before keeps its owner.
pub fn open_kept(path: &Path, mode: u32) -> io::Result<File> {
    match OpenOptions::new().write(true).create_new(true).mode(mode).open(path) {
        Ok(file) => owned_as(&file, path).map(|()| file),
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            OpenOptions::new().write(true).custom_flags(OFlag::O_NOFOLLOW.bits()).open(path)
        }
        Err(error) => Err(error),
    }
}

/// What root makes among the files of a service that runs as somebody else is that one's: it could not read it else. Whose it is tells the
/// file in whose place it comes, or the folder. Only for files that were made just now.
fn owned_as(file: &File, path: &Path) -> io::Result<()> {
    if !Uid::effective().is_root() {
        return Ok(());
    }
    let there = match fs::symlink_metadata(path) {
        Ok(there) if !is_roots(&there) => there,
        _ => fs::metadata(path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new(".")))?,
    };
    if is_roots(&there) { Ok(()) } else { fchown(file, Some(there.uid()), Some(there.gid())) }
}

fn is_roots(there: &Metadata) -> bool {
    there.uid() == 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use super::*;

    #[test]
    fn what_root_writes_belongs_to_the_service_whose_folder_it_is() {
        if !Uid::effective().is_root() {
            println!("SKIPPED: what_root_writes_belongs_to_the_service_whose_folder_it_is: needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let owner = || fs::metadata(&path).map(|it| (it.uid(), it.gid())).unwrap();
        replace(&path, b"1", 0o600).unwrap();
        assert_eq!(owner(), (0, 0));
        chown(dir.path(), Some(4321), Some(8765)).unwrap();
        replace(&path, b"2", 0o600).unwrap();
        assert_eq!(owner(), (4321, 8765), "also if an earlier one was root's");
        chown(&path, Some(1234), Some(5678)).unwrap();
        replace(&path, b"3", 0o600).unwrap();
        assert_eq!((owner(), fs::read(&path).unwrap()), ((1234, 5678), b"3".to_vec()));
        let _lock = crate::ca::ledger::file::lock(dir.path()).unwrap();
        let lock = fs::metadata(dir.path().join("lock")).unwrap();
        assert_eq!((lock.uid(), lock.gid()), (4321, 8765));
    }

    #[test]
    fn links_in_the_services_folder_lead_root_nowhere() {
        let (dir, elsewhere) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let precious = elsewhere.path().join("precious");
        fs::write(&precious, "precious").unwrap();
        for name in ["file.new", "lock"] {
            std::os::unix::fs::symlink(&precious, dir.path().join(name)).unwrap();
        }
        if Uid::effective().is_root() {
            chown(dir.path(), Some(4321), Some(8765)).unwrap();
        }
        replace(&dir.path().join("file"), b"new", 0o600).unwrap();
        assert!(crate::ca::ledger::file::lock(dir.path()).is_err());
        let owner = |path: &Path| fs::metadata(path).unwrap().uid();
        assert_eq!((fs::read(&precious).unwrap(), owner(&precious)), (b"precious".to_vec(), owner(elsewhere.path())));
        let file = dir.path().join("file");
        assert!(fs::symlink_metadata(&file).unwrap().is_file());
        assert_eq!(fs::read(file).unwrap(), b"new");
    }
}
