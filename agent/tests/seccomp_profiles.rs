//! The seccomp profiles for containers hold what `marline run` holds.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::collections::BTreeSet;

use marline::sys::seccomp::HELD;

fn number(name: &str) -> libc::c_long {
    match name {
        "accept" => libc::SYS_accept,
        "accept4" => libc::SYS_accept4,
        "close" => libc::SYS_close,
        "close_range" => libc::SYS_close_range,
        "connect" => libc::SYS_connect,
        "listen" => libc::SYS_listen,
        "shutdown" => libc::SYS_shutdown,
        other => panic!("{other} has no number here"),
    }
}

#[test]
fn a_containers_profile_holds_what_marline_run_holds() {
    let expected: BTreeSet<_> = HELD.into_iter().collect();
    for file in ["marline-amd64.json", "marline-arm64.json"] {
        let path = format!("{}/../deploy/seccomp/{file}", env!("CARGO_MANIFEST_DIR"));
        let profile: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        let rules = profile["syscalls"].as_array().unwrap().iter();
        let held = rules.filter(|rule| rule["action"] == "SCMP_ACT_NOTIFY").flat_map(|rule| {
            let names: Vec<String> = serde_json::from_value(rule["names"].clone()).unwrap();
            names.iter().map(|name| number(name)).collect::<Vec<_>>()
        });
        assert_eq!(held.collect::<BTreeSet<_>>(), expected, "{file}");
    }
}
