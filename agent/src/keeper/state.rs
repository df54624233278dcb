//! Reads the container process state of the OCI runtime specification, as a runtime sends it to `listenerPath`. Pure.

use serde::Deserialize;

use super::Container;

/// The runtime specification's name of the notify descriptor among the descriptors of the message.
const DESCRIPTOR: &str = "seccompFd";

/// Annotations can be large: Kubernetes allows 256 KiB of them.
pub(super) const LONGEST: usize = 1 << 20;
/// What is kept of it is small.
const LONGEST_ID: usize = 1024;
const LONGEST_METADATA: usize = 4096;

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Reading {
    /// The message is not complete.
    More,
    Done {
        container: Container,
        /// Which of the descriptors it is, and how many there must be.
        index: usize,
        count: usize,
    },
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum Malformed {
    #[error("the message is longer than {LONGEST} bytes")]
    Long,
    #[error("the message is not a container process state: {0}")]
    Json(String),
    #[error("the message has no {DESCRIPTOR} among its fds")]
    Unnamed,
    #[error("the message's {0} is too long")]
    Field(&'static str),
}

/// Reads what has come so far.
pub(super) fn read(bytes: &[u8]) -> Result<Reading, Malformed> {
    // A C string's end is no harm.
    let text = bytes.trim_ascii_end();
    let text = text.strip_suffix(b"\0").unwrap_or(text);
    if bytes.len() > LONGEST {
        return Err(Malformed::Long);
    }
    // Objects end so: there is no need to look at half a message again and again.
    if !text.is_empty() && text.first() == Some(&b'{') && text.last() != Some(&b'}') {
        return Ok(Reading::More);
    }
    let state: State = match serde_json::from_slice(text) {
        Ok(state) => state,
        Err(error) if error.is_eof() => return Ok(Reading::More),
        Err(error) => return Err(Malformed::Json(error.to_string())),
    };
    let index = state.fds.iter().position(|name| name == DESCRIPTOR).ok_or(Malformed::Unnamed)?;
    if state.state.id.len() > LONGEST_ID {
        return Err(Malformed::Field("state.id"));
    }
    if state.metadata.len() > LONGEST_METADATA {
        return Err(Malformed::Field("metadata"));
    }
    // The process that has the filter; for `exec` into a container it is not the container's first one.
    let pid = if state.pid != 0 { state.pid } else { state.state.pid };
    let container = Container { pid, id: state.state.id, metadata: state.metadata };
    Ok(Reading::Done { container, index, count: state.fds.len() })
}

#[derive(Deserialize)]
struct State {
    fds: Vec<String>,
    #[serde(default)]
    pid: u32,
    #[serde(default)]
    metadata: String,
    state: ContainerState,
}

#[derive(Deserialize)]
struct ContainerState {
    #[serde(default)]
    id: String,
    #[serde(default)]
    pid: u32,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As Debian's crun 1.8 sends it.
    const CRUN: &str = r#"{"ociVersion":"0.2.0","fds":["seccompFd"],"pid":1234,"metadata":"marline",
        "state":{"ociVersion":"1.0","id":"box","status":"creating","pid":1234,"bundle":"/b","annotations":{"a":"}"}}}"#;

    fn done(text: &str) -> (Container, usize, usize) {
        match read(text.as_bytes()) {
            Ok(Reading::Done { container, index, count }) => (container, index, count),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_runtime_is_understood_also_with_a_c_string_or_a_line_of_it() {
        let expected = Container { pid: 1234, id: "box".into(), metadata: "marline".into() };
        for end in ["", "\0", "\n"] {
            assert_eq!(done(&format!("{CRUN}{end}")), (expected.clone(), 0, 1), "{end:?}");
        }
    }

    #[test]
    fn a_message_that_comes_in_pieces_is_waited_for_at_every_byte() {
        for end in 0..CRUN.len() {
            assert_eq!(read(&CRUN.as_bytes()[..end]), Ok(Reading::More), "{}", &CRUN[..end]);
        }
    }

    #[test]
    fn the_descriptor_is_found_by_its_name() {
        let (_, index, count) = done(r#"{"fds":["pidFd","seccompFd"],"state":{"id":"x","pid":7}}"#);
        assert_eq!((index, count), (1, 2));
        assert_eq!(done(r#"{"fds":["seccompFd"],"state":{"id":"x","pid":7}}"#).0.pid, 7);
    }

    #[test]
    fn what_is_no_such_state_is_refused() {
        for (text, part) in [
            ("hello", "not a container process state"),
            ("[]", "not a container process state"),
            ("{}", "missing field"),
            (r#"{"fds":"seccompFd","state":{}}"#, "not a container process state"),
            (r#"{"fds":[],"state":{}}"#, "no seccompFd"),
            (r#"{"fds":["seccompFd"],"pid":-1,"state":{}}"#, "not a container process state"),
            (r#"{"fds":["seccompFd"],"state":{}} {}"#, "not a container process state"),
        ] {
            let error = read(text.as_bytes()).unwrap_err().to_string();
            assert!(error.contains(part), "{text}: {error}");
        }
        let long = format!(r#"{{"fds":["seccompFd"],"metadata":"{}","state":{{}}}}"#, "x".repeat(LONGEST_METADATA + 1));
        assert_eq!(read(long.as_bytes()), Err(Malformed::Field("metadata")));
        assert_eq!(read(&vec![b' '; LONGEST + 1]), Err(Malformed::Long));
    }
}
