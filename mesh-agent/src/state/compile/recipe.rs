//! How a cluster is made of the addresses behind its port, whenever they change.
//!
//! Promises that an endpoint which was there before keeps its in-flight count and latency, and is the very same where nothing
//! of it has changed; and that an endpoint which comes back while it has requests in flight, or is ejected, is known again.
//! Tested in `tests.rs` beside it.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use super::{
    destination_rules::{self, Policy},
    endpoints::{Candidate, selects},
    locality::Localities,
    mesh_config::MeshSettings,
    selectors::Labels,
    spread::{self, Layout, Nearby},
};
use crate::state::snapshot::{Balancing, Checked, Cluster, ConsistentHash, Endpoint, Spread, Zones};

/// For how long an endpoint that has left is known to be ejected: no ejection lasts longer, but by a rule's own word.
const KNOWN: Duration = Duration::from_mins(5);

/// What a cluster is made by, besides the addresses.
#[derive(Debug, Clone)]
pub(super) struct Recipe {
    /// Labels that the pods of its subset have, where it is one.
    pub labels: Option<Labels>,
    /// What the rules say.
    pub policy: Policy,
    /// Which endpoints its service prefers.
    pub nearby: Option<Nearby>,
}

/// What of a cluster follows from the addresses.
#[derive(Debug, Clone)]
pub(super) struct LaidOut {
    /// In the order of their addresses.
    pub endpoints: Vec<Arc<Endpoint>>,
    /// How they are spread.
    pub spread: Arc<Spread>,
    /// How one is chosen.
    pub balancing: Balancing,
    /// By what else.
    pub hash: Option<ConsistentHash>,
    /// Whether only the agent can keep it.
    pub limits_connections: bool,
}

impl Recipe {
    /// Of a port that no rule is about.
    pub fn plain(port: u16) -> Self {
        Self { labels: None, policy: destination_rules::policy(None, None, port, false), nearby: None }
    }

    /// Lays the endpoints out among `candidates`, which are all of the port. `checked`: what is known of an address, where
    /// addresses are checked.
    pub fn lay_out(
        &self,
        candidates: &[Candidate<'_>],
        before: Option<&Arc<Cluster>>,
        (localities, mesh): (&Localities<'_>, &MeshSettings),
        checked: Option<impl FnMut(SocketAddr) -> Arc<Checked>>,
    ) -> LaidOut {
        let chosen = candidates
            .iter()
            .filter(|candidate| self.labels.as_ref().is_none_or(|labels| selects(labels, candidate.labels)));
        let chosen: Vec<&Candidate<'_>> = chosen.collect();
        let is_checked = checked.is_some();
        let (endpoints, leaving) = endpoints(&chosen, before, checked);
        let layout = Layout { localities, mesh: mesh.locality.as_ref(), nearby: self.nearby };
        let levels = layout.levels(&self.policy, &chosen);
        let by_client = layout.by_client(&self.policy, &chosen);
        let zones = layout.zone_rule(&self.policy);
        let zones = zones.and_then(|rule| Zones::of_first(&rule, &levels, &endpoints));
        let balancer = &self.policy.balancer;
        let (warmup, utilization) = (balancer.warmup, balancer.utilization.clone());
        let spread = Spread { levels, by_client, zones, warmup, utilization, leaving };
        let (balancing, hash) = spread::chooser(&self.policy.choice, &endpoints, &spread);
        // The kernel knows neither levels nor weights that have to hold while connections are open.
        let limits_connections = self.policy.limits_connections || !spread.is_even() || is_checked;
        LaidOut { endpoints, spread: Arc::new(spread), balancing, hash, limits_connections }
    }
}

/// The endpoints, as they are remembered; and those that have left and are not done yet.
fn endpoints(
    chosen: &[&Candidate<'_>],
    before: Option<&Arc<Cluster>>,
    mut checked: Option<impl FnMut(SocketAddr) -> Arc<Checked>>,
) -> (Vec<Arc<Endpoint>>, Vec<Arc<Endpoint>>) {
    let before = before.iter().flat_map(|cluster| cluster.endpoints.iter().chain(&cluster.spread.leaving));
    let mut before: BTreeMap<SocketAddr, &Arc<Endpoint>> =
        before.map(|endpoint| (endpoint.address, endpoint)).collect();
    let endpoint = |candidate: &&Candidate<'_>| {
        let before = before.remove(&candidate.address);
        let checked = checked.as_mut().map(|checked| checked(candidate.address));
        match before {
            Some(before) if is_as_before(before, candidate, checked.as_ref()) => Arc::clone(before),
            before => Arc::new(Endpoint {
                address: candidate.address,
                workload: candidate.workload.clone(),
                locality: candidate.locality.clone(),
                weight: candidate.weight,
                checked,
                state: before.map(|before| Arc::clone(&before.state)).unwrap_or_default(),
            }),
        }
    };
    let endpoints = chosen.iter().map(endpoint).collect();
    let leaving = before.into_values().filter(|endpoint| is_not_done(endpoint)).cloned().collect();
    (endpoints, leaving)
}

fn is_as_before(before: &Endpoint, candidate: &Candidate<'_>, checked: Option<&Arc<Checked>>) -> bool {
    before.workload.as_ref().map(Arc::as_ptr) == candidate.workload.as_ref().map(Arc::as_ptr)
        && before.locality == candidate.locality
        && before.weight == candidate.weight
        && before.checked.as_ref().map(Arc::as_ptr) == checked.map(Arc::as_ptr)
}

/// Whether an endpoint that has left has to be known should it come back.
fn is_not_done(endpoint: &Endpoint) -> bool {
    let state = &endpoint.state;
    let ejected = || state.health.ejected_since().is_some_and(|since| since.elapsed() < KNOWN);
    state.in_flight.load(Ordering::Relaxed) > 0 || ejected()
}
