//! The judgement of the demo: what clients, agents and wire said, compared with each other and with what is expected.
//! Everything shown is taken from there, nothing from what the demo meant to do.

use std::{collections::BTreeMap, fmt::Write as _};

use anyhow::Result;
use marline_tests::{
    access_log::{Entry, Records, Verdict},
    capture::Wire,
    cluster::Cluster,
    netns,
};
use serde::Serialize;

use super::{
    flows::{Done, Expected, MARKER, OUTSIDE},
    kernel::Kernel,
};

/// A client without a certificate sends only its Finished in the first encrypted record: 74 bytes at most.
const LEAST_WITH_CERTIFICATE: u16 = 200;

/// What `--json` writes.
#[derive(Serialize)]
struct Results {
    kernel: String,
    in_vm: bool,
    flows: Vec<Row>,
    wire: WireCounts,
    tls_stat: BTreeMap<String, u64>,
}

#[derive(Serialize)]
struct Row {
    name: String,
    family: &'static str,
    source: String,
    destination: String,
    records: &'static str,
    /// `direct` where the programs hold the connection themselves at both ends, else `proxied`.
    path: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    path_reason: Option<String>,
    verdict: &'static str,
    bytes: u64,
    exact: bool,
}

#[derive(Serialize)]
struct WireCounts {
    frames: u64,
    tls13_handshakes: usize,
    plaintext_hits: u64,
}

pub(super) struct Report {
    results: Results,
    notes: Vec<String>,
    /// What is not as it should be.
    pub faults: Vec<String>,
}

/// The kernel's own counts, over all pods: the sockets that hold TLS are theirs.
pub(super) fn tls_stat(cluster: &Cluster) -> Result<BTreeMap<String, u64>> {
    let mut sum = BTreeMap::new();
    for pod in cluster.pods() {
        for (name, count) in netns::tls_stat(&pod.place.netns)? {
            *sum.entry(name).or_default() += count;
        }
    }
    Ok(sum)
}

pub(super) fn judge(kernel: &Kernel, flows: Vec<Done>, wire: &Wire, tls_stat: BTreeMap<String, u64>) -> Report {
    let mut faults = Vec::new();
    let keeper = if kernel.has_ktls() { Records::Ktls } else { Records::Userspace };
    let rows = flows.iter().map(|flow| row(flow, keeper, &mut faults)).collect();
    let notes = judge_wire(&flows, wire, &mut faults);
    judge_stat(kernel, &flows, &tls_stat, &mut faults);
    let wire = WireCounts {
        frames: wire.frames,
        tls13_handshakes: wire.tls13_handshakes(),
        plaintext_hits: wire.hits(MARKER),
    };
    let results = Results { kernel: kernel.release.clone(), in_vm: kernel.in_vm(), flows: rows, wire, tls_stat };
    Report { results, notes, faults }
}

/// One flow: the row that is shown, and what is wrong with it.
fn row(flow: &Done, keeper: Records, faults: &mut Vec<String>) -> Row {
    let label = format!("{} over {}", flow.name, flow.family.as_str());
    let mut fault = |holds: bool, text: String| {
        if !holds {
            faults.push(format!("{label}: {text}"));
        }
    };
    let entries: Vec<&Entry> = flow.outbound.iter().chain(&flow.inbound).collect();
    let source = agreed(&entries, |entry| entry.source.identity.as_deref());
    let destination = agreed(&entries, |entry| entry.destination.identity.as_deref());
    let records = agreed(&entries, |entry| Some(name_of(entry.records)));
    let verdict = agreed(&entries, |entry| Some(if entry.verdict == Verdict::Allowed { "allowed" } else { "refused" }));
    let sum = |entries: &[Entry]| entries.iter().map(|entry| entry.bytes_sent + entry.bytes_received).sum::<u64>();
    let bytes = if flow.outbound.is_empty() { sum(&flow.inbound) } else { sum(&flow.outbound) };
    let direct = !entries.is_empty() && entries.iter().all(|entry| entry.path.as_deref() == Some("direct"));
    let path = if direct { "direct" } else { "proxied" };
    let exact = match (&flow.seen, flow.expected) {
        (Ok(seen), Expected::Mtls | Expected::Plaintext) => seen.exact,
        // Nothing was to come.
        (Err(_), Expected::Refused) => bytes == 0,
        _ => false,
    };
    let (expected_verdict, expected_records) = match flow.expected {
        Expected::Mtls => ("allowed", keeper),
        Expected::Plaintext => ("allowed", Records::Plaintext),
        Expected::Refused => ("refused", Records::None),
    };
    fault(verdict == expected_verdict, format!("the verdict is {verdict}, not {expected_verdict}"));
    fault(
        records == name_of(expected_records),
        format!("records are kept by {records}, not by {}", name_of(expected_records)),
    );
    let seen = flow.seen.as_ref().map_or_else(Clone::clone, |seen| seen.note.clone());
    fault(exact, format!("the client did not see what it should: {seen}"));
    fault(
        destination == flow.server.identity(),
        format!("the destination is {destination}, not {}", flow.server.identity()),
    );
    if flow.expected == Expected::Mtls {
        fault(source == flow.client.identity(), format!("the source is {source}, not {}", flow.client.identity()));
        fault(entries.iter().all(|entry| entry.tls.is_some()), "an entry without TLS".to_owned());
        fault(
            entries.iter().all(|entry| entry.ended_by_programs()),
            format!(
                "an end that no program wanted: {:?}",
                entries.iter().map(|entry| &entry.reason).collect::<Vec<_>>()
            ),
        );
        // What a reset takes away on one side may have been counted on the other.
        let closed = entries.iter().all(|entry| entry.reason.is_none());
        // Of a direct connection the kernel counts, and an end that came with the last bytes may be in its count, each way.
        let ends = if direct { 2 * flow.inbound.len() as u64 } else { 0 };
        fault(
            !closed || bytes.abs_diff(sum(&flow.inbound)) <= ends,
            format!("one agent counts {bytes} bytes, the other {}", sum(&flow.inbound)),
        );
    } else {
        // A mistaken identity would be worse than none.
        fault(entries.iter().all(|entry| entry.tls.is_none()), "TLS is in the log of a peer that has none".to_owned());
    }
    let source = if flow.expected == Expected::Mtls { source } else { format!("{} (no identity)", flow.client.name) };
    // What was refused had been sent as plaintext.
    let records = static_name(if flow.expected == Expected::Refused { "plaintext" } else { &records });
    let path_reason = entries.iter().find_map(|entry| entry.path_reason.clone());
    let verdict = if verdict == "allowed" { "allowed" } else { "refused" };
    Row {
        name: flow.name.to_owned(),
        family: flow.family.as_str(),
        source,
        destination,
        records,
        path,
        path_reason,
        verdict,
        bytes,
        exact,
    }
}

/// What a stranger on the link could see.
fn judge_wire(flows: &[Done], wire: &Wire, faults: &mut Vec<String>) -> Vec<String> {
    let connections: usize = flows.iter().map(|flow| flow.outbound.len()).sum();
    let leaks = wire.hits(MARKER);
    if leaks > 0 {
        faults.push(format!("the payload of the mesh was seen {leaks} times in the clear on the link"));
    }
    if wire.hits(OUTSIDE) == 0 {
        faults.push("not even the plaintext from outside was seen on the link: the capture proves nothing".to_owned());
    }
    if wire.tls13_handshakes() != connections {
        faults.push(format!("{} handshakes of TLS 1.3 for {connections} connections", wire.tls13_handshakes()));
    }
    let members: Vec<_> =
        flows.iter().filter(|flow| flow.expected == Expected::Mtls).map(|flow| &flow.client).collect();
    let of_members = || {
        let from = |address| members.iter().any(|pod| [pod.v4.into(), pod.v6.into()].contains(&address));
        wire.streams.iter().filter(move |stream| from(stream.client.ip()))
    };
    for stream in of_members() {
        if !stream.is_tls13() || stream.not_tls() > 0 || stream.has_hole() {
            faults.push(format!("a stream between members that is not TLS 1.3 from end to end: {stream:?}"));
        }
    }
    let sizes: Vec<u16> = of_members().map(|stream| stream.first_client_record().unwrap_or_default()).collect();
    let least = sizes.iter().min().copied().unwrap_or_default();
    if least < LEAST_WITH_CERTIFICATE {
        faults.push(format!("a client that shows no certificate: its first encrypted record has {least} bytes"));
    }
    vec![
        format!("{} frames, {} streams between members, all of their bytes TLS records", wire.frames, sizes.len()),
        format!(
            "{} handshakes chose TLS 1.3; both agents logged the identity that the other's certificate proved",
            wire.tls13_handshakes()
        ),
        format!(
            "TLS 1.3 encrypts certificates; the clients' show by size: first encrypted record {least} bytes or more, 74 at most without"
        ),
        format!("payload marker of the mesh seen {leaks} times; that of the pod outside {} times", wire.hits(OUTSIDE)),
    ]
}

/// The kernel counts TLS sockets on its own: as many as the agents say it keeps?
fn judge_stat(kernel: &Kernel, flows: &[Done], tls_stat: &BTreeMap<String, u64>, faults: &mut Vec<String>) {
    if !kernel.has_ktls() {
        return;
    }
    let count = |name: &str| tls_stat.get(name).copied().unwrap_or_default();
    let legs = flows.iter().flat_map(|flow| flow.outbound.iter().chain(&flow.inbound));
    let kept = legs.filter(|entry| entry.records == Records::Ktls).count() as u64;
    for direction in ["Tx", "Rx"] {
        let opened = count(&format!("Tls{direction}Sw")) + count(&format!("Tls{direction}Device"));
        if opened < kept {
            faults.push(format!("the kernel has opened {opened} TLS sockets ({direction}), the agents claim {kept}"));
        }
    }
    if count("TlsDecryptError") > 0 {
        faults.push(format!("the kernel could not decrypt {} records", count("TlsDecryptError")));
    }
}

impl Report {
    pub(super) fn json(&self) -> Result<String> {
        Ok(serde_json::to_string_pretty(&self.results)? + "\n")
    }

    pub(super) fn text(&self) -> String {
        let mut text = format!("\nkernel {}{}\n\n", self.results.kernel, if self.results.in_vm { " (VM)" } else { "" });
        let header = ["FLOW", "FAMILY", "SOURCE", "DESTINATION", "RECORDS", "PATH", "BYTES", "VERDICT", "EXACT"]
            .map(String::from);
        let mut lines = vec![header];
        for row in &self.results.flows {
            let (bytes, exact) = (row.bytes.to_string(), if row.exact { "yes" } else { "NO" });
            let cells = [
                &row.name,
                row.family,
                &row.source,
                &row.destination,
                row.records,
                row.path,
                &bytes,
                row.verdict,
                exact,
            ];
            lines.push(cells.map(String::from));
        }
        let width = |column: usize| lines.iter().map(|line| line[column].chars().count()).max().unwrap_or_default();
        let widths: [usize; 9] = std::array::from_fn(width);
        for line in &lines {
            let cells = line.iter().zip(widths).map(|(cell, width)| format!("{cell:<width$}  "));
            text.push_str(cells.collect::<String>().trim_end());
            text.push('\n');
        }
        text.push_str("\nOn the link:\n");
        self.notes.iter().for_each(|note| text.push_str(&format!("  {note}\n")));
        let stat: Vec<String> = self
            .results
            .tls_stat
            .iter()
            .filter(|(_, count)| **count > 0)
            .map(|(name, count)| format!("{name} {count}"))
            .collect();
        if !stat.is_empty() {
            let _ = writeln!(text, "\n/proc/net/tls_stat of all pods: {}", stat.join(", "));
        }
        if self.faults.is_empty() {
            text.push_str("\nEverything is as it should be.\n");
        } else {
            text.push_str("\nNot as it should be:\n");
            self.faults.iter().for_each(|fault| text.push_str(&format!("  {fault}\n")));
        }
        text
    }
}

/// What all entries say, or all that they say if they differ.
fn agreed<'a>(entries: &[&'a Entry], of: impl Fn(&'a Entry) -> Option<&'a str>) -> String {
    let mut values: Vec<&str> = entries.iter().map(|entry| of(entry).unwrap_or("none")).collect();
    values.sort_unstable();
    values.dedup();
    values.join(" and ")
}

fn name_of(records: Records) -> &'static str {
    match records {
        Records::Ktls => "ktls",
        Records::Userspace => "userspace",
        Records::Plaintext => "plaintext",
        Records::Without => "without-records",
        Records::None => "none",
    }
}

/// Of the three words that the format knows; anything else is a fault already.
fn static_name(records: &str) -> &'static str {
    match records {
        "ktls" => "ktls",
        "userspace" => "userspace",
        _ => "plaintext",
    }
}
