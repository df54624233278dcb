//! Impostors: peers that speak TLS well, with a certificate that is wrong in one respect. Each is refused, gets no byte of the
//! application, and leaves exactly one line in the agent's log that names the reason and both ends. Each table begins with a
//! peer that is right, which is let in: so it is the one respect that decides.

#[path = "native_wrong_peers/certificates.rs"]
mod certificates;

use std::fs;

use anyhow::{Context, Result, ensure};
use certificates::{Authority, Files, When};
use marline_tests::{
    access_log::{Entry, Verdict},
    capture::LinkCapture,
    cluster::{Cluster, ClusterSpec, Family, Membership, Pod, PodSpec, Side},
    config::Mode,
    flow::{Before, Route},
    scenario::on_mesh,
    traffic::nginx::Nginx,
    wait::seconds,
};

const MARKER: &str = "marker-for-the-right-peer-only";
const RIGHT: &str = "spiffe://cluster.local/ns/demo/sa/impostor";
const OTHER_WORKLOAD: &str = "spiffe://cluster.local/ns/demo/sa/server-b";
const OTHER_DOMAIN: &str = "spiffe://elsewhere.example/ns/demo/sa/impostor";

/// One peer.
struct Case {
    name: &'static str,
    subject: &'static str,
    when: When,
    signer: Signer,
    /// Options of openssl.
    version: &'static str,
    /// The reason by which it is refused, if it is.
    reason: Option<&'static str>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Signer {
    Mesh,
    Unknown,
    /// No certificate is shown.
    Nobody,
}

const fn case(name: &'static str, subject: &'static str, reason: Option<&'static str>) -> Case {
    Case { name, subject, when: When::Now, signer: Signer::Mesh, version: "-tls1_3", reason }
}

fn spec() -> ClusterSpec {
    let mut spec = ClusterSpec::pairs(Mode::Strict);
    spec.pods.push(PodSpec::new("impostor", Side::B, Membership::Impostor));
    spec
}

struct Certificates {
    mesh: Authority,
    unknown: Authority,
}

impl Certificates {
    fn new(cluster: &Cluster) -> Result<Self> {
        Ok(Self { mesh: Authority::of_mesh(&cluster.directory().join("ca"))?, unknown: Authority::unknown()? })
    }

    fn of(&self, case: &Case, pod: &Pod) -> Result<Option<Files>> {
        let signer = match case.signer {
            Signer::Mesh => &self.mesh,
            Signer::Unknown => &self.unknown,
            Signer::Nobody => return Ok(None),
        };
        signer.issue(&pod.directory, case.name, case.subject, case.when).map(Some)
    }
}

#[test]
fn a_server_with_a_wrong_certificate_is_refused_by_the_clients_agent() -> Result<()> {
    let cases = [
        case("right", RIGHT, None),
        case("other-workload", OTHER_WORKLOAD, Some("wrong_identity")),
        case("other-trust-domain", OTHER_DOMAIN, Some("foreign_trust_domain")),
        case("no-spiffe-id", "impostor.demo.svc.cluster.local", Some("not_an_svid")),
        Case { when: When::Past, ..case("expired", RIGHT, Some("expired")) },
        Case { when: When::Future, ..case("not-yet-valid", RIGHT, Some("not_yet_valid")) },
        Case { signer: Signer::Unknown, ..case("unknown-ca", RIGHT, Some("unknown_ca")) },
        // Offered TLS 1.3 alone, it is this server that refuses, with the alert that says so.
        Case { version: "-tls1_2", ..case("tls-1.2", RIGHT, Some("peer_alert")) },
    ];
    on_mesh(&spec(), |cluster| {
        let (client, impostor) = (cluster.pod("client-a")?, cluster.pod("impostor")?);
        let certificates = Certificates::new(cluster)?;
        let mut capture = LinkCapture::start(cluster, &[MARKER])?;
        for (index, case) in cases.iter().enumerate() {
            let family = Family::BOTH[index % 2];
            let port = 7000 + u16::try_from(index)?;
            let files = certificates.of(case, &impostor)?.context("a server needs a certificate")?;
            let mut command = impostor.command("openssl");
            command.args(["s_server", "-rev", "-Verify", "1", "-verify_quiet", case.version]);
            // Both families; what the client shows is not this server's concern.
            command.args(["-accept", &port.to_string(), "-alpn", "istio", "-cert"]).arg(&files.chain);
            let name = format!("s_server-{}", case.name);
            let _server = impostor.serve(
                &name,
                command.arg("-key").arg(&files.key).arg("-cert_chain").arg(&files.chain),
                port,
            )?;

            let attempt = Attempt::begin(cluster, &client, &impostor, family, Side::A)?;
            let host = impostor.address(family).to_string();
            let script = r#"exec 3<>"/dev/tcp/$0/$1" && printf '%s\n' "$2" >&3 && IFS= read -r -t 20 line <&3 && printf '%s' "$line""#;
            let output = client.output("bash", &["-c", script, &host, &port.to_string(), MARKER], seconds(30))?;
            let answered = String::from_utf8_lossy(&output.stdout) == MARKER.chars().rev().collect::<String>();
            ensure!(answered == case.reason.is_none(), "{}: {output:?}", case.name);
            attempt.judge(cluster, case, port)?;
            let received = fs::read_to_string(impostor.directory.join(format!("{name}.log")))?;
            ensure!(!received.contains(MARKER), "{}: the impostor has it: {received}", case.name);
        }
        ensure!(capture.wire()?.hits(MARKER) == 0, "the marker was seen on the link");
        Ok(())
    })
}

#[test]
fn a_client_with_a_wrong_certificate_or_none_is_refused_by_the_servers_agent() -> Result<()> {
    // A client that shows another workload's certificate *is* that workload: it holds the key. So that case is not here.
    let cases = [
        case("right", RIGHT, None),
        case("other-trust-domain", OTHER_DOMAIN, Some("foreign_trust_domain")),
        case("no-spiffe-id", "impostor.demo.svc.cluster.local", Some("not_an_svid")),
        Case { when: When::Past, ..case("expired", RIGHT, Some("expired")) },
        Case { when: When::Future, ..case("not-yet-valid", RIGHT, Some("not_yet_valid")) },
        Case { signer: Signer::Unknown, ..case("unknown-ca", RIGHT, Some("unknown_ca")) },
        Case { signer: Signer::Nobody, ..case("no-certificate", RIGHT, Some("no_certificate")) },
        Case { version: "-tls1_2", ..case("tls-1.2", RIGHT, Some("tls_version")) },
    ];
    on_mesh(&spec(), |cluster| {
        let (impostor, server) = (cluster.pod("impostor")?, cluster.pod("server-a")?);
        let certificates = Certificates::new(cluster)?;
        let nginx = Nginx::start(&server, MARKER)?;
        let mut capture = LinkCapture::start(cluster, &[MARKER])?;
        for (index, case) in cases.iter().enumerate() {
            let family = Family::BOTH[index % 2];
            let address = server.socket(family, nginx.port()).to_string();
            let mut arguments = format!("-connect {address} -alpn istio {}", case.version);
            if let Some(files) = certificates.of(case, &impostor)? {
                let (chain, key) = (files.chain.display(), files.key.display());
                arguments += &format!(" -cert {chain} -cert_chain {chain} -key {key}");
            }
            let attempt = Attempt::begin(cluster, &impostor, &server, family, Side::A)?;
            let script = format!(r"printf 'GET / HTTP/1.0\r\n\r\n' | openssl s_client -quiet -ign_eof {arguments}");
            let output = impostor.output("sh", &["-c", &script], seconds(30))?;
            let answered = String::from_utf8_lossy(&output.stdout).contains(MARKER);
            ensure!(answered == case.reason.is_none(), "{}: {output:?}", case.name);
            attempt.judge(cluster, case, nginx.port())?;
        }
        ensure!(capture.wire()?.hits(MARKER) == 0, "the marker was seen on the link");
        Ok(())
    })
}

/// One connection, and what the deciding agent says of it.
struct Attempt<'a> {
    before: Before<'a>,
    judge: Side,
    said: usize,
    ends: [String; 2],
}

impl<'a> Attempt<'a> {
    fn begin(cluster: &Cluster, client: &'a Pod, server: &'a Pod, family: Family, judge: Side) -> Result<Self> {
        let before = Before::now(cluster, Route { client, server, family, connections: 1 })?;
        let said = cluster.agent(judge)?.log().len();
        let ends = [client, server].map(|pod| pod.address(family).to_string());
        Ok(Self { before, judge, said, ends })
    }

    fn judge(&self, cluster: &Cluster, case: &Case, port: u16) -> Result<()> {
        let (outbound, inbound) = self.before.entries(cluster, port)?;
        let entries: Vec<&Entry> = outbound.iter().chain(&inbound).collect();
        let [entry] = entries.as_slice() else { anyhow::bail!("{}: {entries:#?}", case.name) };
        let Some(reason) = case.reason else {
            ensure!(entry.verdict == Verdict::Allowed, "{}: {entry:#?}", case.name);
            return Ok(());
        };
        ensure!(entry.verdict == Verdict::Refused, "{}: {entry:#?}", case.name);
        ensure!(entry.reason.as_deref() == Some(reason), "{}: not {reason}: {entry:#?}", case.name);
        ensure!(entry.bytes_sent == 0 && entry.bytes_received == 0, "{}: {entry:#?}", case.name);
        let agent = cluster.agent(self.judge)?;
        let alarm = |line: &&str| line.contains("WARN") || line.contains("ERROR");
        let log = agent
            .wait_log("the refusal", self.said, |said| said.ends_with('\n') && said.lines().any(|line| alarm(&line)))?;
        // One that came late would be found in the next case's part.
        let lines: Vec<&str> = log.lines().filter(alarm).collect();
        let [line] = lines.as_slice() else { anyhow::bail!("{}: not one line: {lines:#?}", case.name) };
        let named = line.contains(&format!("reason=\"{reason}\"")) && self.ends.iter().all(|end| line.contains(end));
        let version = case.version == "-tls1_3" || line.contains("TLS 1.3");
        ensure!(named && version, "{}: the line does not name reason and ends: {line}", case.name);
        Ok(())
    }
}
