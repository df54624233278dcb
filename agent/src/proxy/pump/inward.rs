//! From the wire to the application: read, open, write; at close_notify, FIN. An end of stream without it is a truncation, unless
//! it was agreed that streams end by FIN; one in the middle of a record always is.

use std::io;

use tokio::net::TcpStream;

use super::{
    Budget, Burst, In, Moved, PumpError, PumpKind, READ, Taken,
    buffer::{Buffer, RECORDS},
    drain_all, send_all, send_all_vectored, shut, try_read, wire_lost,
};
use crate::{
    sys::{
        socket::{self, Received},
        splice::Pipe,
    },
    tls::{
        ktls::{self, Direction},
        records::{
            APPLICATION_DATA, Control, Ending, HEADER, Opener, RecordError, Session, read_control, sealed_body_length,
        },
    },
};

pub(super) async fn run(wire: &TcpStream, app: &TcpStream, mut into: In, moved: &Moved) -> Result<(), PumpError> {
    loop {
        wire.ready(READ).await.map_err(wire_lost)?;
        // In a box, so that an idle connection has no room for what moves bytes.
        if let Burst::Ended = Box::pin(burst(wire, app, &mut into, moved)).await? {
            return shut(app).map_err(PumpError::Application);
        }
    }
}

async fn burst(wire: &TcpStream, app: &TcpStream, into: &mut In, moved: &Moved) -> Result<Burst, PumpError> {
    match into {
        In::Plain(PumpKind::Copy) => plain(wire, app, moved).await,
        In::Plain(PumpKind::Splice) => splice(wire, app, None, moved).await,
        In::Kernel { pump: PumpKind::Splice, session } => splice(wire, app, Some(session), moved).await,
        In::Kernel { pump: PumpKind::Copy, session } => kernel(wire, app, session, moved).await,
        In::Userspace { opener, session } => userspace(wire, app, opener, session, moved).await,
    }
}

async fn plain(wire: &TcpStream, app: &TcpStream, moved: &Moved) -> Result<Burst, PumpError> {
    let (mut buffer, mut budget) = (Buffer::take(), Budget::new());
    loop {
        let read = match try_read(wire, || socket::recv(wire, &mut buffer)) {
            Ok(0) => return Ok(Burst::Ended),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Burst::Drained),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(wire_lost(error)),
        };
        send_all(app, &buffer[..read], Taken::Bytes(&moved.received)).await.map_err(PumpError::Application)?;
        budget.spend(read).await;
    }
}

async fn kernel(wire: &TcpStream, app: &TcpStream, session: &Session, moved: &Moved) -> Result<Burst, PumpError> {
    let (mut buffer, mut budget) = (Buffer::take(), Budget::new());
    loop {
        match record(wire, app, session, &mut buffer, moved).await? {
            Step::Data(read) => budget.spend(read).await,
            Step::Burst(burst) => return Ok(burst),
        }
    }
}

async fn splice(
    wire: &TcpStream,
    app: &TcpStream,
    session: Option<&Session>,
    moved: &Moved,
) -> Result<Burst, PumpError> {
    let (mut pipe, mut budget) = (Pipe::take().map_err(PumpError::Pipe)?, Budget::new());
    loop {
        let filled = try_read(wire, || pipe.fill(wire));
        // From kernel TLS 0 is the end of the stream or an empty record, and EINVAL says that a control record is next. Reading it tells.
        let unclear = match &filled {
            Ok(read) => *read == 0,
            Err(error) => error.raw_os_error() == Some(libc::EINVAL),
        };
        if let (true, Some(session)) = (unclear, session) {
            match record(wire, app, session, &mut Buffer::take(), moved).await? {
                Step::Data(read) => budget.spend(read).await,
                Step::Burst(burst) => return Ok(burst),
            }
            continue;
        }
        let read = match filled {
            Ok(0) => return Ok(Burst::Ended),
            Ok(read) => read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(Burst::Drained),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(wire_error(error)),
        };
        drain_all(&mut pipe, app, &moved.received).await.map_err(PumpError::Application)?;
        budget.spend(read).await;
    }
}

enum Step {
    Data(usize),
    Burst(Burst),
}

/// One read from a kernel TLS socket, of whatever type is next.
async fn record(
    wire: &TcpStream,
    app: &TcpStream,
    session: &Session,
    buffer: &mut Buffer,
    moved: &Moved,
) -> Result<Step, PumpError> {
    match try_read(wire, || socket::recv_record(wire, buffer)) {
        Ok(Received { len: 0, content_type: None }) => match session.ending {
            // What the kernel could not make a record of is still queued.
            Ending::Fin if socket::unread(wire).is_ok_and(|unread| unread == 0) => Ok(Step::Burst(Burst::Ended)),
            _ => Err(PumpError::Truncated),
        },
        Ok(Received { len, content_type: Some(APPLICATION_DATA) }) => {
            send_all(app, &buffer[..len], Taken::Bytes(&moved.received)).await.map_err(PumpError::Application)?;
            Ok(Step::Data(len))
        }
        Ok(Received { len, content_type: Some(content_type) }) => match read_control(content_type, &buffer[..len])? {
            Control::Closed => Ok(Step::Burst(Burst::Ended)),
            Control::Nothing => Ok(Step::Data(0)),
            Control::KeyUpdate { answer } => {
                ktls::install(wire, Direction::Receive, session.suite, session.next_receive()?)
                    .map_err(PumpError::CannotRekey)?;
                if answer {
                    session.want_update();
                }
                Ok(Step::Data(0))
            }
        },
        Ok(Received { len, content_type: None }) => {
            Err(RecordError::Unexpected(format!("{len} bytes of which the kernel does not tell the type")).into())
        }
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(Step::Burst(Burst::Drained)),
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Ok(Step::Data(0)),
        Err(error) => Err(wire_error(error)),
    }
}

/// Reads whole records into one buffer and opens them there. A record that has come only in part stays in the buffer, and the
/// buffer with this direction, until the rest comes.
async fn userspace(
    wire: &TcpStream,
    app: &TcpStream,
    opener: &mut Opener,
    session: &Session,
    moved: &Moved,
) -> Result<Burst, PumpError> {
    let (mut buffer, mut budget) = (Buffer::take(), Budget::new());
    let mut filled = 0;
    loop {
        match try_read(wire, || socket::recv(wire, &mut buffer[filled..])) {
            Ok(0) if filled == 0 && session.ending == Ending::Fin => return Ok(Burst::Ended),
            Ok(0) => return Err(PumpError::Truncated),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock && filled == 0 => return Ok(Burst::Drained),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                wire.ready(READ).await.map_err(wire_lost)?;
                continue;
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(wire_lost(error)),
        }
        let opened = open_all(&mut buffer[..filled], opener, session)?;
        let mut pieces: Vec<_> =
            opened.plaintext.iter().map(|range| io::IoSlice::new(&buffer[range.clone()])).collect();
        let bytes = pieces.iter().map(|piece| piece.len()).sum();
        let taken = Taken::Bytes(&moved.received);
        send_all_vectored(app, &mut pieces, taken).await.map_err(PumpError::Application)?;
        opened.end?;
        if opened.closed {
            return Ok(Burst::Ended);
        }
        buffer.copy_within(opened.consumed..filled, 0);
        filled -= opened.consumed;
        budget.spend(opened.consumed.max(bytes)).await;
    }
}

struct Opened {
    /// Where in the buffer application data lies now; never empty ranges.
    plaintext: Vec<std::ops::Range<usize>>,
    consumed: usize,
    closed: bool,
    /// What came after that data.
    end: Result<(), RecordError>,
}

fn open_all(buffer: &mut [u8], opener: &mut Opener, session: &Session) -> Result<Opened, RecordError> {
    let mut opened = Opened { plaintext: Vec::with_capacity(RECORDS), consumed: 0, closed: false, end: Ok(()) };
    loop {
        let start = opened.consumed + HEADER;
        let length = match sealed_body_length(&buffer[opened.consumed..]) {
            Ok(Some(length)) if start + length <= buffer.len() => length,
            Ok(_) => return Ok(opened),
            Err(error) => {
                opened.end = Err(error);
                return Ok(opened);
            }
        };
        opened.consumed = start + length;
        match opener.open(&mut buffer[start..start + length]) {
            Ok((APPLICATION_DATA, [])) => {}
            Ok((APPLICATION_DATA, data)) => opened.plaintext.push(start..start + data.len()),
            Ok((content_type, payload)) => match read_control(content_type, payload) {
                Ok(Control::Nothing) => {}
                Ok(Control::Closed) => {
                    opened.closed = true;
                    return Ok(opened);
                }
                Ok(Control::KeyUpdate { answer }) => {
                    *opener = Opener::new(session.suite, session.next_receive()?)?;
                    if answer {
                        session.want_update();
                    }
                }
                Err(error) => {
                    opened.end = Err(error);
                    return Ok(opened);
                }
            },
            Err(error) => {
                opened.end = Err(error);
                return Ok(opened);
            }
        }
    }
}

/// EBADMSG and EMSGSIZE are the kernel's words for a record that it could not open (net/tls/tls_sw.c).
fn wire_error(error: io::Error) -> PumpError {
    match error.raw_os_error() {
        Some(libc::EBADMSG | libc::EMSGSIZE | libc::EINVAL) => PumpError::Unreadable(error),
        _ => wire_lost(error),
    }
}
