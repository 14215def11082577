//! Chooses an endpoint of a cluster and counts what is in flight there.
//!
//! Never takes a lock and never allocates; never chooses an endpoint already tried while another is left. Tested by
//! the unit tests below, with seeded random numbers.

use std::{
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
};

use crate::state::snapshot::{Balancing, Cluster, Endpoint};

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

/// Chooses an endpoint, avoiding those tried before when others are left. `None` when there is no endpoint.
pub fn choose(cluster: &Cluster, tried: &[SocketAddr]) -> Option<Chosen> {
    let endpoints = cluster.endpoints.as_slice();
    let all_tried = endpoints.iter().all(|endpoint| tried.contains(&endpoint.address));
    let left = Left { endpoints, tried: if all_tried { &[] } else { tried } };
    let count = left.count();
    if count == 0 {
        return None;
    }
    let endpoint = match cluster.balancing {
        Balancing::LeastRequest => least_request(&left, count),
        Balancing::Random => left.nth(fastrand::usize(..count)),
        Balancing::RoundRobin => {
            let turn = cluster.state.next.fetch_add(1, Ordering::Relaxed);
            left.from((turn % endpoints.len() as u64) as usize)
        }
    }?;
    Some(Chosen::new(endpoint))
}

/// The endpoint at this address, which was chosen elsewhere. `None` when the cluster does not have it (any more).
pub fn chosen(cluster: &Cluster, address: SocketAddr) -> Option<Chosen> {
    cluster.endpoints.iter().find(|endpoint| endpoint.address == address).map(Chosen::new)
}

/// Two at random, the one with fewer requests in flight.
fn least_request<'a>(left: &Left<'a>, count: usize) -> Option<&'a Arc<Endpoint>> {
    let first = fastrand::usize(..count);
    if count == 1 {
        return left.nth(first);
    }
    // Any but the first: shifted past it, so that both draws are fair.
    let second = fastrand::usize(..count - 1);
    let second = if second >= first { second + 1 } else { second };
    let (first, second) = (left.nth(first)?, left.nth(second)?);
    let in_flight = |endpoint: &Endpoint| endpoint.state.in_flight.load(Ordering::Relaxed);
    Some(if in_flight(second) < in_flight(first) { second } else { first })
}

/// The endpoints that may still be chosen.
struct Left<'a> {
    endpoints: &'a [Arc<Endpoint>],
    tried: &'a [SocketAddr],
}

impl<'a> Left<'a> {
    fn allows(&self, endpoint: &Endpoint) -> bool {
        !self.tried.contains(&endpoint.address)
    }

    fn count(&self) -> usize {
        if self.tried.is_empty() {
            return self.endpoints.len();
        }
        self.endpoints.iter().filter(|endpoint| self.allows(endpoint)).count()
    }

    /// The n-th of those left.
    fn nth(&self, n: usize) -> Option<&'a Arc<Endpoint>> {
        if self.tried.is_empty() {
            return self.endpoints.get(n);
        }
        self.endpoints.iter().filter(|endpoint| self.allows(endpoint)).nth(n)
    }

    /// The first of those left at or after this place, going round.
    fn from(&self, place: usize) -> Option<&'a Arc<Endpoint>> {
        let (before, after) = self.endpoints.split_at_checked(place)?;
        after.iter().chain(before).find(|endpoint| self.allows(endpoint))
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::{collections::BTreeMap, time::Duration};

    use super::*;
    use crate::state::snapshot::{ClusterState, EndpointState};

    fn address(n: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, n], 80))
    }

    fn cluster(balancing: Balancing, endpoints: u8) -> Cluster {
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
            *drawn.entry(choose(cluster, &[]).unwrap().endpoint.address).or_default() += 1;
        }
        drawn
    }

    const ALL: [Balancing; 3] = [Balancing::LeastRequest, Balancing::RoundRobin, Balancing::Random];

    #[test]
    fn nothing_to_choose_from() {
        for balancing in ALL {
            assert!(choose(&cluster(balancing, 0), &[]).is_none(), "{balancing:?}");
        }
    }

    #[test]
    fn tried_endpoints_come_last() {
        for balancing in ALL {
            let cluster = cluster(balancing, 3);
            for _ in 0..50 {
                let chosen = choose(&cluster, &[address(1), address(3)]).unwrap();
                assert_eq!(chosen.endpoint.address, address(2), "{balancing:?}");
            }
            assert!(choose(&cluster, &[address(1), address(2), address(3)]).is_some(), "{balancing:?}");
        }
    }

    #[test]
    fn in_flight_counts_while_chosen() {
        let cluster = cluster(Balancing::RoundRobin, 1);
        let in_flight = || cluster.endpoints[0].state.in_flight.load(Ordering::Relaxed);
        let (one, two) = (choose(&cluster, &[]), choose(&cluster, &[]));
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
}
