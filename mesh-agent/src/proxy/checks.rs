//! Asks the endpoints of checked services whether they are well.
//!
//! Promises: one checker for each endpoint, whatever the number of pods and clusters that use it, and none while no pod of
//! this node does; each check leaves from the network namespace of a pod that has used the service lately, with that pod's
//! identity and by the way its requests take (mTLS to what is enrolled), never from the node; policies judge it as a request
//! of that pod, and where they refuse it, it says nothing of the endpoint's health. At most [`AT_ONCE`] are under way at a
//! time. When an endpoint goes and comes back is `balance/checks.rs`'s to say. Tested in the lab
//! (`tests/tests/health_checks.rs`).

mod grpc;

use std::{collections::HashMap, net::SocketAddr, ops::RangeInclusive, sync::Arc};

use ::http::{HeaderValue, Request, StatusCode, Uri, header::USER_AGENT, uri};
use http_body_util::{BodyExt as _, Limited};
use tokio::{
    sync::{Semaphore, watch},
    task::{AbortHandle, JoinSet},
};

use super::{
    Mesh,
    errand::{Errand, What},
    health, http as requests, permits, vouched,
};
use crate::{
    balance::checks::{self, Found, Turned},
    body::Body,
    error::{Error, Kind, Result},
    policy::Ruling,
    state::snapshot::{Checked, CheckedPort, Endpoint, HealthProbe, Protocol, SharedMap, Snapshot, Use},
    tunnel,
    upstream::{self, Destination, Kept, Pod},
};

/// Checks under way at a time. What is due beyond that waits: a node's checks are never a burst that its pods feel.
const AT_ONCE: usize = 64;

/// Largest answer that is read, so that the connection can be used again; of a longer one only the head counts.
const LARGEST_ANSWER: usize = 64 << 10;

/// What a check calls itself.
const AGENT: HeaderValue = HeaderValue::from_static("mesh-health-check");

/// One service's port, and the task that has its endpoints checked.
struct Watched {
    port: Arc<CheckedPort>,
    task: AbortHandle,
}

/// What every check shares.
struct Checker {
    mesh: Arc<Mesh>,
    places: Semaphore,
}

/// Checks for as long as there is a configuration to follow.
pub async fn check_endpoints(mesh: Arc<Mesh>, mut snapshots: watch::Receiver<Arc<Snapshot>>) {
    let checker = Arc::new(Checker { mesh, places: Semaphore::new(AT_ONCE) });
    let mut tasks = JoinSet::new();
    let mut watched: HashMap<(Arc<str>, u16), Watched> = HashMap::new();
    let mut before = SharedMap::default();
    loop {
        let snapshot = Arc::clone(&snapshots.borrow_and_update());
        let changes = snapshot.checked.changes(&before, Arc::ptr_eq);
        for (key, _, port) in &changes {
            let known = watched.remove(*key);
            let stays = |one: &Watched| port.is_some_and(|port| port.is_same(&one.port));
            if let Some(gone) = known.as_ref().filter(|one| !stays(one)) {
                gone.task.abort();
            }
            let Some(port) = port else { continue };
            let one = known.filter(stays).unwrap_or_else(|| {
                let task = tasks.spawn(watch_port(Arc::clone(&checker), Arc::clone(port)));
                Watched { port: Arc::clone(port), task }
            });
            watched.insert((*key).clone(), one);
        }
        let changed: Vec<&CheckedPort> =
            changes.iter().filter_map(|(_, _, port)| Some(&***port.as_ref()?)).collect();
        if !changes.is_empty() {
            checks::recount(&snapshot, &changed);
            checker.mesh.reporter.checked(&snapshot);
        }
        before = snapshot.checked.clone();
        // What was ended leaves nothing to be joined later.
        while tasks.try_join_next().is_some() {}
        if snapshots.changed().await.is_err() {
            return;
        }
    }
}

/// Has the endpoints of a port checked whenever pods of this node use it.
async fn watch_port(checker: Arc<Checker>, port: Arc<CheckedPort>) {
    let Some(usage) = port.cluster.standby.checks.clone() else { return };
    loop {
        checks::until_used(&usage).await;
        // Ended with this task, or when nobody uses the service any more.
        let mut checkers = JoinSet::new();
        for (endpoint, checked) in port.endpoints() {
            let (checker, port, usage) = (Arc::clone(&checker), Arc::clone(&port), Arc::clone(&usage));
            let (endpoint, checked) = (Arc::clone(endpoint), Arc::clone(checked));
            checkers.spawn(async move { checker.keep_asking(&port, &usage, &endpoint, &checked).await });
        }
        checks::until_unused(&usage).await;
        checkers.shutdown().await;
        for (endpoint, checked) in port.endpoints() {
            if checks::forget(checked) {
                checker.turned(&port, endpoint, &Turned::Healthy);
            }
        }
    }
}

impl Checker {
    async fn keep_asking(&self, port: &CheckedPort, usage: &Use, endpoint: &Endpoint, checked: &Checked) {
        let ask = || self.ask(port, usage, endpoint);
        let done = |found: &Found, turned: Option<Turned>| {
            self.mesh.reporter.health_check(&port.cluster, found_word(found));
            if let Found::Nothing(why) = found {
                let (service, endpoint) = (&port.cluster.host, endpoint.address);
                tracing::debug!(%service, %endpoint, why, "a health check came to nothing");
            }
            if let Some(turned) = turned {
                self.turned(port, endpoint, &turned);
            }
        };
        checks::keep_asking(&port.check, checked, &self.places, ask, done).await;
    }

    fn turned(&self, port: &CheckedPort, endpoint: &Endpoint, turned: &Turned) {
        let snapshot = self.mesh.snapshot();
        checks::recount(&snapshot, &[port]);
        self.mesh.reporter.checked(&snapshot);
        let (service, port, endpoint) = (&port.cluster.host, port.cluster.port, endpoint.address);
        match turned {
            Turned::Healthy => tracing::info!(%service, port, %endpoint, "endpoint is healthy"),
            Turned::Unhealthy(reason) => {
                tracing::info!(%service, port, %endpoint, reason, "endpoint is unhealthy");
            }
        }
    }

    /// One check, as a pod that uses the service.
    async fn ask(&self, port: &CheckedPort, usage: &Use, endpoint: &Endpoint) -> Found {
        let pod = usage.last().and_then(|(_, by)| self.mesh.pods.get(&by));
        let Some(pod) = pod else {
            return Found::Nothing("the pod that used the service has gone".to_owned());
        };
        let target = Endpoint::alone(port.target(endpoint), endpoint.workload.clone());
        let asked = Asked { mesh: &self.mesh, pod: &pod, port, target: &target };
        let answered = match &port.check.probe {
            HealthProbe::Tcp => asked.connect().await.map(|()| Found::Well),
            HealthProbe::Http { path, host, statuses } => {
                let host = host.as_ref().map_or(&*port.cluster.host, uri::Authority::as_str);
                asked.get(host, path.as_str(), statuses).await
            }
            HealthProbe::Grpc { service } => asked.call(service).await,
        };
        match answered {
            Ok(found) => found,
            Err(error) if health::is_the_endpoints(error.kind) => Found::Unwell(error.to_string()),
            Err(error) => Found::Nothing(error.to_string()),
        }
    }
}

/// The word in metrics.
const fn found_word(found: &Found) -> &'static str {
    match found {
        Found::Well => "success",
        Found::Unwell(_) => "failure",
        Found::Nothing(_) => "inconclusive",
    }
}

/// Who is asked, by whom.
struct Asked<'a> {
    mesh: &'a Mesh,
    pod: &'a Arc<Pod>,
    port: &'a CheckedPort,
    target: &'a Endpoint,
}

impl Asked<'_> {
    /// An address of the pod's own; a port that is nobody's.
    fn client(&self) -> SocketAddr {
        self.pod.vouched_address(SocketAddr::new(self.target.address.ip(), 0))
    }

    /// A connection, which is closed as soon as it is there.
    async fn connect(&self) -> Result<()> {
        let limit = self.port.cluster.connect_timeout;
        let via = upstream::via(&self.mesh.pods, &self.mesh.node, self.target, limit).await?;
        let own = vouched(&self.pod.workload());
        let from = permits::From { identity: own.identity.as_ref(), client: self.client() };
        let (ruling, _) = permits::connection_to(self.mesh, from, &via, self.target)?;
        let to = Destination {
            address: self.target.address,
            via: &via,
            protocol: Protocol::Opaque,
            connect_timeout: limit,
            kept: Kept::of(&self.port.cluster, None),
            flow: None,
        };
        match ruling {
            Ruling::Permitted(permit) => self.pod.open(&permit, &to, self.client()).await.map(drop),
            // Only requests are let in: a bare connection shows that the way is there, and no more.
            Ruling::BytesDecide => self.pod.pass(&to).await,
        }
    }

    async fn get(&self, host: &str, path: &str, statuses: &[RangeInclusive<u16>]) -> Result<Found> {
        let mut request = Request::new(Body::Empty);
        *request.uri_mut() = target_uri(host, path)?;
        let protocol = requests::upstream_protocol(&self.port.cluster, Protocol::Http1, false);
        let (status, answer) = self.send(request, protocol).await?;
        if answer.refused {
            return Ok(Found::Nothing(format!("refused by the agent of its node: {status}")));
        }
        let is_well = statuses.iter().any(|range| range.contains(&status.as_u16()));
        Ok(if is_well { Found::Well } else { Found::Unwell(format!("status {}", status.as_u16())) })
    }

    async fn call(&self, service: &str) -> Result<Found> {
        let mut request = grpc::check(service);
        *request.uri_mut() = target_uri(&self.port.cluster.host, grpc::METHOD)?;
        let (status, answer) = self.send(request, Protocol::Http2).await?;
        if answer.refused {
            return Ok(Found::Nothing(format!("refused by the agent of its node: {status}")));
        }
        Ok(grpc::answer(status, &answer))
    }

    async fn send(&self, mut request: Request<Body>, protocol: Protocol) -> Result<(StatusCode, Answer)> {
        request.headers_mut().insert(USER_AGENT, AGENT);
        let errand = Errand::new(self.mesh, self.pod, &self.port.cluster, protocol, self.client());
        let (way, _standing) = errand.way(self.target, &mut request, What::Request).await?;
        let (response, lease) = errand.send(self.target, &way, request).await?;
        let refused = tunnel::refusal(&response).is_some();
        let (head, body) = response.into_parts();
        let mut answer = Answer { refused, headers: head.headers, body: bytes::Bytes::new() };
        if let Ok(read) = Limited::new(body, LARGEST_ANSWER).collect().await {
            lease.finished();
            answer.headers.extend(read.trailers().cloned().unwrap_or_default());
            answer.body = read.to_bytes();
        }
        Ok((head.status, answer))
    }
}

/// What an endpoint has answered.
struct Answer {
    /// It was not the app that answered, but its agent, which has not asked it.
    refused: bool,
    /// Trailers among them.
    headers: ::http::HeaderMap,
    body: bytes::Bytes,
}

fn target_uri(host: &str, path: &str) -> Result<Uri> {
    let uri = Uri::builder().scheme("http").authority(host).path_and_query(path).build();
    uri.map_err(|error| Error::new(Kind::BadRequest, format!("http://{host}{path}: {error}")))
}
