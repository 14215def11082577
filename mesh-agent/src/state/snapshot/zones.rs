//! Zone-aware routing (`zoneAwareLbSetting`): as much as possible stays in the client's zone, and each endpoint gets as much as
//! any other all the same. Envoy's algorithm.
//!
//! What stays follows from how the pods of the client's workload are spread over the zones, and how the endpoints are. Promises
//! that choosing a zone costs as much as there are zones, whatever the number of endpoints and clients, and never allocates.
//! Tested below, with shares of whole meshes in `balance/distribution.rs`, and through `compile/`.

use std::sync::Arc;

use super::{Endpoint, Group, Level, Locality};

/// The whole of what is shared out.
const WHOLE: u64 = 10_000;

/// A zone, without what is within it.
pub fn zone(place: &Locality) -> Locality {
    Locality { subzone: Arc::default(), ..place.clone() }
}

/// How the pods of a workload are spread over zones: those from which the same requests come.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Origin {
    /// Ready pods by zone.
    zones: Vec<(Locality, u32)>,
}

impl Origin {
    /// One more pod, at this place.
    pub fn add(&mut self, place: &Locality) {
        match self.zones.iter_mut().find(|(known, _)| is_same(known, place)) {
            Some((_, count)) => *count += 1,
            None => self.zones.push((zone(place), 1)),
        }
    }

    /// Where they are, in a fixed order, for tests.
    #[cfg(test)]
    pub fn sorted(&self) -> String {
        let mut zones: Vec<String> =
            self.zones.iter().map(|(zone, count)| format!("{zone}: {count}")).collect();
        zones.sort();
        zones.join(", ")
    }

    /// Of all its pods, how many are in this zone, in parts of ten thousand.
    fn part(&self, place: &Locality) -> u64 {
        let all: u64 = self.zones.iter().map(|(_, count)| u64::from(*count)).sum();
        let there = self.zones.iter().find(|(known, _)| is_same(known, place));
        (WHOLE * there.map_or(0, |(_, count)| u64::from(*count))).checked_div(all).unwrap_or(0)
    }
}

fn is_same(zone: &Locality, place: &Locality) -> bool {
    zone.region == place.region && zone.zone == place.zone
}

/// Which zone is the client's, and from how many endpoints on it is preferred.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ZoneRule {
    /// Where the clients of this node are.
    pub own: Locality,
    /// `minClusterSize`: with fewer endpoints in the first level, all of them are used alike.
    pub least: u32,
}

/// The zones of the endpoints of a level.
#[derive(Debug)]
pub struct Zones {
    /// The clients' own comes first.
    zones: Box<[(Locality, Group)]>,
    least: u32,
}

impl Zones {
    /// Of the first of these levels; `None` where the clients' zone has no endpoint in it, or is the only one.
    pub fn of_first(rule: &ZoneRule, levels: &[Level], endpoints: &[Arc<Endpoint>]) -> Option<Self> {
        let first: Vec<u32> = match levels.first() {
            None => (0..).zip(endpoints).map(|(index, _)| index).collect(),
            Some(level) => level.members(endpoints.len()),
        };
        let mut zones: Vec<(Locality, Vec<u32>)> = vec![(zone(&rule.own), Vec::new())];
        for index in first {
            let place = &endpoints.get(index as usize)?.locality;
            match zones.iter_mut().find(|(known, _)| is_same(known, place)) {
                Some((_, members)) => members.push(index),
                None => zones.push((zone(place), vec![index])),
            }
        }
        if zones.len() < 2 || zones.first()?.1.is_empty() {
            return None;
        }
        let weights = |members: &[u32]| -> Vec<u32> {
            members.iter().map(|index| endpoints.get(*index as usize).map_or(1, |one| one.weight)).collect()
        };
        let group = |(zone, members): (Locality, Vec<u32>)| {
            let weights = weights(&members);
            (zone, Group::new(1, Some(members.into()), &weights))
        };
        Some(Self { zones: zones.into_iter().map(group).collect(), least: rule.least })
    }

    /// The zone for a request of this origin, by a toss below ten thousand for whether it stays, and another for where else it
    /// goes; `None`: any endpoint of the level does. `available`: how many of a group's endpoints may be chosen.
    pub fn pick<'z>(
        &'z self,
        origin: &Origin,
        (stays, elsewhere): (u64, u64),
        available: impl Fn(&'z Group) -> usize,
    ) -> Option<&'z Group> {
        let count = |group: &'z Group| available(group) as u64;
        let all: u64 = self.zones.iter().map(|(_, group)| count(group)).sum();
        let ((own, near), others) = self.zones.split_first()?;
        if all == 0 || all < u64::from(self.least) || others.iter().all(|(_, group)| count(group) == 0) {
            return None;
        }
        let part = |group| WHOLE * count(group) / all;
        let (there, here) = (part(near), origin.part(own));
        // Nobody of the workload is known to be here, or nobody to ask is: nothing to go by.
        if there == 0 || here == 0 {
            return None;
        }
        if there >= here || stays < WHOLE * there / here {
            return Some(near);
        }
        // What a zone is good for beyond what its own clients leave there.
        let room = |(zone, group): &'z (Locality, Group)| part(group).saturating_sub(origin.part(zone));
        let whole: u64 = others.iter().map(room).sum();
        if whole == 0 {
            return None;
        }
        let mut at = elsewhere * whole / WHOLE;
        let found = others.iter().find(|zone| {
            let room = room(zone);
            let found = at < room;
            at = at.saturating_sub(room);
            found
        });
        found.map(|(_, group)| group)
    }

    /// Each zone with its endpoints; the clients' own first.
    pub fn iter(&self) -> impl Iterator<Item = &(Locality, Group)> {
        self.zones.iter()
    }

    /// The endpoints' availability has changed.
    pub(super) fn changed(&self) {
        self.zones.iter().for_each(|(_, group)| group.changed());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// So many endpoints in each of the zones `r/0`, `r/1`, …, of which the first is the clients'.
    fn zones(counts: &[usize], least: u32) -> Option<Zones> {
        let place = |zone: usize| Locality::parse(&format!("r/{zone}/s{zone}"));
        let places = counts.iter().enumerate().flat_map(|(zone, count)| vec![place(zone); *count]);
        let endpoint = |(n, locality): (usize, Locality)| {
            let address = ([10, 0, 0, n as u8], 80).into();
            Arc::new(Endpoint { locality, ..Endpoint::alone(address, None) })
        };
        let endpoints: Vec<_> = places.enumerate().map(endpoint).collect();
        Zones::of_first(&ZoneRule { own: place(0), least }, &[], &endpoints)
    }

    fn origin(counts: &[usize]) -> Origin {
        let mut origin = Origin::default();
        for (zone, count) in counts.iter().enumerate() {
            for pod in 0..*count {
                origin.add(&Locality::parse(&format!("r/{zone}/pod{pod}")));
            }
        }
        origin
    }

    /// Of a hundred requests, how many go to each zone; `None`: to any endpoint.
    fn spread(endpoints: &[usize], clients: &[usize], least: u32) -> Option<Vec<usize>> {
        let zones = zones(endpoints, least)?;
        let mut to = vec![0; endpoints.len()];
        for toss in 0..100 {
            let tosses = (toss * 100, (toss * 37 % 100) * 100);
            let group = zones.pick(&origin(clients), tosses, |group| group.len(0))?;
            let index = zones.iter().position(|(_, one)| std::ptr::eq(one, group))?;
            to[index] += 1;
        }
        Some(to)
    }

    #[test]
    fn what_stays_follows_from_clients_and_endpoints() {
        /// Clients and endpoints by zone, and what a client of the first zone sends where.
        type Row<'t> = (&'t [usize], &'t [usize], Option<Vec<usize>>);
        let some = |shares: &[usize]| Some(shares.to_vec());
        let table: [Row<'_>; 9] = [
            // As many of both everywhere, or more endpoints here than clients: all stays.
            (&[3, 3], &[2, 2], some(&[100, 0])),
            (&[6, 2], &[1, 1], some(&[100, 0])),
            // All clients are here, half of the endpoints: half stays.
            (&[3, 3], &[4], some(&[50, 50])),
            // Half of the clients are here, and a quarter of the endpoints.
            (&[1, 3], &[2, 2], some(&[50, 50])),
            // What goes elsewhere goes where there is room: the second zone has none.
            (&[2, 2, 4], &[4, 2, 2], some(&[50, 0, 50])),
            // Nothing to go by: only one zone, nobody here to ask, no client known here.
            (&[6], &[1], None),
            (&[0, 6], &[1], None),
            (&[3, 3], &[0, 5], None),
            (&[3, 3], &[], None),
        ];
        for (endpoints, clients, expected) in table {
            assert_eq!(
                spread(endpoints, clients, 6.min(endpoints.iter().sum::<usize>() as u32)),
                expected,
                "{endpoints:?} {clients:?}"
            );
        }
        assert_eq!(spread(&[3, 3], &[1, 1], 7), None, "too few endpoints");
    }

    #[test]
    fn only_what_is_available_counts() {
        let zones = zones(&[4, 4], 4);
        let picked = |available: [usize; 2]| {
            let zones = zones.as_ref()?;
            let first = &zones.iter().next()?.1;
            let count = |group: &Group| if std::ptr::eq(group, first) { available[0] } else { available[1] };
            // The toss at which a request just stays, or does not.
            let stays = |toss| Some(std::ptr::eq(zones.pick(&origin(&[1, 1]), (toss, 0), count)?, first));
            Some((stays(4_999)?, stays(5_000)?))
        };
        assert_eq!(picked([4, 4]), Some((true, true)));
        // A quarter of what is left is here, and half of the clients.
        assert_eq!(picked([1, 3]), Some((true, false)));
        assert_eq!(picked([0, 4]), None);
        assert_eq!(picked([4, 0]), None);
        assert_eq!(picked([1, 2]), None, "too few are left");
    }
}
