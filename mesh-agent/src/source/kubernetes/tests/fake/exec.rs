//! Commands that are run in containers, over a websocket as the API server has it (`v5.channel.k8s.io`).

use std::sync::Arc;

use futures_util::SinkExt as _;
use http::{HeaderMap, Response};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use serde_json::json;
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, handshake::derive_accept_key, protocol::Role},
};

use super::Body;

/// What runs: the pod's name and the command are told.
pub(crate) type Run = Arc<dyn Fn(&str, &[String]) -> Ran + Send + Sync>;

/// What a command has done.
#[derive(Clone, Default)]
pub(crate) struct Ran {
    /// Pieces of its standard output.
    pub out: Vec<String>,
    /// Its standard error.
    pub errors: String,
    /// Its exit code; none when the connection is cut before it ends.
    pub code: Option<u8>,
}

/// The command in a query.
pub(super) fn command(query: &str) -> Vec<String> {
    let words = query.split('&').filter_map(|pair| pair.strip_prefix("command="));
    let decoded = |word: &str| {
        percent_encoding::percent_decode_str(&word.replace('+', " ")).decode_utf8_lossy().into_owned()
    };
    words.map(decoded).collect()
}

/// Takes the connection over, and says on it what the command has done.
pub(super) fn answer(ran: Ran, headers: &HeaderMap, upgrade: OnUpgrade) -> Response<Body> {
    tokio::spawn(async move {
        let connection = TokioIo::new(upgrade.await.unwrap());
        let mut socket = WebSocketStream::from_raw_socket(connection, Role::Server, None).await;
        let on = |channel: u8, text: &str| Message::binary([&[channel], text.as_bytes()].concat());
        for piece in &ran.out {
            socket.send(on(1, piece)).await.unwrap();
        }
        if !ran.errors.is_empty() {
            socket.send(on(2, &ran.errors)).await.unwrap();
        }
        let Some(code) = ran.code else { return };
        let status = match code {
            0 => json!({"status": "Success"}),
            code => json!({"status": "Failure", "reason": "NonZeroExitCode", "message": "it failed",
                           "details": {"causes": [{"reason": "ExitCode", "message": code.to_string()}]}}),
        };
        socket.send(on(3, &status.to_string())).await.unwrap();
        drop(socket.close(None).await);
    });
    let key = headers.get("sec-websocket-key").unwrap();
    let mut response = super::answer::whole(101, &json!(null));
    for (name, value) in [
        ("connection", "Upgrade".to_owned()),
        ("upgrade", "websocket".to_owned()),
        ("sec-websocket-accept", derive_accept_key(key.as_bytes())),
        ("sec-websocket-protocol", "v5.channel.k8s.io".to_owned()),
    ] {
        response.headers_mut().insert(name, value.parse().unwrap());
    }
    response
}
