//! Byte streams: whole, in both directions, each ending by itself, and never ending quietly when they broke.

use std::{future::pending, io::ErrorKind};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::mpsc,
};

use super::*;

async fn either(node: &Node, pair: &Pair, wire: Wire) -> Result<MeshConnection> {
    match wire {
        Wire::MeshH2 => node.connect(pair).await,
        Wire::Hbone => node.connect_tunnels(pair).await,
    }
}

/// Reads everything, then answers with how much it was, then ends.
fn count(mut stream: Box<dyn Bytes>) -> AppFuture {
    Box::pin(async move {
        let mut all = Vec::new();
        if stream.read_to_end(&mut all).await.is_ok() {
            let _ = stream.write_all(all.len().to_string().as_bytes()).await;
            let _ = stream.shutdown().await;
        }
    })
}

/// Ends its own direction first, then expects the other to go on.
fn greet_and_listen(mut stream: Box<dyn Bytes>) -> AppFuture {
    Box::pin(async move {
        let _ = stream.write_all(b"hello").await;
        let _ = stream.shutdown().await;
        let mut all = Vec::new();
        let heard = stream.read_to_end(&mut all).await;
        assert!(heard.is_ok() && all == b"still here", "{heard:?} {all:?}");
    })
}

#[tokio::test]
async fn the_client_may_end_first() -> TestResult {
    let pair = Pair::new().await?;
    for wire in [Wire::MeshH2, Wire::Hbone] {
        let node = Node::start(&pair.server, 1, count).await?;
        let mut tunnel = either(&node, &pair, wire).await?.open_tunnel(ECHO, CLIENT).await?;
        tunnel.write_all(&[1; 1000]).await?;
        tunnel.shutdown().await?;
        let mut answer = String::new();
        tunnel.read_to_string(&mut answer).await?;
        assert_eq!(answer, "1000", "{wire:?}");
    }
    Ok(())
}

#[tokio::test]
async fn the_server_may_end_first() -> TestResult {
    let pair = Pair::new().await?;
    for wire in [Wire::MeshH2, Wire::Hbone] {
        let mut node = Node::start(&pair.server, 1, greet_and_listen).await?;
        let mut tunnel = either(&node, &pair, wire).await?.open_tunnel(ECHO, CLIENT).await?;
        let mut greeting = String::new();
        tunnel.read_to_string(&mut greeting).await?;
        assert_eq!(greeting, "hello");
        tunnel.write_all(b"still here").await?;
        tunnel.shutdown().await?;
        drop(tunnel);
        // Ends once its last stream and handle are gone; a failed assertion in the app would show here.
        node.served.join_next().await.ok_or("nothing was served")???;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sixty_four_mebibytes_come_back_whole() -> TestResult {
    const SIZE: usize = 64 << 20;
    let pair = Pair::new().await?;
    for wire in [Wire::MeshH2, Wire::Hbone] {
        let node = Node::start(&pair.server, 1, echo).await?;
        let tunnel = either(&node, &pair, wire).await?.open_tunnel(ECHO, CLIENT).await?;
        let (mut reader, mut writer) = tokio::io::split(tunnel);
        let pattern: Vec<u8> = (0..=u8::MAX).cycle().take(1 << 16).collect();
        let sent = pattern.clone();
        let writing = tokio::spawn(async move {
            for _ in 0..SIZE / sent.len() {
                writer.write_all(&sent).await?;
            }
            writer.shutdown().await
        });
        let (mut got, mut chunk) = (0, vec![0; 1 << 16]);
        loop {
            let count = reader.read(&mut chunk).await?;
            if count == 0 {
                break;
            }
            let right =
                chunk[..count].iter().zip(pattern.iter().cycle().skip(got % 256)).all(|(a, b)| a == b);
            assert!(right, "{wire:?}: other bytes came back after {got}");
            got += count;
        }
        writing.await??;
        assert_eq!(got, SIZE, "{wire:?}");
    }
    Ok(())
}

#[tokio::test]
async fn a_client_that_breaks_off_is_no_end_of_file() -> TestResult {
    let pair = Pair::new().await?;
    let (report, mut reported) = mpsc::channel(1);
    let (dialled, accepted) = sockets().await?;
    let server = Arc::clone(&pair.server);
    let serving = tokio::spawn(async move {
        let tls = accept(accepted, &server).await?.tls;
        super::super::serve(tls, Wire::Hbone, &[POD], &Drain::default(), FLUSH, pending(), move |stream| {
            let report = report.clone();
            async move {
                let MeshStream::Tunnel(tunnel) = stream else { return };
                let Ok(mut stream) = tunnel.accept() else { return };
                let outcome = stream.read_to_end(&mut Vec::new()).await;
                let _ = report.send(outcome).await;
            }
        })
        .await
    });
    let connection = connect_tunnels(dialled, &pair.client, std::slice::from_ref(&pair.server.id)).await?;
    let mut tunnel = connection.open_tunnel(ECHO, CLIENT).await?;
    tunnel.write_all(b"half of it").await?;
    drop(tunnel);
    let error = reported.recv().await.ok_or("no report")?.err().ok_or("a quiet end of file")?;
    assert_eq!(error.kind(), ErrorKind::ConnectionReset);
    // CANCEL would be an end of file to hyper and ztunnel.
    let reason = error.get_ref().and_then(|inner| inner.downcast_ref::<h2::Error>()?.reason());
    assert_eq!(reason, Some(h2::Reason::CONNECT_ERROR));
    drop(connection);
    serving.await??;
    Ok(())
}

/// Sends a part and breaks off.
fn break_off(mut stream: Box<dyn Bytes>) -> AppFuture {
    Box::pin(async move {
        let _ = stream.write_all(b"half of it").await;
        // The client's word: the part has arrived.
        let _ = stream.read_u8().await;
    })
}

#[tokio::test]
async fn a_server_that_breaks_off_is_no_end_of_file() -> TestResult {
    let pair = Pair::new().await?;
    let node = Node::start(&pair.server, 1, break_off).await?;
    let mut tunnel = node.connect_tunnels(&pair).await?.open_tunnel(ECHO, CLIENT).await?;
    let mut part = [0; 10];
    tunnel.read_exact(&mut part).await?;
    assert_eq!(&part, b"half of it");
    tunnel.write_u8(1).await?;
    let outcome = tunnel.read(&mut part).await;
    assert_eq!(outcome.map_err(|error| error.kind()), Err(ErrorKind::ConnectionReset));
    let outcome = loop {
        if let Err(error) = tunnel.write_all(&part).await {
            break error.kind();
        }
    };
    assert_eq!(outcome, ErrorKind::ConnectionReset);
    Ok(())
}

#[tokio::test]
async fn refusals_have_the_kind_of_their_status() -> TestResult {
    let pair = Pair::new().await?;
    for wire in [Wire::MeshH2, Wire::Hbone] {
        let node = Node::start(&pair.server, 1, echo).await?;
        let connection = either(&node, &pair, wire).await?;
        for (destination, kind) in [
            (SocketAddr::new(POD, 401), Kind::Denied),
            (SocketAddr::new(POD, 503), Kind::ConnectFailure),
            (SocketAddr::new(POD, 15001), Kind::BadRequest),
            ("10.9.9.9:80".parse()?, Kind::BadRequest),
        ] {
            let outcome = connection.open_tunnel(destination, CLIENT).await.map(|_| ());
            assert_eq!(outcome.map_err(|error| error.kind), Err(kind), "{wire:?} {destination}");
        }
        let mut tunnel = connection.open_tunnel(ECHO, CLIENT).await?;
        tunnel.shutdown().await?;
        assert_eq!(tunnel.read(&mut [0]).await?, 0, "the connection did not survive the refusals");
    }
    Ok(())
}

#[tokio::test]
async fn a_drained_connection_finishes_its_streams_and_takes_no_more() -> TestResult {
    let pair = Pair::new().await?;
    let mut node = Node::start(&pair.server, 1, echo).await?;
    let connection = node.connect_tunnels(&pair).await?;
    let mut tunnel = connection.open_tunnel(ECHO, CLIENT).await?;
    node.drain.start();
    // The GOAWAY comes before any answer to what is sent after it.
    let mut byte = [0];
    while connection.is_open() {
        tunnel.write_all(b"x").await?;
        tunnel.read_exact(&mut byte).await?;
    }
    let refused = connection.open_tunnel(ECHO, CLIENT).await.map(|_| ());
    assert_eq!(refused.map_err(|error| error.kind), Err(Kind::RefusedStream));
    tunnel.write_all(b"y").await?;
    tunnel.read_exact(&mut byte).await?;
    assert_eq!(&byte, b"y");
    tunnel.shutdown().await?;
    assert_eq!(tunnel.read(&mut byte).await?, 0);
    node.served.join_next().await.ok_or("nothing was served")???;
    Ok(())
}

#[tokio::test]
async fn a_hundred_streams_and_no_more() -> TestResult {
    let pair = Pair::new().await?;
    let node = Node::start(&pair.server, 1, echo).await?;
    let connection = node.connect_tunnels(&pair).await?;
    let mut open = Vec::new();
    for _ in 0..100 {
        open.push(connection.open_tunnel(ECHO, CLIENT).await?);
    }
    assert!(!connection.is_open());
    let refused = connection.open_tunnel(ECHO, CLIENT).await.map(|_| ());
    assert_eq!(refused.map_err(|error| error.kind), Err(Kind::RefusedStream));
    open.pop();
    assert!(connection.is_open());
    connection.open_tunnel(ECHO, CLIENT).await?;
    Ok(())
}
