//! Chooses an endpoint of a cluster and counts what is in flight there.
//!
//! Never takes a lock and never allocates; never chooses an endpoint already tried while another is left, nor one that is
//! ejected. Tested by the unit tests below, with seeded random numbers.

mod hash;
pub mod outlier;

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

pub use self::hash::{Keyed, key};
use crate::state::snapshot::{Balancing, Cluster, ConsistentHash, Endpoint};

/// A chosen endpoint; counts as in flight until dropped.
#[derive(Debug)]
pub struct Chosen {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
}

impl Chosen {
    fn new(endpoint: &Arc<Endpoint>) -> Self {
        // Relaxed: a balancer's hint orders nothing else.
        endpoint.state.in_flight.fetch_add(1, Ordering::Relaxed);
        Self { endpoint: Arc::clone(endpoint) }
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        self.endpoint.state.in_flight.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Chooses an endpoint, avoiding those tried before when others are left, and those that are ejected. `hash`: what a cluster
/// that hashes tells the request apart by; then those tried are not avoided (Istio sets no such predicate there).
/// `None` when there is no endpoint that may be chosen.
pub fn choose(cluster: &Cluster, tried: &[SocketAddr], hash: Option<u64>) -> Option<Chosen> {
    let mut left = Left::of(cluster, tried);
    if !tried.is_empty() && !cluster.endpoints.iter().any(|endpoint| left.allows(endpoint)) {
        left.tried = &[];
    }
    let endpoint = match (&cluster.hash, hash) {
        (Some(table), Some(hash)) => left.by_hash(table, hash),
        (Some(_), None) => left.draw(None),
        (None, _) => match cluster.balancing {
            Balancing::LeastRequest => left.least_request(),
            Balancing::Random => left.draw(None),
            Balancing::RoundRobin => {
                let turn = cluster.state.next.fetch_add(1, Ordering::Relaxed);
                left.from(turn)
            }
        },
    }?;
    Some(Chosen::new(endpoint))
}

/// The endpoint at this address, which was chosen elsewhere. `None` when the cluster does not have it (any more).
pub fn chosen(cluster: &Cluster, address: SocketAddr) -> Option<Chosen> {
    cluster.endpoints.iter().find(|endpoint| endpoint.address == address).map(Chosen::new)
}

/// How often an endpoint is drawn that may turn out not to be allowed, before all of them are looked at.
const DRAWS: usize = 16;

/// The endpoints that may still be chosen.
struct Left<'a> {
    endpoints: &'a [Arc<Endpoint>],
    tried: &'a [SocketAddr],
    /// Whether those that are ejected get nothing.
    spare_ejected: bool,
}

impl<'a> Left<'a> {
    fn of(cluster: &'a Cluster, tried: &'a [SocketAddr]) -> Self {
        let spare_ejected = cluster.outlier.as_ref().is_some_and(|rule| !outlier::panics(cluster, rule));
        Self { endpoints: &cluster.endpoints, tried, spare_ejected }
    }

    fn allows(&self, endpoint: &Endpoint) -> bool {
        let ejected = self.spare_ejected && endpoint.state.health.is_ejected();
        !ejected && !self.tried.contains(&endpoint.address)
    }

    /// Two at random, the one with fewer requests in flight.
    fn least_request(&self) -> Option<&'a Arc<Endpoint>> {
        let first = self.draw(None)?;
        let Some(second) = self.draw(Some(first)) else { return Some(first) };
        let in_flight = |endpoint: &Endpoint| endpoint.state.in_flight.load(Ordering::Relaxed);
        Some(if in_flight(second) < in_flight(first) { second } else { first })
    }

    /// One at random, each as likely as any other.
    fn draw(&self, except: Option<&Arc<Endpoint>>) -> Option<&'a Arc<Endpoint>> {
        let allowed = |endpoint: &Arc<Endpoint>| {
            self.allows(endpoint) && except.is_none_or(|except| !Arc::ptr_eq(except, endpoint))
        };
        let count = self.endpoints.len();
        if count > usize::from(except.is_some()) {
            let mut draws = (0..DRAWS).map(|_| &self.endpoints[fastrand::usize(..count)]);
            if let Some(drawn) = draws.find(|endpoint| allowed(endpoint)) {
                return Some(drawn);
            }
        }
        // Few are left, if any.
        let left = || self.endpoints.iter().filter(|endpoint| allowed(endpoint));
        let count = left().count();
        if count == 0 { None } else { left().nth(fastrand::usize(..count)) }
    }

    /// The first of those left at or after this place, going round.
    fn from(&self, turn: u64) -> Option<&'a Arc<Endpoint>> {
        let place = turn.checked_rem(self.endpoints.len() as u64)?;
        let (before, after) = self.endpoints.split_at_checked(place as usize)?;
        after.iter().chain(before).find(|endpoint| self.allows(endpoint))
    }

    /// The best for this hash that is not ejected.
    fn by_hash(&self, table: &ConsistentHash, hash: u64) -> Option<&'a Arc<Endpoint>> {
        let left = Left { tried: &[], ..*self };
        let mut preferred = table.preferred(hash).filter_map(|index| self.endpoints.get(index));
        preferred.find(|endpoint| left.allows(endpoint))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::state::snapshot::{ClusterState, EndpointState, HashKey, HashTable, hash_of};

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 80))
    }

    pub(super) fn cluster(balancing: Balancing, endpoints: u8) -> Cluster {
        let endpoint = |n| {
            Arc::new(Endpoint {
                address: address(n),
                workload: None,
                state: Arc::new(EndpointState::default()),
            })
        };
        Cluster {
            name: "outbound|80||a.default.svc.cluster.local".into(),
            host: "a.default.svc.cluster.local".into(),
            service: "a".into(),
            namespace: "default".into(),
            port: 80,
            protocol: None,
            subset: None,
            view: None,
            endpoints: (1..=endpoints).map(endpoint).collect(),
            balancing,
            hash: None,
            outlier: None,
            connect_timeout: Duration::from_secs(10),
            limits_connections: false,
            retry_budget: crate::state::defaults::RETRY_BUDGET,
            state: Arc::new(ClusterState::default()),
        }
    }

    fn draw(cluster: &Cluster, times: usize) -> BTreeMap<SocketAddr, usize> {
        fastrand::seed(7);
        let mut drawn = BTreeMap::new();
        for _ in 0..times {
            *drawn.entry(choose(cluster, &[], None).unwrap().endpoint.address).or_default() += 1;
        }
        drawn
    }

    const ALL: [Balancing; 3] = [Balancing::LeastRequest, Balancing::RoundRobin, Balancing::Random];

    #[test]
    fn nothing_to_choose_from() {
        for balancing in ALL {
            assert!(choose(&cluster(balancing, 0), &[], None).is_none(), "{balancing:?}");
        }
    }

    #[test]
    fn tried_endpoints_come_last() {
        for balancing in ALL {
            let cluster = cluster(balancing, 3);
            for _ in 0..50 {
                let chosen = choose(&cluster, &[address(1), address(3)], None).unwrap();
                assert_eq!(chosen.endpoint.address, address(2), "{balancing:?}");
            }
            assert!(choose(&cluster, &[address(1), address(2), address(3)], None).is_some(), "{balancing:?}");
        }
    }

    #[test]
    fn in_flight_counts_while_chosen() {
        let cluster = cluster(Balancing::RoundRobin, 1);
        let in_flight = || cluster.endpoints[0].state.in_flight.load(Ordering::Relaxed);
        let (one, two) = (choose(&cluster, &[], None), choose(&cluster, &[], None));
        assert_eq!(in_flight(), 2);
        drop(one);
        assert_eq!(in_flight(), 1);
        drop(two);
        assert_eq!(in_flight(), 0);
    }

    #[test]
    fn round_robin_takes_turns() {
        let drawn = draw(&cluster(Balancing::RoundRobin, 3), 30);
        assert!(drawn.len() == 3 && drawn.values().all(|count| *count == 10), "{drawn:?}");
    }

    #[test]
    fn random_and_idle_least_request_spread_evenly() {
        for balancing in [Balancing::Random, Balancing::LeastRequest] {
            let drawn = draw(&cluster(balancing, 4), 4_000);
            assert!(drawn.values().all(|count| (850..1150).contains(count)), "{balancing:?} {drawn:?}");
        }
    }

    #[test]
    fn least_request_turns_away_from_the_busy() {
        let cluster = cluster(Balancing::LeastRequest, 4);
        cluster.endpoints[0].state.in_flight.store(100, Ordering::Relaxed);
        let drawn = draw(&cluster, 1_000);
        assert_eq!(drawn.get(&address(1)), None, "two are always compared, and the other is idle: {drawn:?}");
    }

    fn hashed(endpoints: u8) -> Cluster {
        let all = cluster(Balancing::Random, endpoints);
        let addresses: Vec<_> = all.endpoints.iter().map(|endpoint| endpoint.address).collect();
        let table = ConsistentHash::new(Arc::new(HashKey::SourceIp), HashTable::Ring(1024), &addresses);
        Cluster { hash: Some(table), outlier: Some(crate::state::defaults::OUTLIER_DETECTION), ..all }
    }

    #[test]
    fn a_hash_stays_with_its_endpoint_and_moves_only_while_that_is_ejected() {
        let cluster = hashed(5);
        let of = |hash| choose(&cluster, &[], Some(hash)).unwrap().endpoint.address;
        let keys = || (0..500_u64).map(|key| hash_of(&key.to_be_bytes()));
        let before: Vec<_> = keys().map(of).collect();
        assert_eq!(before, keys().map(of).collect::<Vec<_>>());
        // What was tried before is tried again: that is what a hash is for.
        let again = choose(&cluster, &[before[0]], keys().next()).unwrap();
        assert_eq!(again.endpoint.address, before[0]);

        let away = &cluster.endpoints[2];
        away.state.health.eject(tokio::time::Instant::now());
        for (key, before) in keys().zip(&before) {
            let now = of(key);
            assert_ne!(now, away.address);
            assert!(now == *before || *before == away.address, "another endpoint's key moved");
        }
        away.state.health.give_back();
        assert_eq!(before, keys().map(of).collect::<Vec<_>>());
    }

    #[test]
    fn what_has_nothing_to_be_hashed_goes_anywhere() {
        let drawn: std::collections::BTreeSet<_> = {
            let cluster = hashed(3);
            (0..200).map(|_| choose(&cluster, &[], None).unwrap().endpoint.address).collect()
        };
        assert_eq!(drawn.len(), 3);
    }
}
