//! The rounds. On a machine whose speed wanders only neighbours in time can be compared: all modes stay up, and each workload goes through all
//! of them before the next, each round beginning with another mode. Where instructions are counted the modes come one after
//! the other, so that nothing of one runs during another.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

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
        let started = Instant::now();
        for round in 0..rounds {
            let so_far = started.elapsed().as_secs();
            step::say(&format!("round {} of {rounds} ({so_far} s so far)", round + 1));
            let (first, others): (Vec<_>, Vec<_>) =
                workloads.iter().enumerate().partition(|(_, workload)| workload.once);
            let first = if round == 0 { first } else { Vec::new() };
            for (index, workload) in first.into_iter().chain(others) {
                for turn in 0..beds.len() {
                    let bed = &beds[(round + turn) % beds.len()];
                    all.measure(bed, index, workload)?;
                }
            }
        }
        step::say(&format!("rounds done after {} s", started.elapsed().as_secs()));
        Ok(all)
    }

    /// System calls: a pass of its own, once, in which nothing else is measured.
    pub(super) fn trace(&mut self, beds: &[Bed], workloads: &[Workload]) -> Result<()> {
        step::say("counting system calls");
        for (index, workload) in workloads.iter().enumerate() {
            let Some(work) = workload.trace else { continue };
            for bed in beds.iter().filter(|bed| bed.mode != Mode::None) {
                let answer = bed.trace(work)?;
                if let Some((figure, value)) = workload.calls(&answer) {
                    self.add((index, bed.mode), figure, value);
                }
            }
        }
        Ok(())
    }

    /// How connections were carried, when the last one was.
    pub(super) fn carry_all(&mut self, beds: &mut [Bed]) -> Result<()> {
        beds.iter_mut().try_for_each(|bed| self.carry(bed))
    }

    /// One mode after the other.
    pub(super) fn in_turn(modes: &[Mode], programs: &Programs, workloads: &[Workload], rounds: usize) -> Result<Self> {
        let mut all = Self::default();
        for &mode in modes {
            step::say(&format!("mode {}", mode.name()));
            let mut bed = Bed::open(mode, programs).with_context(|| format!("preparing the mode {}", mode.name()))?;
            thread::sleep(SETTLE);
            for round in 0..rounds {
                step::say(&format!("round {} of {rounds} in the mode {}", round + 1, mode.name()));
                for (index, workload) in workloads.iter().enumerate() {
                    all.measure(&bed, index, workload)?;
                }
            }
            all.carry(&mut bed)?;
        }
        Ok(all)
    }

    fn measure(&mut self, bed: &Bed, index: usize, workload: &Workload) -> Result<()> {
        if !workload.belongs_to(bed.mode) {
            return Ok(());
        }
        let answer =
            bed.run(workload.work).with_context(|| format!("{} in the mode {}", workload.name, bed.mode.name()))?;
        self.note(&answer);
        for (figure, value) in workload.figures(bed.mode, &answer) {
            self.add((index, bed.mode), figure, value);
        }
        Ok(())
    }

    fn add(&mut self, place: (usize, Mode), figure: Figure, value: f64) {
        let values = self.values.entry(place).or_default();
        // A round may lack what another has.
        match values.iter_mut().find(|(known, _)| *known == figure) {
            Some((_, values)) => values.push(value),
            None => values.push((figure, vec![value])),
        }
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
        // A mode may lack figures that others have: one stands where it stands in the mode that has the most.
        let mut places: BTreeMap<(usize, Figure), usize> = BTreeMap::new();
        for ((workload, _), values) in &self.values {
            for (position, (figure, _)) in values.iter().enumerate() {
                let place = places.entry((*workload, figure.clone())).or_default();
                *place = position.max(*place);
            }
        }
        let mut all: Vec<((usize, usize), Measured)> = Vec::new();
        for ((workload, mode), values) in self.values {
            for (figure, values) in values {
                let place = places.get(&(workload, figure.clone())).copied().unwrap_or_default();
                all.push(((workload, place), Measured { figure, mode, values }));
            }
        }
        all.sort_by(|(a, one), (b, other)| (a, &one.figure, one.mode).cmp(&(b, &other.figure, other.mode)));
        all.into_iter().map(|(_, measured)| measured).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_one_name_stand_together_whatever_a_mode_or_a_round_lacks() {
        let figure = |name: &str| Figure { workload: "w".into(), name: name.into(), unit: "us".into() };
        let mut rounds = Rounds::default();
        for (mode, names) in [(Mode::None, &["p50", "CPU"][..]), (Mode::Proxied, &["p50", "switches", "CPU"])] {
            names.iter().for_each(|name| rounds.add((0, mode), figure(name), 1.0));
        }
        rounds.add((0, Mode::Proxied), figure("CPU"), 2.0);
        let seen: Vec<(String, Mode, usize)> =
            rounds.measured().into_iter().map(|it| (it.figure.name, it.mode, it.values.len())).collect();
        let expected = [
            ("p50", Mode::None, 1),
            ("p50", Mode::Proxied, 1),
            ("switches", Mode::Proxied, 1),
            ("CPU", Mode::None, 1),
            ("CPU", Mode::Proxied, 2),
        ];
        assert_eq!(seen, expected.map(|(name, mode, rounds)| (name.to_owned(), mode, rounds)));
    }
}
