//! The eye on the link: tcpdump takes every frame between the nodes, and this reads them while they come.
//!
//! It answers what a stranger on the wire could see: how many frames there were, which streams are TLS 1.3, which bytes
//! are not TLS records at all, and whether a marker of the payload shows anywhere, in a frame or across frames.
//! What TLS 1.3 hides from a stranger it hides from this as well: certificates travel encrypted. Their presence shows by
//! size only (`Stream::first_client_record`); who they name is told by the agents' access logs.

pub mod packet;
pub mod pcap;
pub mod stream;
pub mod tls;

use std::{
    collections::BTreeMap,
    io::BufReader,
    net::{SocketAddr, UdpSocket},
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread::{self, JoinHandle},
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    cluster::{Cluster, Side, network},
    process::{Place, spawn, wait_child},
    wait::{Look, seconds, wait_for},
};
pub use stream::Stream;
use stream::Streams;

/// The discard port. What the capture sends to itself goes there, to the link's broadcast address, so that nobody answers.
const DISCARD: u16 = 9;
/// tcpdump is given frames when a block of its ring is full, else once a second: this many of this size fill one.
const FILLERS: usize = 200;
const FILLER: [u8; 1400] = [0; 1400];

/// What was on the wire until a moment.
#[derive(Clone, Debug)]
pub struct Wire {
    /// Without those that the capture itself has sent.
    pub frames: u64,
    pub streams: Vec<Stream>,
    hits: BTreeMap<String, u64>,
}

impl Wire {
    /// How often a marker showed, in single frames and across the frames of a stream.
    #[must_use]
    pub fn hits(&self, marker: &str) -> u64 {
        self.hits.get(marker).copied().unwrap_or_default()
    }

    /// Streams with a TLS 1.3 handshake.
    #[must_use]
    pub fn tls13_handshakes(&self) -> usize {
        self.streams.iter().filter(|stream| stream.is_tls13()).count()
    }

    /// Streams to an address and port.
    pub fn to(&self, server: SocketAddr) -> impl Iterator<Item = &Stream> {
        self.streams.iter().filter(move |stream| stream.server == server)
    }

    /// Bytes that are no TLS records, over all streams.
    #[must_use]
    pub fn not_tls(&self) -> u64 {
        self.streams.iter().map(|stream| stream.not_tls()).sum()
    }

    /// Streams of which frames were missed: what is said of them is not the whole truth.
    pub fn holes(&self) -> impl Iterator<Item = &Stream> {
        self.streams.iter().filter(|stream| stream.has_hole())
    }
}

#[derive(Default)]
struct Analysis {
    frames: u64,
    streams: Streams,
    hits: BTreeMap<String, u64>,
    sentinels: u64,
    failure: Option<String>,
    ended: bool,
}

/// A running capture of the link. It ends when dropped.
pub struct LinkCapture {
    place: Place,
    tcpdump: Child,
    reader: Option<JoinHandle<()>>,
    analysis: Arc<Mutex<Analysis>>,
    sent: u64,
    log: PathBuf,
}

impl LinkCapture {
    /// Starts to capture, and returns when frames that are sent from now on are seen.
    pub fn start(cluster: &Cluster, markers: &[&str]) -> Result<Self> {
        let log = cluster.directory().join("tcpdump.log");
        let log_file = std::fs::File::create(&log).with_context(|| log.display().to_string())?;
        let place = cluster.node(Side::A);
        // A ring of 64 MiB, whole frames, written as they come; root stays root, for files of the cluster are root's.
        let arguments = ["-i", network::LINK, "-w", "-", "-U", "-s", "0", "-B", "65536", "-n", "-Z", "root"];
        let mut command: Command = place.command("tcpdump");
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(log_file);
        let mut tcpdump = spawn(&mut command).context("starting tcpdump; way out: apt-get install tcpdump")?;
        let frames = tcpdump.stdout.take().context("tcpdump has no output")?;
        let analysis = Arc::new(Mutex::new(Analysis::default()));
        for marker in markers {
            lock(&analysis).hits.insert((*marker).to_owned(), 0);
        }
        let theirs = Arc::clone(&analysis);
        let markers: Vec<String> = markers.iter().map(|marker| (*marker).to_owned()).collect();
        let reader = thread::spawn(move || {
            let outcome = read(BufReader::with_capacity(1 << 20, frames), &markers, &theirs);
            let mut analysis = lock(&theirs);
            analysis.failure = outcome.err().map(|error| format!("{error:#}"));
            analysis.ended = true;
        });
        let mut capture = Self { place, tcpdump, reader: Some(reader), analysis, sent: 0, log };
        capture.wait_listening()?;
        capture.sync()?;
        Ok(capture)
    }

    /// All that was on the wire until now: a frame sent by this call is the last one.
    pub fn wire(&mut self) -> Result<Wire> {
        self.sync()?;
        let analysis = lock(&self.analysis);
        let hits = analysis.hits.iter().map(|(marker, hits)| (marker.clone(), hits + analysis.streams.hits(marker)));
        Ok(Wire { frames: analysis.frames, streams: analysis.streams.list(), hits: hits.collect() })
    }

    fn wait_listening(&mut self) -> Result<()> {
        let log = self.log.clone();
        wait_for("tcpdump to listen", seconds(20), || {
            let text = std::fs::read_to_string(&log).unwrap_or_default();
            if let Some(status) = self.tcpdump.try_wait()? {
                bail!("tcpdump ended ({status}): {text}");
            }
            Ok(if text.contains("listening on") { Look::Done(()) } else { Look::NotYet(text) })
        })
    }

    /// Sends a frame of its own and waits until it was read: then all before it was.
    fn sync(&mut self) -> Result<()> {
        self.sent += 1;
        let sent = self.sent;
        let send = || -> std::io::Result<()> {
            let socket = UdpSocket::bind((network::link_address(Side::A), 0))?;
            socket.set_broadcast(true)?;
            socket.connect((network::LINK_BROADCAST, DISCARD))?;
            socket.send(sentinel(sent).as_bytes())?;
            (0..FILLERS).try_for_each(|_| socket.send(&FILLER).map(|_| ()))
        };
        crate::netns::inside(&self.place.netns, send)?.context("sending frames over the link")?;
        wait_for("the capture to catch up", seconds(30), || {
            let analysis = lock(&self.analysis);
            if let Some(failure) = &analysis.failure {
                bail!("the capture cannot be read: {failure}");
            }
            if analysis.ended {
                bail!("tcpdump ended: {}", std::fs::read_to_string(&self.log).unwrap_or_default());
            }
            Ok(if analysis.sentinels >= sent {
                Look::Done(())
            } else {
                Look::NotYet(format!("{} frames", analysis.frames))
            })
        })
    }

    /// Ends the capture and says what it saw; that the kernel dropped frames is an error.
    pub fn finish(mut self) -> Result<Wire> {
        let wire = self.wire()?;
        self.end()?;
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let dropped = log.lines().find(|line| line.contains("dropped by kernel"));
        match dropped {
            Some(line) if line.trim_start().starts_with("0 ") => Ok(wire),
            _ => Err(anyhow!("frames were missed or not counted, so nothing is proven: {}", log.trim())),
        }
    }

    fn end(&mut self) -> Result<()> {
        let Some(reader) = self.reader.take() else { return Ok(()) };
        let pid = i32::try_from(self.tcpdump.id()).context("a pid beyond 31 bits")?;
        kill(Pid::from_raw(pid), Signal::SIGINT).context("stopping tcpdump")?;
        if let Err(error) = wait_child(&mut self.tcpdump, "tcpdump", seconds(10)) {
            self.tcpdump.kill().context("killing tcpdump")?;
            self.tcpdump.wait().context("waiting for tcpdump")?;
            return Err(error);
        }
        reader.join().map_err(|_| anyhow!("the reader of the capture panicked"))
    }
}

impl Drop for LinkCapture {
    fn drop(&mut self) {
        // Gone already, or it goes with the cluster's cgroup.
        let _ = self.end();
    }
}

fn sentinel(number: u64) -> String {
    format!("marline capture sentinel {number:016x}")
}

fn read(source: impl std::io::Read, markers: &[String], analysis: &Mutex<Analysis>) -> Result<()> {
    let finders: Vec<memchr::memmem::Finder<'_>> = markers.iter().map(memchr::memmem::Finder::new).collect();
    let awaited = sentinel(0);
    let prefix = awaited.as_bytes().split_at(awaited.len() - 16).0;
    let mut reader = pcap::Reader::open(source)?;
    while let Some(frame) = reader.next_frame()? {
        let packet = packet::parse(frame);
        let mut analysis = lock(analysis);
        if let Some(packet::Packet::Udp { port: DISCARD, payload }) = packet {
            let number = payload.strip_prefix(prefix).and_then(|rest| std::str::from_utf8(rest).ok());
            let number = number.and_then(|text| u64::from_str_radix(text, 16).ok());
            analysis.sentinels = analysis.sentinels.max(number.unwrap_or_default());
            continue;
        }
        analysis.frames += 1;
        for (marker, finder) in markers.iter().zip(&finders) {
            if finder.find(frame).is_some() {
                *analysis.hits.entry(marker.clone()).or_default() += 1;
            }
        }
        if let Some(packet::Packet::Tcp(segment)) = packet {
            analysis.streams.take(&segment, markers, &finders);
        }
    }
    Ok(())
}

/// A poisoned lock holds counts that are still good to show.
fn lock(analysis: &Mutex<Analysis>) -> MutexGuard<'_, Analysis> {
    analysis.lock().unwrap_or_else(PoisonError::into_inner)
}
