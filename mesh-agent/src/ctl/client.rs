//! Asks the agent's admin endpoint.
//!
//! Promises to tell "nobody answers" from "the answer is an error". Tested in `tests.rs`.

use std::{error::Error as _, fmt::Write as _, io, time::Duration};

use bytes::{Bytes, BytesMut};
use http::{Request, StatusCode};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::{body::Incoming, client::conn::http1};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpStream, UnixStream},
    time::timeout,
};

use super::Failure;
use crate::admin::Address;

/// Time for an agent to take the connection and to begin its answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes of one answer, or of one line of a followed one.
const LIMIT: usize = 1 << 30;

/// The agent of this node.
#[derive(Debug)]
pub(super) struct Client {
    address: Address,
}

impl Client {
    pub fn new(address: Address) -> Self {
        Self { address }
    }

    fn unreachable(&self, error: &dyn std::fmt::Display) -> Failure {
        Failure::Unreachable(format!(
            "no agent answers on {}: {error}; is it running, and may you read its socket? --run-dir and --admin say \
             where it is",
            self.address
        ))
    }

    async fn send(&self, path: &str) -> Result<Incoming, Failure> {
        let answer = async {
            match &self.address {
                Address::Unix(path_of) => exchange(UnixStream::connect(path_of).await?, path).await,
                Address::Tcp(address) => exchange(TcpStream::connect(address).await?, path).await,
            }
        };
        let response = match timeout(ANSWER_TIMEOUT, answer).await {
            Err(_) => {
                return Err(self.unreachable(&format!("no answer within {} s", ANSWER_TIMEOUT.as_secs())));
            }
            Ok(Err(error)) => return Err(self.unreachable(&error)),
            Ok(Ok(response)) => response,
        };
        if response.status() == StatusCode::OK {
            return Ok(response.into_body());
        }
        let status = response.status();
        let body = self.collect(response.into_body()).await?;
        let sentence = String::from_utf8_lossy(&body);
        Err(Failure::Request(format!("{path}: {status}: {}", sentence.trim())))
    }

    async fn collect(&self, body: Incoming) -> Result<Bytes, Failure> {
        let collected = Limited::new(body, LIMIT).collect().await;
        collected.map(http_body_util::Collected::to_bytes).map_err(|error| self.unreachable(&error))
    }

    /// The JSON at this path.
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Failure> {
        let body = self.collect(self.send(path).await?).await?;
        serde_json::from_slice(&body).map_err(|error| not_understood(path, &error))
    }

    /// The lines of JSON at this path, as they come.
    pub async fn lines(&self, path: &str) -> Result<Lines, Failure> {
        let body = self.send(path).await?;
        Ok(Lines { path: path.to_owned(), body, rest: BytesMut::new() })
    }
}

fn not_understood(path: &str, error: &serde_json::Error) -> Failure {
    Failure::Request(format!(
        "{path}: the answer is not understood ({error}): is the agent of another version?"
    ))
}

async fn exchange(
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    path: &str,
) -> io::Result<http::Response<Incoming>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(io::Error::other)?;
    // Ends with the connection; what goes wrong on it is seen in the answer.
    tokio::spawn(connection);
    let request = Request::get(path).header(http::header::HOST, "localhost").body(Empty::<Bytes>::new());
    let request = request.map_err(io::Error::other)?;
    sender.send_request(request).await.map_err(|error| {
        // The text of the outer error alone says little.
        io::Error::other(
            error.source().map_or_else(|| error.to_string(), |source| format!("{error}: {source}")),
        )
    })
}

/// Lines of JSON.
#[derive(Debug)]
pub(super) struct Lines {
    path: String,
    body: Incoming,
    rest: BytesMut,
}

impl Lines {
    /// The next line. `None` when the agent ended the answer.
    pub async fn next<T: DeserializeOwned>(&mut self) -> Result<Option<T>, Failure> {
        let mut searched = 0;
        loop {
            if let Some(end) = self.rest[searched..].iter().position(|byte| *byte == b'\n') {
                let line = self.rest.split_to(searched + end + 1);
                return serde_json::from_slice(&line)
                    .map(Some)
                    .map_err(|error| not_understood(&self.path, &error));
            }
            searched = self.rest.len();
            if searched > LIMIT {
                return Err(Failure::Request(format!("{}: a line has more than {LIMIT} bytes", self.path)));
            }
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => {
                    return Err(Failure::Unreachable(format!("the agent went away: {error}")));
                }
                Some(Ok(frame)) => {
                    if let Ok(data) = frame.into_data() {
                        self.rest.extend_from_slice(&data);
                    }
                }
            }
        }
    }
}

/// A value as part of a query.
pub(super) fn encoded(value: &str) -> String {
    let mut out = String::with_capacity(value.len());
    for byte in value.bytes() {
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}
