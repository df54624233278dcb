//! Nodes that get no more certificates: a small file beside the ledger, written by `marline ca revoke` and read for each certificate.

use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::Path,
};

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
    let mut file = OpenOptions::new().create(true).write(true).truncate(true).mode(mode).open(&beside)?;
    let written = file.write_all(bytes).and_then(|()| file.sync_all()).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written?;
    path.parent().map_or(Ok(()), |dir| File::open(dir)?.sync_all())
}
