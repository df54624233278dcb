//! Proves for one pod that both directions are captured: not that the kernel accepted the hooks, but that connections come.
//!
//! Outbound, a process in the pods' cgroup and the pod's namespace connects to a documentation address and must arrive at the
//! agent's outbound listener with that destination. Inbound, the agent connects to the pod's own address, at a port nobody
//! uses, and must meet itself at its inbound listener. The listeners belong to the proxy, whose accept loops show every
//! connection to [`SelfTest::claim_outbound`] or [`SelfTest::claim_inbound`] first and end in order those that are claimed.
use std::{
    collections::HashMap,
    fmt, io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    net::TcpSocket,
    process::Command,
    sync::oneshot,
    time::{error::Elapsed, timeout},
};

use super::{
    BpfError, Capture,
    probe::{ProbeArgs, Request},
    prober::Probers,
};
use crate::sys::netns::{Netns, NetnsCookie};

/// For each step; the steps are local, but the machine may be slow.
const PATIENCE: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum SelfTestError {
    #[error(
        "outbound capture is not effective for {netns} ({family}): {detail}; make sure that `capture.cgroup` ({cgroup}) is in the \
         cgroup2 hierarchy that the pods' processes live in, and that no other program on it turns connections around"
    )]
    Outbound { netns: PathBuf, family: Family, cgroup: PathBuf, detail: String },
    #[error(
        "inbound capture is not effective for {netns}: {detail}; make sure that this host can reach {address} and that the \
         namespace holds that address"
    )]
    Inbound { netns: PathBuf, address: IpAddr, detail: String },
    #[error("the probe could not be asked")]
    Probe(#[source] io::Error),
    #[error("the pod could not be connected to")]
    Connect(#[source] io::Error),
    #[error(transparent)]
    Bpf(#[from] BpfError),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    V4,
    V6,
}

/// The pod to test: enrolled, with its listeners being accepted from.
#[derive(Debug)]
pub struct ProbedPod<'a> {
    pub netns: &'a Netns,
    /// Which outbound listeners there are.
    pub outbound: &'a [Family],
    /// The addresses at which the pod must be captured.
    pub addresses: &'a [IpAddr],
}

/// Runs self-tests and recognises their connections. Cheap to clone.
#[derive(Clone)]
pub struct SelfTest {
    capture: Capture,
    probers: Arc<Probers>,
    expected: Arc<Mutex<HashMap<Expected, oneshot::Sender<()>>>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Expected {
    Outbound { netns: NetnsCookie, destination: SocketAddr },
    Inbound { netns: NetnsCookie, client_port: u16, local: SocketAddr },
}

impl SelfTest {
    /// With this very binary as the prober.
    pub fn new(capture: Capture) -> Self {
        Self::with_command(capture, |args| {
            let mut command = Command::new("/proc/self/exe");
            command.arg("internal-probe").arg("--cgroup").arg(&args.cgroup);
            command
        })
    }

    /// With another way to start [`super::probe::probe_main`], for programs that are not `marline`.
    pub fn with_command(capture: Capture, command: impl Fn(&ProbeArgs) -> Command + Send + Sync + 'static) -> Self {
        let probers = Probers::new(capture.cgroup().to_path_buf(), command);
        Self { capture, probers, expected: Arc::default() }
    }

    /// Whether a connection at an outbound listener is a self-test's. If so it has served its purpose: drop it.
    pub fn claim_outbound(&self, netns: NetnsCookie, destination: SocketAddr) -> bool {
        self.claim(&Expected::Outbound { netns, destination })
    }

    /// Whether a connection at an inbound listener is a self-test's. If so it has served its purpose: drop it.
    pub fn claim_inbound(&self, netns: NetnsCookie, client: SocketAddr, local: SocketAddr) -> bool {
        self.claim(&Expected::Inbound { netns, client_port: client.port(), local })
    }

    /// Tests every direction, family and address of the pod, and names the first that fails. Bounded in time.
    pub async fn run(&self, pod: &ProbedPod<'_>) -> Result<(), SelfTestError> {
        for family in pod.outbound {
            self.outbound(pod.netns, *family).await?;
        }
        for address in pod.addresses {
            self.inbound(pod.netns, *address).await?;
        }
        Ok(())
    }

    async fn outbound(&self, netns: &Netns, family: Family) -> Result<(), SelfTestError> {
        let destination = SocketAddr::new(family.nowhere(), random_port());
        let failed = |detail: String| SelfTestError::Outbound {
            netns: netns.path().to_path_buf(),
            family,
            cgroup: self.capture.cgroup().to_path_buf(),
            detail,
        };
        let _pass = self.capture.allow_probe(netns.cookie(), destination)?;
        let arrival = self.expect(Expected::Outbound { netns: netns.cookie(), destination });
        let request = Request { netns: netns.path().to_path_buf(), connect: destination };
        self.probers.ask(request, PATIENCE).await.map_err(SelfTestError::Probe)?.map_err(failed)?;
        arrival.wait().await.map_err(|()| failed("the probe's connection did not come to the agent".into()))
    }

    async fn inbound(&self, netns: &Netns, address: IpAddr) -> Result<(), SelfTestError> {
        let target = SocketAddr::new(address, random_port());
        let failed = |detail: String| SelfTestError::Inbound { netns: netns.path().to_path_buf(), address, detail };
        let _pass = self.capture.allow_probe(netns.cookie(), target)?;
        let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        let any: IpAddr = if address.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
        let socket = socket.map_err(SelfTestError::Connect)?;
        socket.bind(SocketAddr::new(any, 0)).map_err(SelfTestError::Connect)?;
        let client_port = socket.local_addr().map_err(SelfTestError::Connect)?.port();
        let arrival = self.expect(Expected::Inbound { netns: netns.cookie(), client_port, local: target });
        match timeout(PATIENCE, socket.connect(target)).await {
            Ok(Ok(_connection)) => {}
            Ok(Err(error)) => return Err(failed(format!("connect to {target}: {error}"))),
            Err(Elapsed { .. }) => return Err(failed(format!("connect to {target}: no answer"))),
        }
        arrival.wait().await.map_err(|()| failed(format!("the connection to {target} did not come to the agent")))
    }

    fn expect(&self, expected: Expected) -> Arrival<'_> {
        let (sender, arrived) = oneshot::channel();
        self.expected().insert(expected, sender);
        Arrival { test: self, expected, arrived }
    }

    fn claim(&self, expected: &Expected) -> bool {
        // Sending fails only if the test has just given up; the connection was its own all the same.
        self.expected().remove(expected).map(|waiting| waiting.send(())).is_some()
    }

    fn expected(&self) -> MutexGuard<'_, HashMap<Expected, oneshot::Sender<()>>> {
        self.expected.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for SelfTest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SelfTest").field("expected", &self.expected).finish_non_exhaustive()
    }
}

/// A connection that is to be claimed; no longer expected when this is dropped.
struct Arrival<'a> {
    test: &'a SelfTest,
    expected: Expected,
    arrived: oneshot::Receiver<()>,
}

impl Arrival<'_> {
    async fn wait(mut self) -> Result<(), ()> {
        match timeout(PATIENCE, &mut self.arrived).await {
            Ok(Ok(())) => Ok(()),
            _ => Err(()),
        }
    }
}

impl Drop for Arrival<'_> {
    fn drop(&mut self) {
        self.test.expected().remove(&self.expected);
    }
}

impl Family {
    /// An address that is reserved for documentation: nothing answers there, so an answer is the agent's.
    fn nowhere(self) -> IpAddr {
        match self {
            Self::V4 => Ipv4Addr::new(192, 0, 2, rand::random_range(1..255)).into(),
            Self::V6 => Ipv6Addr::new(0x2001, 0xdb8, 0xffff, 0, 0, 0, 0, rand::random_range(1..u16::MAX)).into(),
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// From the ports that are handed out to clients, where a pod's services do not listen.
fn random_port() -> u16 {
    rand::random_range(49152..=65535)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_self_test_can_be_spawned() {
        fn spawnable<F: Future + Send>(_: impl Fn(&'static SelfTest, &'static ProbedPod<'static>) -> F) {}
        spawnable(|test, pod| test.run(pod));
    }
}
