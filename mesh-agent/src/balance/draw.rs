//! Draws an endpoint from those of a group: at random by weight, the better of two, or in turn.
//!
//! Promises constant time (logarithmic for turns by weight) as long as a fair part of the group may be chosen: whoever is
//! drawn and may not be chosen is passed over, and only after so many draws are all of them looked at. Tested in `mod.rs` and
//! `distribution.rs`.

use std::sync::{Arc, atomic::Ordering};

use tokio::time::Instant;

use super::Left;
use crate::state::snapshot::{Cluster, Endpoint, Group};

/// How often an endpoint is drawn that may turn out not to be allowed, before all of them are looked at.
const DRAWS: usize = 16;

/// The same, where endpoints get as little as a tenth of their turns by what they say of themselves.
const DRAWS_BY_UTILIZATION: usize = 64;

/// The endpoints that are chosen from.
#[derive(Clone, Copy)]
pub(super) struct Places<'a> {
    endpoints: &'a [Arc<Endpoint>],
    group: Option<&'a Group>,
}

impl<'a> Places<'a> {
    /// All endpoints of a cluster, each as likely as any other.
    pub fn all(endpoints: &'a [Arc<Endpoint>]) -> Self {
        Self { endpoints, group: None }
    }

    /// Those of one group.
    pub fn of(endpoints: &'a [Arc<Endpoint>], group: &'a Group) -> Self {
        Self { endpoints, group: Some(group) }
    }

    fn len(&self) -> usize {
        self.group.map_or(self.endpoints.len(), |group| group.len(self.endpoints.len()))
    }

    fn get(&self, place: usize) -> Option<&'a Arc<Endpoint>> {
        let index = self.group.map_or(Some(place), |group| group.index(place));
        self.endpoints.get(index?)
    }

    pub fn iter(self) -> impl Iterator<Item = &'a Arc<Endpoint>> {
        (0..self.len()).filter_map(move |place| self.get(place))
    }

    /// One at random, by weight. The group is not empty.
    fn random(&self) -> Option<&'a Arc<Endpoint>> {
        let place = match self.group.and_then(|group| group.weights.as_ref()) {
            Some(weights) => weights.draw(fastrand::u64(..)),
            None => fastrand::usize(..self.len()),
        };
        self.get(place)
    }

    /// The one whose turn it is, by weight.
    fn turn(&self, turn: u64) -> Option<&'a Arc<Endpoint>> {
        let place = match self.group.and_then(|group| group.weights.as_ref()) {
            Some(weights) => weights.turn(turn),
            None => turn.checked_rem(self.len() as u64)? as usize,
        };
        self.get(place)
    }
}

/// Whether the one has less in flight than the other, each for its weight.
pub(super) fn is_less_busy(one: &Endpoint, other: &Endpoint) -> bool {
    let busy = |endpoint: &Endpoint, by: &Endpoint| {
        u64::from(endpoint.state.in_flight.load(Ordering::Relaxed)) * u64::from(by.weight)
    };
    busy(one, other) < busy(other, one)
}

/// Whether the one is likely to answer sooner than the other, each for its weight.
pub(super) fn is_likely_sooner(now: Instant) -> impl Fn(&Endpoint, &Endpoint) -> bool {
    let cost = move |endpoint: &Endpoint| {
        let in_flight = endpoint.state.in_flight.load(Ordering::Relaxed);
        endpoint.state.latency.load(now, in_flight) / f64::from(endpoint.weight)
    };
    move |one, other| cost(one) < cost(other)
}

impl<'a> Left<'a> {
    /// Two at random, the better one.
    pub(super) fn better_of_two(
        &self,
        places: &Places<'a>,
        is_better: impl Fn(&Endpoint, &Endpoint) -> bool,
    ) -> Option<&'a Arc<Endpoint>> {
        let first = self.draw(places, None)?;
        let Some(second) = self.draw(places, Some(first)) else { return Some(first) };
        Some(if is_better(second, first) { second } else { first })
    }

    /// One at random, by weight.
    pub(super) fn draw(
        &self,
        places: &Places<'a>,
        except: Option<&Arc<Endpoint>>,
    ) -> Option<&'a Arc<Endpoint>> {
        if places.len() <= usize::from(except.is_some()) {
            return None;
        }
        self.first_of((0..DRAWS).filter_map(|_| places.random()), except)
            .or_else(|| self.few_are_left(places, except))
    }

    /// The next in turn; the turns of those that may not be chosen are passed over.
    pub(super) fn in_turn(&self, places: &Places<'a>) -> Option<&'a Arc<Endpoint>> {
        let next = &self.cluster.state.next;
        let most = if self.cluster.spread.utilization.is_some() { DRAWS_BY_UTILIZATION } else { DRAWS };
        let turns = (0..most).filter_map(|_| places.turn(next.fetch_add(1, Ordering::Relaxed)));
        self.first_of(turns, None).or_else(|| self.few_are_left(places, None))
    }

    /// The first of these that may be chosen. Those that have come lately or are busy are passed over now and then, so that they
    /// get less; where all of these are, the one that was the least likely to be.
    fn first_of(
        &self,
        drawn: impl Iterator<Item = &'a Arc<Endpoint>>,
        except: Option<&Arc<Endpoint>>,
    ) -> Option<&'a Arc<Endpoint>> {
        let mut warmest: Option<(f64, &'a Arc<Endpoint>)> = None;
        for endpoint in drawn.filter(|endpoint| self.allows_beside(endpoint, except)) {
            let Some(factor) = self.factor(endpoint) else { return Some(endpoint) };
            if factor >= 1.0 || fastrand::f64() < factor {
                return Some(endpoint);
            }
            if warmest.is_none_or(|(most, _)| factor > most) {
                warmest = Some((factor, endpoint));
            }
        }
        warmest.map(|(_, endpoint)| endpoint)
    }

    /// How much of its turns an endpoint is to get; `None`: all of them, as everybody.
    fn factor(&self, endpoint: &Endpoint) -> Option<f64> {
        let Cluster { spread, endpoints, state, .. } = self.cluster;
        let warmth = spread.warmup.map(|warmup| warmup.factor(endpoint.state.came, self.now));
        let Some(rule) = &spread.utilization else { return warmth };
        let scale = state.scale.get_or_init(Box::default);
        // Who cannot be drawn is nobody's measure.
        let all = endpoints.iter().map(|one| &**one).filter(|one| self.is_available(one));
        Some(warmth.unwrap_or(1.0) * scale.factor(rule, self.now, endpoint, all))
    }

    fn allows_beside(&self, endpoint: &Arc<Endpoint>, except: Option<&Arc<Endpoint>>) -> bool {
        self.allows(endpoint) && except.is_none_or(|except| !Arc::ptr_eq(except, endpoint))
    }

    /// One of the few that are left, if any, by weight.
    fn few_are_left(&self, places: &Places<'a>, except: Option<&Arc<Endpoint>>) -> Option<&'a Arc<Endpoint>> {
        let left = || places.iter().filter(|endpoint| self.allows_beside(endpoint, except));
        let sum: u64 = left().map(|endpoint| u64::from(endpoint.weight)).sum();
        if sum == 0 {
            return None;
        }
        let mut at = fastrand::u64(..sum);
        left().find(|endpoint| {
            let weight = u64::from(endpoint.weight);
            let found = at < weight;
            at = at.saturating_sub(weight);
            found
        })
    }
}
