//! The client of the load program: one piece of work, bounded in time, warmed up before it is measured.

use std::{
    io::{Read, Write},
    net::TcpStream,
    path::PathBuf,
    sync::{
        Barrier, Mutex, OnceLock, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::prctl;

use super::{
    AGENTS, Answer, BLOCK, Latencies, Memory, Order, Work,
    cpu::Look,
    pace::{self, Paced, Schedule, Since},
    server::{BULK, CHUNK, EXCHANGE},
    tasks,
    trace::Trace,
    wire::Wire,
};
use crate::{cgroup, wait::seconds};

/// Exchanges that each connection makes before those that count.
const WARM: u32 = 50;
/// Connections before those that count, and bytes before those that count.
const WARM_CONNECTIONS: u32 = 5;
const WARM_BYTES: u64 = 4 * 1024 * 1024;
/// Threads that connections at a fixed rate come from.
const ARRIVE_BY: u32 = 8;
/// Threads that open what shall be idle, and how long it is left alone before it is taken for idle.
const OPENERS: u32 = 8;
const SETTLE: Duration = Duration::from_millis(500);
/// From the moment when all connections are warm to the first request.
const HEAD_START: Duration = Duration::from_millis(10);

/// Does what it was told and gives the figures of the measured part.
pub fn run(order: &Order) -> Result<Answer> {
    // Sleeping threads would wake 50 microseconds late.
    prctl::set_timerslack(1).context("asking for exact timers")?;
    match order.work {
        Work::Connect { count, at_once } => connect(order, count, at_once),
        Work::Arrivals { rate, seconds } => {
            (0..WARM_CONNECTIONS).try_for_each(|_| first_byte(order).map(drop))?;
            paced(order, (rate, ARRIVE_BY, seconds), || Ok(()), |()| first_byte(order).map(drop))
        }
        Work::Requests { rate, connections, seconds } => {
            paced(order, (rate, connections, seconds), || warmed(order), exchange)
        }
        Work::Exchanges { count } => exchanges(order, count),
        Work::Bulk { bytes, streams } => bulk(order, bytes, streams),
        Work::Idle { connections, seconds } => idle(order, connections, seconds),
    }
}

fn connect(order: &Order, count: u32, at_once: u32) -> Result<Answer> {
    for _ in 0..WARM_CONNECTIONS {
        first_byte(order)?;
    }
    let next = AtomicU32::new(0);
    let measuring = Measuring::begin(order)?;
    let outcomes = in_threads(at_once, |_| {
        let mut latencies = Vec::new();
        while next.fetch_add(1, Ordering::Relaxed) < count {
            latencies.push(first_byte(order)?);
        }
        Ok(latencies)
    })?;
    let answer = measuring.end()?;
    Ok(Answer { latencies: Latencies::of(outcomes.into_iter().flatten().collect()), ..answer })
}

/// One connection for one exchange: from connect() to the first byte of the answer.
fn first_byte(order: &Order) -> Result<Duration> {
    let mut block = [EXCHANGE; BLOCK];
    let started = Instant::now();
    let mut connection = open(order)?;
    connection.write_all(&block).context("asking")?;
    let count = connection.read(&mut block).context("waiting for the first byte")?;
    let elapsed = started.elapsed();
    ensure!(count > 0, "the connection ended before the answer");
    connection.read_exact(&mut block[count..]).context("reading the answer")?;
    Ok(elapsed)
}

/// A rate of exchanges from so many threads for so many seconds, each with what it has prepared before.
fn paced<T>(
    order: &Order,
    (rate, threads, seconds): (u32, u32, u32),
    prepare: impl Fn() -> Result<T> + Sync,
    exchange: impl Fn(&mut T) -> Result<()> + Sync,
) -> Result<Answer> {
    let (warm, start) = (Barrier::new(threads as usize + 1), OnceLock::new());
    let length = Duration::from_secs(seconds.into());
    let schedule = |connection| Schedule { rate, connections: threads, connection, length };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..threads)
            .map(|index| {
                let (warm, start, prepare, exchange) = (&warm, &start, &prepare, &exchange);
                scope.spawn(move || -> Result<Paced> {
                    prctl::set_timerslack(1).context("asking for exact timers")?;
                    let prepared = prepare();
                    // Also whoever failed comes here, or the others would wait for ever.
                    warm.wait();
                    warm.wait();
                    let clock = Since(*start.get_or_init(|| Instant::now() + HEAD_START));
                    let mut prepared = prepared?;
                    pace::pace(schedule(index), &clock, || exchange(&mut prepared))
                })
            })
            .collect();
        warm.wait();
        // All are warm, and none starts before this has begun.
        let measuring = Measuring::begin(order);
        warm.wait();
        let mut all = Paced::default();
        for thread in threads {
            let paced = thread.join().map_err(|_| anyhow!("a thread of the load panicked"))??;
            all.latencies.extend(paced.latencies);
            all.late.extend(paced.late);
        }
        let answer = measuring?.end()?;
        Ok(Answer { latencies: Latencies::of(all.latencies), late: Latencies::of(all.late), ..answer })
    })
}

fn exchanges(order: &Order, count: u32) -> Result<Answer> {
    let mut connection = warmed(order)?;
    let mut latencies = Vec::with_capacity(count as usize);
    let measuring = Measuring::begin(order)?;
    for _ in 0..count {
        let sent = Instant::now();
        exchange(&mut connection)?;
        latencies.push(sent.elapsed());
    }
    let answer = measuring.end()?;
    Ok(Answer { latencies: Latencies::of(latencies), ..answer })
}

fn bulk(order: &Order, bytes: u64, streams: u32) -> Result<Answer> {
    pour(&mut start_bulk(order)?, WARM_BYTES)?;
    let connections: Vec<Mutex<Wire>> =
        (0..streams).map(|_| start_bulk(order).map(Mutex::new)).collect::<Result<_>>()?;
    // The last one takes what division leaves.
    let part = |index: u32| {
        let each = bytes / u64::from(streams.max(1));
        if index + 1 == streams { bytes - each * u64::from(index) } else { each }
    };
    let measuring = Measuring::begin(order)?;
    in_threads(streams, |index| {
        let connection = connections.get(index as usize).context("there is no such stream")?;
        pour(&mut connection.lock().unwrap_or_else(PoisonError::into_inner), part(index))
    })?;
    measuring.end()
}

fn idle(order: &Order, connections: u32, length: u32) -> Result<Answer> {
    let memory = || proxies(order).map(|cgroup| tasks::anonymous(cgroup)).sum::<Result<u64>>();
    let before = memory()?;
    let next = AtomicU32::new(0);
    let open = in_threads(OPENERS, |_| {
        let mut open = Vec::new();
        while next.fetch_add(1, Ordering::Relaxed) < connections {
            let mut connection = self::open(order)?;
            exchange(&mut connection)?;
            open.push(connection);
        }
        Ok(open)
    })?;
    // What an exchange leaves to be done after its answer is not idleness.
    thread::sleep(SETTLE);
    let measuring = Measuring::begin(order)?;
    thread::sleep(Duration::from_secs(length.into()));
    let answer = measuring.end()?;
    let then = memory()?;
    drop(open);
    Ok(Answer { memory: Some(Memory { before, then }), ..answer })
}

fn proxies(order: &Order) -> impl Iterator<Item = &PathBuf> {
    order.watch.iter().filter(|(name, _)| name.starts_with(AGENTS)).map(|(_, cgroup)| cgroup)
}

/// What is taken down while the part that counts is under way.
struct Measuring<'a> {
    look: Look<'a>,
    trace: Option<Trace>,
    started: Instant,
}

impl<'a> Measuring<'a> {
    fn begin(order: &'a Order) -> Result<Self> {
        let trace = if order.trace {
            let processes: Vec<u32> = proxies(order).flat_map(|cgroup| cgroup::processes(cgroup)).collect();
            Some(Trace::begin(&processes)?)
        } else {
            None
        };
        Ok(Self { look: Look::now(&order.watch)?, trace, started: Instant::now() })
    }

    /// An answer to which the work adds what it alone knows.
    fn end(self) -> Result<Answer> {
        let seconds = self.started.elapsed().as_secs_f64();
        let spent = self.look.spent()?;
        let calls = self.trace.map(Trace::end).transpose()?;
        Ok(Answer { seconds, latencies: None, late: None, spent, memory: None, calls })
    }
}

fn start_bulk(order: &Order) -> Result<Wire> {
    let mut connection = warmed(order)?;
    if connection.has_messages() {
        return Ok(connection);
    }
    let mut block = [BULK; BLOCK];
    connection.write_all(&block).and_then(|()| connection.read_exact(&mut block)).context("asking to send much")?;
    Ok(connection)
}

fn pour(connection: &mut Wire, bytes: u64) -> Result<()> {
    let chunk = vec![b'.'; CHUNK];
    connection.begin(bytes).context("beginning to send much")?;
    let mut left = bytes;
    while left > 0 {
        let part = usize::try_from(left).unwrap_or(CHUNK).min(CHUNK);
        connection.write_all(&chunk[..part]).context("sending much")?;
        left -= part as u64;
    }
    connection.end().context("ending what was sent")?;
    let mut total = [0; 8];
    connection.read_exact(&mut total).context("waiting for the receiver's count")?;
    let total = u64::from_be_bytes(total);
    ensure!(total == bytes, "{bytes} bytes were sent, {total} received");
    Ok(())
}

fn warmed(order: &Order) -> Result<Wire> {
    let mut connection = open(order)?;
    (0..WARM).try_for_each(|_| exchange(&mut connection))?;
    Ok(connection)
}

fn open(order: &Order) -> Result<Wire> {
    let connection = TcpStream::connect(order.address).context("connecting")?;
    connection.set_nodelay(true)?;
    // Nothing here takes as long in order; a hang shall fail and not stall.
    connection.set_read_timeout(Some(seconds(20)))?;
    connection.set_write_timeout(Some(seconds(20)))?;
    Wire::client(connection, order.http).context("connecting")
}

fn exchange(connection: &mut Wire) -> Result<()> {
    let mut block = [EXCHANGE; BLOCK];
    connection.write_all(&block).context("asking")?;
    connection.read_exact(&mut block).context("waiting for an answer")
}

/// The work of so many threads, in their order; the first error if one fails.
fn in_threads<T: Send>(count: u32, work: impl Fn(u32) -> Result<T> + Sync) -> Result<Vec<T>> {
    let work = &work;
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count).map(|index| scope.spawn(move || work(index))).collect();
        let join = |thread: thread::ScopedJoinHandle<'_, Result<T>>| {
            thread.join().unwrap_or_else(|_| Err(anyhow!("a thread of the load panicked")))
        };
        threads.into_iter().map(join).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::{super::server, *};
    use crate::wait::{Look as Seen, wait_for};

    /// A server on this machine, and what the client says of a piece of work with it. Nothing is watched.
    fn work(work: Work) -> Answer {
        work_as(work, false)
    }

    fn work_as(work: Work, http: bool) -> Answer {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        thread::spawn(move || server::serve(address));
        let connects = || Ok(TcpStream::connect(address).map_or(Seen::NotYet("nobody".into()), |_| Seen::Done(())));
        wait_for("the server to listen", seconds(10), connects).unwrap();
        run(&Order { address, work, http, watch: [].into(), trace: false }).unwrap()
    }

    #[test]
    fn streams_carry_all_bytes_together_also_if_they_cannot_be_shared_evenly() {
        // The receiver's counts are checked inside: a byte less is an error.
        for http in [false, true] {
            assert!(work_as(Work::Bulk { bytes: 1_000_003, streams: 7 }, http).seconds > 0.0);
        }
    }

    #[test]
    fn idle_connections_are_all_open_at_once_and_tell_of_memory() {
        let answer = work(Work::Idle { connections: 50, seconds: 0 });
        assert_eq!(answer.memory, Some(Memory { before: 0, then: 0 }));
    }

    #[test]
    fn system_calls_of_nobody_are_an_error_and_not_none() {
        let order = Order {
            address: ([127, 0, 0, 1], 1).into(),
            work: Work::Exchanges { count: 1 },
            http: false,
            watch: [].into(),
            trace: true,
        };
        assert!(Measuring::begin(&order).is_err());
    }
}
