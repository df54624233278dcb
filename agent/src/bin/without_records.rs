//! `marline` without records: for benches and tests of the mechanism alone. See `marline::tls::config`.

fn main() -> std::process::ExitCode {
    marline::cli::run()
}
