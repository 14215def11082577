//! `/endpoints`: every endpoint as this agent sees it now.
//!
//! Promises the same order for the same endpoints. Tested below.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::SocketAddr,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use crate::state::snapshot::{ByClient, Cluster, Endpoint, Layout, Snapshot};

/// One endpoint of a cluster.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct EndpointView {
    /// Name of the cluster, as `outbound|9080|v2|reviews.default.svc.cluster.local`.
    pub cluster: String,
    /// Namespace of the clients that the cluster is for, where that is not everybody.
    pub view: Option<String>,
    /// Where the app listens.
    pub address: SocketAddr,
    /// Its pod, `namespace/name`, if it is one that is known.
    pub workload: Option<String>,
    /// Where it is, `region/zone/subzone`; empty where that is not known.
    pub locality: String,
    /// Its share, among those of the others of its group.
    pub weight: u32,
    /// What it gets of its turns is proportional to this, by its own word (`backendUtilization`): requests a second for each
    /// whole of itself that it uses.
    pub reported_weight: Option<f64>,
    /// The level it is chosen from, 0 being the best; none for an endpoint that gets nothing.
    pub level: Option<usize>,
    /// The level that clients with these labels choose it from, where that depends on them: of those that have asked.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub level_by_client: BTreeMap<String, usize>,
    /// `healthy`, `warming` (it has come lately and gets less), `ejected`, `unhealthy` (by its checks), or `leaving` (no
    /// endpoint any more, and not done yet).
    pub health: String,
    /// Seconds since it was ejected, while it is.
    pub ejected_seconds: Option<f64>,
    /// How often it was ejected lately.
    pub ejections: u32,
    /// Requests or connections in flight from this agent.
    pub in_flight: u32,
    /// How long it takes to answer, in milliseconds: a moving average that goes up at once; none before the first answer.
    pub latency_ms: Option<f64>,
}

/// The endpoints of every cluster that something leads to.
pub(super) fn endpoints(snapshot: &Snapshot) -> Vec<EndpointView> {
    let clusters: BTreeMap<_, &Arc<Cluster>> =
        snapshot.clusters().map(|cluster| ((&cluster.name, &cluster.view), cluster)).collect();
    clusters.into_values().flat_map(|cluster| of_cluster(cluster)).collect()
}

fn of_cluster(cluster: &Cluster) -> Vec<EndpointView> {
    let now = Instant::now();
    let layouts = cluster.spread.by_client.as_ref().map(ByClient::layouts).unwrap_or_default();
    let there = cluster.endpoints.iter().enumerate().map(|(index, one)| {
        let level = cluster.spread.level_of(index);
        let warming = || cluster.spread.warmup.is_some_and(|warmup| warmup.factor(one.state.came, now) < 1.0);
        let health = match () {
            () if cluster.outlier.is_some() && one.state.health.is_ejected() => "ejected",
            () if one.checked.as_ref().is_some_and(|checked| checked.is_unhealthy()) => "unhealthy",
            () if warming() => "warming",
            () => "healthy",
        };
        let of_client =
            |(labels, layout): &(String, Arc<_>)| Some((labels.clone(), Layout::level_of(layout, index)?));
        let level_by_client = layouts.iter().filter_map(of_client).collect();
        EndpointView { level_by_client, ..view(cluster, one, (level, health), now) }
    });
    let known: BTreeSet<SocketAddr> = cluster.endpoints.iter().map(|one| one.address).collect();
    let leaving = cluster.spread.leaving.iter();
    let leaving =
        leaving.filter(|one| !known.contains(&one.address) && one.state.in_flight.load(Relaxed) > 0);
    there.chain(leaving.map(|one| view(cluster, one, (None, "leaving"), now))).collect()
}

fn view(
    cluster: &Cluster,
    one: &Endpoint,
    (level, health): (Option<usize>, &str),
    now: Instant,
) -> EndpointView {
    let state = &one.state;
    let since = state.health.ejected_since().filter(|_| cluster.outlier.is_some());
    EndpointView {
        cluster: cluster.name.to_string(),
        view: cluster.view.as_deref().map(str::to_owned),
        address: one.address,
        workload: one.workload.as_ref().map(|pod| format!("{}/{}", pod.namespace, pod.name)),
        locality: one.locality.to_string(),
        weight: one.weight,
        reported_weight: cluster.reported_weight(one, now),
        level,
        level_by_client: BTreeMap::new(),
        health: health.to_owned(),
        ejected_seconds: since.map(|since| now.saturating_duration_since(since).as_secs_f64()),
        ejections: state.health.ejections.load(Relaxed),
        in_flight: state.in_flight.load(Relaxed),
        latency_ms: state.latency.average(now).map(|average| average.as_secs_f64() * 1e3),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{
        source::read_text,
        state::{
            compile::{Settings, compile},
            resource::Objects,
        },
    };

    const OBJECTS: &str = "
{apiVersion: v1, kind: Node, metadata: {name: n, labels: {topology.kubernetes.io/region: r}}}
---
{apiVersion: v1, kind: Service, metadata: {name: a}, spec: {selector: {app: a}, ports: [{port: 80}]}}
---
{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {name: a}, spec: {host: a, trafficPolicy:
  {outlierDetection: {}, loadBalancer: {warmupDurationSecs: 10s}}}}
";

    fn pods(ips: &[&str]) -> Objects {
        let pod = |ip: &&str| {
            format!(
                "---\n{{apiVersion: v1, kind: Pod, metadata: {{name: a-{}, labels: {{app: a}}, annotations: {{mesh.io/weight: '3'}}}}, \
                 spec: {{nodeName: n}}, status: {{podIP: {ip}}}}}\n",
                ip.replace('.', "-")
            )
        };
        let (objects, refused) = read_text(&(OBJECTS.to_owned() + &ips.iter().map(pod).collect::<String>()));
        assert_eq!(refused, []);
        objects
    }

    #[tokio::test(start_paused = true)]
    async fn an_endpoint_is_shown_with_all_that_decides() {
        let settings = Settings::default();
        let (first, _) = compile(&pods(&["10.0.0.1", "10.0.0.2"]), None, &settings);
        let cluster =
            &first.services["a.default.svc.cluster.local"].port_for("default", 80).map(|port| &port.cluster);
        let [one, two] = cluster.map_or(&[][..], |cluster| &cluster.endpoints) else { panic!("{first:?}") };
        one.state.health.eject(Instant::now());
        two.state.latency.asked(Instant::now());
        two.state.latency.answered(Instant::now(), Duration::from_millis(250));
        two.state.in_flight.store(2, Relaxed);
        let shown = endpoints(&first);
        let expected = EndpointView {
            cluster: "outbound|80||a.default.svc.cluster.local".into(),
            view: None,
            address: one.address,
            workload: Some("default/a-10-0-0-1".into()),
            locality: "r".into(),
            weight: 3,
            reported_weight: None,
            level: Some(0),
            level_by_client: BTreeMap::new(),
            health: "ejected".into(),
            ejected_seconds: Some(0.0),
            ejections: 1,
            in_flight: 0,
            latency_ms: None,
        };
        assert_eq!(shown[0], expected);
        assert_eq!((&*shown[1].health, shown[1].in_flight, shown[1].latency_ms), ("warming", 2, Some(250.0)));
        tokio::time::advance(Duration::from_secs(10)).await;
        assert_eq!(endpoints(&first)[1].health, "healthy");
        assert_eq!(endpoints(&first)[0].ejected_seconds, Some(10.0));
        // Both leave; the one that has something in flight is still shown.
        let (second, _) = compile(&pods(&["10.0.0.3"]), Some(&first), &settings);
        let shown = endpoints(&second);
        let shown: Vec<_> =
            shown.iter().map(|one| (one.address.to_string(), &*one.health, one.level)).collect();
        let expected =
            [("10.0.0.3:80".to_owned(), "warming", Some(0)), ("10.0.0.2:80".to_owned(), "leaving", None)];
        assert_eq!(shown, expected);
    }
}
