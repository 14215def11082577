//! Requests that may turn the connection into something else: CONNECT and `Upgrade`.

use std::{convert::Infallible, io, sync::Arc};

use bytes::Bytes;
use http::{Request, Response, StatusCode, header::CONNECTION, header::UPGRADE};
use http_body_util::Empty;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::Notify,
};

use super::{Edge, Gate, Limits, mock, mock::Pieces};

const UPGRADING: &str = "POST /up HTTP/1.1\r\nHost: a\r\nUpgrade: x\r\nContent-Length: 5\r\n\r\nhello";
const NEXT: &str = "GET /next HTTP/1.1\r\nHost: a\r\n\r\n";

#[tokio::test]
async fn nothing_passes_until_the_service_has_said() -> io::Result<()> {
    let table: [(&str, &str, bool, &str); 4] = [
        (UPGRADING, NEXT, false, NEXT),
        (UPGRADING, "\0raw\n", true, "\0raw\n"),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "\x16\x03", true, "\x16\x03"),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\n\r\n", "\x16\x03", false, super::STAND_IN),
    ];
    for (request, after, yes, passes) in table {
        let pieces = vec![format!("{request}{after}").into_bytes()];
        let (mut edge, gate) = Edge::new(Pieces::new(pieces), Limits::default());
        let mut passed = vec![0; request.len()];
        edge.read_exact(&mut passed).await?;
        assert_eq!(passed, request.as_bytes());
        let mut rest = Vec::new();
        {
            let mut reading = std::pin::pin!(edge.read_to_end(&mut rest));
            assert!(mock::once(reading.as_mut()).await.is_none());
            gate.switched(yes);
            gate.switched(!yes);
            reading.await?;
        }
        assert_eq!(String::from_utf8_lossy(&rest), passes);
    }
    Ok(())
}

#[tokio::test]
async fn a_word_before_the_body_has_ended_holds_and_one_for_other_requests_does_not() -> io::Result<()> {
    let bytes = format!("{NEXT}{UPGRADING}\0raw");
    let (mut edge, gate) = Edge::new(Pieces::new(vec![bytes.clone().into_bytes()]), Limits::default());
    let mut space = [0; 200];
    gate.switched(true);
    let first = edge.read(&mut space).await?;
    assert_eq!(&space[..first], NEXT.as_bytes());
    gate.switched(true);
    let mut head = [0; 20];
    edge.read_exact(&mut head).await?;
    gate.switched(true);
    let mut rest = String::new();
    edge.read_to_string(&mut rest).await?;
    assert_eq!(rest, bytes[NEXT.len() + 20..]);
    Ok(())
}

fn upgrade(gate: &Gate, upgraded: Arc<Notify>, request: Request<Incoming>) -> Response<Empty<Bytes>> {
    let mut response = Response::new(Empty::new());
    if gate.next_request().is_some() {
        *response.status_mut() = StatusCode::BAD_REQUEST;
        return response;
    }
    if !request.headers().contains_key(UPGRADE) {
        return response;
    }
    let accepted = request.uri().path() == "/yes";
    gate.switched(accepted);
    if accepted {
        *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
        response.headers_mut().insert(CONNECTION, http::HeaderValue::from_static("upgrade"));
        response.headers_mut().insert(UPGRADE, http::HeaderValue::from_static("echo"));
        tokio::spawn(async move {
            let io = hyper::upgrade::on(request).await.map_err(io::Error::other)?;
            let mut io = TokioIo::new(io);
            let mut all = Vec::new();
            io.read_to_end(&mut all).await?;
            io.write_all(&all).await?;
            io.shutdown().await?;
            upgraded.notify_one();
            io::Result::Ok(())
        });
    }
    response
}

#[tokio::test]
async fn hyper_upgrades_through_the_edge_and_goes_on_where_it_does_not() -> io::Result<()> {
    let (mut client, server) = tokio::io::duplex(1 << 12);
    let (edge, gate) = Edge::new(server, Limits::default());
    let upgraded = Arc::new(Notify::new());
    let told = Arc::clone(&upgraded);
    let service = service_fn(move |request| {
        let response = upgrade(&gate, Arc::clone(&told), request);
        async move { Ok::<_, Infallible>(response) }
    });
    let connection =
        http1::Builder::new().half_close(true).serve_connection(TokioIo::new(edge), service).with_upgrades();
    let serving = tokio::spawn(connection);
    let asking =
        |path| format!("GET {path} HTTP/1.1\r\nHost: a\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n");
    let raw = "\n\0not HTTP\r\n\r\n";
    let all = format!("{}{NEXT}{}{raw}", asking("/no"), asking("/yes"));
    client.write_all(all.as_bytes()).await?;
    client.shutdown().await?;
    let mut answers = String::new();
    client.read_to_string(&mut answers).await?;
    upgraded.notified().await;
    serving.await?.map_err(io::Error::other)?;
    let statuses: Vec<_> = answers.split("HTTP/1.1 ").skip(1).map(|answer| &answer[..3]).collect();
    assert_eq!(statuses, ["200", "200", "101"]);
    assert!(answers.ends_with(&format!("\r\n\r\n{raw}")), "{answers:?}");
    Ok(())
}
