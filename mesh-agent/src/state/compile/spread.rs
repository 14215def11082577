//! In which levels and groups the endpoints of a cluster are chosen: `localityLbSetting` of the `DestinationRule`, else what the
//! Service asks for (`trafficDistribution`, hints), else the mesh-wide setting.
//!
//! As in Istio, one place stands in for another only where `outlierDetection` says when it has to; with `zoneAwareLbSetting` the
//! region comes first in any case. Tested in `tests/locality.rs`.

use std::sync::Arc;

use super::{destination_rules::Policy, endpoints::Candidate, locality::Localities};
use crate::state::{
    resource::{
        load_balancer::Choice,
        locality::{LocalitySetting, is_of_client},
    },
    snapshot::{
        Balancing, ByClient, ConsistentHash, Endpoint, Group, Level, Locality, Spread, Traits, Wanted,
        ZoneRule, rank,
    },
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

impl Layout<'_, '_> {
    /// The levels of these endpoints; none where all are one, and each as good as any other.
    pub fn levels(&self, policy: &Policy, endpoints: &[&Candidate<'_>]) -> Box<[Level]> {
        let own = policy.balancer.locality.as_ref();
        if let Some(shares) = self.shares(own) {
            return [Level { groups: by_share(shares, endpoints) }].into();
        }
        let ranks = self.ranks(own, policy.outlier.is_some(), endpoints);
        let ranks = ranks.unwrap_or_else(|| vec![0; endpoints.len()]);
        let weights: Vec<u32> = endpoints.iter().map(|one| one.weight).collect();
        Level::by_rank(&ranks, &weights)
    }

    /// What makes the levels others for each client, where the labels of its pod do.
    pub fn by_client(&self, policy: &Policy, endpoints: &[&Candidate<'_>]) -> Option<ByClient> {
        let own = policy.balancer.locality.as_ref();
        let others_say = own.is_none() && (self.nearby.is_some() || hints(endpoints).is_some());
        let setting = own
            .or(self.mesh)
            .filter(|setting| (policy.outlier.is_some() || setting.zone_aware.is_some()) && !others_say)?;
        let depends = setting.priority.iter().any(|(label, value)| is_of_client(label, value.as_deref()));
        if !depends || setting.disabled || !setting.distribute.is_empty() {
            return None;
        }
        let wanted = setting.priority.iter().map(|(label, value)| match value {
            None if is_of_client(label, None) => Wanted::OfClient(label.as_str().into()),
            value => {
                Wanted::Value(value.as_deref().unwrap_or_else(|| self.localities.own_label(label)).into())
            }
        });
        let traits = |one: &&Candidate<'_>| {
            let values = setting.priority.iter().map(|(label, _)| self.label(label, one).into());
            Traits { values: values.collect(), distance: self.distance(setting, one) }
        };
        let hash = match &policy.choice {
            Choice::Hash(key, table) => Some((Arc::clone(key), *table)),
            Choice::Simple(_) => None,
        };
        let by_client = ByClient::new(wanted.collect(), endpoints.iter().map(traits).collect(), hash);
        Some(by_client.zoned(self.zone_rule(policy)))
    }

    /// Whether the zone of this node's clients is preferred, and when.
    pub fn zone_rule(&self, policy: &Policy) -> Option<ZoneRule> {
        let setting = policy.balancer.locality.as_ref().filter(|setting| !setting.disabled)?;
        let own = &self.localities.own;
        // A key stays with its endpoint, wherever that is.
        let hashes = matches!(policy.choice, Choice::Hash(..));
        let least = setting.zone_aware.filter(|_| !hashes && !own.zone.is_empty())?;
        Some(ZoneRule { own: own.clone(), least })
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
            let counts = outliers || setting.zone_aware.is_some();
            return counts.then(|| each(&|one| self.by_setting(setting, one)));
        }
        if let Some(nearby) = self.nearby {
            return (!self.localities.own.is_unknown()).then(|| {
                each(&|one| {
                    let here = nearby == Nearby::Node && self.localities.is_here(one.node);
                    if here { 0 } else { 1 + self.localities.own.distance(&one.locality) }
                })
            });
        }
        if let Some(hints) = hints(endpoints) {
            return Some(hints);
        }
        let by_default = Arc::default();
        let setting = self.mesh.unwrap_or(&by_default);
        outliers.then(|| each(&|one| self.by_setting(setting, one)))
    }

    /// Istio's priorities: by the labels in common with this node, then by how far the place is. The client's own pod has none
    /// of the labels.
    fn by_setting(&self, setting: &LocalitySetting, one: &Candidate<'_>) -> usize {
        // Shares that are not for clients of here are no failover either.
        if setting.disabled || !setting.distribute.is_empty() {
            return 0;
        }
        let in_common = setting.priority.iter().map(|(label, value)| {
            let wanted = value.as_deref().unwrap_or_else(|| self.localities.own_label(label));
            self.label(label, one) == wanted
        });
        rank(setting.priority.len(), in_common, self.distance(setting, one))
    }

    fn label<'s>(&'s self, label: &str, one: &'s Candidate<'_>) -> &'s str {
        self.localities.label(label, (&one.locality, one.node), one.labels)
    }

    /// How far an endpoint is, 0 to 4, where places count.
    fn distance(&self, setting: &LocalitySetting, one: &Candidate<'_>) -> usize {
        let own = &self.localities.own;
        let by_zone = setting.zone_aware.is_some();
        let by_place = by_zone || setting.priority.is_empty() || !setting.failover.is_empty();
        match own.distance(&one.locality) {
            _ if !by_place || own.is_unknown() => 0,
            3 => {
                let stands_in = setting.failover.iter().find(|(from, _)| **from == *own.region);
                3 + usize::from(stands_in.is_some_and(|(_, to)| **to != *one.locality.region))
            }
            // The zones of a region are one level, and which of them gets what is decided by how many there are in each.
            _ if by_zone => 0,
            near => near,
        }
    }
}

/// As kube-proxy has it: all endpoints have hints, and some are meant for here, or none counts.
fn hints(endpoints: &[&Candidate<'_>]) -> Option<Vec<usize>> {
    let hints: Option<Vec<usize>> = endpoints.iter().map(|one| one.hint.map(usize::from)).collect();
    hints.filter(|hints| hints.iter().any(|hint| *hint < 2))
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
    (Balancing::Random, Some(ConsistentHash::over(key, table, endpoints, &spread.levels)))
}
