//! HTTP for all four services: a server that hands a request to one function, and a client that asks an upstream.
//! HTTP/1.1, whole bodies, a connection for each call: retries, pools and timeouts are the mesh's business.

use std::{
    net::{IpAddr, SocketAddr},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty, Full, Limited};
use hyper::{
    HeaderMap, Request, Response, StatusCode, Uri,
    body::Incoming,
    client,
    header::{CONTENT_TYPE, HOST, HeaderName, HeaderValue},
    http::uri::Authority,
    server,
    service::service_fn,
};
use hyper_util::rt::TokioIo;
use serde_json::{Value, json};
use tokio::{
    net::{TcpListener, TcpSocket, TcpStream},
    signal::unix::{SignalKind, signal},
};

use crate::App;

/// The header by which a service names its pod.
const POD: &str = "x-bookinfo-pod";
/// Connections that may wait to be accepted.
const BACKLOG: u32 = 4096;
/// How long a service waits for another before it goes on without.
const PATIENCE: Duration = Duration::from_secs(10);
/// No body here is anywhere near this.
const LARGEST_BODY: usize = 1024 * 1024;

/// Headers that belong to the user's request as a whole and so travel along: who asks, and which trace it is.
const TRAVELLING: [&str; 11] = [
    "end-user",
    "x-request-id",
    "traceparent",
    "tracestate",
    "baggage",
    "b3",
    "x-b3-traceid",
    "x-b3-spanid",
    "x-b3-parentspanid",
    "x-b3-sampled",
    "x-b3-flags",
];

/// What a service needs of a request.
#[derive(Debug, Default)]
pub struct Asked {
    /// The path.
    pub path: String,
    /// The headers that travel along.
    pub travelling: HeaderMap,
}

/// What a service answers.
#[derive(Debug, PartialEq, Eq)]
pub struct Answer {
    /// The status.
    pub status: u16,
    content_type: &'static str,
    /// The body.
    pub body: String,
    /// Further headers.
    pub headers: Vec<(&'static str, String)>,
}

impl Answer {
    /// 200 with JSON.
    pub fn json(value: &Value) -> Self {
        Self::with_status(200, value)
    }

    /// Any status with JSON.
    pub fn with_status(status: u16, value: &Value) -> Self {
        Self { status, content_type: "application/json", body: value.to_string(), headers: Vec::new() }
    }

    /// 200 with HTML.
    pub fn html(body: String) -> Self {
        Self { status: 200, content_type: "text/html; charset=utf-8", body, headers: Vec::new() }
    }

    /// Paths that every service has, and 404 for the rest.
    pub fn elsewhere(path: &str) -> Self {
        match path {
            "/health" => Self::json(&json!({ "status": "up" })),
            _ => Self::with_status(404, &json!({ "error": format!("nothing at {path}") })),
        }
    }
}

/// The number after `prefix`, if that is the whole of the path.
pub fn id_after(path: &str, prefix: &str) -> Option<u32> {
    path.strip_prefix(prefix)?.parse().ok()
}

/// Serves until SIGTERM or SIGINT. As the first process of a container it has to listen to them itself.
pub async fn serve(listen: SocketAddr, pod: &str, app: Arc<App>) -> Result<()> {
    let listener = listener(listen).with_context(|| format!("listening on {listen}"))?;
    let pod = HeaderValue::from_str(pod).context("the pod's name is no header value")?;
    let (mut term, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    println!("listening on {}", listener.local_addr()?);
    loop {
        tokio::select! {
            accepted = listener.accept() => {
                let (stream, _) = accepted.context("accepting")?;
                tokio::spawn(connection(stream, pod.clone(), Arc::clone(&app)));
            }
            _ = term.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
        }
    }
}

/// `[::]` takes IPv4 too, as the kernel has it by default.
fn listener(address: SocketAddr) -> std::io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

async fn connection(stream: TcpStream, pod: HeaderValue, app: Arc<App>) {
    let service = service_fn(|request| respond(request, &pod, &app));
    if let Err(error) =
        server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await
    {
        eprintln!("a connection ended early: {error}");
    }
}

async fn respond(request: Request<Incoming>, pod: &HeaderValue, app: &App) -> Result<Response<Full<Bytes>>> {
    let asked = Asked { path: request.uri().path().to_owned(), travelling: travelling(request.headers()) };
    let answer = app.answer(&asked).await;
    let mut response =
        Response::builder().status(answer.status).header(CONTENT_TYPE, answer.content_type).header(POD, pod);
    for (name, value) in answer.headers {
        response = response.header(name, value);
    }
    Ok(response.body(Full::from(answer.body))?)
}

fn travelling(headers: &HeaderMap) -> HeaderMap {
    let mut kept = HeaderMap::new();
    for name in TRAVELLING.map(HeaderName::from_static) {
        for value in headers.get_all(&name) {
            kept.append(name.clone(), value.clone());
        }
    }
    kept
}

/// A service that this one asks.
#[derive(Debug)]
pub struct Upstream {
    /// Where to connect to.
    to: Authority,
    /// What to call it, so that the mesh may route by name where the address is only an address.
    host: String,
}

impl Upstream {
    /// The service `name` at a URL such as `http://reviews:9080` or `http://10.96.0.11:9080`.
    pub fn new(name: &str, url: &str) -> Result<Self> {
        let uri: Uri = url.parse().with_context(|| format!("the URL of {name} is no URL: {url}"))?;
        ensure!(uri.scheme_str() == Some("http"), "the URL of {name} begins with http://, not so {url}");
        let to = uri.authority().with_context(|| format!("the URL of {name} names no host: {url}"))?.clone();
        let is_address = to.host().trim_matches(['[', ']']).parse::<IpAddr>().is_ok();
        let host = match to.port_u16() {
            Some(port) if is_address => format!("{name}:{port}"),
            None if is_address => name.to_owned(),
            _ => to.to_string(),
        };
        Ok(Self { to, host })
    }

    /// GETs a path and reads the JSON it answers with. Any status is an answer; only no answer is an error.
    pub async fn get(&self, path: &str, travelling: &HeaderMap) -> Result<(StatusCode, Value)> {
        let answered = tokio::time::timeout(PATIENCE, self.exchange(path, travelling)).await;
        answered
            .with_context(|| format!("no answer within {PATIENCE:?}"))
            .flatten()
            .with_context(|| format!("GET {path} of {} at {}", self.host, self.to))
    }

    async fn exchange(&self, path: &str, travelling: &HeaderMap) -> Result<(StatusCode, Value)> {
        let host = self.to.host().trim_matches(['[', ']']);
        let stream = TcpStream::connect((host, self.to.port_u16().unwrap_or(80))).await?;
        let (mut sender, connection) = client::conn::http1::handshake(TokioIo::new(stream)).await?;
        tokio::spawn(connection);
        let mut request = Request::get(path).header(HOST, &self.host).body(Empty::<Bytes>::new())?;
        request.headers_mut().extend(travelling.clone());
        let (head, body) = sender.send_request(request).await?.into_parts();
        let body =
            Limited::new(body, LARGEST_BODY).collect().await.map_err(anyhow::Error::from_boxed)?.to_bytes();
        // A proxy on the way answers in words of its own.
        let value = serde_json::from_slice(&body)
            .unwrap_or_else(|_| Value::String(String::from_utf8_lossy(&body).into_owned()));
        Ok((head.status, value))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host_of(url: &str) -> Result<String, String> {
        Upstream::new("details", url).map(|upstream| upstream.host).map_err(|error| error.to_string())
    }

    #[test]
    fn an_address_is_called_by_the_name_of_the_service() {
        assert_eq!(host_of("http://10.96.0.11:9080").as_deref(), Ok("details:9080"));
        assert_eq!(host_of("http://[fd00::1]:9080").as_deref(), Ok("details:9080"));
        assert_eq!(host_of("http://10.96.0.11").as_deref(), Ok("details"));
        assert_eq!(host_of("http://details.shop:9080").as_deref(), Ok("details.shop:9080"));
    }

    #[test]
    fn a_bad_url_is_named() {
        assert_eq!(
            host_of("https://x"),
            Err("the URL of details begins with http://, not so https://x".to_owned())
        );
        assert!(host_of("/details").is_err());
    }

    #[test]
    fn only_what_belongs_to_the_whole_request_travels() -> Result<()> {
        let mut headers = HeaderMap::new();
        headers.insert("end-user", "jason".parse()?);
        headers.insert("x-b3-traceid", "80f198ee56343ba8".parse()?);
        headers.insert("accept", "text/html".parse()?);
        let kept = travelling(&headers);
        assert_eq!(kept.len(), 2);
        assert_eq!(kept["end-user"], "jason");
        Ok(())
    }
}
