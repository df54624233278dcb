//! A mesh of sidecars: an Envoy in the network namespace of each of two pods, under Istio's user, to which nftables redirects all of the
//! pod's connections. What Marline is measured beside.
//!
//! Rules are `sidecar/redirect.rs`, Envoy's configuration `sidecar/configuration.rs`. Whether connections really took that way is judged in
//! `sidecar/count.rs`. The pods are the cluster's, without agents; the sidecars' cgroups are not the pods', so that their time is told apart.

mod configuration;
mod count;
mod redirect;

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context, Result};

pub use self::count::Carried;
use self::{
    configuration::Told,
    count::{Counts, End},
};
use crate::{
    certificates::Signer,
    cgroup,
    cluster::{Cluster, Family, Pod, Side},
    config::NAMESPACE,
    http, netns,
    process::{Place, Process},
    wait::{Look, wait_for},
};

/// Istio's own numbers: the user, and the ports.
const USER: u32 = 1337;
const OUTBOUND: u16 = 15001;
const INBOUND: u16 = 15006;
const ADMIN: u16 = 15000;
/// Worker threads: Istio's default for a sidecar without a limit on processors.
pub const WORKERS: u32 = 2;

/// What sidecars make of a service's connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layer {
    /// Bytes are passed on.
    Tcp,
    /// Requests are read, and go over connections that the sidecars keep.
    Http,
}

/// Who plays which part.
#[derive(Clone, Debug)]
pub struct Roles {
    pub client: Pod,
    pub server: Pod,
    /// Where the server's application listens.
    pub port: u16,
    /// The identity that the client's sidecar shows: its pod's, unless a test wants another.
    pub shown: String,
}

impl Roles {
    #[must_use]
    pub fn new(client: Pod, server: Pod, port: u16) -> Self {
        Self { shown: client.identity(), client, server, port }
    }
}

/// Both sidecars. They are killed when this is dropped; the rules go with the pods.
pub struct Pair {
    layer: Layer,
    client: Sidecar,
    server: Sidecar,
}

struct Sidecar {
    side: Side,
    place: Place,
    process: Process,
    /// The kernel's count of the pod's connections before there was a sidecar.
    before: u64,
    end: End,
}

impl Pair {
    /// Makes certificates, redirects both pods and starts their sidecars. `program` is Envoy's.
    pub fn start(program: &Path, cluster: &Cluster, layer: Layer, roles: &Roles) -> Result<Self> {
        let Roles { client, server, .. } = roles;
        let signer = Signer::create(&cluster.directory().join("sidecar-ca"))?;
        let host = format!("{}.{NAMESPACE}.svc.cluster.local", server.name);
        let service = server.socket(Family::V4, roles.port);
        let start = |pod: &Pod, shown: &str, peer: &str, end: End| -> Result<Sidecar> {
            let own = signer.issue(&pod.directory, "sidecar", shown)?;
            let told = Told { layer, own: &own, peer, service, host: &host };
            let text = match end {
                End::Client => configuration::client(&told),
                End::Server => configuration::server(&told),
            };
            let file = pod.directory.join("sidecar.json");
            fs::write(&file, serde_json::to_vec_pretty(&text)?)
                .with_context(|| format!("writing {}", file.display()))?;
            Sidecar::start(program, cluster, pod, &file, end)
        };
        let (sender, answerer) = (client.identity(), server.identity());
        Ok(Self {
            layer,
            server: start(server, &answerer, &sender, End::Server)?,
            client: start(client, &roles.shown, &answerer, End::Client)?,
        })
    }

    /// What each sidecar runs in, alone.
    #[must_use]
    pub fn cgroups(&self) -> [(Side, PathBuf); 2] {
        [&self.client, &self.server].map(|sidecar| (sidecar.side, sidecar.place.cgroup.clone()))
    }

    /// How all of the pods' connections so far were carried; an error if one of them went another way than through both sidecars with mTLS.
    /// A sidecar may still be busy with a connection whose client has gone: it is given so much time to have counted it.
    pub fn carried(&self, patience: Duration) -> Result<Carried> {
        let mut last = None;
        let outcome = wait_for("the sidecars to have counted all connections", patience, || {
            let (client, server) = (self.client.counts()?, self.server.counts()?);
            Ok(match count::judge(self.layer, &client, &server) {
                Ok(carried) => Look::Done(carried),
                Err(fault) => {
                    last = Some((client, server));
                    Look::NotYet(fault)
                }
            })
        });
        outcome.with_context(|| format!("the last counts were {last:?}\n{}", self.report()))
    }

    /// What a reader of a failure wants to see.
    #[must_use]
    pub fn report(&self) -> String {
        let of = |sidecar: &Sidecar| format!("log of {}:\n{}\n", sidecar.process.name(), sidecar.process.log());
        of(&self.client) + &of(&self.server)
    }

    /// Statistics of both, the client's first, whose names contain this.
    pub fn statistics(&self, name: &str) -> Result<[BTreeMap<String, u64>; 2]> {
        let of = |sidecar: &Sidecar| -> Result<BTreeMap<String, u64>> {
            Ok(sidecar.statistics()?.into_iter().filter(|(key, _)| key.contains(name)).collect())
        };
        Ok([of(&self.client)?, of(&self.server)?])
    }
}

impl Sidecar {
    fn start(program: &Path, cluster: &Cluster, pod: &Pod, file: &Path, end: End) -> Result<Self> {
        let netns = pod.place.netns.clone();
        let cgroup = cluster.node(pod.side).cgroup.join(format!("sidecar-{}", pod.name));
        cgroup::create(&cgroup)?;
        let place = Place { netns, cgroup, filter: None };
        redirect::redirect(&place, &pod.directory.join("sidecar.nft"))?;
        let before = kernel(&place, end)?;
        let mut command = place.command("sh");
        let user = USER.to_string();
        // As many connections as may be: in a container of Kubernetes that would be a million.
        command.args(["-c", "ulimit -n \"$(ulimit -Hn)\" && exec \"$@\"", "sh"]);
        command.args(["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"]);
        // The checkout and the cluster's files may be root's alone; this right lets it read them, and do nothing else.
        let rights = ["--inh-caps", "--ambient-caps", "--bounding-set"];
        command.args(rights.map(|kind| format!("{kind}=-all,+dac_read_search"))).arg("--").arg(program);
        command.args(["--disable-hot-restart", "--log-level", "warning", "--concurrency", &WORKERS.to_string()]);
        command.arg("-c").arg(file);
        let log = pod.directory.join("sidecar.log");
        let mut process = Process::start(format!("the sidecar of {}", pod.name), &mut command, &log)?;
        let port = match end {
            End::Client => OUTBOUND,
            End::Server => INBOUND,
        };
        process.listens(&place.netns, port)?;
        Ok(Self { side: pod.side, place, process, before, end })
    }

    fn counts(&self) -> Result<Counts> {
        // Its own question is a connection, too, and is counted before it is answered.
        let statistics = self.statistics()?;
        let kernel = kernel(&self.place, self.end)?.saturating_sub(self.before);
        Ok(Counts::new(self.end, kernel, &statistics))
    }

    fn statistics(&self) -> Result<BTreeMap<String, u64>> {
        let request = "GET /stats HTTP/1.1\r\nHost: sidecar\r\nConnection: close\r\n\r\n";
        let answer = http::raw(&self.place.netns, ([127, 0, 0, 1], ADMIN).into(), request)
            .with_context(|| format!("{}:\n{}", self.process.name(), self.process.log()))?;
        let body = http::body(&answer).with_context(|| format!("no statistics: {answer}"))?;
        Ok(body.lines().filter_map(count::statistic).collect())
    }
}

/// How many connections the kernel has opened (at the client) or taken (at the server) in the place's network namespace, whoever's they were.
fn kernel(place: &Place, end: End) -> Result<u64> {
    let text = netns::inside(&place.netns, || fs::read_to_string("/proc/thread-self/net/snmp"))?
        .context("reading the kernel's counts of connections")?;
    let name = match end {
        End::Client => "ActiveOpens",
        End::Server => "PassiveOpens",
    };
    count::of_kernel(&text, name).with_context(|| format!("the kernel does not count {name}"))
}
