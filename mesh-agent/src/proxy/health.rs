//! What the path learns of its endpoints' health, and their coming back.

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
};

use http::{HeaderMap, Response, StatusCode};
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    balance::{
        Chosen, load_report,
        outlier::{self, Outcome},
    },
    error::{Error, Kind, Result, http_of},
    report::Reporter,
    state::snapshot::{Cluster, Endpoint, OutlierDetection, Service, SharedMap, Snapshot},
    tunnel::{self, Refusal},
    upstream::{Switched, retry},
};

/// Takes into account what came of an endpoint, which is only asked where a rule wants to know; `None`: it says nothing about
/// the endpoint.
pub(super) fn learn(
    reporter: &Reporter,
    cluster: &Cluster,
    endpoint: &Endpoint,
    outcome: impl FnOnce() -> Option<Outcome>,
) {
    if cluster.outlier.is_some()
        && let Some(outcome) = outcome()
        && let Some(reason) = outlier::learn(cluster, endpoint, outcome)
    {
        reporter.ejected(cluster, endpoint, reason.name());
    }
}

/// How busy the endpoint says it is, in the head or the trailers of a response, where the rule asks for that.
pub(super) fn learn_load(cluster: Option<&Cluster>, chosen: Option<&Chosen>, headers: &HeaderMap) {
    if let (Some(cluster), Some(chosen)) = (cluster, chosen)
        && let Some(rule) = &cluster.spread.utilization
        && let Some(weight) = load_report::weight(headers, rule)
    {
        chosen.endpoint.state.reported.report(rule, Instant::now(), weight);
    }
}

/// What came of a request or connection, as far as it tells how soon the endpoint does what it is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pace {
    /// As soon as this.
    Answered,
    /// Not at all, however soon that was known: it has failed, or its pod has more to do than it may. Whoever took that for
    /// a fast answer would send it even more.
    Failed,
    /// It was not asked.
    Unknown,
}

/// How long it took is learnt, where what came of it is the endpoint's own.
pub(super) fn timed(chosen: Option<&mut Chosen>, pace: Pace) {
    match (chosen, pace) {
        (Some(chosen), Pace::Answered) => chosen.answered(),
        (Some(chosen), Pace::Failed) => chosen.failed(),
        (Some(_), Pace::Unknown) | (None, _) => {}
    }
}

/// What an error tells of the pace.
pub(super) fn pace_of_error(error: &Error) -> Pace {
    let is_busy = matches!(error.kind, Kind::Overload | Kind::ConcurrencyLimit | Kind::RateLimited);
    if is_busy || is_the_endpoints(error.kind) { Pace::Failed } else { Pace::Unknown }
}

/// What opaque bytes tell of it: how soon their connection came about.
pub(super) fn pace_of_opened<T>(result: &Result<T>) -> Pace {
    result.as_ref().map_or_else(pace_of_error, |_| Pace::Answered)
}

/// What a request for another protocol tells of it.
pub(super) fn pace_of_switched(result: &Result<Switched>) -> Pace {
    match result {
        Ok(Switched::Answered(response)) => pace_of_response(response),
        result => pace_of_opened(result),
    }
}

/// What a request tells of it.
pub(super) fn pace_of_try<B>(result: &Result<Response<B>>) -> Pace {
    result.as_ref().map_or_else(pace_of_error, pace_of_response)
}

/// The same, with the connection it came on.
pub(super) fn pace_of_sent<B, L>(result: &Result<(Response<B>, L)>) -> Pace {
    result.as_ref().map_or_else(pace_of_error, |(response, _)| pace_of_response(response))
}

fn pace_of_response<B>(response: &Response<B>) -> Pace {
    match tunnel::refusal(response) {
        Some(Refusal::Busy) => Pace::Failed,
        Some(Refusal::Policy) => Pace::Unknown,
        None if status_of(response).is_server_error() => Pace::Failed,
        None => Pace::Answered,
    }
}

/// A gRPC status that stands in the head counts as the HTTP status that it means, as in Envoy.
fn status_of<B>(response: &Response<B>) -> StatusCode {
    retry::grpc_status(response.headers()).map_or(response.status(), http_of)
}

/// What opaque bytes tell: whether their connection came about.
pub(super) fn of_opened<T>(result: &Result<T>) -> Option<Outcome> {
    match result {
        Ok(_) => Some(Outcome::Connected),
        Err(error) => is_the_endpoints(error.kind).then_some(Outcome::Failed),
    }
}

/// What a request for another protocol tells.
pub(super) fn of_switched(result: &Result<Switched>) -> Option<Outcome> {
    match result {
        Ok(Switched::Answered(response)) if tunnel::refusal(response).is_some() => None,
        Ok(Switched::Answered(response)) => Some(Outcome::Answered(response.status().as_u16())),
        result => of_opened(result),
    }
}

/// What a request tells. What the agent of the endpoint's node has refused says nothing of the endpoint, which was not asked:
/// policies, rate limits.
pub(super) fn of_try<B>(result: &Result<Response<B>>) -> Option<Outcome> {
    match result {
        Ok(response) if tunnel::refusal(response).is_some() => None,
        Ok(response) => Some(Outcome::Answered(status_of(response).as_u16())),
        result @ Err(_) => of_opened(result),
    }
}

/// What is denied, or cut off by the client, is not the endpoint's fault.
pub(super) const fn is_the_endpoints(kind: Kind) -> bool {
    matches!(
        kind,
        Kind::ConnectFailure
            | Kind::TlsFailure
            | Kind::IdentityMismatch
            | Kind::UpstreamReset
            | Kind::RefusedStream
            | Kind::Timeout
    )
}

/// A cluster with outlier detection, and when it is due to be looked at.
struct Watched {
    cluster: Arc<Cluster>,
    due: Instant,
}

/// Lets ejected endpoints come back in time, for as long as there is a configuration to follow.
pub async fn watch_endpoints(reporter: Arc<Reporter>, mut snapshots: watch::Receiver<Arc<Snapshot>>) {
    let (mut watched, mut before) = (HashMap::new(), SharedMap::default());
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        if !follow_changes(&snapshot, &before, &mut watched) {
            watched = follow(&snapshot, &watched);
        }
        before = snapshot.services.clone();
        drop(snapshot);
        let due = watched.values().map(|one| one.due).min();
        let sleep = async {
            match due {
                Some(due) => sleep_until(due).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = sleep => {}
            changed = snapshots.changed() => if changed.is_err() { return },
        }
        let now = Instant::now();
        for one in watched.values_mut().filter(|one| one.due <= now) {
            let Some(rule) = &one.cluster.outlier else { continue };
            for endpoint in outlier::sweep(&one.cluster, rule, now) {
                reporter.given_back(&one.cluster, endpoint);
            }
            one.due = now + rule.interval;
        }
    }
}

type Key = (Arc<str>, Option<Arc<str>>);

/// Watches the clusters of services that have changed; false where some are no longer led to from there: they may be from
/// elsewhere.
fn follow_changes(
    snapshot: &Snapshot,
    before: &SharedMap<Arc<str>, Arc<Service>>,
    watched: &mut HashMap<Key, Watched>,
) -> bool {
    let changes = snapshot.services.changes(before, Arc::ptr_eq);
    for (_, was, now) in changes {
        let keys: HashSet<Key> = now.into_iter().flat_map(|service| service.clusters()).map(key).collect();
        if was.into_iter().flat_map(|service| service.clusters()).any(|cluster| !keys.contains(&key(cluster)))
        {
            return false;
        }
        for cluster in now.into_iter().flat_map(|service| service.clusters()) {
            match cluster.outlier.as_ref() {
                Some(rule) => watch(watched, cluster, rule),
                None => drop(watched.remove(&key(cluster))),
            }
        }
    }
    true
}

fn key(cluster: &Arc<Cluster>) -> Key {
    (Arc::clone(&cluster.name), cluster.view.clone())
}

fn watch(watched: &mut HashMap<Key, Watched>, cluster: &Arc<Cluster>, rule: &OutlierDetection) {
    let next = Instant::now() + rule.interval;
    let due = watched.get(&key(cluster)).map_or(next, |known| known.due.min(next));
    watched.insert(key(cluster), Watched { cluster: Arc::clone(cluster), due });
}

/// What is to be watched now; what was before keeps its time.
fn follow(snapshot: &Snapshot, before: &HashMap<Key, Watched>) -> HashMap<Key, Watched> {
    let now = Instant::now();
    let with_rule = snapshot.clusters().filter_map(|cluster| Some((cluster, cluster.outlier.as_ref()?)));
    with_rule
        .map(|(cluster, rule)| {
            let key = key(cluster);
            let next = now + rule.interval;
            let due = before.get(&key).map_or(next, |known| known.due.min(next));
            (key, Watched { cluster: Arc::clone(cluster), due })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use http::HeaderValue;
    use tokio::time::{Instant, sleep};

    use super::*;
    use crate::{
        report::samples,
        state::{
            defaults,
            snapshot::{ServicePort, Visibility},
        },
    };

    /// The configuration with one service, whose port has this cluster.
    fn snapshot(cluster: &Arc<Cluster>) -> Arc<Snapshot> {
        let port = ServicePort {
            port: 9080,
            protocol: None,
            routes: Arc::new([]),
            streams: Arc::new([]),
            cluster: Arc::clone(cluster),
        };
        let service = Service {
            host: "a".into(),
            name: "a".into(),
            namespace: "default".into(),
            vips: Vec::new(),
            headless: false,
            visible: Visibility::Everywhere,
            ports: [port].into(),
            views: HashMap::new(),
        };
        Arc::new(Snapshot {
            services: SharedMap::from_iter([("a".into(), Arc::new(service))]),
            ..Snapshot::default()
        })
    }

    /// Two endpoints that are looked at every two seconds and are away for five at least.
    fn cluster() -> Arc<Cluster> {
        let rule = OutlierDetection {
            interval: Duration::from_secs(2),
            base_ejection_time: Duration::from_secs(5),
            max_ejection_percent: 100,
            ..defaults::OUTLIER_DETECTION
        };
        let endpoint = |host| Arc::new(Endpoint::alone(([10, 0, 0, host], 80).into(), None));
        let endpoints = vec![endpoint(1), endpoint(2)];
        Arc::new(Cluster { endpoints, outlier: Some(rule), ..Cluster::clone(&samples::cluster("a")) })
    }

    fn fail(cluster: &Cluster) {
        let failed = |_| outlier::learn(cluster, &cluster.endpoints[0], Outcome::Failed);
        assert!((0..5).filter_map(failed).count() == 1, "five failures eject once");
    }

    /// Seconds until the first endpoint is back, while the configuration changes so often.
    async fn back_after(changes: Duration) -> u64 {
        let cluster = cluster();
        let (sender, receiver) = watch::channel(snapshot(&cluster));
        let watching = tokio::spawn(watch_endpoints(Arc::default(), receiver));
        fail(&cluster);
        let begun = Instant::now();
        while cluster.endpoints[0].state.health.is_ejected() {
            assert!(begun.elapsed() < Duration::from_mins(1), "it never comes back");
            sleep(changes).await;
            sender.send_replace(snapshot(&cluster));
        }
        drop(sender);
        assert!(watching.await.is_ok(), "it ends with the configuration");
        begun.elapsed().as_secs()
    }

    #[tokio::test(start_paused = true)]
    async fn the_ejected_come_back_in_time_however_often_the_configuration_changes() {
        // At the third look: the first after five seconds.
        assert_eq!(back_after(Duration::from_millis(700)).await, 6);
        assert_eq!(back_after(Duration::from_millis(50)).await, 6);
    }

    #[test]
    fn what_the_agent_of_the_endpoint_refuses_says_nothing_of_the_endpoint() {
        let answered = |status: u16| {
            Response::builder()
                .status(status)
                .body(())
                .map_err(|error| Error::new(Kind::BadRequest, error.to_string()))
        };
        assert_eq!(of_try(&answered(503)), Some(Outcome::Answered(503)));
        let by_grpc = answered(200).map(|mut response| {
            response.headers_mut().insert("grpc-status", HeaderValue::from_static("14"));
            response
        });
        assert_eq!(of_try(&by_grpc), Some(Outcome::Answered(503)), "as in Envoy");
        let refused = by_grpc.map(|mut response| {
            tunnel::tell_failure(response.headers_mut(), Kind::RateLimited);
            tunnel::note_refusal(&mut response);
            response
        });
        assert_eq!(of_try(&refused), None);
        let failed = |kind| of_try::<()>(&Err(Error::new(kind, "")));
        assert_eq!(failed(Kind::UpstreamReset), Some(Outcome::Failed));
        assert_eq!((failed(Kind::RateLimited), failed(Kind::Denied)), (None, None));
    }

    #[test]
    fn what_fails_fast_is_not_fast() {
        let answered = |status: u16| {
            let mut response = Response::new(());
            *response.status_mut() = StatusCode::from_u16(status).unwrap_or_default();
            response
        };
        let with = |mut response: Response<()>, name: &'static str, value: &'static str| {
            response.headers_mut().insert(name, HeaderValue::from_static(value));
            response
        };
        let refused = |kind| {
            let mut response = answered(403);
            tunnel::tell_failure(response.headers_mut(), kind);
            tunnel::note_refusal(&mut response);
            response
        };
        let failed = |kind| Err(Error::new(kind, ""));
        let table = [
            (Ok(answered(200)), Pace::Answered),
            (Ok(answered(404)), Pace::Answered),
            (Ok(answered(429)), Pace::Answered),
            (Ok(answered(500)), Pace::Failed),
            (Ok(answered(503)), Pace::Failed),
            (Ok(with(answered(200), "grpc-status", "0")), Pace::Answered),
            (Ok(with(answered(200), "grpc-status", "5")), Pace::Answered),
            (Ok(with(answered(200), "grpc-status", "14")), Pace::Failed),
            (Ok(refused(Kind::Denied)), Pace::Unknown),
            (Ok(refused(Kind::RateLimited)), Pace::Failed),
            (failed(Kind::Overload), Pace::Failed),
            (failed(Kind::ConcurrencyLimit), Pace::Failed),
            (failed(Kind::RateLimited), Pace::Failed),
            (failed(Kind::ConnectFailure), Pace::Failed),
            (failed(Kind::Timeout), Pace::Failed),
            (failed(Kind::Denied), Pace::Unknown),
            (failed(Kind::DownstreamReset), Pace::Unknown),
        ];
        for (result, pace) in table {
            assert_eq!(pace_of_try(&result), pace, "{result:?}");
        }
    }
}
