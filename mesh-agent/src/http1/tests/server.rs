//! The edge in front of a hyper server, as the proxy has it.

use std::{convert::Infallible, io, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

use super::{Edge, Gate, Limits};

/// Serves one connection; each request is answered with what the service saw of it.
pub fn serve(io: DuplexStream, limits: Limits) -> (Arc<Gate>, tokio::task::JoinHandle<bool>) {
    let (edge, gate) = Edge::new(io, limits);
    let shared = Arc::clone(&gate);
    let service = service_fn(move |request| answer(Arc::clone(&shared), request));
    let connection = http1::Builder::new()
        .half_close(true)
        .auto_date_header(false)
        .max_buf_size(limits.head_bytes.max(8 << 10))
        .serve_connection(TokioIo::new(edge), service);
    (gate, tokio::spawn(async move { connection.await.is_ok() }))
}

async fn answer(gate: Arc<Gate>, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Infallible> {
    if let Some(refusal) = gate.next_request() {
        return Ok(response(refusal.status(), &refusal.to_string()));
    }
    let what = format!("{} {}", request.method(), request.uri());
    Ok(match request.into_body().collect().await {
        Ok(body) => {
            let trailers = body.trailers().map_or(0, http::HeaderMap::len);
            let length = body.to_bytes().len();
            response(StatusCode::OK, &format!("{what}, {length} bytes, {trailers} trailers"))
        }
        Err(error) => {
            let refusal = gate.body_refusal();
            let text = refusal.map_or_else(|| format!("broken: {error}"), |refusal| refusal.to_string());
            response(StatusCode::BAD_REQUEST, &text)
        }
    })
}

fn response(status: StatusCode, text: &str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(text.to_owned())));
    *response.status_mut() = status;
    response
}

/// All that comes back for these bytes: status and body of each response.
async fn talk(bytes: &[u8], limits: Limits) -> io::Result<Vec<(String, String)>> {
    let (mut client, server) = tokio::io::duplex(1 << 16);
    let (_, serving) = serve(server, limits);
    client.write_all(bytes).await?;
    client.shutdown().await?;
    let mut all = String::new();
    client.read_to_string(&mut all).await?;
    serving.await?;
    let mut responses = Vec::new();
    let mut rest = all.as_str();
    while let Some((head, after)) = rest.split_once("\r\n\r\n") {
        let length = head.split("content-length: ").nth(1).and_then(|rest| rest.lines().next());
        let length = length.and_then(|length| length.parse().ok()).unwrap_or(0);
        let status = head.split(' ').nth(1).unwrap_or_default();
        let close = if head.contains("connection: close") { " close" } else { "" };
        responses.push((format!("{status}{close}"), after[..length].to_owned()));
        rest = &after[length..];
    }
    assert_eq!(rest, "");
    Ok(responses)
}

fn seen(responses: &[(String, String)]) -> Vec<(&str, &str)> {
    responses.iter().map(|(status, text)| (status.as_str(), text.as_str())).collect()
}

#[tokio::test]
async fn requests_on_one_connection_are_answered_in_order() -> io::Result<()> {
    let requests = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\n\
                    POST /2 HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhello\
                    POST /3 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n\
                    5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nX-Sum: 1\r\n\r\n\
                    GET /4 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\nGET /5 HTTP/1.1\r\n\r\n";
    assert_eq!(
        seen(&talk(requests.as_bytes(), Limits::default()).await?),
        [
            ("200", "GET /1, 0 bytes, 0 trailers"),
            ("200", "POST /2, 5 bytes, 0 trailers"),
            ("200", "POST /3, 11 bytes, 1 trailers"),
            ("200 close", "GET /4, 0 bytes, 0 trailers"),
        ]
    );
    Ok(())
}

#[tokio::test]
async fn a_refusal_is_answered_after_what_came_before_it_and_closes() -> io::Result<()> {
    let requests = "GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HTTP/1.1\r\nHost: a\r\n\r\n\
                    GET /3 HTTP/1.1\r\nHost : a\r\n\r\nGET /4 HTTP/1.1\r\nHost: a\r\n\r\n";
    let rule = "blank between a header's name and its colon (RFC 9112 §5.1)";
    assert_eq!(
        seen(&talk(requests.as_bytes(), Limits::default()).await?),
        [("200", "GET /1, 0 bytes, 0 trailers"), ("200", "GET /2, 0 bytes, 0 trailers"), ("400 close", rule)]
    );
    Ok(())
}

#[tokio::test]
async fn what_is_too_large_has_a_status_of_its_own() -> io::Result<()> {
    let limits = Limits { head_bytes: 4 << 10, headers: 10, target_bytes: 100 };
    let table = [
        (format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "t".repeat(100)), "414 close"),
        (format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: y\r\n".repeat(10)), "431 close"),
        (format!("GET / HTTP/1.1\r\nHost: a\r\nX: {}\r\n\r\n", "x".repeat(4 << 10)), "431 close"),
    ];
    for (request, status) in table {
        let responses = talk(request.as_bytes(), limits).await?;
        assert_eq!(responses.len(), 1);
        assert_eq!(responses[0].0, status, "{}", responses[0].1);
    }
    // As large as may be, hyper takes too.
    let limits = Limits::default();
    let lines = "x: y\r\n".repeat(limits.headers - 1);
    let target = "t".repeat(limits.target_bytes - 1);
    let start = format!("GET /{target} HTTP/1.1\r\n{lines}Host: ");
    let request = format!("{start}{}\r\n\r\n", "h".repeat(limits.head_bytes - start.len() - 4));
    assert_eq!(talk(request.as_bytes(), limits).await?[0].0, "200");
    Ok(())
}

#[tokio::test]
async fn a_broken_chunk_reaches_the_service_as_a_refusal() -> io::Result<()> {
    for body in ["5\r\nhello\n0\r\n\r\n", "5\r\nhello\r\n0x\r\n\r\n", "0\r\nHost: b\r\n\r\n"] {
        let request = format!(
            "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n{body}GET / HTTP/1.1\r\n"
        );
        let responses = talk(request.as_bytes(), Limits::default()).await?;
        assert_eq!(responses.len(), 1, "{body:?}: {responses:?}");
        assert!(responses[0].0.starts_with("400") && responses[0].1.contains("RFC 9"), "{responses:?}");
    }
    // What the client itself breaks off is no refusal of ours.
    let request = "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nhello";
    let responses = talk(request.as_bytes(), Limits::default()).await?;
    assert!(responses[0].1.starts_with("broken"), "{responses:?}");
    Ok(())
}

#[tokio::test]
async fn a_head_that_takes_too_long_is_answered() -> io::Result<()> {
    let (mut client, server) = tokio::io::duplex(1 << 10);
    let (gate, serving) = serve(server, Limits::default());
    gate.expire_head();
    client.write_all(b"GET /1 HTTP/1.1\r\nHost: a\r\n\r\nGET /2 HT").await?;
    let mut first = [0; 16];
    client.read_exact(&mut first).await?;
    assert_eq!(&first, b"HTTP/1.1 200 OK\r");
    while !gate.is_mid_head() {
        tokio::task::yield_now().await;
    }
    gate.expire_head();
    let mut rest = String::new();
    client.read_to_string(&mut rest).await?;
    assert!(rest.contains("HTTP/1.1 408 Request Timeout\r\nconnection: close\r\n"), "{rest}");
    assert!(rest.ends_with("did not arrive in time"), "{rest}");
    drop(client);
    assert!(serving.await?);
    Ok(())
}

#[tokio::test(start_paused = true)]
async fn a_refused_client_is_read_until_it_closes_and_not_for_ever() -> io::Result<()> {
    let (mut client, server) = tokio::io::duplex(64);
    let (_, serving) = serve(server, Limits::default());
    let (mut reading, mut writing) = tokio::io::split(&mut client);
    let sending = async {
        // Far more than the pipe holds: it can only be sent when somebody reads it.
        writing.write_all(b"nonsense\r\n").await?;
        for _ in 0..100 {
            writing.write_all(&[b'x'; 1 << 10]).await?;
        }
        io::Result::Ok(())
    };
    let mut all = String::new();
    let (sent, read) = tokio::join!(sending, reading.read_to_string(&mut all));
    sent?;
    read?;
    assert!(all.starts_with("HTTP/1.1 400 Bad Request\r\n"), "{all}");
    // The client stays: the server does not, and the clock tells how long it did.
    let waited = tokio::time::Instant::now();
    assert!(serving.await?);
    assert!(waited.elapsed() <= std::time::Duration::from_secs(1));
    Ok(())
}

#[tokio::test]
async fn large_bodies_arrive_whole() -> io::Result<()> {
    let body = 3 << 20;
    let mut requests = format!("POST /1 HTTP/1.1\r\nHost: a\r\nContent-Length: {body}\r\n\r\n").into_bytes();
    requests.extend(std::iter::repeat_n(b'\n', body));
    requests.extend_from_slice(b"POST /2 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n");
    for size in [1, 10, 100, 1 << 10, 1 << 16, 1 << 20] {
        requests.extend_from_slice(format!("{size:x}\r\n").as_bytes());
        requests.extend(std::iter::repeat_n(b'\r', size));
        requests.extend_from_slice(b"\r\n");
    }
    requests.extend_from_slice(b"0\r\n\r\n");
    let responses = talk(&requests, Limits::default()).await?;
    let sizes = 1 + 10 + 100 + (1 << 10) + (1 << 16) + (1 << 20);
    assert_eq!(responses[0].1, format!("POST /1, {body} bytes, 0 trailers"));
    assert_eq!(responses[1].1, format!("POST /2, {sizes} bytes, 0 trailers"));
    Ok(())
}
