//! Asks external authorizers (policies with the action CUSTOM) about requests and connections that come to a pod.
//!
//! Reads top to bottom: who is to be asked → what of the body it is shown → the call → its answer. Promises: the call leaves
//! from the pod's own network namespace and travels as the pod's own traffic does (mTLS to an authorizer in the mesh);
//! without an answer in time what is asked about is refused, unless the authorizer is said to fail open; nobody is asked
//! about a question to an authorizer, so that no question leads to others without end. Each question is counted. Tested in
//! the lab (`tests/tests/external_authorization.rs`); what questions and answers mean, in `policy/external`.

use std::{net::SocketAddr, sync::Arc};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Body as _;
use http_body_util::{BodyExt as _, Limited};
use tokio::time::timeout;

use super::{
    Mesh,
    errand::{Errand, What},
    health, http as requests, permits,
};
use crate::{
    body::Body,
    error::{Error, Kind, Result},
    policy::{
        self, Asked, Open,
        external::{self, Answer, Question, Shown, Subject},
        jwt::Claims,
    },
    report,
    state::snapshot::{CheckProtocol, Cluster, Protocol, Provider},
    upstream::{Pod, retry},
};

/// Largest answer that is read, bytes.
const LARGEST_ANSWER: usize = 1 << 20;

/// Endpoints that are dialled before there is no answer.
const TRIES: usize = 3;

/// What external authorizers have said yes to.
#[derive(Debug, Default)]
pub(super) struct Approved {
    /// Who has.
    pub by: Vec<Arc<Provider>>,
    /// What has become of the request.
    pub request: Vec<external::Change>,
    /// What becomes of the response.
    pub response: Vec<external::Change>,
}

/// Asks about a request, whose headers may be changed. What the answers leave of it, other policies are still to be asked
/// about.
///
/// # Errors
/// [`Kind::ExternalDenied`], [`Kind::ExternalError`], each with what the client is told.
pub(super) async fn request(
    mesh: &Mesh,
    pod: &Arc<Pod>,
    asked: &Asked<'_>,
    request: &mut Request<Body>,
    claims: Option<&Claims>,
) -> Result<Approved> {
    let mut approved = Approved::default();
    loop {
        let asked = Asked { approved: &approved.by, ..*asked };
        let next = policy::authorizer(&asked, Open::Request(permits::head(request, claims)));
        let Some(provider) = next.map(Arc::clone) else { return Ok(approved) };
        let shown = shown(&provider, request).await?;
        let (parts, body) = std::mem::take(request).into_parts();
        let subject = Subject::Request(&parts, shown);
        let answer = ask(mesh, pod, &provider, &asked, subject).await;
        *request = Request::from_parts(parts, body);
        let changes = answer?;
        external::change(request.headers_mut(), &changes.request);
        approved.request.extend(changes.request);
        approved.response.extend(changes.response);
        approved.by.push(provider);
    }
}

/// Asks about a connection whose bytes are no requests.
///
/// # Errors
/// As for requests.
pub(super) async fn connection(
    mesh: &Mesh,
    pod: &Arc<Pod>,
    asked: &Asked<'_>,
    server_name: Option<&str>,
) -> Result<Approved> {
    let mut approved = Approved::default();
    loop {
        let asked = Asked { approved: &approved.by, ..*asked };
        let next = policy::authorizer(&asked, Open::Opaque(server_name));
        let Some(provider) = next.map(Arc::clone) else { return Ok(approved) };
        ask(mesh, pod, &provider, &asked, Subject::Connection(server_name)).await?;
        approved.by.push(provider);
    }
}

/// As much of the body as the authorizer is to see.
async fn shown(provider: &Provider, request: &mut Request<Body>) -> Result<Shown> {
    let size = request.body().size_hint().exact();
    let Some(how) = provider.body else { return Ok(Shown { size, ..Shown::default() }) };
    let too_long = || {
        let text = format!("the body is longer than provider {:?} may be shown", provider.name);
        Error { answer: Some(Arc::new(external::too_long())), ..Error::new(Kind::ExternalDenied, text) }
    };
    if external::is_too_long(how, size) {
        return Err(too_long());
    }
    let beginning = request.body_mut().look_ahead(how.most).await.map_err(|error| {
        let text = format!("the body broke off while it was read for an authorizer: {error}");
        Error::new(Kind::DownstreamReset, text)
    })?;
    if beginning.partial && !how.partial {
        return Err(too_long());
    }
    Ok(Shown { body: Some(beginning.bytes), partial: beginning.partial, size })
}

/// One question and what comes of it.
async fn ask(
    mesh: &Mesh,
    pod: &Arc<Pod>,
    provider: &Arc<Provider>,
    asked: &Asked<'_>,
    what: Subject<'_>,
) -> Result<external::Changes> {
    let source = mesh.snapshot().workload_at(asked.client.ip()).cloned();
    let source = source.filter(|pod| asked.source.is_none_or(|proved| pod.identity == *proved));
    let question = Question { asked, source: source.as_deref(), what };
    let answer = match external::check(provider, &question) {
        Ok(check) => match timeout(provider.timeout, call(mesh, pod, provider, check, asked.client)).await {
            Ok(answered) => answered,
            Err(_) => Err(format!("no answer within {:?}", provider.timeout)),
        },
        Err(why) => Err(why),
    };
    let counted = |result| mesh.reporter.asked(&provider.name, result);
    match answer {
        Ok(Answer::Allowed(changes)) => {
            counted(report::Asked::Allowed);
            Ok(changes)
        }
        Ok(Answer::Denied(response)) => {
            counted(report::Asked::Denied);
            let text = format!("ext_authz_denied: provider {:?} says {}", provider.name, response.status());
            Err(Error { answer: Some(Arc::new(response)), ..Error::new(Kind::ExternalDenied, text) })
        }
        Err(why) if provider.fail_open => {
            counted(report::Asked::FailedOpen);
            tracing::debug!(provider = %provider.name, why, "let in without an answer of its authorizer");
            Ok(external::Changes::default())
        }
        Err(why) => {
            counted(report::Asked::Error);
            let text = format!("ext_authz_error: provider {:?}: {why}", provider.name);
            let response = external::no_answer(provider);
            Err(Error { answer: Some(Arc::new(response)), ..Error::new(Kind::ExternalError, text) })
        }
    }
}

/// Sends the question to one endpoint of the authorizer's service after the other, until one is reached.
async fn call(
    mesh: &Mesh,
    pod: &Arc<Pod>,
    provider: &Provider,
    check: Request<Bytes>,
    client: SocketAddr,
) -> std::result::Result<Answer, String> {
    let Provider { host, port, .. } = provider;
    let snapshot = mesh.snapshot();
    let service = snapshot.services.get(host).ok_or_else(|| format!("there is no service {host}"))?;
    let port = service.port_for(pod.workload().view(), *port);
    let cluster = &port.ok_or_else(|| format!("service {host} has no port {}", provider.port))?.cluster;
    let (check, question) = check.into_parts();
    let mut tried = Vec::new();
    loop {
        let request = Request::from_parts(check.clone(), Body::from(question.clone()));
        match one(mesh, pod, provider, cluster, request, client, &mut tried).await {
            Ok((response, trailers)) => return external::answer(provider, response, trailers.as_ref()),
            Err(error) if retry::is_unsent(error.kind) && tried.len() < TRIES => {}
            Err(error) => return Err(error.to_string()),
        }
    }
}

async fn one(
    mesh: &Mesh,
    pod: &Arc<Pod>,
    provider: &Provider,
    cluster: &Arc<Cluster>,
    mut request: Request<Body>,
    client: SocketAddr,
    tried: &mut Vec<SocketAddr>,
) -> Result<(Response<Bytes>, Option<HeaderMap>)> {
    let cluster = super::serving(mesh, cluster, || pod.workload());
    let protocol = match provider.protocol {
        CheckProtocol::Grpc => Protocol::Http2,
        CheckProtocol::Http(_) => requests::upstream_protocol(cluster, Protocol::Http1, false),
    };
    // At an address of the pod's own, and a port that tells its clients apart.
    let errand = Errand::new(mesh, pod, cluster, protocol, pod.vouched_address(client)).counted();
    let _place = errand.place().await?;
    let mut chosen = errand.choose(&request, tried, None)?;
    let endpoint = Arc::clone(&chosen.endpoint);
    tried.push(endpoint.address);
    let (way, _) = errand.way(&endpoint, &mut request, What::Question).await?;
    let sent = errand.send(&endpoint, &way, request).await;
    health::timed(Some(&mut chosen), health::pace_of_sent(&sent));
    let (response, lease) = sent?;
    let (head, body) = response.into_parts();
    let read = Limited::new(body, LARGEST_ANSWER).collect().await;
    let read = read.map_err(|error| Error::new(Kind::UpstreamReset, format!("its answer: {error}")))?;
    lease.finished();
    let trailers = read.trailers().cloned();
    Ok((Response::from_parts(head, read.to_bytes()), trailers))
}
