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
    /// Tests inside a crate: they share nothing, and run once, on this kernel.
    Unit,
    /// Whole programs in network namespaces: one at a time, on every kernel that the name allows.
    Scenario { native: bool, vm: bool },
}

impl Suite {
    /// By the name of its file: `vm_*` needs a kernel that only the VM has, `native_*` makes no sense there.
    pub(crate) fn new(artifact: Artifact) -> Self {
        let Artifact { name, kind, executable, package_root, .. } = artifact;
        let package = package_root.file_name().map_or_else(String::new, |name| name.to_string_lossy().into_owned());
        let (name, kind) = if kind == "test" {
            let (vm_only, native_only) = (name.starts_with("vm_"), name.starts_with("native_"));
            (name, Kind::Scenario { native: !vm_only, vm: !native_only })
        } else {
            (format!("{package} (unit, {kind})"), Kind::Unit)
        };
        Self { name, binary: executable, cwd: package_root, kind }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kind(name: &str, kind: &str) -> Kind {
        let artifact = Artifact {
            name: name.into(),
            kind: kind.into(),
            executable: "/t".into(),
            package_root: "/w/tests".into(),
            test: true,
        };
        Suite::new(artifact).kind
    }

    #[test]
    fn the_name_of_a_file_says_where_it_runs() {
        assert_eq!(kind("vm_ktls", "test"), Kind::Scenario { native: false, vm: true });
        assert_eq!(kind("native_pump", "test"), Kind::Scenario { native: true, vm: false });
        assert_eq!(kind("matrix", "test"), Kind::Scenario { native: true, vm: true });
        assert_eq!(kind("vm_library", "lib"), Kind::Unit);
    }
}
