//! The server of the load program: a thread for each connection. The first byte of a block says what the client wants.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    thread,
};

use super::{BLOCK, wire::Wire};

/// A block that is to be answered with a block.
pub(super) const EXCHANGE: u8 = b'x';
/// A block after which bytes come until the client's end, to be answered with their number.
pub(super) const BULK: u8 = b'b';

/// How much is read and written at once where bytes flow one way.
pub(super) const CHUNK: usize = 128 * 1024;

/// Ten thousand idle connections are as many threads.
const STACK: usize = 128 * 1024;

/// Serves at an address until it is killed.
pub fn serve(address: SocketAddr) -> io::Result<()> {
    let listener = TcpListener::bind(address)?;
    for connection in listener.incoming() {
        let connection = connection?;
        // How a client goes is its own matter: it tells by itself what went wrong.
        thread::Builder::new().stack_size(STACK).spawn(move || answer(connection))?;
    }
    Ok(())
}

fn answer(connection: TcpStream) -> io::Result<()> {
    connection.set_nodelay(true)?;
    let mut connection = Wire::server(connection);
    let mut block = [0; BLOCK];
    loop {
        match connection.read_exact(&mut block) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            outcome => outcome?,
        }
        // As a message much comes alone: what was asked before may have come over another connection of a proxy's.
        if connection.left() > 0 {
            let announced = BLOCK as u64 + connection.left();
            let total = swallow(&mut connection, Some(announced), BLOCK as u64)?;
            connection.write_all(&total.to_be_bytes())?;
            continue;
        }
        match block[0] {
            EXCHANGE => connection.write_all(&block)?,
            BULK => {
                // The client begins to count when it has this.
                connection.write_all(&[BULK; BLOCK])?;
                let total = swallow(&mut connection, None, 0)?;
                return connection.write_all(&total.to_be_bytes());
            }
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

/// Reads until the end, or until there are as many as were announced, and returns how many there were.
fn swallow(connection: &mut Wire, announced: Option<u64>, so_far: u64) -> io::Result<u64> {
    let (mut chunk, mut total) = (vec![0; CHUNK], so_far);
    while announced != Some(total) {
        match connection.read(&mut chunk)? {
            0 => break,
            count => total += count as u64,
        }
    }
    Ok(total)
}
