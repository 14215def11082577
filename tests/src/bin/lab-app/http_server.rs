//! The HTTP server: answers with what it was asked, and misbehaves on demand. See `lab::apps::http` for its paths.

use std::{
    collections::BTreeMap,
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::Result;
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    HeaderMap, Request, Response, StatusCode,
    body::{Frame, Incoming},
    header::{CONTENT_TYPE, HeaderName, HeaderValue},
    http::uri::Authority,
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use lab::apps::{Echo, POD_HEADER};
use tokio::net::TcpStream;
use tonic::codegen::tokio_stream;

use crate::{ServerOptions, listen};

type Body = BoxBody<Bytes, anyhow::Error>;

/// `/bytes/N` comes in pieces of this size.
const CHUNK: u64 = 16 * 1024;
static FILLING: [u8; CHUNK as usize] = [b'x'; CHUNK as usize];

#[derive(Debug, Args)]
pub struct Options {
    #[command(flatten)]
    server: ServerOptions,
    /// Answer everything with this status
    #[arg(long)]
    status: Option<u16>,
    /// Wait before each answer, in milliseconds
    #[arg(long, default_value_t = 0)]
    delay_ms: u64,
}

#[derive(Debug)]
struct Server {
    options: Options,
    pod: HeaderValue,
    /// Requests by path and query.
    seen: Mutex<BTreeMap<String, u64>>,
}

/// Both ends of a connection, as the kernel told the server.
#[derive(Debug, Clone, Copy)]
struct Ends {
    peer: SocketAddr,
    local: SocketAddr,
}

pub async fn serve(options: Options) -> Result<()> {
    let listener = listen::tcp(options.server.listen)?;
    let pod = HeaderValue::from_str(&options.server.name)?;
    let server = Arc::new(Server { options, pod, seen: Mutex::default() });
    loop {
        let (stream, peer) = listener.accept().await?;
        let ends = Ends { peer: listen::canonical(peer), local: listen::canonical(stream.local_addr()?) };
        tokio::spawn(Arc::clone(&server).connection(stream, ends));
    }
}

impl Server {
    async fn connection(self: Arc<Self>, stream: TcpStream, ends: Ends) {
        let service = service_fn(move |request| {
            let server = Arc::clone(&self);
            async move { server.answer(request, ends).await }
        });
        let served =
            auto::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), service).await;
        if let Err(error) = served {
            eprintln!("connection of {}: {error}", ends.peer);
        }
    }

    async fn answer(&self, request: Request<Incoming>, ends: Ends) -> Result<Response<Body>> {
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str()).to_owned();
        let times = self.count(&target);
        tokio::time::sleep(Duration::from_millis(self.options.delay_ms)).await;
        let mut response = self.respond(request, &target, times, ends).await?;
        if let Some(status) = self.options.status {
            *response.status_mut() = StatusCode::from_u16(status)?;
        }
        response.headers_mut().insert(HeaderName::from_static(POD_HEADER), self.pod.clone());
        Ok(response)
    }

    /// How often this has been asked for, this time included.
    fn count(&self, target: &str) -> u64 {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        let times = seen.entry(target.to_owned()).or_default();
        *times += 1;
        *times
    }

    async fn respond(
        &self,
        request: Request<Incoming>,
        target: &str,
        times: u64,
        ends: Ends,
    ) -> Result<Response<Body>> {
        let path = target.split('?').next().unwrap_or_default();
        let mut parts = path.trim_start_matches('/').split('/');
        let (verb, number) =
            (parts.next().unwrap_or_default(), parts.next().and_then(|n| n.parse::<u64>().ok()));
        match (verb, number) {
            ("mirror", _) => return Ok(Response::new(request.into_body().map_err(Into::into).boxed())),
            ("bytes", Some(size)) => return Ok(Response::new(bytes(size))),
            ("cut", _) => return Ok(Response::new(cut())),
            ("stats", _) => return self.stats(),
            ("slow", Some(ms)) => tokio::time::sleep(Duration::from_millis(ms)).await,
            _ => {}
        }
        let mut response = self.echo(request, target, ends).await?;
        match (verb, number) {
            ("status", Some(status)) => {
                *response.status_mut() = StatusCode::from_u16(u16::try_from(status)?)?;
            }
            ("fail-first", Some(failures)) if times <= failures => {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            }
            ("trailers", _) => return Ok(response.map(with_trailers)),
            _ => {}
        }
        Ok(response)
    }

    async fn echo(&self, request: Request<Incoming>, target: &str, ends: Ends) -> Result<Response<Body>> {
        let (head, body) = request.into_parts();
        let host = head.headers.get("host").and_then(|host| host.to_str().ok());
        let authority = head.uri.authority().map(Authority::as_str).or(host).unwrap_or_default();
        let echo = Echo {
            pod: self.options.server.name.clone(),
            method: head.method.to_string(),
            target: target.to_owned(),
            version: format!("{:?}", head.version),
            authority: authority.to_owned(),
            headers: plain(&head.headers),
            body_bytes: size_of_body(body).await?,
            peer: ends.peer,
            local: ends.local,
        };
        json(serde_json::to_vec(&echo)?)
    }

    fn stats(&self) -> Result<Response<Body>> {
        json(serde_json::to_vec(&*self.seen.lock().unwrap_or_else(PoisonError::into_inner))?)
    }
}

/// Headers by name; several values joined by a comma.
pub fn plain(headers: &HeaderMap) -> BTreeMap<String, String> {
    let mut plain = BTreeMap::<String, String>::new();
    for (name, value) in headers {
        let value = String::from_utf8_lossy(value.as_bytes());
        plain
            .entry(name.to_string())
            .and_modify(|values| {
                values.push_str(", ");
                values.push_str(&value);
            })
            .or_insert_with(|| value.to_string());
    }
    plain
}

async fn size_of_body(mut body: Incoming) -> Result<u64> {
    let mut size = 0;
    while let Some(frame) = body.frame().await {
        size += frame?.data_ref().map_or(0, |data| data.len() as u64);
    }
    Ok(size)
}

fn json(body: Vec<u8>) -> Result<Response<Body>> {
    let body = Full::from(body).map_err(|never| match never {}).boxed();
    Ok(Response::builder().header(CONTENT_TYPE, "application/json").body(body)?)
}

fn bytes(size: u64) -> Body {
    let chunks = (0..size.div_ceil(CHUNK)).map(move |n| {
        let length = (size - n * CHUNK).min(CHUNK) as usize;
        Ok(Frame::data(Bytes::from_static(&FILLING).slice(..length)))
    });
    StreamBody::new(tokio_stream::iter(chunks)).boxed()
}

/// Begins a body and breaks off.
fn cut() -> Body {
    let frames = [Ok(Frame::data(Bytes::from_static(b"so far so g"))), Err(anyhow::anyhow!("cut on demand"))];
    StreamBody::new(tokio_stream::iter(frames)).boxed()
}

fn with_trailers(body: Body) -> Body {
    let mut trailers = HeaderMap::new();
    trailers.insert("x-lab-trailer", HeaderValue::from_static("last"));
    body.with_trailers(async move { Some(Ok(trailers)) }).boxed()
}
