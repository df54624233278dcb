//! The rules of the house that a compiler does not know: which room may use which, who may do I/O, where unsafe code may live,
//! how a file begins. Pure: text in, findings out. Reading files and reporting is left to `lint`.

use super::lexer::{self, RustPath, Token};

/// Something to mend, or (for lengths) to look at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    pub file: String,
    pub line: usize,
    pub message: String,
    /// Only a hint; does not fail the check.
    pub hint: bool,
}

/// The agent's rooms and those that each may use. Dependencies point one way; nobody but `app` uses `proxy`.
const ROOMS: [(&str, &[&str]); 19] = [
    ("words", &[]),
    ("logging", &[]),
    ("sys", &[]),
    ("identity", &["words"]),
    ("policy", &["identity"]),
    ("state", &["policy", "identity"]),
    ("config", &["state", "policy", "identity"]),
    ("metrics", &["words", "state", "policy", "identity", "sys"]),
    ("access_log", &["words", "config", "state", "policy", "identity", "metrics", "sys"]),
    ("tls", &["sys", "identity"]),
    ("keeper", &["words", "sys"]),
    ("cni", &["words"]),
    ("control", &["words", "config", "state", "policy", "identity", "metrics"]),
    ("ca", &["words", "config", "control", "identity"]),
    ("bpf", &["words", "state", "policy", "identity", "sys", "metrics"]),
    ("admin", &["words", "state", "policy", "identity", "metrics", "access_log", "config", "sys"]),
    ("proxy", &["words", "state", "policy", "identity", "sys", "tls", "bpf", "keeper", "metrics", "access_log"]),
    (
        "app",
        &[
            "words",
            "access_log",
            "admin",
            "bpf",
            "cni",
            "config",
            "control",
            "identity",
            "keeper",
            "logging",
            "metrics",
            "policy",
            "proxy",
            "state",
            "sys",
            "tls",
        ],
    ),
    (
        "cli",
        &[
            "words", "admin", "app", "bpf", "ca", "cni", "config", "control", "identity", "keeper", "logging",
            "policy", "state", "sys",
        ],
    ),
];

/// What a pure room must not touch: decisions are made from what they are given.
const PURE: &str = "policy";
const IMPURE: [&str; 11] = [
    "std::fs",
    "std::io",
    "std::process",
    "std::env",
    "std::thread",
    "std::os",
    "std::time::Instant",
    "std::time::SystemTime",
    "tokio",
    "nix",
    "libc",
];
/// Of std::net a pure room may use the addresses.
const SOCKETS: [&str; 5] = ["TcpStream", "TcpListener", "UdpSocket", "ToSocketAddrs", "*"];

/// Where unsafe code may be written. `common` describes memory that the kernel shares.
const UNSAFE: [&str; 5] = ["agent/src/sys.rs", "agent/src/sys/", "agent/src/tls/ktls.rs", "common/src/", "ebpf/src/"];

/// A file that is longer is a place to look at, not a fault.
const LONG: usize = 400;

/// Checks one file. `path` is relative to the root, with `/`.
pub(crate) fn check(path: &str, source: &str) -> Vec<Finding> {
    let tokens = lexer::tokens(source);
    let paths = lexer::paths(&tokens);
    let mut findings = Vec::new();
    let mut find =
        |line: usize, message: String| findings.push(Finding { file: path.to_owned(), line, message, hint: false });
    if !source.starts_with("//!") {
        find(1, "does not begin with //! (what the file does, and what it leaves to whom)".into());
    }
    if !UNSAFE.iter().any(|allowed| path.starts_with(allowed)) {
        for token in tokens.iter().filter(|token| is_unsafe(token)) {
            find(token.line, format!("unsafe code may live only in {}", UNSAFE.join(", ")));
        }
    }
    for used in &paths {
        for message in [imports(path, used), purity(path, used), outside(path, used)].into_iter().flatten() {
            find(used.line, message);
        }
    }
    if path.ends_with("/mod.rs") {
        find(1, "no mod.rs: foo.rs stands beside foo/".into());
    }
    findings.dedup();
    let lines = source.lines().count();
    if lines > LONG {
        findings.push(Finding {
            file: path.to_owned(),
            line: LONG,
            message: format!("{lines} lines: can it be two files?"),
            hint: true,
        });
    }
    findings
}

/// Rooms that are declared in lib.rs must be in the table: a new one gets its place there first.
pub(crate) fn unknown_rooms(lib: &str) -> Vec<Finding> {
    let tokens = lexer::tokens(lib);
    let declared =
        tokens.windows(3).filter(|window| window[0].text == "mod" && window[2].text == ";").map(|window| &window[1]);
    let unknown = declared.filter(|name| ROOMS.iter().all(|(room, _)| *room != name.text));
    let finding = |name: &Token| Finding {
        file: "agent/src/lib.rs".into(),
        line: name.line,
        message: format!(
            "the room `{}` has no line in ROOMS (xtask/src/lint/rooms.rs): say what it may use",
            name.text
        ),
        hint: false,
    };
    unknown.map(finding).collect()
}

fn is_unsafe(token: &Token) -> bool {
    // The second word is that of the attribute that would allow the first. In Cargo.toml it is denied for all.
    token.text == "unsafe" || token.text == "unsafe_code"
}

/// One room using another.
fn imports(path: &str, used: &RustPath) -> Option<String> {
    let inside = path.strip_prefix("agent/src/")?.strip_suffix(".rs")?;
    let other = room_of(inside, used)?;
    let room = inside.split('/').next()?;
    let allowed: &[&str] = match room {
        "main" => &["cli"],
        "lib" => &[],
        _ => ROOMS.iter().find(|(name, _)| *name == room)?.1,
    };
    (room != other && !allowed.contains(&other)).then(|| {
        let list = if allowed.is_empty() { "none".to_owned() } else { allowed.join(", ") };
        format!("`{room}` must not use `{other}` (it may use: {list})")
    })
}

/// The room that a path leads to: through `crate::`, `marline::` (in main.rs), or up with `super::`.
fn room_of<'a>(inside: &str, used: &'a RustPath) -> Option<&'a str> {
    let ups = used.parts.iter().take_while(|part| *part == "super").count();
    let depth = inside.split('/').count();
    let next = match used.parts.first()?.as_str() {
        "crate" | "marline" => used.parts.get(1)?,
        "super" if ups >= depth => used.parts.get(ups)?,
        _ => return None,
    };
    ROOMS.iter().find(|(room, _)| room == next).map(|_| next.as_str())
}

fn purity(path: &str, used: &RustPath) -> Option<String> {
    let inside = path.strip_prefix("agent/src/")?;
    if inside.strip_suffix(".rs") != Some(PURE) && !inside.starts_with(&format!("{PURE}/")) {
        return None;
    }
    let text = used.parts.join("::");
    let impure = IMPURE.iter().any(|bad| text == *bad || text.starts_with(&format!("{bad}::")));
    let socket = used.parts.len() > 2 && used.parts[..2] == ["std", "net"] && SOCKETS.contains(&used.parts[2].as_str());
    (impure || socket).then(|| format!("`{PURE}` is pure: no `{text}`"))
}

/// The harness and this tool must build without the agent.
fn outside(path: &str, used: &RustPath) -> Option<String> {
    let apart = path.starts_with("tests/src/") || path.starts_with("xtask/src/");
    (apart && used.parts[0] == "marline").then(|| "must not use the agent's crate: it is for tests/tests".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn messages(path: &str, body: &str) -> Vec<String> {
        let findings = check(path, &format!("//! Text.\n{body}"));
        findings.into_iter().map(|finding| finding.message).collect()
    }

    #[test]
    fn a_room_that_uses_one_it_must_not_is_found_however_it_is_written() {
        for body in [
            "use crate::proxy::start;",
            "use crate::{policy::Workload, proxy};",
            "fn f() { crate::proxy::start() }",
            "use super::proxy::start;",
            "pub(crate) use crate::proxy::*;",
        ] {
            let found = messages("agent/src/state.rs", body);
            assert!(found.iter().any(|message| message.contains("`state` must not use `proxy`")), "{body}: {found:?}");
        }
        let deep = messages("agent/src/policy/model.rs", "use super::super::state::Snapshot;");
        assert!(deep[0].contains("`policy` must not use `state`"), "{deep:?}");
        let main = messages("agent/src/main.rs", "fn main() { marline::app::run() }");
        assert!(main[0].contains("`main` must not use `app`"), "{main:?}");
    }

    #[test]
    fn what_a_room_may_use_passes() {
        assert_eq!(
            messages(
                "agent/src/state.rs",
                "use crate::{identity::SpiffeId, policy::Workload};\nuse crate::state::Snapshot;"
            ),
            [""; 0]
        );
        assert_eq!(messages("agent/src/proxy/pump.rs", "use super::account::Record;\nuse crate::tls::ktls;"), [""; 0]);
        assert_eq!(messages("agent/src/app.rs", "use crate::proxy::inbound;"), [""; 0]);
        assert_eq!(messages("agent/src/main.rs", "fn main() { marline::cli::run() }"), [""; 0]);
        // A comment or a string is not a use.
        assert_eq!(messages("agent/src/state.rs", "// crate::proxy::x\nconst X: &str = \"crate::proxy::x\";"), [""; 0]);
    }

    #[test]
    fn only_app_uses_proxy() {
        let users: Vec<&str> =
            ROOMS.iter().filter(|(_, uses)| uses.contains(&"proxy")).map(|(room, _)| *room).collect();
        assert_eq!(users, ["app"]);
    }

    #[test]
    fn the_table_of_rooms_has_no_circle() {
        let mut settled: Vec<&str> = Vec::new();
        for _ in ROOMS {
            let ready = |(room, uses): &(&str, &[&str])| {
                !settled.contains(room) && uses.iter().all(|used| settled.contains(used))
            };
            let more: Vec<&str> = ROOMS.iter().filter(|line| ready(line)).map(|(room, _)| *room).collect();
            settled.extend(more);
        }
        assert_eq!(settled.len(), ROOMS.len(), "in a circle: all but {settled:?}");
    }

    #[test]
    fn policy_does_no_io_but_may_name_addresses() {
        for body in [
            "use std::fs;",
            "use std::{collections::BTreeMap, fs::File};",
            "use tokio::sync::watch;",
            "use std::net::TcpStream;",
            "use std::net::{IpAddr, TcpListener};",
            "fn now() { std::time::SystemTime::now(); }",
        ] {
            assert!(messages("agent/src/policy/evaluate.rs", body).iter().any(|m| m.contains("is pure")), "{body}");
        }
        assert_eq!(messages("agent/src/policy.rs", "use std::{net::{IpAddr, SocketAddr}, time::Duration};"), [""; 0]);
        assert_eq!(messages("agent/src/config.rs", "use std::fs;"), [""; 0]);
    }

    #[test]
    fn unsafe_code_is_found_outside_its_places() {
        for body in ["fn f() { unsafe { g() } }", "#![allow(unsafe_code)]"] {
            assert!(messages("agent/src/proxy/pump.rs", body)[0].contains("unsafe code may live only"), "{body}");
            assert_eq!(messages("agent/src/sys/splice.rs", body), [""; 0]);
            assert_eq!(messages("agent/src/tls/ktls.rs", body), [""; 0]);
        }
        assert!(!messages("agent/src/tls/records.rs", "unsafe fn f() {}").is_empty());
    }

    #[test]
    fn a_file_begins_with_what_it_does() {
        let found = check("agent/src/app.rs", "use std::fmt;\n//! late");
        assert_eq!((found.len(), found[0].line), (1, 1));
    }

    #[test]
    fn the_harness_and_the_tool_build_without_the_agent() {
        assert!(
            messages("tests/src/lib.rs", "use marline::identity::SpiffeId;")[0]
                .contains("must not use the agent's crate")
        );
        assert_eq!(messages("tests/tests/matrix.rs", "use marline::identity::SpiffeId;"), [""; 0]);
    }

    #[test]
    fn a_long_file_is_a_hint_and_a_new_room_is_a_finding() {
        let found = check("common/src/lib.rs", &format!("//! x\n{}", "\n".repeat(LONG)));
        assert!(found.len() == 1 && found[0].hint);
        assert!(unknown_rooms("pub mod app;\npub mod attic;")[0].message.contains("`attic`"));
        assert_eq!(unknown_rooms("pub mod app;"), []);
    }
}
