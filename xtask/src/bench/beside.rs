//! What stands in a bed in place of Marline's agents: sidecars, or a proxy that somebody brings with `--external`. Both are the harness's; what
//! is said of them is here.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr, sync::OnceLock};

use anyhow::{Context, Result};
use marline_tests::{
    cluster::{Cluster, Side},
    external, sidecar,
    sidecar::Roles,
};
use serde::{Deserialize, Serialize};

use super::bed::{Mode, Programs};

/// The proxy of `--external NAME=CMD`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct External {
    name: String,
    command: String,
}

/// A mode is called by the same name wherever it stands, and there is one external at most in a run.
static NAME: OnceLock<String> = OnceLock::new();

impl External {
    /// What the mode is called from now on.
    pub(super) fn announce(&self) {
        // Said twice, it is the same.
        let _ = NAME.set(self.name.clone());
    }

    pub(super) fn name() -> &'static str {
        NAME.get().map_or("external", String::as_str)
    }

    /// How it carried connections, as far as anybody knows.
    pub(super) fn ways(handshakes: usize) -> BTreeMap<String, usize> {
        BTreeMap::from([(
            "TLS 1.3 and nothing else was on the wire when it was looked at, before and after".to_owned(),
            handshakes,
        )])
    }
}

impl FromStr for External {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, command) = text.split_once('=').ok_or("it is NAME=CMD, as in haproxy=./haproxy.sh")?;
        let good = |character: char| character.is_ascii_alphanumeric() || character == '-';
        if name.is_empty() || !name.chars().all(good) {
            return Err(format!("a name is of letters, digits and dashes, not {name:?}"));
        }
        if command.trim().is_empty() {
            return Err(format!("no command for {name}"));
        }
        let taken = <Mode as clap::ValueEnum>::value_variants().iter().any(|mode| mode.name() == name);
        if taken {
            return Err(format!("{name} is a mode already"));
        }
        Ok(Self { name: name.to_owned(), command: command.to_owned() })
    }
}

/// What runs.
pub(super) enum Beside {
    Sidecars(Box<sidecar::Pair>),
    External(external::Pair),
}

impl Beside {
    /// Nothing in a mode that has none.
    pub(super) fn start(mode: Mode, programs: &Programs, cluster: &Cluster, roles: &Roles) -> Result<Option<Self>> {
        if let Some(layer) = mode.sidecars() {
            let envoy = programs.envoy.as_deref().context("there is no Envoy for this mode")?;
            return sidecar::Pair::start(envoy, cluster, layer, roles).map(|pair| Some(Self::Sidecars(Box::new(pair))));
        }
        if mode == Mode::External {
            let External { name, command } = programs.external.as_ref().context("there is no --external")?;
            return external::Pair::start(name, command, cluster, roles).map(|pair| Some(Self::External(pair)));
        }
        Ok(None)
    }

    pub(super) fn cgroups(&self) -> Vec<(Side, PathBuf)> {
        match self {
            Self::Sidecars(pair) => pair.cgroups().into(),
            Self::External(pair) => pair.cgroups(),
        }
    }

    pub(super) fn report(&self) -> String {
        match self {
            Self::Sidecars(pair) => pair.report(),
            Self::External(pair) => pair.report(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_external_has_a_name_of_its_own_and_a_command() {
        let external: External = "other-1=FOO=bar sh other.sh".parse().unwrap();
        assert_eq!((external.name.as_str(), external.command.as_str()), ("other-1", "FOO=bar sh other.sh"));
        for wrong in ["other", "=cmd", "other=", "o ther=cmd", "sidecar=cmd", "none=cmd"] {
            assert!(wrong.parse::<External>().is_err(), "{wrong}");
        }
    }
}
