//! Where HTTP ends: upgrades, WebSocket over HTTP/1.1 and HTTP/2, CONNECT.

use anyhow::{Context as _, Result};
use futures_util::{SinkExt as _, StreamExt as _};
use hyper::{
    Method, Request, Response,
    body::Incoming,
    ext::Protocol,
    header::{CONNECTION, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT, SEC_WEBSOCKET_KEY, UPGRADE},
    upgrade::{OnUpgrade, on},
};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use super::{Body, empty};

/// What `/upgrade` upgrades to: an echo of bytes.
const ECHO: &str = "lab-echo";
const WEBSOCKET: &str = "websocket";
const BUFFER: usize = 64 * 1024;

/// What follows once the answer is sent.
enum Tunnel {
    Bytes { greeting: String },
    Messages,
}

type Agreed = Result<(Tunnel, Response<Body>), Response<Body>>;

/// Answers a request for a tunnel, which then runs by itself.
pub fn open(mut request: Request<Incoming>, verb: &str) -> Result<Response<Body>> {
    let (tunnel, response) = match agree(&request, verb)? {
        Ok(agreed) => agreed,
        Err(refusal) => return Ok(refusal),
    };
    let upgrade = on(&mut request);
    tokio::spawn(async move {
        if let Err(error) = run(upgrade, tunnel).await {
            eprintln!("tunnel: {error:#}");
        }
    });
    Ok(response)
}

/// The tunnel and the answer that opens it, or the refusal.
fn agree(request: &Request<Incoming>, verb: &str) -> Result<Agreed> {
    if request.method() == Method::CONNECT {
        let tunnel = match request.extensions().get::<Protocol>().map(Protocol::as_str) {
            Some(WEBSOCKET) => Tunnel::Messages,
            Some(_) => return Ok(Err(empty(501)?)),
            None => {
                let authority = request.uri().authority().context("CONNECT without an authority")?;
                Tunnel::Bytes { greeting: format!("CONNECT {authority}\r\n") }
            }
        };
        return Ok(Ok((tunnel, empty(200)?)));
    }
    let wanted = request.headers().get(UPGRADE).and_then(|name| name.to_str().ok()).unwrap_or_default();
    let expected = if verb == "ws" { WEBSOCKET } else { ECHO };
    if !wanted.eq_ignore_ascii_case(expected) {
        let refusal = with(empty(426)?, UPGRADE, HeaderValue::from_static(expected));
        return Ok(Err(refusal));
    }
    let mut response = with(empty(101)?, UPGRADE, HeaderValue::from_static(expected));
    response = with(response, CONNECTION, HeaderValue::from_static("upgrade"));
    if verb != "ws" {
        return Ok(Ok((Tunnel::Bytes { greeting: String::new() }, response)));
    }
    let Some(key) = request.headers().get(SEC_WEBSOCKET_KEY) else { return Ok(Err(empty(400)?)) };
    let accept = HeaderValue::try_from(derive_accept_key(key.as_bytes()))?;
    Ok(Ok((Tunnel::Messages, with(response, SEC_WEBSOCKET_ACCEPT, accept))))
}

fn with(mut response: Response<Body>, name: HeaderName, value: HeaderValue) -> Response<Body> {
    response.headers_mut().insert(name, value);
    response
}

async fn run(upgrade: OnUpgrade, tunnel: Tunnel) -> Result<()> {
    let mut io = TokioIo::new(upgrade.await?);
    match tunnel {
        Tunnel::Bytes { greeting } => {
            io.write_all(greeting.as_bytes()).await?;
            let mut buffer = vec![0; BUFFER];
            loop {
                match io.read(&mut buffer).await? {
                    0 => break,
                    read => io.write_all(&buffer[..read]).await?,
                }
                io.flush().await?;
            }
            io.shutdown().await?;
        }
        Tunnel::Messages => {
            let mut socket = WebSocketStream::from_raw_socket(io, Role::Server, None).await;
            while let Some(message) = socket.next().await {
                match message? {
                    Message::Text(text) if text.as_str() == "close" => socket.close(None).await?,
                    message @ (Message::Text(_) | Message::Binary(_)) => socket.send(message).await?,
                    // Pings and closes are answered by the library, as they are read.
                    _ => {}
                }
            }
        }
    }
    Ok(())
}
