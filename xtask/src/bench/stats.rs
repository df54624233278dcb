//! What several rounds amount to, and when two modes differ. Pure.

use serde::{Deserialize, Serialize};

/// With fewer rounds than this nobody can tell a spread.
const ENOUGH: usize = 3;

/// The values of one figure, one for each round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Series {
    pub values: Vec<f64>,
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Series {
    /// Nothing if there are no values.
    pub(crate) fn of(values: Vec<f64>) -> Option<Self> {
        let mut sorted = values.clone();
        sorted.sort_unstable_by(f64::total_cmp);
        let middle = sorted.len() / 2;
        let median = if !sorted.len().is_multiple_of(2) {
            sorted[middle]
        } else {
            (sorted.get(middle)? + sorted.get(middle.checked_sub(1)?)?) / 2.0
        };
        Some(Self { values, median, min: *sorted.first()?, max: *sorted.last()? })
    }

    /// How many times the least value the greatest is: a ratio, because it is ratios that are shown, and a figure that is three times
    /// another also wanders three times as far.
    fn spread(&self) -> f64 {
        if self.min > 0.0 { self.max / self.min } else { f64::INFINITY }
    }

    /// This one beside another of the same figure. Figures are positive.
    pub(crate) fn compared_to(&self, other: &Self) -> Compared {
        let ratio = self.median / other.median;
        let verdict = if self.values.len() < ENOUGH || other.values.len() < ENOUGH {
            Verdict::TooFewRounds
        } else if ratio.max(ratio.recip()) > self.spread().max(other.spread()) {
            Verdict::Differs
        } else {
            Verdict::NoDifference
        };
        Compared { ratio, verdict }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Compared {
    /// Of the medians.
    pub ratio: f64,
    pub verdict: Verdict,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// The medians are further apart than either's rounds are among themselves.
    Differs,
    /// They are not: the rounds of one mode alone differ as much.
    NoDifference,
    TooFewRounds,
}

impl Compared {
    pub(crate) fn text(self) -> String {
        match self.verdict {
            Verdict::NoDifference => "no difference".into(),
            Verdict::TooFewRounds => format!("{:.2} ?", self.ratio),
            Verdict::Differs => format!("{:.2}", self.ratio),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn series(values: &[f64]) -> Series {
        Series::of(values.to_vec()).unwrap()
    }

    #[test]
    fn the_median_is_the_middle_of_the_rounds_in_whatever_order_they_came() {
        let odd = series(&[9.0, 1.0, 5.0]);
        assert_eq!((odd.median, odd.min, odd.max), (5.0, 1.0, 9.0));
        assert_eq!(odd.values, [9.0, 1.0, 5.0]);
        assert_eq!(series(&[4.0, 1.0, 2.0, 9.0]).median, 3.0);
        assert_eq!(Series::of(Vec::new()), None);
    }

    #[test]
    fn what_lies_within_the_spread_of_either_is_no_difference() {
        let (calm, noisy) = (series(&[1.0, 1.01, 1.02]), series(&[1.0, 1.2, 1.5]));
        assert_eq!(noisy.compared_to(&calm).verdict, Verdict::NoDifference);
        assert_eq!(calm.compared_to(&noisy).verdict, Verdict::NoDifference);
        assert_eq!(calm.compared_to(&noisy).text(), "no difference");
    }

    #[test]
    fn what_is_larger_than_both_spreads_is_a_difference_with_its_ratio() {
        let (less, more) = (series(&[1.0, 1.1, 1.2]), series(&[2.0, 2.2, 2.4]));
        let compared = more.compared_to(&less);
        assert_eq!((compared.verdict, compared.text()), (Verdict::Differs, "2.00".to_owned()));
    }

    #[test]
    fn values_that_wander_far_still_differ_from_those_that_are_further_away() {
        let (fast, slow) = (series(&[12.4, 16.0, 23.0]), series(&[5.46, 5.48, 6.06]));
        assert_eq!([fast.compared_to(&slow).verdict, slow.compared_to(&fast).verdict], [Verdict::Differs; 2]);
    }

    #[test]
    fn what_was_nothing_in_one_round_differs_from_nothing() {
        assert_eq!(series(&[0.0, 5.0, 5.0]).compared_to(&series(&[1.0, 1.0, 1.0])).verdict, Verdict::NoDifference);
    }

    #[test]
    fn two_rounds_prove_nothing_however_far_they_are_apart() {
        assert_eq!(series(&[100.0, 100.0]).compared_to(&series(&[1.0, 1.0, 1.0])).verdict, Verdict::TooFewRounds);
    }
}
