//! A CA and the certificates of pods, made by the program openssl, where no agent is that would make them: for the proxies that Marline is
//! put beside. (A library would do it as well, but xtask is built on this crate, and stays free of a library for TLS.) The files are
//! those of Istio's `cacerts`. Certificates that are wrong in some respect are the scenarios' own matter.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context, Result};

use crate::{config::TRUST_DOMAIN, process::succeed, wait::seconds};

/// A certificate chain, its key, and the roots that others' chains are checked against, in PEM.
#[derive(Clone, Debug)]
pub struct Files {
    pub chain: PathBuf,
    pub key: PathBuf,
    pub roots: PathBuf,
}

/// Whoever signs. Its certificates live a day.
#[derive(Clone, Debug)]
pub struct Signer {
    directory: PathBuf,
}

const CURVE: [&str; 4] = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"];

impl Signer {
    /// A new CA in a directory, which is made.
    pub fn create(directory: &Path) -> Result<Self> {
        fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        let signer = Self { directory: directory.to_owned() };
        let mut command = Command::new("openssl");
        command.args(["req", "-x509", "-nodes", "-days", "2", "-subj"]).arg(format!("/O={TRUST_DOMAIN}")).args(CURVE);
        command.args(["-addext", "keyUsage=critical,keyCertSign,cRLSign", "-keyout"]).arg(signer.key());
        command.arg("-out").arg(signer.roots());
        succeed(&mut command, seconds(20)).context("making a CA")?;
        Ok(signer)
    }

    /// Signs a certificate for an identity, and writes it to files of that name.
    pub fn issue(&self, directory: &Path, name: &str, identity: &str) -> Result<Files> {
        let file = |kind: &str| directory.join(format!("{name}.{kind}"));
        let (request, key, chain) = (file("csr"), file("key"), file("pem"));
        let mut command = Command::new("openssl");
        command.args(["req", "-new", "-nodes", "-subj"]).arg(format!("/O={TRUST_DOMAIN}")).args(CURVE);
        command.arg("-addext").arg(format!("subjectAltName=URI:{identity}"));
        command.args(["-addext", "keyUsage=critical,digitalSignature"]);
        command.args(["-addext", "extendedKeyUsage=serverAuth,clientAuth", "-keyout"]).arg(&key);
        command.arg("-out").arg(&request);
        succeed(&mut command, seconds(20)).with_context(|| format!("asking for a certificate for {identity}"))?;
        let mut command = Command::new("openssl");
        command.args(["x509", "-req", "-days", "1", "-copy_extensions", "copy", "-CA"]).arg(self.roots());
        command.arg("-CAkey").arg(self.key()).arg("-in").arg(&request).arg("-out").arg(&chain);
        succeed(&mut command, seconds(20)).with_context(|| format!("signing a certificate for {identity}"))?;
        Ok(Files { chain, key, roots: self.roots() })
    }

    fn roots(&self) -> PathBuf {
        self.directory.join("root-cert.pem")
    }

    fn key(&self) -> PathBuf {
        self.directory.join("ca-key.pem")
    }
}
