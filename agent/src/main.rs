//! The `marline` binary: everything is in the library.

fn main() -> std::process::ExitCode {
    marline::cli::run()
}
