//! Bounded waiting: every wait has a deadline and says what it waited for when the deadline passes.

use std::{
    fmt::Display,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, bail};

/// How often a condition is looked at. Nothing is ordered by this: a wait ends on the condition, never on the clock.
const LOOK_AGAIN: Duration = Duration::from_millis(10);

/// What a look at a condition found.
pub enum Look<T> {
    Done(T),
    /// Not yet, and what was seen instead: it goes into the message when the deadline passes.
    NotYet(String),
}

/// Looks at a condition until it holds. An error from `look` ends the wait at once.
pub fn wait_for<T>(what: impl Display, limit: Duration, mut look: impl FnMut() -> Result<Look<T>>) -> Result<T> {
    let started = Instant::now();
    loop {
        match look()? {
            Look::Done(value) => return Ok(value),
            Look::NotYet(seen) if started.elapsed() >= limit => {
                bail!("gave up after {:.1} s waiting for {what}; last seen: {seen}", limit.as_secs_f64())
            }
            Look::NotYet(_) => thread::sleep(LOOK_AGAIN),
        }
    }
}

/// A deadline of so many seconds, stretched where the machine is emulated and everything takes longer.
#[must_use]
pub fn seconds(count: u64) -> Duration {
    Duration::from_secs(count * slowness())
}

/// `MARLINE_SLOWNESS` stretches every deadline; an emulated processor is found without being told.
fn slowness() -> u64 {
    if let Some(factor) = std::env::var("MARLINE_SLOWNESS").ok().and_then(|value| value.parse().ok()) {
        return factor;
    }
    let emulated = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("QEMU TCG"));
    if emulated { 8 } else { 1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_that_fails_names_what_was_awaited_and_what_was_seen() {
        let outcome = wait_for("the tide", Duration::from_millis(1), || Ok(Look::<()>::NotYet("ebb".into())));
        let message = outcome.map_err(|error| error.to_string());
        assert!(message.as_ref().is_err_and(|text| text.contains("the tide") && text.contains("ebb")), "{message:?}");
    }

    #[test]
    fn a_wait_ends_with_the_value_that_was_found() {
        let mut looks = 0;
        let outcome = wait_for("the third look", seconds(5), || {
            looks += 1;
            Ok(if looks == 3 { Look::Done(looks) } else { Look::NotYet(format!("look {looks}")) })
        });
        assert!(matches!(outcome, Ok(3)), "{outcome:?}");
    }
}
