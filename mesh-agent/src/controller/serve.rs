//! The wire of the certificate service: gRPC over HTTP/2 over TLS 1.3.
//!
//! Promises bounds: connections, time for a handshake, streams of a connection, size of a request and time for it; idle
//! connections are asked whether they live. Never dies of an error of one connection. Tested in `tests/`.

use std::{
    convert::Infallible,
    net::SocketAddr,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use http::header::AUTHORIZATION;
use hyper::{body::Incoming, server::conn::http2, service::service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Request, Response, Status,
    body::Body,
    codegen::{BoxFuture, Service},
    server::Grpc,
};
use tonic_prost::ProstCodec;

use super::{
    certificates::CertificateService,
    connections::{self, until_stopped},
    key_sets::KeySets,
    server_certificate::ServerCertificate,
};
use crate::{
    identity::{CREATE_CERTIFICATE, CertificateRequest, CertificateResponse},
    source::key_sets::WATCH_KEY_SETS,
};

/// Connections at once; more wait in the backlog. An agent has one.
const CONNECTIONS: usize = 8192;
/// Requests under way on one connection.
const STREAMS: u32 = 64;
/// Largest request: one of an RSA 4096 key is below 3 KiB.
const LARGEST_REQUEST: usize = 64 * 1024;
/// Largest headers: a token of Kubernetes is below 2 KiB.
const LARGEST_HEADERS: u32 = 32 * 1024;
/// Time for a request, from its head to its answer.
const REQUEST: Duration = Duration::from_secs(10);
/// How often a silent connection is asked whether it lives, and how long it may take to say so.
const KEEPALIVE: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(20));

/// What is served.
#[derive(Debug)]
pub struct Services {
    /// Certificates, and who may ask for what.
    pub certificates: CertificateService,
    /// Key sets of issuers of tokens.
    pub key_sets: KeySets,
}

/// Serves until `stop`; requests under way are answered first.
pub async fn serve(
    listener: TcpListener,
    certificate: ServerCertificate,
    services: Services,
    stop: CancellationToken,
) {
    let services = Arc::new(services);
    let serving = {
        let (services, stop) = (Arc::clone(&services), stop.clone());
        move |stream, peer| connection(stream, peer, Arc::clone(&services), stop.clone())
    };
    let from = (&listener, &certificate);
    let tasks = connections::take(from, ("the controller", CONNECTIONS), &stop, serving).await;
    // What is told without end would keep its connections from ending.
    services.key_sets.end();
    tasks.close();
    tasks.wait().await;
}

async fn connection(
    stream: TlsStream<TcpStream>,
    peer: SocketAddr,
    services: Arc<Services>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut server = http2::Builder::new(TokioExecutor::new());
    server
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS)
        .max_header_list_size(LARGEST_HEADERS)
        .keep_alive_interval(KEEPALIVE.0)
        .keep_alive_timeout(KEEPALIVE.1);
    let answer = service_fn(move |request| {
        let services = Arc::clone(&services);
        async move { Ok::<_, Infallible>(route(request, peer, services).await) }
    });
    until_stopped(server.serve_connection(TokioIo::new(stream), answer), &stop, REQUEST).await
}

/// The methods there are.
async fn route(
    request: http::Request<Incoming>,
    peer: SocketAddr,
    services: Arc<Services>,
) -> http::Response<Body> {
    let answered = match request.uri().path() {
        CREATE_CERTIFICATE => {
            let codec = ProstCodec::<CertificateResponse, CertificateRequest>::default();
            let mut grpc = Grpc::new(codec).max_decoding_message_size(LARGEST_REQUEST);
            tokio::time::timeout(REQUEST, grpc.unary(CreateCertificate { services, peer }, request)).await
        }
        WATCH_KEY_SETS => {
            let bearer = request.headers().get(AUTHORIZATION).and_then(|value| value.to_str().ok());
            match tokio::time::timeout(REQUEST, services.certificates.may_watch(peer, bearer)).await {
                // Lasts for as long as the agent listens.
                Ok(Ok(())) => Ok(services.key_sets.serve(request).await),
                Ok(Err(refusal)) => Ok(refusal.into_http()),
                Err(late) => Err(late),
            }
        }
        path => Ok(Status::unimplemented(format!("{path} is not served here")).into_http()),
    };
    answered.unwrap_or_else(|_| {
        Status::new(Code::DeadlineExceeded, format!("the request was not there within {REQUEST:?}"))
            .into_http()
    })
}

/// One call, as tonic's server wants it.
struct CreateCertificate {
    services: Arc<Services>,
    peer: SocketAddr,
}

impl Service<Request<CertificateRequest>> for CreateCertificate {
    type Response = Response<CertificateResponse>;
    type Error = Status;
    type Future = BoxFuture<Self::Response, Status>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Status>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<CertificateRequest>) -> Self::Future {
        let (services, peer) = (Arc::clone(&self.services), self.peer);
        Box::pin(async move {
            let bearer = request.metadata().get("authorization").and_then(|value| value.to_str().ok());
            let bearer = bearer.map(str::to_owned);
            let answer = services.certificates.create(peer, bearer.as_deref(), request.get_ref()).await?;
            Ok(Response::new(answer))
        })
    }
}
