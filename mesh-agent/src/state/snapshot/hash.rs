//! Consistent hashing: which endpoint a request with this key goes to, on every node alike.
//!
//! Promises that a key stays with its endpoint while others come and go, but for about the share that has to move; and
//! that agents with the same endpoints agree. Looked up in O(log n) (ring) or O(1) (Maglev), without a lock. Tested below.

use std::{fmt::Write as _, net::SocketAddr, sync::Arc, time::Duration};

use http::HeaderName;
use twox_hash::XxHash64;

use super::{Endpoint, Level};

/// What a request is told apart by (Istio's `consistentHash`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum HashKey {
    /// `httpHeaderName`: its values.
    Header(HeaderName),
    /// `httpCookie`.
    Cookie(HashCookie),
    /// `useSourceIp`: the client's address.
    SourceIp,
    /// `httpQueryParameterName`: the first value.
    Query(Arc<str>),
}

/// `httpCookie`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HashCookie {
    /// `name`.
    pub name: Arc<str>,
    /// `path` of a cookie that is made.
    pub path: Option<Arc<str>>,
    /// `ttl`: a client that brings no cookie is given one that lasts this long, zero for its session. `None`: it is given
    /// none.
    pub ttl: Option<Duration>,
    /// `attributes` of a cookie that is made, each as it is written (`SameSite=Strict`).
    pub attributes: Arc<[String]>,
}

/// The algorithm and the size of its table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HashTable {
    /// `ringHash`: at least so many places on the ring, once there are twenty endpoints.
    Ring(u32),
    /// `maglev`: exactly so many, a prime.
    Maglev(u32),
}

/// An endpoint that has a place in a table.
#[derive(Debug, Clone, Copy)]
pub struct Placed {
    /// Its index among the cluster's endpoints.
    pub index: u32,
    /// Its address, by which agents agree where its places are.
    pub address: SocketAddr,
    /// Its share, among those of the others.
    pub weight: u32,
}

/// Endpoints by hash.
#[derive(Debug, Clone)]
pub struct ConsistentHash {
    /// What requests are told apart by.
    pub key: Arc<HashKey>,
    /// A table for each level of the cluster, the best first; at least one.
    levels: Arc<[Places]>,
}

#[derive(Debug, Clone)]
enum Places {
    /// Hash and endpoint, by hash.
    Ring(Arc<[(u64, u32)]>),
    /// Endpoint by slot.
    Maglev(Arc<[u32]>),
}

impl ConsistentHash {
    /// The table for these endpoints, all of one level and weight, whose order does not matter to who is chosen.
    pub fn new(key: Arc<HashKey>, table: HashTable, endpoints: &[SocketAddr]) -> Self {
        let all = (0..).zip(endpoints).map(|(index, address)| Placed { index, address: *address, weight: 1 });
        Self::by_level(key, table, &[all.collect()])
    }

    /// The tables for the endpoints of each level.
    pub fn by_level(key: Arc<HashKey>, table: HashTable, levels: &[Vec<Placed>]) -> Self {
        let places = |endpoints: &Vec<Placed>| match table {
            HashTable::Ring(least) => Places::Ring(ring(least, endpoints).into()),
            HashTable::Maglev(size) => Places::Maglev(maglev(size, endpoints).into()),
        };
        Self { key, levels: levels.iter().map(places).collect() }
    }

    /// The tables for a cluster's endpoints as they are in levels; none: all are one level, each as good as any other.
    pub fn over(key: Arc<HashKey>, table: HashTable, endpoints: &[Arc<Endpoint>], levels: &[Level]) -> Self {
        if levels.is_empty() {
            let addresses: Vec<_> = endpoints.iter().map(|endpoint| endpoint.address).collect();
            return Self::new(key, table, &addresses);
        }
        let levels: Vec<_> = levels.iter().map(|level| level.placed(endpoints)).collect();
        Self::by_level(key, table, &levels)
    }

    /// Name and size of the tables, for people.
    pub fn table(&self) -> (&'static str, usize) {
        let places = |places: &Places| match places {
            Places::Ring(ring) => ("ring", ring.len()),
            Places::Maglev(slots) => ("maglev", slots.len()),
        };
        let tables = self.levels.iter().map(places);
        tables.reduce(|(name, all), (_, more)| (name, all + more)).unwrap_or(("ring", 0))
    }

    /// Indices of endpoints of a level for this hash, the best first; some more than once, and all of them where the table has
    /// room.
    pub fn preferred(&self, level: usize, hash: u64) -> impl Iterator<Item = usize> {
        let places = self.levels.get(level);
        let (count, first) = match places {
            None => (0, 0),
            Some(Places::Ring(ring)) => (ring.len(), ring.partition_point(|(place, _)| *place < hash)),
            Some(Places::Maglev(slots)) => (slots.len(), (hash % slots.len().max(1) as u64) as usize),
        };
        (first..first + count).filter_map(move |place| {
            let place = place % count;
            match places? {
                Places::Ring(ring) => ring.get(place).map(|(_, index)| *index as usize),
                Places::Maglev(slots) => slots.get(place).map(|index| *index as usize),
            }
        })
    }
}

/// The hash of a key: `XXH64`, the same in every agent.
pub fn hash_of(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// Up to so many endpoints have as many places each, however many there are: a place that goes because another endpoint came
/// would move keys between two that were there before. Beyond it, that is less than a twentieth of the keys.
const STEADY: u64 = 20;

/// Places that are enough for an endpoint: they even its share out to a few percent.
const ENOUGH: u32 = 1024;

/// Each endpoint has places by its weight, at least one (as Envoy's ring, but for [`STEADY`]).
fn ring(least: u32, endpoints: &[Placed]) -> Box<[(u64, u32)]> {
    let (count, sum) = (endpoints.len() as u64, endpoints.iter().map(|one| u64::from(one.weight)).sum());
    let whole = u64::from(least).max(STEADY * u64::from(least.min(ENOUGH)));
    let all = whole.div_ceil(count.max(STEADY)) * count;
    let places = |weight: u32| (u64::from(weight) * all).div_ceil(u64::max(sum, 1)).max(1);
    let mut ring = Vec::with_capacity(all as usize + endpoints.len());
    let mut name = String::new();
    for (number, Placed { address, weight, .. }) in (0_u32..).zip(endpoints) {
        for place in 0..places(*weight) {
            name.clear();
            // Writing to a string cannot fail.
            let _ = write!(name, "{address}_{place}");
            ring.push((hash_of(name.as_bytes()), number));
        }
    }
    // Should two ever share a place, it is the same one's on every node.
    ring.sort_unstable_by_key(|(hash, number)| (*hash, endpoints[*number as usize].address));
    ring.into_iter().map(|(hash, number)| (hash, endpoints[number as usize].index)).collect()
}

/// One endpoint that fills Maglev's table.
struct Filling {
    index: u32,
    /// The next slot of its permutation, and how far the one after that is.
    next: u64,
    step: u64,
    weight: u64,
    /// What its rounds have come to when it is its turn again.
    due: u64,
}

/// Maglev's table (Eisenbud et al., NSDI 2016, section 3.4): in turn each endpoint takes the next free slot of its own
/// permutation. Who weighs less takes part in fewer rounds (as Envoy's).
fn maglev(size: u32, endpoints: &[Placed]) -> Box<[u32]> {
    if endpoints.is_empty() || size < 2 {
        return Box::default();
    }
    let size = u64::from(size);
    // By address, so that the order they come in changes nothing.
    let mut order: Vec<&Placed> = endpoints.iter().collect();
    order.sort_unstable_by_key(|endpoint| endpoint.address);
    let heaviest = u64::from(order.iter().map(|endpoint| endpoint.weight).max().unwrap_or(1).max(1));
    let filling = |endpoint: &&Placed| {
        let name = endpoint.address.to_string();
        let (first, step) = (XxHash64::oneshot(0, name.as_bytes()), XxHash64::oneshot(1, name.as_bytes()));
        let weight = u64::from(endpoint.weight.max(1));
        Filling { index: endpoint.index, next: first % size, step: step % (size - 1) + 1, weight, due: 0 }
    };
    let mut all: Vec<Filling> = order.iter().map(filling).collect();
    let mut slots: Vec<Option<u32>> = vec![None; size as usize];
    let mut left = slots.len();
    'full: for round in 1_u64.. {
        for one in &mut all {
            if round * one.weight < one.due {
                continue;
            }
            one.due += heaviest;
            // The size is a prime, so each permutation passes every slot.
            while slots[one.next as usize].is_some() {
                one.next = (one.next + one.step) % size;
            }
            slots[one.next as usize] = Some(one.index);
            left -= 1;
            if left == 0 {
                break 'full;
            }
        }
    }
    slots.into_iter().flatten().collect()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    const KEYS: u64 = 20_000;
    const TABLES: [HashTable; 2] = [HashTable::Ring(1024), HashTable::Maglev(65_537)];

    fn endpoints(count: u8) -> Vec<SocketAddr> {
        (1..=count).map(|n| SocketAddr::from(([10, 0, 0, n], 80))).collect()
    }

    fn table(table: HashTable, endpoints: &[SocketAddr]) -> ConsistentHash {
        ConsistentHash::new(Arc::new(HashKey::SourceIp), table, endpoints)
    }

    fn of(hash: &ConsistentHash, endpoints: &[SocketAddr], key: u64) -> SocketAddr {
        endpoints[hash.preferred(0, hash_of(&key.to_be_bytes())).next().unwrap()]
    }

    #[test]
    fn keys_are_spread() {
        let endpoints = endpoints(10);
        for kind in TABLES {
            let hash = table(kind, &endpoints);
            for endpoint in &endpoints {
                let count = (0..KEYS).filter(|key| of(&hash, &endpoints, *key) == *endpoint).count() as u64;
                let (least, most) = (KEYS / 10 * 6 / 10, KEYS / 10 * 14 / 10);
                assert!((least..most).contains(&count), "{kind:?}: {endpoint} has {count} of {KEYS}");
            }
        }
    }

    /// One goes, or comes: its share of the keys moves, and little else does.
    #[test]
    fn keys_stay_while_endpoints_come_and_go() {
        for kind in TABLES {
            for count in [2_u8, 3, 5, 10, 20, 25] {
                let (many, few) = (endpoints(count), endpoints(count - 1));
                let (before, after) = (table(kind, &many), table(kind, &few));
                let moves = |key: &u64| of(&before, &many, *key) != of(&after, &few, *key);
                let share = (0..KEYS).filter(moves).count() as f64 / KEYS as f64;
                let most = 1.0 / f64::from(count) + 0.05;
                assert!(share <= most, "{kind:?}, {count}: {share} of the keys moved, of at most {most}");
            }
        }
    }

    #[test]
    fn keys_are_spread_by_weight_within_a_level() {
        let endpoints = endpoints(6);
        // Two levels, in which one weighs three times as much as the others.
        let placed = |index: usize| {
            let weight = if index.is_multiple_of(3) { 3 } else { 1 };
            Placed { index: index as u32, address: endpoints[index], weight }
        };
        for kind in TABLES {
            let levels = [(0..3).map(placed).collect(), (3..6).map(placed).collect()];
            let hash = ConsistentHash::by_level(Arc::new(HashKey::SourceIp), kind, &levels);
            for level in 0..2 {
                let mut counts = [0_u64; 6];
                for key in 0..KEYS {
                    counts[hash.preferred(level, hash_of(&key.to_be_bytes())).next().unwrap()] += 1;
                }
                let own = &counts[level * 3..level * 3 + 3];
                assert_eq!(own.iter().sum::<u64>(), KEYS, "{kind:?}: the other level's endpoints {counts:?}");
                let share = own[0] as f64 / KEYS as f64;
                assert!((0.5..0.7).contains(&share), "{kind:?}: {share} instead of 0.6");
            }
            assert_eq!(hash.preferred(2, 7).count(), 0);
        }
    }

    #[test]
    fn the_order_of_endpoints_does_not_matter() {
        let forth = endpoints(7);
        let back: Vec<_> = forth.iter().rev().copied().collect();
        for kind in TABLES {
            let (one, other) = (table(kind, &forth), table(kind, &back));
            assert!((0..KEYS).all(|key| of(&one, &forth, key) == of(&other, &back, key)), "{kind:?}");
        }
    }

    #[test]
    fn the_next_best_are_all_the_others() {
        let endpoints = endpoints(5);
        for kind in TABLES {
            let hash = table(kind, &endpoints);
            let mut seen: Vec<usize> = hash.preferred(0, 42).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, [0, 1, 2, 3, 4], "{kind:?}");
        }
    }

    #[test]
    fn none_and_more_than_there_is_room_for() {
        for kind in [HashTable::Ring(1), HashTable::Maglev(3), HashTable::Ring(0), HashTable::Maglev(0)] {
            assert_eq!(table(kind, &[]).preferred(0, 7).count(), 0, "{kind:?}");
        }
        let endpoints = endpoints(20);
        assert_eq!(table(HashTable::Ring(1), &endpoints).preferred(0, 7).count(), 20);
        assert_eq!(table(HashTable::Maglev(3), &endpoints).preferred(0, 7).count(), 3);
    }
}
