//! The edge against tables, against hyper, and against whatever is generated.

mod interim;
mod mock;
mod property;
mod refusals;
mod server;
mod switching;

use std::io;

use tokio::io::AsyncReadExt;

use super::{Edge, Gate, Limits, Refusal};
use mock::Pieces;

/// What hyper reads in the place of a refused request.
const STAND_IN: &str = "GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";

/// What passes of the pieces, to its end; the gate, with the refusals that the service was told of.
async fn through(pieces: Vec<Vec<u8>>, limits: Limits) -> io::Result<(Vec<u8>, std::sync::Arc<Gate>)> {
    let (mut edge, gate) = Edge::new(Pieces::new(pieces), limits);
    let mut passed = Vec::new();
    edge.read_to_end(&mut passed).await?;
    Ok((passed, gate))
}

/// The ways to cut bytes that matter: not at all, everywhere, and once at each place.
fn cuts(bytes: &[u8]) -> Vec<Vec<Vec<u8>>> {
    let mut cuts = vec![vec![bytes.to_vec()], bytes.iter().map(|byte| vec![*byte]).collect()];
    for at in 1..bytes.len() {
        cuts.push(vec![bytes[..at].to_vec(), bytes[at..].to_vec()]);
    }
    cuts
}

#[tokio::test]
async fn valid_requests_pass_byte_for_byte_however_they_are_cut() -> io::Result<()> {
    let table = [
        "GET /reviews/0?x=1&y=%20 HTTP/1.1\r\nHost: reviews:9080\r\n\r\n",
        "GET / HTTP/1.0\r\n\r\n",
        "GET http://reviews:9080/0 HTTP/1.1\r\nHost:\r\n\r\n",
        "OPTIONS * HTTP/1.1\r\nHost: a\r\nX-Empty:\r\nX-Tab:\ta\tb \r\nX-Text: \u{e9}\r\n\r\n",
        "PUT /[a]|\\^{b} HTTP/1.1\r\nhOsT: a\r\ncontent-length: 0\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 0011\r\n\r\nGET / HTTP/",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n\
         5\r\nhello\r\n00a;name=\"va lue\";other\r\n0123456789\r\n0;last\r\nX-Sum: 1\r\nX-Other:\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n0000000000000000\r\n\r\n",
    ];
    let all = table.concat();
    for pieces in cuts(all.as_bytes()) {
        let first = pieces[0].len();
        let (passed, gate) = through(pieces, Limits::default()).await?;
        assert_eq!(String::from_utf8_lossy(&passed), all, "cut at {first}");
        for _ in table {
            assert_eq!(gate.next_request(), None);
        }
        assert_eq!(gate.body_refusal(), None);
    }
    Ok(())
}

#[tokio::test]
async fn a_few_empty_lines_before_a_request_are_passed_over() -> io::Result<()> {
    let request = "GET / HTTP/1.1\r\nHost: a\r\n\r\n";
    let bytes = format!("\r\n\r\n\r\n\r\n{request}\r\n{request}\r\n");
    for pieces in cuts(bytes.as_bytes()) {
        let (passed, _) = through(pieces, Limits::default()).await?;
        assert_eq!(String::from_utf8_lossy(&passed), format!("{request}{request}"));
    }
    let (passed, gate) =
        through(vec![format!("{}{request}", "\r\n".repeat(5)).into_bytes()], Limits::default()).await?;
    assert_eq!(passed, STAND_IN.as_bytes());
    assert!(matches!(gate.next_request(), Some(Refusal::Malformed(_))));
    Ok(())
}

#[tokio::test]
async fn nothing_of_a_head_is_handed_on_before_it_is_complete() -> io::Result<()> {
    let (mut client, server) = tokio::io::duplex(1 << 10);
    let (mut edge, gate) = Edge::new(server, Limits::default());
    let mut space = [0; 100];
    for part in ["GET / HT", "TP/1.1\r\nHost: a\r\n", "X: y\r\n\r"] {
        tokio::io::AsyncWriteExt::write_all(&mut client, part.as_bytes()).await?;
        let reading = std::pin::pin!(edge.read(&mut space));
        assert!(mock::once(reading).await.is_none(), "after {part:?}");
        assert!(gate.is_mid_head());
    }
    tokio::io::AsyncWriteExt::write_all(&mut client, b"\n").await?;
    let read = edge.read(&mut space).await?;
    assert_eq!(&space[..read], b"GET / HTTP/1.1\r\nHost: a\r\nX: y\r\n\r\n");
    assert!(!gate.is_mid_head());
    Ok(())
}

#[tokio::test]
async fn a_body_goes_straight_into_the_readers_buffer() -> io::Result<()> {
    let body = vec![b'x'; 1 << 16];
    let head = format!("POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {}\r\n\r\n", body.len());
    let pieces = vec![head.clone().into_bytes(), body, b"GET / HTTP/1.1\r\nHost: b\r\n\r\n".to_vec()];
    let (mut edge, _) = Edge::new(Pieces::new(pieces), Limits::default());
    let mut space = vec![0; 1 << 17];
    assert_eq!(edge.read(&mut space).await?, head.len());
    assert_eq!(edge.read(&mut space).await?, 1 << 16, "one read, whatever the edge's own buffer");
    assert_eq!(edge.read(&mut space).await?, 27);
    assert_eq!(edge.read(&mut space).await?, 0);
    Ok(())
}
