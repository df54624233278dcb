//! The client of the load program: one piece of work, bounded in time, warmed up before it is measured.

use std::{
    io::{Read, Write},
    net::TcpStream,
    sync::{
        Barrier, OnceLock,
        atomic::{AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};
use nix::sys::prctl;

use super::{
    Answer, BLOCK, Latencies, Order, Work,
    cpu::Look,
    pace::{self, Paced, Schedule, Since},
    server::{BULK, CHUNK, EXCHANGE},
    wire::Wire,
};
use crate::wait::seconds;

/// Exchanges that each connection makes before those that count.
const WARM: u32 = 50;
/// Connections before those that count, and bytes before those that count.
const WARM_CONNECTIONS: u32 = 5;
const WARM_BYTES: u64 = 4 * 1024 * 1024;
/// From the moment when all connections are warm to the first request.
const HEAD_START: Duration = Duration::from_millis(10);

/// Does what it was told and gives the figures of the measured part.
pub fn run(order: &Order) -> Result<Answer> {
    // Sleeping threads would wake 50 microseconds late.
    prctl::set_timerslack(1).context("asking for exact timers")?;
    match order.work {
        Work::Connect { count, at_once } => connect(order, count, at_once),
        Work::Requests { rate, connections, seconds } => requests(order, rate, connections, seconds),
        Work::Exchanges { count } => exchanges(order, count),
        Work::Bulk { bytes } => bulk(order, bytes),
    }
}

fn connect(order: &Order, count: u32, at_once: u32) -> Result<Answer> {
    for _ in 0..WARM_CONNECTIONS {
        first_byte(order)?;
    }
    let next = AtomicU32::new(0);
    let look = Look::now(&order.watch)?;
    let started = Instant::now();
    let outcomes = in_threads(at_once, |_| {
        let mut latencies = Vec::new();
        while next.fetch_add(1, Ordering::Relaxed) < count {
            latencies.push(first_byte(order)?);
        }
        Ok(latencies)
    })?;
    let elapsed = started.elapsed();
    let latencies = Latencies::of(outcomes.into_iter().flatten().collect());
    Ok(Answer { seconds: elapsed.as_secs_f64(), latencies, late: None, spent: look.spent()? })
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

fn requests(order: &Order, rate: u32, connections: u32, length: u32) -> Result<Answer> {
    let (warm, start) = (Barrier::new(connections as usize + 1), OnceLock::new());
    let schedule = |connection| Schedule { rate, connections, connection, length: Duration::from_secs(length.into()) };
    thread::scope(|scope| {
        let threads: Vec<_> = (0..connections)
            .map(|index| {
                let (warm, start) = (&warm, &start);
                scope.spawn(move || -> Result<Paced> {
                    prctl::set_timerslack(1).context("asking for exact timers")?;
                    let connection = warmed(order);
                    // Also whoever failed comes here, or the others would wait for ever.
                    warm.wait();
                    let clock = Since(*start.get_or_init(|| Instant::now() + HEAD_START));
                    let mut connection = connection?;
                    pace::pace(schedule(index), &clock, || exchange(&mut connection))
                })
            })
            .collect();
        warm.wait();
        let look = Look::now(&order.watch)?;
        let started = Instant::now();
        let mut all = Paced::default();
        for thread in threads {
            let paced = thread.join().map_err(|_| anyhow!("a connection's thread panicked"))??;
            all.latencies.extend(paced.latencies);
            all.late.extend(paced.late);
        }
        let elapsed = started.elapsed();
        Ok(Answer {
            seconds: elapsed.as_secs_f64(),
            latencies: Latencies::of(all.latencies),
            late: Latencies::of(all.late),
            spent: look.spent()?,
        })
    })
}

fn exchanges(order: &Order, count: u32) -> Result<Answer> {
    let mut connection = warmed(order)?;
    let mut latencies = Vec::with_capacity(count as usize);
    let look = Look::now(&order.watch)?;
    let started = Instant::now();
    for _ in 0..count {
        let sent = Instant::now();
        exchange(&mut connection)?;
        latencies.push(sent.elapsed());
    }
    let elapsed = started.elapsed();
    let spent = look.spent()?;
    Ok(Answer { seconds: elapsed.as_secs_f64(), latencies: Latencies::of(latencies), late: None, spent })
}

fn bulk(order: &Order, bytes: u64) -> Result<Answer> {
    pour(&mut start_bulk(order)?, WARM_BYTES)?;
    let mut connection = start_bulk(order)?;
    let look = Look::now(&order.watch)?;
    let started = Instant::now();
    pour(&mut connection, bytes)?;
    let elapsed = started.elapsed();
    Ok(Answer { seconds: elapsed.as_secs_f64(), latencies: None, late: None, spent: look.spent()? })
}

fn start_bulk(order: &Order) -> Result<Wire> {
    let mut connection = warmed(order)?;
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
