//! The image as files: an OCI layout, and the same in one archive. That archive has a `manifest.json` beside, as `docker save` writes it, so
//! that engines which know no OCI layout take it, too.

use std::{fs, path::Path};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use tar::EntryType;

use super::{Parts, files};

pub(super) const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

pub(super) struct Image {
    /// Of the manifest: what the image is called by.
    pub digest: String,
    pub size: usize,
}

/// Writes everything below `out`.
pub(super) fn write(out: &Path, parts: &Parts, name: &str) -> Result<Image> {
    let layer = files::layer(parts)?;
    let packed = files::compressed(&layer)?;
    let created = rfc3339(parts.time);
    let config = text(&json!({
        "architecture": "amd64", "os": "linux", "created": created,
        "config": {"Entrypoint": ["/usr/bin/marline"], "Env": ["PATH=/usr/bin"], "WorkingDir": "/",
                   "Labels": {"org.opencontainers.image.title": "marline", "org.opencontainers.image.licenses": "Apache-2.0"}},
        "rootfs": {"type": "layers", "diff_ids": [digest(&layer)]},
        "history": [{"created": created, "created_by": "cargo xtask image"}],
    }));
    let manifest = text(&json!({
        "schemaVersion": 2, "mediaType": MANIFEST,
        "config": descriptor(CONFIG, &config),
        "layers": [descriptor(LAYER, &packed)],
        "annotations": {"org.opencontainers.image.created": created},
    }));
    let mut named = descriptor(MANIFEST, &manifest);
    let tag = name.rsplit_once(':').map_or("latest", |(_, tag)| tag);
    named["annotations"] = json!({"org.opencontainers.image.ref.name": tag, "io.containerd.image.name": name});
    named["platform"] = json!({"architecture": "amd64", "os": "linux"});
    let index = text(&json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [named],
    }));
    let docker = text(&json!([{
        "Config": blob(&config), "RepoTags": [name], "Layers": [blob(&packed)],
    }]));
    let mut written = vec![
        ("oci-layout".to_owned(), text(&json!({"imageLayoutVersion": "1.0.0"}))),
        ("index.json".to_owned(), index),
        (blob(&config), config),
        (blob(&packed), packed),
        (blob(&manifest), manifest.clone()),
    ];
    let oci = out.join("oci");
    if oci.exists() {
        fs::remove_dir_all(&oci).with_context(|| format!("cannot remove {}", oci.display()))?;
    }
    let what = || format!("cannot write below {}", out.display());
    fs::create_dir_all(oci.join("blobs/sha256")).with_context(what)?;
    for (path, bytes) in &written {
        fs::write(oci.join(path), bytes).with_context(what)?;
    }
    written.push(("manifest.json".to_owned(), docker));
    written.sort();
    let mut archive = tar::Builder::new(Vec::new());
    for (path, bytes) in &written {
        files::append(&mut archive, path, EntryType::Regular, 0o644, bytes, parts.time)?;
    }
    let archive = archive.into_inner()?;
    fs::write(out.join("marline.tar"), &archive).with_context(what)?;
    fs::write(out.join("marline.cdx.json"), &parts.sbom).with_context(what)?;
    Ok(Image { digest: digest(&manifest), size: archive.len() })
}

pub(super) fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

fn blob(bytes: &[u8]) -> String {
    format!("blobs/{}", digest(bytes).replace(':', "/"))
}

fn descriptor(kind: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": kind, "digest": digest(bytes), "size": bytes.len()})
}

/// Keys are sorted: the same value is the same text.
fn text(value: &Value) -> Vec<u8> {
    value.to_string().into_bytes()
}

/// Seconds since 1970 as a date, by the calendar's own arithmetic.
fn rfc3339(time: u64) -> String {
    let (days, rest) = (time / 86_400, time % 86_400);
    let shifted = days + 719_468;
    let (era, day) = (shifted / 146_097, shifted % 146_097);
    let year = (day - day / 1_460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let date = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{date:02}T{:02}:{:02}:{:02}Z", rest / 3_600, rest / 60 % 60, rest % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seconds_are_written_as_a_date() {
        assert_eq!(rfc3339(0), "1970-01-01T00:00:00Z");
        assert_eq!(rfc3339(951_782_400), "2000-02-29T00:00:00Z");
        assert_eq!(rfc3339(1_795_757_529), "2026-11-27T05:32:09Z");
    }

    #[test]
    fn an_image_is_the_same_wherever_it_is_written() {
        let parts = || Parts { binary: b"binary".to_vec(), sbom: b"{}".to_vec(), time: 1_700_000_000 };
        let (one, two) = (std::env::temp_dir().join("marline-one"), std::env::temp_dir().join("marline-two"));
        let digests = [&one, &two].map(|out| write(out, &parts(), "marline:1").unwrap().digest);
        assert_eq!(digests[0], digests[1]);
        let read = |out: &Path| fs::read(out.join("marline.tar")).unwrap();
        assert_eq!(read(&one), read(&two));
        for out in [one, two] {
            fs::remove_dir_all(out).unwrap();
        }
    }
}
