//! A small program for pods: it talks TCP as plainly as can be and says exactly what became of it, where curl and its kind
//! hide the errno or try again. One line on standard output; the exit code is 0 if it could do what it was asked to.
//!
//!     talker echo PORT                   serve: give back all that comes, until the client's end
//!     talker spout PORT                  serve: write without end
//!     talker ask ADDRESS                 connect, write a line, read to the end
//!     talker drink ADDRESS               connect and read to the end, whatever comes
//!     talker many ADDRESS COUNT THREADS  so many echoes over connections of their own, from so many threads at once

use std::{
    env,
    io::{self, Read, Write},
    net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    process::ExitCode,
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

fn main() -> ExitCode {
    let words: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        ["echo", port] => number(port).and_then(|port| serve(port, echo)),
        ["spout", port] => number(port).and_then(|port| serve(port, spout)),
        ["ask", address] => address_of(address).and_then(ask),
        ["drink", address] => address_of(address).and_then(drink),
        ["many", address, count, threads] => address_of(address)
            .and_then(|address| Ok((address, number(count)?, number(threads)?)))
            .and_then(|(address, count, threads)| many(address, count, threads)),
        _ => Err("see the head of talker.rs for what it can do".to_owned()),
    };
    match outcome {
        Ok(said) => {
            println!("{said}");
            ExitCode::SUCCESS
        }
        Err(said) => {
            println!("{said}");
            ExitCode::FAILURE
        }
    }
}

fn number<T: std::str::FromStr>(word: &str) -> Result<T, String> {
    word.parse().map_err(|_| format!("{word} is not a number that fits"))
}

fn address_of(word: &str) -> Result<SocketAddr, String> {
    word.parse().map_err(|_| format!("{word} is not an address with a port"))
}

/// On both families, a thread for each connection.
fn serve(port: u16, with: fn(TcpStream) -> io::Result<()>) -> Result<String, String> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).map_err(|error| said("bind", &error))?;
    for connection in listener.incoming() {
        match connection {
            // A client that goes away is its own matter.
            Ok(connection) => drop(thread::spawn(move || with(connection))),
            Err(error) => return Err(said("accept", &error)),
        }
    }
    Ok(String::new())
}

fn echo(mut connection: TcpStream) -> io::Result<()> {
    let mut bytes = [0; 16_384];
    loop {
        match connection.read(&mut bytes)? {
            0 => return connection.shutdown(Shutdown::Write),
            count => connection.write_all(&bytes[..count])?,
        }
    }
}

fn spout(mut connection: TcpStream) -> io::Result<()> {
    loop {
        connection.write_all(&[b'x'; 16_384])?;
    }
}

fn ask(address: SocketAddr) -> Result<String, String> {
    let mut connection = TcpStream::connect(address).map_err(|error| said("connect", &error))?;
    connection.write_all(b"hello?\n").map_err(|error| said("write", &error))?;
    connection.shutdown(Shutdown::Write).map_err(|error| said("shutdown", &error))?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).map_err(|error| said("read", &error))?;
    Ok(format!("answer {answer:?}"))
}

fn drink(address: SocketAddr) -> Result<String, String> {
    let mut connection = TcpStream::connect(address).map_err(|error| said("connect", &error))?;
    let (mut bytes, mut total) = ([0; 16_384], 0_u64);
    loop {
        match connection.read(&mut bytes) {
            Ok(0) => return Ok(format!("end after {total} bytes")),
            Ok(count) => {
                if total == 0 {
                    // Whoever waits for the transfer to be under way waits for this line.
                    println!("drinking");
                    let _ = io::stdout().flush();
                }
                total += count as u64;
            }
            Err(error) => return Err(format!("{} after {total} bytes", said("read", &error))),
        }
    }
}

fn many(address: SocketAddr, count: u32, threads: u32) -> Result<String, String> {
    let (next, wrong) = (AtomicU32::new(0), AtomicU32::new(0));
    let first = std::sync::Mutex::new(None);
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let index = next.fetch_add(1, Ordering::Relaxed);
                    if index >= count {
                        return;
                    }
                    if let Err(error) = one_echo(address, index) {
                        wrong.fetch_add(1, Ordering::Relaxed);
                        if let Ok(mut first) = first.lock() {
                            first.get_or_insert(format!("connection {index}: {error}"));
                        }
                    }
                }
            });
        }
    });
    let wrong = wrong.into_inner();
    match first.into_inner().ok().flatten() {
        None => Ok(format!("{count} echoes")),
        Some(first) => Err(format!("{wrong} of {count} went wrong; the first: {first}")),
    }
}

fn one_echo(address: SocketAddr, index: u32) -> Result<(), String> {
    let mut connection = TcpStream::connect(address).map_err(|error| said("connect", &error))?;
    let text = format!("number {index} of many\n").repeat(20);
    connection.write_all(text.as_bytes()).map_err(|error| said("write", &error))?;
    connection.shutdown(Shutdown::Write).map_err(|error| said("shutdown", &error))?;
    let mut answer = String::new();
    connection.read_to_string(&mut answer).map_err(|error| said("read", &error))?;
    if answer == text { Ok(()) } else { Err(format!("{} bytes came for {}", answer.len(), text.len())) }
}

/// The call that failed and its errno: a name for those that scenarios look for.
fn said(call: &str, error: &io::Error) -> String {
    let name = match error.raw_os_error() {
        Some(libc::ECONNREFUSED) => "ECONNREFUSED".to_owned(),
        Some(libc::ECONNRESET) => "ECONNRESET".to_owned(),
        Some(libc::EPIPE) => "EPIPE".to_owned(),
        Some(number) => format!("errno {number}"),
        None => error.to_string(),
    };
    format!("{call}: {name}")
}
