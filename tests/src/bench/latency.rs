//! Many latencies in few numbers. All of them are kept and sorted: a run has some ten thousand, and no bucket blurs them.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// In microseconds.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Latencies {
    pub count: usize,
    pub p50: f64,
    pub p90: f64,
    pub p99: f64,
    pub p999: f64,
    pub max: f64,
}

impl Latencies {
    /// Nothing if there are none.
    #[must_use]
    pub fn of(mut all: Vec<Duration>) -> Option<Self> {
        all.sort_unstable();
        let micros = |duration: &Duration| duration.as_nanos() as f64 / 1000.0;
        let at = |share: f64| quantile(&all, share).map(micros);
        Some(Self {
            count: all.len(),
            p50: at(0.5)?,
            p90: at(0.9)?,
            p99: at(0.99)?,
            p999: at(0.999)?,
            max: all.last().map(micros)?,
        })
    }
}

/// The smallest value that at least this share of all are not above: one that was measured, never one between two.
fn quantile(sorted: &[Duration], share: f64) -> Option<&Duration> {
    let rank = (share * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.clamp(1, sorted.len().max(1)) - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn micros(values: impl IntoIterator<Item = u64>) -> Option<Latencies> {
        Latencies::of(values.into_iter().map(Duration::from_micros).collect())
    }

    #[test]
    fn quantiles_are_values_that_were_measured_in_whatever_order() {
        let expected = Latencies { count: 1000, p50: 500.0, p90: 900.0, p99: 990.0, p999: 999.0, max: 1000.0 };
        assert_eq!(micros((1..=1000).rev()), Some(expected));
    }

    #[test]
    fn one_slow_request_in_a_hundred_is_the_largest_and_not_the_99th() {
        let seen = micros(std::iter::repeat_n(1, 99).chain([5000]));
        assert!(seen.as_ref().is_some_and(|l| (l.p99, l.p999, l.max) == (1.0, 5000.0, 5000.0)), "{seen:?}");
    }

    #[test]
    fn a_single_latency_is_all_of_them_and_none_is_nothing() {
        assert_eq!(micros([7]), Some(Latencies { count: 1, p50: 7.0, p90: 7.0, p99: 7.0, p999: 7.0, max: 7.0 }));
        assert_eq!(micros([]), None);
    }
}
