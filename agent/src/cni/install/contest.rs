//! When another program undoes what `install` does: how long to pause, and what to say, once. Pure.

use std::time::{Duration, Instant};

use super::LOOK;

/// Changes that come together are looked at once.
const QUIET: Duration = Duration::from_millis(50);
/// A CNI that starts may write its file some times. From this one on it is another program's will.
const PATIENCE: u32 = 8;
/// After so long without a change the next one is the first again.
const CALM: Duration = Duration::from_secs(60);

/// What a change comes to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Round {
    Well,
    /// It is to be told now.
    Contested,
    /// It was told.
    Known,
}

/// How often the plugin had to be put back, one time after the other.
#[derive(Default)]
pub(super) struct Contest {
    rounds: u32,
    last: Option<Instant>,
}

impl Contest {
    /// The plugin had to be put in.
    pub(super) fn changed(&mut self, now: Instant) -> Round {
        self.rounds = self.rounds_at(now).saturating_add(1);
        self.last = Some(now);
        match self.rounds {
            ..PATIENCE => Round::Well,
            PATIENCE => Round::Contested,
            _ => Round::Known,
        }
    }

    /// From news of the directory until it is looked at.
    pub(super) fn pause(&self, now: Instant) -> Duration {
        let doublings = self.rounds_at(now).saturating_sub(1);
        1_u32.checked_shl(doublings).map_or(LOOK, |factor| QUIET.saturating_mul(factor)).min(LOOK)
    }

    fn rounds_at(&self, now: Instant) -> u32 {
        let calm = self.last.is_none_or(|last| now.saturating_duration_since(last) >= CALM);
        if calm { 0 } else { self.rounds }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_keeps_changing_a_file_is_told_of_once_and_slows_it_down_until_there_is_calm() {
        let (mut contest, mut now) = (Contest::default(), Instant::now());
        assert_eq!(contest.pause(now), QUIET);
        let (mut said, mut pauses) = (Vec::new(), Vec::new());
        for _ in 0..100 {
            said.push(contest.changed(now));
            pauses.push(contest.pause(now));
            now += contest.pause(now);
        }
        assert!(said[..7].iter().all(|round| *round == Round::Well), "{said:?}");
        assert_eq!(said[7], Round::Contested);
        assert!(said[8..].iter().all(|round| *round == Round::Known), "once is enough");
        assert!(pauses.is_sorted() && pauses[0] == QUIET && pauses[99] == LOOK, "{pauses:?}");
        // A CNI that is updated a day later is no contest.
        now += CALM;
        assert_eq!(contest.pause(now), QUIET);
        assert_eq!((contest.changed(now), contest.pause(now)), (Round::Well, QUIET));
    }
}
