//! What an agent was told of pods, on the disk, one file for each: an agent that is started anew knows from it where its predecessor's pods are
//! before it lets any go. Nothing else can tell it: the kernel's pins know namespaces and no pods, and a sandbox may have no process to be
//! found by. Written before a pod is captured and removed when its namespace is gone; of another boot, or of a namespace that was
//! replaced, it counts for nothing. Not synced: after a crash of the machine none is true anyway.

use std::{
    fs, io,
    net::IpAddr,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::CniError;

const BOOT: &str = "/proc/sys/kernel/random/boot_id";

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Record {
    pub uid: String,
    pub network: String,
    pub container: String,
    pub netns: PathBuf,
    /// The kernel's name for the namespace, which no other gets before the next boot.
    pub cookie: u64,
    pub addresses: Vec<IpAddr>,
    /// It has run uncaptured.
    pub late: bool,
}

#[derive(Serialize, Deserialize)]
struct Written {
    boot: String,
    #[serde(flatten)]
    record: Record,
}

/// The directory of them.
#[derive(Clone, Debug)]
pub struct Records {
    directory: PathBuf,
    boot: String,
}

impl Records {
    pub fn open(directory: &Path) -> Result<Self, CniError> {
        fs::create_dir_all(directory).map_err(CniError::path("cannot make", directory))?;
        let boot = fs::read_to_string(BOOT).map_err(CniError::path("cannot read", BOOT))?;
        Ok(Self { directory: directory.to_owned(), boot: boot.trim().to_owned() })
    }

    /// All that are of this boot. What is none is removed and told: its pod is found by its processes.
    pub fn all(&self) -> Result<Vec<Record>, CniError> {
        let mut found = Vec::new();
        let entries = fs::read_dir(&self.directory).map_err(CniError::path("cannot list", &self.directory))?;
        for entry in entries {
            let path = entry.map_err(CniError::path("cannot list", &self.directory))?.path();
            // Others may have files there.
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            let text = fs::read(&path).map_err(CniError::path("cannot read", &path))?;
            match self.read(&path, &text) {
                Ok(record) => found.push(record),
                Err(why) => {
                    tracing::info!(path = %path.display(), "a record of a pod counts for nothing: {why}");
                    let _ = fs::remove_file(&path);
                }
            }
        }
        Ok(found)
    }

    fn read(&self, path: &Path, text: &[u8]) -> Result<Record, String> {
        let written: Written = serde_json::from_slice(text).map_err(|error| error.to_string())?;
        if written.boot != self.boot {
            return Err("it is of another boot of this node".into());
        }
        if path.file_name() != Some(name(&written.record.uid).as_ref()) {
            return Err("it has another pod's name".into());
        }
        Ok(written.record)
    }

    /// As a whole or not at all.
    pub fn write(&self, record: &Record) -> Result<(), CniError> {
        if !is_uid(&record.uid) {
            let source = io::Error::new(io::ErrorKind::InvalidInput, "it is no UID");
            return Err(CniError::Path { what: "cannot write", path: self.directory.join("?"), source });
        }
        let path = self.directory.join(name(&record.uid));
        let fresh = path.with_extension("new");
        let written = Written { boot: self.boot.clone(), record: record.clone() };
        let text = serde_json::json!(written).to_string();
        let put = fs::write(&fresh, text).and_then(|()| fs::rename(&fresh, &path));
        put.map_err(CniError::path("cannot write", path))
    }

    pub fn remove(&self, uid: &str) -> Result<(), CniError> {
        if !is_uid(uid) {
            return Ok(());
        }
        let path = self.directory.join(name(uid));
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(CniError::path("cannot remove", path)(error)),
            _ => Ok(()),
        }
    }
}

/// Letters that make no path.
pub fn is_uid(text: &str) -> bool {
    (1..=128).contains(&text.len()) && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '-')
}

fn name(uid: &str) -> String {
    format!("{uid}.json")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(uid: &str) -> Record {
        Record {
            uid: uid.into(),
            network: "pods".into(),
            container: "c1".into(),
            netns: "/run/netns/cni-1".into(),
            cookie: 7,
            addresses: vec!["10.0.0.1".parse().unwrap()],
            late: false,
        }
    }

    #[test]
    fn what_is_written_is_there_until_it_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(&dir.path().join("pods")).unwrap();
        records.write(&record("a-1")).unwrap();
        records.write(&Record { late: true, ..record("a-1") }).unwrap();
        records.write(&record("b-2")).unwrap();
        records.remove("b-2").unwrap();
        records.remove("b-2").unwrap();
        assert_eq!(records.all().unwrap(), [Record { late: true, ..record("a-1") }]);
    }

    #[test]
    fn another_boots_another_pods_and_broken_records_count_for_nothing_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path()).unwrap();
        Records { boot: "before".into(), ..records.clone() }.write(&record("old")).unwrap();
        records.write(&record("a-1")).unwrap();
        fs::rename(dir.path().join("a-1.json"), dir.path().join("b-2.json")).unwrap();
        fs::write(dir.path().join("c-3.json"), "{\"uid\": \"c-").unwrap();
        fs::write(dir.path().join("keeper.sock"), "another's").unwrap();
        assert_eq!(records.all().unwrap(), []);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        fs::create_dir(dir.path().join("d-4.json")).unwrap();
        assert!(records.all().is_err(), "what cannot be read may be a pod's");
    }

    #[test]
    fn no_uid_leads_out_of_the_directory() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(&dir.path().join("pods")).unwrap();
        for uid in ["../x", "", "a/b", "a.b"] {
            assert!(records.write(&record(uid)).is_err(), "{uid}");
            records.remove(uid).unwrap();
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }
}
