//! What the path learns of its endpoints' health, and their coming back.

use std::{collections::HashMap, sync::Arc};

use http::Response;
use tokio::{
    sync::watch,
    time::{Instant, sleep_until},
};

use crate::{
    balance::outlier::{self, Outcome},
    error::{Kind, Result, http_of},
    report::Reporter,
    state::snapshot::{Cluster, Endpoint, Snapshot},
    upstream::{Switched, retry},
};

/// Takes into account what a try came to.
pub(super) fn learn<B>(
    reporter: &Reporter,
    cluster: &Cluster,
    endpoint: &Endpoint,
    result: &Result<Response<B>>,
) {
    if cluster.outlier.is_some()
        && let Some(outcome) = of_try(result)
    {
        note(reporter, cluster, endpoint, outcome);
    }
}

/// The same of a request for another protocol.
pub(super) fn learn_switched(
    reporter: &Reporter,
    cluster: &Cluster,
    endpoint: &Endpoint,
    result: &Result<Switched>,
) {
    match result {
        Ok(Switched::Answered(response)) if cluster.outlier.is_some() => {
            note(reporter, cluster, endpoint, Outcome::Answered(response.status().as_u16()));
        }
        result => learn_opened(reporter, cluster, endpoint, result),
    }
}

/// The same of a connection of opaque bytes.
pub(super) fn learn_opened<T>(
    reporter: &Reporter,
    cluster: &Cluster,
    endpoint: &Endpoint,
    result: &Result<T>,
) {
    if cluster.outlier.is_none() {
        return;
    }
    match result {
        Ok(_) => note(reporter, cluster, endpoint, Outcome::Connected),
        Err(error) if is_the_endpoints(error.kind) => note(reporter, cluster, endpoint, Outcome::Failed),
        Err(_) => {}
    }
}

fn note(reporter: &Reporter, cluster: &Cluster, endpoint: &Endpoint, outcome: Outcome) {
    if let Some(reason) = outlier::learn(cluster, endpoint, outcome) {
        reporter.ejected(cluster, endpoint, reason.name());
    }
}

/// `None`: it says nothing about the endpoint. A gRPC status that stands in the head counts as the HTTP status that it
/// means, as in Envoy.
fn of_try<B>(result: &Result<Response<B>>) -> Option<Outcome> {
    match result {
        Ok(response) => {
            let grpc = retry::grpc_status(response.headers());
            let status = grpc.map_or(response.status(), http_of);
            Some(Outcome::Answered(status.as_u16()))
        }
        Err(error) => is_the_endpoints(error.kind).then_some(Outcome::Failed),
    }
}

/// What is denied, or cut off by the client, is not the endpoint's fault.
const fn is_the_endpoints(kind: Kind) -> bool {
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
    let mut watched = HashMap::new();
    loop {
        watched = follow(&snapshots.borrow_and_update(), &watched);
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

/// What is to be watched now; what was before keeps its time.
fn follow(snapshot: &Snapshot, before: &HashMap<Key, Watched>) -> HashMap<Key, Watched> {
    let now = Instant::now();
    let with_rule = snapshot.clusters().filter_map(|cluster| Some((cluster, cluster.outlier.as_ref()?)));
    with_rule
        .map(|(cluster, rule)| {
            let key = (Arc::clone(&cluster.name), cluster.view.clone());
            let next = now + rule.interval;
            let due = before.get(&key).map_or(next, |known| known.due.min(next));
            (key, Watched { cluster: Arc::clone(cluster), due })
        })
        .collect()
}
