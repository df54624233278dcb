//! nginx with files to serve, and curl to fetch them: several requests over one connection, and a file by checksum.

use std::{
    fs,
    net::IpAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, ensure};

use super::{Seen, in_url, write_marked};
use crate::{
    cluster::Pod,
    process::{Process, succeed},
    wait::seconds,
};

/// The requests of `keep_alive`.
const REQUESTS: usize = 5;

pub struct Nginx {
    pub process: Process,
    port: u16,
    root: PathBuf,
    marker: String,
}

impl Nginx {
    /// Starts nginx on port 80 of both families, with a small page that holds the marker.
    pub fn start(pod: &Pod, marker: &str) -> Result<Self> {
        Self::start_on(pod, 80, marker)
    }

    /// The same on another port: several may run in one pod.
    pub fn start_on(pod: &Pod, port: u16, marker: &str) -> Result<Self> {
        let name = format!("nginx-{port}");
        let base = pod.directory.join(&name);
        let root = base.join("www");
        fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
        let config = base.join("nginx.conf");
        let text = configuration(&base, &root, port);
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        fs::write(root.join("index.html"), page(marker)).context("writing a page")?;
        let mut command = pod.command("nginx");
        command.arg("-e").arg("stderr").arg("-p").arg(&base).arg("-c").arg(&config);
        let process = pod.serve(&name, &mut command, port)?;
        Ok(Self { process, port, root, marker: marker.to_owned() })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Adds a file to serve, marked all over.
    pub fn add_file(&self, name: &str, size: u64) -> Result<()> {
        write_marked(&self.root.join(name), &self.marker, size)
    }

    /// Several requests over one connection, each answered with the page.
    pub fn keep_alive(&self, client: &Pod, address: IpAddr) -> Result<Seen> {
        let url = format!("http://{}:{}/", in_url(address), self.port);
        let header = format!("X-Marker: {}", self.marker);
        let mut arguments = vec!["-sS", "--fail", "-H", &header, "-w", "%{stderr}%{num_connects}\n"];
        arguments.extend(std::iter::repeat_n(url.as_str(), REQUESTS));
        let output = client.output("curl", &arguments, seconds(60))?;
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "curl {url} ended with {}: {}", output.status, errors.trim());
        let connects: u32 = errors.lines().filter_map(|line| line.trim().parse::<u32>().ok()).sum();
        ensure!(connects == 1, "{REQUESTS} requests took {connects} connections: {}", errors.trim());
        let exact = output.stdout == page(&self.marker).repeat(REQUESTS).as_bytes();
        Ok(Seen { port: self.port, exact, note: format!("{REQUESTS} requests, one connection") })
    }

    /// One request for the page.
    pub fn page(&self, client: &Pod, address: IpAddr) -> Result<Seen> {
        let url = format!("http://{}:{}/", in_url(address), self.port);
        let header = format!("X-Marker: {}", self.marker);
        let received = client.succeed("curl", &["-sS", "--fail", "-H", &header, &url], seconds(60))?;
        Ok(Seen { port: self.port, exact: received == page(&self.marker), note: "one request".into() })
    }

    /// One file, its checksum compared with that of the file on disk.
    pub fn fetch(&self, client: &Pod, address: IpAddr, name: &str) -> Result<Seen> {
        let url = format!("http://{}:{}/{name}", in_url(address), self.port);
        let file = self.root.join(name);
        let size = fs::metadata(&file).with_context(|| format!("{}", file.display()))?.len();
        let script = r#"set -o pipefail; curl -sS --fail "$0" | sha256sum"#;
        let received = client.succeed("bash", &["-c", script, &url], seconds(300))?;
        let sent = sha256(&file)?;
        let exact = first_word(&received) == first_word(&sent);
        Ok(Seen { port: self.port, exact, note: format!("{size} bytes, sha256 {:.12}", first_word(&received)) })
    }
}

fn sha256(file: &Path) -> Result<String> {
    succeed(Command::new("sha256sum").arg(file), seconds(120))
}

fn first_word(text: &str) -> &str {
    text.split_whitespace().next().unwrap_or_default()
}

fn page(marker: &str) -> String {
    format!("<!doctype html><title>mesh</title><p>{marker}</p>\n").repeat(20)
}

fn configuration(base: &Path, root: &Path, port: u16) -> String {
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("  {kind}_temp_path {}/{kind};\n", base.display()))
        .concat();
    format!(
        "user root;\ndaemon off;\nworker_processes 1;\npid {base}/nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 8192; }}\nhttp {{\n{temporary}  access_log off;\n  sendfile on;\n  \
         keepalive_requests 100000;\n  server {{\n    listen {port} backlog=4096;\n    listen [::]:{port} backlog=4096;\n    \
         root {root};\n  }}\n}}\n",
        base = base.display(),
        root = root.display(),
    )
}
