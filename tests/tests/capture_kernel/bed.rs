//! Two pods on one node, in network namespaces of their own, and an agent with the least proxy that can serve them.
//!
//! Every bed has its own names, cgroup and pins. The tests take turns all the same: a program that one of them is just starting
//! holds copies of every descriptor for a moment, and so would keep a listener alive that another has closed.
use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdListener},
    os::fd::AsFd,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::Duration,
};

use marline::{
    bpf::{
        BpfError, Capture, CaptureSettings, Enrolment, PodListeners,
        selftest::{Family, ProbedPod, SelfTest},
    },
    sys::netns::Netns,
};
use nix::sched::{CloneFlags, setns};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpSocket, TcpStream},
    runtime::{Builder, Runtime},
};

use super::helper::{self, Helper, PATIENCE};

/// Two pods and the node that routes between them.
pub(crate) struct Bed {
    name: String,
    pub(crate) node: Arc<Netns>,
    pub(crate) a: Pod,
    pub(crate) b: Pod,
    pub(crate) settings: CaptureSettings,
    /// Held until the bed is gone.
    turn: Option<MutexGuard<'static, ()>>,
}

pub(crate) struct Pod {
    pub(crate) netns: Arc<Netns>,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    cgroup: PathBuf,
}

/// What the agent's accept loops saw.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Event {
    Outbound { client: SocketAddr, destination: Option<SocketAddr> },
    Inbound { client: SocketAddr, local: SocketAddr },
}

/// The capture room with a proxy around it, on threads that live in the node's namespace.
pub(crate) struct Agent {
    pub(crate) capture: Capture,
    pub(crate) selftest: SelfTest,
    pub(crate) runtime: Runtime,
    pub(crate) events: mpsc::Receiver<Event>,
    sender: mpsc::Sender<Event>,
    node: Arc<Netns>,
}

/// A pod's listeners, being accepted from.
pub(crate) struct Served {
    pub(crate) outbound4: SocketAddr,
    pub(crate) enrolment: Enrolment,
}

impl Bed {
    pub(crate) fn new() -> Self {
        static TURN: Mutex<()> = Mutex::new(());
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let mut bed = Self::build();
        bed.turn = Some(turn);
        bed
    }

    /// A second bed for the same test.
    pub(crate) fn another(&self) -> Self {
        Self::build()
    }

    fn build() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("mk{}x{number}", std::process::id());
        let cgroup = cgroup2().join(&name);
        fs::create_dir(&cgroup).expect("cgroup2 takes a group: the tests need root");
        let settings = CaptureSettings { cgroup: cgroup.clone(), pin_path: Path::new("/sys/fs/bpf").join(&name) };
        let node_path = add_netns(&format!("{name}n"));
        let node = Arc::new(Netns::open(node_path).expect("just made"));
        node.run(|| {
            for knob in ["ipv4/ip_forward", "ipv6/conf/all/forwarding"] {
                fs::write(format!("/proc/sys/net/{knob}"), "1").expect("forwarding can be switched on");
            }
        })
        .expect("the node can be entered");
        let a = Pod::new(&name, 'a', 1, &cgroup);
        let b = Pod::new(&name, 'b', 2, &cgroup);
        Self { name, node, a, b, settings, turn: None }
    }

    pub(crate) fn agent(&self) -> Agent {
        self.try_agent().expect("the agent loads")
    }

    pub(crate) fn try_agent(&self) -> Result<Agent, BpfError> {
        let node = self.node.clone();
        let runtime = Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .on_thread_start(move || setns(node.as_fd(), CloneFlags::CLONE_NEWNET).expect("the node can be entered"))
            .build()
            .expect("a runtime");
        let capture = {
            let _entered = runtime.enter();
            Capture::load(&self.settings)?
        };
        let selftest = SelfTest::with_command(capture.clone(), |args| helper::probe_command(args).into());
        let (sender, events) = mpsc::channel();
        Ok(Agent { capture, selftest, runtime, events, sender, node: self.node.clone() })
    }

    /// An agent that serves both pods, each proven and opened.
    pub(crate) fn ready_agent(&self) -> (Agent, SocketAddr) {
        let agent = self.agent();
        let outbound4 = agent.open(&self.a);
        agent.open(&self.b);
        (agent, outbound4)
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        // The helpers may have died a moment ago; their groups can be removed once the kernel has reaped them.
        if let Err(error) = Capture::unload(&self.settings.pin_path) {
            eprintln!("{}: {error}", self.name);
        }
        for suffix in ["a", "b", "n"] {
            ip(&format!("netns del {}{suffix}", self.name));
        }
        for path in [&self.a.cgroup, &self.b.cgroup, &self.settings.cgroup] {
            remove_cgroup(path);
        }
    }
}

impl Pod {
    fn new(bed: &str, letter: char, number: u8, cgroup: &Path) -> Self {
        let netns = format!("{bed}{letter}");
        let path = add_netns(&netns);
        ip(&format!("-n {bed}n link add name to-{letter} type veth peer name eth0 netns {netns}"));
        for (ns, device, host) in [(format!("{bed}n"), format!("to-{letter}"), 1), (netns.clone(), "eth0".into(), 2)] {
            ip(&format!("-n {ns} addr add 10.77.{number}.{host}/24 dev {device}"));
            ip(&format!("-n {ns} addr add fd77:{number}::{host}/64 dev {device} nodad"));
            ip(&format!("-n {ns} link set {device} up"));
        }
        ip(&format!("-n {netns} route add default via 10.77.{number}.1"));
        ip(&format!("-n {netns} -6 route add default via fd77:{number}::1"));
        let cgroup = cgroup.join(letter.to_string());
        fs::create_dir(&cgroup).expect("the cgroup takes a child");
        let netns = Arc::new(Netns::open(path).expect("just made"));
        let v6 = Ipv6Addr::new(0xfd77, number.into(), 0, 0, 0, 0, 0, 2);
        Self { netns, v4: Ipv4Addr::new(10, 77, number, 2), v6, cgroup }
    }

    pub(crate) fn helper(&self) -> Helper {
        Helper::start(&self.cgroup, self.netns.path())
    }

    /// A socket of the pod that the test itself holds: as if it had taken a duplicate of a program's. What makes it the pod's is
    /// the cgroup that this process is in at its birth.
    pub(crate) fn socket(&self, family_of: SocketAddr) -> Socket {
        let own = fs::read_to_string("/proc/self/cgroup").expect("proc is mounted");
        let own = own.lines().find_map(|line| line.strip_prefix("0::/")).expect("cgroup2 is in use");
        let home = cgroup2().join(own).join("cgroup.procs");
        fs::write(self.cgroup.join("cgroup.procs"), "0").expect("the cgroup takes the test");
        let make = || Socket::new(Domain::for_address(family_of), Type::STREAM, Some(Protocol::TCP));
        let socket = self.netns.run(make).expect("the pod can be entered").expect("a socket");
        fs::write(home, "0").expect("the test can go home");
        socket.set_read_timeout(Some(PATIENCE)).expect("a socket");
        socket.set_write_timeout(Some(PATIENCE)).expect("a socket");
        socket
    }

    pub(crate) fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }
}

impl Agent {
    /// Enrols, self-tests and opens a pod. Gives the address of its outbound IPv4 listener.
    pub(crate) fn open(&self, pod: &Pod) -> SocketAddr {
        let served = self.serve(pod, &pod.addresses());
        self.prove(pod).expect("capture is effective");
        served.enrolment.ready().expect("the pod opens");
        served.outbound4
    }

    pub(crate) fn prove(&self, pod: &Pod) -> Result<(), marline::bpf::selftest::SelfTestError> {
        let outbound = [Family::V4, Family::V6];
        let addresses = pod.addresses();
        let probed = ProbedPod { netns: &pod.netns, outbound: &outbound, addresses: &addresses };
        // The probes come from where the agent lives, which is not where the test's thread is.
        self.node.run(|| self.runtime.block_on(self.selftest.run(&probed))).expect("the node can be entered")
    }

    /// Enrols a pod and accepts from its listeners, without opening it.
    pub(crate) fn serve(&self, pod: &Pod, addresses: &[IpAddr]) -> Served {
        let loopback = ["127.0.0.1:0", "[::1]:0", "127.0.0.1:0", "[::1]:0", "[::ffff:127.0.0.1]:0"];
        let [out4, out6, in4, in6, in4_mapped] = loopback.map(|at| {
            let listener = pod.netns.run(|| StdListener::bind(at)).expect("entered").expect("bound");
            listener.set_nonblocking(true).expect("a socket");
            listener
        });
        let port = |listener: &StdListener| Some(listener.local_addr().expect("bound").port());
        let enrolment = self
            .capture
            .enrol(&PodListeners {
                netns: &pod.netns,
                outbound4: port(&out4),
                outbound6: port(&out6),
                inbound4: Some(in4.as_fd()),
                inbound6: Some(in6.as_fd()),
                inbound4_mapped: Some(in4_mapped.as_fd()),
                addresses,
            })
            .expect("the pod is enrolled");
        let outbound4 = out4.local_addr().expect("bound");
        let _entered = self.runtime.enter();
        for listener in [out4, out6] {
            let listener = TcpListener::from_std(listener).expect("a listener");
            let worker = self.worker(pod);
            self.runtime.spawn(async move {
                while let Ok((stream, client)) = listener.accept().await {
                    tokio::spawn(worker.clone().outbound(stream, client));
                }
            });
        }
        for listener in [in4, in6, in4_mapped] {
            let listener = TcpListener::from_std(listener).expect("a listener");
            let worker = self.worker(pod);
            self.runtime.spawn(async move {
                while let Ok((stream, client)) = listener.accept().await {
                    tokio::spawn(worker.clone().inbound(stream, client));
                }
            });
        }
        Served { outbound4, enrolment }
    }

    pub(crate) fn counter(&self, name: &str) -> u64 {
        let counters = self.capture.counters().expect("counters can be read");
        counters.iter().find(|(counter, _)| *counter == name).unwrap_or_else(|| panic!("no counter {name}")).1
    }

    pub(crate) fn event(&self) -> Event {
        self.events.recv_timeout(Duration::from_secs(8)).expect("the agent sees a connection")
    }

    pub(crate) fn no_more_events(&self) {
        assert_eq!(self.events.try_recv().ok(), None);
    }

    /// What a kill does, as far as the kernel can tell: every descriptor is closed.
    pub(crate) fn die(self) {
        let Self { capture, selftest, runtime, .. } = self;
        runtime.shutdown_timeout(Duration::from_secs(5));
        drop((capture, selftest));
    }

    fn worker(&self, pod: &Pod) -> Worker {
        Worker {
            capture: self.capture.clone(),
            selftest: self.selftest.clone(),
            netns: pod.netns.clone(),
            events: self.sender.clone(),
        }
    }
}

#[derive(Clone)]
struct Worker {
    capture: Capture,
    selftest: SelfTest,
    netns: Arc<Netns>,
    events: mpsc::Sender<Event>,
}

impl Worker {
    async fn outbound(self, mut stream: TcpStream, client: SocketAddr) {
        let netns = self.netns.cookie();
        let origin = self.capture.original_destination(netns, client).expect("the map can be read");
        let destination = origin.map(|origin| origin.address);
        if destination.is_some_and(|destination| self.selftest.claim_outbound(netns, destination)) {
            return;
        }
        let _ = self.events.send(Event::Outbound { client, destination });
        let upstream = match destination {
            Some(destination) => self.upstream(destination).connect(destination).await.map_err(|_| destination),
            None => return reset(stream),
        };
        match upstream {
            Ok(mut upstream) => {
                let _ = copy_bidirectional(&mut stream, &mut upstream).await;
            }
            Err(destination) => {
                self.capture.remember_refused(netns, destination).expect("the map takes it");
                reset(stream);
            }
        }
    }

    async fn inbound(self, mut stream: TcpStream, client: SocketAddr) {
        let local = stream.local_addr().expect("connected");
        if self.selftest.claim_inbound(self.netns.cookie(), client, local) {
            return;
        }
        let _ = self.events.send(Event::Inbound { client, local });
        if local.ip().is_loopback() {
            return reset(stream);
        }
        let leg = self.upstream(local);
        leg.bind(SocketAddr::new(local.ip(), 0)).expect("the pod's own address");
        let source = leg.local_addr().expect("bound");
        let _entry = self.capture.announce_client(self.netns.cookie(), source, client).expect("the map takes it");
        match leg.connect(local).await {
            Ok(mut leg) => {
                let _ = copy_bidirectional(&mut stream, &mut leg).await;
            }
            Err(_) => reset(stream),
        }
    }

    fn upstream(&self, to: SocketAddr) -> TcpSocket {
        let make = || if to.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() };
        self.netns.run(make).expect("entered").expect("a socket")
    }
}

fn reset(stream: TcpStream) {
    stream.set_zero_linger().expect("a socket");
}

fn add_netns(name: &str) -> PathBuf {
    ip(&format!("netns add {name}"));
    ip(&format!("-n {name} link set lo up"));
    Path::new("/run/netns").join(name)
}

pub(crate) fn ip(arguments: &str) {
    let status = Command::new("ip").args(arguments.split_whitespace()).status().expect("ip(8) is installed");
    assert!(status.success(), "ip {arguments}");
}

fn cgroup2() -> PathBuf {
    let mounts = fs::read_to_string("/proc/mounts").expect("proc is mounted");
    let mount = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>()).find(|fields| fields[2] == "cgroup2");
    mount.expect("cgroup2 is mounted")[1].into()
}

/// A group is busy until its last process is reaped.
fn remove_cgroup(path: &Path) {
    for _ in 0..100 {
        match fs::remove_dir(path) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(Duration::from_millis(20)),
            _ => return,
        }
    }
    eprintln!("{} is still busy", path.display());
}
