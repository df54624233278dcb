//! How often somebody may ask: a bucket of requests for each, which fills again at a steady pace. Pure, but for the time that it is given.

use std::{
    collections::HashMap,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

/// As many buckets are kept before those that are full again are thrown away.
const MANY: usize = 4096;

/// Buckets of one size, by the name of who draws from them.
#[derive(Debug)]
pub struct Limiter {
    per_second: f64,
    burst: f64,
    buckets: Mutex<HashMap<String, Bucket>>,
}

#[derive(Clone, Copy, Debug)]
struct Bucket {
    left: f64,
    at: Instant,
}

impl Limiter {
    pub fn new(per_minute: u32, burst: u32) -> Self {
        Self { per_second: f64::from(per_minute) / 60.0, burst: f64::from(burst), buckets: Mutex::default() }
    }

    /// Takes one from the bucket of `name`, or says after which time there will be one.
    pub fn take(&self, name: &str, now: Instant) -> Result<(), Duration> {
        let mut buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        if buckets.len() >= MANY && !buckets.contains_key(name) {
            buckets.retain(|_, bucket| self.filled(*bucket, now) < self.burst);
        }
        let bucket = buckets.entry(name.to_owned()).or_insert(Bucket { left: self.burst, at: now });
        let left = self.filled(*bucket, now);
        *bucket = Bucket { left, at: now };
        self.enough(left)?;
        bucket.left = left - 1.0;
        Ok(())
    }

    /// Whether there is one to take, which is left there.
    pub fn look(&self, name: &str, now: Instant) -> Result<(), Duration> {
        let buckets = self.buckets.lock().unwrap_or_else(PoisonError::into_inner);
        buckets.get(name).map_or(Ok(()), |bucket| self.enough(self.filled(*bucket, now)))
    }

    fn enough(&self, left: f64) -> Result<(), Duration> {
        match left < 1.0 {
            true => Err(Duration::try_from_secs_f64((1.0 - left) / self.per_second).unwrap_or(Duration::MAX)),
            false => Ok(()),
        }
    }

    fn filled(&self, bucket: Bucket, now: Instant) -> f64 {
        let since = now.saturating_duration_since(bucket.at).as_secs_f64();
        (bucket.left + since * self.per_second).min(self.burst)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_what_is_in_it_and_fills_again() {
        let limiter = Limiter::new(60, 3);
        let start = Instant::now();
        for _ in 0..3 {
            assert_eq!(limiter.take("a", start), Ok(()));
        }
        assert_eq!(limiter.take("a", start), Err(Duration::from_secs(1)));
        assert_eq!(limiter.take("b", start), Ok(()), "each has its own");
        assert_eq!(limiter.take("a", start + Duration::from_secs(1)), Ok(()));
        assert!(limiter.take("a", start + Duration::from_secs(1)).is_err());
        let late = start + Duration::from_secs(3_600);
        for _ in 0..3 {
            assert_eq!(limiter.take("a", late), Ok(()));
        }
        assert!(limiter.take("a", late).is_err(), "no more than the burst is saved up");
    }

    #[test]
    fn being_refused_does_not_put_off_the_next() {
        let limiter = Limiter::new(60, 1);
        let start = Instant::now();
        assert_eq!(limiter.take("a", start), Ok(()));
        for step in 1..10 {
            assert!(limiter.take("a", start + Duration::from_millis(step * 100)).is_err());
        }
        assert_eq!(limiter.take("a", start + Duration::from_millis(1001)), Ok(()));
    }

    #[test]
    fn buckets_that_are_full_again_are_not_kept() {
        let limiter = Limiter::new(60, 1);
        let start = Instant::now();
        for n in 0..MANY {
            assert_eq!(limiter.take(&n.to_string(), start), Ok(()));
        }
        assert_eq!(limiter.take("next", start + Duration::from_secs(2)), Ok(()));
        assert_eq!(limiter.buckets.lock().unwrap().len(), 1);
    }
}
