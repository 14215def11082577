//! A small HTTP/1.1 server for the agent's own endpoints.
//!
//! Promises bounds: connections at once, time to send a request's header, size of the header; bodies of requests are
//! never read. Never dies of an error of one connection. Tested in `tests.rs`.

use std::{
    convert::Infallible,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{Request, Response};
use http_body::Frame;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    sync::{Semaphore, mpsc},
};
use tokio_util::sync::CancellationToken;

use super::Listener;

/// Connections at once; more wait in the backlog.
const CONNECTIONS: usize = 64;
/// Time for a request's header, and for the next one on a kept connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);
/// Bytes of a request's header.
const HEADER_SIZE: usize = 16 * 1024;
/// Pause after the process ran out of descriptors: `accept` would fail again at once.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Body of an answer.
#[derive(Debug)]
pub enum Reply {
    /// All of it, once.
    Full(Option<Bytes>),
    /// Piece by piece until the sender is dropped.
    Stream(mpsc::Receiver<Bytes>),
}

impl http_body::Body for Reply {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        match self.get_mut() {
            Self::Full(bytes) => Poll::Ready(bytes.take().map(Frame::data).map(Ok)),
            Self::Stream(pieces) => pieces.poll_recv(cx).map(|piece| piece.map(Frame::data).map(Ok)),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Full(None))
    }

    fn size_hint(&self) -> http_body::SizeHint {
        match self {
            Self::Full(bytes) => http_body::SizeHint::with_exact(bytes.as_ref().map_or(0, Bytes::len) as u64),
            Self::Stream(_) => http_body::SizeHint::default(),
        }
    }
}

/// Serves every connection until `stop`; connections open then end after the request they are in.
pub(super) async fn serve<A, F>(listener: Listener, answer: A, stop: CancellationToken)
where
    A: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Result<Response<Reply>, Infallible>> + Send + 'static,
{
    let room = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let accepted = tokio::select! {
            () = stop.cancelled() => return,
            accepted = accept(&listener, &room) => accepted,
        };
        match accepted {
            Ok((stream, permit)) => {
                let (answer, stop) = (answer.clone(), stop.clone());
                tokio::spawn(async move {
                    serve_one(stream, answer, stop).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "accepting a connection to the agent's own endpoints");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// A connection of either kind.
trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

async fn accept(
    listener: &Listener,
    room: &Arc<Semaphore>,
) -> io::Result<(Box<dyn Stream>, tokio::sync::OwnedSemaphorePermit)> {
    let permit = room.clone().acquire_owned().await.map_err(io::Error::other)?;
    let stream: Box<dyn Stream> = match listener {
        Listener::Unix(socket) => Box::new(socket.listener.accept().await?.0),
        Listener::Tcp(listener) => Box::new(listener.accept().await?.0),
    };
    Ok((stream, permit))
}

async fn serve_one<A, F>(stream: Box<dyn Stream>, answer: A, stop: CancellationToken)
where
    A: Fn(Request<Incoming>) -> F,
    F: Future<Output = Result<Response<Reply>, Infallible>>,
{
    let mut server = http1::Builder::new();
    server.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT).max_buf_size(HEADER_SIZE);
    let mut connection = std::pin::pin!(server.serve_connection(TokioIo::new(stream), service_fn(answer)));
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a connection to the agent's own endpoints ended");
    }
}
