//! The HTTP clients: one request told in full, or many counted.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::{Context as _, Result, bail, ensure};
use bytes::Bytes;
use clap::Args;
use http_body_util::{BodyExt as _, Full};
use hyper::{
    HeaderMap, Method, Request, Response, Uri,
    body::Incoming,
    client::conn::{http1, http2},
    header::{HOST, HeaderName, HeaderValue},
    http::uri::Authority,
};
use hyper_util::rt::{TokioExecutor, TokioIo};
use lab::apps::{Answer, Tally};
use tokio::{net::TcpStream, task::JoinSet};

use crate::{http_server::plain, print};

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
    /// Speak HTTP/2 with prior knowledge
    #[arg(long)]
    h2c: bool,
    /// Give up after this many milliseconds
    #[arg(long, default_value_t = 20_000)]
    timeout_ms: u64,
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

fn header(text: &str) -> Result<(HeaderName, HeaderValue)> {
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
        let limit = Duration::from_millis(self.timeout_ms);
        let answered = tokio::time::timeout(limit, self.exchange()).await;
        answered.with_context(|| format!("no whole answer from {} within {limit:?}", self.url))?
    }

    async fn exchange(&self) -> Result<Answer> {
        let to = self.address()?;
        let stream = TcpStream::connect(to).await.with_context(|| format!("connecting to {to}"))?;
        stream.set_nodelay(true)?;
        let (peer, local) = (stream.peer_addr()?, stream.local_addr()?);
        let response = self.send(TokioIo::new(stream)).await.context("waiting for the answer")?;
        let (head, body) = response.into_parts();
        let (body, body_bytes, trailers) = read(body).await.context("reading the body")?;
        Ok(Answer {
            status: head.status.as_u16(),
            version: format!("{:?}", head.version),
            headers: plain(&head.headers),
            trailers: plain(&trailers),
            body,
            body_bytes,
            peer,
            local,
        })
    }

    async fn send(&self, io: TokioIo<TcpStream>) -> Result<Response<Incoming>> {
        // The connection's task lives as long as this process: one request each.
        if self.h2c {
            let (mut sender, connection) = http2::handshake(TokioExecutor::new(), io).await?;
            tokio::spawn(connection);
            Ok(sender.send_request(self.request()?).await?)
        } else {
            let (mut sender, connection) = http1::handshake(io).await?;
            tokio::spawn(connection);
            let response = sender.send_request(self.request()?).await?;
            Ok(response)
        }
    }

    fn request(&self) -> Result<Request<Full<Bytes>>> {
        let mut authority = self.url.authority().context("the URL has no host")?.clone();
        let mut request = Request::builder().method(self.method.clone());
        for (name, value) in &self.header {
            if name == HOST {
                authority = Authority::try_from(value.as_bytes())?;
            } else {
                request = request.header(name, value);
            }
        }
        let target = self.url.path_and_query().map_or("/", |target| target.as_str());
        request = if self.h2c {
            request.uri(Uri::builder().scheme("http").authority(authority).path_and_query(target).build()?)
        } else {
            request.uri(target).header(HOST, authority.as_str())
        };
        Ok(request.body(Full::from(vec![b'x'; self.body_bytes]))?)
    }

    fn address(&self) -> Result<SocketAddr> {
        let authority = self.url.authority().context("the URL has no host")?;
        let host = authority.host().trim_start_matches('[').trim_end_matches(']');
        let Ok(ip) = host.parse() else { bail!("the URL needs an address for a host, not {host}") };
        Ok(SocketAddr::new(ip, authority.port_u16().unwrap_or(80)))
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
