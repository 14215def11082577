//! In which levels and groups the endpoints of a cluster are chosen: `localityLbSetting` of the `DestinationRule`, else what the
//! Service asks for (`trafficDistribution`, hints), else the mesh-wide setting.
//!
//! As in Istio, one place stands in for another only where `outlierDetection` says when it has to. Tested in
//! `tests/locality.rs`.

use std::{collections::BTreeMap, sync::Arc};

use super::{destination_rules::Policy, endpoints::Candidate, locality::Localities};
use crate::state::{
    resource::{load_balancer::Choice, locality::LocalitySetting},
    snapshot::{Balancing, ConsistentHash, Endpoint, Group, Level, Locality, MOST_LEVELS, Placed, Spread},
};

/// What a Service asks for (`trafficDistribution`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Nearby {
    /// `PreferClose`, `PreferSameZone`.
    Zone,
    /// `PreferSameNode`.
    Node,
}

/// How the endpoints of a cluster are laid out.
pub(super) struct Layout<'a, 'p> {
    /// Where everything is.
    pub localities: &'p Localities<'a>,
    /// `localityLbSetting` of the mesh-wide settings.
    pub mesh: Option<&'p Arc<LocalitySetting>>,
    /// What the Service asks for.
    pub nearby: Option<Nearby>,
}

/// The most that a share of a table of hashes is divided into.
const PARTS: u64 = 1_000;

impl Layout<'_, '_> {
    /// The levels of these endpoints; none where all are one, and each as good as any other.
    pub fn levels(&self, policy: &Policy, endpoints: &[&Candidate<'_>]) -> Box<[Level]> {
        let own = policy.balancer.locality.as_ref();
        if let Some(shares) = self.shares(own) {
            return [Level { groups: by_share(shares, endpoints) }].into();
        }
        let mut by_rank: BTreeMap<usize, Vec<u32>> = BTreeMap::new();
        let ranks = self.ranks(own, policy.outlier.is_some(), endpoints);
        for (index, rank) in (0..).zip(ranks.unwrap_or_else(|| vec![0; endpoints.len()])) {
            by_rank.entry(rank).or_default().push(index);
        }
        let weights = |members: &[u32]| -> Vec<u32> {
            members.iter().map(|index| endpoints[*index as usize].weight).collect()
        };
        let mut levels: Vec<Vec<u32>> = by_rank.into_values().collect();
        if let [only] = &levels[..] {
            let group = Group::new(1, None, &weights(only));
            let even = group.weights.is_none();
            return if even { Box::default() } else { [Level { groups: [group].into() }].into() };
        }
        if levels.len() > MOST_LEVELS {
            let mut last = levels.split_off(MOST_LEVELS - 1).concat();
            last.sort_unstable();
            levels.push(last);
        }
        let level = |members: Vec<u32>| {
            let weights = weights(&members);
            Level { groups: [Group::new(1, Some(members.into()), &weights)].into() }
        };
        levels.into_iter().map(level).collect()
    }

    /// `distribute`, where it has something to say to clients of this node.
    fn shares<'s>(&'s self, own: Option<&'s Arc<LocalitySetting>>) -> Option<&'s [(Locality, u32)]> {
        let setting = own.or(self.mesh.filter(|_| self.nearby.is_none()))?;
        let here = &self.localities.own;
        let mut meant = setting.distribute.iter().filter(|(from, _)| here.is_meant_by(from));
        meant.next().filter(|_| !setting.disabled).map(|(_, to)| &to[..])
    }

    /// How good each endpoint is, 0 being the best; `None` where all are the same.
    fn ranks(
        &self,
        own: Option<&Arc<LocalitySetting>>,
        outliers: bool,
        endpoints: &[&Candidate<'_>],
    ) -> Option<Vec<usize>> {
        let each = |rank: &dyn Fn(&Candidate<'_>) -> usize| endpoints.iter().map(|one| rank(one)).collect();
        if let Some(setting) = own {
            return outliers.then(|| each(&|one| self.by_setting(setting, one)));
        }
        if let Some(nearby) = self.nearby {
            return (!self.localities.own.is_unknown()).then(|| {
                each(&|one| {
                    let here = nearby == Nearby::Node && self.localities.is_here(one.node);
                    if here { 0 } else { 1 + self.localities.own.distance(&one.locality) }
                })
            });
        }
        // As kube-proxy has it: all endpoints have hints, and some are meant for here, or none counts.
        let hints: Option<Vec<usize>> = endpoints.iter().map(|one| one.hint.map(usize::from)).collect();
        if let Some(hints) = hints.filter(|hints| hints.iter().any(|hint| *hint < 2)) {
            return Some(hints);
        }
        let by_default = Arc::default();
        let setting = self.mesh.unwrap_or(&by_default);
        outliers.then(|| each(&|one| self.by_setting(setting, one)))
    }

    /// Istio's priorities: by the labels in common with this node, then by how far the place is.
    fn by_setting(&self, setting: &LocalitySetting, one: &Candidate<'_>) -> usize {
        let own = &self.localities.own;
        // Shares that are not for clients of here are no failover either.
        if setting.disabled || !setting.distribute.is_empty() {
            return 0;
        }
        let in_common = setting.priority.iter().take_while(|(label, value)| {
            let wanted = value.as_deref().unwrap_or_else(|| self.localities.own_label(label));
            self.localities.label(label, (&one.locality, one.node), one.labels) == wanted
        });
        let missing = setting.priority.len() - in_common.count();
        let by_place = setting.priority.is_empty() || !setting.failover.is_empty();
        let distance = match own.distance(&one.locality) {
            _ if !by_place || own.is_unknown() => 0,
            3 => {
                let stands_in = setting.failover.iter().find(|(from, _)| **from == *own.region);
                3 + usize::from(stands_in.is_some_and(|(_, to)| **to != *one.locality.region))
            }
            near => near,
        };
        missing * 5 + distance
    }
}

/// The groups that have shares; an endpoint that is in none of the places gets nothing.
fn by_share(shares: &[(Locality, u32)], endpoints: &[&Candidate<'_>]) -> Box<[Group]> {
    let group = |(place, share): &(Locality, u32)| {
        let members = (0..).zip(endpoints).filter(|(_, one)| one.locality.is_meant_by(place));
        let (members, weights): (Vec<u32>, Vec<u32>) =
            members.map(|(index, one)| (index, one.weight)).unzip();
        Group::new(*share, Some(members.into()), &weights)
    };
    let (there, mut empty): (Vec<Group>, Vec<Group>) =
        shares.iter().map(group).partition(|group| group.len(endpoints.len()) > 0);
    if there.is_empty() { empty.drain(..1).collect() } else { there.into() }
}

/// What is chosen by, with the tables of a cluster that hashes.
pub(super) fn chooser(
    choice: &Choice,
    endpoints: &[Arc<Endpoint>],
    spread: &Spread,
) -> (Balancing, Option<ConsistentHash>) {
    let (key, table) = match choice {
        Choice::Simple(balancing) => return (*balancing, None),
        Choice::Hash(key, table) => (Arc::clone(key), *table),
    };
    let addresses = || endpoints.iter().map(|endpoint| endpoint.address).collect::<Vec<_>>();
    let hash = if spread.levels.is_empty() {
        ConsistentHash::new(key, table, &addresses())
    } else {
        let levels: Vec<_> = spread.levels.iter().map(|level| placed(level, endpoints)).collect();
        ConsistentHash::by_level(key, table, &levels)
    };
    (Balancing::Random, Some(hash))
}

/// The endpoints of a level, with the shares of their groups in their weights.
fn placed(level: &Level, endpoints: &[Arc<Endpoint>]) -> Vec<Placed> {
    let mut all = Vec::with_capacity(level.len(endpoints.len()));
    for group in &level.groups {
        let indices = (0..group.len(endpoints.len())).filter_map(|place| group.index(place));
        let members: Vec<(usize, &Arc<Endpoint>)> =
            indices.filter_map(|index| Some((index, endpoints.get(index)?))).collect();
        let sum: u64 = members.iter().map(|(_, endpoint)| u64::from(endpoint.weight)).sum();
        all.extend(members.into_iter().map(|(index, endpoint)| {
            let weight = if level.groups.len() == 1 {
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
