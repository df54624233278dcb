//! The objects of one kind, as a list and the events after it say. Events may come twice, late or in another order than they happened in:
//! what is older than what is known changes nothing, so all orders end in the same state. Pure.

use std::{
    collections::{BTreeMap, HashMap, hash_map::Entry},
    fmt,
};

use super::objects::{Item, Key};

/// What an API server tells of one kind.
#[derive(Clone, Debug)]
pub enum Change<T> {
    /// A complete list: whatever is not in it is not there.
    Replace {
        items: Vec<Item<T>>,
        version: Option<u64>,
    },
    /// Added or modified.
    Apply(Item<T>),
    Delete {
        key: Key,
        uid: Box<str>,
        version: Option<u64>,
    },
    /// All events up to this version have been told (a bookmark).
    Reached(u64),
}

/// All objects of one kind, each with what was worked out for it (`M`), for as long as it stays as it is.
pub struct Store<T, M = ()> {
    items: HashMap<Key, Slot<T, M>>,
    /// Deleted ones, by the version of their end, until that is reached: a late event must not bring them back.
    gone: BTreeMap<Key, u64>,
    /// All that is older is known.
    reached: Option<u64>,
    complete: bool,
}

#[derive(Clone, PartialEq, Debug)]
pub struct Slot<T, M = ()> {
    pub uid: Box<str>,
    version: Option<u64>,
    pub object: T,
    pub memo: M,
}

impl<T, M> Default for Store<T, M> {
    fn default() -> Self {
        Self { items: HashMap::new(), gone: BTreeMap::new(), reached: None, complete: false }
    }
}

impl<T: PartialEq, M: Default> Store<T, M> {
    /// Whether there was a complete list yet.
    pub fn is_complete(&self) -> bool {
        self.complete
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    pub fn get(&self, key: &Key) -> Option<&T> {
        self.items.get(key).map(|slot| &slot.object)
    }

    pub fn iter(&self) -> impl Iterator<Item = (&Key, &Slot<T, M>)> {
        self.items.iter()
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&Key, &mut Slot<T, M>)> {
        self.items.iter_mut()
    }

    /// Tells whether anything is different now.
    pub fn apply(&mut self, change: Change<T>) -> bool {
        match change {
            Change::Replace { items, version } => self.replace(items, version),
            Change::Apply(item) => {
                !self.is_old(&item.key, item.version) && {
                    self.gone.remove(&item.key);
                    self.put(item)
                }
            }
            Change::Delete { key, uid, version } => {
                if self.is_old(&key, version) {
                    return false;
                }
                // One that was made anew under the same name stays.
                let other = version.is_none() && self.items.get(&key).is_some_and(|slot| slot.uid != uid);
                if let Some(version) = version {
                    self.gone.insert(key.clone(), version);
                }
                !other && self.items.remove(&key).is_some()
            }
            Change::Reached(version) => {
                self.reached = self.reached.max(Some(version));
                self.gone.retain(|_, end| *end > version);
                false
            }
        }
    }

    /// A list is the truth, also one that is older than what was known: an API server may have been restored from a backup.
    fn replace(&mut self, items: Vec<Item<T>>, version: Option<u64>) -> bool {
        let mut changed = !self.complete;
        (self.complete, self.reached) = (true, version);
        self.gone.clear();
        let mut old = std::mem::take(&mut self.items);
        self.items.reserve(items.len());
        for item in items {
            // What is the same keeps what was worked out for it.
            match old.remove(&item.key) {
                Some(slot) if slot.uid == item.uid && slot.object == item.object => {
                    self.items.insert(item.key, Slot { version: item.version, ..slot });
                }
                _ => {
                    changed = true;
                    self.items.insert(item.key.clone(), slot(item));
                }
            }
        }
        changed || !old.is_empty()
    }

    fn put(&mut self, item: Item<T>) -> bool {
        match self.items.entry(item.key.clone()) {
            Entry::Vacant(vacant) => {
                vacant.insert(slot(item));
                true
            }
            Entry::Occupied(mut occupied) => {
                let known = occupied.get_mut();
                known.version = item.version;
                let changed = known.uid != item.uid || known.object != item.object;
                if changed {
                    *known = slot(item);
                }
                changed
            }
        }
    }

    /// Whether an event of this version tells nothing that is not known. Where versions are no numbers the order of arrival counts.
    fn is_old(&self, key: &Key, version: Option<u64>) -> bool {
        let Some(version) = version else { return false };
        let known = self.items.get(key).and_then(|slot| slot.version).max(self.gone.get(key).copied());
        known.max(self.reached).is_some_and(|known| version <= known)
    }
}

fn slot<T, M: Default>(item: Item<T>) -> Slot<T, M> {
    Slot { uid: item.uid, version: item.version, object: item.object, memo: M::default() }
}

impl<T, M> fmt::Debug for Store<T, M> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} objects", self.items.len())
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;

    type Truth = BTreeMap<u8, (u64, u8, u8)>;

    fn key(name: u8) -> Key {
        Key { namespace: Arc::from("n"), name: name.to_string().into() }
    }

    fn item(name: u8, version: u64, uid: u8, value: u8) -> Item<u8> {
        Item { key: key(name), uid: uid.to_string().into(), version: Some(version), object: value }
    }

    /// A history: after each step, what is there, and the event that tells of it.
    fn history(steps: &[(u8, u8, bool)]) -> Vec<(Truth, Change<u8>)> {
        let (mut truth, mut told) = (Truth::new(), Vec::new());
        for (at, (name, value, delete)) in steps.iter().enumerate() {
            let version = 10 + at as u64;
            let change = match truth.get(name).copied() {
                Some((_, uid, _)) if *delete => {
                    truth.remove(name);
                    Change::Delete { key: key(*name), uid: uid.to_string().into(), version: Some(version) }
                }
                known => {
                    let uid = known.map_or(at as u8, |(_, uid, _)| uid);
                    truth.insert(*name, (version, uid, *value));
                    Change::Apply(item(*name, version, uid, *value))
                }
            };
            told.push((truth.clone(), change));
        }
        told
    }

    fn listed(truth: &Truth, version: u64) -> Change<u8> {
        let items = truth.iter().map(|(name, (version, uid, value))| item(*name, *version, *uid, *value)).collect();
        Change::Replace { items, version: Some(version) }
    }

    fn known(store: &Store<u8>) -> Vec<(String, String, u8)> {
        let mut known: Vec<_> =
            store.iter().map(|(key, slot)| (key.name.to_string(), slot.uid.to_string(), slot.object)).collect();
        known.sort();
        known
    }

    fn expected(truth: &Truth) -> Vec<(String, String, u8)> {
        let mut known: Vec<_> =
            truth.iter().map(|(name, (_, uid, value))| (name.to_string(), uid.to_string(), *value)).collect();
        known.sort();
        known
    }

    proptest! {
        /// Events in any order, any of them many times, and at the end each at least once.
        #[test]
        fn any_order_of_events_with_duplicates_ends_in_the_truth(
            steps in prop::collection::vec((0_u8..5, 0_u8..4, any::<bool>()), 1..40),
            order in prop::collection::vec(any::<prop::sample::Index>(), 0..120),
            shuffle in any::<u64>(),
        ) {
            let history = history(&steps);
            let mut store = Store::<u8>::default();
            store.apply(listed(&Truth::new(), 5));
            for index in order {
                store.apply(history[index.index(history.len())].1.clone());
            }
            let mut rest: Vec<_> = history.iter().map(|(_, change)| change.clone()).collect();
            let turn = (shuffle % rest.len() as u64) as usize;
            rest.rotate_left(turn);
            if shuffle % 2 == 0 { rest.reverse(); }
            for change in rest {
                store.apply(change);
            }
            prop_assert_eq!(known(&store), expected(&history.last().unwrap().0));
        }

        /// What a client really meets: streams that are cut and go on from an earlier version, bookmarks, and lists in between.
        #[test]
        fn cut_streams_relists_and_bookmarks_end_in_the_truth(
            steps in prop::collection::vec((0_u8..5, 0_u8..4, any::<bool>()), 1..40),
            actions in prop::collection::vec((0_u8..4, any::<prop::sample::Index>()), 0..60),
        ) {
            let history = history(&steps);
            let (mut store, mut at) = (Store::<u8>::default(), 0);
            store.apply(listed(&Truth::new(), 5));
            for (action, index) in actions {
                match action {
                    // Some more of the stream.
                    0 => {
                        let until = (at + 1 + index.index(4)).min(history.len());
                        for (_, change) in &history[at..until] { store.apply(change.clone()); }
                        at = until;
                        prop_assert_eq!(known(&store), expected(&at.checked_sub(1).map_or(Truth::new(), |at| history[at].0.clone())));
                    }
                    // The stream is cut, and the next one tells some of it again.
                    1 => {
                        let from = index.index(at + 1);
                        for (_, change) in &history[from..at] { store.apply(change.clone()); }
                    }
                    // A bookmark.
                    2 if at > 0 => { store.apply(Change::Reached(9 + at as u64)); }
                    // The history before was compacted away: a list, of later on.
                    3 => {
                        at += index.index(history.len() - at + 1);
                        let truth = at.checked_sub(1).map_or(Truth::new(), |at| history[at].0.clone());
                        store.apply(listed(&truth, 9 + at as u64));
                        prop_assert_eq!(known(&store), expected(&truth));
                    }
                    _ => {}
                }
                prop_assert_eq!(known(&store), expected(&at.checked_sub(1).map_or(Truth::new(), |at| history[at].0.clone())));
            }
            for (_, change) in &history[at..] { store.apply(change.clone()); }
            prop_assert_eq!(known(&store), expected(&history.last().unwrap().0));
        }
    }

    #[test]
    fn a_late_delete_spares_one_that_was_made_anew() {
        let mut store = Store::<u8>::default();
        store.apply(listed(&Truth::from([(1, (10, 1, 1))]), 10));
        assert!(store.apply(Change::Apply(item(1, 12, 2, 7))));
        assert!(!store.apply(Change::Delete { key: key(1), uid: "1".into(), version: Some(11) }));
        assert!(!store.apply(Change::Delete { key: key(1), uid: "1".into(), version: None }));
        assert_eq!(store.get(&key(1)), Some(&7));
    }

    #[test]
    fn what_is_told_again_is_no_change() {
        let mut store = Store::<u8>::default();
        assert!(!store.is_complete());
        assert!(store.apply(listed(&Truth::new(), 5)), "an empty list is news where there was none");
        assert!(store.apply(Change::Apply(item(1, 10, 1, 1))));
        assert!(!store.apply(Change::Apply(item(1, 10, 1, 1))));
        assert!(!store.apply(Change::Apply(item(1, 11, 1, 1))), "a version of it in which nothing of concern differs");
        assert!(!store.apply(listed(&Truth::from([(1, (11, 1, 1))]), 12)));
        assert!(!store.apply(Change::Apply(item(2, 12, 1, 1))), "older than the list, which has it not");
        assert!(store.apply(listed(&Truth::new(), 3)), "a list counts, be it of a backup");
        assert!(store.apply(Change::Apply(item(1, 4, 1, 1))));
    }

    #[test]
    fn deleted_ones_are_forgotten_when_that_version_is_reached() {
        let mut store = Store::<u8>::default();
        store.apply(listed(&Truth::new(), 5));
        store.apply(Change::Delete { key: key(1), uid: "1".into(), version: Some(7) });
        assert_eq!(store.gone.len(), 1);
        store.apply(Change::Reached(7));
        assert!(store.gone.is_empty());
        assert!(!store.apply(Change::Apply(item(1, 6, 1, 1))));
    }
}
