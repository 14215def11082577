//! Which level of a cluster a choice falls on, and which group of it: Envoy's priority levels and locality weights.
//!
//! A level gets everything for as long as enough of it is available (five of seven, by Envoy's overprovisioning factor of
//! 1.4); then the next one gets what is missing. Tested in `distribution.rs`, with Envoy's own table, and through `compile/`.

use std::sync::Arc;

use super::{Left, Wish, draw::Places};
use crate::state::snapshot::{Endpoint, Group, Level, MOST_LEVELS};

/// By how much more than the available part of a level it may take (Envoy's `overprovisioning_factor`, in percent).
const OVERPROVISIONING: u64 = 140;

/// The whole of what is shared out.
pub(super) const WHOLE: u64 = 10_000;

/// The levels that earlier tries of a request went to.
///
/// As Envoy's `previous_priorities` with Istio's update frequency of 2: two tries go where they would go anyhow, and from
/// then on the levels that were tried are avoided for as long as there are others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Visited {
    seen: u16,
    avoided: u16,
    tries: u32,
}

impl Visited {
    /// A try of this choice.
    pub fn note(&mut self, chosen: &super::Chosen) {
        self.seen |= 1 << chosen.level.min(MOST_LEVELS - 1);
        self.tries += 1;
        if self.tries.is_multiple_of(2) {
            self.avoided = self.seen;
        }
    }

    fn avoids(self, level: usize) -> bool {
        self.avoided & (1 << level.min(MOST_LEVELS - 1)) != 0
    }
}

/// What part of everything each level is good for.
struct Healths {
    each: [u64; MOST_LEVELS],
    sum: u64,
}

impl<'a> Left<'a> {
    /// Chooses from the level on which the choice falls, and from the others only where that has nobody left.
    pub(super) fn by_level(mut self, wish: &Wish<'_>) -> Option<(&'a Arc<Endpoint>, usize)> {
        let levels = self.levels;
        // Each level panics by itself.
        self.spare_away = super::may_be_away(self.cluster);
        let healths = self.healths();
        // The same for the same key, so that it stays with its endpoint.
        let toss = wish.hash.map_or_else(|| fastrand::u64(..WHOLE), |hash| hash % WHOLE);
        let first = pick_level(&healths, wish, toss);
        let others = (0..levels.len()).filter(|level| *level != first);
        std::iter::once(first).chain(others).find_map(|index| {
            let level = levels.get(index)?;
            let mut left = self;
            left.spare_away = self.spare_away && !self.panics_at(level, &healths);
            Some((left.in_level(level, index, wish.hash)?, index))
        })
    }

    fn healths(&self) -> Healths {
        let mut healths = Healths { each: [0; MOST_LEVELS], sum: 0 };
        for (health, level) in healths.each.iter_mut().zip(self.levels) {
            let (available, all) = self.availability(level);
            *health = (WHOLE * OVERPROVISIONING / 100 * available).checked_div(all).unwrap_or(0).min(WHOLE);
            healths.sum += *health;
        }
        healths
    }

    fn availability(&self, level: &Level) -> (u64, u64) {
        let available: usize = level.groups.iter().map(|group| self.available(group)).sum();
        (available as u64, level.len(self.cluster.endpoints.len()) as u64)
    }

    fn available(&self, group: &'a Group) -> usize {
        let places = Places::of(&self.cluster.endpoints, group);
        group.available(self.now, || places.iter().filter(|endpoint| self.is_available(endpoint)).count())
    }

    /// Whether all of a level are used, available or not: only where all levels together do not make up for it.
    fn panics_at(&self, level: &Level, healths: &Healths) -> bool {
        let Some(rule) = &self.cluster.outlier else { return false };
        if healths.sum >= WHOLE {
            return false;
        }
        let (available, all) = self.availability(level);
        available * 100 < u64::from(rule.min_health_percent) * all
    }

    /// One of a level: of the group that the choice falls on, by its share and by how much of it is available.
    fn in_level(self, level: &'a Level, index: usize, hash: Option<u64>) -> Option<&'a Arc<Endpoint>> {
        if index == 0
            && let Some(near) = self.in_zone()
        {
            return Some(near);
        }
        let all = &self.cluster.endpoints;
        let places = |group| Places::of(all, group);
        let group = match &*level.groups {
            [only] => only,
            [first, ..] if hash.is_some() && self.hash.is_some() => first,
            several => {
                let share = |group: &'a Group| {
                    let count = group.len(all.len()) as u64;
                    let available = self.available(group) as u64;
                    let part = (WHOLE * OVERPROVISIONING / 100 * available).checked_div(count).unwrap_or(0);
                    u64::from(group.share) * part.min(WHOLE)
                };
                let sum: u64 = several.iter().map(share).sum();
                let mut at = if sum == 0 { 0 } else { fastrand::u64(..sum) };
                let found = several.iter().find(|group| {
                    let share = share(group);
                    let found = at < share;
                    at = at.saturating_sub(share);
                    found
                });
                found.or(several.first())?
            }
        };
        let chosen = self.among(&places(group), index, hash);
        // Only where its number of available endpoints was out of date.
        chosen.or_else(|| level.groups.iter().find_map(|group| self.among(&places(group), index, hash)))
    }
}

/// The level on which this toss falls: each takes what it is good for of what those before it have left, and together they
/// take all.
fn pick_level(healths: &Healths, wish: &Wish<'_>, toss: u64) -> usize {
    let good = |(level, health): (usize, &u64)| if wish.visited.avoids(level) { 0 } else { *health };
    let spared: u64 = healths.each.iter().enumerate().map(good).sum();
    let avoid = spared > 0;
    let sum = if avoid { spared } else { healths.sum };
    let mut at = toss * sum.min(WHOLE) / WHOLE;
    let found = healths.each.iter().enumerate().position(|(level, health)| {
        let health = if avoid { good((level, health)) } else { *health };
        let found = at < health;
        at = at.saturating_sub(health);
        found
    });
    found.unwrap_or(0)
}
