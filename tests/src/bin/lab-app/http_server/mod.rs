//! The HTTP server: answers with what it was asked, and misbehaves on demand. See `lab::apps::http` for its paths.

mod bodies;
mod connection;
mod failure;
mod odd;
mod tunnel;
mod watch;

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Result, anyhow};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Empty, Full, combinators::BoxBody};
use hyper::{
    HeaderMap, Method, Request, Response, StatusCode,
    body::{Body as _, Incoming},
    header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderName, HeaderValue},
    http::{request::Parts, uri::Authority},
};
use lab::apps::{Echo, POD_HEADER};
use serde::Serialize;

pub use self::bodies::{Pace, read};
use self::{
    bodies::Reading,
    connection::Connection,
    failure::Failure,
    watch::{Open, Watch, Watched},
};
use crate::{ServerOptions, listen};

type Body = BoxBody<Bytes, Failure>;

/// The header by which tests tell requests apart in `/stats`.
const ID_HEADER: &str = "x-lab-id";

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
    /// Read bodies at this many bytes a second; 0 as fast as they come
    #[arg(long, default_value_t = 0)]
    read_rate: u64,
    /// Allow this many concurrent streams on an HTTP/2 connection
    #[arg(long, default_value_t = 1000)]
    max_streams: u32,
}

#[derive(Debug)]
struct Server {
    options: Options,
    pod: HeaderValue,
    watch: Arc<Watch>,
    /// What `/healthz` says.
    sick: AtomicBool,
}

/// The first two parts of a path: what to do, and how much or which.
#[derive(Debug, Clone, Copy)]
struct Wish<'a> {
    verb: &'a str,
    number: Option<u64>,
}

/// What a request came with that the answer needs.
#[derive(Clone, Copy)]
struct Asked<'a> {
    connection: &'a Connection,
    /// Which request of its connection.
    number: u64,
    target: &'a str,
    /// How often this path and query was asked for, this time included.
    times: u64,
}

pub async fn serve(options: Options) -> Result<()> {
    let listener = listen::tcp(options.server.listen)?;
    let pod = HeaderValue::from_str(&options.server.name)?;
    let server = Arc::new(Server { options, pod, watch: Arc::default(), sick: AtomicBool::new(false) });
    loop {
        let (stream, peer) = listener.accept().await?;
        let connection = Connection::new(stream, peer, server.watch.connection())?;
        tokio::spawn(connection.serve(Arc::clone(&server)));
    }
}

impl Server {
    async fn answer(
        &self,
        request: Request<Incoming>,
        connection: &Connection,
    ) -> Result<Response<Body>, Failure> {
        let target = request.uri().path_and_query().map_or("/", |target| target.as_str()).to_owned();
        let wish = Wish::of(&target);
        let is_head = request.method() == Method::HEAD;
        let number = connection.request();
        let mut response = match wish.verb {
            "stats" => json(&self.watch.stats())?,
            "release" => json(&self.watch.release())?,
            "sick" => {
                self.sick.store(wish.number != Some(0), Ordering::Relaxed);
                json(&wish.number)?
            }
            _ => {
                let id = request.headers().get(ID_HEADER).and_then(|id| id.to_str().ok());
                let (open, times) = Open::begin(&self.watch, &target, id, number);
                tokio::time::sleep(Duration::from_millis(self.options.delay_ms)).await;
                let asked = Asked { connection, number, target: &target, times };
                let response = match self.respond(request, wish, asked).await {
                    Ok(response) => without_forbidden_body(response, is_head),
                    Err(failure) if failure.is_wanted() => {
                        open.end();
                        return Err(failure);
                    }
                    Err(failure) => return Err(failure),
                };
                response.map(|body| Watched::new(body, open).boxed())
            }
        };
        if let Some(status) = self.options.status {
            *response.status_mut() = code(status.into())?;
        }
        response.headers_mut().insert(HeaderName::from_static(POD_HEADER), self.pod.clone());
        Ok(response)
    }

    async fn respond(
        &self,
        request: Request<Incoming>,
        wish: Wish<'_>,
        asked: Asked<'_>,
    ) -> Result<Response<Body>, Failure> {
        if request.method() == Method::CONNECT || wish.verb == "upgrade" || wish.verb == "ws" {
            return Ok(tunnel::open(request, wish.verb)?);
        }
        match (wish.verb, wish.number) {
            ("mirror", _) => {
                return Ok(Response::new(
                    request.into_body().map_err(|error| Failure::Other(error.into())).boxed(),
                ));
            }
            ("bytes", Some(size)) => return Ok(Response::new(bodies::filling(size))),
            ("pattern", Some(size)) => return Ok(Response::new(bodies::pattern(size))),
            ("cut", _) => return Ok(Response::new(bodies::cut(Failure::Ended))),
            ("refuse", Some(status)) => return Ok(empty(status)?),
            ("consume", _) => return consume(request.into_body(), self.options.read_rate).await,
            ("read-slow", Some(rate)) => return consume(request.into_body(), rate).await,
            ("reset", code) => return Err(odd::reset(asked.connection, code)?),
            ("reset-late", code) => {
                return Ok(Response::new(bodies::cut(odd::reset(asked.connection, code)?)));
            }
            ("goaway", Some(code)) => return Err(odd::goaway(asked.connection, code).await?),
            ("goaway", None) => asked.connection.say_goodbye(),
            ("early-hints", times) => odd::early_hints(&asked, request.version(), times).await?,
            ("hold", _) => self.watch.hold().await,
            ("slow", Some(ms)) => tokio::time::sleep(Duration::from_millis(ms)).await,
            _ => {}
        }
        self.echo(request, wish, asked).await
    }

    /// The echo, with the changes that the path asks for.
    async fn echo(
        &self,
        request: Request<Incoming>,
        wish: Wish<'_>,
        asked: Asked<'_>,
    ) -> Result<Response<Body>, Failure> {
        let (head, body) = request.into_parts();
        let reading = read(body, self.options.read_rate).await;
        if let Some(broken) = reading.consumed.broken {
            return Err(anyhow!(broken).into());
        }
        let echo = self.told(&head, &reading, asked);
        let mut response = json(&echo)?;
        match (wish.verb, wish.number) {
            ("status", Some(status)) => {
                *response.status_mut() = code(status)?;
            }
            ("healthz", _) if self.sick.load(Ordering::Relaxed) => {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            }
            ("fail-first", Some(failures)) if asked.times <= failures => {
                *response.status_mut() = StatusCode::SERVICE_UNAVAILABLE;
            }
            ("header-bytes", Some(bytes)) => odd::fill_headers(response.headers_mut(), bytes)?,
            ("trailers", _) => return Ok(bodies::with_trailers(response, reading.trailers)?),
            _ => {}
        }
        Ok(response)
    }

    fn told(&self, head: &Parts, reading: &Reading, asked: Asked<'_>) -> Echo {
        let host = head.headers.get("host").and_then(|host| host.to_str().ok());
        let authority = head.uri.authority().map(Authority::as_str).or(host).unwrap_or_default();
        Echo {
            pod: self.options.server.name.clone(),
            method: head.method.to_string(),
            target: asked.target.to_owned(),
            version: format!("{:?}", head.version),
            authority: authority.to_owned(),
            headers: plain(&head.headers),
            body_bytes: reading.consumed.bytes,
            trailers: plain(&reading.trailers),
            connection: asked.connection.number,
            request: asked.number,
            peer: asked.connection.peer,
            local: asked.connection.local,
        }
    }
}

impl<'a> Wish<'a> {
    fn of(target: &'a str) -> Self {
        let path = target.split('?').next().unwrap_or_default();
        let mut parts = path.trim_start_matches('/').split('/');
        let verb = parts.next().unwrap_or_default();
        Self { verb, number: parts.next().and_then(|n| n.parse().ok()) }
    }
}

/// What came of a body is also said where it broke off: over HTTP/2 there is still somebody to tell.
async fn consume(body: Incoming, rate: u64) -> Result<Response<Body>, Failure> {
    Ok(json(&read(body, rate).await.consumed)?)
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

/// Answers to HEAD, 204 and 304 have no body; the length that it would have is told where that is allowed.
fn without_forbidden_body(mut response: Response<Body>, is_head: bool) -> Response<Body> {
    let status = response.status();
    if !is_head && status != StatusCode::NO_CONTENT && status != StatusCode::NOT_MODIFIED {
        return response;
    }
    if let Some(length) = response.body().size_hint().exact().filter(|_| status != StatusCode::NO_CONTENT) {
        response.headers_mut().insert(CONTENT_LENGTH, length.into());
    }
    response.map(|_| Empty::new().map_err(|never| match never {}).boxed())
}

fn code(status: u64) -> Result<StatusCode> {
    Ok(StatusCode::from_u16(u16::try_from(status)?)?)
}

fn empty(status: u64) -> Result<Response<Body>> {
    let body = Empty::new().map_err(|never| match never {}).boxed();
    Ok(Response::builder().status(code(status)?).body(body)?)
}

fn json(body: &impl Serialize) -> Result<Response<Body>> {
    let body = Full::from(serde_json::to_vec(body)?).map_err(|never| match never {}).boxed();
    Ok(Response::builder().header(CONTENT_TYPE, "application/json").body(body)?)
}
