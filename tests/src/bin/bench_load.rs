//! The load program of `cargo xtask bench`: the server and the client of every mode. What it does is in the harness's `bench`.
//!
//!     bench_load serve ADDRESS   serve until killed
//!     bench_load run ORDER       an `Order` as JSON; an `Answer` as JSON on standard output

use std::{env, process::ExitCode};

use anyhow::{Context, Result, bail};
use marline_tests::bench::{client, server};
use nix::sys::resource::{Resource, getrlimit, setrlimit};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench_load: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    files_enough();
    let words: Vec<String> = env::args().skip(1).collect();
    match words.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["serve", address] => server::serve(address.parse().context("that is no address")?).context("serving"),
        ["run", order] => {
            let answer = client::run(&serde_json::from_str(order).context("that is no order")?)?;
            println!("{}", serde_json::to_string(&answer)?);
            Ok(())
        }
        _ => bail!("see the head of bench_load.rs for what it can do"),
    }
}

/// Ten thousand connections are more than most systems let a program have. What root may not raise either is told by what fails then.
fn files_enough() {
    const FILES: u64 = 1 << 16;
    if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && soft < FILES
    {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, FILES, hard.max(FILES));
    }
}
