//! What the agent logs, and the handle by which that is changed while it runs. What is said is every room's own; connections have a
//! log of their own (`access_log`).

use std::{
    io::IsTerminal,
    sync::{Arc, Mutex, PoisonError},
};

use tracing_appender::non_blocking::{NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::{
    EnvFilter, Registry, filter::FilterFn, fmt, layer::SubscriberExt, reload, util::SubscriberInitExt,
};

#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    #[error("{0:?} is neither LEVEL nor TARGET=LEVEL, with LEVEL one of off, error, warn, info, debug, trace")]
    Directive(String),
    #[error("a level cannot be read")]
    Parse(#[from] tracing_subscriber::filter::ParseError),
    #[error("the log cannot be set up")]
    Init(#[from] tracing_subscriber::util::TryInitError),
    #[error("the log's levels cannot be changed")]
    Reload(#[from] reload::Error),
}

/// The levels in force. A clone is another handle on the same ones.
#[derive(Clone)]
pub struct Levels(Arc<Inner>);

struct Inner {
    /// Those that the agent was started with.
    first: String,
    handle: reload::Handle<EnvFilter, Registry>,
    changing: Mutex<()>,
}

/// Lines that wait to be written at most. The room for them is there from the start, 32 bytes for each.
const BACKLOG: usize = 1 << 13;

const LEVELS: [&str; 6] = ["off", "error", "warn", "info", "debug", "trace"];

/// Written by a thread of its own, for as long as the guard lives: whoever does not read the log stops nothing.
pub fn init(directives: &str, json: bool) -> Result<(Levels, WorkerGuard), LoggingError> {
    let (filter, levels) = filter(directives)?;
    let registry = tracing_subscriber::registry().with(filter).with(without_answers());
    let (writer, guard) = NonBlockingBuilder::default().buffered_lines_limit(BACKLOG).finish(std::io::stderr());
    if json {
        registry.with(fmt::layer().json().with_writer(writer)).try_init()?;
    } else {
        let colour = std::io::stderr().is_terminal() && std::env::var_os("NO_COLOR").is_none();
        registry.with(fmt::layer().with_ansi(colour).with_writer(writer)).try_init()?;
    }
    Ok((levels, guard))
}

fn filter(directives: &str) -> Result<(reload::Layer<EnvFilter, Registry>, Levels), LoggingError> {
    let (layer, handle) = reload::Layer::new(EnvFilter::builder().parse(directives)?);
    let levels = Levels(Arc::new(Inner { first: directives.to_owned(), handle, changing: Mutex::new(()) }));
    Ok((layer, levels))
}

/// At any level: the API server's client writes answers that it cannot read whole into its warnings. Of a Secret that would be the CA's key,
/// of a TokenReview a token. What goes wrong with it its callers say.
fn without_answers() -> FilterFn {
    FilterFn::new(|metadata| !metadata.target().starts_with("kube_client"))
}

impl Levels {
    /// As they can be given to `--log`.
    pub fn now(&self) -> Result<String, LoggingError> {
        Ok(self.0.handle.with_current(EnvFilter::to_string)?)
    }

    /// Adds to them: `debug` for all that nothing else is said of, `marline::proxy=debug` for a room; several with commas between.
    pub fn add(&self, directives: &str) -> Result<String, LoggingError> {
        for directive in directives.split(',') {
            let level = directive.split_once('=').map_or(directive, |(_, level)| level);
            let known = LEVELS.iter().any(|known| known.eq_ignore_ascii_case(level));
            let target = directive.split_once('=').map(|(target, _)| target);
            let plain = |target: &str| {
                !target.is_empty() && target.chars().all(|c| c.is_ascii_alphanumeric() || ":_-.".contains(c))
            };
            if !known || !target.is_none_or(plain) {
                return Err(LoggingError::Directive(directive.to_owned()));
            }
        }
        let _turn = self.0.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(&format!("{},{directives}", self.now()?))
    }

    /// Those that the agent was started with.
    pub fn reset(&self) -> Result<String, LoggingError> {
        let _turn = self.0.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.set(&self.0.first)
    }

    fn set(&self, directives: &str) -> Result<String, LoggingError> {
        self.0.handle.reload(EnvFilter::builder().parse(directives)?)?;
        self.now()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_added_replaced_and_taken_back() {
        let (layer, levels) = filter("info").unwrap();
        assert_eq!(levels.now().unwrap(), "info");
        assert_eq!(levels.add("marline::proxy=debug").unwrap(), "marline::proxy=debug,info");
        assert_eq!(levels.add("marline::proxy=trace,warn").unwrap(), "marline::proxy=trace,warn");
        assert_eq!(levels.reset().unwrap(), "info");
        drop(layer);
        assert!(levels.now().is_err());
    }

    #[test]
    fn what_the_api_servers_client_says_of_its_answers_is_not_written() {
        use std::io::{Read, Seek};
        let mut file = tempfile::tempfile().unwrap();
        let written = Mutex::new(file.try_clone().unwrap());
        let layer = fmt::layer().with_ansi(false).with_writer(written);
        tracing::subscriber::with_default(Registry::default().with(without_answers()).with(layer), || {
            tracing::warn!(target: "kube_client::client", "{{\"ca-key.pem\": \"secret\"}}");
            tracing::warn!(target: "marline::ca", "a fault");
        });
        let mut text = String::new();
        file.rewind().unwrap();
        file.read_to_string(&mut text).unwrap();
        assert!(text.contains("a fault") && !text.contains("secret"), "{text}");
    }

    #[test]
    fn what_is_no_level_is_refused_by_name_and_changes_nothing() {
        let (_layer, levels) = filter("info").unwrap();
        for wrong in ["", "loud", "marline=", "=debug", "a=b", "debug,,", "x[{y=z}]=debug", "a b=info", "marline"] {
            let error = levels.add(wrong).unwrap_err();
            assert!(matches!(error, LoggingError::Directive(_)), "{wrong:?}: {error}");
            assert_eq!(levels.now().unwrap(), "info", "{wrong:?}");
        }
    }
}
