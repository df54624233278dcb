//! `marline ca serve` on node a, as the CA of both nodes: started, asked nothing, killed. Each node's agent has a token of its own, beside its
//! configuration.

use std::{
    fmt::Write as _,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result, bail};

use crate::{
    cluster::{Cluster, Side, network::link_address},
    config::{self, Extra, NAMESPACE, TRUST_DOMAIN},
    http,
    process::{Process, succeed},
    wait::{Look, seconds, wait_for},
};

const PORT: u16 = 15012;
const STATUS: u16 = 15014;

/// What `ClusterSpec::certificates` is for agents that ask it.
#[must_use]
pub fn fields() -> Extra {
    vec![
        format!("address: https://{}:{PORT}", link_address(Side::A)),
        "rootCert: ../../ca/root-cert.pem".to_owned(),
        "tokenFile: ../token".to_owned(),
    ]
}

/// A CA service that runs, or did.
pub struct Authority {
    directory: PathBuf,
    program: PathBuf,
    process: Option<Process>,
}

impl Authority {
    /// Makes the CA, the tokens of both agents, and the list of what runs on which node; starts the service.
    pub fn create(cluster: &Cluster) -> Result<Self> {
        let directory = cluster.directory().join("authority");
        fs::create_dir_all(&directory).context("making the CA service's directory")?;
        let mut authority = Self { directory, program: cluster.program()?, process: None };
        let ca = cluster.ca_directory();
        authority.marline(&["ca", "init", "--trust-domain", TRUST_DOMAIN], &[&ca], &[])?;
        let mut tokens = "apiVersion: marline.io/v1alpha1\nkind: CaTokens\nspec:\n  tokens:\n".to_owned();
        for side in Side::BOTH {
            let file = cluster.config_directory(side).with_file_name("token");
            let node = format!("node-{}", side.letter());
            let from = link_address(side).to_string();
            let entry =
                authority.marline(&["ca", "token", "--node", &node, "--from", &from, "--out"], &[&file], &[])?;
            tokens.push_str(&entry);
        }
        config::replace(&authority.directory.join("tokens.yaml"), &tokens)?;
        authority.write_nodes(cluster, |_| None)?;
        config::replace(&authority.settings(), &settings(&ca))?;
        authority.start(cluster)?;
        Ok(authority)
    }

    /// Says anew which service accounts run where: as it is, but for pods that are `elsewhere`. A service that runs has read it then.
    pub fn write_nodes(&self, cluster: &Cluster, elsewhere: impl Fn(&str) -> Option<Side>) -> Result<()> {
        let mut text = "apiVersion: marline.io/v1alpha1\nkind: CaNodes\nspec:\n  nodes:\n".to_owned();
        for side in Side::BOTH {
            let pods = cluster.pods().filter(|pod| elsewhere(&pod.name).unwrap_or(pod.side) == side);
            let accounts: Vec<String> = pods.map(|pod| format!("{NAMESPACE}/{}", pod.name)).collect();
            writeln!(text, "  - name: node-{}\n    serviceAccounts: [{}]", side.letter(), accounts.join(", "))?;
        }
        let before = self.nodes_read(cluster, 1)?;
        config::replace(&self.directory.join("nodes.yaml"), &text)?;
        self.nodes_read(cluster, before + 1).map(drop)
    }

    /// Waits until the service, if it runs, has read its nodes so many times; says how often it has.
    fn nodes_read(&self, cluster: &Cluster, least: u64) -> Result<u64> {
        const COUNT: &str = "marline_ca_reloads_total{files=\"nodes\",result=\"accepted\"} ";
        if self.process.is_none() {
            return Ok(0);
        }
        wait_for("the CA service to read its nodes", seconds(20), || {
            let metrics = http::get(&cluster.node(Side::A).netns, (link_address(Side::A), STATUS).into(), "/metrics")?;
            let count = metrics.body.lines().find_map(|line| line.strip_prefix(COUNT)?.parse().ok()).unwrap_or(0);
            Ok(if count >= least { Look::Done(count) } else { Look::NotYet(format!("{count} times")) })
        })
    }

    /// Starts the service, and waits until it answers.
    pub fn start(&mut self, cluster: &Cluster) -> Result<()> {
        let place = cluster.node(Side::A);
        let mut command = place.command(&self.program);
        command.args(["ca", "serve", "--config"]).arg(self.settings());
        let mut process = Process::start("the CA service", &mut command, &self.directory.join("service.log"))?;
        let status = (link_address(Side::A), STATUS).into();
        wait_for("the CA service to answer", seconds(20), || {
            if let Some(ended) = process.ended()? {
                bail!("the CA service ended ({ended}):\n{}", process.log());
            }
            Ok(match http::get(&place.netns, status, "/readyz") {
                Ok(answer) if answer.status == 200 => Look::Done(()),
                Ok(answer) => Look::NotYet(answer.body),
                Err(error) => Look::NotYet(format!("{error:#}")),
            })
        })?;
        self.process = Some(process);
        Ok(())
    }

    /// SIGKILL.
    pub fn kill(&mut self) -> Result<()> {
        self.process.take().map_or(Ok(()), |mut process| process.kill())
    }

    /// Takes a node's certificates back, and gives it no more.
    pub fn revoke(&self, side: Side) -> Result<()> {
        let (settings, node) = (self.settings(), format!("node-{}", side.letter()));
        self.marline(&["ca", "revoke", "--config"], &[&settings], &["--node", &node]).map(drop)
    }

    /// What it wrote of each certificate and of each refusal, a line each.
    pub fn ledger(&self) -> Result<String> {
        let mut all = String::new();
        for entry in fs::read_dir(self.directory.join("state")).context("the CA service's state")? {
            all.push_str(&fs::read_to_string(entry?.path()).unwrap_or_default());
        }
        Ok(all)
    }

    #[must_use]
    pub fn log(&self) -> String {
        fs::read_to_string(self.directory.join("service.log")).unwrap_or_default()
    }

    fn settings(&self) -> PathBuf {
        self.directory.join("ca.yaml")
    }

    fn marline(&self, words: &[&str], paths: &[&Path], more: &[&str]) -> Result<String> {
        succeed(Command::new(&self.program).args(words).args(paths).args(more), seconds(20))
    }
}

fn settings(ca: &Path) -> String {
    format!(
        "apiVersion: marline.io/v1alpha1\nkind: CaServer\nspec:\n  trustDomain: {TRUST_DOMAIN}\n  ca:\n    path: {}\n  listen:\n    \
         address: 0.0.0.0:{PORT}\n    names: [{address}]\n  status:\n    address: {address}:{STATUS}\n  state: state\n  \
         authentication:\n    tokens: tokens.yaml\n  nodes: nodes.yaml\n",
        ca.display(),
        address = link_address(Side::A),
    )
}
