//! From the application to the wire: read, seal, write; at the application's end of stream, close_notify and FIN.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    time::{Duration, Instant},
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::{io::Interest, net::TcpStream};

use super::{
    Budget, Burst, Moved, Out, PumpError, PumpKind, READ, add,
    buffer::{Buffer, PLAINTEXT},
    send_all, send_all_vectored, shut, try_read, wire_lost,
};
use crate::{
    sys::{socket, splice::Pipe},
    tls::{
        ktls::{self, Direction},
        records::{
            ALERT, APPLICATION_DATA, CLOSE_NOTIFY, HANDSHAKE, MAX_PLAINTEXT, Sealer, Session, blocks,
            key_update_message,
        },
    },
};

/// How long a blocking close_notify may take before the wait is made without a thread.
const PATIENCE: Duration = Duration::from_millis(200);
/// When to look again at a peer that reads slowly. Longer from time to time: a thread is taken for each try.
const SHORTLY: Duration = Duration::from_millis(20);
const LATER: Duration = Duration::from_secs(5);

pub(super) async fn run(app: &TcpStream, wire: &TcpStream, mut out: Out, moved: &Moved) -> Result<(), PumpError> {
    loop {
        app.ready(READ).await.map_err(PumpError::Application)?;
        let burst = match &out {
            Out::Plain(PumpKind::Splice) | Out::Kernel { pump: PumpKind::Splice, .. } => {
                splice(app, wire, &mut out, moved).await?
            }
            _ => copy(app, wire, &mut out, moved).await?,
        };
        if let Burst::Ended = burst {
            return close(wire, out).await;
        }
    }
}

async fn copy(app: &TcpStream, wire: &TcpStream, out: &mut Out, moved: &Moved) -> Result<Burst, PumpError> {
    let (mut buffer, mut budget) = (Buffer::take(), Budget::new());
    loop {
        let read = match try_read(app, || socket::recv(app, &mut buffer[..PLAINTEXT])) {
            Ok(0) => return Ok(Burst::Ended),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Burst::Drained),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(PumpError::Application(error)),
        };
        let data = &buffer[..read];
        match out {
            Out::Plain(_) => send_all(wire, data).await.map_err(wire_lost)?,
            Out::Kernel { session, sealed, .. } => {
                keep_key_fresh(wire, session, sealed, read).await?;
                send_all(wire, data).await.map_err(wire_lost)?;
            }
            Out::Userspace { sealer, session } => seal_and_send(wire, sealer, session, data).await?,
        }
        add(&moved.sent, read);
        budget.spend(read).await;
    }
}

async fn splice(app: &TcpStream, wire: &TcpStream, out: &mut Out, moved: &Moved) -> Result<Burst, PumpError> {
    let (mut pipe, mut budget) = (Pipe::take().map_err(PumpError::Pipe)?, Budget::new());
    loop {
        let read = match try_read(app, || pipe.fill(app)) {
            Ok(0) => return Ok(Burst::Ended),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Burst::Drained),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(PumpError::Application(error)),
        };
        if let Out::Kernel { session, sealed, .. } = out {
            keep_key_fresh(wire, session, sealed, read).await?;
        }
        while !pipe.is_empty() {
            match wire.try_io(Interest::WRITABLE, || pipe.drain(wire)) {
                Ok(0) => return Err(PumpError::Wire(io::ErrorKind::WriteZero.into())),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    wire.writable().await.map_err(wire_lost)?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(wire_lost(error)),
            }
        }
        add(&moved.sent, read);
        budget.spend(read).await;
    }
}

async fn seal_and_send(wire: &TcpStream, sealer: &mut Sealer, session: &Session, data: &[u8]) -> Result<(), PumpError> {
    let mut records = Vec::with_capacity(data.len() / MAX_PLAINTEXT + 2);
    if session.take_update_wanted() || sealer.sealed() >= session.block_limit() {
        records.push(sealer.seal(HANDSHAKE, &key_update_message(false))?);
        *sealer = Sealer::new(session.suite, session.next_transmit()?)?;
    }
    for piece in data.chunks(MAX_PLAINTEXT) {
        records.push(sealer.seal(APPLICATION_DATA, piece)?);
    }
    let mut pieces: Vec<_> = records.iter().map(|record| io::IoSlice::new(record)).collect();
    send_all_vectored(wire, &mut pieces).await.map_err(wire_lost)
}

/// Changes the kernel's key where the peer asked for it or the key has sealed enough. `sealed` counts cipher blocks, and rather too
/// many: every write is taken to end in a short record.
async fn keep_key_fresh(wire: &TcpStream, session: &Session, sealed: &mut u64, bytes: usize) -> Result<(), PumpError> {
    *sealed += blocks(bytes) + (bytes / MAX_PLAINTEXT) as u64;
    let spent = *sealed >= session.block_limit();
    if !(spent || session.take_update_wanted()) {
        return Ok(());
    }
    let secrets = session.next_transmit()?;
    let message = key_update_message(false);
    loop {
        match wire.try_io(Interest::WRITABLE, || socket::send_record(wire, HANDSHAKE, &message)) {
            Ok(_) => break,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => wire.writable().await.map_err(wire_lost)?,
            Err(error) => return Err(wire_lost(error)),
        }
    }
    *sealed = 0;
    ktls::install(wire, Direction::Transmit, session.suite, secrets)
        .map_err(|error| if spent { PumpError::RecordLimit(error) } else { PumpError::CannotRekey(error) })
}

/// Says close_notify where there are records, then FIN.
async fn close(wire: &TcpStream, out: Out) -> Result<(), PumpError> {
    match out {
        Out::Plain(_) => {}
        Out::Userspace { mut sealer, .. } => {
            let record = sealer.seal(ALERT, &CLOSE_NOTIFY)?;
            send_all(wire, &record).await.map_err(wire_lost)?;
        }
        Out::Kernel { .. } => close_notify(wire).await.map_err(wire_lost)?,
    }
    shut(wire).map_err(wire_lost)
}

/// The kernel accepts bytes before it has handed their records to TCP; a FIN sent then overtakes and loses them (tls_sw.c,
/// tls_tx_records). Only a send that may block tells: when it returns before its time limit, nothing is left behind.
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
    // Records still in the kernel are sent when the peer has acknowledged what TCP holds; that seen twice in a row, none are.
    let mut looks = 0;
    while looks < 2 {
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
