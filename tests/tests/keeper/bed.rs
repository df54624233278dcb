//! A keeper in a directory of its own, programs under `marline run`, and agents that can be killed: this test binary run again,
//! as an agent that does line by line what the test says.

use std::{
    cell::RefCell,
    io::{self, BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{
        Arc, OnceLock,
        mpsc::{self, Receiver},
    },
    thread,
    time::{Duration, Instant},
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
pub(crate) async fn next(link: &Link) -> Arc<Held> {
    Arc::new(soon(link.next()).await.unwrap().expect("the keeper lives"))
}

/// The next call.
pub(crate) async fn call(held: &Arc<Held>) -> Pending {
    soon(waited_for(held)).await
}

/// What the program says, while calls that go on in any case do so.
pub(crate) async fn line(held: &Arc<Held>, program: &Program) -> String {
    let mut said = None;
    let end = Instant::now() + seconds(30);
    while said.is_none() {
        assert!(Instant::now() < end, "it says nothing");
        go_on(held);
        said = program.spoke();
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    said.unwrap()
}

/// Lets a program start: until it waits for what it is told.
pub(crate) async fn started(held: &Arc<Held>, program: &Program) {
    let end = Instant::now() + seconds(30);
    let waits = || {
        let call = std::fs::read_to_string(format!("/proc/{}/syscall", program.pid())).unwrap_or_default();
        call.starts_with(&format!("{} 0x0 ", libc::SYS_read))
    };
    while !waits() {
        assert!(Instant::now() < end, "it does not start");
        go_on(held);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

thread_local! {
    /// A call that came while something else was waited for.
    static NEXT: RefCell<Option<Pending>> = const { RefCell::new(None) };
}

fn go_on(held: &Arc<Held>) {
    while NEXT.with_borrow(Option::is_none)
        && let Some(pending) = held.try_recv().unwrap()
    {
        if pending.notification.call.goes_on() {
            pending.answer(Answer::Continue).unwrap();
        } else {
            NEXT.set(Some(pending));
        }
    }
}

/// The next call that waits for its answer; those that go on in any case do so.
async fn waited_for(held: &Arc<Held>) -> Pending {
    if let Some(pending) = NEXT.take() {
        return pending;
    }
    loop {
        let pending = held.recv().await.unwrap().unwrap();
        if !pending.notification.call.goes_on() {
            return pending;
        }
        pending.answer(Answer::Continue).unwrap();
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
    let (mut link, mut held, mut pending) = (None, None, None);
    for line in io::stdin().lines() {
        let line = line.unwrap();
        let answer = match line.as_str() {
            "link" => {
                let opened = runtime.block_on(Link::open(Path::new(&dir))).unwrap();
                opened.ready().unwrap();
                link = Some(opened);
                "linked".to_owned()
            }
            "held" => {
                let next = runtime.block_on(link.as_ref().unwrap().next()).unwrap().unwrap();
                held = Some(Arc::new(next));
                held.as_ref().unwrap().id.to_string()
            }
            "recv" => {
                let call = runtime.block_on(waited_for(held.as_ref().unwrap()));
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
                let held = held.clone().unwrap();
                runtime.spawn(async move { serve(&held).await });
                "serving".to_owned()
            }
            other => panic!("what is {other}?"),
        };
        println!("\n{MARK}{answer}");
    }
    std::process::exit(0);
}

/// Answers each call after a moment in which the agent may be killed.
async fn serve(held: &Arc<Held>) {
    while let Ok(Some(mut pending)) = held.recv().await {
        if pending.notification.call.goes_on() {
            let _ = pending.answer(Answer::Continue);
            continue;
        }
        pending.begin();
        tokio::task::yield_now().await;
        let _ = pending.answer(Answer::Value(0));
    }
}
