//! A program in a pod, driven line by line: the test binary run again inside the pod's cgroup and network namespace.
//!
//! So the tests need no other program, and every system call a pod makes is chosen by the test.
use std::{
    collections::HashMap,
    fmt::Write as _,
    fs,
    io::{self, BufRead, BufReader, Read, Write},
    net::{SocketAddr, UdpSocket},
    os::fd::AsFd,
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

use marline::{bpf::probe, sys::netns::Netns};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, Socket, Type};

const ENVIRONMENT: &str = "MARLINE_TEST_HELPER";
const MARK: &str = "@@ ";
pub(crate) const PATIENCE: Duration = Duration::from_secs(8);

/// A helper process in a pod.
pub(crate) struct Helper {
    child: Child,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
}

/// What the helper said, as `key=value` words; an error is `errno`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Answer(HashMap<String, String>);

impl Helper {
    pub(crate) fn start(cgroup: &Path, netns: &Path) -> Self {
        let mut command = rerun(&format!("pod {} {}", cgroup.display(), netns.display()));
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("the helper starts");
        let stdin = child.stdin.take().expect("piped");
        let stdout = BufReader::new(child.stdout.take().expect("piped"));
        Self { child, stdin, stdout }
    }

    pub(crate) fn ask(&mut self, line: &str) -> Answer {
        self.begin(line);
        self.finish()
    }

    /// Sends a command whose answer is fetched later with `finish`.
    pub(crate) fn begin(&mut self, line: &str) {
        writeln!(self.stdin, "{line}").expect("the helper lives");
    }

    pub(crate) fn finish(&mut self) -> Answer {
        let mut line = String::new();
        loop {
            line.clear();
            assert_ne!(self.stdout.read_line(&mut line).expect("the helper speaks"), 0, "the helper ended");
            // The test harness of the helper prints on the same line.
            if let Some((_, answer)) = line.split_once(MARK) {
                let words = answer.split_whitespace().filter_map(|word| word.split_once('='));
                return Answer(words.map(|(key, value)| (key.to_owned(), value.to_owned())).collect());
            }
        }
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Answer {
    pub(crate) fn errno(&self) -> Option<i32> {
        self.0.get("errno").map(|errno| errno.parse().expect("a number"))
    }

    pub(crate) fn word(&self, key: &str) -> &str {
        self.0.get(key).unwrap_or_else(|| panic!("no {key} in {self:?}"))
    }

    pub(crate) fn address(&self, key: &str) -> SocketAddr {
        self.word(key).parse().expect("a socket address")
    }
}

/// The self-test's probe, run by this binary.
pub(crate) fn probe_command(args: &probe::ProbeArgs) -> Command {
    rerun(&format!("probe {}", args.cgroup.display()))
}

/// What the test named `helper` does: nothing, unless this process was started to be one.
pub(crate) fn main() {
    let Ok(words) = std::env::var(ENVIRONMENT) else {
        println!("SKIPPED: helper: it is no test but what the tests run inside pods");
        return;
    };
    match words.split_whitespace().collect::<Vec<_>>()[..] {
        ["pod", cgroup, netns] => pod(Path::new(cgroup), Path::new(netns)),
        ["probe", cgroup] => {
            // The test harness has begun a line, and answers are lines of their own.
            println!();
            let code = probe::probe_main(&probe::ProbeArgs { cgroup: cgroup.into() });
            std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
        }
        ref other => panic!("unknown helper {other:?}"),
    }
}

fn rerun(words: &str) -> Command {
    let mut command = Command::new("/proc/self/exe");
    command.args(["helper", "--exact", "--nocapture", "--test-threads=1"]).env(ENVIRONMENT, words);
    command
}

fn pod(cgroup: &Path, netns: &Path) {
    fs::write(cgroup.join("cgroup.procs"), "0").expect("the cgroup takes the helper");
    let netns = Netns::open(netns).expect("the namespace is there");
    netns.run(serve).expect("the namespace can be entered");
    std::process::exit(0);
}

fn serve() {
    let mut sockets = HashMap::new();
    for line in io::stdin().lines() {
        let line = line.expect("stdin is text");
        let mut words = line.split_whitespace();
        let verb = words.next().unwrap_or_default().to_owned();
        let arguments: HashMap<_, _> = words.filter_map(|word| word.split_once('=')).collect();
        let answer = match carry_out(&verb, &arguments, &mut sockets) {
            Ok(answer) => answer,
            Err(error) => format!("errno={}", error.raw_os_error().unwrap_or_else(|| panic!("{verb}: {error}"))),
        };
        println!("\n{MARK}{answer}");
        io::stdout().flush().expect("stdout is open");
    }
}

fn carry_out(verb: &str, arguments: &HashMap<&str, &str>, sockets: &mut HashMap<String, Socket>) -> io::Result<String> {
    let address = |key: &str| -> SocketAddr {
        arguments.get(key).unwrap_or_else(|| panic!("{verb} without {key}")).parse().expect("an address")
    };
    let named = |sockets: &HashMap<String, Socket>, key: &str| -> io::Result<Socket> {
        sockets.get(arguments[key]).unwrap_or_else(|| panic!("no socket {}", arguments[key])).try_clone()
    };
    let name = arguments.get("as").unwrap_or(&"it").to_string();
    match verb {
        "connect" => {
            let socket = open(address("to"), arguments)?;
            let answer = connect(&socket, address("to"), arguments.contains_key("nonblock"))?;
            sockets.insert(name, socket);
            Ok(answer)
        }
        // A socket that was made earlier, with `open`.
        "connect-on" => connect(&named(sockets, "on")?, address("to"), false),
        "open" => {
            sockets.insert(name, open(address("to"), arguments)?);
            Ok("done=1".into())
        }
        "hammer" => {
            let millis = Duration::from_millis(arguments["millis"].parse().expect("a number"));
            let (start, mut tried, mut connected) = (Instant::now(), 0, 0);
            while start.elapsed() < millis {
                tried += 1;
                connected += i32::from(open(address("to"), arguments)?.connect(&address("to").into()).is_ok());
            }
            Ok(format!("tried={tried} connected={connected}"))
        }
        "listen" => {
            let socket = open(address("at"), arguments)?;
            socket.set_reuse_address(true)?;
            socket.bind(&address("at").into())?;
            socket.listen(128)?;
            let local = socket.local_addr()?.as_socket().expect("an IP socket");
            sockets.insert(name, socket);
            Ok(format!("local={local}"))
        }
        "accept" => {
            let (socket, from) = named(sockets, "on")?.accept()?;
            socket.set_read_timeout(Some(PATIENCE))?;
            let answer = format!("accepted={} {}", from.as_socket().expect("an IP socket"), names(&socket)?);
            sockets.insert(name, socket);
            Ok(answer)
        }
        "names" => names(&named(sockets, "on")?),
        "send" => {
            named(sockets, "on")?.write_all(arguments["data"].as_bytes())?;
            Ok("done=1".into())
        }
        "receive" => {
            let mut buffer = [0; 4096];
            let read = named(sockets, "on")?.read(&mut buffer)?;
            Ok(format!("data={} bytes={read}", String::from_utf8_lossy(&buffer[..read])))
        }
        "close" => {
            sockets.remove(arguments["on"]);
            Ok("done=1".into())
        }
        "udp" => {
            let to = address("to");
            let socket = UdpSocket::bind(if to.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" })?;
            socket.set_read_timeout(Some(PATIENCE))?;
            socket.connect(to)?;
            socket.send(b"ping")?;
            let mut buffer = [0; 16];
            let read = socket.recv(&mut buffer)?;
            Ok(format!("data={}", String::from_utf8_lossy(&buffer[..read])))
        }
        "udp-echo" => {
            let socket = UdpSocket::bind(address("at"))?;
            std::thread::spawn(move || {
                let mut buffer = [0; 16];
                while let Ok((read, from)) = socket.recv_from(&mut buffer) {
                    let _ = socket.send_to(&buffer[..read], from);
                }
            });
            Ok("done=1".into())
        }
        other => panic!("unknown command {other}"),
    }
}

fn open(family_of: SocketAddr, arguments: &HashMap<&str, &str>) -> io::Result<Socket> {
    let protocol = if arguments.contains_key("mptcp") { Protocol::MPTCP } else { Protocol::TCP };
    let socket = Socket::new(Domain::for_address(family_of), Type::STREAM, Some(protocol))?;
    socket.set_read_timeout(Some(PATIENCE))?;
    socket.set_write_timeout(Some(PATIENCE))?;
    if let Some(device) = arguments.get("device") {
        socket.bind_device(Some(device.as_bytes()))?;
    }
    if let Some(source) = arguments.get("bind") {
        socket.set_reuse_address(true)?;
        socket.bind(&source.parse::<SocketAddr>().expect("an address").into())?;
    }
    Ok(socket)
}

fn connect(socket: &Socket, to: SocketAddr, nonblock: bool) -> io::Result<String> {
    if nonblock {
        socket.set_nonblocking(true)?;
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() == Some(libc::EINPROGRESS) => {}
            result => result?,
        }
        let mut waiting = [PollFd::new(socket.as_fd(), PollFlags::POLLOUT)];
        poll(&mut waiting, PollTimeout::try_from(PATIENCE).expect("fits"))?;
        if let Some(error) = socket.take_error()? {
            return Err(error);
        }
        socket.set_nonblocking(false)?;
    } else {
        socket.connect(&to.into())?;
    }
    match names(socket) {
        // Connected, and reset since.
        Err(error) if error.raw_os_error() == Some(libc::ENOTCONN) => Ok("reset=1".into()),
        names => names,
    }
}

fn names(socket: &Socket) -> io::Result<String> {
    let mut answer = String::new();
    for (key, address) in [("peer", socket.peer_addr()?), ("local", socket.local_addr()?)] {
        let _ = write!(answer, "{key}={} ", address.as_socket().expect("an IP socket"));
    }
    Ok(answer)
}
