//! Nodes that are broken, one thing at a time: `marline status` names the cause and the way out, and ends with the code that fits.

#[path = "native_commands/typed.rs"]
mod typed;

use std::{fs, process::Command, time::SystemTime};

use anyhow::{Context, Result, ensure};
use marline_tests::{
    agent::kernel_keeps_records,
    cgroup,
    cluster::{Cluster, ClusterSpec, Side, network, remains},
    config::{self, Mode, NAMESPACE},
    netns,
    process::succeed,
    scenario::{on_mesh, on_network},
    wait::{Look, seconds, wait_for},
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose, SanType};
use typed::{Node, on};

/// Waits until the lines about one part have these words and the worst of them is this.
fn becomes(node: &Node, part: &str, state: &str, words: &[&str], more: &[&str]) -> Result<Option<i32>> {
    wait_for(format!("status to say {state} of {part}, with {words:?}"), seconds(60), || {
        let (code, worst, text) = node.part(part, more)?;
        let there = worst == state && words.iter().all(|word| text.contains(word));
        Ok(if there { Look::Done(code) } else { Look::NotYet(format!("{worst}: {text}")) })
    })
}

fn config_of(cluster: &Cluster) -> String {
    cluster.config_directory(Side::A).display().to_string()
}

#[test]
fn a_hook_that_somebody_has_detached_is_named() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        let links = remains::pins(&network::node_name(cluster.name(), Side::A)).join("links");
        succeed(Command::new("bpftool").args(["link", "detach", "pinned"]).arg(links.join("connect4")), seconds(20))?;
        let code = becomes(&node, "hooks", "fail", &["connect4", "attached to nothing", "restart the agent"], &[])?;
        ensure!(code == Some(1), "{code:?}");
        node.types(&["status"])?.has(1, &["FAIL  hooks", "1 of 11 kernel programs are NOT in force", "NOT well"])?;
        let inbound =
            fs::read_dir(&links)?.flatten().find(|pin| pin.file_name().to_string_lossy().starts_with("inbound-"));
        succeed(
            Command::new("bpftool").args(["link", "detach", "pinned"]).arg(inbound.context("a pod's hook")?.path()),
            seconds(20),
        )?;
        becomes(&node, "hooks", "fail", &["2 of 11", "inbound at", "connect4"], &[])?;
        // The way out is one.
        cluster.start_agent(Side::A)?;
        becomes(&node, "hooks", "ok", &["all 11"], &[]).map(drop)
    })
}

#[test]
fn no_kernel_tls_is_a_warning_and_no_failure() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        let (code, state, text) = node.part("kernel-tls", &[])?;
        ensure!(code == Some(0), "{code:?}: {text}");
        match kernel_keeps_records()? {
            true => ensure!(state == "ok" || text.contains("copy"), "{state}: {text}"),
            false => ensure!(
                state == "warn" && text.contains("no usable kernel TLS") && text.contains("modprobe tls"),
                "{state}: {text}"
            ),
        }
        Ok(())
    })
}

#[test]
fn a_cgroup_that_is_gone_and_one_that_is_none_are_named() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        let pods = cluster.pod("client-a")?.place.cgroup.parent().context("the pods' cgroup")?.to_owned();
        cgroup::remove(&pods)?;
        ensure!(becomes(&node, "cgroup", "fail", &["cannot be opened", "spec.capture.cgroup"], &[])? == Some(1));
        becomes(&node, "hooks", "fail", &["connect4", "cannot be found"], &[])?;
        cgroup::create(&pods)?;
        becomes(&node, "hooks", "fail", &["attached to nothing"], &[]).map(drop)
    })?;
    on_network(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        let file = cluster.config_directory(Side::A).join("agent.yaml");
        let text = fs::read_to_string(&file)?;
        let line = text.lines().find(|line| line.trim().starts_with("cgroup:")).context("the line")?.to_owned();
        fs::write(&file, text.replace(&line, "    cgroup: /proc"))?;
        let said = node.types(&["status", "--config", &config_of(cluster)])?;
        said.has(
            2,
            &[
                "no agent answers",
                "FAIL  cgroup",
                "/proc is no directory of cgroup2",
                "mount -t cgroup2",
                "marline ca init",
            ],
        )
    })
}

#[test]
fn a_dead_agent_and_a_wrong_address_are_told_apart() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        let config = config_of(cluster);
        let wrong = node.types(&["status", "--admin", "127.0.0.1:1", "--config", &config])?;
        wrong.has(
            2,
            &[
                "no agent answers at 127.0.0.1:1",
                "an agent lives",
                "127.0.0.1:15000",
                "2 are captured by the agent that holds",
            ],
        )?;
        for command in ["workloads", "connections", "certs"] {
            node.types(&[command, "--admin", "127.0.0.1:1"])?
                .has(2, &["no agent answers at 127.0.0.1:1", "--admin"])?;
        }
        cluster.agent_mut(Side::A)?.kill()?;
        let dead = node.types(&["status", "--config", &config])?;
        dead.has(2, &["no agent answers", "left 2 captured", "CLOSED", "marline unload", "marline agent --config"])?;
        let (code, value) = node.json(&["status", "--config", &config])?;
        ensure!(code == Some(2) && value["agent"] == false && value["status"].is_null(), "{value}");
        node.types(&["check", "client-a", "server-b:80"])?.has(2, &["no agent answers"])
    })
}

#[test]
fn a_configuration_that_was_rejected_and_a_pod_that_is_refused_are_named() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        let directory = cluster.config_directory(Side::A);
        let before = cluster.agent(Side::A)?.reloads()?;
        config::replace(
            &directory.join("broken.yaml"),
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: x}\nspec: {address: nowhere}\n",
        )?;
        cluster.agent(Side::A)?.wait_rejected(before)?;
        let code =
            becomes(&node, "configuration", "fail", &["REJECTED", "broken.yaml", "spec.address", "check-config"], &[])?;
        ensure!(code == Some(1), "{code:?}");
        let entry = format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata:\n  name: lost\n  namespace: {NAMESPACE}\n  annotations:\n    \
             marline.io/netns: /run/netns/nowhere\nspec:\n  address: 10.99.0.1\n  serviceAccount: lost\n"
        );
        config::replace(&directory.join("broken.yaml"), &entry)?;
        let code = becomes(
            &node,
            "pods",
            "fail",
            &["demo/lost is refused", "/run/netns/nowhere", "2 captured and ready, 1 refused"],
            &[],
        )?;
        ensure!(code == Some(1), "{code:?}");
        becomes(&node, "configuration", "ok", &["generation"], &[])?;
        node.types(&["check", "lost", "server-b:80"]).map(drop)
    })
}

#[test]
fn a_pod_whose_namespace_is_gone_is_named() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        netns::remove(&network::pod_name(cluster.name(), "client-a"))?;
        becomes(&node, "pods", "warn", &["client-a", "/run/netns/", "is gone", "WorkloadEntry"], &[]).map(drop)
    })
}

#[test]
fn a_ca_that_cannot_be_read_is_a_warning_while_the_agent_lives_and_a_failure_after() -> Result<()> {
    on_mesh(&ClusterSpec::pairs(Mode::Strict), |cluster| {
        let node = on(cluster, Side::A)?;
        let key = cluster.ca_directory().join("ca-key.pem");
        config::replace(&key, "no key at all\n")?;
        let code = becomes(&node, "authority", "warn", &["is refused", "ca-key.pem", "put it right"], &[])?;
        ensure!(code == Some(0), "{code:?}");
        cluster.agent_mut(Side::A)?.kill()?;
        let config = config_of(cluster);
        let (code, state, text) = node.part("authority", &["--config", &config])?;
        ensure!(code == Some(2) && state == "fail" && text.contains("ca-key.pem"), "{code:?} {state}: {text}");
        Ok(())
    })
}

#[test]
fn a_certificate_that_has_expired_is_named_with_why_it_could_not_be_renewed() -> Result<()> {
    let spec = ClusterSpec { leaf_lifetime: Some("4s".to_owned()), ..ClusterSpec::pairs(Mode::Strict) };
    on_mesh(&spec, |cluster| {
        let node = on(cluster, Side::A)?;
        short_lived_ca(cluster, 12)?;
        let code = becomes(
            &node,
            "certificates",
            "fail",
            &["has EXPIRED", "/sa/client-a", "renewing fails", "mend the CA"],
            &[],
        )?;
        ensure!(code == Some(1), "{code:?}");
        node.types(&["certs"])?.has(1, &["expired", "could not be renewed"])?;
        let agent = node.types(&["status"])?;
        agent.has(1, &["NOT ready", "FAIL  certificates"])
    })
}

/// Puts an intermediate in the CA's place that ends in so many seconds.
fn short_lived_ca(cluster: &Cluster, lives: u64) -> Result<()> {
    let dir = cluster.ca_directory();
    let read = |name: &str| fs::read_to_string(dir.join(name));
    let root = read("root-cert.pem")?;
    let issuer = Issuer::from_ca_cert_pem(&root, KeyPair::from_pem(&read("ca-key.pem")?)?)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::default();
    let now = SystemTime::now();
    params.not_before = (now - seconds(60)).into();
    params.not_after = (now + std::time::Duration::from_secs(lives)).into();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.subject_alt_names = vec![SanType::URI("spiffe://cluster.local".try_into()?)];
    let certificate = params.signed_by(&key, &issuer)?.pem();
    config::replace(&dir.join("cert-chain.pem"), &format!("{certificate}{root}"))?;
    config::replace(&dir.join("ca-key.pem"), &key.serialize_pem())?;
    config::replace(&dir.join("ca-cert.pem"), &certificate)
}
