//! Debian packages: finds out what is missing, says so, installs it without starting any service.
//! Which packages a command needs is left to the command.

use std::{
    env,
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::Result;
use nix::{
    fcntl::{Flock, FlockArg},
    unistd::Uid,
};

use crate::step::Step;

/// A program (a name on the PATH, or a file by its absolute path) and the Debian package that brings it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    pub program: &'static str,
    pub package: &'static str,
}

/// Shorthand for tables of needs.
pub(crate) const fn need(program: &'static str, package: &'static str) -> Need {
    Need { program, package }
}

/// Installs the packages of those needs that are not met. `purpose` completes "needed to …".
pub(crate) fn ensure(purpose: &str, needs: &[Need]) -> Result<()> {
    let mut packages: Vec<&str> =
        needs.iter().filter(|need| find(need.program).is_none()).map(|need| need.package).collect();
    packages.sort_unstable();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    install(purpose, &packages)?;
    let missing: Vec<&str> =
        needs.iter().filter(|need| find(need.program).is_none()).map(|need| need.program).collect();
    if missing.is_empty() {
        Ok(())
    } else {
        let step = Step::quiet(format!("installing {}", packages.join(", ")));
        Err(step
            .way_out("is this Debian 12?")
            .fail(format!("apt-get succeeded, but {} is still missing", missing.join(", "))))
    }
}

/// Where a program is, looking also in the sbin folders that a plain user's PATH lacks.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Path::new(program).exists().then(|| program.into());
    }
    let path = env::var_os("PATH").unwrap_or_default();
    let extra = ["/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin"].map(PathBuf::from);
    env::split_paths(&path).chain(extra).map(|dir| dir.join(program)).find(|file| file.is_file())
}

/// Installs packages; for those that `ensure` cannot see by a program.
pub(crate) fn install(purpose: &str, packages: &[&str]) -> Result<()> {
    let list = packages.join(" ");
    let step = Step::begin(format!("installing {list} with apt-get (needed to {purpose}; no service is started)"))
        .way_out(format!("as root: apt-get update && apt-get install {list}"));
    if !Uid::effective().is_root() {
        return Err(step.fail("not root"));
    }
    if find("apt-get").is_none() {
        return Err(step.fail("there is no apt-get; this tool installs packages on Debian only"));
    }
    let _lock = lock(&step)?;
    let _guard = NoServices::set(&step)?;
    let install = || {
        let mut command = apt_get();
        command.args(["install", "-y", "-qq", "--no-install-recommends"]).args(packages);
        command
    };
    if step.output(&mut install()).is_ok() {
        return Ok(());
    }
    // The package lists of a fresh machine are empty, those of an old one name files that are gone.
    update_locked()?;
    step.output(&mut install()).map(drop)
}

/// Downloads one package file into `dir` and unpacks it below `into`, without installing it. `package` may be `name=version`.
pub(crate) fn unpack(package: &str, dir: &Path, into: &Path) -> Result<()> {
    let step = Step::quiet(format!("downloading {package}")).way_out("check the network and /etc/apt/sources.list.d");
    fs::create_dir_all(dir).map_err(|error| step.fail(error))?;
    for entry in fs::read_dir(dir).map_err(|error| step.fail(error))?.flatten() {
        if entry.path().extension().is_some_and(|ext| ext == "deb") {
            let _ = fs::remove_file(entry.path());
        }
    }
    let download = || {
        let mut command = apt_get();
        // As root: the unprivileged download user of apt cannot write into a checkout.
        command.args(["download", "-qq", "-o", "APT::Sandbox::User=root", package]).current_dir(dir);
        command
    };
    if step.output(&mut download()).is_err() {
        update()?;
        step.output(&mut download())?;
    }
    let files = fs::read_dir(dir).map_err(|error| step.fail(error))?.flatten().map(|entry| entry.path());
    let deb = files.into_iter().find(|path| path.extension().is_some_and(|ext| ext == "deb"));
    let deb = deb.ok_or_else(|| step.fail("apt-get left no .deb file"))?;
    let step = Step::quiet(format!("unpacking {package}"));
    step.output(Command::new("dpkg").arg("-x").arg(&deb).arg(into))?;
    let _ = fs::remove_file(deb);
    Ok(())
}

/// Fetches the package lists.
pub(crate) fn update() -> Result<()> {
    let _lock = lock(&Step::quiet("fetching the package lists"))?;
    update_locked()
}

fn update_locked() -> Result<()> {
    let step = Step::begin("fetching the package lists with apt-get update")
        .way_out("check the network and /etc/apt/sources.list.d");
    step.output(apt_get().args(["update", "-qq"])).map(drop)
}

fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.env("DEBIAN_FRONTEND", "noninteractive").args(["-o", "DPkg::Lock::Timeout=600"]);
    command
}

/// Two of these tools at once would trip over apt's own locks, of which only one knows how to wait.
fn lock(step: &Step) -> Result<Flock<File>> {
    let path = "/run/marline-apt.lock";
    let file = OpenOptions::new().create(true).truncate(false).write(true).mode(0o600).open(path);
    let file = file.map_err(|error| step.fail(format!("{path}: {error}")))?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, error)| step.fail(format!("{path}: {error}")))
}

/// While this lives, packages install without starting their services: Debian asks /usr/sbin/policy-rc.d. One that exists is left alone.
struct NoServices {
    ours: bool,
}

const POLICY: &str = "/usr/sbin/policy-rc.d";

impl NoServices {
    fn set(step: &Step) -> Result<Self> {
        let file = OpenOptions::new().write(true).create_new(true).mode(0o755).open(POLICY);
        match file {
            Ok(mut file) => {
                file.write_all(b"#!/bin/sh\nexit 101\n").map_err(|error| step.fail(format!("{POLICY}: {error}")))?;
                Ok(Self { ours: true })
            }
            Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Ok(Self { ours: false }),
            Err(error) => Err(step.fail(format!("{POLICY}: {error}"))),
        }
    }
}

impl Drop for NoServices {
    fn drop(&mut self) {
        if self.ours {
            let _ = fs::remove_file(POLICY);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_found_by_name_and_by_path() {
        assert!(find("sh").is_some());
        assert_eq!(find("/bin/sh"), Some("/bin/sh".into()));
        assert_eq!(find("no-such-program-anywhere"), None);
        assert_eq!(find("/no/such/file"), None);
    }

    #[test]
    fn nothing_is_installed_when_everything_is_there() {
        // Would need root and a package of this name otherwise.
        ensure("test", &[need("sh", "no-such-package")]).unwrap();
    }
}
