//! A keeper in a directory of its own, programs under `marline run`, and agents that can be killed: this test binary run again,
//! as an agent that does line by line what the test says.

use std::{
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, OnceLock,
        mpsc::{self, Receiver},
    },
    thread,
};

use marline::{
    keeper::{Held, Link, Pending},
    sys::seccomp::{Answer, Call},
};
use marline_tests::{
    agent,
    process::{Process, succeed},
    wait::{Look, seconds, wait_for},
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use tempfile::TempDir;
use tokio::{
    sync::mpsc::{UnboundedReceiver, error::TryRecvError, unbounded_channel},
    task::JoinHandle,
};

const AGENT: &str = "MARLINE_TEST_KEPT_AGENT";
const MARK: &str = "@@ ";

/// Longer than any test takes: who waits for it, fails.
pub(crate) const LONG: &str = "10m";

pub(crate) struct Bed {
    dir: TempDir,
    keeper: Process,
}

impl Bed {
    /// Starts a keeper and waits until it listens.
    pub(crate) fn new(patience: &str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut command = marline();
        command.args(["keeper", "--patience", patience, "--dir"]).arg(dir.path().join("k"));
        let keeper = Process::start("keeper", &mut command, &dir.path().join("keeper.log")).unwrap();
        let bed = Self { dir, keeper };
        bed.keeper_says("keeping");
        bed
    }

    pub(crate) fn dir(&self) -> PathBuf {
        self.dir.path().join("k")
    }

    pub(crate) fn log(&self) -> String {
        self.keeper.log()
    }

    pub(crate) fn keeper_says(&self, words: &str) {
        wait_for(format!("the keeper to say {words:?}"), seconds(20), || {
            Ok(if self.log().contains(words) { Look::Done(()) } else { Look::NotYet(self.log()) })
        })
        .unwrap();
    }

    /// How many notify descriptors the keeper holds, as the kernel sees it.
    pub(crate) fn keeper_holds(&self, count: usize) {
        let dir = format!("/proc/{}/fd", self.keeper.pid());
        wait_for(format!("the keeper to hold {count} descriptors"), seconds(20), || {
            let links = std::fs::read_dir(&dir)?.filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok());
            let held = links.filter(|link| link == Path::new("anon_inode:seccomp notify")).count();
            Ok(if held == count { Look::Done(()) } else { Look::NotYet(format!("{held}")) })
        })
        .unwrap();
    }

    /// `marline run` with this keeper; the command is to be added.
    pub(crate) fn run(&self) -> Command {
        let mut command = marline();
        command.arg("run").arg("--keeper").arg(self.dir()).arg("--");
        command
    }

    /// A Python program under the filter; an isolated one: else Python itself may ask for the user's name, by a connect.
    pub(crate) fn python(&self, script: &str) -> Program {
        Program::start(self.run().arg(python()).args(["-Iuc", script]))
    }

    /// The agent's side, in this process.
    pub(crate) async fn link(&self) -> Link {
        soon(Link::open(&self.dir())).await.unwrap()
    }

    /// An agent in a process of its own.
    pub(crate) fn agent(&self) -> Agent {
        let mut command = Command::new("/proc/self/exe");
        command.args(["agent_process", "--exact", "--nocapture", "--test-threads=1"]).env(AGENT, self.dir());
        Agent(Program::start(&mut command))
    }
}

/// Whatever it is, it comes in time.
pub(crate) async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(seconds(30), what).await.expect("in time")
}

/// The next descriptor.
pub(crate) async fn next(link: &Link) -> Calls {
    Calls::of(soon(link.next()).await.unwrap().expect("the keeper lives"))
}

/// The next call that waits for its answer.
pub(crate) async fn call(calls: &mut Calls) -> Pending {
    soon(calls.waiting.recv()).await.expect("a task lives")
}

/// The calls under one filter. Those that go on in any case do so, whatever the test waits for meanwhile.
pub(crate) struct Calls {
    pub held: Arc<Held>,
    waiting: UnboundedReceiver<Pending>,
    going_on: JoinHandle<()>,
}

impl Calls {
    fn of(held: Held) -> Self {
        let held = Arc::new(held);
        let (found, waiting) = unbounded_channel();
        let receiving = held.receiver().unwrap();
        let going_on = tokio::spawn(async move {
            while let Ok(Some(pending)) = receiving.recv().await {
                if pending.notification.call.goes_on() {
                    pending.answer(Answer::Continue).unwrap();
                } else if found.send(pending).is_err() {
                    return;
                }
            }
        });
        Self { held, waiting, going_on }
    }

    /// A call that has come already.
    pub(crate) fn next_now(&mut self) -> Result<Pending, TryRecvError> {
        self.waiting.try_recv()
    }

    /// Waits until no task is left; no call must be.
    pub(crate) async fn end(&mut self) {
        let call = soon(self.waiting.recv()).await;
        assert!(call.is_none(), "{call:?}");
    }

    /// From now on nothing is received but by the test itself.
    pub(crate) async fn stop(&mut self) -> Arc<Held> {
        self.going_on.abort();
        let _ = (&mut self.going_on).await;
        self.held.clone()
    }
}

impl Drop for Calls {
    fn drop(&mut self) {
        self.going_on.abort();
    }
}

/// The interpreter itself: what is found by its name may be a script with connects of its own.
pub(crate) fn python() -> &'static str {
    static PYTHON: OnceLock<String> = OnceLock::new();
    PYTHON.get_or_init(|| {
        let mut command = Command::new("python3");
        succeed(command.args(["-c", "import sys; print(sys.executable)"]), seconds(60)).unwrap().trim().to_owned()
    })
}

pub(crate) fn marline() -> Command {
    Command::new(agent::binary().unwrap())
}

/// A program that is talked with by lines. Killed when dropped.
pub(crate) struct Program {
    child: Child,
    stdin: Option<ChildStdin>,
    lines: Receiver<String>,
}

impl Program {
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (sender, lines) = mpsc::channel();
        thread::spawn(move || {
            for line in stdout.lines().map_while(Result::ok) {
                // The test may have seen enough.
                let _ = sender.send(line);
            }
        });
        let stdin = child.stdin.take();
        Self { child, stdin, lines }
    }

    pub(crate) fn say(&mut self, line: &str) {
        writeln!(self.stdin.as_mut().unwrap(), "{line}").unwrap();
    }

    pub(crate) fn line(&self) -> String {
        self.lines.recv_timeout(seconds(30)).expect("a line in time")
    }

    /// Whether it has said something.
    pub(crate) fn spoke(&self) -> Option<String> {
        self.lines.try_recv().ok()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its exit code, at its own end.
    pub(crate) fn code(&mut self) -> Option<i32> {
        drop(self.stdin.take());
        let child = &mut self.child;
        wait_for("the program to end", seconds(30), || {
            Ok(child.try_wait()?.map_or_else(|| Look::NotYet("it runs".into()), Look::Done))
        })
        .unwrap()
        .code()
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An agent in a process of its own.
pub(crate) struct Agent(Program);

impl Agent {
    pub(crate) fn ask(&mut self, line: &str) -> String {
        self.0.say(line);
        loop {
            let line = self.0.line();
            // The harness prints on the same line.
            if let Some((_, answer)) = line.split_once(MARK) {
                return answer.to_owned();
            }
        }
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        kill(Pid::from_raw(self.0.pid().try_into().unwrap()), Signal::SIGKILL).unwrap();
        self.0.child.wait().unwrap();
    }
}

/// What the test of the name `agent_process` does: nothing, unless this process was started to be an agent.
pub(crate) fn agent_process() {
    let Some(dir) = std::env::var_os(AGENT) else {
        println!("SKIPPED: agent_process: it is no test but an agent that the tests start and kill");
        return;
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (mut link, mut calls, mut pending) = (None, None, None);
    for line in io::stdin().lines() {
        let line = line.unwrap();
        let answer = match line.as_str() {
            "link" => {
                link = Some(runtime.block_on(Link::open(Path::new(&dir))).unwrap());
                "linked".to_owned()
            }
            "ready" => {
                link.as_ref().unwrap().ready().unwrap();
                "said".to_owned()
            }
            "held" => {
                let next = runtime.block_on(next(link.as_ref().unwrap()));
                let id = next.held.id.to_string();
                calls = Some(next);
                id
            }
            "recv" => {
                let call = runtime.block_on(call(calls.as_mut().unwrap()));
                let name = match call.notification.call {
                    Call::Connect { .. } => "connect",
                    Call::Accept { .. } => "accept",
                    _ => "other",
                };
                pending = Some(call);
                name.to_owned()
            }
            "begin" => {
                pending.as_mut().unwrap().begin();
                "begun".to_owned()
            }
            "serve" => {
                runtime.spawn(serve(calls.take().unwrap()));
                "serving".to_owned()
            }
            other => panic!("what is {other}?"),
        };
        println!("\n{MARK}{answer}");
    }
    std::process::exit(0);
}

/// Answers each call after a moment in which the agent may be killed.
async fn serve(mut calls: Calls) {
    while let Some(mut pending) = calls.waiting.recv().await {
        pending.begin();
        tokio::task::yield_now().await;
        let _ = pending.answer(Answer::Value(0));
    }
}
