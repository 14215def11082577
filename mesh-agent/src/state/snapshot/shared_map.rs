//! A map of which a changed copy costs little: a snapshot shares with the one before all that has not changed.
//!
//! The entries are in parts, about as many as there are entries in a part. A copy shares all parts; what is written makes
//! a copy of its part and of the list of parts. Looking up hashes once and follows one pointer more than a plain map does.
//! Promises that what was read from one copy is never changed by writing another. Tested below; why so, and what others
//! cost: `docs/decisions/030-incremental-configuration.md`.

use std::{
    borrow::Borrow,
    fmt,
    hash::{BuildHasher, Hash, RandomState},
    ops::Index,
    sync::Arc,
};

use hashbrown::{HashTable, hash_table::Entry};

/// Up to so many entries are one part.
const ONE_PART: usize = 64;

/// The most parts: their list is copied with each change.
const MOST_PARTS: usize = 1024;

/// Keys and values, in parts that copies share.
#[derive(Clone)]
pub struct SharedMap<K, V> {
    /// None, or a power of two.
    parts: Arc<[Part<K, V>]>,
    hasher: RandomState,
    len: usize,
}

/// One part.
type Part<K, V> = Arc<HashTable<(K, V)>>;

/// What is otherwise than it was: a key, its value before, and its value after.
pub type Changed<'s, K, V> = (&'s K, Option<&'s V>, Option<&'s V>);

impl<K, V> Default for SharedMap<K, V> {
    fn default() -> Self {
        Self { parts: Arc::new([]), hasher: RandomState::new(), len: 0 }
    }
}

impl<K: fmt::Debug, V: fmt::Debug> fmt::Debug for SharedMap<K, V> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<K, V> SharedMap<K, V> {
    /// How many entries there are.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// All entries, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (&K, &V)> {
        self.parts.iter().flat_map(|part| part.iter()).map(|(key, value)| (key, value))
    }

    /// All keys, in no order.
    pub fn keys(&self) -> impl Iterator<Item = &K> {
        self.iter().map(|(key, _)| key)
    }

    /// All values, in no order.
    pub fn values(&self) -> impl Iterator<Item = &V> {
        self.iter().map(|(_, value)| value)
    }

    /// Whether the two are copies of one another, and neither was changed since.
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.parts, &other.parts) || (self.is_empty() && other.is_empty())
    }

    /// Whether anything is shared at all: else all of it was made anew.
    pub fn shares_with(&self, other: &Self) -> bool {
        self.is_same(other) || self.parts.iter().zip(&*other.parts).any(|(one, two)| Arc::ptr_eq(one, two))
    }

    /// Bits that the table of a part makes no use of.
    fn place(&self, hash: u64) -> usize {
        (hash >> 40) as usize & self.parts.len().wrapping_sub(1)
    }
}

impl<K: Eq + Hash, V> SharedMap<K, V> {
    /// The value of a key.
    pub fn get<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> Option<&V>
    where
        K: Borrow<Q>,
    {
        let hash = self.hasher.hash_one(key);
        let part = self.parts.get(self.place(hash))?;
        part.find(hash, |(known, _)| <K as Borrow<Q>>::borrow(known) == key).map(|(_, value)| value)
    }

    /// Whether there is a value of this key.
    pub fn contains_key<Q: Eq + Hash + ?Sized>(&self, key: &Q) -> bool
    where
        K: Borrow<Q>,
    {
        self.get(key).is_some()
    }

    /// What is otherwise than in `before`: what is shared is not looked at. `same`: whether two values are the same.
    pub fn changes<'s>(&'s self, before: &'s Self, same: impl Fn(&V, &V) -> bool) -> Vec<Changed<'s, K, V>> {
        let mut changes = Vec::new();
        if self.is_same(before) {
            return changes;
        }
        for (key, value) in self.not_shared_with(before) {
            let was = before.get(key);
            if !was.is_some_and(|was| same(was, value)) {
                changes.push((key, was, Some(value)));
            }
        }
        let gone = before.not_shared_with(self).filter(|(key, _)| !self.contains_key(*key));
        changes.extend(gone.map(|(key, was)| (key, Some(was), None)));
        changes
    }

    fn not_shared_with<'s>(&'s self, other: &'s Self) -> impl Iterator<Item = (&'s K, &'s V)> {
        let alike = self.parts.len() == other.parts.len();
        let own = self.parts.iter().enumerate();
        let own = own.filter(move |(i, part)| !alike || !Arc::ptr_eq(part, &other.parts[*i]));
        own.flat_map(|(_, part)| part.iter()).map(|(key, value)| (key, value))
    }
}

impl<K: Clone + Eq + Hash, V: Clone> SharedMap<K, V> {
    fn with_room_for(len: usize) -> Self {
        let parts = std::iter::repeat_with(|| Arc::new(HashTable::new())).take(parts(len)).collect();
        Self { parts, hasher: RandomState::new(), len: 0 }
    }

    /// Sets the value of a key; the value it had.
    pub fn insert(&mut self, key: K, value: V) -> Option<V> {
        if self.len >= most(self.parts.len()) {
            let mut more = Self::with_room_for(self.len + 1);
            for (key, value) in self.iter() {
                more.insert(key.clone(), value.clone());
            }
            *self = more;
        }
        let hash = self.hasher.hash_one(&key);
        let (place, hasher) = (self.place(hash), &self.hasher);
        let part = Arc::make_mut(&mut Arc::make_mut(&mut self.parts)[place]);
        match part.entry(hash, |(known, _)| *known == key, |(known, _)| hasher.hash_one(known)) {
            Entry::Occupied(entry) => Some(std::mem::replace(&mut entry.into_mut().1, value)),
            Entry::Vacant(entry) => {
                entry.insert((key, value));
                self.len += 1;
                None
            }
        }
    }

    /// Takes a key away; the value it had.
    pub fn remove<Q: Eq + Hash + ?Sized>(&mut self, key: &Q) -> Option<V>
    where
        K: Borrow<Q>,
    {
        // What is not there needs no copy.
        self.get(key)?;
        let hash = self.hasher.hash_one(key);
        let place = self.place(hash);
        let part = Arc::make_mut(&mut Arc::make_mut(&mut self.parts)[place]);
        let entry = part.find_entry(hash, |(known, _)| <K as Borrow<Q>>::borrow(known) == key).ok()?;
        self.len -= 1;
        Some(entry.remove().0.1)
    }
}

impl<K: Clone + Eq + Hash, V: Clone> FromIterator<(K, V)> for SharedMap<K, V> {
    fn from_iter<I: IntoIterator<Item = (K, V)>>(entries: I) -> Self {
        let entries = entries.into_iter();
        let mut map = Self::with_room_for(entries.size_hint().0);
        for (key, value) in entries {
            map.insert(key, value);
        }
        // Room for more would be carried along for good.
        let hasher = &map.hasher;
        for part in Arc::make_mut(&mut map.parts) {
            Arc::make_mut(part).shrink_to_fit(|(known, _)| hasher.hash_one(known));
        }
        map
    }
}

impl<K: Clone + Eq + Hash, V: Clone, const N: usize> From<[(K, V); N]> for SharedMap<K, V> {
    fn from(entries: [(K, V); N]) -> Self {
        entries.into_iter().collect()
    }
}

impl<K: Eq + Hash + Borrow<Q>, V, Q: Eq + Hash + ?Sized> Index<&Q> for SharedMap<K, V> {
    type Output = V;

    /// # Panics
    /// Where the key is not there, as with any map.
    fn index(&self, key: &Q) -> &V {
        self.get(key).unwrap_or_else(|| panic!("no such key"))
    }
}

/// How many parts suit so many entries: a change copies about as many pointers as entries.
fn parts(len: usize) -> usize {
    if len <= ONE_PART { 1 } else { len.isqrt().next_power_of_two().min(MOST_PARTS) }
}

/// How many entries so many parts bear before there have to be more.
fn most(parts: usize) -> usize {
    match parts {
        0 => 0,
        1 => ONE_PART,
        MOST_PARTS.. => usize::MAX,
        parts => 4 * parts * parts,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn plain(map: &SharedMap<u32, u32>) -> HashMap<u32, u32> {
        let plain: HashMap<u32, u32> = map.iter().map(|(key, value)| (*key, *value)).collect();
        assert_eq!(plain.len(), map.len());
        assert!(plain.iter().all(|(key, value)| map.get(key) == Some(value)));
        plain
    }

    /// Copies before and after each change say what a plain map would have said then, and their difference is the change.
    #[test]
    fn it_is_a_map_and_its_copies_stay_as_they_were() {
        let change = (0_u32..600, proptest::option::weighted(0.7, any::<u32>()));
        let changes = proptest::collection::vec(change, 0..700);
        proptest!(|(start in 0_u32..600, changes in changes)| {
            let mut map: SharedMap<u32, u32> = (0..start).map(|key| (key, key)).collect();
            let mut expected = plain(&map);
            let (first, at_first) = (map.clone(), expected.clone());
            for (key, value) in changes {
                let (before, was) = (map.clone(), expected.get(&key).copied());
                if let Some(value) = value {
                    prop_assert_eq!(map.insert(key, value), expected.insert(key, value));
                } else {
                    prop_assert_eq!(map.remove(&key), expected.remove(&key));
                }
                let changed = map.changes(&before, |a, b| a == b);
                let one = [(&key, was.as_ref(), value.as_ref())];
                prop_assert_eq!(&changed[..], if was == value { &[][..] } else { &one[..] });
            }
            prop_assert_eq!(plain(&map), expected);
            prop_assert_eq!(plain(&first), at_first);
        });
    }

    #[test]
    fn a_change_leaves_nearly_all_of_it_shared() {
        let before: SharedMap<u32, u32> = (0..10_000).map(|key| (key, 0)).collect();
        let mut after = before.clone();
        assert!(after.is_same(&before));
        after.insert(7, 1);
        assert!(!after.is_same(&before) && after.shares_with(&before));
        let anew: SharedMap<u32, u32> = before.iter().map(|(key, value)| (*key, *value)).collect();
        assert!(!anew.shares_with(&before));
        let shared = before.parts.iter().zip(&*after.parts).filter(|(a, b)| Arc::ptr_eq(a, b)).count();
        assert_eq!((before.parts.len(), shared), (128, 127));
        assert!(after.not_shared_with(&before).count() < 200);
    }

    #[test]
    fn nothing_is_in_an_empty_one() {
        let mut map: SharedMap<u32, u32> = SharedMap::default();
        assert!(map.is_empty() && map.get(&1).is_none() && map.remove(&1).is_none());
        assert_eq!(map.insert(1, 1), None);
        assert_eq!(map[&1], 1);
    }
}
