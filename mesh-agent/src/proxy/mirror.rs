//! Copies of requests for mirrors: sent and forgotten.
//!
//! Promises that the request itself never feels it: nothing waits for a mirror, its answer goes nowhere, and what it
//! cannot take is dropped. Bodies are copied up to the limit of [`crate::body::LIMIT`]: what is declared longer is not
//! sent at all, what turns out longer is broken off.
//! So many copies are under way to a cluster at a time, and no more. Tested in the lab (`tests/tests/http/mirror.rs`).

use std::{net::SocketAddr, sync::Arc, time::Duration};

use http::{HeaderValue, Request};
use http_body::Body as _;
use tokio::time::timeout;

use super::{
    Mesh,
    cut::unless_cut,
    errand::{Errand, What},
    headers, health,
    outbound::Outbound,
    tries::{Sendable, UnderWay},
};
use crate::{
    body::{Body, Follow},
    error::{Error, Kind, Result},
    route,
    state::snapshot::{Backend, Cluster, HttpRoute},
    upstream::Pod,
};

/// How long a mirror may take where the route has no timeout of its own.
const LIMIT: Duration = Duration::from_mins(1);

/// What is counted of a copy whose body is beyond the limit.
const TOO_LONG: &str = "body_too_long";

/// What is counted in the place of a cluster that there is not.
const UNKNOWN: &str = "unknown";

/// Sends copies to those mirrors of the route whose turn it is; `within`: the time that the request itself has.
pub(super) fn send(
    outbound: &Arc<Outbound>,
    route: &HttpRoute,
    within: Option<Duration>,
    request: &Sendable,
    grpc: bool,
) {
    for mirror in route.mirrors.iter().filter(|mirror| route::hits(mirror.percentage)) {
        let cluster = match &mirror.backend {
            Backend::Cluster(cluster) => cluster,
            Backend::Missing(what) => {
                tracing::debug!(route = %route.origin, "a mirror gets nothing: {what}");
                outbound.mesh.reporter.mirrored(UNKNOWN, Kind::NoHealthyUpstream.row().word);
                continue;
            }
        };
        if request.is_too_long() {
            outbound.mesh.reporter.mirrored(&cluster.name, TOO_LONG);
            continue;
        }
        let mut parts = request.parts().clone();
        parts.headers.insert(headers::ATTEMPT_COUNT, HeaderValue::from(1u32));
        let Some(place) = UnderWay::mirror(cluster) else {
            outbound.mesh.reporter.mirrored(&cluster.name, Kind::Overflow.row().word);
            continue;
        };
        let follow = request.follow();
        let fate = follow.as_ref().map(Follow::fate);
        let copy = Request::from_parts(parts, follow.map_or(Body::Empty, Body::Follow));
        // Not the connection: its place among the pod's is free again when its client has gone.
        let (mesh, pod) = (Arc::clone(&outbound.mesh), Arc::clone(&outbound.pod));
        let (ends, cluster) = ((outbound.shown, outbound.dialled()), Arc::clone(cluster));
        let limit = within.unwrap_or(LIMIT).min(route.timeout.unwrap_or(LIMIT));
        tokio::spawn(async move {
            let _place = place;
            let sent = timeout(limit, one(&mesh, &pod, ends, &cluster, copy, grpc)).await;
            let outcome = match &sent {
                Ok(Ok(())) => "answered",
                // Not the mirror's fault.
                _ if fate.is_some_and(|fate| fate.was_too_long()) => TOO_LONG,
                Ok(Err(error)) => error.kind.row().word,
                Err(_) => Kind::Timeout.row().word,
            };
            if let Ok(Err(error)) = &sent {
                tracing::debug!(cluster = %cluster.name, %error, "a mirror has not answered");
            }
            mesh.reporter.mirrored(&cluster.name, outcome);
        });
    }
}

async fn one(
    mesh: &Mesh,
    pod: &Pod,
    (client, dialled): (SocketAddr, SocketAddr),
    cluster: &Arc<Cluster>,
    mut request: Request<Body>,
    grpc: bool,
) -> Result<()> {
    let cluster = super::serving(mesh, cluster, || pod.workload());
    let protocol = super::http::upstream_protocol(cluster, super::http::version_of(&request), grpc);
    let errand = Errand::new(mesh, pod, cluster, protocol, client).for_client(dialled).counted();
    let _place = errand.place().await?;
    let mut chosen = errand.choose(&request, &[], Some(dialled))?;
    let endpoint = Arc::clone(&chosen.endpoint);
    let (way, mut standing) = errand.way(&endpoint, &mut request, What::Request).await?;
    let sending = async {
        let sent = errand.send(&endpoint, &way, request).await;
        health::timed(Some(&mut chosen), health::pace_of_sent(&sent));
        let (response, lease) = sent?;
        // Read to its end, so that the connection can be used again.
        let mut body = response.into_body();
        while let Some(frame) = std::future::poll_fn(|cx| std::pin::Pin::new(&mut body).poll_frame(cx)).await
        {
            frame.map_err(|error| Error::new(Kind::UpstreamReset, error.to_string()))?;
        }
        lease.finished();
        Ok(())
    };
    unless_cut(standing.as_mut(), std::pin::pin!(sending)).await?;
    Ok(())
}
