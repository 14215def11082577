//! Chooses an endpoint of a cluster and counts what is in flight there.
//!
//! Promises a choice whose cost does not grow with the number of endpoints, unless hardly any of them may be chosen. Never
//! takes a lock and never allocates; never chooses an endpoint already tried while another of its level is left, nor one
//! that is ejected or found unhealthy. Which level comes first is `levels.rs`'s, who is drawn from a level `draw.rs`'s. Tested by the unit tests
//! below, with seeded random numbers; shares by chi-square in `distribution.rs`, latency in `simulation.rs`.

pub mod checks;
#[cfg(test)]
mod distribution;
mod draw;
mod hash;
mod levels;
pub mod load_report;
pub mod outlier;
#[cfg(test)]
mod simulation;
#[cfg(test)]
mod statistics;

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use tokio::time::Instant;

use self::draw::Places;
pub use self::{
    hash::{Keyed, key},
    levels::Visited,
};
use crate::state::snapshot::{Balancing, Cluster, ConsistentHash, Endpoint, Group, Level, Origin, Zones};

/// A chosen endpoint; counts as in flight until dropped.
#[derive(Debug)]
pub struct Chosen {
    /// The endpoint.
    pub endpoint: Arc<Endpoint>,
    /// The level of the cluster that it was chosen from.
    level: usize,
    /// When it was chosen; `None` once it has answered.
    asked: Option<Instant>,
}

impl Chosen {
    fn new(endpoint: &Arc<Endpoint>, level: usize, now: Instant) -> Self {
        // Relaxed: a balancer's hint orders nothing else.
        endpoint.state.in_flight.fetch_add(1, Ordering::Relaxed);
        endpoint.state.latency.asked(now);
        Self { endpoint: Arc::clone(endpoint), level, asked: Some(now) }
    }

    /// The one address that there is.
    pub fn alone(endpoint: &Arc<Endpoint>) -> Self {
        Self::new(endpoint, 0, Instant::now())
    }

    /// It has answered, or its connection has come about: how long it took is learnt.
    pub fn answered(&mut self) {
        if let Some(asked) = self.asked.take() {
            let now = Instant::now();
            self.endpoint.state.latency.answered(now, now.saturating_duration_since(asked));
        }
    }

    /// It has failed, which counts as slow however fast it was.
    pub fn failed(&mut self) {
        if let Some(asked) = self.asked.take() {
            let now = Instant::now();
            self.endpoint.state.latency.failed(now, now.saturating_duration_since(asked));
        }
    }
}

impl Drop for Chosen {
    fn drop(&mut self) {
        self.endpoint.state.in_flight.fetch_sub(1, Ordering::Relaxed);
        if let Some(asked) = self.asked.take() {
            let now = Instant::now();
            self.endpoint.state.latency.given_up(now, now.saturating_duration_since(asked));
        }
    }
}

/// What is known of whoever wants an endpoint.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wish<'a> {
    /// Endpoints that were tried before, avoided when others are left.
    pub tried: &'a [SocketAddr],
    /// What a cluster that hashes tells the request apart by; then those tried are not avoided (Istio sets no such predicate
    /// there).
    pub hash: Option<u64>,
    /// Levels that were tried before, where a retry is to go elsewhere (`retryRemoteLocalities`).
    pub visited: Visited,
    /// Labels of the client's pod; asked for where the cluster's levels depend on them.
    pub labels: Option<&'a BTreeMap<Arc<str>, Arc<str>>>,
    /// Where the pods of its workload are; asked for where the cluster prefers a client's own zone.
    pub origin: Option<&'a Origin>,
}

/// Chooses an endpoint, avoiding those tried before and those that are ejected or unhealthy. `None` when there is no endpoint that may be
/// chosen, and where the client's own address decides ([`Balancing::Passthrough`]).
pub fn choose(cluster: &Cluster, wish: &Wish<'_>) -> Option<Chosen> {
    if cluster.balancing == Balancing::Passthrough {
        return None;
    }
    let now = Instant::now();
    let by_client = cluster.spread.by_client.as_ref().zip(wish.labels);
    let layout = by_client.map(|(by_client, labels)| by_client.layout(labels, &cluster.endpoints));
    let (levels, hash, zones) = match &layout {
        Some(layout) => (&*layout.levels, layout.hash.as_ref(), layout.zones.as_ref()),
        None => (&*cluster.spread.levels, cluster.hash.as_ref(), cluster.spread.zones.as_ref()),
    };
    let zones = zones.zip(wish.origin);
    let spare_away = spares_away(cluster);
    let left = Left { cluster, levels, hash, zones, tried: wish.tried, spare_away, now };
    let (endpoint, level) = if levels.is_empty() {
        let near = left.in_zone();
        (near.or_else(|| left.among(&Places::all(&cluster.endpoints), 0, wish.hash))?, 0)
    } else {
        left.by_level(wish)?
    };
    Some(Chosen::new(endpoint, level, now))
}

/// The endpoint at this address, which was chosen elsewhere. `None` when the cluster does not have it (any more).
pub fn chosen(cluster: &Cluster, address: SocketAddr) -> Option<Chosen> {
    let found = cluster.endpoints.binary_search_by_key(&address, |endpoint| endpoint.address).ok()?;
    cluster.endpoints.get(found).map(Chosen::alone)
}

/// Who serves in the place of a cluster of which no endpoint may be chosen: the first of its fallbacks that has one; else
/// the cluster itself, which then panics or fails.
pub fn serving(cluster: &Arc<Cluster>) -> &Arc<Cluster> {
    let fallbacks = &cluster.standby.fallbacks;
    if fallbacks.is_empty() || serves(cluster) {
        return cluster;
    }
    fallbacks.iter().find(|fallback| serves(fallback)).unwrap_or(cluster)
}

/// Whether it has an endpoint that is neither ejected nor unhealthy. The first one looked at answers as a rule.
fn serves(cluster: &Cluster) -> bool {
    cluster.endpoints.iter().any(|endpoint| !outlier::is_away(cluster, endpoint))
}

/// Whether anything may keep an endpoint from getting its share.
fn may_be_away(cluster: &Cluster) -> bool {
    cluster.outlier.is_some() || cluster.standby.checks.is_some()
}

/// Whether nothing goes to who is away: there are enough others.
fn spares_away(cluster: &Cluster) -> bool {
    let panics = || cluster.outlier.as_ref().is_some_and(|rule| outlier::panics(cluster, rule));
    may_be_away(cluster) && !panics()
}

/// The endpoints that may still be chosen.
#[derive(Clone, Copy)]
struct Left<'a> {
    cluster: &'a Cluster,
    levels: &'a [Level],
    hash: Option<&'a ConsistentHash>,
    /// The zones of the first level, and where the client's workload is.
    zones: Option<(&'a Zones, &'a Origin)>,
    tried: &'a [SocketAddr],
    /// Whether those that are ejected or unhealthy get nothing.
    spare_away: bool,
    now: Instant,
}

impl<'a> Left<'a> {
    /// Whether it is up to getting anything.
    fn is_available(&self, endpoint: &Endpoint) -> bool {
        !(self.spare_away && outlier::is_away(self.cluster, endpoint))
    }

    fn allows(&self, endpoint: &Endpoint) -> bool {
        self.is_available(endpoint) && !self.tried.contains(&endpoint.address)
    }

    /// One of the zone that the choice falls on, where zones are looked at. Not while there are so few that all of them are used,
    /// and not for who has tried all of it.
    fn in_zone(&self) -> Option<&'a Arc<Endpoint>> {
        let (zones, origin) = self.zones?;
        if may_be_away(self.cluster) && !self.spare_away {
            return None;
        }
        let places = |group| Places::of(&self.cluster.endpoints, group);
        let available = |group: &'a Group| {
            group.available(self.now, || {
                places(group).iter().filter(|endpoint| self.is_available(endpoint)).count()
            })
        };
        let tosses = (fastrand::u64(..levels::WHOLE), fastrand::u64(..levels::WHOLE));
        let group = zones.pick(origin, tosses, available)?;
        let places = places(group);
        let is_left = self.tried.is_empty() || places.iter().any(|endpoint| self.allows(endpoint));
        is_left.then(|| self.among(&places, 0, None)).flatten()
    }

    /// One of these places, which are of this level.
    fn among(mut self, places: &Places<'a>, level: usize, hash: Option<u64>) -> Option<&'a Arc<Endpoint>> {
        if let (Some(table), Some(hash)) = (self.hash, hash) {
            return self.by_hash(table, level, hash);
        }
        if !self.tried.is_empty() && !places.iter().any(|endpoint| self.allows(endpoint)) {
            self.tried = &[];
        }
        match self.cluster.balancing {
            _ if self.hash.is_some() => self.draw(places, None),
            Balancing::LeastRequest => self.better_of_two(places, draw::is_less_busy),
            Balancing::PeakEwma => self.better_of_two(places, draw::is_likely_sooner(self.now)),
            Balancing::Random | Balancing::Passthrough => self.draw(places, None),
            Balancing::RoundRobin => self.in_turn(places),
        }
    }

    /// The best for this hash that is available.
    fn by_hash(&self, table: &ConsistentHash, level: usize, hash: u64) -> Option<&'a Arc<Endpoint>> {
        let mut preferred =
            table.preferred(level, hash).filter_map(|index| self.cluster.endpoints.get(index));
        preferred.find(|endpoint| self.is_available(endpoint))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::state::snapshot::{ClusterState, HashKey, HashTable, hash_of};

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 80))
    }

    pub(super) fn cluster(balancing: Balancing, endpoints: u8) -> Cluster {
        let endpoint = |n| Arc::new(Endpoint::alone(address(n), None));
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
            spread: Arc::default(),
            balancing,
            hash: None,
            outlier: None,
            connect_timeout: Duration::from_secs(10),
            pool: crate::state::snapshot::ConnectionPool::UNLIMITED,
            tls: crate::state::snapshot::Origination::Plaintext,
            limits_connections: false,
            retry_budget: crate::state::defaults::RETRY_BUDGET,
            proxy_protocol: None,
            tunnel: None,
            headless: false,
            standby: crate::state::snapshot::Standby::default(),
            state: Arc::new(ClusterState::default()),
        }
    }

    fn tried(tried: &[SocketAddr]) -> Wish<'_> {
        Wish { tried, ..Wish::default() }
    }

    fn draw(cluster: &Cluster, times: usize) -> BTreeMap<SocketAddr, usize> {
        fastrand::seed(7);
        let mut drawn = BTreeMap::new();
        for _ in 0..times {
            *drawn.entry(choose(cluster, &Wish::default()).unwrap().endpoint.address).or_default() += 1;
        }
        drawn
    }

    const ALL: [Balancing; 4] =
        [Balancing::LeastRequest, Balancing::PeakEwma, Balancing::RoundRobin, Balancing::Random];

    #[test]
    fn nothing_to_choose_from() {
        for balancing in ALL {
            assert!(choose(&cluster(balancing, 0), &Wish::default()).is_none(), "{balancing:?}");
        }
    }

    #[test]
    fn nobody_is_chosen_where_the_client_chooses() {
        let cluster = cluster(Balancing::Passthrough, 3);
        assert!(choose(&cluster, &Wish::default()).is_none());
        // What it has dialled may be an endpoint, and counts as one.
        let chosen = chosen(&cluster, address(2)).unwrap();
        assert_eq!(chosen.endpoint.state.in_flight.load(Ordering::Relaxed), 1);
        assert!(super::chosen(&cluster, address(9)).is_none());
    }

    #[test]
    fn tried_endpoints_come_last() {
        for balancing in ALL {
            let cluster = cluster(balancing, 3);
            for _ in 0..50 {
                let chosen = choose(&cluster, &tried(&[address(1), address(3)])).unwrap();
                assert_eq!(chosen.endpoint.address, address(2), "{balancing:?}");
            }
            assert!(
                choose(&cluster, &tried(&[address(1), address(2), address(3)])).is_some(),
                "{balancing:?}"
            );
        }
    }

    #[test]
    fn in_flight_counts_while_chosen() {
        let cluster = cluster(Balancing::RoundRobin, 1);
        let in_flight = || cluster.endpoints[0].state.in_flight.load(Ordering::Relaxed);
        let (one, two) = (choose(&cluster, &Wish::default()), choose(&cluster, &Wish::default()));
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
        let of =
            |hash| choose(&cluster, &Wish { hash: Some(hash), ..Wish::default() }).unwrap().endpoint.address;
        let keys = || (0..500_u64).map(|key| hash_of(&key.to_be_bytes()));
        let before: Vec<_> = keys().map(of).collect();
        assert_eq!(before, keys().map(of).collect::<Vec<_>>());
        // What was tried before is tried again: that is what a hash is for.
        let again = choose(&cluster, &Wish { hash: keys().next(), ..tried(&before[..1]) }).unwrap();
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
            (0..200).map(|_| choose(&cluster, &Wish::default()).unwrap().endpoint.address).collect()
        };
        assert_eq!(drawn.len(), 3);
    }
}
