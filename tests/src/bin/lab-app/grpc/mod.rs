//! gRPC: the health service, unary and server streaming, and `lab.Notes` for all kinds.
//!
//! It is served by hyper alone: tonic's own server would act on `grpc-timeout`, and whether others do is the question.

mod notes;

use std::{convert::Infallible, time::Duration};

use anyhow::{Context as _, Result};
use clap::Args;
use hyper::{Request as HttpRequest, Response as HttpResponse, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use lab::apps::{GrpcAnswer, POD_HEADER};
use tonic::{
    Request, Response, Status,
    body::Body,
    codegen::{BoxStream, Service as _, tokio_stream},
    metadata::MetadataValue,
    transport::Endpoint,
};
use tonic_health::pb::{
    HealthCheckRequest, HealthCheckResponse,
    health_check_response::ServingStatus,
    health_client::HealthClient,
    health_server::{Health, HealthServer},
};

use self::notes::Notes;
pub use self::notes::{Call, converse};
use crate::{ServerOptions, listen, print};

/// Answers by the name of the service asked for: none, `count/N`, or `slow/MS`, which takes its time; any other is
/// not found.
struct Named {
    pod: String,
}

impl Named {
    fn response<T>(&self, message: T) -> Result<Response<T>, Status> {
        let mut response = Response::new(message);
        let pod = MetadataValue::try_from(&self.pod)
            .map_err(|_| Status::internal("the pod's name is no header"))?;
        response.metadata_mut().insert(POD_HEADER, pod);
        Ok(response)
    }
}

/// How many messages a service streams, once the time it takes is over.
async fn count(service: &str) -> Result<u32, Status> {
    let (verb, number) = service.split_once('/').unwrap_or((service, "1"));
    match (verb, number.parse()) {
        ("" | "count", Ok(count)) => Ok(count),
        ("slow", Ok(millis)) => {
            tokio::time::sleep(Duration::from_millis(u64::from(millis))).await;
            Ok(1)
        }
        _ => Err(Status::not_found(format!("no service {service:?}; try \"count/5\""))),
    }
}

fn message(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse { status: status.into() }
}

#[tonic::async_trait]
impl Health for Named {
    type WatchStream = BoxStream<HealthCheckResponse>;

    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        count(&request.get_ref().service).await?;
        self.response(message(ServingStatus::Serving))
    }

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let count = count(&request.get_ref().service).await?;
        let messages = (0..count).map(|n| {
            Ok(message(if n % 2 == 0 { ServingStatus::Serving } else { ServingStatus::NotServing }))
        });
        self.response(Box::pin(tokio_stream::iter(messages)) as Self::WatchStream)
    }
}

pub async fn serve(options: ServerOptions) -> Result<()> {
    let listener = listen::tcp(options.listen)?;
    loop {
        let (stream, peer) = listener.accept().await?;
        stream.set_nodelay(true)?;
        let name = options.name.clone();
        let service = service_fn(move |request| answer(request, name.clone()));
        tokio::spawn(async move {
            let builder = auto::Builder::new(TokioExecutor::new()).http2_only();
            if let Err(error) = builder.serve_connection(TokioIo::new(stream), service).await {
                eprintln!("connection of {peer}: {error}");
            }
        });
    }
}

async fn answer(request: HttpRequest<Incoming>, pod: String) -> Result<HttpResponse<Body>, Infallible> {
    match Notes::kind(request.uri().path()) {
        Some(kind) => Ok(Notes { pod, kind }.serve(request).await),
        None => HealthServer::new(Named { pod }).call(request).await,
    }
}

#[derive(Debug, Args)]
pub struct Client {
    /// The server, as `http://ADDRESS:PORT`
    url: String,
    /// The service to ask for
    #[arg(long, default_value = "")]
    service: String,
    /// Give up after this many milliseconds
    #[arg(long, default_value_t = 20_000)]
    timeout_ms: u64,
}

impl Client {
    pub async fn run(self) -> Result<()> {
        let limit = Duration::from_millis(self.timeout_ms);
        let answer = tokio::time::timeout(limit, self.ask()).await;
        print(&answer.with_context(|| format!("{} did not come to an end within {limit:?}", self.url))??)
    }

    async fn ask(&self) -> Result<GrpcAnswer> {
        let endpoint = Endpoint::from_shared(self.url.clone())?;
        let channel = endpoint.connect().await.with_context(|| format!("connecting to {}", self.url))?;
        let mut client = HealthClient::new(channel);
        let request = HealthCheckRequest { service: self.service.clone() };
        let (check, pod) = match client.check(request.clone()).await {
            Ok(response) => {
                let pod =
                    response.metadata().get(POD_HEADER).and_then(|pod| pod.to_str().ok()).map(str::to_owned);
                (response.get_ref().status().as_str_name().to_owned(), pod)
            }
            Err(status) => (format!("{:?}", status.code()), None),
        };
        let (stream, ended) = watch(&mut client, request).await;
        Ok(GrpcAnswer { check, pod, stream, ended })
    }
}

async fn watch(
    client: &mut HealthClient<tonic::transport::Channel>,
    request: HealthCheckRequest,
) -> (Vec<String>, String) {
    let mut messages = Vec::new();
    let mut stream = match client.watch(request).await {
        Ok(response) => response.into_inner(),
        Err(status) => return (messages, format!("{:?}", status.code())),
    };
    loop {
        match stream.message().await {
            Ok(Some(message)) => messages.push(message.status().as_str_name().to_owned()),
            Ok(None) => return (messages, "Ok".to_owned()),
            Err(status) => return (messages, format!("{:?}", status.code())),
        }
    }
}
