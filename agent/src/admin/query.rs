//! What comes behind the `?` of a request that changes something.

use percent_encoding::percent_decode_str;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Logging {
    Show,
    Reset,
    Add(String),
}

/// `level=…`, once or several times, or `reset`.
pub(super) fn logging(query: &str) -> Result<Logging, String> {
    let mut levels = Vec::new();
    let mut reset = false;
    for part in query.split('&').filter(|part| !part.is_empty()) {
        match part.split_once('=') {
            Some(("level", level)) => {
                let level = percent_decode_str(level).decode_utf8().map_err(|_| "the level is not UTF-8 text")?;
                levels.push(level.into_owned());
            }
            Some(("reset", "")) | None if part.trim_end_matches('=') == "reset" => reset = true,
            _ => return Err(format!("{part:?} is not known here: write level=LEVEL, level=TARGET=LEVEL or reset")),
        }
    }
    match (levels.is_empty(), reset) {
        (true, false) => Ok(Logging::Show),
        (true, true) => Ok(Logging::Reset),
        (false, false) => Ok(Logging::Add(levels.join(","))),
        (false, true) => Err("either reset or level: not both at once".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_read_as_they_are_or_escaped() {
        let add = |text: &str| Ok(Logging::Add(text.to_owned()));
        assert_eq!(logging("level=debug"), add("debug"));
        assert_eq!(logging("level=marline::proxy=debug"), add("marline::proxy=debug"));
        assert_eq!(logging("level=marline%3A%3Aproxy%3Ddebug"), add("marline::proxy=debug"));
        assert_eq!(logging("level=a=debug&level=b=trace"), add("a=debug,b=trace"));
        assert_eq!(logging("reset"), Ok(Logging::Reset));
        assert_eq!(logging("reset="), Ok(Logging::Reset));
        assert_eq!(logging(""), Ok(Logging::Show));
        for wrong in ["levle=debug", "level", "reset&level=debug", "reset=1", "level=%ff", "debug"] {
            assert!(logging(wrong).is_err(), "{wrong}");
        }
    }
}
