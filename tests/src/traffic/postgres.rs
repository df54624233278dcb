//! PostgreSQL and its clients: psql moves tables, compared by what md5 says on both ends; pgbench has many sessions at once.

use std::{net::IpAddr, os::unix::fs::chown, path::Path, process::Command};

use anyhow::{Context, Result};
use nix::unistd::User;
use tempfile::TempDir;

use super::Seen;
use crate::{
    cluster::Pod,
    process::{Process, succeed},
    wait::seconds,
};

const PORT: u16 = 5432;
/// Debian's, which are not on the PATH.
const PROGRAMS: &str = "/usr/lib/postgresql/15/bin";

pub struct Postgres {
    pub process: Process,
    _data: TempDir,
}

impl Postgres {
    /// Makes a database cluster and serves it on both families. PostgreSQL refuses to be root, so it is nobody.
    pub fn start(pod: &Pod) -> Result<Self> {
        let nobody =
            User::from_name("nobody").context("asking for the user nobody")?.context("there is no user nobody")?;
        let data = tempfile::Builder::new().prefix("marline-postgres-").tempdir().context("making a directory")?;
        chown(data.path(), Some(nobody.uid.as_raw()), Some(nobody.gid.as_raw())).context("giving it to nobody")?;
        let mut initdb = Command::new("setpriv");
        initdb.args(as_nobody(&nobody, "initdb")).args(["--auth=trust", "--username=mesh", "--no-sync", "--no-locale"]);
        succeed(initdb.args(["--encoding=UTF8", "--pgdata"]).arg(data.path()), seconds(60)).context("initdb")?;
        let mut command = pod.command("setpriv");
        command.args(as_nobody(&nobody, "postgres")).arg("-D").arg(data.path());
        for setting in [
            "listen_addresses=*",
            &format!("port={PORT}"),
            &format!("unix_socket_directories={}", data.path().display()),
            "fsync=off",
            "autovacuum=off",
        ] {
            command.args(["-c", setting]);
        }
        std::fs::OpenOptions::new()
            .append(true)
            .open(data.path().join("pg_hba.conf"))
            .and_then(|mut file| std::io::Write::write_all(&mut file, b"host all all all trust\n"))
            .context("letting everybody in")?;
        Ok(Self { process: pod.serve("postgres", &mut command, PORT)?, _data: data })
    }

    #[must_use]
    pub fn port(&self) -> u16 {
        PORT
    }

    /// Two sessions: one copies rows in and makes more of them, one copies all out; both say the same of them.
    pub fn copy(&self, client: &Pod, address: IpAddr, rows: u32) -> Result<Seen> {
        let script = r#"set -eo pipefail
            seq "$2" | sed 's/$/,the row of this number is made on the client/' > "$3/rows"
            psql -qAt -h "$0" -p "$1" -v ON_ERROR_STOP=1 <<END
            DROP TABLE IF EXISTS t; CREATE TABLE t (number int, words text); \copy t FROM '$3/rows' (FORMAT csv)
END
            psql -qAt -h "$0" -p "$1" -v ON_ERROR_STOP=1 -c "COPY (SELECT * FROM t ORDER BY number) TO STDOUT (FORMAT csv)" |
                cmp - "$3/rows" && echo same"#;
        let (host, port, rows, directory) =
            (address.to_string(), PORT.to_string(), rows.to_string(), client.directory.to_string_lossy());
        let said = succeed(session(client, "bash").args(["-c", script, &host, &port, &rows, &directory]), seconds(60))?;
        Ok(Seen { port: PORT, exact: said.trim() == "same", note: format!("{rows} rows in and out") })
    }

    /// pgbench's own tables and transactions, by so many sessions at once; two more fill the tables and look at them.
    pub fn bench(&self, client: &Pod, address: IpAddr, sessions: u8) -> Result<Seen> {
        let (host, port, sessions) = (address.to_string(), PORT.to_string(), sessions.to_string());
        let program = Path::new(PROGRAMS).join("pgbench");
        let place = ["-h", &host, "-p", &port];
        succeed(session(client, &program).args(["-i", "-q", "-I", "dtg"]).args(place), seconds(60))?;
        let mut command = session(client, &program);
        let said = succeed(command.args(["-n", "-c", &sessions, "-j", "2", "-t", "10"]).args(place), seconds(60))?;
        let exact = said.contains("number of failed transactions: 0 ");
        let rate = said.lines().find(|line| line.starts_with("tps")).unwrap_or_default();
        Ok(Seen { port: PORT, exact, note: format!("{sessions} sessions, {rate}") })
    }
}

fn as_nobody(nobody: &User, program: &str) -> [String; 4] {
    let (user, group) = (nobody.uid, nobody.gid);
    [
        format!("--reuid={user}"),
        format!("--regid={group}"),
        "--clear-groups".to_owned(),
        Path::new(PROGRAMS).join(program).display().to_string(),
    ]
}

fn session(client: &Pod, program: impl AsRef<Path>) -> Command {
    let mut command = client.command(program);
    command.env("PGUSER", "mesh").env("PGDATABASE", "postgres");
    command
}
