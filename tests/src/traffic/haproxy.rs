//! HAProxy, which accepts from clients and connects to a server for them: once as bytes, once as HTTP.

use std::{fs, net::SocketAddr};

use anyhow::{Context, Result};

use crate::{cluster::Pod, process::Process};

pub struct Haproxy {
    pub process: Process,
}

impl Haproxy {
    /// The port whose bytes are passed on as they are.
    pub const TCP: u16 = 8080;
    /// The port whose requests are passed on, each over a connection of its own.
    pub const HTTP: u16 = 8081;

    /// Starts it in front of a server.
    pub fn start(pod: &Pod, server: SocketAddr) -> Result<Self> {
        let file = pod.directory.join("haproxy.cfg");
        let text = format!(
            "global\n  log stderr format raw local0\n  nbthread 2\ndefaults\n  timeout connect 60s\n  timeout client 60s\n  \
             timeout server 60s\n  option redispatch\nlisten bytes\n  bind :::{tcp} v4v6\n  mode tcp\n  option splice-auto\n  \
             server web {server}\nlisten requests\n  bind :::{http} v4v6\n  mode http\n  option http-server-close\n  \
             http-reuse never\n  server web {server}\n",
            tcp = Self::TCP,
            http = Self::HTTP,
        );
        fs::write(&file, text).with_context(|| format!("writing {}", file.display()))?;
        let mut command = pod.command("haproxy");
        let mut process = pod.serve("haproxy", command.args(["-db", "-f"]).arg(&file), Self::TCP)?;
        process.listens(&pod.place.netns, Self::HTTP)?;
        Ok(Self { process })
    }
}
