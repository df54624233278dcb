//! Requests at a fixed rate, and their latencies without coordinated omission.
//!
//! A client that waits for an answer before it sends the next request asks a stalled server nothing, and so measures the stall once
//! instead of once for each request that it should have sent. Here a request is due at a time that no answer can put off,
//! and its latency counts from then, whenever it could be sent.

use std::{
    thread,
    time::{Duration, Instant},
};

/// When the requests of one of several connections are due; together they come at one rate, evenly spaced.
#[derive(Clone, Copy, Debug)]
pub struct Schedule {
    /// Of all connections together.
    pub rate: u32,
    pub connections: u32,
    /// Which of them this is, from 0.
    pub connection: u32,
    /// How long requests are due, from the start.
    pub length: Duration,
}

impl Schedule {
    /// The times from the start at which this connection's requests are due.
    pub fn due(self) -> impl Iterator<Item = Duration> {
        let step = Duration::from_secs(1) / self.rate.max(1);
        (0..)
            .map(move |index: u32| step * (index * self.connections + self.connection))
            .take_while(move |due| *due < self.length)
    }
}

/// A clock that can be waited on. Tests have one that they turn by hand.
pub trait Clock {
    /// The time since the start.
    fn now(&self) -> Duration;
    /// Returns at this time, or at once if it has passed.
    fn wait_until(&self, time: Duration);
}

/// The machine's clock, from a start that several share.
#[derive(Clone, Copy, Debug)]
pub struct Since(pub Instant);

impl Clock for Since {
    fn now(&self) -> Duration {
        // The start may lie a little ahead.
        Instant::now().saturating_duration_since(self.0)
    }

    fn wait_until(&self, time: Duration) {
        let left = (self.0 + time).saturating_duration_since(Instant::now());
        if !left.is_zero() {
            thread::sleep(left);
        }
    }
}

/// What came of a schedule, one value for each request.
#[derive(Debug, Default)]
pub struct Paced {
    /// From the time that a request was due to its answer.
    pub latencies: Vec<Duration>,
    /// From the time that a request was due to its being sent.
    pub late: Vec<Duration>,
}

/// Makes all exchanges of a schedule, each when it is due or, if the one before took longer, right after that.
pub fn pace<E>(
    schedule: Schedule,
    clock: &impl Clock,
    mut exchange: impl FnMut() -> Result<(), E>,
) -> Result<Paced, E> {
    let mut paced = Paced::default();
    for due in schedule.due() {
        clock.wait_until(due);
        paced.late.push(clock.now().saturating_sub(due));
        exchange()?;
        paced.latencies.push(clock.now().saturating_sub(due));
    }
    Ok(paced)
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, convert::Infallible};

    use super::*;

    /// Waiting takes exactly as long as it should, and nothing else takes time by itself.
    #[derive(Default)]
    struct Hand(Cell<Duration>);

    impl Clock for Hand {
        fn now(&self) -> Duration {
            self.0.get()
        }

        fn wait_until(&self, time: Duration) {
            self.0.set(self.0.get().max(time));
        }
    }

    const MILLI: Duration = Duration::from_millis(1);

    /// A second of requests over one connection, one each millisecond, whose answers take as long as they are told.
    fn paced(takes: impl Fn(usize) -> Duration) -> Paced {
        let clock = Hand::default();
        let schedule = Schedule { rate: 1000, connections: 1, connection: 0, length: Duration::from_secs(1) };
        let mut sent = 0;
        let exchange = || {
            clock.0.set(clock.0.get() + takes(sent));
            sent += 1;
            Ok::<(), Infallible>(())
        };
        let Ok(paced) = pace(schedule, &clock, exchange);
        paced
    }

    #[test]
    fn without_a_stall_a_latency_is_what_the_answer_took() {
        let paced = paced(|_| MILLI / 4);
        assert_eq!(paced.latencies, vec![MILLI / 4; 1000]);
        assert_eq!(paced.late, vec![Duration::ZERO; 1000]);
    }

    #[test]
    fn a_stall_counts_for_every_request_that_was_due_in_it() {
        // 100 ms at request 200; the others take nothing. Whoever measured from the sending would see one slow request in a thousand.
        let paced = paced(|index| if index == 200 { 100 * MILLI } else { Duration::ZERO });
        let slow: Vec<Duration> = paced.latencies.iter().copied().filter(|latency| !latency.is_zero()).collect();
        let expected: Vec<Duration> = (1..=100).rev().map(|millis| millis * MILLI).collect();
        assert_eq!(slow, expected);
        assert_eq!((paced.latencies.len(), paced.late[201]), (1000, 99 * MILLI));
    }

    #[test]
    fn a_server_that_is_too_slow_for_the_rate_falls_behind_without_bound() {
        let paced = paced(|_| 2 * MILLI);
        // The last one is due after 999 ms and answered after 2 s.
        assert_eq!(paced.latencies.last(), Some(&(1001 * MILLI)));
    }

    #[test]
    fn connections_share_the_rate_evenly() {
        let of = |connection| {
            let schedule = Schedule { rate: 1000, connections: 4, connection, length: Duration::from_millis(10) };
            schedule.due().collect::<Vec<_>>()
        };
        assert_eq!(of(0), [0, 4, 8].map(|millis| millis * MILLI));
        assert_eq!(of(3), [3, 7].map(|millis| millis * MILLI));
        assert_eq!((0..4).map(|connection| of(connection).len()).sum::<usize>(), 10);
    }
}
