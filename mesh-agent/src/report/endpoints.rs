//! Series of endpoints, read from the configuration in force when somebody asks for them.
//!
//! Promises that there are no more of them than was said: a node knows every endpoint of the mesh, and only those are shown
//! that its own pods have used, the busiest first. What is left out is counted. Tested below.

use std::{
    cmp::Reverse,
    collections::BTreeMap,
    fmt,
    net::SocketAddr,
    sync::{Arc, OnceLock, atomic::Ordering::Relaxed},
};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeGaugeValue, EncodeMetric},
    metrics::{MetricType, gauge::ConstGauge},
    registry::Registry,
};
use tokio::{sync::watch, time::Instant};

use super::Reporter;
use crate::state::snapshot::{Cluster, Endpoint, Snapshot};

/// Where the series come from, once it is known.
#[derive(Debug, Clone, Default)]
pub(super) struct EndpointMetrics(Arc<OnceLock<Shown>>);

#[derive(Debug)]
struct Shown {
    snapshots: watch::Receiver<Arc<Snapshot>>,
    /// The most endpoints that have series of their own.
    most: usize,
}

/// One endpoint of a cluster, for clients of all namespaces together.
#[derive(Debug, Default, Clone, Copy)]
struct Used {
    in_flight: u32,
    /// Seconds.
    latency: f64,
    ejected: bool,
    /// By its checks.
    unhealthy: bool,
    weight: u32,
    /// By its own load reports.
    reported: Option<f64>,
}

/// How many endpoints of a cluster are in which state.
#[derive(Debug, Default)]
struct States {
    healthy: u64,
    ejected: u64,
    unhealthy: u64,
    leaving: u64,
}

type Label = (&'static str, String);

impl EndpointMetrics {
    pub(super) fn register(&self, registry: &mut Registry) {
        registry.register_collector(Box::new(self.clone()));
    }
}

impl Reporter {
    /// The configuration whose endpoints are shown, and how many of them may have series of their own:
    /// `mesh_cluster_endpoints`, `mesh_endpoint_in_flight`, `mesh_endpoint_latency_seconds`, `mesh_endpoint_ejected`,
    /// `mesh_endpoint_unhealthy`, `mesh_endpoint_weight`, `mesh_endpoint_reported_weight`, `mesh_endpoints_left_out`. Counts once.
    pub fn show_endpoints(&self, snapshots: watch::Receiver<Arc<Snapshot>>, most: usize) {
        // An `Err` gives back what is there already.
        let _ = self.metrics.endpoints.0.set(Shown { snapshots, most });
    }
}

impl Collector for EndpointMetrics {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Some(Shown { snapshots, most }) = self.0.get() else { return Ok(()) };
        let snapshot = Arc::clone(&snapshots.borrow());
        let (clusters, used) = look(&snapshot);
        let states = clusters.into_iter().flat_map(|(cluster, states)| {
            let States { healthy, ejected, unhealthy, leaving } = states;
            let each =
                [("healthy", healthy), ("ejected", ejected), ("unhealthy", unhealthy), ("leaving", leaving)];
            each.map(|(state, count)| ([("cluster", cluster.to_owned()), ("state", state.to_owned())], count))
        });
        let what = "Endpoints of the clusters that pods of this node use, by state";
        gauges(&mut encoder, ("mesh_cluster_endpoints", what), states)?;

        let mut shown: Vec<_> = used.into_iter().collect();
        let left_out = shown.len().saturating_sub(*most);
        // The busiest first, and then in an order that stays.
        shown.sort_by_key(|(name, used)| (Reverse(used.in_flight), *name));
        shown.truncate(*most);
        let series = || {
            shown.iter().map(|((cluster, address), used)| {
                ([("cluster", (*cluster).to_owned()), ("endpoint", address.to_string())], *used)
            })
        };
        let what = "Requests and connections in flight to an endpoint";
        let values = series().map(|(labels, used)| (labels, u64::from(used.in_flight)));
        gauges(&mut encoder, ("mesh_endpoint_in_flight", what), values)?;
        let what = "How long an endpoint takes to answer: a moving average that goes up at once";
        let values = series().map(|(labels, used)| (labels, used.latency));
        gauges(&mut encoder, ("mesh_endpoint_latency_seconds", what), values)?;
        let what = "Whether outlier detection has ejected an endpoint";
        let values = series().map(|(labels, used)| (labels, u64::from(used.ejected)));
        gauges(&mut encoder, ("mesh_endpoint_ejected", what), values)?;
        let what = "Whether the checks of an endpoint say that it is unhealthy";
        let values = series().map(|(labels, used)| (labels, u64::from(used.unhealthy)));
        gauges(&mut encoder, ("mesh_endpoint_unhealthy", what), values)?;
        let what = "The share of an endpoint, among those of the others of its group";
        let values = series().map(|(labels, used)| (labels, u64::from(used.weight)));
        gauges(&mut encoder, ("mesh_endpoint_weight", what), values)?;
        let what =
            "What an endpoint's share is proportional to, by its own load reports (backendUtilization)";
        let values = series().filter_map(|(labels, used)| Some((labels, used.reported?)));
        gauges(&mut encoder, ("mesh_endpoint_reported_weight", what), values)?;
        let what = "Endpoints in use without series of their own (--endpoint-metrics)";
        let gauge = ConstGauge::new(left_out as u64);
        let one = encoder.encode_descriptor("mesh_endpoints_left_out", what, None, MetricType::Gauge)?;
        gauge.encode(one)
    }
}

fn gauges<N: EncodeGaugeValue>(
    encoder: &mut DescriptorEncoder<'_>,
    (name, what): (&str, &str),
    series: impl Iterator<Item = ([Label; 2], N)>,
) -> fmt::Result {
    let mut family = encoder.encode_descriptor(name, what, None, MetricType::Gauge)?;
    for (labels, value) in series {
        ConstGauge::new(value).encode(family.encode_family(&labels)?)?;
    }
    Ok(())
}

type Look<'s> = (BTreeMap<&'s str, States>, BTreeMap<(&'s str, SocketAddr), Used>);

/// The clusters in use, and their endpoints in use.
fn look(snapshot: &Snapshot) -> Look<'_> {
    let mut seen: BTreeMap<(&str, Option<&str>), &Cluster> = BTreeMap::new();
    seen.extend(snapshot.clusters().map(|one| ((&*one.name, one.view.as_deref()), &**one)));
    let now = Instant::now();
    let (mut clusters, mut all) = (BTreeMap::new(), BTreeMap::new());
    for ((name, _), cluster) in seen {
        let used = cluster.endpoints.iter().filter_map(|one| Some((one, use_of(cluster, one, now)?)));
        let used: Vec<(&std::sync::Arc<Endpoint>, Used)> = used.collect();
        let leaving = cluster.spread.leaving.iter();
        let leaving = leaving.filter(|one| one.state.in_flight.load(Relaxed) > 0).count() as u64;
        if used.is_empty() && leaving == 0 {
            continue;
        }
        let ejected = used.iter().filter(|(_, used)| used.ejected).count() as u64;
        let unhealthy = cluster.endpoints.iter().filter(|one| is_unhealthy(one) && !is_ejected(cluster, one));
        let unhealthy = unhealthy.count() as u64;
        let states: &mut States = clusters.entry(name).or_default();
        // The same endpoints for everybody, but what each does to them.
        states.healthy = states.healthy.max(cluster.endpoints.len() as u64 - ejected - unhealthy);
        states.ejected = states.ejected.max(ejected);
        states.unhealthy = states.unhealthy.max(unhealthy);
        states.leaving = states.leaving.max(leaving);
        for (endpoint, used) in used {
            let sum: &mut Used = all.entry((name, endpoint.address)).or_default();
            sum.in_flight += used.in_flight;
            sum.latency = sum.latency.max(used.latency);
            sum.ejected |= used.ejected;
            sum.unhealthy |= used.unhealthy;
            (sum.weight, sum.reported) = (used.weight, used.reported);
        }
    }
    (clusters, all)
}

/// `None`: nothing of this node has used it.
fn use_of(cluster: &Cluster, endpoint: &Endpoint, now: Instant) -> Option<Used> {
    let state = &endpoint.state;
    let (latency, in_flight) = (state.latency.average(now), state.in_flight.load(Relaxed));
    let (ejected, unhealthy) = (is_ejected(cluster, endpoint), is_unhealthy(endpoint));
    let used = latency.is_some() || in_flight > 0 || ejected;
    let latency = latency.unwrap_or_default().as_secs_f64();
    let (weight, reported) = (endpoint.weight, cluster.reported_weight(endpoint, now));
    used.then_some(Used { in_flight, latency, ejected, unhealthy, weight, reported })
}

fn is_ejected(cluster: &Cluster, endpoint: &Endpoint) -> bool {
    cluster.outlier.is_some() && endpoint.state.health.is_ejected()
}

fn is_unhealthy(endpoint: &Endpoint) -> bool {
    endpoint.checked.as_ref().is_some_and(|checked| checked.is_unhealthy())
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, time::Duration};

    use super::*;
    use crate::{
        report::samples,
        state::{
            defaults,
            snapshot::{Checked, Service, ServicePort, Visibility},
        },
    };

    fn endpoint(host: u8, latency_ms: Option<u64>, in_flight: u32) -> Arc<Endpoint> {
        let endpoint = Arc::new(Endpoint::alone(([10, 0, 0, host], 9080).into(), None));
        if let Some(ms) = latency_ms {
            endpoint.state.latency.asked(Instant::now());
            endpoint.state.latency.answered(Instant::now(), Duration::from_millis(ms));
        }
        endpoint.state.in_flight.store(in_flight, Relaxed);
        endpoint
    }

    fn snapshot(clusters: Vec<Cluster>) -> Snapshot {
        let port = |cluster| ServicePort {
            port: 9080,
            protocol: None,
            routes: Arc::new([]),
            streams: Arc::new([]),
            cluster: Arc::new(cluster),
        };
        let service = Service {
            host: "all".into(),
            name: "all".into(),
            namespace: "default".into(),
            vips: Vec::new(),
            headless: false,
            visible: Visibility::Everywhere,
            ports: clusters.into_iter().map(port).collect(),
            views: HashMap::new(),
        };
        Snapshot { services: [("all".into(), Arc::new(service))].into(), ..Snapshot::default() }
    }

    fn cluster(name: &str, endpoints: Vec<Arc<Endpoint>>) -> Cluster {
        let Ok(cluster) = Arc::try_unwrap(samples::cluster(name)) else { panic!("shared by nobody") };
        Cluster { endpoints, outlier: Some(defaults::OUTLIER_DETECTION), ..cluster }
    }

    fn lines(reporter: &Reporter) -> Vec<String> {
        let text = reporter.exposition();
        let ours = |line: &&str| {
            line.starts_with("mesh_cluster_endp")
                || line.starts_with("mesh_endpoint_")
                || line.starts_with("mesh_endpoints_left")
        };
        text.lines().filter(ours).map(|line| line.replace(".default.svc.cluster.local", "")).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn only_what_is_used_has_series_and_no_more_than_was_said() {
        let mut used =
            vec![endpoint(1, Some(20), 0), endpoint(2, None, 3), endpoint(3, None, 0), endpoint(4, None, 0)];
        used[3].state.health.eject(Instant::now());
        let alike = |one: &Endpoint| {
            let (state, checked) = (Arc::clone(&one.state), one.checked.clone());
            Endpoint { checked, state, ..Endpoint::alone(one.address, None) }
        };
        used[0] = Arc::new(Endpoint { weight: 7, ..alike(&used[0]) });
        let sick = Arc::<Checked>::default();
        sick.set_unhealthy(true);
        used[1] = Arc::new(Endpoint { checked: Some(sick), ..alike(&used[1]) });
        let clusters = vec![cluster("a", used), cluster("b", vec![endpoint(9, None, 0)])];
        let (_sender, receiver) = watch::channel(Arc::new(snapshot(clusters)));
        let reporter = Reporter::default();
        assert_eq!(lines(&reporter), [""; 0], "before anything is known");
        reporter.show_endpoints(receiver, 2);
        let expected = [
            "mesh_cluster_endpoints{cluster=\"outbound|9080||a\",state=\"healthy\"} 2",
            "mesh_cluster_endpoints{cluster=\"outbound|9080||a\",state=\"ejected\"} 1",
            "mesh_cluster_endpoints{cluster=\"outbound|9080||a\",state=\"unhealthy\"} 1",
            "mesh_cluster_endpoints{cluster=\"outbound|9080||a\",state=\"leaving\"} 0",
            "mesh_endpoint_in_flight{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.2:9080\"} 3",
            "mesh_endpoint_in_flight{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.1:9080\"} 0",
            "mesh_endpoint_latency_seconds{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.2:9080\"} 0.0",
            "mesh_endpoint_latency_seconds{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.1:9080\"} 0.02",
            "mesh_endpoint_ejected{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.2:9080\"} 0",
            "mesh_endpoint_ejected{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.1:9080\"} 0",
            "mesh_endpoint_unhealthy{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.2:9080\"} 1",
            "mesh_endpoint_unhealthy{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.1:9080\"} 0",
            "mesh_endpoint_weight{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.2:9080\"} 1",
            "mesh_endpoint_weight{cluster=\"outbound|9080||a\",endpoint=\"10.0.0.1:9080\"} 7",
            "mesh_endpoints_left_out 1",
        ];
        assert_eq!(lines(&reporter), expected);
    }
}
