//! A protocol in which the server speaks first: sshd, its banner (with the marker in it) read by bash, which says nothing,
//! and its host key fetched by ssh-keyscan, which speaks the protocol.

use std::{fs, net::IpAddr, path::PathBuf, process::Command};

use anyhow::{Context, Result};

use super::Seen;
use crate::{
    cluster::Pod,
    process::{Process, succeed},
    wait::seconds,
};

const PORT: u16 = 22;

pub struct Ssh {
    pub process: Process,
    key: PathBuf,
    marker: String,
}

impl Ssh {
    /// Starts sshd with a key of its own.
    pub fn start(pod: &Pod, marker: &str) -> Result<Self> {
        // sshd's own privilege separation directory, which Debian's service makes.
        fs::create_dir_all("/run/sshd").context("making /run/sshd")?;
        let key = pod.directory.join("ssh_host_ed25519_key");
        succeed(Command::new("ssh-keygen").args(["-q", "-t", "ed25519", "-N", "", "-f"]).arg(&key), seconds(20))?;
        let config = pod.directory.join("sshd_config");
        let text =
            format!("Port {PORT}\nHostKey {}\nPidFile none\nUsePAM no\nVersionAddendum {marker}\n", key.display());
        fs::write(&config, text).with_context(|| format!("writing {}", config.display()))?;
        let mut command = pod.command("/usr/sbin/sshd");
        command.args(["-D", "-e", "-f"]).arg(&config);
        Ok(Self { process: pod.serve("sshd", &mut command, PORT)?, key, marker: marker.to_owned() })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        PORT
    }

    /// Connects, says nothing and reads the server's first line.
    pub fn banner(&self, client: &Pod, address: IpAddr) -> Result<Seen> {
        let line = client.succeed(
            "bash",
            &[
                "-c",
                r#"exec 3<>"/dev/tcp/$0/22" && IFS= read -r -t 60 line <&3 && printf '%s\n' "$line""#,
                &address.to_string(),
            ],
            seconds(60),
        )?;
        let line = line.trim_end();
        let exact = line.starts_with("SSH-2.0-") && line.ends_with(&self.marker);
        Ok(Seen { port: PORT, exact, note: line.replace(&self.marker, "…") })
    }

    /// The key exchange of the real protocol: the key that arrives is the one on disk.
    pub fn host_key(&self, client: &Pod, address: IpAddr) -> Result<Seen> {
        let arguments = ["-t", "ed25519", "-T", "60", &address.to_string()];
        let found = client.succeed("ssh-keyscan", &arguments, seconds(60))?;
        let public = fs::read_to_string(self.key.with_extension("pub")).context("reading the public key")?;
        let body = |text: &str, at: usize| text.split_whitespace().nth(at).map(str::to_owned);
        let exact = body(&found, 2).is_some() && body(&found, 2) == body(&public, 1);
        Ok(Seen { port: PORT, exact, note: "ed25519 host key".into() })
    }
}
