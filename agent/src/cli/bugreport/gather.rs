//! What goes into a bug report, as it is found: redacting is left to who writes it down. What is not there is said, and no reason to stop.

use std::{
    fs::{self, File},
    io::{Read as _, Seek as _, SeekFrom},
    path::{Path, PathBuf},
};

use super::{
    super::{client::Client, status},
    Piece,
};
use crate::{app, config, words::with_causes};

/// What an agent may answer; those that this one does not know are left out.
const ADMIN: [&str; 11] = [
    "/status",
    "/pods",
    "/workloads",
    "/connections",
    "/connections/ended",
    "/certs",
    "/policies",
    "/config_dump",
    "/logging",
    "/services",
    "/debug/runtime",
];
/// Of a log, its end; of a configuration file, as much as its beginning.
const LARGEST: u64 = 1 << 20;
/// Of all configuration files together.
const LARGEST_ALL: u64 = 32 << 20;

#[derive(Default)]
pub(super) struct Gathered {
    pub(super) agent: bool,
    pub(super) pieces: Vec<Piece>,
    pub(super) missing: Vec<String>,
}

pub(super) fn all(client: &Client, config: Option<&Path>, logs: &[PathBuf]) -> Gathered {
    let mut gathered = Gathered::default();
    let report = status::report(client, config);
    gathered.agent = report.agent;
    gathered.piece("status.json", serde_json::json!(report).to_string());
    if gathered.agent {
        gathered.answers(client, report.status.as_ref());
    } else {
        gathered.missing.push(format!("the agent's answers: none answers at {}", client.address()));
    }
    gathered.kernel();
    let told = report.status.map(|status| status.configuration.directory);
    match config.map(Path::to_path_buf).or(told) {
        Some(directory) => gathered.configuration(&directory),
        None => {
            gathered.missing.push("the configuration: no agent tells where it is, and --config does not either".into())
        }
    }
    for log in logs {
        gathered.log(log);
    }
    if logs.is_empty() {
        gathered.missing.push("the agent's log: --log-file FILE adds it".into());
    }
    gathered
}

impl Gathered {
    fn piece(&mut self, name: impl Into<String>, text: String) {
        self.pieces.push(Piece { name: name.into(), text });
    }

    fn answers(&mut self, client: &Client, status: Option<&crate::admin::status::Status>) {
        for path in ADMIN {
            match client.get(path) {
                Ok((code, text)) if code.is_success() => {
                    self.piece(format!("admin{}.json", path.replace("/connections/ended", "/connections-ended")), text);
                }
                Ok(_) => {}
                Err(error) => self.missing.push(format!("{path}: {error}")),
            }
        }
        let Some(status) = status else { return };
        for (name, address, path) in [
            ("metrics.txt", status.listeners.metrics, "/metrics"),
            ("readyz.txt", status.listeners.readiness, "/readyz"),
        ] {
            let mut address = address;
            if address.ip().is_unspecified() {
                address.set_ip(client.address().ip());
            }
            match client.get_at(address, path) {
                Ok((_, text)) => self.piece(name, text),
                Err(error) => self.missing.push(format!("{name}: {error}")),
            }
        }
    }

    fn kernel(&mut self) {
        let tried = match app::kernel_alone() {
            Ok(found) => {
                let suites: Vec<_> = found.suites.iter().map(|suite| format!("{suite:?}")).collect();
                serde_json::json!({ "kernel_tls": suites, "pump": found.pump, "why": found.why })
            }
            Err(error) => serde_json::json!({ "error": with_causes(&error) }),
        };
        let version = fs::read_to_string("/proc/version").unwrap_or_default();
        let facts = serde_json::json!({
            "marline": env!("CARGO_PKG_VERSION"),
            "version": version.trim(),
            "tried": tried,
            "btf": Path::new("/sys/kernel/btf/vmlinux").exists(),
        });
        self.piece("kernel.json", facts.to_string());
        for (name, path) in [("os-release.txt", "/etc/os-release"), ("mounts.txt", "/proc/self/mounts")] {
            match fs::read_to_string(path) {
                Ok(text) => self.piece(name, text),
                Err(error) => self.missing.push(format!("{path}: {error}")),
            }
        }
    }

    /// The files that the agent reads, and the names of the others: there may be keys among them.
    fn configuration(&mut self, directory: &Path) {
        let files = match config::configuration_files(directory) {
            Ok(files) => files,
            Err(error) => return self.missing.push(format!("{}: {error}", directory.display())),
        };
        let mut room = LARGEST_ALL;
        for file in &files {
            let name = file.file_name().unwrap_or_default().to_string_lossy().into_owned();
            match beginning(file, LARGEST.min(room)) {
                Ok(text) => {
                    room = room.saturating_sub(text.len() as u64);
                    self.piece(format!("config/{name}"), text);
                }
                Err(error) => self.missing.push(format!("{}: {error}", file.display())),
            }
        }
        let listed: String = fs::read_dir(directory)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| {
                let size = entry.metadata().map(|metadata| metadata.len()).unwrap_or_default();
                format!("{size:>10} {}\n", entry.file_name().to_string_lossy())
            })
            .collect();
        self.piece("config-files.txt", listed);
        if let Ok(loaded) = config::load(directory)
            && let Some(path) = &loaded.agent.access_log.path
        {
            self.log(path);
        }
    }

    fn log(&mut self, path: &Path) {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        match end(path) {
            Ok(text) => self.piece(format!("logs/{name}"), text),
            Err(error) => self.missing.push(format!("{}: {error}", path.display())),
        }
    }
}

fn beginning(path: &Path, most: u64) -> std::io::Result<String> {
    let mut bytes = Vec::new();
    File::open(path)?.take(most).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Its last lines. The first of them may be the end of a key of which the beginning is not there: so a part of a line, and all up to
/// the end of a PEM block that has no beginning, is left out.
fn end(path: &Path) -> std::io::Result<String> {
    let mut file = File::open(path)?;
    let cut = file.metadata()?.len().saturating_sub(LARGEST);
    file.seek(SeekFrom::Start(cut))?;
    let mut bytes = Vec::new();
    file.take(LARGEST).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes).into_owned();
    if cut == 0 {
        return Ok(text);
    }
    let whole = text.split_once('\n').map(|(_, rest)| rest).unwrap_or_default();
    let (begin, end) = (whole.find("-----BEGIN "), whole.find("-----END "));
    let rest = match (begin, end) {
        (begin, Some(end)) if begin.is_none_or(|begin| end < begin) => {
            whole.get(end..).and_then(|rest| rest.split_once('\n')).map(|(_, rest)| rest).unwrap_or_default()
        }
        _ => whole,
    };
    Ok(rest.to_owned())
}
