//! The rounds. On a machine whose speed wanders only neighbours in time can be compared: all modes stay up, and each workload goes through all
//! of them before the next, each round beginning with another mode. Where instructions are counted the modes come one after
//! the other, so that nothing of one runs during another.

use std::{collections::BTreeMap, thread, time::Duration};

use anyhow::{Context, Result};
use marline_tests::bench::Answer;

use super::{
    bed::{Bed, Mode, Programs},
    plan::{Figure, Workload},
    report::{Carried, Measured},
};
use crate::step;

/// How long a counted mode is left alone before it is measured: starting leaves work behind.
const SETTLE: Duration = Duration::from_secs(3);

/// Everything that the rounds amount to.
#[derive(Default)]
pub(super) struct Rounds {
    values: BTreeMap<(usize, Mode), Values>,
    pub carried: Vec<Carried>,
    /// For each measurement, the share of the machine that neither client nor server nor agents took.
    pub others: Vec<f64>,
    /// For each measurement, the share that nobody took.
    pub idle: Vec<f64>,
}

/// The figures of one workload in one mode, in the order in which they are shown, with a value for each round.
type Values = Vec<(Figure, Vec<f64>)>;

impl Rounds {
    /// All modes at once, their rounds interleaved. The beds are those that are open already.
    pub(super) fn interleaved(beds: &mut [Bed], workloads: &[Workload], rounds: usize) -> Result<Self> {
        let mut all = Self::default();
        for round in 0..rounds {
            step::say(&format!("round {} of {rounds}", round + 1));
            for (index, workload) in workloads.iter().enumerate() {
                for turn in 0..beds.len() {
                    let bed = &beds[(round + turn) % beds.len()];
                    all.measure(bed, index, workload)?;
                }
            }
        }
        beds.iter_mut().try_for_each(|bed| all.carry(bed))?;
        Ok(all)
    }

    /// One mode after the other.
    pub(super) fn in_turn(modes: &[Mode], programs: &Programs, workloads: &[Workload], rounds: usize) -> Result<Self> {
        let mut all = Self::default();
        for &mode in modes {
            step::say(&format!("mode {}", mode.name()));
            let mut bed = Bed::open(mode, programs).with_context(|| format!("preparing the mode {}", mode.name()))?;
            thread::sleep(SETTLE);
            for _ in 0..rounds {
                for (index, workload) in workloads.iter().enumerate() {
                    all.measure(&bed, index, workload)?;
                }
            }
            all.carry(&mut bed)?;
        }
        Ok(all)
    }

    fn measure(&mut self, bed: &Bed, index: usize, workload: &Workload) -> Result<()> {
        let answer =
            bed.run(workload.work).with_context(|| format!("{} in the mode {}", workload.name, bed.mode.name()))?;
        self.note(&answer);
        let values = self.values.entry((index, bed.mode)).or_default();
        for (position, (figure, value)) in workload.figures(&answer).into_iter().enumerate() {
            if values.len() <= position {
                values.push((figure, Vec::new()));
            }
            values[position].1.push(value);
        }
        Ok(())
    }

    fn note(&mut self, answer: &Answer) {
        let spent = &answer.spent;
        let whole = spent.machine + spent.idle;
        if whole > 0.0 {
            self.others.push(((spent.machine - spent.by_watched()) / whole).max(0.0));
            self.idle.push(spent.idle / whole);
        }
    }

    fn carry(&mut self, bed: &mut Bed) -> Result<()> {
        self.carried.push(Carried { mode: bed.mode, connections: bed.carriers()? });
        Ok(())
    }

    /// Figures in the order of workloads; those of one figure by mode.
    pub(super) fn measured(self) -> Vec<Measured> {
        let mut all: Vec<((usize, usize), Measured)> = Vec::new();
        for ((workload, mode), values) in self.values {
            for (position, (figure, values)) in values.into_iter().enumerate() {
                all.push(((workload, position), Measured { figure, mode, values }));
            }
        }
        all.sort_by_key(|(place, measured)| (*place, measured.mode));
        all.into_iter().map(|(_, measured)| measured).collect()
    }
}
