//! `cargo xtask up`, `exec`, `status` and `down`: a two-node mesh on this box that outlives the command that made it.
//! What a cluster is and how it is made is left to the harness (`marline_tests::cluster`), building to `build`.

use std::{
    fmt::Write as _,
    fs,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use clap::ValueEnum;
use marline_tests::{
    cluster::{Cluster, ClusterSpec, Direct, Family, Membership, Pod, PodSpec, Side, remains},
    config::{Mode, replace},
    traffic::{nginx::Nginx, redis::Redis},
};
use nix::unistd::Uid;
use serde::{Deserialize, Serialize};

use crate::{
    build,
    deps::{self, need},
    step::{self, Step},
};

/// Its name in the kernel (namespaces, cgroups, pins), and where its files are.
pub(crate) const NAME: &str = "marline-dev";
pub(crate) const DIRECTORY: &str = "/run/marline-dev";

/// The exit code of an `exec` that could not run its command; the same as that of docker(1).
pub(crate) const EXIT_NO_EXEC: i32 = 125;

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Two nodes are made of network namespaces, with a routed link between them and an agent on each. In the mesh are client-a and
server-a on node a, client-b and server-b on node b; the pod `outside` on node a is not. nginx and redis run in both servers.
Programs of client-a and server-b run under the seccomp filter (`marline run`): where the kernel's TLS is up to it, their connections
are direct. Each node has a keeper, too, which outlives its agent.
Everything stays until `cargo xtask down`: namespaces marline-dev-*, a cgroup marline-dev, files and logs in /run/marline-dev.

Run it again after a change of the code: it builds, and restarts agents that run an older build. With another --mode it changes
the mode of the running mesh.

  cargo xtask up --mode STRICT
  cargo xtask exec client-a -- curl -s http://server-b/
  cargo xtask down")]
pub(crate) struct UpArgs {
    /// The mesh-wide mTLS mode [default: PERMISSIVE, or as it is]
    #[arg(long, value_enum, ignore_case = true)]
    mode: Option<ModeName>,
    /// Build the agent with optimisations
    #[arg(long)]
    release: bool,
}

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
The command runs in the pod's network namespace and cgroup, as root, with this terminal; names of pods resolve. In client-a and
server-b it is under the seccomp filter. In node-a and node-b, which are no pods, it is where the agent of that node is: there `marline`
asks that agent. The exit code is the command's own, or 125 if it could not be started.

  cargo xtask exec client-a -- curl -s http://server-b/
  cargo xtask exec client-b -- redis-cli -h server-a SET greeting hello
  cargo xtask exec server-a -- bash
  cargo xtask exec node-a -- marline status")]
pub(crate) struct ExecArgs {
    /// client-a, server-a, client-b, server-b, outside, node-a or node-b
    pod: String,
    /// The command and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

/// PeerAuthentication's modes, as Istio writes them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub(crate) enum ModeName {
    Strict,
    Permissive,
    Disable,
}

impl From<ModeName> for Mode {
    fn from(name: ModeName) -> Self {
        match name {
            ModeName::Strict => Self::Strict,
            ModeName::Permissive => Self::Permissive,
            ModeName::Disable => Self::Disable,
        }
    }
}

/// What the programs that a mesh is filled with need.
pub(crate) const NEEDS: [deps::Need; 10] = [
    need("ip", "iproute2"),
    need("nsenter", "util-linux"),
    need("nginx", "nginx-light"),
    need("redis-server", "redis-server"),
    need("redis-cli", "redis-tools"),
    need("curl", "curl"),
    need("iperf3", "iperf3"),
    need("sshd", "openssh-server"),
    need("ssh-keygen", "openssh-client"),
    need("tcpdump", "tcpdump"),
];

/// What a later command has to know.
#[derive(Serialize, Deserialize)]
struct Saved {
    mode: Mode,
    pods: Vec<PodSpec>,
    /// The agent's.
    program: PathBuf,
}

pub(crate) fn up(args: &UpArgs) -> Result<()> {
    require_root()?;
    deps::ensure("fill a mesh with programs", &NEEDS)?;
    let program = build::agent(args.release)?;
    let mode = args.mode.map(Mode::from);
    let cluster = match found()? {
        Some(saved) => again(ClusterSpec { program: Some(program), ..spec_of(&saved) }, mode)?,
        None => {
            let plan = ClusterSpec::pairs(mode.unwrap_or(Mode::Permissive));
            fresh(&ClusterSpec { program: Some(program), direct: Some(direct()), ..plan })?
        }
    };
    print!("{}", overview(&cluster));
    print!("{}", hints(&cluster));
    cluster.stay();
    Ok(())
}

/// Becomes the command; returns only if it cannot.
pub(crate) fn exec(args: &ExecArgs) -> Result<i32> {
    require_root()?;
    let cluster = met()?;
    let node = Side::BOTH.into_iter().find(|side| args.pod == format!("node-{}", side.letter()));
    let place = match node {
        Some(side) => cluster.node(side),
        None => {
            let pod = pod_of(&cluster, &args.pod).with_context(|| {
                let names: Vec<&str> = cluster.pods().map(|pod| pod.name.as_str()).collect();
                format!("the pods are {}, the nodes node-a and node-b", names.join(", "))
            });
            pod?.place
        }
    };
    let (program, arguments) = args.command.split_first().context("no command is given")?;
    let mut command = place.command_with_hosts(&Path::new(DIRECTORY).join("hosts"), program);
    // So that `marline` is the mesh's own.
    if let Some(own) = cluster.program()?.parent() {
        let mut path = own.as_os_str().to_owned();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        command.env("PATH", path);
    }
    Err(command.args(arguments).exec()).with_context(|| format!("cannot run {program} in {}", args.pod))
}

pub(crate) fn status() -> Result<()> {
    require_root()?;
    show(&met()?);
    Ok(())
}

pub(crate) fn show(cluster: &Cluster) {
    print!("{}", overview(cluster));
}

/// Removes the mesh, and whatever is left of one.
pub(crate) fn down() -> Result<()> {
    require_root()?;
    let step = Step::begin("removing the mesh")
        .way_out("look for namespaces (ip netns), cgroups and /sys/fs/bpf/marline-dev-*");
    remains::remove(NAME).map_err(|error| step.fail(format!("{error:#}")))?;
    remains::sweep();
    match fs::remove_dir_all(DIRECTORY) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(step.fail(format!("{DIRECTORY}: {error}"))),
        _ => Ok(()),
    }
}

/// Pods whose programs are under the filter; the others show what it is like without.
const FILTERED: [&str; 2] = ["client-a", "server-b"];

fn pod_of(cluster: &Cluster, name: &str) -> Result<Pod> {
    if FILTERED.contains(&name) { cluster.filtered(name) } else { cluster.pod(name) }
}

fn direct() -> Direct {
    // Agents without optimisation are slower than the agent's default allows for.
    Direct { hold: "100ms".to_owned(), ..Direct::default() }
}

/// Starts the servers that a person finds in the mesh.
pub(crate) fn fill(cluster: &Cluster) -> Result<()> {
    for server in ["server-a", "server-b"] {
        let pod = pod_of(cluster, server)?;
        let greeting = format!("this page comes from {server}");
        for process in [Nginx::start(&pod, &greeting)?.process, Redis::start(&pod, &greeting)?.process] {
            process.detach();
        }
    }
    Ok(())
}

/// Nobody's mesh is to be removed by surprise.
pub(crate) fn require_none() -> Result<()> {
    ensure!(found()?.is_none(), "a mesh is up already; way out: cargo xtask down");
    Ok(())
}

/// Lets later commands find this cluster, which must be of this name and in this directory.
pub(crate) fn save(cluster: &Cluster, pods: &[PodSpec]) -> Result<()> {
    let mut hosts = "127.0.0.1 localhost\n::1 localhost\n".to_owned();
    for pod in cluster.pods() {
        writeln!(hosts, "{} {name}\n{} {name}", pod.v4, pod.v6, name = pod.name)?;
    }
    replace(&cluster.directory().join("hosts"), &hosts)?;
    let program = cluster.program()?;
    let saved = Saved { mode: cluster.mode(), pods: pods.to_vec(), program };
    replace(&cluster.directory().join("state.json"), &serde_json::to_string_pretty(&saved)?)
}

pub(crate) fn require_root() -> Result<()> {
    ensure!(
        Uid::effective().is_root(),
        "this needs root (network namespaces, cgroups, eBPF); way out: run it with sudo"
    );
    Ok(())
}

/// What `up` has left, if the kernel still has it, too: /run may survive what a person removes by hand.
fn found() -> Result<Option<Saved>> {
    let file = Path::new(DIRECTORY).join("state.json");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("cannot read {}", file.display())),
    };
    // What an older build of this tool has written is no mesh that this one could go on with.
    let Ok(saved) = serde_json::from_str::<Saved>(&text) else { return Ok(None) };
    let cluster = Cluster::meet(NAME, Path::new(DIRECTORY), &spec_of(&saved))?;
    let there = cluster.pods().all(|pod| pod.place.netns.exists() && pod.place.cgroup.exists());
    Ok(there.then_some(saved))
}

fn met() -> Result<Cluster> {
    let Some(saved) = found()? else { bail!("no mesh is up; way out: cargo xtask up") };
    Cluster::meet(NAME, Path::new(DIRECTORY), &spec_of(&saved))
}

fn spec_of(saved: &Saved) -> ClusterSpec {
    let (pods, program) = (saved.pods.clone(), Some(saved.program.clone()));
    ClusterSpec { pods, direct: Some(direct()), program, ..ClusterSpec::pairs(saved.mode) }
}

fn fresh(spec: &ClusterSpec) -> Result<Cluster> {
    let step = Step::begin("making two nodes with their pods").way_out("cargo xtask down, then try again");
    let directory = Path::new(DIRECTORY);
    remains::remove(NAME).map_err(|error| step.fail(format!("{error:#}")))?;
    // Logs and certificates of another mesh would only mislead.
    let _ = fs::remove_dir_all(directory);
    let mut cluster =
        Cluster::create_lasting(NAME, directory, spec).map_err(|error| step.fail(format!("{error:#}")))?;
    let step = Step::begin("starting the agents and their keepers").way_out("the logs above tell why");
    cluster.start_agents().map_err(|error| step.fail(format!("{error:#}\n{}", cluster.report())))?;
    // After the keepers, which those under the filter need.
    fill(&cluster)?;
    save(&cluster, &spec.pods)?;
    Ok(cluster)
}

/// The mesh is there: brings agents and mode to what is asked for.
fn again(spec: ClusterSpec, mode: Option<Mode>) -> Result<Cluster> {
    let mut cluster = Cluster::meet(NAME, Path::new(DIRECTORY), &spec)?;
    step::say(&format!("the mesh is up already, in mode {}", cluster.mode().as_str()));
    let mut started = Vec::new();
    for side in Side::BOTH {
        if cluster.keeper_mut(side)?.pid().is_none() {
            step::say(&format!(
                "keeper {} does not run: starting it anew; programs under its filter have to be, too",
                side.letter()
            ));
            cluster.start_keeper(side)?;
        }
        let agent = cluster.agent(side)?;
        let why = match (agent.pid(), agent.is_outdated()) {
            (None, _) => "does not run",
            (Some(_), true) => "runs an older build",
            (Some(_), false) => continue,
        };
        step::say(&format!("agent {} {why}: starting it anew", side.letter()));
        cluster.launch_agent(side)?;
        started.push(side);
    }
    let step = Step::quiet("starting the agents anew").way_out("the agents' logs above tell why; or: cargo xtask down");
    for side in started {
        let ready = cluster.agent_mut(side)?.wait_ready();
        ready.map_err(|error| step.fail(format!("{error:#}\n{}", cluster.report())))?;
    }
    if let Some(mode) = mode.filter(|mode| *mode != cluster.mode()) {
        let step = Step::begin(format!("changing the mode to {}", mode.as_str())).way_out("see the agents' logs");
        cluster.change_mode(mode).map_err(|error| step.fail(format!("{error:#}")))?;
        save(&cluster, &spec.pods)?;
    }
    Ok(cluster)
}

/// Pods with what their agents say of them.
fn overview(cluster: &Cluster) -> String {
    let mut text = format!("\nmode {}, files in {DIRECTORY}\n\n", cluster.mode().as_str());
    let mut line = |cells: [&str; 5]| {
        let [pod, node, v4, v6, state] = cells;
        text.push_str(format!("{pod:<10} {node:<5} {v4:<12} {v6:<16} {state}").trim_end());
        text.push('\n');
    };
    line(["POD", "NODE", "IPV4", "IPV6", "STATE"]);
    for pod in cluster.pods() {
        let known = cluster.agent(pod.side).and_then(|agent| {
            ensure!(agent.pid().is_some(), "no agent runs");
            agent.pods()
        });
        let state = match (known, pod.membership) {
            (_, Membership::Outside | Membership::Unknown | Membership::Impostor) => "not in the mesh".to_owned(),
            (Err(error), _) => format!("unknown: {error:#}"),
            (Ok(pods), Membership::Mesh) => pods.iter().find(|known| known.netns == pod.place.netns).map_or_else(
                || "not enrolled".to_owned(),
                |known| format!("{}, {} {}", known.state, known.identity, known.reason.as_deref().unwrap_or_default()),
            ),
        };
        let (v4, v6) = (pod.address(Family::V4).to_string(), pod.address(Family::V6).to_string());
        line([&pod.name, pod.side.letter(), &v4, &v6, &state]);
    }
    text
}

fn hints(cluster: &Cluster) -> String {
    let other = if cluster.mode() == Mode::Strict { "PERMISSIVE" } else { "STRICT" };
    let lines = [
        ("cargo xtask exec client-a -- curl -s http://server-b/", "through the mesh, from node a to node b"),
        (
            "cargo xtask exec outside -- curl -s http://server-b/",
            "from outside: PERMISSIVE lets it in, STRICT does not",
        ),
        ("cargo xtask exec client-b -- redis-cli -h server-a PING", "the other way"),
        (&format!("ip netns exec {NAME}-a tcpdump -ni link0 -A tcp port 80"), "what a stranger on the link sees"),
        ("cargo xtask exec node-a -- marline status", "is node a well"),
        (
            "cargo xtask exec node-a -- marline check client-a server-b:80",
            "one connection, and what the wire carries of it",
        ),
        ("cargo xtask exec node-b -- marline top", "the flows through node b, live"),
        (&format!("tail -f {DIRECTORY}/b/access.log"), "one line per connection: who, how, and by which path"),
        (&format!("cargo xtask up --mode {other}"), "another mode, while running"),
        ("cargo xtask down", "remove all of it"),
    ];
    let lines = lines.map(|(command, what)| format!("  {command:<63} {what}\n"));
    format!("\nWhat to try:\n{}", lines.concat())
}
