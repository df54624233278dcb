//! What the kernel under the demo is, and whether it has TLS: asked of the kernel itself, with a socket.

use std::{
    env, fs, io,
    net::{Ipv4Addr, TcpListener, TcpStream},
    process::{Command, Stdio},
};

use nix::sys::socket::{setsockopt, sockopt::TcpUlp};

pub(crate) struct Kernel {
    pub release: String,
    /// Why there is no kernel TLS, if there is none.
    missing: Option<String>,
}

impl Kernel {
    /// Looks at the kernel that runs this program. Loads the module that has TLS first: nobody else may have done it.
    pub(crate) fn this() -> Self {
        // Where it is built in, or not there at all, this fails; the socket decides.
        let _ = Command::new("modprobe").arg("tls").stdout(Stdio::null()).stderr(Stdio::null()).status();
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default().trim().to_owned();
        Self { release, missing: try_ktls().err().map(|error| error.to_string()) }
    }

    pub(crate) fn has_ktls(&self) -> bool {
        self.missing.is_none()
    }

    /// Whether this is the guest of `cargo xtask vm`.
    pub(crate) fn in_vm(&self) -> bool {
        env::var_os("MARLINE_VM").is_some()
    }

    pub(crate) fn describe(&self) -> String {
        match &self.missing {
            None => "kernel TLS: yes".to_owned(),
            Some(why) => format!("kernel TLS: no, {why}; the agent encrypts itself"),
        }
    }
}

fn try_ktls() -> io::Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    let (_server, _) = listener.accept()?;
    Ok(setsockopt(&client, TcpUlp::default(), b"tls")?)
}
