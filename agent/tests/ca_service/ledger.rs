//! The ledger: a certificate that is not written down is not handed out.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
};

use marline::ca::ledger::{Ledger, entry::Entry};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
};
use tonic::Code;

use crate::bed::*;

/// A small file system of its own, gone when this is.
struct SmallDisk(PathBuf);

impl SmallDisk {
    /// Seen by this thread and those that it starts. None where one may not mount.
    fn mount(at: &Path) -> Option<Self> {
        fs::create_dir(at).unwrap();
        unshare(CloneFlags::CLONE_NEWNS).ok()?;
        mount(None::<&str>, "/", None::<&str>, MsFlags::MS_REC | MsFlags::MS_PRIVATE, None::<&str>).ok()?;
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=64k")).ok()?;
        Some(Self(at.to_owned()))
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _ = umount2(&self.0, MntFlags::MNT_DETACH);
    }
}

#[tokio::test]
async fn a_full_disk_means_no_certificate_until_there_is_room_again() {
    let mut bed = Bed::files("");
    let disk = SmallDisk::mount(&bed.path("state"));
    bed.run().await;
    assert!(bed.ask(TOKEN_A, WEB).await.is_ok());
    assert_eq!(bed.status("/readyz").await.0, 200);
    let lines = bed.ledger().len();
    let ledger = bed.path("state/ledger.jsonl");
    if disk.is_some() {
        // To the last byte: the file's own page has room for some more lines.
        let error = fs::write(bed.path("state/filler"), vec![0; 1 << 20]).unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::StorageFull);
        until("no room", async || bed.ask(TOKEN_A, WEB).await.is_err()).await;
    } else {
        println!("no file system may be mounted here: /dev/full stands for the full disk");
        fs::rename(&ledger, bed.path("state/ledger.jsonl.1")).unwrap();
        symlink("/dev/full", &ledger).unwrap();
    }
    for _ in 0..3 {
        refused(bed.ask(TOKEN_A, WEB).await, Code::Unavailable, "cannot write down which certificates it issues");
    }
    assert_eq!(bed.status("/readyz").await.0, 503);
    if disk.is_some() {
        // Nothing half is left, and no line without its certificate.
        let issued = bed.ledger().iter().filter(|line| line["outcome"] == "issued").count();
        let text = bed.status("/metrics").await.1;
        assert!(
            text.contains(&format!("marline_ca_requests_total{{outcome=\"issued\"}} {issued}")),
            "{issued}: {text}"
        );
        fs::remove_file(bed.path("state/filler")).unwrap();
        let size = fs::metadata(&ledger).unwrap().len();
        assert_eq!(bed.status("/readyz").await.0, 200, "room is found without anybody asking for a certificate");
        assert_eq!(fs::metadata(&ledger).unwrap().len(), size);
    } else {
        fs::remove_file(&ledger).unwrap();
        fs::rename(bed.path("state/ledger.jsonl.1"), &ledger).unwrap();
    }
    assert!(bed.ask(TOKEN_A, WEB).await.is_ok(), "with room it goes on");
    assert_eq!(bed.status("/readyz").await.0, 200);
    assert!(bed.ledger().len() > lines);
    bed.running.take().unwrap().stop().await.unwrap();
}

#[tokio::test]
async fn a_ledger_that_was_moved_away_is_followed_by_a_new_one() {
    let bed = Bed::start("").await;
    bed.ask(TOKEN_A, WEB).await.unwrap();
    fs::rename(bed.path("state/ledger.jsonl"), bed.path("state/ledger.jsonl.1")).unwrap();
    bed.ask(TOKEN_A, DB).await.unwrap();
    let lines = bed.ledger();
    assert_eq!((lines.len(), &lines[0]["identity"]), (1, &DB.into()));
}

#[tokio::test]
async fn half_a_line_that_a_dead_machine_left_spoils_no_other() {
    let mut bed = Bed::files("");
    fs::create_dir(bed.path("state")).unwrap();
    fs::write(bed.path("state/ledger.jsonl"), "{\"time\":\"2026-01-01T").unwrap();
    bed.run().await;
    bed.ask(TOKEN_A, WEB).await.unwrap();
    let text = fs::read_to_string(bed.path("state/ledger.jsonl")).unwrap();
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 2);
    assert!(serde_json::from_str::<Entry>(lines[1]).unwrap().issued());
}

#[tokio::test]
async fn whoever_is_refused_over_and_over_does_not_fill_the_disk_and_is_counted() {
    let dir = tempfile::tempdir().unwrap();
    let ledger = Ledger::open(dir.path()).unwrap();
    const ASKED: usize = 3000;
    for _ in 0..ASKED {
        let mut entry = Entry::default();
        entry.refuse("unauthenticated", "no");
        ledger.note(entry).await.unwrap();
    }
    let read = || {
        let text = fs::read_to_string(dir.path().join("ledger.jsonl")).unwrap();
        text.lines().map(|line| serde_json::from_str::<Entry>(line).unwrap()).collect::<Vec<_>>()
    };
    let noted = read().len();
    assert!((1000..ASKED).contains(&noted), "{noted}");
    // Certificates have no such bound.
    let issued = Entry { outcome: "issued".into(), node: Some("a".into()), ..Entry::default() };
    ledger.note(issued.clone()).await.unwrap();
    assert_eq!(read().pop().unwrap(), issued);
    // What is left out stands in the next line of a refusal that is not.
    until("a line again", async || {
        let mut entry = Entry::default();
        entry.refuse("unauthenticated", "no");
        ledger.note(entry).await.unwrap();
        read().pop().unwrap().unrecorded.is_some()
    })
    .await;
    let lines = read();
    let total: u64 =
        lines.iter().filter(|line| !line.issued()).map(|line| 1 + line.unrecorded.unwrap_or_default()).sum();
    assert!(total >= ASKED as u64, "{total}");
}
