//! Whatever valid requests are generated, and however they are cut: they pass byte for byte, and hyper counts the same.

use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::{Limits, server, through};

const TOKEN: &str = "[a-zA-Z0-9!#$%&'*+.^_`|~-]{1,12}";
const VALUE: &str = "([!-~\u{e9}]([ -~\t]{0,20}[!-~])?)?";

#[derive(Debug, Clone)]
enum Body {
    None,
    Length(Vec<u8>),
    Chunked(Vec<(Vec<u8>, String)>, Vec<String>),
}

fn body() -> impl Strategy<Value = Body> {
    let bytes = || prop::collection::vec(any::<u8>(), 1..200);
    let extension = "(;[a-z]{1,5}(=[a-z0-9]{1,5})?){0,2}";
    let trailers = prop::collection::vec((TOKEN, VALUE).prop_map(|(n, v)| format!("T-{n}: {v}\r\n")), 0..3);
    prop_oneof![
        Just(Body::None),
        bytes().prop_map(Body::Length),
        (prop::collection::vec((bytes(), extension), 0..4), trailers)
            .prop_map(|(chunks, trailers)| Body::Chunked(chunks, trailers)),
    ]
}

fn target() -> impl Strategy<Value = String> {
    prop_oneof![
        "/[a-zA-Z0-9._~%!$&'()*+,;=:@/|\\[\\]{}-]{0,30}(\\?[a-zA-Z0-9._~%!$&'()*+,;=:@/?-]{0,20})?",
        "http://[a-z]{1,10}(:[1-9][0-9]{0,3})?/[a-z]{0,10}",
    ]
}

fn request() -> impl Strategy<Value = Vec<u8>> {
    let headers = prop::collection::vec((TOKEN, VALUE), 0..6);
    let method = "(GET|POST|PUT|DELETE|M-SEARCH|x)";
    (method, target(), headers, body(), 0_usize..3).prop_map(|(method, target, headers, body, lines)| {
        let mut bytes =
            format!("{}{method} {target} HTTP/1.1\r\nHost: a\r\n", "\r\n".repeat(lines)).into_bytes();
        for (name, value) in headers {
            bytes.extend_from_slice(format!("X-{name}:{value}\r\n").as_bytes());
        }
        match body {
            Body::None => bytes.extend_from_slice(b"\r\n"),
            Body::Length(body) => {
                bytes.extend_from_slice(format!("Content-Length: {}\r\n\r\n", body.len()).as_bytes());
                bytes.extend_from_slice(&body);
            }
            Body::Chunked(chunks, trailers) => {
                bytes.extend_from_slice(b"transfer-encoding: chunked\r\n\r\n");
                for (data, extension) in chunks {
                    bytes.extend_from_slice(format!("{:x}{extension}\r\n", data.len()).as_bytes());
                    bytes.extend_from_slice(&data);
                    bytes.extend_from_slice(b"\r\n");
                }
                bytes.extend_from_slice(b"0\r\n");
                bytes.extend_from_slice(trailers.concat().as_bytes());
                bytes.extend_from_slice(b"\r\n");
            }
        }
        bytes
    })
}

/// The bytes in pieces of these sizes, again and again.
fn cut(bytes: &[u8], sizes: &[usize]) -> Vec<Vec<u8>> {
    let mut pieces = Vec::new();
    let mut rest = bytes;
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, after) = rest.split_at(rest.len().min(*size));
        pieces.push(piece.to_vec());
        rest = after;
    }
    pieces
}

/// How many of the requests hyper answered with 200, and whether that was all it said.
async fn answered(pieces: &[Vec<u8>]) -> std::io::Result<(usize, usize)> {
    let (mut client, io) = tokio::io::duplex(1 << 16);
    let (_, serving) = server::serve(io, Limits::default());
    for piece in pieces {
        client.write_all(piece).await?;
        tokio::task::yield_now().await;
    }
    client.shutdown().await?;
    let mut all = Vec::new();
    client.read_to_end(&mut all).await?;
    serving.await?;
    let text = String::from_utf8_lossy(&all);
    Ok((text.matches("HTTP/1.1 200 OK\r\n").count(), text.matches("HTTP/1.1 ").count()))
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(128) })]

    #[test]
    fn valid_requests_pass_whole_and_hyper_reads_as_many(
        requests in prop::collection::vec(request(), 1..6),
        sizes in prop::collection::vec(1_usize..300, 1..8),
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build()?;
        let all = requests.concat();
        // Empty lines before a request are the edge's to take.
        let expected: Vec<u8> =
            requests.iter().flat_map(|bytes| bytes[bytes.iter().position(|b| *b > b' ').unwrap_or(0)..].to_vec()).collect();
        let (passed, gate) = runtime.block_on(through(cut(&all, &sizes), Limits::default()))?;
        prop_assert_eq!(String::from_utf8_lossy(&passed), String::from_utf8_lossy(&expected));
        for _ in &requests {
            prop_assert_eq!(gate.next_request(), None);
        }
        let counts = runtime.block_on(answered(&cut(&all, &sizes)))?;
        prop_assert_eq!(counts, (requests.len(), requests.len()));
    }
}
