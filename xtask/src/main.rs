//! `cargo xtask`: the commands of Marline's developers. This file is the command line; each command has a file of its own.
//!
//! Exit codes: 0 all is well; 1 something did not pass, or a step failed; 2 the command line is wrong; 128+N
//! signal N ended it. `vm` hands on its command's code.

mod bench;
mod build;
mod cluster;
mod demo;
mod deps;
mod image;
mod lint;
mod load;
mod manifests;
mod seccomp;
mod signals;
mod step;
mod test;
mod toolchain;
mod vm;
mod workspace;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

use signals::Interrupted;

#[derive(Debug, Parser)]
#[command(
    name = "cargo xtask",
    bin_name = "cargo xtask",
    version,
    about = "Builds, tests and runs Marline on this machine",
    max_term_width = 120
)]
struct Cli {
    #[command(subcommand)]
    command: Cmd,
}

#[derive(Debug, Subcommand)]
enum Cmd {
    /// Build the eBPF program and the agent that embeds it
    Build(build::Args),
    /// Build the eBPF program alone
    BuildEbpf,
    /// Run all tests: in the crates, on this kernel, in the VM
    Test(test::Args),
    /// Check format, clippy, the rules of the house, and the licences of dependencies
    Lint(lint::Args),
    /// Measure what the mesh costs, beside no mesh
    Bench(bench::Args),
    /// Watch real programs talk through the mesh without knowing it
    Demo(demo::Args),
    /// Make a two-node mesh on this box, or bring the one that is there up to date
    Up(cluster::UpArgs),
    /// Run a command in a pod of the mesh
    Exec(cluster::ExecArgs),
    /// Show the mesh's pods and what their agents say of them
    Status,
    /// Remove the mesh, or what is left of one
    Down,
    /// Build the agent and run it on this host
    Load(load::Args),
    /// Build the container image, without a container engine
    Image(image::Args),
    /// Render the plain manifests anew from the Helm chart
    Manifests(manifests::Args),
    /// Write the seccomp profiles for containers anew
    Seccomp(seccomp::Args),
    /// Run a command inside a stock Debian kernel that has kernel TLS
    Vm(vm::Args),
    #[command(hide = true)]
    TestGuest { plan: PathBuf },
    #[command(hide = true)]
    BenchGuest { plan: PathBuf },
    #[command(hide = true)]
    VmGuest { spec: PathBuf },
    #[command(hide = true)]
    VmShare(vm::share::Args),
    #[command(hide = true)]
    VmTied {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
}

fn main() -> ExitCode {
    let (result, failed) = match Cli::parse().command {
        Cmd::Build(args) => (build::run(&args).map(|()| 0), 1),
        Cmd::BuildEbpf => (build::ebpf().map(|()| 0), 1),
        Cmd::Test(args) => (test::run(&args), 1),
        Cmd::TestGuest { plan } => (test::guest(&plan), 1),
        Cmd::Bench(args) => (bench::run(&args), 1),
        Cmd::BenchGuest { plan } => (bench::guest(&plan), 1),
        Cmd::Demo(args) => (demo::run(&args), 1),
        Cmd::Up(args) => (cluster::up(&args).map(|()| 0), 1),
        Cmd::Exec(args) => (cluster::exec(&args), cluster::EXIT_NO_EXEC),
        Cmd::Status => (cluster::status().map(|()| 0), 1),
        Cmd::Down => (cluster::down().map(|()| 0), 1),
        Cmd::Load(args) => (load::run(&args).map(|()| 0), 1),
        Cmd::Lint(args) => (lint::run(&args).map(|()| 0), 1),
        Cmd::Manifests(args) => (manifests::run(&args).map(|()| 0), 1),
        Cmd::Image(args) => (image::run(&args).map(|()| 0), 1),
        Cmd::Seccomp(args) => (seccomp::run(&args).map(|()| 0), 1),
        Cmd::Vm(args) => (vm::run(&args), vm::EXIT_NO_VM),
        Cmd::VmGuest { spec } => vm::guest::main(&spec),
        Cmd::VmShare(args) => (vm::share::run(&args).map(|()| 0), 1),
        Cmd::VmTied { command } => (vm::share::become_tied(&command).map(|()| 0), 1),
    };
    let code = result.unwrap_or_else(|error| {
        step::report(&error);
        error.downcast_ref::<Interrupted>().map_or(failed, |interrupted| 128 + interrupted.0 as i32)
    });
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}
