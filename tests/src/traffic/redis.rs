//! redis-server and redis-cli: values with the marker go there and come back.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};

use super::{Seen, write_marked};
use crate::{cluster::Pod, process::Process, wait::seconds};

const PORT: u16 = 6379;

pub struct Redis {
    pub process: Process,
    marker: String,
}

impl Redis {
    /// Starts redis-server on both families, without files.
    pub fn start(pod: &Pod, marker: &str) -> Result<Self> {
        let mut command = pod.command("redis-server");
        command.args(["--port", &PORT.to_string(), "--bind", "0.0.0.0", "::", "--protected-mode", "no"]);
        command.args(["--save", "", "--appendonly", "no", "--daemonize", "no"]).arg("--dir").arg(&pod.directory);
        let process = pod.serve("redis", &mut command, PORT)?;
        Ok(Self { process, marker: marker.to_owned() })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        PORT
    }

    /// SET and GET over one connection: the value that comes back is the one that went.
    pub fn set_and_get(&self, client: &Pod, address: IpAddr) -> Result<Seen> {
        let (host, port) = (address.to_string(), PORT.to_string());
        let value = self.marker.repeat(50);
        let script = r#"printf 'SET %s %s\nGET %s\n' "$2" "$3" "$2" | redis-cli -h "$0" -p "$1" 2>&1"#;
        let arguments = ["-c", script, &host, &port, "key", &value];
        let answer = client.succeed("bash", &arguments, seconds(60)).context("redis-cli")?;
        // redis-cli ends with 0 even if it never reached a server.
        ensure!(answer.starts_with("OK"), "redis-cli to {address}: {}", answer.trim());
        let exact = answer.lines().eq(["OK", value.as_str()]);
        Ok(Seen { port: PORT, exact, note: format!("SET and GET of {} bytes", value.len()) })
    }

    /// A value of so many bytes, set from a file and compared with it by checksum; a connection for each way.
    pub fn big_value(&self, client: &Pod, address: IpAddr, size: u64) -> Result<Seen> {
        let (host, port, file) = (address.to_string(), PORT.to_string(), client.directory.join("redis.value"));
        write_marked(&file, &self.marker, size)?;
        let script = r#"set -o pipefail; redis-cli -h "$0" -p "$1" -x SET big < "$2" >&2 &&
            redis-cli -h "$0" -p "$1" --raw GET big | head -c -1 | cmp - "$2" && echo same"#;
        let said = client.succeed("bash", &["-c", script, &host, &port, &file.to_string_lossy()], seconds(60))?;
        Ok(Seen { port: PORT, exact: said.trim() == "same", note: format!("a value of {size} bytes") })
    }

    /// redis-benchmark with SET, then GET, from so many clients each. It asks for the server's settings first, by one more connection.
    pub fn benchmark(&self, client: &Pod, address: IpAddr, clients: usize, requests: u32) -> Result<Seen> {
        let words =
            [&address.to_string(), &PORT.to_string(), &clients.to_string(), &requests.to_string()].map(String::clone);
        let [host, port, clients, requests] = &words;
        let arguments = ["-h", host, "-p", port, "-c", clients, "-n", requests, "-d", "1000", "-t", "set,get", "--csv"];
        let said = client.succeed("redis-benchmark", &arguments, seconds(60))?;
        let exact = ["\"SET\",", "\"GET\","].iter().all(|test| said.contains(test)) && !said.contains("rror");
        Ok(Seen { port: PORT, exact, note: said.lines().skip(1).collect::<Vec<_>>().join("; ") })
    }
}
