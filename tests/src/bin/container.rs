//! `container SPECIFICATION PROGRAM ARGUMENTS…`: becomes the program in a container (`marline_tests::container`, as JSON).

use std::{env, path::Path};

use anyhow::{Context, Result};
use marline_tests::container::Container;

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    let (specification, rest) = words.split_first().context("no specification")?;
    let (program, arguments) = rest.split_first().context("no program")?;
    let container: Container = serde_json::from_str(specification).context("the specification")?;
    container.become_program(Path::new(program), arguments)
}
