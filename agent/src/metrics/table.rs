//! Counters by labels that others choose, in bounded number: what a table has no room for is counted under one key for all, and
//! what has left the mesh, or is idle where room is short, is forgotten after a while.

use std::{
    collections::HashMap,
    fmt,
    hash::Hash,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// How long counters of what has left the mesh are shown. Prometheus has seen their last value by then; if they come again from
/// nothing, `rate()` takes that for a counter that was reset.
pub const KEPT: Duration = Duration::from_secs(600);

pub trait Key: Hash + Eq + fmt::Debug {
    /// Under which it is counted where there is no room; of these there are few.
    fn overflow(&self) -> Self;
    /// Whether all that it names is still in the mesh, of which `known` tells by namespace and name.
    fn stands(&self, known: &dyn Fn(&str, &str) -> bool) -> bool;
}

#[derive(Debug)]
pub struct Entry<K, V> {
    pub key: Arc<K>,
    pub value: V,
    /// Since when no connection was seen to hold it, and none has come.
    idle: Mutex<Option<Instant>>,
}

type Entries<K, V> = HashMap<Arc<K>, Arc<Entry<K, V>>>;

#[derive(Debug)]
pub struct Table<K, V> {
    entries: Mutex<Entries<K, V>>,
    limit: usize,
    overflowed: AtomicU64,
}

impl<K: Key, V: Default> Table<K, V> {
    pub fn new(limit: usize) -> Self {
        Self { entries: Mutex::default(), limit, overflowed: AtomicU64::new(0) }
    }

    pub fn entry(&self, key: K) -> Arc<Entry<K, V>> {
        let mut entries = lock(&self.entries);
        if let Some(known) = entries.get(&key) {
            *lock(&known.idle) = None;
            return known.clone();
        }
        let key = if entries.len() >= self.limit {
            self.overflowed.fetch_add(1, Ordering::Relaxed);
            key.overflow()
        } else {
            key
        };
        let key = Arc::new(key);
        let new = || Arc::new(Entry { key: key.clone(), value: V::default(), idle: Mutex::default() });
        entries.entry(key.clone()).or_insert_with(new).clone()
    }

    /// All entries, without keeping anybody from counting meanwhile.
    pub fn all(&self) -> Vec<Arc<Entry<K, V>>> {
        lock(&self.entries).values().cloned().collect()
    }

    /// How often something was counted under the key for all.
    pub fn overflowed(&self) -> u64 {
        self.overflowed.load(Ordering::Relaxed)
    }

    pub fn len(&self) -> usize {
        lock(&self.entries).len()
    }

    /// Forgets what no connection holds and what was idle for long enough: if something that it names has left the mesh, and anything if
    /// the table is more than half full. Names of former versions and services, strangers and policies that are gone would fill it else;
    /// a quiet pair in a table with room keeps its counters.
    pub fn forget(&self, now: Instant, known: &dyn Fn(&str, &str) -> bool) {
        let mut entries = lock(&self.entries);
        let crowded = entries.len() > self.limit / 2;
        entries.retain(|key, entry| {
            let mut idle = lock(&entry.idle);
            if Arc::strong_count(entry) > 1 {
                *idle = None;
                return true;
            }
            let since = *idle.get_or_insert(now);
            let goes = now.saturating_duration_since(since) >= KEPT
                && (!key.stands(known) || crowded && key.overflow() != **key);
            !goes
        });
    }
}

/// What a panicking holder left is whole: nothing here is changed in steps.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Hash, PartialEq, Eq)]
    struct Name(String);

    impl Key for Name {
        fn overflow(&self) -> Self {
            Self("other".into())
        }

        fn stands(&self, known: &dyn Fn(&str, &str) -> bool) -> bool {
            self.0 == "other" || known("shop", &self.0)
        }
    }

    fn count(table: &Table<Name, AtomicU64>, name: &str) {
        table.entry(Name(name.into())).value.fetch_add(1, Ordering::Relaxed);
    }

    #[test]
    fn what_has_no_room_is_counted_together_and_nothing_is_lost() {
        let table = Table::new(10);
        for name in 0..100 {
            count(&table, &name.to_string());
            count(&table, "3");
        }
        let all = table.all();
        assert_eq!(all.len(), 11);
        assert_eq!(all.iter().map(|entry| entry.value.load(Ordering::Relaxed)).sum::<u64>(), 200);
        let other = all.iter().find(|entry| entry.key.0 == "other").unwrap();
        assert_eq!((other.value.load(Ordering::Relaxed), table.overflowed()), (90, 90));
    }

    #[test]
    fn what_has_left_is_forgotten_after_a_while_unless_a_connection_holds_it_or_it_comes_back() {
        let table = Table::new(10);
        for name in ["stays", "left", "back"] {
            count(&table, name);
        }
        let held = table.entry(Name("held".into()));
        let names = || {
            let mut names: Vec<_> = table.all().iter().map(|entry| entry.key.0.clone()).collect();
            names.sort();
            names
        };
        let start = Instant::now();
        table.forget(start, &|_, name| name == "stays");
        assert_eq!(names().len(), 4);
        count(&table, "back");
        table.forget(start + KEPT, &|_, name| name == "stays");
        assert_eq!(names(), ["back", "held", "stays"]);
        drop(held);
        table.forget(start + KEPT, &|_, name| name == "stays");
        table.forget(start + KEPT * 2, &|_, name| name == "stays");
        assert_eq!(names(), ["stays"]);
    }

    #[test]
    fn a_full_table_has_room_again_when_what_filled_it_is_idle_though_all_of_it_stands() {
        let table = Table::new(10);
        for name in 0..20 {
            count(&table, &name.to_string());
        }
        let held = table.entry(Name("1".into()));
        let start = Instant::now();
        table.forget(start, &|_, _| true);
        count(&table, "2");
        table.forget(start + KEPT, &|_, _| true);
        let mut names: Vec<_> = table.all().iter().map(|entry| entry.key.0.clone()).collect();
        names.sort();
        assert_eq!(names, ["1", "2", "other"]);
        let overflowed = table.overflowed();
        count(&table, "new");
        assert_eq!(table.overflowed(), overflowed);
        // With room, what is idle and stands is kept.
        drop(held);
        table.forget(start + KEPT, &|_, _| true);
        table.forget(start + KEPT * 3, &|_, _| true);
        assert_eq!(table.len(), 4);
    }
}
