//! HTTP requests as streams of their own.

use std::future::pending;

use bytes::Bytes;
use h2::Reason;
use http::{HeaderMap, HeaderName, HeaderValue, Request, Response, StatusCode};
use http_body_util::BodyExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::oneshot,
};

use super::*;
use crate::state::snapshot::Protocol;

/// The node's answer to a native request: its own body and trailers back, with what was seen of it in headers.
pub(super) fn answer(
    request: Request<Body>,
    port: u16,
    protocol: Protocol,
    peer: &SpiffeId,
) -> Response<Body> {
    let seen = format!("{} {} {port} {protocol:?} {}", request.method(), request.uri(), peer.service_account);
    let ours = request.headers().contains_key(MESH_PORT) || request.headers().contains_key(MESH_APP_PROTOCOL);
    let mut response = Response::new(request.into_body());
    if let Ok(seen) = HeaderValue::try_from(seen) {
        response.headers_mut().insert("x-seen", seen);
    }
    response.headers_mut().insert("x-ours-left", HeaderValue::from_static(if ours { "yes" } else { "no" }));
    // An app may answer with anything; the caller must not see it.
    response.headers_mut().insert(MESH_PORT, HeaderValue::from_static("1"));
    response
}

#[tokio::test]
async fn a_request_its_body_and_its_trailers_come_through() -> TestResult {
    let pair = Pair::new().await?;
    // A real body of a peer, trailers and all, comes from a connection of its own.
    let (body, _hop) = streamed(b"a body", Ending::Trailer("x-checksum", "42")).await?;
    let node = Node::start(&pair.server, 1, echo).await?;
    let connection = node.connect(&pair).await?;
    let request = Request::post("http://reviews:9080/a?b=c").header(MESH_PORT, "22").body(body)?;
    let response =
        connection.send(Box::new(request), SocketAddr::new(POD, 9080), Protocol::Http1, None).await?;
    assert_eq!(response.headers()["x-seen"], "POST http://reviews:9080/a?b=c 9080 Http1 client");
    assert_eq!(response.headers()["x-ours-left"], "no");
    assert!(!response.headers().contains_key(MESH_PORT));
    let collected = response.into_body().collect().await?;
    assert_eq!(
        collected.trailers().map(|trailers| trailers["x-checksum"].clone()),
        Some(HeaderValue::from_static("42"))
    );
    assert_eq!(collected.to_bytes(), Bytes::from_static(b"a body"));
    Ok(())
}

#[derive(Clone, Copy)]
enum Ending {
    Trailer(&'static str, &'static str),
    Reset(Reason),
}

impl Ending {
    fn of(self, send: &mut h2::SendStream<Bytes>) -> std::result::Result<(), h2::Error> {
        match self {
            Self::Trailer(name, value) => send.send_trailers(HeaderMap::from_iter([(
                HeaderName::from_static(name),
                HeaderValue::from_static(value),
            )])),
            Self::Reset(reason) => {
                send.send_reset(reason);
                Ok(())
            }
        }
    }
}

/// A body as it is received from a peer.
async fn streamed(
    data: &'static [u8],
    ending: Ending,
) -> std::result::Result<(Body, JoinSet<()>), Box<dyn std::error::Error + Send + Sync>> {
    let (near, far) = tokio::io::duplex(1 << 16);
    let mut tasks = JoinSet::new();
    let (head, arrived) = oneshot::channel::<()>();
    let mut arrived = Some(arrived);
    tasks.spawn(async move {
        let Ok(mut connection) = h2::server::handshake(far).await else { return };
        while let Some(Ok((_, mut reply))) = connection.accept().await {
            let Ok(mut send) = reply.send_response(Response::new(()), false) else { return };
            let sent = send.send_data(Bytes::from_static(data), false);
            // A reset overtakes what is still queued: the head must have arrived.
            if let (Ending::Reset(_), Some(arrived)) = (ending, arrived.take()) {
                tokio::spawn(async move {
                    let _ = arrived.await;
                    ending.of(&mut send)
                });
            } else {
                let _ = sent.and_then(|()| ending.of(&mut send));
            }
        }
    });
    let (sender, driver) = settings::client_builder(Wire::MeshH2).handshake(near).await?;
    tasks.spawn(async move {
        let _ = driver.await;
    });
    let request = Request::get("http://a/").body(Body::Empty)?;
    let response =
        crate::http2::send(sender, Box::new(request), None).await.map_err(|failed| failed.error)?;
    drop(head);
    Ok((response.into_body(), tasks))
}

#[tokio::test]
async fn a_body_that_breaks_off_is_no_whole_one() -> TestResult {
    let pair = Pair::new().await?;
    for reason in [Reason::CANCEL, Reason::INTERNAL_ERROR] {
        let (body, _hop) = streamed(b"half of it", Ending::Reset(reason)).await?;
        let node = Node::start(&pair.server, 1, echo).await?;
        let connection = node.connect(&pair).await?;
        let request = Request::post("http://reviews/").body(body)?;
        // The echo breaks off with what it echoes, before its head is sent or after.
        let outcome = match connection.send(Box::new(request), ECHO, Protocol::Http1, None).await {
            Ok(response) => {
                response.into_body().collect().await.map(|_| ()).map_err(|error| error.to_string())
            }
            Err(error) => Err(error.to_string()),
        };
        assert!(outcome.is_err(), "half a body passed for a whole one after {reason}");
    }
    Ok(())
}

#[tokio::test]
async fn ports_of_the_mesh_are_refused() -> TestResult {
    let pair = Pair::new().await?;
    let node = Node::start(&pair.server, 1, echo).await?;
    let connection = node.connect(&pair).await?;
    let request = Request::get("http://reviews/").body(Body::Empty)?;
    let response =
        connection.send(Box::new(request), SocketAddr::new(POD, 15006), Protocol::Http2, None).await?;
    assert_eq!(response.status(), StatusCode::BAD_REQUEST);
    Ok(())
}

#[tokio::test]
async fn hbone_carries_no_requests() -> TestResult {
    let pair = Pair::new().await?;
    let node = Node::start(&pair.server, 2, echo).await?;
    let connection = node.connect_tunnels(&pair).await?;
    let request = Request::get("http://reviews/").body(Body::Empty)?;
    let outcome = connection.send(Box::new(request), ECHO, Protocol::Http1, None).await.map(|_| ());
    assert_eq!(outcome.map_err(|error| error.kind), Err(Kind::BadRequest));

    // A peer that sends one all the same, with our headers on it.
    let config =
        pair.client.client_config(std::slice::from_ref(&pair.server.id), &[crate::identity::ALPN_H2])?;
    let tls = tokio_rustls::TlsConnector::from(config)
        .connect(crate::identity::server_name(POD), node.dial().await?)
        .await?;
    let (mut sender, driver) = h2::client::handshake(tls).await?;
    let driver = tokio::spawn(driver);
    for request in [
        Request::get("http://reviews/").header(MESH_PORT, "80").header(MESH_APP_PROTOCOL, "h2").body(())?,
        Request::get("http://reviews/").body(())?,
    ] {
        let (response, _) = sender.send_request(request, true)?;
        assert_eq!(response.await?.status(), StatusCode::BAD_REQUEST);
    }
    driver.abort();
    Ok(())
}

#[tokio::test]
async fn on_hbone_our_headers_mean_nothing() -> TestResult {
    let (near, far) = tokio::io::duplex(1 << 16);
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let peer = Arc::new(spiffe("client"));
        let handle = |stream| super::answer(stream, Arc::clone(&peer), echo);
        let _ =
            super::super::serve(far, Wire::Hbone, &[POD], &Drain::default(), FLUSH, pending(), handle).await;
    });
    let (mut sender, driver) = h2::client::handshake(near).await?;
    tasks.spawn(async move {
        let _ = driver.await;
    });
    let get =
        Request::get("http://reviews/").header(MESH_PORT, "80").header(MESH_APP_PROTOCOL, "h2").body(())?;
    assert_eq!(sender.send_request(get, true)?.0.await?.status(), StatusCode::BAD_REQUEST);
    let connect = Request::connect(ECHO.to_string()).header(MESH_PORT, "garbage").body(())?;
    let (response, mut send) = sender.send_request(connect, false)?;
    let response = response.await?;
    assert_eq!(response.status(), StatusCode::OK);
    send.send_data(Bytes::from_static(b"x"), true)?;
    assert_eq!(response.into_body().data().await.ok_or("no echo")??, "x");
    Ok(())
}

/// What the client says when the peer does this to its one request.
async fn failing(
    act: fn(&mut h2::server::SendResponse<Bytes>),
) -> std::result::Result<Kind, Box<dyn std::error::Error + Send + Sync>> {
    let pair = Pair::new().await?;
    let (dialled, accepted) = sockets().await?;
    let server = Arc::clone(&pair.server);
    let serving = tokio::spawn(async move {
        let tls = accept(accepted, &server).await?.tls;
        let broken = |error: h2::Error| Error::new(Kind::BadRequest, error.to_string());
        let mut connection = h2::server::handshake(tls).await.map_err(broken)?;
        let mut held = Vec::new();
        while let Some(Ok((request, mut reply))) = connection.accept().await {
            act(&mut reply);
            held.push((request, reply));
        }
        Result::Ok(())
    });
    let connection = connect(dialled, &pair.client, std::slice::from_ref(&pair.server.id)).await?;
    let request = Request::get("http://reviews/").body(Body::Empty)?;
    let outcome = connection.send(Box::new(request), ECHO, Protocol::Http1, None).await;
    serving.abort();
    Ok(outcome.err().ok_or("it was answered")?.kind)
}

#[tokio::test]
async fn what_may_be_tried_again_is_told_from_what_may_not() -> TestResult {
    assert_eq!(failing(|reply| reply.send_reset(Reason::REFUSED_STREAM)).await?, Kind::RefusedStream);
    assert_eq!(failing(|reply| reply.send_reset(Reason::INTERNAL_ERROR)).await?, Kind::UpstreamReset);
    assert_eq!(failing(|reply| reply.send_reset(Reason::CANCEL)).await?, Kind::UpstreamReset);
    Ok(())
}

#[tokio::test]
async fn a_stream_beyond_the_goaway_may_be_tried_again() -> TestResult {
    let pair = Pair::new().await?;
    let (dialled, accepted) = sockets().await?;
    let server = Arc::clone(&pair.server);
    let serving = tokio::spawn(async move {
        let mut tls = accept(accepted, &server).await?.tls;
        // SETTINGS, then GOAWAY: no stream was processed, no error.
        let frames = [&[0, 0, 0, 4, 0, 0, 0, 0, 0][..], &[0, 0, 8, 7, 0, 0, 0, 0, 0], &[0; 8]].concat();
        let broken = |error: std::io::Error| Error::new(Kind::BadRequest, error.to_string());
        tls.write_all(&frames).await.map_err(broken)?;
        tls.read_to_end(&mut Vec::new()).await.map_err(broken)
    });
    let connection = connect(dialled, &pair.client, std::slice::from_ref(&pair.server.id)).await?;
    let request = Request::get("http://reviews/").body(Body::Empty)?;
    let outcome = connection.send(Box::new(request), ECHO, Protocol::Http1, None).await.map(|_| ());
    assert_eq!(outcome.map_err(|error| error.kind), Err(Kind::RefusedStream));
    drop(connection);
    serving.await??;
    Ok(())
}

#[tokio::test]
async fn a_body_holds_its_place_until_its_end() -> TestResult {
    let pair = Pair::new().await?;
    let node = Node::start(&pair.server, 1, echo).await?;
    let connection = node.connect(&pair).await?;
    let get = || Request::get("http://reviews/").body(Body::Empty);
    let mut held = Vec::new();
    for _ in 0..100 {
        held.push(connection.send(Box::new(get()?), ECHO, Protocol::Http1, None).await?);
    }
    assert!(!connection.is_open());
    let refused = connection.send(Box::new(get()?), ECHO, Protocol::Http1, None).await.map(|_| ());
    assert_eq!(refused.map_err(|error| error.kind), Err(Kind::RefusedStream));
    held.clear();
    connection.send(Box::new(get()?), ECHO, Protocol::Http1, None).await?;
    Ok(())
}
