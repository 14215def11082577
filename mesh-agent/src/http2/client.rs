//! One request on a connection that others share.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, Waker},
};

use bytes::Bytes;
use h2::{
    Reason,
    client::{ResponseFuture, SendRequest},
};
use http::{Request, Response};
use http_body::Body as _;
use tokio_util::sync::CancellationToken;

use super::pipe::Pipe;
use crate::body::{Body, Inform, Received};

/// Sends a request and waits for the head of its response; the bodies go on by themselves. Waits for as long as the
/// peer's limit of streams is reached. Interim responses go to `inform`.
///
/// Dropped before it completes, the stream is reset with `CANCEL`, and so it is when the response is dropped before its
/// end.
///
/// # Errors
/// What became of the stream or its connection.
pub async fn send(
    connection: SendRequest<Bytes>,
    request: Box<Request<Body>>,
    inform: Option<&dyn Inform>,
) -> Result<Response<Body>, Failed> {
    let unsent = |error| Failed { error, untouched: true };
    let mut connection = connection.ready().await.map_err(unsent)?;
    let (parts, body) = request.into_parts();
    let no_body = body.is_end_stream();
    let sent = connection.send_request(Request::from_parts(parts, ()), no_body);
    let (response, stream) = sent.map_err(unsent)?;
    let waiting = CancellationToken::new();
    let given_up = waiting.clone().drop_guard();
    let mut sending = false;
    if !no_body {
        let mut pipe = Pipe::new(body, stream);
        // Most bodies are here already and through at once.
        let begun = poll_fn(|cx| Poll::Ready(Pin::new(&mut pipe).poll(cx).is_ready())).await;
        if !begun {
            sending = true;
            tokio::spawn(go_on(pipe, waiting));
        }
    }
    let response = head(response, inform).await.map_err(Failed::from)?;
    let (parts, stream) = response.into_parts();
    let body = Body::from(Received::new(&parts.headers, stream));
    // The rest of the request is sent for as long as somebody wants its response.
    let body = if sending { body.held(Arc::new(given_up)) } else { body };
    Ok(Response::from_parts(parts, body))
}

/// Sends the rest of a request's body until nobody waits for its response any more.
async fn go_on(mut pipe: Pipe<Body>, given_up: CancellationToken) {
    tokio::select! {
        biased;
        _ = &mut pipe => {}
        () = given_up.cancelled() => pipe.reset(Reason::CANCEL),
    }
}

async fn head(
    mut response: ResponseFuture,
    inform: Option<&dyn Inform>,
) -> Result<Response<h2::RecvStream>, h2::Error> {
    poll_fn(|cx| {
        if let Some(inform) = inform {
            while let Poll::Ready(Some(interim)) = response.poll_informational(cx) {
                let interim = interim?;
                inform.inform(interim.status(), interim.headers());
            }
        }
        Pin::new(&mut response).poll(cx)
    })
    .await
}

/// Whether no stream can be opened any more: the connection has ended, or the peer says it will (GOAWAY).
pub fn is_closed(connection: &SendRequest<Bytes>) -> bool {
    // The clone has no stream of its own to wait for: only those two are errors here.
    let mut cx = Context::from_waker(Waker::noop());
    matches!(connection.clone().poll_ready(&mut cx), Poll::Ready(Err(_)))
}

/// Why a request was not answered.
#[derive(Debug)]
pub struct Failed {
    /// What became of its stream or connection.
    pub error: h2::Error,
    /// It was never sent, or the peer says that it has not looked at it, so that it may be sent again:
    /// `REFUSED_STREAM`, or a GOAWAY that does not cover the stream (RFC 9113 §8.7).
    pub untouched: bool,
}

impl From<h2::Error> for Failed {
    fn from(error: h2::Error) -> Self {
        let refused = error.is_reset() && error.reason() == Some(Reason::REFUSED_STREAM);
        let untouched = error.is_remote() && (refused || error.is_go_away());
        Self { error, untouched }
    }
}
