//! nginx with files to serve, and curl to fetch them: several requests over one connection, and a file by checksum.

use std::{
    fs,
    net::IpAddr,
    ops::Deref,
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

/// How nginx waits for connections and what it speaks.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub workers: u8,
    /// A listener for each worker, not one for all.
    pub reuseport: bool,
    /// HTTP/2 in clear text, from the first byte on.
    pub http2: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self { workers: 1, reuseport: false, http2: false }
    }
}

pub struct Nginx {
    pub process: Process,
    site: Site,
}

/// What nginx serves, and the clients that fetch it: from its own port, or from one where something passes on to it.
#[derive(Clone, Debug)]
pub struct Site {
    port: u16,
    root: PathBuf,
    marker: String,
    http2: bool,
}

impl Nginx {
    /// Starts nginx on port 80 of both families, with a small page that holds the marker.
    pub fn start(pod: &Pod, marker: &str) -> Result<Self> {
        Self::start_on(pod, 80, marker)
    }

    /// The same on another port: several may run in one pod.
    pub fn start_on(pod: &Pod, port: u16, marker: &str) -> Result<Self> {
        Self::start_with(pod, port, marker, Options::default())
    }

    pub fn start_with(pod: &Pod, port: u16, marker: &str, options: Options) -> Result<Self> {
        let name = format!("nginx-{port}");
        let base = pod.directory.join(&name);
        let root = base.join("www");
        fs::create_dir_all(&root).with_context(|| format!("making {}", root.display()))?;
        let config = base.join("nginx.conf");
        let text = configuration(&base, &root, port, options);
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        fs::write(root.join("index.html"), page(marker)).context("writing a page")?;
        let mut command = pod.command("nginx");
        command.arg("-e").arg("stderr").arg("-p").arg(&base).arg("-c").arg(&config);
        let process = pod.serve(&name, &mut command, port)?;
        Ok(Self { process, site: Site { port, root, marker: marker.to_owned(), http2: options.http2 } })
    }
}

impl Deref for Nginx {
    type Target = Site;

    fn deref(&self) -> &Site {
        &self.site
    }
}

impl Site {
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
        arguments.extend(self.prior_knowledge());
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
        let mut arguments = vec!["-sS", "--fail", "-H", &header, &url];
        arguments.extend(self.prior_knowledge());
        let received = client.succeed("curl", &arguments, seconds(60))?;
        Ok(Seen { port: self.port, exact: received == page(&self.marker), note: "one request".into() })
    }

    /// One file, its checksum compared with that of the file on disk.
    pub fn fetch(&self, client: &Pod, address: IpAddr, name: &str) -> Result<Seen> {
        let url = format!("http://{}:{}/{name}", in_url(address), self.port);
        let file = self.root.join(name);
        let size = fs::metadata(&file).with_context(|| format!("{}", file.display()))?.len();
        let script = r#"set -o pipefail; curl -sS --fail "$@" "$0" | sha256sum"#;
        let mut arguments = vec!["-c", script, &url];
        arguments.extend(self.prior_knowledge());
        let received = client.succeed("bash", &arguments, seconds(300))?;
        let sent = sha256(&file)?;
        let exact = first_word(&received) == first_word(&sent);
        Ok(Seen { port: self.port, exact, note: format!("{size} bytes, sha256 {:.12}", first_word(&received)) })
    }

    /// So many curls at the same time, each with a connection of its own, and all get the page.
    pub fn many_curls(&self, client: &Pod, address: IpAddr, count: usize) -> Result<Seen> {
        let url = format!("http://{}:{}/", in_url(address), self.port);
        let script = r#"for one in $(seq "$1"); do curl -sS --fail "${@:2}" "$0" & pids="$pids $!"; done
            for pid in $pids; do wait "$pid" || exit; done"#;
        let number = count.to_string();
        let mut arguments = vec!["-c", script, &url, &number];
        arguments.extend(self.prior_knowledge());
        let received = client.succeed("bash", &arguments, seconds(60))?;
        // Each writes its page at once, so that lines of different curls do not mix.
        let exact = received == page(&self.marker).repeat(count);
        Ok(Seen { port: self.port, exact, note: format!("{count} curls, {} bytes", received.len()) })
    }

    /// wrk with so many connections for a second; it compares each body with the page.
    pub fn wrk(&self, client: &Pod, address: IpAddr, connections: usize, script: &Path) -> Result<Seen> {
        let url = format!("http://{}:{}/", in_url(address), self.port);
        let (script, body) = (script.to_string_lossy(), self.root.join("index.html"));
        let number = connections.to_string();
        let arguments = ["-t2", "-c", &number, "-d1s", "-s", &script, &url, "--", &body.to_string_lossy()];
        let said = client.succeed("wrk", &arguments, seconds(60))?;
        let note = said.lines().find(|line| line.starts_with("bodies:")).context("wrk did not say what it got")?;
        let exact = note.ends_with(", 0 wrong") && !note.starts_with("bodies: 0 ") && !said.contains("errors");
        ensure!(exact, "wrk said: {said}");
        Ok(Seen { port: self.port, exact, note: note.to_owned() })
    }

    /// h2load with four connections and ten streams at a time on each; it counts what it gets.
    pub fn streams(&self, client: &Pod, address: IpAddr, requests: usize) -> Result<Seen> {
        let url = format!("http://{}:{}/", in_url(address), self.port);
        let said = client.succeed("h2load", &["-n", &requests.to_string(), "-c4", "-m10", &url], seconds(60))?;
        let (good, bytes) = (format!("status codes: {requests} 2xx"), requests * page(&self.marker).len());
        let traffic = said.lines().find(|line| line.starts_with("traffic:")).unwrap_or_default();
        let exact = said.contains(&good) && traffic.ends_with(&format!("({bytes}) data"));
        ensure!(exact, "{bytes} bytes are wanted; h2load said: {said}");
        Ok(Seen { port: self.port, exact, note: traffic.to_owned() })
    }

    /// The same, fetched from another port.
    #[must_use]
    pub fn behind(&self, port: u16) -> Self {
        Self { port, ..self.clone() }
    }

    fn prior_knowledge(&self) -> Option<&'static str> {
        self.http2.then_some("--http2-prior-knowledge")
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

fn configuration(base: &Path, root: &Path, port: u16, options: Options) -> String {
    let reuseport = if options.reuseport { " reuseport" } else { "" };
    let http2 = if options.http2 { " http2" } else { "" };
    let temporary = ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"]
        .map(|kind| format!("  {kind}_temp_path {}/{kind};\n", base.display()))
        .concat();
    format!(
        "user root;\ndaemon off;\nworker_processes {workers};\npid {base}/nginx.pid;\nerror_log stderr;\n\
         events {{ worker_connections 8192; }}\nhttp {{\n{temporary}  access_log off;\n  sendfile on;\n  \
         keepalive_requests 100000;\n  server {{\n    listen {port} backlog=4096{reuseport}{http2};\n    \
         listen [::]:{port} backlog=4096{reuseport}{http2};\n    root {root};\n  }}\n}}\n",
        workers = options.workers,
        base = base.display(),
        root = root.display(),
    )
}
