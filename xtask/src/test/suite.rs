//! Suites: which test binaries there are, and where each belongs. Running them is left to `runner`.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::build::Artifact;

/// One test binary.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Suite {
    pub name: String,
    pub binary: PathBuf,
    /// The package's folder, where cargo would start it as well.
    pub cwd: PathBuf,
    pub kind: Kind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Kind {
    /// Tests of one crate, inside it or beside it: they share nothing, and run once, on this kernel.
    Unit,
    /// Whole programs in network namespaces: one at a time, on every kernel that the name allows.
    Scenario { native: bool, vm: bool },
}

/// The folder of the crate whose test files are scenarios.
const SCENARIOS: &str = "tests";

impl Suite {
    /// By the name of its file: `vm_*` needs a kernel that only the VM has, `native_*` makes no sense there.
    pub(crate) fn new(artifact: Artifact) -> Self {
        let Artifact { name, kind, executable, package_root, .. } = artifact;
        let package = package_root.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let (name, kind) = if package == SCENARIOS && kind == "test" {
            let (vm_only, native_only) = (name.starts_with("vm_"), name.starts_with("native_"));
            (name, Kind::Scenario { native: !vm_only, vm: !native_only })
        } else if kind == "test" {
            (format!("{package}/{name}"), Kind::Unit)
        } else {
            (format!("{package}/{kind}"), Kind::Unit)
        };
        Self { name, binary: executable, cwd: package_root, kind }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn suite(package: &str, name: &str, kind: &str) -> Suite {
        let artifact = Artifact {
            name: name.into(),
            kind: kind.into(),
            executable: "/t".into(),
            package_root: format!("/w/{package}").into(),
            test: true,
        };
        Suite::new(artifact)
    }

    #[test]
    fn the_name_of_a_file_says_where_it_runs() {
        assert_eq!(suite("tests", "vm_ktls", "test").kind, Kind::Scenario { native: false, vm: true });
        assert_eq!(suite("tests", "native_pump", "test").kind, Kind::Scenario { native: true, vm: false });
        assert_eq!(suite("tests", "matrix", "test").kind, Kind::Scenario { native: true, vm: true });
    }

    #[test]
    fn tests_of_a_crate_are_named_by_it() {
        for (name, kind, expected) in [("vm_library", "lib", "agent/lib"), ("peers", "test", "agent/peers")] {
            let suite = suite("agent", name, kind);
            assert_eq!((suite.name.as_str(), suite.kind), (expected, Kind::Unit));
        }
        assert_eq!(suite("tests", "marline_tests", "lib").kind, Kind::Unit);
    }
}
