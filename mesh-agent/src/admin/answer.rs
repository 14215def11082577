//! The answers of the agent's own endpoints.
//!
//! Promises JSON for machines, with errors as one sentence of text that says what to do. Tested in `tests.rs`.

use std::{net::IpAddr, sync::Arc};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use serde::Serialize;
use tokio::sync::{broadcast::error::RecvError, mpsc};
use tokio_util::sync::CancellationToken;

use super::{FlowEvent, HealthView, Readiness, Reply, State, VersionView, dump, endpoints};
use crate::report::{FlowView, Reporter};

const PATHS: &str =
    "/config_dump, /endpoints, /pods, /flows, /certs, /logging, /overload, /version, /healthz";
const OPENMETRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
const JSON: &str = "application/json";
const JSON_LINES: &str = "application/x-ndjson";
const TEXT: &str = "text/plain; charset=utf-8";
/// Pieces of a followed answer that wait for a slow reader; beyond it the flows wait, and then are lost, in the
/// reporter's queue.
const PIECES: usize = 64;

type Answer = Response<Reply>;

fn answer(status: StatusCode, content_type: &'static str, body: Reply) -> Answer {
    let mut response = Response::new(body);
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(content_type));
    response
}

fn sentence(status: StatusCode, text: impl Into<String>) -> Answer {
    let mut text = text.into();
    text.push('\n');
    answer(status, TEXT, Reply::Full(Some(text.into())))
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    match serde_json::to_vec(value) {
        Ok(body) => answer(status, JSON, Reply::Full(Some(body.into()))),
        Err(error) => sentence(StatusCode::INTERNAL_SERVER_ERROR, format!("writing JSON: {error}")),
    }
}

fn not_allowed(allowed: &'static str) -> Answer {
    let mut response = sentence(StatusCode::METHOD_NOT_ALLOWED, format!("use {allowed}"));
    response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static(allowed));
    response
}

/// `/metrics`.
pub(super) async fn metrics<B>(request: &Request<B>, reporter: Arc<Reporter>) -> Answer {
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/metrics") => {
            // Tens of thousands of series take tens of milliseconds: not on a thread that moves traffic.
            match tokio::task::spawn_blocking(move || reporter.exposition()).await {
                Ok(text) => answer(StatusCode::OK, OPENMETRICS, Reply::Full(Some(text.into()))),
                Err(error) => {
                    sentence(StatusCode::INTERNAL_SERVER_ERROR, format!("writing metrics: {error}"))
                }
            }
        }
        (_, "/metrics") => not_allowed("GET"),
        _ => sentence(StatusCode::NOT_FOUND, "there is only /metrics"),
    }
}

/// `/healthz/ready`.
pub(super) fn ready<B>(request: &Request<B>, readiness: &Readiness) -> Answer {
    match (request.method(), request.uri().path()) {
        (&Method::GET | &Method::HEAD, "/healthz/ready") => {
            let view: HealthView = readiness.view();
            json(if view.ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE }, &view)
        }
        (_, "/healthz/ready") => not_allowed("GET, HEAD"),
        _ => sentence(StatusCode::NOT_FOUND, "there is only /healthz/ready"),
    }
}

/// The operator's endpoints.
pub(super) async fn admin<B>(
    request: &Request<B>,
    tcp: bool,
    state: &State,
    stop: &CancellationToken,
) -> Answer {
    if tcp && !is_addressed_here(request) {
        return sentence(
            StatusCode::FORBIDDEN,
            "the Host header names no loopback address: a web page may not read this agent through a browser",
        );
    }
    let query = Query(request.uri().query().unwrap_or_default());
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/config_dump") => {
            let snapshot = state.snapshot.borrow().clone();
            json(StatusCode::OK, &dump::config(&snapshot, &(state.problems)()))
        }
        (&Method::GET, "/endpoints") => {
            let snapshot = state.snapshot.borrow().clone();
            json(StatusCode::OK, &endpoints::endpoints(&snapshot))
        }
        (&Method::GET, "/flows") => flows(&query, state, stop).await,
        (&Method::GET, "/pods") => json(StatusCode::OK, &(state.pods)()),
        (&Method::GET, "/certs") => json(StatusCode::OK, &(state.certificates)()),
        (&Method::GET, "/overload") => json(StatusCode::OK, &(state.overload)()),
        (&Method::GET, "/version") => json(
            StatusCode::OK,
            &VersionView { component: "mesh-agent".to_owned(), version: state.version.to_owned() },
        ),
        (&Method::GET, "/healthz") => json(StatusCode::OK, &state.readiness.view()),
        (&Method::GET, "/logging") => sentence(StatusCode::OK, (state.log_level.show)()),
        (&Method::POST, "/logging") => set_log_level(&query, state),
        (_, "/logging") => not_allowed("GET, POST"),
        (
            _,
            "/config_dump" | "/endpoints" | "/pods" | "/flows" | "/certs" | "/overload" | "/version"
            | "/healthz",
        ) => not_allowed("GET"),
        (_, path) => sentence(StatusCode::NOT_FOUND, format!("there is no {path}, only {PATHS}")),
    }
}

/// Against DNS rebinding: a name that an attacker points at 127.0.0.1 is in the Host header of a browser's request.
fn is_addressed_here<B>(request: &Request<B>) -> bool {
    let Some(host) = request.headers().get(header::HOST).and_then(|host| host.to_str().ok()) else {
        return false;
    };
    let Ok(authority) = host.parse::<http::uri::Authority>() else { return false };
    let name = authority.host().trim_start_matches('[').trim_end_matches(']');
    name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.to_canonical().is_loopback())
}

fn set_log_level(query: &Query<'_>, state: &State) -> Answer {
    let Some(level) = query.get("level") else {
        return sentence(
            StatusCode::BAD_REQUEST,
            "say what to log, for example POST /logging?level=info,mesh_agent=debug",
        );
    };
    match (state.log_level.set)(&level) {
        Ok(()) => {
            tracing::info!(level, "log level set by the operator");
            sentence(StatusCode::OK, (state.log_level.show)())
        }
        Err(error) => sentence(StatusCode::BAD_REQUEST, format!("level `{level}`: {error}")),
    }
}

/// Which flows are wanted.
#[derive(Debug, Clone, Default)]
struct Filter {
    namespace: Option<String>,
    pod: Option<String>,
}

impl Filter {
    fn admits(&self, flow: &FlowView) -> bool {
        let is = |wanted: &Option<String>, has: &Option<String>| wanted.is_none() || wanted == has;
        is(&self.namespace, &flow.namespace) && is(&self.pod, &flow.pod)
    }
}

async fn flows(query: &Query<'_>, state: &State, stop: &CancellationToken) -> Answer {
    let filter = Filter { namespace: query.get("namespace"), pod: query.get("pod") };
    let follow = matches!(query.get("follow").as_deref(), Some("true" | "1"));
    // Before the list is read, so that a flow that ends in between is told twice rather than never.
    let closed = follow.then(|| state.reporter.follow());
    let read = state.flows.clone();
    let mut flows = match tokio::task::spawn_blocking(move || read()).await {
        Ok(Ok(flows)) => flows,
        Ok(Err(error)) => {
            return sentence(StatusCode::INTERNAL_SERVER_ERROR, format!("reading flows: {error:#}"));
        }
        Err(error) => return sentence(StatusCode::INTERNAL_SERVER_ERROR, format!("reading flows: {error}")),
    };
    flows.retain(|flow| filter.admits(flow));
    // The kernel's tables have no order; times of one form are in order as texts.
    flows.sort_by(|a, b| (&a.start, a.socket).cmp(&(&b.start, b.socket)));
    let Some(mut closed) = closed else { return json(StatusCode::OK, &flows) };
    let (pieces, body) = mpsc::channel(PIECES);
    let stop = stop.clone();
    tokio::spawn(async move {
        for flow in flows {
            if !tell(&pieces, &FlowEvent::Flow(Box::new(flow))).await {
                return;
            }
        }
        if !tell(&pieces, &FlowEvent::Listed).await {
            return;
        }
        loop {
            let event = tokio::select! {
                () = stop.cancelled() => return,
                () = pieces.closed() => return,
                event = closed.recv() => event,
            };
            let event = match event {
                Ok(flow) if !filter.admits(&flow) => continue,
                Ok(flow) => FlowEvent::Flow(Box::new(FlowView::clone(&flow))),
                Err(RecvError::Lagged(lost)) => FlowEvent::Lost(lost),
                Err(RecvError::Closed) => return,
            };
            if !tell(&pieces, &event).await {
                return;
            }
        }
    });
    answer(StatusCode::OK, JSON_LINES, Reply::Stream(body))
}

/// Sends one line. Whether the reader is still there.
async fn tell(pieces: &mpsc::Sender<Bytes>, event: &FlowEvent) -> bool {
    let Ok(mut line) = serde_json::to_vec(event) else { return true };
    line.push(b'\n');
    pieces.send(line.into()).await.is_ok()
}

/// The query of a URI.
struct Query<'a>(&'a str);

impl Query<'_> {
    fn get(&self, name: &str) -> Option<String> {
        self.0.split('&').find_map(|pair| {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            (key == name).then(|| decoded(value))
        })
    }
}

/// Percent-decoding. What is not a valid escape stays as it is.
fn decoded(value: &str) -> String {
    let mut out = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let [first, after @ ..] = rest {
        let escaped = after.first_chunk::<2>().filter(|_| *first == b'%');
        let byte = escaped
            .and_then(|hex| std::str::from_utf8(hex).ok())
            .and_then(|hex| u8::from_str_radix(hex, 16).ok());
        out.push(byte.unwrap_or(*first));
        rest = if byte.is_some() { &after[2..] } else { after };
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queries_are_decoded() {
        let query = Query("a=1&level=info%2Cmesh%3Ddebug&bad=%zz%2&flag");
        assert_eq!(query.get("level").as_deref(), Some("info,mesh=debug"));
        assert_eq!(query.get("bad").as_deref(), Some("%zz%2"));
        assert_eq!(query.get("flag").as_deref(), Some(""));
        assert_eq!(query.get("b"), None);
    }

    #[test]
    fn only_loopback_hosts_are_answered() -> Result<(), http::Error> {
        for (host, ok) in [
            ("127.0.0.1:15000", true),
            ("[::1]:15000", true),
            ("localhost", true),
            ("evil.example:15000", false),
            ("10.0.0.1", false),
            ("", false),
        ] {
            let request = Request::builder().header(header::HOST, host).body(())?;
            assert_eq!(is_addressed_here(&request), ok, "{host}");
        }
        assert!(!is_addressed_here(&Request::new(())));
        Ok(())
    }
}
