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
        match block[0] {
            EXCHANGE => connection.write_all(&block)?,
            BULK => return swallow(connection),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        }
    }
}

fn swallow(mut connection: Wire) -> io::Result<()> {
    // The client begins to count when it has this.
    connection.write_all(&[BULK; BLOCK])?;
    let announced = connection.announced()?;
    let (mut chunk, mut total) = (vec![0; CHUNK], 0_u64);
    while announced != Some(total) {
        match connection.read(&mut chunk)? {
            0 => break,
            count => total += count as u64,
        }
    }
    connection.write_all(&total.to_be_bytes())
}
