//! A proxy that somebody else brings, as a command: it is run once for the client's pod and once for the server's, is told by its environment
//! whose proxy it is, and redirects the pod's connections by itself. Certificates are made for it; that nothing but TLS leaves the
//! nodes is seen on the wire, since nobody knows its own counts. What is in its environment is told by `cargo xtask bench --help`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};

use crate::{
    capture::{LinkCapture, Wire},
    certificates::Signer,
    cgroup,
    cluster::{Cluster, Family, Pod, Side},
    process::{Place, Process},
    sidecar::Roles,
    wait::{Look, seconds, wait_for},
};

/// Both ends of it. They are killed when this is dropped.
pub struct Pair {
    name: String,
    ends: Vec<End>,
}

struct End {
    side: Side,
    cgroup: PathBuf,
    process: Process,
}

impl Pair {
    /// Starts the command (by `sh -c`) for both pods, and waits until both are ready.
    pub fn start(name: &str, command: &str, cluster: &Cluster, roles: &Roles) -> Result<Self> {
        let signer = Signer::create(&cluster.directory().join("external-ca"))?;
        let (client, server) = (&roles.client, &roles.server);
        let mut pair = Self { name: name.to_owned(), ends: Vec::new() };
        for (role, own, peer) in [("server", server, client), ("client", client, server)] {
            let end = End::start(name, command, cluster, (role, own, peer, roles.port), &signer);
            pair.ends.push(end.with_context(|| format!("the command of {name} for the {role}'s pod: {command}"))?);
        }
        Ok(pair)
    }

    /// What each end runs in, alone. A proxy that goes elsewhere by itself is not seen there.
    #[must_use]
    pub fn cgroups(&self) -> Vec<(Side, PathBuf)> {
        self.ends.iter().map(|end| (end.side, end.cgroup.clone())).collect()
    }

    /// Has `traffic` go from pod to pod, and looks on the wire between the nodes meanwhile: how many connections were TLS 1.3. That anything was
    /// readable, or nothing came, is an error, and so is that one of the commands has ended.
    pub fn probe(&mut self, cluster: &Cluster, traffic: impl FnOnce() -> Result<()>) -> Result<usize> {
        let mut capture = LinkCapture::start(cluster, &[])?;
        let outcome = traffic().with_context(|| self.report());
        for end in &mut self.ends {
            if let Some(status) = end.process.ended()? {
                bail!("{} has ended ({status}):\n{}", end.process.name(), end.process.log());
            }
        }
        outcome?;
        let wire = capture.wire()?;
        encrypted(&wire)
            .with_context(|| format!("the mode of {} is not what it should be\n{}", self.name, self.report()))
    }

    /// What a reader of a failure wants to see.
    #[must_use]
    pub fn report(&self) -> String {
        self.ends.iter().map(|end| format!("log of {}:\n{}\n", end.process.name(), end.process.log())).collect()
    }
}

fn encrypted(wire: &Wire) -> Result<usize> {
    ensure!(wire.holes().next().is_none(), "frames were missed, so nothing is proven: {:?}", wire.streams);
    ensure!(wire.not_tls() == 0, "bytes that are no TLS went between the nodes: {:?}", wire.streams);
    let handshakes = wire.tls13_handshakes();
    ensure!(handshakes > 0, "there was no handshake of TLS 1.3 between the nodes: {:?}", wire.streams);
    Ok(handshakes)
}

impl End {
    fn start(
        name: &str,
        command: &str,
        cluster: &Cluster,
        (role, own, peer, port): (&str, &Pod, &Pod, u16),
        signer: &Signer,
    ) -> Result<Self> {
        let directory = own.directory.join("external");
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let files = signer.issue(&own.directory, "external", &own.identity())?;
        let node = cluster.node(own.side);
        let cgroup = node.cgroup.join(format!("external-{}", own.name));
        cgroup::create(&cgroup)?;
        let place = Place { netns: own.place.netns.clone(), cgroup: cgroup.clone(), filter: None };
        let (ready, log) = (directory.join("ready"), own.directory.join("external.log"));
        for old in [&ready, &log] {
            // What a predecessor has left must not be taken for this one's.
            if old.exists() {
                fs::remove_file(old).with_context(|| format!("removing {}", old.display()))?;
            }
        }
        let mut shell = place.command("sh");
        shell.args(["-c", command]);
        shell.env("MARLINE_ROLE", role).env("MARLINE_PORT", port.to_string());
        shell.env("MARLINE_POD", &own.name).env("MARLINE_POD_ADDRESS", own.address(Family::V4).to_string());
        shell.env("MARLINE_POD_NETNS", &own.place.netns).env("MARLINE_NODE_NETNS", &node.netns);
        shell.env("MARLINE_PEER", &peer.name).env("MARLINE_PEER_ADDRESS", peer.address(Family::V4).to_string());
        shell.env("MARLINE_IDENTITY", own.identity()).env("MARLINE_PEER_IDENTITY", peer.identity());
        shell.env("MARLINE_CERT_CHAIN", &files.chain).env("MARLINE_KEY", &files.key).env("MARLINE_ROOTS", &files.roots);
        shell.env("MARLINE_DIRECTORY", &directory).env("MARLINE_READY", &ready);
        let mut process = Process::start(format!("{name} of the {role}"), &mut shell, &log)?;
        wait_ready(&mut process, &ready)?;
        Ok(Self { side: own.side, cgroup, process })
    }
}

fn wait_ready(process: &mut Process, ready: &Path) -> Result<()> {
    let log = |process: &Process| format!("its log:\n{}", process.log());
    let outcome = wait_for(format!("{} to make {}", process.name().to_owned(), ready.display()), seconds(30), || {
        if let Some(status) = process.ended()? {
            bail!("it ended ({status}) before it was ready");
        }
        Ok(if ready.exists() { Look::Done(()) } else { Look::NotYet("no such file".to_owned()) })
    });
    outcome.with_context(|| log(process))
}
