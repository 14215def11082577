//! The requests that a hyper server reads, with the edge in front of it and without.

use std::{cell::RefCell, convert::Infallible, rc::Rc, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, StatusCode, Version, header};
use http_body_util::{BodyExt, Empty};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use mesh_agent::http1::{Edge, Gate};
use tokio::io::{AsyncRead, AsyncWrite};

use super::{Way, by_rule::Message, pieces::Pieces};

/// What hyper's service is called with, behind the edge.
pub fn behind_the_edge(bytes: &[u8], way: Way<'_>) -> Vec<Message> {
    let (edge, gate) = Edge::new(Pieces::new(bytes, way.sizes), way.limits);
    serve(edge, Some(gate))
}

/// The same without the edge, for bytes that have passed it.
pub fn without_the_edge(bytes: &[u8]) -> Vec<Message> {
    serve(Pieces::new(bytes, &[0]), None)
}

fn serve<S: AsyncRead + AsyncWrite + Unpin + 'static>(io: S, gate: Option<Arc<Gate>>) -> Vec<Message> {
    let seen = Rc::new(RefCell::new(Vec::new()));
    let messages = Rc::clone(&seen);
    let service = service_fn(move |request| answer(gate.clone(), Rc::clone(&messages), request));
    let mut builder = http1::Builder::new();
    builder.half_close(true).max_buf_size(60 << 10);
    let connection = builder.serve_connection(TokioIo::new(io), service);
    let ended = RUNTIME.with(|runtime| runtime.block_on(connection));
    if let Err(error) = ended {
        assert!(!error.is_parse(), "hyper refuses what has passed: {error}");
    }
    seen.take()
}

thread_local! {
    static RUNTIME: tokio::runtime::Runtime = match tokio::runtime::Builder::new_current_thread().enable_time().build() {
        Ok(runtime) => runtime,
        Err(error) => panic!("no runtime: {error}"),
    };
}

async fn answer(
    gate: Option<Arc<Gate>>,
    seen: Rc<RefCell<Vec<Message>>>,
    request: Request<Incoming>,
) -> Result<Response<Empty<Bytes>>, Infallible> {
    let refused = gate.as_ref().and_then(|gate| gate.next_request());
    let stand_in = request.headers().get(header::HOST).is_some_and(|host| host == "refused");
    assert!(refused.is_none() || stand_in, "{refused:?} met another request");
    if let Some(gate) = &gate {
        gate.switched(false);
    }
    // hyper, too, is done after any of these.
    let last = request.version() == Version::HTTP_10 || request.headers().contains_key(header::CONNECTION);
    let (head, body) = request.into_parts();
    let body = body.collect().await.ok().map(|body| body.to_bytes().to_vec());
    let gate_refuses = gate.is_some_and(|gate| gate.body_refusal().is_some());
    assert!(body.is_none() || !gate_refuses, "a refused body was read to its end");
    seen.borrow_mut().push(Message { method: head.method.to_string(), target: head.uri.to_string(), body });
    let mut response = Response::new(Empty::new());
    *response.status_mut() = StatusCode::NOT_FOUND;
    if last {
        response.headers_mut().insert(header::CONNECTION, http::HeaderValue::from_static("close"));
    }
    Ok(response)
}
