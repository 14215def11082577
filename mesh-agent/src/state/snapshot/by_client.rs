//! Levels that depend on who asks: `failoverPriority` by labels of the client's own pod.
//!
//! Pods of a node with the same values of these labels share a layout, which is made when the first of them asks. Promises that
//! looking one up takes no lock, and that there are so many layouts at most, however many pods come and go. Tested below
//! and in `balance/distribution.rs`; what is compared with what, in `compile/tests/locality.rs`.

use std::{collections::BTreeMap, sync::Arc};

use arc_swap::ArcSwap;

use super::{ConsistentHash, Endpoint, HashKey, HashTable, Level, ZoneRule, Zones};

/// Layouts that are kept of a cluster. More than pods on a node as a rule; with more, the oldest are made anew.
const MOST_LAYOUTS: usize = 256;

/// A value that endpoints are compared with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Wanted {
    /// The same for every client of this node.
    Value(Arc<str>),
    /// What this label of the client's pod says; empty where it has none.
    OfClient(Arc<str>),
}

/// What is known of an endpoint, in the order of the cluster's endpoints.
#[derive(Debug)]
pub struct Traits {
    /// What it has for each of the values that are wanted, in their order.
    pub values: Box<[Arc<str>]>,
    /// How far it is, among those that have the same values in common: 0 to 4.
    pub distance: usize,
}

/// How the endpoints of a cluster are laid out for each client.
#[derive(Debug)]
pub struct ByClient {
    wanted: Box<[Wanted]>,
    endpoints: Box<[Traits]>,
    hash: Option<(Arc<HashKey>, HashTable)>,
    zones: Option<ZoneRule>,
    layouts: ArcSwap<Vec<Arc<Layout>>>,
}

/// How they are laid out for clients with the same values.
#[derive(Debug)]
pub struct Layout {
    /// Values of the labels that clients are asked for, in their order.
    values: Box<[Arc<str>]>,
    /// As `Spread::levels`.
    pub levels: Box<[Level]>,
    /// As `Cluster::hash`.
    pub hash: Option<ConsistentHash>,
    /// As `Spread::zones`.
    pub zones: Option<Zones>,
}

impl ByClient {
    /// `hash`: where a table is chosen by.
    pub fn new(
        wanted: Box<[Wanted]>,
        endpoints: Box<[Traits]>,
        hash: Option<(Arc<HashKey>, HashTable)>,
    ) -> Self {
        Self { wanted, endpoints, hash, zones: None, layouts: ArcSwap::default() }
    }

    /// The same, with a client's own zone preferred.
    #[must_use]
    pub fn zoned(self, zones: Option<ZoneRule>) -> Self {
        Self { zones, ..self }
    }

    /// As `Spread::asks_for_origin`.
    pub(super) fn asks_for_origin(&self) -> bool {
        self.zones.is_some()
    }

    /// The layout for a pod with these labels; `endpoints`: those of the cluster.
    pub fn layout(&self, client: &BTreeMap<Arc<str>, Arc<str>>, endpoints: &[Arc<Endpoint>]) -> Arc<Layout> {
        let value = |label: &Arc<str>| client.get(label).map(|value| &**value).unwrap_or_default();
        let known = self.layouts.load();
        let is_its =
            |layout: &&Arc<Layout>| self.labels().map(value).eq(layout.values.iter().map(|one| &**one));
        if let Some(layout) = known.iter().find(is_its) {
            return Arc::clone(layout);
        }
        let values = self.labels().map(|label| client.get(label).cloned().unwrap_or_default());
        let layout = Arc::new(self.make(values.collect(), endpoints));
        // Of two that are made at once one is kept; either is right.
        self.layouts.rcu(|known| {
            let mut all: Vec<_> = known.iter().rev().take(MOST_LAYOUTS - 1).rev().cloned().collect();
            if !all.iter().any(|one| one.values == layout.values) {
                all.push(Arc::clone(&layout));
            }
            all
        });
        layout
    }

    /// Labels of clients that endpoints are compared with.
    pub fn labels(&self) -> impl Iterator<Item = &Arc<str>> {
        self.wanted.iter().filter_map(|wanted| match wanted {
            Wanted::OfClient(label) => Some(label),
            Wanted::Value(_) => None,
        })
    }

    /// The layouts that clients have asked for, each with the clients' labels: `version=v1`.
    pub fn layouts(&self) -> Vec<(String, Arc<Layout>)> {
        let named = |layout: &Arc<Layout>| {
            let pairs = self.labels().zip(&layout.values).map(|(label, value)| format!("{label}={value}"));
            (pairs.collect::<Vec<_>>().join(","), Arc::clone(layout))
        };
        self.layouts.load().iter().map(named).collect()
    }

    /// The endpoints' availability has changed.
    pub(super) fn changed(&self) {
        for layout in self.layouts.load().iter() {
            layout.levels.iter().for_each(Level::changed);
            layout.zones.iter().for_each(Zones::changed);
        }
    }

    fn make(&self, values: Box<[Arc<str>]>, endpoints: &[Arc<Endpoint>]) -> Layout {
        let mut of_client = values.iter();
        let wanted = self.wanted.iter().map(|wanted| match wanted {
            Wanted::Value(value) => &**value,
            Wanted::OfClient(_) => of_client.next().map(|value| &**value).unwrap_or_default(),
        });
        let wanted: Vec<&str> = wanted.collect();
        let rank = |traits: &Traits| {
            let pairs = traits.values.iter().zip(&wanted);
            rank(wanted.len(), pairs.map(|(has, wants)| **has == **wants), traits.distance)
        };
        let ranks: Vec<usize> = self.endpoints.iter().map(rank).collect();
        let weights: Vec<u32> = endpoints.iter().map(|one| one.weight).collect();
        let levels = Level::by_rank(&ranks, &weights);
        let hash = self.hash.as_ref();
        let hash = hash.map(|(key, table)| ConsistentHash::over(Arc::clone(key), *table, endpoints, &levels));
        let zones = self.zones.as_ref().and_then(|rule| Zones::of_first(rule, &levels, endpoints));
        Layout { values, levels, hash, zones }
    }
}

/// How good an endpoint is, 0 being the best: by how many values it has in common, the most important first, of so many; then
/// by how far it is (0 to 4).
pub fn rank(wanted: usize, in_common: impl Iterator<Item = bool>, distance: usize) -> usize {
    let in_common = in_common.take_while(|is| *is).count();
    (wanted - in_common) * 5 + distance
}

impl Layout {
    /// The level that holds the endpoint with this index.
    pub fn level_of(&self, index: usize) -> Option<usize> {
        super::spread::level_of(&self.levels, index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two endpoints, whose pods are called `v1` and `v2`.
    fn two() -> (ByClient, Vec<Arc<Endpoint>>) {
        let endpoint = |last| Arc::new(Endpoint::alone(([10, 0, 0, last], 80).into(), None));
        let traits = |value: &str| Traits { values: [value.into()].into(), distance: 0 };
        let wanted = [Wanted::OfClient("version".into())];
        let by = ByClient::new(wanted.into(), [traits("v1"), traits("v2")].into(), None);
        (by, vec![endpoint(1), endpoint(2)])
    }

    fn client(version: &str) -> BTreeMap<Arc<str>, Arc<str>> {
        [("version".into(), version.into())].into()
    }

    #[test]
    fn clients_with_the_same_labels_share_a_layout() {
        let (by, endpoints) = two();
        let layout = by.layout(&client("v2"), &endpoints);
        assert_eq!((layout.level_of(1), layout.level_of(0)), (Some(0), Some(1)));
        assert!(Arc::ptr_eq(&layout, &by.layout(&client("v2"), &endpoints)));
        let other = by.layout(&client("v1"), &endpoints);
        assert_eq!((other.level_of(0), other.level_of(1)), (Some(0), Some(1)));
        let nobody = by.layout(&BTreeMap::new(), &endpoints);
        assert!(nobody.levels.is_empty(), "both are as good for who has no such label");
        assert_eq!(by.layouts().len(), 3);
    }

    #[test]
    fn layouts_do_not_grow_with_the_pods_that_have_come_and_gone() {
        let (by, endpoints) = two();
        for pod in 0..MOST_LAYOUTS + 10 {
            by.layout(&client(&pod.to_string()), &endpoints);
        }
        let layouts = by.layouts();
        assert_eq!(layouts.len(), MOST_LAYOUTS);
        assert_eq!(layouts.last().map(|(labels, _)| &**labels), Some("version=265"));
    }
}
