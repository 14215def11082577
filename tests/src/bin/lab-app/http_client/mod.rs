//! The HTTP clients: one request told in full, many counted, many on one connection, and large bodies.

mod streams;
mod transfer;

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clap::Args;
use futures_util::stream;
use http_body_util::{BodyExt as _, Full, StreamBody, combinators::BoxBody};
use hyper::{
    HeaderMap, Method, Request, Response, Uri,
    body::{Body, Frame, Incoming},
    client::conn::{http1, http2},
    ext,
    header::{HOST, HeaderName, HeaderValue, TRAILER},
    http::uri::Authority,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lab::apps::{Answer, Tally};
use tokio::{net::TcpStream, task::JoinSet};

pub use self::{
    streams::Many as Streams,
    transfer::{Download, Upload},
};
use crate::{http_server::plain, print};

type Failure = Box<dyn std::error::Error + Send + Sync>;
type Outgoing = BoxBody<Bytes, Failure>;

/// Limits that are the proxy's to have, not the client's.
const HEADERS: usize = 4096;
const HEADER_BYTES: usize = 4 * 1024 * 1024;
/// When a client gives up that was not told otherwise.
const PATIENCE: Duration = Duration::from_secs(20);
/// How much of a body is kept to be shown.
const SHOWN: usize = 1024 * 1024;

/// What is asked, and how.
#[derive(Debug, Clone, Args)]
pub struct Asked {
    /// The URL, with an address for a host
    url: Uri,
    /// A header, as `name: value`; may be given several times. `host` sets the authority
    #[arg(long, value_parser = header)]
    header: Vec<(HeaderName, HeaderValue)>,
    /// The method
    #[arg(long, default_value = "GET")]
    method: Method,
    /// Send a body of this many bytes
    #[arg(long, default_value_t = 0)]
    body_bytes: usize,
    /// A trailer after the body, as `name: value`; may be given several times
    #[arg(long, value_parser = header)]
    trailer: Vec<(HeaderName, HeaderValue)>,
    /// Speak HTTP/2 with prior knowledge
    #[arg(long)]
    h2c: bool,
    /// Give up after this many milliseconds: 20,000 for an answer, never for a large body
    #[arg(long)]
    timeout_ms: Option<u64>,
}

#[derive(Debug, Args)]
pub struct Get {
    #[command(flatten)]
    asked: Asked,
}

#[derive(Debug, Args)]
pub struct Many {
    #[command(flatten)]
    asked: Asked,
    /// How many requests
    #[arg(long, default_value_t = 100)]
    count: u64,
    /// How many at a time
    #[arg(long, default_value_t = 4)]
    at_once: u64,
    /// Count answers by this header
    #[arg(long, default_value = lab::apps::POD_HEADER)]
    by: HeaderName,
}

/// Reads `name: value`.
pub fn header(text: &str) -> Result<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':').context("a header is `name: value`")?;
    Ok((name.trim().parse()?, value.trim().parse()?))
}

impl Get {
    pub async fn run(self) -> Result<()> {
        print(&self.asked.answer().await?)
    }
}

impl Many {
    pub async fn run(self) -> Result<()> {
        ensure!(self.at_once > 0, "--at-once is at least 1");
        let shared = Arc::new(self);
        let mut workers = JoinSet::new();
        for worker in 0..shared.at_once {
            workers.spawn(Arc::clone(&shared).share(worker));
        }
        let mut total = Tally::default();
        while let Some(tally) = workers.join_next().await {
            add(&mut total, tally?);
        }
        print(&total)
    }

    /// The requests of one worker, one after the other.
    async fn share(self: Arc<Self>, worker: u64) -> Tally {
        let mut tally = Tally::default();
        for _ in (worker..self.count).step_by(self.at_once as usize) {
            tally.sent += 1;
            match self.asked.answer().await {
                Ok(answer) => {
                    *tally.statuses.entry(answer.status).or_default() += 1;
                    let by = answer.headers.get(self.by.as_str()).cloned().unwrap_or_default();
                    *tally.pods.entry(by).or_default() += 1;
                }
                Err(error) => *tally.errors.entry(format!("{error:#}")).or_default() += 1,
            }
        }
        tally
    }
}

fn add(total: &mut Tally, tally: Tally) {
    total.sent += tally.sent;
    for (status, n) in tally.statuses {
        *total.statuses.entry(status).or_default() += n;
    }
    for (pod, n) in tally.pods {
        *total.pods.entry(pod).or_default() += n;
    }
    for (error, n) in tally.errors {
        *total.errors.entry(error).or_default() += n;
    }
}

impl Asked {
    /// One request on a connection of its own.
    async fn answer(&self) -> Result<Answer> {
        let limit = self.patience();
        let answered = tokio::time::timeout(limit, self.exchange()).await;
        answered.with_context(|| format!("no whole answer from {} within {limit:?}", self.url))?
    }

    /// How long an answer may take.
    fn patience(&self) -> Duration {
        self.timeout_ms.map_or(PATIENCE, Duration::from_millis)
    }

    async fn exchange(&self) -> Result<Answer> {
        let stream = connect(&self.url).await?;
        let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
        let mut request = self.request(self.body()?)?;
        let informational = Arc::new(Mutex::new(Vec::new()));
        let heard = Arc::clone(&informational);
        ext::on_informational(&mut request, move |response| {
            heard.lock().unwrap_or_else(PoisonError::into_inner).push(response.status().as_u16());
        });
        let sent = send(TokioIo::new(stream), request, self.h2c).await;
        let (head, body) = sent.context("waiting for the answer")?.into_parts();
        let (body, body_bytes, trailers) = read(body).await.context("reading the body")?;
        let informational = informational.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(Answer {
            status: head.status.as_u16(),
            informational,
            version: format!("{:?}", head.version),
            headers: plain(&head.headers),
            trailers: plain(&trailers),
            body,
            body_bytes,
            peer,
            local,
        })
    }

    /// A body of `x`, and the trailers if there are any.
    fn body(&self) -> Result<Outgoing> {
        let body = Bytes::from(vec![b'x'; self.body_bytes]);
        if self.trailer.is_empty() {
            return Ok(Full::from(body).map_err(|never| match never {}).boxed());
        }
        let mut trailers = HeaderMap::new();
        for (name, value) in &self.trailer {
            trailers.try_append(name, value.clone())?;
        }
        // No size is declared: over HTTP/1.1 only chunked bodies have trailers.
        let frames = [Ok(Frame::data(body)), Ok(Frame::trailers(trailers))];
        Ok(StreamBody::new(stream::iter(frames)).boxed())
    }

    fn request(&self, body: Outgoing) -> Result<Request<Outgoing>> {
        let mut authority = self.url.authority().context("the URL has no host")?.clone();
        let mut request = Request::builder().method(self.method.clone());
        for (name, value) in &self.header {
            if name == HOST {
                authority = Authority::try_from(value.as_bytes())?;
            } else {
                request = request.header(name, value);
            }
        }
        for (name, _) in &self.trailer {
            // Over HTTP/1.1 only what was announced is sent.
            request = request.header(TRAILER, name.as_str());
        }
        let target = self.url.path_and_query().map_or("/", |target| target.as_str());
        request = if self.h2c {
            request.uri(Uri::builder().scheme("http").authority(authority).path_and_query(target).build()?)
        } else {
            request.uri(target).header(HOST, authority.as_str())
        };
        Ok(request.body(body)?)
    }
}

/// Connects to the address in a URL.
pub async fn connect(url: &Uri) -> Result<TcpStream> {
    let authority = url.authority().context("the URL has no host")?;
    let host = authority.host().trim_start_matches('[').trim_end_matches(']');
    let Ok(ip) = host.parse() else { bail!("the URL needs an address for a host, not {host}") };
    let to = SocketAddr::new(ip, authority.port_u16().unwrap_or(80));
    let stream = TcpStream::connect(to).await.with_context(|| format!("connecting to {to}"))?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// HTTP/2 as the clients speak it.
pub fn http2() -> http2::Builder<TokioExecutor> {
    let mut builder = http2::Builder::new(TokioExecutor::new());
    builder.max_header_list_size(HEADER_BYTES as u32);
    builder
}

/// Sends a request on a connection of its own. The connection's task lives as long as this process, or until what
/// the request was upgraded to has ended.
pub async fn send<B>(io: TokioIo<TcpStream>, request: Request<B>, h2c: bool) -> Result<Response<Incoming>>
where
    B: Body<Data: Send, Error: Into<Failure>> + Send + Unpin + 'static,
{
    if h2c {
        let (mut sender, connection) = http2().handshake(io).await?;
        tokio::spawn(connection);
        Ok(sender.send_request(request).await?)
    } else {
        let (mut sender, connection) =
            http1::Builder::new().max_headers(HEADERS).max_buf_size(HEADER_BYTES).handshake(io).await?;
        tokio::spawn(connection.with_upgrades());
        Ok(sender.send_request(request).await?)
    }
}

async fn read(mut body: Incoming) -> Result<(String, u64, HeaderMap)> {
    let (mut shown, mut size, mut trailers) = (Vec::new(), 0, HeaderMap::new());
    while let Some(frame) = body.frame().await {
        match frame?.into_data() {
            Ok(data) => {
                size += data.len() as u64;
                let room = SHOWN - shown.len();
                shown.extend_from_slice(&data[..data.len().min(room)]);
            }
            Err(frame) => trailers.extend(frame.into_trailers().unwrap_or_default()),
        }
    }
    Ok((String::from_utf8_lossy(&shown).into_owned(), size, trailers))
}
