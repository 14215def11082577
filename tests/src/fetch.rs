//! Small HTTP/1.1 GETs, for what agents serve to people.

use std::{net::SocketAddr, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use bytes::Bytes;
use http_body_util::{BodyExt as _, Empty};
use hyper::{Request, StatusCode, client::conn::http1};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpSocket, TcpStream, UnixStream},
};

use crate::net::Netns;

/// How long one answer may take.
const LIMIT: Duration = Duration::from_secs(5);

/// GETs `path` from `address` as seen inside a network namespace.
pub(crate) async fn get_inside(
    netns: &Netns,
    address: SocketAddr,
    path: &str,
) -> Result<(StatusCode, String)> {
    bounded(async {
        let stream = connect_inside(netns, address).await?;
        get(stream, path).await
    })
    .await
    .with_context(|| format!("GET http://{address}{path} in {}", netns.name()))
}

/// GETs `path` over a unix socket.
pub(crate) async fn get_unix(socket: &Path, path: &str) -> Result<(StatusCode, String)> {
    bounded(async { get(UnixStream::connect(socket).await?, path).await })
        .await
        .with_context(|| format!("GET {path} at {}", socket.display()))
}

async fn connect_inside(netns: &Netns, address: SocketAddr) -> Result<TcpStream> {
    let domain = socket2::Domain::for_address(address);
    let socket = netns.inside(|| {
        let socket = socket2::Socket::new(domain, socket2::Type::STREAM, None)?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    })?;
    // The socket belongs to the namespace it was made in, wherever it connects from.
    Ok(TcpSocket::from_std_stream(socket.into()).connect(address).await?)
}

async fn get(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    path: &str,
) -> Result<(StatusCode, String)> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = Request::get(path).header("host", "lab").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    Ok((status, String::from_utf8_lossy(&body).into_owned()))
}

async fn bounded<T>(work: impl Future<Output = Result<T>>) -> Result<T> {
    tokio::time::timeout(LIMIT, work).await.context("no answer in time")?
}
