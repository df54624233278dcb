//! iperf3: bulk bytes, the marker among them.
//!
//! iperf3 cannot tell whether bytes are exact, with or without a mesh: its receiver stops when the sender's word of the end
//! arrives, which goes over another connection, and its sender skips what a short send left of the file. So `exact` means
//! here that both ends finished and agree with their counts as far as that allows.

use std::net::IpAddr;

use anyhow::{Context, Result};
use serde_json::Value;

use super::{Seen, write_marked};
use crate::{cluster::Pod, wait::seconds};

const PORT: u16 = 5201;

pub struct Iperf {
    server: Pod,
    marker: String,
}

impl Iperf {
    #[must_use]
    pub fn new(server: &Pod, marker: &str) -> Self {
        Self { server: server.clone(), marker: marker.to_owned() }
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        PORT
    }

    /// Sends so many bytes of marked text and compares the counts of both ends. The server is started for this one test:
    /// between two tests it closes its listener for a moment.
    pub fn send(&self, client: &Pod, address: IpAddr, size: u64) -> Result<Seen> {
        let mut command = self.server.command("iperf3");
        command.args(["-s", "-1", "-p", &PORT.to_string()]);
        let mut server = self.server.serve("iperf3", &mut command, PORT)?;
        let seen = self.measure(client, address, size)?;
        server.wait(seconds(20))?;
        Ok(seen)
    }

    /// Over so many streams, with iperf3's own words for how much (`-t 1`) and for the direction (`-R`, `--bidir`). One
    /// more connection is for control.
    pub fn streams(&self, client: &Pod, address: IpAddr, streams: u8, words: &[&str]) -> Result<Seen> {
        let mut command = self.server.command("iperf3");
        command.args(["-s", "-1", "-p", &PORT.to_string()]);
        let mut server = self.server.serve("iperf3", &mut command, PORT)?;
        let (host, port, parallel) = (address.to_string(), PORT.to_string(), streams.to_string());
        let mut arguments = vec!["-c", &host, "-p", &port, "-P", &parallel, "-J"];
        arguments.extend(words);
        let output = client.output("iperf3", &arguments, seconds(60))?;
        let seen = judge(&String::from_utf8_lossy(&output.stdout), address)?;
        server.wait(seconds(20))?;
        Ok(seen)
    }

    fn measure(&self, client: &Pod, address: IpAddr, size: u64) -> Result<Seen> {
        let file = client.directory.join("iperf3.sent");
        write_marked(&file, &self.marker, size)?;
        let (host, port, path) = (address.to_string(), PORT.to_string(), file.to_string_lossy());
        // The test ends with the file.
        let arguments = ["-c", &host, "-p", &port, "-t", "600", "-J", "-F", &path];
        let output = client.output("iperf3", &arguments, seconds(120))?;
        let seen = judge(&String::from_utf8_lossy(&output.stdout), address)?;
        let all = seen.note.starts_with(&format!("{size} bytes sent"));
        Ok(Seen { exact: seen.exact && all, ..seen })
    }
}

/// What iperf3's client reports in JSON.
fn judge(text: &str, address: IpAddr) -> Result<Seen> {
    let report: Value = serde_json::from_str(text).with_context(|| format!("iperf3 said: {text}"))?;
    if let Some(error) = report.get("error") {
        anyhow::bail!("iperf3 to {address}: {error}");
    }
    let count = |end: &str| report.pointer(&format!("/end/{end}/bytes")).and_then(Value::as_u64);
    let (sent, received) = (count("sum_sent"), count("sum_received"));
    let rate = report.pointer("/end/sum_received/bits_per_second").and_then(Value::as_f64).unwrap_or_default();
    let (sent, received) = (sent.unwrap_or_default(), received.unwrap_or_default());
    let exact = received > 0 && received <= sent;
    let note = format!("{sent} bytes sent, {received} received, {:.0} Mbit/s", rate / 1e6);
    Ok(Seen { port: PORT, exact, note })
}
