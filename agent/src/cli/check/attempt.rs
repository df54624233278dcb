//! One attempt of `marline check`: starts the probe, watches the wire, and asks the agent what it makes of the connection, until that is known.

use std::{
    collections::BTreeSet,
    io::{self, BufRead as _},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant},
};

use nix::net::if_::{if_indextoname, if_nametoindex};

use super::{
    super::{
        client::Client,
        connections::model::{Connection, Fetched},
    },
    probe::Event,
    wire::{Streams, parse},
};
use crate::{
    bpf::prober::ProbeCgroup,
    state::explain::Party,
    sys::{
        netns::Netns,
        packet::{LARGEST, PacketSocket},
    },
    words::Direction,
};

/// How long an attempt may take in all, beside the time that is asked for.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the agent may take to know of a connection that is there, or of its end.
const KNOWN: Duration = Duration::from_secs(3);
const BREATH: Duration = Duration::from_millis(15);

pub(super) struct Plan<'a> {
    pub(super) client: &'a Client,
    pub(super) netns: PathBuf,
    pub(super) cgroup: PathBuf,
    pub(super) destination: Party,
    pub(super) enrolled: bool,
    pub(super) send: Option<String>,
    pub(super) wait: Duration,
}

/// What was seen.
#[derive(Default)]
pub(super) struct Attempt {
    /// As the program sees it.
    pub(super) local: Option<SocketAddr>,
    pub(super) events: Vec<Event>,
    /// What the agent says of it, at the source and, if that is on this node, at the destination.
    pub(super) outbound: Option<Connection>,
    pub(super) inbound: Option<Connection>,
    pub(super) streams: Streams,
    /// The two ends on the wire, if it is known which stream it is.
    pub(super) wire: Option<[SocketAddr; 2]>,
    pub(super) links: Vec<String>,
    pub(super) lost: u32,
}

impl Attempt {
    pub(super) fn make(plan: &Plan<'_>) -> Result<Self, String> {
        let mut watch = Watch::start(plan)?;
        let cgroup = ProbeCgroup::create(&plan.cgroup).map_err(|error| {
            format!(
                "no cgroup can be made in {} (spec.capture.cgroup): {error}; run this as root, with the host's /sys/fs/cgroup in sight",
                plan.cgroup.display()
            )
        })?;
        let mut attempt = Self::default();
        // Those that ended before are not this one.
        let before = Fetched::ended(plan.client).map_err(|error| error.to_string())?;
        let before: BTreeSet<u64> = before.iter().map(|one| one.id).collect();
        let mut probe = Probe::start(plan, &cgroup)?;
        let outcome = attempt.follow(plan, &mut probe, &mut watch, &before);
        probe.end();
        watch.drain()?;
        outcome?;
        attempt.finish(plan, watch);
        Ok(attempt)
    }

    /// Whether connect() itself has failed, for want of somebody who takes it.
    pub(super) fn refused_at_once(&self) -> bool {
        self.events.iter().any(|event| matches!(event, Event::Failed { refused: true, .. }))
    }

    pub(super) fn connected(&self) -> bool {
        self.local.is_some()
    }

    pub(super) fn received(&self) -> usize {
        self.events.iter().map(|event| if let Event::Received(count) = event { *count } else { 0 }).sum()
    }

    /// How it ended for the program, if it did.
    pub(super) fn end(&self) -> Option<&Event> {
        self.events.iter().find(|event| matches!(event, Event::Ended | Event::Reset(_) | Event::Failed { .. }))
    }

    fn follow(
        &mut self,
        plan: &Plan<'_>,
        probe: &mut Probe,
        watch: &mut Watch,
        before: &BTreeSet<u64>,
    ) -> Result<(), String> {
        let began = Instant::now();
        let (mut connected, mut decided, mut over, mut settled) = (None, None, None, None);
        loop {
            watch.drain()?;
            for event in probe.events.try_iter() {
                match &event {
                    Event::Unable(what) => return Err(what.clone()),
                    Event::Connected { local, .. } => {
                        self.local = Some(*local);
                        connected = Some(Instant::now());
                    }
                    Event::Failed { .. } | Event::Ended | Event::Reset(_) => over = Some(Instant::now()),
                    Event::Received(_) => {}
                }
                self.events.push(event);
            }
            if plan.enrolled && connected.is_some() {
                self.ask(plan, before)?;
            }
            let known = self.outbound.as_ref().is_some_and(|one| one.mode.is_some());
            if known && decided.is_none() {
                decided = Some(Instant::now());
            }
            if settled.is_none() && self.outbound.as_ref().is_some_and(|one| one.verdict.is_some()) {
                settled = Some(Instant::now());
            }
            let since = |moment: Option<Instant>| moment.map(|moment: Instant| moment.elapsed());
            // The agent knows of an end before the program does, or after it.
            let done = since(settled).is_some_and(|since| over.is_some() || since >= KNOWN)
                || (settled.is_none() && over.is_none() && since(decided).is_some_and(|since| since >= plan.wait))
                || (!plan.enrolled && since(connected).is_some_and(|since| since >= plan.wait))
                || (self.outbound.is_none() && since(connected).is_some_and(|since| since >= KNOWN))
                || since(over).is_some_and(|since| since >= KNOWN || !plan.enrolled || connected.is_none())
                || began.elapsed() >= PATIENCE + plan.wait;
            if done {
                return Ok(());
            }
            std::thread::sleep(BREATH);
        }
    }

    /// What the agent knows of it now. First those that live: one that ends is among the ended before it leaves them.
    fn ask(&mut self, plan: &Plan<'_>, before: &BTreeSet<u64>) -> Result<(), String> {
        let live = Fetched::live(plan.client).map_err(|error| error.to_string())?;
        let ended = Fetched::ended(plan.client).map_err(|error| error.to_string())?;
        let ended: Vec<_> = ended.into_iter().filter(|one| !before.contains(&one.id)).collect();
        let Some(local) = self.local else { return Ok(()) };
        let mine = |one: &&Connection| one.direction == Direction::Outbound && same(one.source.address, local);
        if let Some(found) = ended.iter().chain(&live).find(mine) {
            self.wire = found.wire.or(self.wire);
            self.outbound = Some(found.clone());
        }
        let target = self.outbound.as_ref().and_then(|one| one.destination.address);
        let found = ended.iter().chain(&live).rfind(|one| arrived(one, self.wire, target));
        self.inbound = found.cloned().or(self.inbound.take());
        Ok(())
    }

    /// Finds the connection among what was on the wire.
    fn finish(&mut self, plan: &Plan<'_>, watch: Watch) {
        let mut servers = plan.destination.endpoints.clone();
        servers.push(plan.destination.address);
        servers.extend(self.outbound.as_ref().and_then(|one| one.destination.address));
        if !plan.enrolled {
            self.wire = self.local.map(|local| [local, plan.destination.address]);
        }
        if self.wire.is_none() {
            // Where the agent does not tell any more, it is the one that has begun meanwhile, if there is but one.
            let mut candidates = watch.streams.to(&servers).map(|stream| [stream.client, stream.server]);
            self.wire = match (candidates.next(), candidates.next()) {
                (Some(one), None) => Some(one),
                _ => None,
            };
        }
        (self.links, self.lost) = (watch.links(), watch.socket.lost().unwrap_or_default());
        self.streams = watch.streams;
    }
}

/// Whether it is the other end of the connection on this wire. By its addresses alone it may be another one of the same pods: nothing is
/// claimed then.
fn arrived(one: &Connection, wire: Option<[SocketAddr; 2]>, target: Option<SocketAddr>) -> bool {
    one.direction == Direction::Inbound
        && target.is_some()
        && one.destination.address == target
        && wire.is_some_and(|[from, _]| same(one.source.address, from))
}

fn same(told: Option<SocketAddr>, local: SocketAddr) -> bool {
    told.is_some_and(|told| told.port() == local.port() && told.ip().to_canonical() == local.ip().to_canonical())
}

struct Watch {
    netns: Netns,
    socket: PacketSocket,
    loopback: usize,
    streams: Streams,
    servers: Vec<SocketAddr>,
    seen: BTreeSet<usize>,
    buffer: Vec<u8>,
}

impl Watch {
    fn start(plan: &Plan<'_>) -> Result<Self, String> {
        let failed = |error: io::Error| format!("the namespace {} cannot be watched: {error}", plan.netns.display());
        let netns = Netns::open(&plan.netns).map_err(failed)?;
        let opened = netns.run(|| {
            let loopback = if_nametoindex("lo").map_err(io::Error::from)?;
            Ok::<_, io::Error>((PacketSocket::open()?, loopback))
        });
        let (socket, loopback) = opened.and_then(|opened| opened).map_err(failed)?;
        let mut servers = plan.destination.endpoints.clone();
        servers.push(plan.destination.address);
        let (streams, seen, buffer) = (Streams::default(), BTreeSet::new(), vec![0; LARGEST]);
        Ok(Self { netns, socket, loopback: loopback as usize, streams, servers, seen, buffer })
    }

    fn drain(&mut self) -> Result<(), String> {
        while let Some(seen) =
            self.socket.next(&mut self.buffer).map_err(|error| format!("packets cannot be read: {error}"))?
        {
            // What is on loopback has not left: there the agent and the application talk.
            if seen.index == self.loopback {
                continue;
            }
            if let Some(segment) = parse(self.buffer.get(..seen.length).unwrap_or_default()) {
                let far = [segment.source, segment.destination];
                // A busy pod has others, which are none of ours.
                if far.iter().any(|end| self.servers.contains(end)) {
                    self.seen.insert(seen.index);
                    self.streams.take(&segment);
                }
            }
        }
        Ok(())
    }

    fn links(&self) -> Vec<String> {
        let name = |index: &usize| {
            let name = if_indextoname(u32::try_from(*index).ok()?).ok()?;
            Some(name.to_string_lossy().into_owned())
        };
        self.netns.run(|| self.seen.iter().filter_map(name).collect()).unwrap_or_default()
    }
}

struct Probe {
    child: Child,
    events: Receiver<Event>,
}

impl Probe {
    fn start(plan: &Plan<'_>, cgroup: &ProbeCgroup) -> Result<Self, String> {
        let mut command = Command::new("/proc/self/exe");
        command.arg("internal-check").arg("--netns").arg(&plan.netns).arg("--cgroup").arg(cgroup.path());
        command.arg("--connect").arg(plan.destination.address.to_string());
        if let Some(text) = &plan.send {
            command.arg("--send").arg(text);
        }
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::inherit());
        let mut child = command.spawn().map_err(|error| format!("the probe cannot be started: {error}"))?;
        let (sender, events) = channel();
        let Some(stdout) = child.stdout.take() else { return Err("the probe has no output".into()) };
        std::thread::spawn(move || {
            for line in io::BufReader::new(stdout).lines().map_while(Result::ok) {
                if let Ok(event) = serde_json::from_str(&line)
                    && sender.send(event).is_err()
                {
                    return;
                }
            }
        });
        Ok(Self { child, events })
    }

    /// Closes the connection in order, and waits for the process: its cgroup can be removed then.
    fn end(&mut self) {
        drop(self.child.stdin.take());
        let began = Instant::now();
        while matches!(self.child.try_wait(), Ok(None)) {
            if began.elapsed() > KNOWN {
                let _ = self.child.kill();
            }
            std::thread::sleep(BREATH);
        }
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[cfg(test)]
mod tests {
    use super::{super::super::connections::model::tests::sample, *};

    #[test]
    fn another_connection_between_the_same_pods_is_not_taken_for_this_one() {
        let mut one = sample();
        one.direction = Direction::Inbound;
        let (from, target) = (one.source.address, one.destination.address);
        let (wire, target) = ([from.unwrap(), target.unwrap()], target);
        assert!(arrived(&one, Some(wire), target));
        assert!(!arrived(&one, None, target), "by its address alone");
        one.source.address = Some("10.0.0.1:40001".parse().unwrap());
        assert!(!arrived(&one, Some(wire), target));
        one.direction = Direction::Outbound;
        assert!(!arrived(&one, Some([one.source.address.unwrap(), wire[1]]), target));
    }
}
