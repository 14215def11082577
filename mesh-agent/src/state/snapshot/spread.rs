//! In which order of preference, and in which shares, the endpoints of a cluster are chosen: levels (Envoy's priorities),
//! groups within a level (its localities with weights), and the weights of endpoints within a group.
//!
//! Most clusters have one level with all endpoints in it, each as good as any other, and no table at all. Choosing is
//! `balance/`'s. Tested through `compile/` and `balance/`.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::time::Instant;

use super::{ByClient, Endpoint, Placed, UtilizationRule, Weights, Zones};

/// The most levels of a cluster; what would be beyond is in the last one.
pub const MOST_LEVELS: usize = 16;

/// For how long the number of available endpoints of a group is believed, where nothing has told of a change.
const BELIEVED: Duration = Duration::from_millis(100);

/// The most that a share of a table of hashes is divided into.
const PARTS: u64 = 1_000;

/// How the endpoints of a cluster are spread.
#[derive(Debug, Default)]
pub struct Spread {
    /// The best first. None: all endpoints are one level, each as good as any other.
    pub levels: Box<[Level]>,
    /// For clients whose own labels matter, in the place of these levels, which are for who has none of those labels.
    pub by_client: Option<ByClient>,
    /// The zones of the first level, where a client's own is preferred (`zoneAwareLbSetting`).
    pub zones: Option<Zones>,
    /// Endpoints that have come lately get less (`loadBalancer.warmup`).
    pub warmup: Option<Warmup>,
    /// Endpoints that say they are busy get less (`loadBalancer.backendUtilization`).
    pub utilization: Option<Arc<UtilizationRule>>,
    /// Endpoints that have left, and had requests or connections in flight or were ejected at that time: they get nothing, and
    /// are known again should they come back.
    pub leaving: Vec<Arc<Endpoint>>,
}

impl Spread {
    /// The endpoints' availability has changed.
    pub fn changed(&self) {
        self.levels.iter().for_each(Level::changed);
        self.zones.iter().for_each(Zones::changed);
        if let Some(by_client) = &self.by_client {
            by_client.changed();
        }
    }

    /// The level that holds the endpoint with this index, if one does.
    pub fn level_of(&self, index: usize) -> Option<usize> {
        level_of(&self.levels, index)
    }

    /// Whether all endpoints are the same to everybody.
    pub fn is_even(&self) -> bool {
        self.levels.is_empty() && self.by_client.is_none() && self.zones.is_none()
    }

    /// Whether a choice depends on where the pods of the client's workload are.
    pub fn asks_for_origin(&self) -> bool {
        self.zones.is_some() || self.by_client.as_ref().is_some_and(ByClient::asks_for_origin)
    }
}

pub(super) fn level_of(levels: &[Level], index: usize) -> Option<usize> {
    if levels.is_empty() {
        return Some(0);
    }
    levels.iter().position(|level| level.groups.iter().any(|group| group.holds(index)))
}

/// Endpoints that are chosen from before all others, as long as enough of them are available.
#[derive(Debug)]
pub struct Level {
    /// What it is made of; at least one.
    pub groups: Box<[Group]>,
}

impl Level {
    /// The levels of endpoints that are so good (0 is the best) and have these weights; none where all are one level, each as
    /// good as any other.
    pub fn by_rank(ranks: &[usize], weights: &[u32]) -> Box<[Self]> {
        let mut by_rank: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
        for (index, rank) in (0..).zip(ranks) {
            by_rank.entry(*rank).or_default().push(index);
        }
        let of = |members: &[u32]| -> Vec<u32> {
            members.iter().map(|index| weights.get(*index as usize).copied().unwrap_or(1)).collect()
        };
        let mut levels: Vec<Vec<u32>> = by_rank.into_values().collect();
        if let [only] = &levels[..] {
            let group = Group::new(1, None, &of(only));
            let even = group.weights.is_none();
            return if even { Box::default() } else { [Self { groups: [group].into() }].into() };
        }
        if levels.len() > MOST_LEVELS {
            let mut last = levels.split_off(MOST_LEVELS - 1).concat();
            last.sort_unstable();
            levels.push(last);
        }
        let level = |members: Vec<u32>| {
            let weights = of(&members);
            Self { groups: [Group::new(1, Some(members.into()), &weights)].into() }
        };
        levels.into_iter().map(level).collect()
    }

    /// How many endpoints it has.
    pub fn len(&self, all: usize) -> usize {
        self.groups.iter().map(|group| group.len(all)).sum()
    }

    /// The indices of its endpoints, of so many of the cluster, in order.
    pub(super) fn members(&self, all: usize) -> Vec<u32> {
        let places =
            |group: &Group| (0..group.len(all)).filter_map(|place| group.index(place)).collect::<Vec<_>>();
        let mut members: Vec<u32> = self.groups.iter().flat_map(places).map(|index| index as u32).collect();
        members.sort_unstable();
        members
    }

    /// Its endpoints, with the shares of their groups in their weights.
    pub(super) fn placed(&self, endpoints: &[Arc<Endpoint>]) -> Vec<Placed> {
        let mut all = Vec::with_capacity(self.len(endpoints.len()));
        for group in &self.groups {
            let indices = (0..group.len(endpoints.len())).filter_map(|place| group.index(place));
            let members: Vec<(usize, &Arc<Endpoint>)> =
                indices.filter_map(|index| Some((index, endpoints.get(index)?))).collect();
            let sum: u64 = members.iter().map(|(_, endpoint)| u64::from(endpoint.weight)).sum();
            all.extend(members.into_iter().map(|(index, endpoint)| {
                let weight = if self.groups.len() == 1 {
                    endpoint.weight
                } else {
                    let share = u64::from(group.share) * PARTS * u64::from(endpoint.weight);
                    share.div_ceil(sum.max(1)) as u32
                };
                Placed { index: index as u32, address: endpoint.address, weight }
            }));
        }
        all
    }

    /// The endpoints' availability has changed.
    pub(super) fn changed(&self) {
        self.groups.iter().for_each(Group::changed);
    }
}

/// Endpoints that have a share of their level.
#[derive(Debug)]
pub struct Group {
    /// Its share, among those of the others.
    pub share: u32,
    /// Indices into the cluster's endpoints, in order; `None`: all of them.
    pub members: Option<Box<[u32]>>,
    /// Where the weights of its endpoints differ.
    pub weights: Option<Weights>,
    made: Instant,
    /// Nanoseconds since `made`: until when `available` is believed.
    due: AtomicU64,
    available: AtomicU32,
}

impl Group {
    /// Of these endpoints, with a weight for each.
    pub fn new(share: u32, members: Option<Box<[u32]>>, weights: &[u32]) -> Self {
        let (weights, made) = (Weights::new(weights), Instant::now());
        Self { share, members, weights, made, due: AtomicU64::new(0), available: AtomicU32::new(0) }
    }

    /// The availability of its endpoints has changed.
    pub(super) fn changed(&self) {
        self.due.store(0, Relaxed);
    }

    /// How many endpoints it has, of so many of the cluster.
    pub fn len(&self, all: usize) -> usize {
        self.members.as_ref().map_or(all, |members| members.len())
    }

    /// The index among the cluster's endpoints of the one at this place.
    pub fn index(&self, place: usize) -> Option<usize> {
        match &self.members {
            None => Some(place),
            Some(members) => members.get(place).map(|index| *index as usize),
        }
    }

    fn holds(&self, index: usize) -> bool {
        self.members.as_ref().is_none_or(|members| members.binary_search(&(index as u32)).is_ok())
    }

    /// How many of its endpoints are available; counted anew once in a while, and after each change that is told.
    pub fn available(&self, now: Instant, count: impl FnOnce() -> usize) -> usize {
        let at = now.saturating_duration_since(self.made).as_nanos() as u64;
        let due = self.due.load(Relaxed);
        if at < due {
            return self.available.load(Relaxed) as usize;
        }
        // Whoever finds it due counts, others believe the old number meanwhile; a change that is told during the count has it
        // counted once more. From a nanosecond on, for 0 is what a change sets.
        let next = (at + BELIEVED.as_nanos() as u64).max(1);
        let mine = self.due.compare_exchange(due, next, Relaxed, Relaxed).is_ok();
        if !mine && due != 0 {
            return self.available.load(Relaxed) as usize;
        }
        let available = count();
        self.available.store(available as u32, Relaxed);
        available
    }
}

/// `loadBalancer.warmup`: what an endpoint gets that has come lately, as Envoy's slow start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Warmup {
    /// `duration`: for how long.
    pub duration: Duration,
    /// `minimumPercent`: of its share at first, 0 to 100.
    pub minimum_percent: f64,
    /// `aggression`: 1 is a straight line, more is more at first.
    pub aggression: f64,
}

impl Warmup {
    /// What part of its share an endpoint gets that came at this time.
    pub fn factor(&self, came: Instant, now: Instant) -> f64 {
        let age = now.saturating_duration_since(came);
        if age >= self.duration {
            return 1.0;
        }
        let part = age.as_secs_f64() / self.duration.as_secs_f64();
        part.powf(1.0 / self.aggression).max(self.minimum_percent / 100.0).min(1.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_available_is_counted_when_it_changes_and_once_in_a_while() {
        let spread = Spread {
            levels: [Level { groups: [Group::new(1, None, &[])].into() }].into(),
            ..Spread::default()
        };
        let group = &spread.levels[0].groups[0];
        let counted = |number| group.available(Instant::now(), || number);
        assert_eq!(counted(7), 7);
        assert_eq!(counted(6), 7, "believed");
        spread.changed();
        assert_eq!(counted(5), 5, "told");
        tokio::time::advance(BELIEVED).await;
        assert_eq!(counted(4), 4, "too old");
    }

    #[tokio::test(start_paused = true)]
    async fn a_share_grows_from_its_minimum_to_the_whole() {
        let line = Warmup { duration: Duration::from_secs(100), minimum_percent: 10.0, aggression: 1.0 };
        let steep = Warmup { aggression: 2.0, minimum_percent: 0.0, ..line };
        let came = Instant::now();
        for (seconds, on_line, on_steep) in [
            (0, 0.1, 0.0),
            (5, 0.1, 0.2236),
            (25, 0.25, 0.5),
            (64, 0.64, 0.8),
            (100, 1.0, 1.0),
            (500, 1.0, 1.0),
        ] {
            let now = came + Duration::from_secs(seconds);
            assert!((line.factor(came, now) - on_line).abs() < 1e-3, "{seconds}");
            assert!((steep.factor(came, now) - on_steep).abs() < 1e-3, "{seconds}");
        }
    }
}
