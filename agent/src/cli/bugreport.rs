//! `marline bugreport`: one archive with what somebody who is to help must know, and no secrets. `redact` takes them out, `gather` finds what
//! goes in.

mod gather;
mod redact;

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{SystemTime, UNIX_EPOCH},
};

use clap::Args;
use flate2::{Compression, write::GzEncoder};
use serde::Serialize;

use super::{
    client::{AdminArgs, Client},
    failed, print,
};
use redact::redact;

#[derive(Args)]
#[command(after_long_help = "\
In the archive: what the agent's addresses answer, marline status, facts of the kernel, the configuration files, and the last lines of the
access log and of --log-file. Taken out are private keys, the values of fields that are named like secrets, Secret resources, tokens,
passwords in URLs and Authorization headers; the CA's files are not read at all. MANIFEST.json lists each file and how much was taken out of it.
What remains are names, addresses and identities of workloads: look through it before you give it away.

Without an agent the archive has what can be seen from outside. Exit codes: 0 written, 1 not.

  marline bugreport --config /etc/marline --log-file /var/log/marline.log
  marline bugreport --output /tmp/report.tar.gz && tar tzf /tmp/report.tar.gz")]
pub(super) struct BugreportArgs {
    #[command(flatten)]
    admin: AdminArgs,
    /// Where to write; nothing is overwritten [default: marline-bugreport-TIME.tar.gz]
    #[arg(short, long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// The agent's configuration directory, if the agent cannot tell it
    #[arg(long, value_name = "DIR", env = "MARLINE_CONFIG")]
    config: Option<PathBuf>,
    /// A log of the agent's, of which the end is taken; may be given more than once
    #[arg(long, value_name = "FILE")]
    log_file: Vec<PathBuf>,
}

/// Something that goes into the archive.
struct Piece {
    name: String,
    text: String,
}

/// What `MANIFEST.json` and `--json` say.
#[derive(Serialize)]
struct Manifest {
    archive: PathBuf,
    version: &'static str,
    /// Seconds since 1970.
    made: u64,
    agent: bool,
    files: Vec<Listed>,
    /// What was looked for and is not there, and why.
    missing: Vec<String>,
}

#[derive(Serialize)]
struct Listed {
    name: String,
    bytes: usize,
    /// How many places were taken out.
    redacted: usize,
}

pub(super) fn run(args: &BugreportArgs) -> ExitCode {
    let made = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let output = args.output.clone().unwrap_or_else(|| {
        let time = super::table::time(made).replace([':', '-'], "");
        format!("marline-bugreport-{time}.tar.gz").into()
    });
    let written = Client::new(args.admin.admin).map_err(|error| error.to_string()).and_then(|client| {
        let gathered = gather::all(&client, args.config.as_deref(), &args.log_file);
        write(&output, made, gathered).map_err(|error| format!("{}: {error}", output.display()))
    });
    match written {
        Ok(manifest) if args.admin.json => print(&format!("{}\n", serde_json::json!(manifest))),
        Ok(manifest) => print(&text(&manifest)),
        Err(error) => return failed(&error),
    }
    ExitCode::SUCCESS
}

fn text(manifest: &Manifest) -> String {
    let mut out = String::new();
    for file in &manifest.files {
        let redacted = if file.redacted == 0 { String::new() } else { format!(", {} redacted", file.redacted) };
        out.push_str(&format!("  {} ({} bytes{redacted})\n", file.name, file.bytes));
    }
    for missing in &manifest.missing {
        out.push_str(&format!("  not there: {missing}\n"));
    }
    let redacted: usize = manifest.files.iter().map(|file| file.redacted).sum();
    format!(
        "{out}{} files, {redacted} secrets taken out, in {}\nlook through it before you give it away: it names workloads and addresses\n",
        manifest.files.len(),
        manifest.archive.display()
    )
}

/// Everything is redacted here, whatever it is and wherever it comes from.
fn write(output: &Path, made: u64, gathered: gather::Gathered) -> io::Result<Manifest> {
    let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(output)?;
    let filled = fill(&file, output, made, gathered);
    if filled.is_err() {
        // Half an archive helps nobody.
        let _ = std::fs::remove_file(output);
    }
    filled
}

fn fill(file: &File, output: &Path, made: u64, gathered: gather::Gathered) -> io::Result<Manifest> {
    let mut archive = tar::Builder::new(GzEncoder::new(file, Compression::default()));
    let mut add = |name: &str, text: &str| {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(made);
        archive.append_data(&mut header, format!("marline-bugreport/{name}"), text.as_bytes())
    };
    let mut manifest = Manifest {
        archive: output.to_path_buf(),
        version: env!("CARGO_PKG_VERSION"),
        made,
        agent: gathered.agent,
        files: Vec::new(),
        missing: gathered.missing.iter().map(|text| redact(text).0).collect(),
    };
    for Piece { name, text } in gathered.pieces {
        let (text, redacted) = redact(&text);
        add(&name, &text)?;
        manifest.files.push(Listed { name, bytes: text.len(), redacted });
    }
    add("MANIFEST.json", &serde_json::to_string_pretty(&manifest)?)?;
    archive.into_inner()?.finish()?.flush()?;
    Ok(manifest)
}

#[cfg(test)]
mod tests {
    use std::{io::Read as _, os::unix::fs::PermissionsExt as _};

    use super::*;

    const SECRET: &str = "hunter2-5d41402abc4b2a76";

    fn unpacked(path: &Path) -> String {
        let mut all = String::new();
        let mut archive = tar::Archive::new(flate2::read::GzDecoder::new(File::open(path).unwrap()));
        for entry in archive.entries().unwrap() {
            let mut entry = entry.unwrap();
            all.push_str(&format!("\n== {}\n", entry.path().unwrap().display()));
            entry.read_to_string(&mut all).unwrap();
        }
        all
    }

    #[test]
    fn no_secret_of_any_input_is_in_the_archive_and_it_is_for_its_owner_alone() {
        let dir = tempfile::tempdir().unwrap();
        let config = dir.path().join("config");
        std::fs::create_dir(&config).unwrap();
        let key = format!("-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n");
        let put = |path: &Path, text: &str| std::fs::write(path, text).unwrap();
        put(
            &config.join("secret.yaml"),
            &format!(
                "kind: ConfigMap\ndata: {{a: kept}}\n---\nkind: Secret\nmetadata: {{name: kept-name}}\ndata:\n  any: {SECRET}\nstringData: {{b: {SECRET}}}\n"
            ),
        );
        put(
            &config.join("agent.yaml"),
            &format!(
                "kind: AgentConfig\nspec:\n  ca: {{path: {}}}\n  capture: {{cgroup: /sys/fs/cgroup/x}}\n  accessLog: {{path: {}}}\n  password: {SECRET}\n  apiToken: |\n    {SECRET}\n    {SECRET}\n  url: https://me:{SECRET}@host/\n# {}",
                dir.path().join("ca").display(),
                dir.path().join("access.log").display(),
                key.replace('\n', "\n# ")
            ),
        );
        put(&config.join("key.pem"), &key);
        std::fs::create_dir(dir.path().join("ca")).unwrap();
        put(&dir.path().join("ca/ca-key.pem"), &key);
        put(
            &dir.path().join("access.log"),
            &format!("{{\"authorization\":\"Bearer {SECRET}\",\"kept\":\"access\"}}\n"),
        );
        let log = dir.path().join("agent.log");
        put(
            &log,
            &format!(
                "kept line\nAuthorization: Basic {SECRET}\ntoken={SECRET} kept-too\n{}\n",
                key.replace('\n', "\\n")
            ),
        );
        let client = Client::new("127.0.0.1:1".parse().unwrap()).unwrap();
        let output = dir.path().join("out.tar.gz");
        // The whole configuration is refused because of the fields that are none: its files are read all the same.
        let manifest = write(&output, 0, gather::all(&client, Some(&config), &[log])).unwrap();
        let all = unpacked(&output);
        assert!(!all.contains(SECRET), "{all}");
        for kept in ["kept line", "kept-too", "a: kept", "AgentConfig", "MANIFEST.json"] {
            assert!(all.contains(kept), "{kept} is not in {all}");
        }
        assert!(!manifest.agent && manifest.files.iter().map(|file| file.redacted).sum::<usize>() >= 6);
        assert_eq!(output.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        assert!(write(&output, 0, gather::Gathered::default()).is_err(), "nothing is overwritten");
    }
}
