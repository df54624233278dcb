//! From the application to the wire: read, seal, write. What is done at the application's end of stream is `closing`'s.

use std::io;

use tokio::{io::Interest, net::TcpStream};

use super::{
    Budget, Burst, Moved, Out, PumpError, PumpKind, READ, Taken,
    buffer::{Buffer, PLAINTEXT},
    closing, drain_all, send_all, send_all_vectored, try_read, wire_lost,
};
use crate::{
    sys::{socket, splice::Pipe},
    tls::{
        ktls::{self, Direction},
        records::{APPLICATION_DATA, Ending, HANDSHAKE, MAX_PLAINTEXT, Sealer, Session, blocks, key_update_message},
    },
};

pub(super) async fn run(app: &TcpStream, wire: &TcpStream, mut out: Out, moved: &Moved) -> Result<(), PumpError> {
    loop {
        app.ready(READ).await.map_err(PumpError::Application)?;
        // In a box, so that an idle connection has no room for what moves bytes.
        if let Burst::Ended = Box::pin(burst(app, wire, &mut out, moved)).await? {
            return Box::pin(closing::close(wire, out)).await;
        }
    }
}

async fn burst(app: &TcpStream, wire: &TcpStream, out: &mut Out, moved: &Moved) -> Result<Burst, PumpError> {
    match out {
        Out::Plain(PumpKind::Splice) | Out::Kernel { pump: PumpKind::Splice, .. } => {
            splice(app, wire, out, moved).await
        }
        _ => copy(app, wire, out, moved).await,
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
        let taken = Taken::Bytes(&moved.sent);
        match out {
            Out::Plain(_) => send_all(wire, data, taken).await.map_err(wire_lost)?,
            Out::Kernel { session, sealed, given, .. } => {
                keep_key_fresh(wire, session, sealed, read).await?;
                send_all(wire, data, taken).await.map_err(wire_lost)?;
                *given += read as u64;
            }
            Out::Userspace { sealer, session } => seal_and_send(wire, sealer, session, data, moved).await?,
        }
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
        drain_all(&mut pipe, wire, &moved.sent).await.map_err(wire_lost)?;
        if let Out::Kernel { given, .. } = out {
            *given += read as u64;
        }
        budget.spend(read).await;
    }
}

async fn seal_and_send(
    wire: &TcpStream,
    sealer: &mut Sealer,
    session: &Session,
    data: &[u8],
    moved: &Moved,
) -> Result<(), PumpError> {
    let mut records = Vec::with_capacity(data.len() / MAX_PLAINTEXT + 2);
    let spent = sealer.sealed() >= session.block_limit();
    if spent && session.ending == Ending::Fin {
        return Err(PumpError::KeySpent);
    }
    if spent || session.take_update_wanted() {
        records.push((sealer.seal(HANDSHAKE, &key_update_message(false))?, 0));
        *sealer = Sealer::new(session.suite, session.next_transmit()?)?;
    }
    for piece in data.chunks(MAX_PLAINTEXT) {
        records.push((sealer.seal(APPLICATION_DATA, piece)?, piece.len()));
    }
    let mut pieces: Vec<_> = records.iter().map(|(record, _)| io::IoSlice::new(record)).collect();
    let left = records.iter().rev().map(|(record, plaintext)| (record.len(), *plaintext)).collect();
    let taken = Taken::Records { counter: &moved.sent, left, partly: 0 };
    send_all_vectored(wire, &mut pieces, taken).await.map_err(wire_lost)
}

/// Changes the kernel's key where the peer asked for it or the key has sealed enough. `sealed` counts cipher blocks, and rather too
/// many: every write is taken to end in a short record.
async fn keep_key_fresh(wire: &TcpStream, session: &Session, sealed: &mut u64, bytes: usize) -> Result<(), PumpError> {
    *sealed += blocks(bytes) + (bytes / MAX_PLAINTEXT) as u64;
    let spent = *sealed >= session.block_limit();
    if !(spent || session.take_update_wanted()) {
        return Ok(());
    }
    if session.ending == Ending::Fin {
        return Err(PumpError::KeySpent);
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
