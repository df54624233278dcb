//! How the way to the wire ends: close_notify where that was agreed, then FIN, and neither before all that the kernel has accepted
//! has become TCP's.
//!
//! The kernel accepts bytes before it has handed their records to TCP; a FIN sent then overtakes and loses them (tls_sw.c,
//! tls_tx_records).

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustls::SupportedCipherSuite;
use tokio::net::TcpStream;

use super::{Out, PumpError, Taken, send_all, shut, wire_lost};
use crate::{
    sys::{options, socket, tcp_info::Opening},
    tls::{
        ktls,
        records::{ALERT, CLOSE_NOTIFY, Ending, OVERHEAD},
    },
};

/// How long a blocking close_notify may take before the wait is made without a thread.
const PATIENCE: Duration = Duration::from_millis(200);
/// When to look again at a peer that reads slowly. Longer from time to time: a thread is taken for each try.
const SHORTLY: Duration = Duration::from_millis(20);
const LATER: Duration = Duration::from_secs(5);
/// The same where looking takes no thread.
const AT_ONCE: Duration = Duration::from_millis(1);
const SELDOM: Duration = Duration::from_millis(250);
/// Records still in the kernel are sent when the peer has acknowledged what TCP holds; that seen so often in a row, none are.
const IDLE_LOOKS: u32 = 2;

pub(super) async fn close(wire: &TcpStream, out: Out) -> Result<(), PumpError> {
    match out {
        Out::Plain(_) => {}
        Out::Userspace { session, .. } if session.ending == Ending::Fin => {}
        Out::Userspace { mut sealer, .. } => {
            let record = sealer.seal(ALERT, &CLOSE_NOTIFY)?;
            send_all(wire, &record, Taken::Nothing).await.map_err(wire_lost)?;
        }
        Out::Kernel { session, start, given, .. } if session.ending == Ending::Fin => {
            drained(wire, session.suite, start, given).await.map_err(wire_lost)?;
        }
        Out::Kernel { .. } => close_notify(wire).await.map_err(wire_lost)?,
    }
    shut(wire).map_err(wire_lost)
}

/// Where a direction's counts stood before its first record.
#[derive(Debug, Clone, Copy)]
pub(super) struct Start {
    /// TCP's count of what was put into its send queue.
    written: u64,
    records: u64,
}

impl Start {
    /// `None` where the kernel does not tell.
    pub(super) fn of(wire: &TcpStream, suite: SupportedCipherSuite) -> Option<Self> {
        let records = ktls::records_sealed(wire, suite).ok()?;
        // Only differences are looked at, for which the SYN is nothing.
        let written = options::written(wire, Opening::Passive).ok()?;
        Some(Self { written, records })
    }
}

/// Waits until the records of all that was `given` to the kernel are in TCP's queue. Nothing that may be sent would tell, so it is
/// counted: each record is longer than its content by the same number of bytes.
async fn drained(wire: &TcpStream, suite: SupportedCipherSuite, start: Option<Start>, given: u64) -> io::Result<()> {
    let (mut wait, mut looks) = (AT_ONCE, 0);
    loop {
        if let (Some(start), Some(now)) = (start, Start::of(wire, suite)) {
            let records = now.records.saturating_sub(start.records);
            if now.written.saturating_sub(start.written) >= given + records * OVERHEAD {
                return Ok(());
            }
        }
        // Where the counts are not to be had, or do not meet: what has left TCP for so long brings nothing more.
        looks = if wait >= SHORTLY && socket::unacknowledged(wire)? == 0 { looks + 1 } else { 0 };
        if looks == IDLE_LOOKS {
            return Ok(());
        }
        pause(wire, wait).await?;
        wait = (2 * wait).min(SELDOM);
    }
}

/// Only a send that may block tells that nothing is left behind: when it returns before its time limit.
async fn close_notify(wire: &TcpStream) -> io::Result<()> {
    let mut wait = SHORTLY;
    loop {
        let handle = wire.as_fd().try_clone_to_owned()?;
        match tokio::task::spawn_blocking(move || blocking_close_notify(&handle)).await.map_err(io::Error::other)?? {
            Said::AllSent => return Ok(()),
            Said::Taken => break,
            // The peer reads slowly, or not at all for as long as it likes.
            Said::NoRoom => {
                pause(wire, wait).await?;
                wait = (2 * wait).min(LATER);
            }
        }
    }
    let mut looks = 0;
    while looks < IDLE_LOOKS {
        pause(wire, SHORTLY).await?;
        looks = if socket::unacknowledged(wire)? == 0 { looks + 1 } else { 0 };
    }
    Ok(())
}

async fn pause(wire: &TcpStream, time: Duration) -> io::Result<()> {
    tokio::time::sleep(time).await;
    socket::take_error(wire)?.map_or(Ok(()), Err)
}

enum Said {
    AllSent,
    Taken,
    NoRoom,
}

fn blocking_close_notify(wire: &OwnedFd) -> io::Result<Said> {
    socket2::SockRef::from(wire).set_write_timeout(Some(PATIENCE))?;
    // The flag is the open file's, so also the other direction's handle has it; that one asks for no waiting in each call.
    let flags = OFlag::from_bits_retain(fcntl(wire, FcntlArg::F_GETFL)?);
    fcntl(wire, FcntlArg::F_SETFL(flags.difference(OFlag::O_NONBLOCK)))?;
    let start = Instant::now();
    let result = socket::send_record(wire, ALERT, &CLOSE_NOTIFY);
    let taken = start.elapsed();
    fcntl(wire, FcntlArg::F_SETFL(flags))?;
    match result {
        Ok(_) if taken < PATIENCE => Ok(Said::AllSent),
        Ok(_) => Ok(Said::Taken),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(Said::NoRoom)
        }
        Err(error) => Err(error),
    }
}
