//! Clients of tunnels: WebSocket over HTTP/1.1 and HTTP/2, CONNECT, and upgrades to an echo of bytes.

use std::{net::SocketAddr, time::Duration};

use anyhow::{Context as _, Result, bail};
use clap::Args;
use futures_util::{SinkExt as _, StreamExt as _};
use http_body_util::Empty;
use hyper::{
    Method, Request, Response, StatusCode, Uri,
    body::{Bytes as Data, Incoming},
    ext::Protocol,
    header::{CONNECTION, HOST, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE},
    upgrade::{Upgraded, on},
};
use hyper_util::rt::TokioIo;
use lab::apps::{Bytes, POD_HEADER, Spoken, Tunnelled, pattern};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _, split};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::{client::generate_key, derive_accept_key},
        protocol::Role,
    },
};

use crate::{http_client, print};

const BUFFER: usize = 64 * 1024;
/// A greeting is no longer than this.
const LONGEST_LINE: usize = 4096;
/// The size of the binary message.
const BINARY: usize = 100_000;

type Ask = Request<Empty<Data>>;

/// An open WebSocket of a client.
pub type Socket = WebSocketStream<TokioIo<Upgraded>>;

#[derive(Debug, Args)]
pub struct WebSocket {
    /// The URL, as `http://ADDRESS:PORT/PATH`
    url: Uri,
    /// A text message; may be given several times
    #[arg(long)]
    text: Vec<String>,
    /// A header of the handshake, as `name: value`; may be given several times
    #[arg(long, value_parser = http_client::header)]
    header: Vec<(HeaderName, HeaderValue)>,
    /// Extended CONNECT over HTTP/2 with prior knowledge
    #[arg(long)]
    h2c: bool,
    /// Give up after this many milliseconds
    #[arg(long, default_value_t = 20_000)]
    timeout_ms: u64,
}

impl WebSocket {
    pub async fn run(self) -> Result<()> {
        print(&within(self.timeout_ms, self.talk()).await?)
    }

    async fn talk(&self) -> Result<Spoken> {
        let (mut spoken, socket) = self.open().await?;
        let Some(mut socket) = socket else { return Ok(spoken) };
        for text in &self.text {
            socket.send(Message::text(text)).await?;
        }
        socket.send(Message::binary(vec![7; BINARY])).await?;
        socket.send(Message::Ping(Data::from_static(b"ping"))).await?;
        self.listen(&mut socket, &mut spoken).await?;
        Ok(spoken)
    }

    /// An open one, over HTTP/1.1.
    pub async fn to(url: Uri) -> Result<Socket> {
        let this = Self { url, text: Vec::new(), header: Vec::new(), h2c: false, timeout_ms: 0 };
        let (spoken, socket) = this.open().await?;
        socket.with_context(|| format!("the handshake was answered {}", spoken.status))
    }

    async fn open(&self) -> Result<(Spoken, Option<Socket>)> {
        let key = generate_key();
        let response = send(&self.url, self.request(&key)?, self.h2c).await?;
        let status = response.status().as_u16();
        let pod = pod(&response);
        let spoken = Spoken { status, pod, messages: Vec::new(), binary_bytes: 0, pong: false, close: None };
        if status != if self.h2c { 200 } else { 101 } {
            return Ok((spoken, None));
        }
        if !self.h2c {
            let accept = response.headers().get(SEC_WEBSOCKET_ACCEPT).context("no Sec-WebSocket-Accept")?;
            if accept.as_bytes() != derive_accept_key(key.as_bytes()).as_bytes() {
                bail!("the server accepted another key");
            }
        }
        let io = TokioIo::new(on(response).await?);
        Ok((spoken, Some(WebSocketStream::from_raw_socket(io, Role::Client, None).await)))
    }

    /// Hears everything back, closes once all has come, and hears the close.
    async fn listen(&self, socket: &mut Socket, spoken: &mut Spoken) -> Result<()> {
        while let Some(message) = socket.next().await {
            match message? {
                Message::Text(text) => spoken.messages.push(text.as_str().to_owned()),
                Message::Binary(bytes) => spoken.binary_bytes = bytes.len() as u64,
                Message::Pong(payload) => spoken.pong = payload.as_ref() == b"ping",
                Message::Close(frame) => spoken.close = frame.map(|frame| frame.code.into()),
                _ => {}
            }
            if spoken.pong && spoken.binary_bytes > 0 && spoken.messages.len() == self.text.len() {
                // Asked for once; the library says so after that.
                let _ = socket.send(Message::Close(Some(normal()))).await;
            }
        }
        Ok(())
    }

    fn request(&self, key: &str) -> Result<Ask> {
        let authority = self.url.authority().context("the URL has no host")?;
        let path = self.url.path_and_query().map_or("/", |path| path.as_str());
        let mut request = if self.h2c {
            Request::builder().method(Method::CONNECT).extension(Protocol::from_static("websocket")).uri(
                Uri::builder().scheme("http").authority(authority.as_str()).path_and_query(path).build()?,
            )
        } else {
            Request::builder()
                .uri(path)
                .header(HOST, authority.as_str())
                .header(CONNECTION, "Upgrade")
                .header(UPGRADE, "websocket")
                .header(SEC_WEBSOCKET_KEY, key)
        };
        request = request.header("sec-websocket-version", "13");
        for (name, value) in &self.header {
            request = request.header(name, value);
        }
        Ok(request.body(Empty::new())?)
    }
}

fn normal() -> tokio_tungstenite::tungstenite::protocol::CloseFrame {
    tokio_tungstenite::tungstenite::protocol::CloseFrame {
        code: tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode::Normal,
        reason: "enough".into(),
    }
}

#[derive(Debug, Args)]
pub struct Connect {
    /// The proxy
    to: SocketAddr,
    /// What it is to connect to, as `HOST:PORT`
    #[arg(long)]
    authority: String,
    /// How many bytes to send through it
    #[arg(long, default_value_t = 1000)]
    bytes: u64,
    /// Over HTTP/2 with prior knowledge
    #[arg(long)]
    h2c: bool,
    /// Give up after this many milliseconds
    #[arg(long, default_value_t = 20_000)]
    timeout_ms: u64,
}

impl Connect {
    pub async fn run(self) -> Result<()> {
        print(&within(self.timeout_ms, self.talk()).await?)
    }

    async fn talk(&self) -> Result<Tunnelled> {
        let request = Request::builder()
            .method(Method::CONNECT)
            .uri(self.authority.as_str())
            .header(HOST, self.authority.as_str())
            .body(Empty::new())?;
        let proxy =
            Uri::builder().scheme("http").authority(self.to.to_string()).path_and_query("/").build()?;
        let response = send(&proxy, request, self.h2c).await?;
        exchange(response, StatusCode::OK, true, self.bytes).await
    }
}

#[derive(Debug, Args)]
pub struct Upgrade {
    /// The URL, as `http://ADDRESS:PORT/PATH`
    url: Uri,
    /// What to upgrade to
    #[arg(long, default_value = "lab-echo")]
    protocol: String,
    /// How many bytes to send through it
    #[arg(long, default_value_t = 1000)]
    bytes: u64,
    /// Give up after this many milliseconds
    #[arg(long, default_value_t = 20_000)]
    timeout_ms: u64,
}

impl Upgrade {
    pub async fn run(self) -> Result<()> {
        print(&within(self.timeout_ms, self.talk()).await?)
    }

    async fn talk(&self) -> Result<Tunnelled> {
        let request = Request::builder()
            .uri(self.url.path_and_query().map_or("/", |path| path.as_str()))
            .header(HOST, self.url.authority().context("the URL has no host")?.as_str())
            .header(CONNECTION, "Upgrade")
            .header(UPGRADE, self.protocol.as_str())
            .body(Empty::new())?;
        let response = send(&self.url, request, false).await?;
        exchange(response, StatusCode::SWITCHING_PROTOCOLS, false, self.bytes).await
    }
}

async fn within<T>(millis: u64, talk: impl Future<Output = Result<T>>) -> Result<T> {
    let limit = Duration::from_millis(millis);
    tokio::time::timeout(limit, talk).await.with_context(|| format!("no end within {limit:?}"))?
}

/// Sends a request on a connection of its own, which stays open for an upgrade.
async fn send(to: &Uri, request: Ask, h2c: bool) -> Result<Response<Incoming>> {
    let stream = http_client::connect(to).await?;
    http_client::send(TokioIo::new(stream), request, h2c).await
}

fn pod(response: &Response<Incoming>) -> Option<String> {
    response.headers().get(POD_HEADER).and_then(|pod| pod.to_str().ok()).map(str::to_owned)
}

/// Sends bytes through the tunnel and reads them back, to its end.
async fn exchange(
    response: Response<Incoming>,
    opened: StatusCode,
    greets: bool,
    bytes: u64,
) -> Result<Tunnelled> {
    let (status, pod) = (response.status(), pod(&response));
    let mut tunnelled = Tunnelled {
        status: status.as_u16(),
        pod,
        greeting: Bytes::default(),
        sent: 0,
        received: 0,
        intact: false,
    };
    if status != opened {
        return Ok(tunnelled);
    }
    let (mut reader, mut writer) = split(TokioIo::new(on(response).await?));
    let sending = tokio::spawn(async move {
        let mut at = 0;
        while at < bytes {
            let n = (bytes - at).min(BUFFER as u64);
            let chunk: Vec<u8> = (at..at + n).map(pattern).collect();
            writer.write_all(&chunk).await?;
            at += n;
        }
        writer.shutdown().await?;
        anyhow::Ok(writer)
    });
    let intact = hear(&mut reader, greets, &mut tunnelled).await?;
    let _writer = sending.await?.context("sending into the tunnel")?;
    tunnelled.sent = bytes;
    tunnelled.intact = intact && tunnelled.received == bytes;
    Ok(tunnelled)
}

/// Reads to the end of the tunnel. Says whether what came after the greeting is the pattern.
async fn hear(
    reader: &mut (impl AsyncRead + Unpin),
    greets: bool,
    tunnelled: &mut Tunnelled,
) -> Result<bool> {
    while greets && !tunnelled.greeting.0.ends_with(b"\n") {
        if tunnelled.greeting.0.len() > LONGEST_LINE {
            bail!("the greeting does not end");
        }
        tunnelled.greeting.0.push(reader.read_u8().await.context("waiting for the greeting")?);
    }
    let mut buffer = vec![0; BUFFER];
    let mut intact = true;
    loop {
        let read = reader.read(&mut buffer).await.context("reading from the tunnel")?;
        if read == 0 {
            break;
        }
        intact &= buffer[..read].iter().zip(tunnelled.received..).all(|(byte, at)| *byte == pattern(at));
        tunnelled.received += read as u64;
    }
    Ok(intact)
}
