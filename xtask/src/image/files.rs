//! What is in the image: one layer, its entries sorted, owned by root, all of one time. How it is wrapped is left to `layout`.

use std::io::Write;

use anyhow::Result;
use flate2::{Compression, GzBuilder};
use tar::{EntryType, Header};

use super::Parts;

pub(super) const BINARY: &str = "usr/bin/marline";
pub(super) const SBOM: &str = "usr/share/sbom/marline.cdx.json";

/// An account for the CA, and who root is; how names are resolved; nothing else.
const ETC: [(&str, &str); 3] = [
    ("etc/group", "root:x:0:\nmarline:x:65532:\n"),
    ("etc/nsswitch.conf", "hosts: files dns\n"),
    ("etc/passwd", "root:x:0:0:root:/:/nologin\nmarline:x:65532:65532:marline:/:/nologin\n"),
];

/// Mounted over in a container.
const DIRECTORIES: [(&str, u32); 8] = [
    ("etc", 0o755),
    ("run", 0o755),
    ("tmp", 0o1777),
    ("usr", 0o755),
    ("usr/bin", 0o755),
    ("usr/share", 0o755),
    ("usr/share/sbom", 0o755),
    ("var", 0o755),
];

/// The layer as tar.
pub(super) fn layer(parts: &Parts) -> Result<Vec<u8>> {
    let mut entries: Vec<(&str, u32, Option<&[u8]>)> = Vec::new();
    entries.extend(DIRECTORIES.map(|(path, mode)| (path, mode, None)));
    entries.extend(ETC.map(|(path, text)| (path, 0o644, Some(text.as_bytes()))));
    entries.push((BINARY, 0o755, Some(&parts.binary)));
    entries.push((SBOM, 0o644, Some(&parts.sbom)));
    entries.sort_by_key(|entry| entry.0);
    let mut archive = tar::Builder::new(Vec::new());
    for (path, mode, content) in entries {
        let kind = if content.is_some() { EntryType::Regular } else { EntryType::Directory };
        append(&mut archive, path, kind, mode, content.unwrap_or_default(), parts.time)?;
    }
    Ok(archive.into_inner()?)
}

/// One entry that depends on nothing but its arguments.
pub(super) fn append(
    archive: &mut tar::Builder<impl Write>,
    path: &str,
    kind: EntryType,
    mode: u32,
    content: &[u8],
    time: u64,
) -> Result<()> {
    let mut header = Header::new_ustar();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(time);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content)?;
    Ok(())
}

/// Without the time and the name that gzip would write down.
pub(super) fn compressed(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut encoder = GzBuilder::new().mtime(0).operating_system(255).write(Vec::new(), Compression::best());
    encoder.write_all(bytes)?;
    Ok(encoder.finish()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_parts_make_the_same_layer_in_order_and_of_one_time() {
        let parts = || Parts { binary: b"binary".to_vec(), sbom: b"{}".to_vec(), time: 1_700_000_000 };
        let layer = layer(&parts()).unwrap();
        assert_eq!(layer, super::layer(&parts()).unwrap());
        assert_eq!(compressed(&layer).unwrap(), compressed(&layer).unwrap());
        let mut archive = tar::Archive::new(layer.as_slice());
        let mut names = Vec::new();
        for entry in archive.entries().unwrap() {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.mtime().unwrap(), header.uid().unwrap()), (1_700_000_000, 0));
            names.push(entry.path().unwrap().display().to_string());
        }
        assert!(names.is_sorted(), "{names:?}");
        assert!(names.iter().any(|name| name == BINARY));
    }
}
