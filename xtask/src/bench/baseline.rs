//! What the mesh cost in instructions when somebody last looked, and whether it costs more now. The file is part of the tree, so that a change
//! that costs shows it in itself. Measuring is left to the VM and to whoever runs it; comparing is pure.

use std::{fmt::Write as _, fs, path::PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use super::{
    bed::Mode,
    plan::Figure,
    report::Report,
    stats::{Series, Verdict},
};
use crate::workspace;

/// Instructions are counted to about 1 %; what is more than this is the change's doing.
const TOLERANCE: f64 = 0.03;

/// What is kept.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Baseline {
    pub taken_with: With,
    pub figures: Vec<Known>,
}

/// Whatever else decides how many instructions there are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct With {
    /// As `--vm` calls it.
    pub vm: String,
    pub kernel: String,
    pub qemu: String,
    pub cipher: Option<String>,
    pub quick: bool,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Known {
    #[serde(flatten)]
    pub figure: Figure,
    pub mode: Mode,
    #[serde(flatten)]
    pub series: Series,
}

/// Where it is. Not at the top: what is there is a short list.
pub(super) fn file() -> PathBuf {
    workspace::root().join("xtask/bench/baseline.json")
}

impl Baseline {
    /// What is worth keeping of a report from the VM.
    pub(super) fn of(report: &Report, vm: &str) -> Self {
        let place = &report.place;
        let taken_with = With {
            vm: vm.to_owned(),
            kernel: place.kernel.clone(),
            qemu: place.qemu.clone().unwrap_or_default(),
            cipher: place.cipher.clone(),
            quick: report.quick,
        };
        // How often threads are switched hangs on timing, and no two runs agree on it.
        let instructions = report.rows.iter().filter(|row| row.figure.unit.starts_with("thousand/"));
        let known =
            instructions.map(|row| Known { figure: row.figure.clone(), mode: row.mode, series: row.series.clone() });
        Self { taken_with, figures: known.collect() }
    }

    pub(super) fn read() -> Result<Self> {
        let file = file();
        let text = fs::read_to_string(&file).with_context(|| format!("cannot read {}; {RENEW}", file.display()))?;
        serde_json::from_str(&text).with_context(|| format!("cannot understand {}; {RENEW}", file.display()))
    }

    pub(super) fn write(&self) -> Result<()> {
        let file = file();
        fs::write(&file, serde_json::to_string_pretty(self)? + "\n")
            .with_context(|| format!("cannot write {}", file.display()))
    }

    /// The modes of Marline itself that it knows: what stands beside them is not ours to watch.
    pub(super) fn own_modes(&self) -> Vec<Mode> {
        let mut modes: Vec<Mode> =
            self.figures.iter().map(|known| known.mode).filter(|mode| mode.takes_agent()).collect();
        modes.sort_unstable();
        modes.dedup();
        modes
    }
}

/// How to get another.
pub(super) const RENEW: &str = "renew it: check out the state to compare with, run `cargo xtask bench --vm 6.12 --save` there, and commit xtask/bench/baseline.json";

impl With {
    /// Why figures that were taken with this cannot be compared with those of another.
    pub(super) fn differs(&self, now: &Self) -> Option<String> {
        let same =
            [("kernel", &self.kernel, &now.kernel), ("emulator", &self.qemu, &now.qemu), ("VM", &self.vm, &now.vm)];
        if let Some((what, then, now)) = same.into_iter().find(|(_, then, now)| then != now) {
            return Some(format!("the baseline's {what} was {then}, this one's is {now}"));
        }
        if self.cipher != now.cipher {
            let name = |cipher: &Option<String>| cipher.clone().unwrap_or_else(|| "none".into());
            return Some(format!(
                "the baseline's kernel encrypted with {}, this one with {}",
                name(&self.cipher),
                name(&now.cipher)
            ));
        }
        (self.quick != now.quick).then(|| "one of the two is --quick".to_owned())
    }
}

/// One figure, then and now.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Change {
    pub figure: Figure,
    pub label: &'static str,
    pub base: f64,
    /// Nothing if it was not measured.
    pub now: Option<f64>,
    pub judgement: Judgement,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Judgement {
    Costs,
    Gains,
    Same,
    /// More than is tolerated, and no more than the rounds of one run are apart.
    Noise,
    Missing,
}

/// Each figure of the baseline that is of one of these modes, beside the same of now.
pub(super) fn compare(base: &Baseline, now: &Baseline, modes: &[Mode]) -> Vec<Change> {
    let known = base.figures.iter().filter(|known| modes.contains(&known.mode));
    known
        .map(|known| {
            let same = |other: &&Known| other.figure == known.figure && other.mode == known.mode;
            let series = now.figures.iter().find(same).map(|found| &found.series);
            Change {
                figure: known.figure.clone(),
                label: known.mode.label(),
                base: known.series.median,
                now: series.map(|series| series.median),
                judgement: series.map_or(Judgement::Missing, |series| judge(&known.series, series)),
            }
        })
        .collect()
}

fn judge(base: &Series, now: &Series) -> Judgement {
    let compared = now.compared_to(base);
    if (compared.ratio - 1.0).abs() <= TOLERANCE {
        Judgement::Same
    } else if compared.verdict != Verdict::Differs {
        Judgement::Noise
    } else if compared.ratio > 1.0 {
        Judgement::Costs
    } else {
        Judgement::Gains
    }
}

/// Whether nothing costs more than it did, as far as was measured. That nothing was compared is not well.
pub(super) fn well(changes: &[Change]) -> bool {
    !changes.is_empty()
        && changes.iter().all(|change| !matches!(change.judgement, Judgement::Costs | Judgement::Missing))
}

/// All of it for people, what costs more first.
pub(super) fn text(changes: &[Change]) -> String {
    let mut text = String::new();
    let said = [
        (Judgement::Costs, "COSTS MORE"),
        (Judgement::Missing, "NOT MEASURED"),
        (Judgement::Noise, "cannot be told from noise (more --rounds would)"),
        (Judgement::Gains, "costs less"),
        (Judgement::Same, "as before"),
    ];
    for (judgement, words) in said {
        for change in changes.iter().filter(|change| change.judgement == judgement) {
            let Figure { workload, name, unit } = &change.figure;
            let _ = write!(text, "{words}: {workload}, {name}, {}: baseline {:.1}", change.label, change.base);
            let _ = match change.now {
                Some(now) => writeln!(text, ", now {now:.1} {unit} ({:+.1} %)", 100.0 * (now / change.base - 1.0)),
                None => writeln!(text, " {unit}"),
            };
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn baseline(figures: &[(&str, Mode, [f64; 3])]) -> Baseline {
        let taken_with = With {
            vm: "6.12".into(),
            kernel: "6.12.1".into(),
            qemu: "QEMU 7.2".into(),
            cipher: Some("aesni".into()),
            quick: false,
        };
        let known = |(name, mode, values): &(&str, Mode, [f64; 3])| Known {
            figure: Figure { workload: "bulk".into(), name: (*name).into(), unit: "thousand/MB".into() },
            mode: *mode,
            series: Series::of(values.to_vec()).unwrap(),
        };
        Baseline { taken_with, figures: figures.iter().map(known).collect() }
    }

    fn judged(base: [f64; 3], now: [f64; 3]) -> Judgement {
        let of = |values| baseline(&[("all", Mode::Proxied, values)]);
        compare(&of(base), &of(now), &[Mode::Proxied])[0].judgement
    }

    #[test]
    fn three_percent_are_tolerated_and_more_is_told_either_way() {
        assert_eq!(judged([100.0; 3], [102.9; 3]), Judgement::Same);
        assert_eq!(judged([100.0; 3], [103.1; 3]), Judgement::Costs);
        assert_eq!(judged([100.0; 3], [97.1; 3]), Judgement::Same);
        assert_eq!(judged([100.0; 3], [96.9; 3]), Judgement::Gains);
    }

    #[test]
    fn what_the_rounds_differ_by_themselves_is_no_cost() {
        assert_eq!(judged([100.0; 3], [95.0, 104.0, 110.0]), Judgement::Noise);
        assert!(well(&compare(
            &baseline(&[("all", Mode::Proxied, [100.0; 3])]),
            &baseline(&[("all", Mode::Proxied, [95.0, 104.0, 110.0])]),
            &[Mode::Proxied]
        )));
    }

    #[test]
    fn a_figure_that_is_gone_is_not_well_and_nothing_to_compare_neither() {
        let (base, now) = (baseline(&[("all", Mode::Direct, [1.0; 3])]), baseline(&[]));
        let changes = compare(&base, &now, &base.own_modes());
        assert_eq!((changes[0].judgement, well(&changes), well(&[])), (Judgement::Missing, false, false));
    }

    #[test]
    fn the_modes_of_others_are_not_watched() {
        let base = baseline(&[("all", Mode::None, [1.0; 3]), ("all", Mode::Proxied, [1.0; 3])]);
        assert_eq!(base.own_modes(), [Mode::Proxied]);
    }

    #[test]
    fn a_cost_names_figure_mode_baseline_now_and_percent() {
        let (base, now) =
            (baseline(&[("all", Mode::Proxied, [100.0; 3])]), baseline(&[("all", Mode::Proxied, [110.0; 3])]));
        let changes = compare(&base, &now, &[Mode::Proxied]);
        let expected = "COSTS MORE: bulk, all, proxied: baseline 100.0, now 110.0 thousand/MB (+10.0 %)\n";
        assert_eq!((text(&changes).as_str(), well(&changes)), (expected, false));
    }

    #[test]
    fn another_kernel_emulator_cipher_or_size_cannot_be_compared() {
        let with = baseline(&[]).taken_with;
        assert_eq!(with.differs(&with), None);
        let others = [
            With { kernel: "6.12.2".into(), ..with.clone() },
            With { qemu: "QEMU 8".into(), ..with.clone() },
            With { cipher: None, ..with.clone() },
            With { quick: true, ..with.clone() },
        ];
        assert!(others.iter().all(|other| with.differs(other).is_some()));
    }

    #[test]
    fn what_is_written_is_what_is_read() {
        let base = baseline(&[("all", Mode::Proxied, [1.5, 2.0, 2.5])]);
        let text = serde_json::to_string(&base).unwrap();
        assert_eq!(serde_json::from_str::<Baseline>(&text).unwrap(), base);
    }
}
