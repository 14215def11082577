//! Consistent hashing: which endpoint a request with this key goes to, on every node alike.
//!
//! Promises that a key stays with its endpoint while others come and go, but for about the share that has to move; and
//! that agents with the same endpoints agree. Looked up in O(log n) (ring) or O(1) (Maglev), without a lock. Tested below.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::HeaderName;
use twox_hash::XxHash64;

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
    /// `ringHash`: at least so many places on the ring.
    Ring(u32),
    /// `maglev`: exactly so many, a prime.
    Maglev(u32),
}

/// Endpoints by hash.
#[derive(Debug)]
pub struct ConsistentHash {
    /// What requests are told apart by.
    pub key: Arc<HashKey>,
    places: Places,
}

#[derive(Debug)]
enum Places {
    /// Hash and endpoint, by hash.
    Ring(Box<[(u64, u32)]>),
    /// Endpoint by slot.
    Maglev(Box<[u32]>),
}

impl ConsistentHash {
    /// The table for these endpoints, whose order does not matter to who is chosen.
    pub fn new(key: Arc<HashKey>, table: HashTable, endpoints: &[SocketAddr]) -> Self {
        let places = match table {
            HashTable::Ring(least) => Places::Ring(ring(least, endpoints)),
            HashTable::Maglev(size) => Places::Maglev(maglev(size, endpoints)),
        };
        Self { key, places }
    }

    /// Name and size of the table, for people.
    pub fn table(&self) -> (&'static str, usize) {
        match &self.places {
            Places::Ring(ring) => ("ring", ring.len()),
            Places::Maglev(slots) => ("maglev", slots.len()),
        }
    }

    /// Indices of endpoints for this hash, the best first; some more than once, and all of them where the table has room.
    pub fn preferred(&self, hash: u64) -> impl Iterator<Item = usize> {
        let (count, first) = match &self.places {
            Places::Ring(ring) => (ring.len(), ring.partition_point(|(place, _)| *place < hash)),
            Places::Maglev(slots) => (slots.len(), (hash % slots.len().max(1) as u64) as usize),
        };
        (first..first + count).map(move |place| {
            let place = place % count;
            match &self.places {
                Places::Ring(ring) => ring[place].1 as usize,
                Places::Maglev(slots) => slots[place] as usize,
            }
        })
    }
}

/// The hash of a key: `XXH64`, the same in every agent.
pub fn hash_of(bytes: &[u8]) -> u64 {
    XxHash64::oneshot(0, bytes)
}

/// Each endpoint has as many places as any other, at least one (Envoy's ring for equal weights).
fn ring(least: u32, endpoints: &[SocketAddr]) -> Box<[(u64, u32)]> {
    let each = (least as usize).div_ceil(endpoints.len().max(1)).max(1);
    let mut ring = Vec::with_capacity(each * endpoints.len());
    for (index, endpoint) in (0..).zip(endpoints) {
        ring.extend((0..each).map(|place| (hash_of(format!("{endpoint}_{place}").as_bytes()), index)));
    }
    // Should two ever share a place, it is the same one's on every node.
    ring.sort_unstable_by_key(|(hash, index)| (*hash, endpoints[*index as usize]));
    ring.into_boxed_slice()
}

/// Maglev's table (Eisenbud et al., NSDI 2016, section 3.4): in turn each endpoint takes the next free slot of its own
/// permutation.
fn maglev(size: u32, endpoints: &[SocketAddr]) -> Box<[u32]> {
    if endpoints.is_empty() || size < 2 {
        return Box::default();
    }
    let size = u64::from(size);
    // By address, so that the order they come in changes nothing.
    let mut order: Vec<(u32, &SocketAddr)> = (0..).zip(endpoints).collect();
    order.sort_unstable_by_key(|(_, endpoint)| **endpoint);
    let mut permutations: Vec<(u32, u64, u64)> = order
        .iter()
        .map(|(index, endpoint)| {
            let name = endpoint.to_string();
            let (first, step) =
                (XxHash64::oneshot(0, name.as_bytes()), XxHash64::oneshot(1, name.as_bytes()));
            (*index, first % size, step % (size - 1) + 1)
        })
        .collect();
    let mut slots: Vec<Option<u32>> = vec![None; size as usize];
    let mut left = slots.len();
    'full: loop {
        for (index, next, step) in &mut permutations {
            // The size is a prime, so each permutation passes every slot.
            while slots[*next as usize].is_some() {
                *next = (*next + *step) % size;
            }
            slots[*next as usize] = Some(*index);
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
        endpoints[hash.preferred(hash_of(&key.to_be_bytes())).next().unwrap()]
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

    /// One of ten goes: its tenth of the keys moves, and little else does.
    #[test]
    fn keys_stay_while_endpoints_come_and_go() {
        let (ten, nine) = (endpoints(10), endpoints(9));
        for kind in TABLES {
            let (before, after) = (table(kind, &ten), table(kind, &nine));
            let moved = (0..KEYS).filter(|key| of(&before, &ten, *key) != of(&after, &nine, *key)).count();
            let share = moved as f64 / KEYS as f64;
            assert!(share <= 0.1 + 0.05, "{kind:?}: {share} of the keys moved");
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
            let mut seen: Vec<usize> = hash.preferred(42).collect();
            seen.sort_unstable();
            seen.dedup();
            assert_eq!(seen, [0, 1, 2, 3, 4], "{kind:?}");
        }
    }

    #[test]
    fn none_and_more_than_there_is_room_for() {
        for kind in [HashTable::Ring(1), HashTable::Maglev(3), HashTable::Ring(0), HashTable::Maglev(0)] {
            assert_eq!(table(kind, &[]).preferred(7).count(), 0, "{kind:?}");
        }
        let endpoints = endpoints(20);
        assert_eq!(table(HashTable::Ring(1), &endpoints).preferred(7).count(), 20);
        assert_eq!(table(HashTable::Maglev(3), &endpoints).preferred(7).count(), 3);
    }
}
