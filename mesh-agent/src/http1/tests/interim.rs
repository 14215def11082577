//! Interim responses: before the final response of their request, and never inside another.

use std::{
    convert::Infallible,
    io,
    sync::{Arc, Mutex, PoisonError},
};

use bytes::Bytes;
use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::oneshot,
};

use super::{Edge, Gate, Limits, mock::Pieces};

const HINT: &str = "HTTP/1.1 103 Early Hints\r\nlink: </a>\r\n\r\n";

fn hint(gate: &Gate) {
    let mut headers = HeaderMap::new();
    headers.insert(header::LINK, HeaderValue::from_static("</a>"));
    headers.insert(header::CONNECTION, HeaderValue::from_static("close"));
    headers.insert(header::CONTENT_LENGTH, HeaderValue::from_static("5"));
    gate.inform(StatusCode::EARLY_HINTS, &headers);
}

/// A client of a hyper server whose service hints, and answers at once or when `held` is told to.
fn serve(held: Option<oneshot::Receiver<()>>, capacity: usize) -> tokio::io::DuplexStream {
    let (client, server) = tokio::io::duplex(capacity);
    let (edge, gate) = Edge::new(server, Limits::default());
    let held = Arc::new(Mutex::new(held));
    let service = service_fn(move |request: Request<Incoming>| {
        let gate = Arc::clone(&gate);
        let held = held.lock().unwrap_or_else(PoisonError::into_inner).take();
        async move {
            assert_eq!(gate.next_request(), None);
            hint(&gate);
            if let Some(held) = held {
                let _ = held.await;
            }
            let body =
                request.into_body().collect().await.map_or(Bytes::new(), http_body_util::Collected::to_bytes);
            let body = if body.is_empty() { Bytes::from_static(b"ok") } else { body };
            Ok::<_, Infallible>(Response::new(Full::new(body)))
        }
    });
    let connection = http1::Builder::new()
        .half_close(true)
        .auto_date_header(false)
        .serve_connection(TokioIo::new(edge), service);
    tokio::spawn(connection);
    client
}

#[tokio::test]
async fn hints_arrive_before_the_final_response_is_there() -> io::Result<()> {
    let (answer, held) = oneshot::channel();
    let mut client = serve(Some(held), 1 << 10);
    client.write_all(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n").await?;
    let mut hint = vec![0; HINT.len()];
    client.read_exact(&mut hint).await?;
    assert_eq!(String::from_utf8_lossy(&hint), HINT);
    let _ = answer.send(());
    client.shutdown().await?;
    let mut rest = String::new();
    client.read_to_string(&mut rest).await?;
    assert_eq!(rest, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    Ok(())
}

#[tokio::test]
async fn hints_go_before_their_own_response_when_requests_are_pipelined() -> io::Result<()> {
    let mut client = serve(None, 1 << 12);
    client.write_all("GET / HTTP/1.1\r\nHost: a\r\n\r\n".repeat(3).as_bytes()).await?;
    client.shutdown().await?;
    let mut all = String::new();
    client.read_to_string(&mut all).await?;
    let each = format!("{HINT}HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok");
    assert_eq!(all, each.repeat(3));
    Ok(())
}

#[tokio::test]
async fn a_slow_reader_gets_no_hint_inside_a_response() -> io::Result<()> {
    // The pipe holds less than one response: hyper's buffer is seldom empty.
    let mut client = serve(None, 7);
    let (mut reading, mut writing) = tokio::io::split(&mut client);
    let body = "b".repeat(100);
    let request = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 100\r\n\r\n{body}");
    let mut all = String::new();
    let sending = async {
        writing.write_all(request.repeat(20).as_bytes()).await?;
        writing.shutdown().await
    };
    let (sent, read) = tokio::join!(sending, reading.read_to_string(&mut all));
    sent?;
    read?;
    let response = format!("HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n{body}");
    assert_eq!(all.replace(HINT, ""), response.repeat(20));
    assert!(all.starts_with(HINT), "the first can be placed, whatever comes after");
    Ok(())
}

#[tokio::test]
async fn a_hint_goes_beside_hypers_own_continue() -> io::Result<()> {
    let mut client = serve(None, 1 << 12);
    client
        .write_all(b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        .await?;
    let start = format!("{HINT}HTTP/1.1 100 Continue\r\n\r\n");
    let mut interim = vec![0; start.len()];
    client.read_exact(&mut interim).await?;
    assert_eq!(String::from_utf8_lossy(&interim), start);
    client.write_all(b"hi").await?;
    client.shutdown().await?;
    let mut rest = String::new();
    client.read_to_string(&mut rest).await?;
    assert_eq!(rest, "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nhi");
    Ok(())
}

/// An edge whose reader has taken the head of one request.
async fn asked(version: &str) -> io::Result<(Edge<Pieces>, Arc<Gate>)> {
    let pieces = vec![format!("GET / HTTP/{version}\r\nHost: a\r\n\r\n").into_bytes()];
    let (mut edge, gate) = Edge::new(Pieces::new(pieces), Limits::default());
    let mut space = [0; 100];
    assert!(edge.read(&mut space).await? > 0);
    assert_eq!(gate.next_request(), None);
    Ok((edge, gate))
}

#[tokio::test]
async fn what_cannot_be_placed_is_dropped() -> io::Result<()> {
    let (mut edge, gate) = asked("1.1").await?;
    edge.write_all(b"HTTP/1.1 100 Continue\r\n\r\n").await?;
    hint(&gate);
    edge.write_all(b"HTTP/1.1 200 OK\r\n").await?;
    hint(&gate);
    edge.flush().await?;
    let expected = format!("HTTP/1.1 100 Continue\r\n\r\n{HINT}HTTP/1.1 200 OK\r\n");
    assert_eq!(String::from_utf8_lossy(&edge.inner().written), expected);

    let (mut edge, gate) = asked("1.0").await?;
    hint(&gate);
    edge.flush().await?;
    assert_eq!(edge.inner().written, b"");

    let (mut edge, gate) = asked("1.1").await?;
    gate.inform(StatusCode::OK, &HeaderMap::new());
    gate.inform(StatusCode::SWITCHING_PROTOCOLS, &HeaderMap::new());
    for _ in 0..1000 {
        hint(&gate);
    }
    edge.flush().await?;
    let written = String::from_utf8_lossy(&edge.inner().written).into_owned();
    assert_eq!(written.replace(HINT, ""), "");
    assert!(written.len() <= 16 << 10, "{}", written.len());
    Ok(())
}
