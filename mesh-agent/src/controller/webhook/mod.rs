//! The webhook that validates: the API server asks it before it takes an object of the mesh's kinds.
//!
//! Promises HTTPS with a certificate of the mesh's own authority, that whatever comes gets an answer, and bounds: connections,
//! time for a handshake and for a request, size of a request, and compilations at once. It says what is wrong with an object by
//! itself, and warns of how it stands to others; it never refuses for the latter, since those others may come later. Who asks is
//! not asked for: what is answered is of what was sent, and of names. Tested in `tests.rs`
//! ([why so](../../../../docs/decisions/040-validating-webhook.md)).

mod authority;
mod review;
#[cfg(test)]
mod tests;

use std::{convert::Infallible, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt as _, Full, LengthLimitError, Limited};
use hyper::{
    body::Incoming,
    server::conn::{http1, http2},
    service::service_fn,
};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
    time::timeout,
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

pub(crate) use self::authority::keep_believed;
use super::{
    connections::{self, until_stopped},
    server_certificate::ServerCertificate,
};
use crate::{
    source::Inquiry,
    state::{
        compile::Settings,
        resource::{ObjectKey, Resource},
    },
};

/// Where questions are answered.
const PATH: &str = "/validate";
/// What is spoken over TLS.
pub const PROTOCOLS: &[&str] = &["h2", "http/1.1"];
/// Connections at once; an API server keeps one or two.
const CONNECTIONS: usize = 256;
/// Time for a request, from its head to its answer. API servers wait ten seconds.
const REQUEST: Duration = Duration::from_secs(10);
/// Time after which an answer is given without looking at other objects.
const WARNINGS: Duration = Duration::from_secs(2);
/// Largest question: API servers take objects of up to 3 MiB, and send the one before too.
const LARGEST: usize = 8 << 20;
/// Requests under way on one connection.
const STREAMS: u32 = 64;
/// Compilations at once: each is a thread's work.
const COMPILATIONS: usize = 1;

/// What answers.
#[derive(Debug)]
pub struct Webhook {
    inquiry: Inquiry,
    settings: Settings,
    compilations: Arc<Semaphore>,
}

impl Webhook {
    /// `inquiry`: where the objects are known that there are; `settings`: how they are compiled.
    pub fn new(inquiry: Inquiry, settings: Settings) -> Self {
        Self { inquiry, settings, compilations: Arc::new(Semaphore::new(COMPILATIONS)) }
    }

    /// Serves until `stop`; requests under way are answered first.
    pub async fn serve(self, listener: TcpListener, certificate: ServerCertificate, stop: CancellationToken) {
        let serving = {
            let (webhook, stop) = (Arc::new(self), stop.clone());
            move |stream, _| connection(stream, Arc::clone(&webhook), stop.clone())
        };
        let from = (&listener, &certificate);
        let tasks = connections::take(from, ("the webhook", CONNECTIONS), &stop, serving).await;
        tasks.close();
        tasks.wait().await;
    }

    /// The answer to a request, whatever it is.
    async fn answer(&self, request: Request<Incoming>) -> Response<Full<Bytes>> {
        if request.uri().path() != PATH {
            return said(StatusCode::NOT_FOUND, &format!("only {PATH} is served here"));
        }
        if request.method() != Method::POST {
            return said(StatusCode::METHOD_NOT_ALLOWED, &format!("{PATH} is asked by POST"));
        }
        let body = match timeout(REQUEST, Limited::new(request.into_body(), LARGEST).collect()).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(error)) if error.is::<LengthLimitError>() => {
                return said(
                    StatusCode::PAYLOAD_TOO_LARGE,
                    &format!("a question has {LARGEST} bytes at most"),
                );
            }
            Ok(Err(error)) => return said(StatusCode::BAD_REQUEST, &format!("reading the body: {error}")),
            Err(_) => {
                return said(
                    StatusCode::REQUEST_TIMEOUT,
                    &format!("the body was not there within {REQUEST:?}"),
                );
            }
        };
        let mut judged = match review::judge(&body) {
            Ok(judged) => judged,
            Err(why) => return said(StatusCode::BAD_REQUEST, &why),
        };
        if !judged.response.allowed {
            let message = &judged.response.result.message;
            tracing::info!(request = judged.response.uid, "an object is refused: {message}");
        }
        let warnings = match judged.taken.take() {
            Some(taken) => timeout(WARNINGS, self.warnings(taken)).await.ok().flatten().unwrap_or_default(),
            None => Vec::new(),
        };
        match serde_json::to_vec(&judged.answer(warnings)) {
            Ok(body) => {
                let mut response = Response::new(Full::from(body));
                let json = header::HeaderValue::from_static("application/json");
                response.headers_mut().insert(header::CONTENT_TYPE, json);
                response
            }
            Err(error) => said(StatusCode::INTERNAL_SERVER_ERROR, &format!("writing the answer: {error}")),
        }
    }

    /// How an object stands to those that are there. `None`: that cannot be told now.
    async fn warnings(&self, taken: (ObjectKey, Resource)) -> Option<Vec<String>> {
        let objects = self.inquiry.configured().await?;
        let permit = Arc::clone(&self.compilations).acquire_owned().await.ok()?;
        let settings = self.settings.clone();
        let compiling = tokio::task::spawn_blocking(move || {
            let warnings = review::warnings(&objects, taken, &settings);
            // Also when nobody waits for it any more, it is one that is under way until here.
            drop(permit);
            warnings
        });
        compiling.await.ok()
    }
}

fn said(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(format!("{text}\n")));
    *response.status_mut() = status;
    response
}

async fn connection(
    stream: TlsStream<TcpStream>,
    webhook: Arc<Webhook>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let is_http2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let answer = service_fn(move |request| {
        let webhook = Arc::clone(&webhook);
        async move { Ok::<_, Infallible>(webhook.answer(request).await) }
    });
    if is_http2 {
        let mut server = http2::Builder::new(TokioExecutor::new());
        server.timer(TokioTimer::new()).max_concurrent_streams(STREAMS);
        until_stopped(server.serve_connection(TokioIo::new(stream), answer), &stop, REQUEST).await
    } else {
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).header_read_timeout(REQUEST);
        until_stopped(server.serve_connection(TokioIo::new(stream), answer), &stop, REQUEST).await
    }
}
