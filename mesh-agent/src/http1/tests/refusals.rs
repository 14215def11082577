//! Each rule, by what breaks it: cut at every byte, behind a request that is fine.

use std::io;

use super::{Limits, Refusal, STAND_IN, cuts, through};

const BEFORE: &str = "GET /before HTTP/1.1\r\nHost: a\r\n\r\n";
const SMALL: Limits = Limits { head_bytes: 256, headers: 4, target_bytes: 32 };

/// The refusal of a request that must be refused before any of it has passed.
async fn refusal(request: &[u8], limits: Limits) -> io::Result<Refusal> {
    let bytes = [BEFORE.as_bytes(), request].concat();
    let expected = format!("{BEFORE}{STAND_IN}");
    let mut found = None;
    for pieces in cuts(&bytes) {
        let (passed, gate) = through(pieces, limits).await?;
        let text = String::from_utf8_lossy(request);
        assert_eq!(String::from_utf8_lossy(&passed), expected, "{text}");
        assert_eq!(gate.next_request(), None, "{text}");
        let refusal = gate.next_request();
        assert!(refusal.is_some() && (found.is_none() || found == refusal), "{text}: {refusal:?}");
        assert_eq!(gate.next_request(), None, "{text}");
        found = refusal;
    }
    found.ok_or_else(|| io::Error::other("no cut at all"))
}

#[tokio::test]
async fn heads_that_can_be_read_in_two_ways() -> io::Result<()> {
    let table: &[(&str, &str)] = &[
        ("Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "together with Content-Length"),
        ("Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n", "together with Content-Length"),
        ("Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", "several Content-Length"),
        ("Content-Length: 5\r\ncontent-length: 6\r\n\r\nhello", "several Content-Length"),
        ("Content-Length: 5, 5\r\n\r\nhello", "not a number"),
        ("Content-Length: +5\r\n\r\nhello", "not a number"),
        ("Content-Length: -1\r\n\r\n", "not a number"),
        ("Content-Length: 0x5\r\n\r\nhello", "not a number"),
        ("Content-Length: 5 5\r\n\r\nhello", "not a number"),
        ("Content-Length:\r\n\r\n", "not a number"),
        ("Content-Length: 18446744073709551616\r\n\r\n", "not a number"),
        ("Content-Length: 18446744073709551615\r\n\r\n", "not a number"),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", "several Transfer-Encoding"),
        ("Transfer-Encoding: gzip, chunked\r\n\r\n", "not `chunked`"),
        ("Transfer-Encoding: chunked, chunked\r\n\r\n", "not `chunked`"),
        ("Transfer-Encoding: identity\r\n\r\n", "not `chunked`"),
        ("Transfer-Encoding: xchunked\r\n\r\n", "not `chunked`"),
        ("Transfer-Encoding: \"chunked\"\r\n\r\n", "not `chunked`"),
        ("Transfer-Encoding:\r\n\r\n", "not `chunked`"),
        ("Transfer-Encoding: \x0bchunked\r\n\r\n", "control character"),
        ("Transfer-Encoding : chunked\r\n\r\n", "blank between"),
        ("Transfer-Encoding\t: chunked\r\n\r\n", "blank between"),
        (" Transfer-Encoding: chunked\r\n\r\n", "starts with a blank"),
        ("X: a\r\n\tb\r\n\r\n", "starts with a blank"),
        ("X: a\nTransfer-Encoding: chunked\r\n\r\n", "bare LF"),
        ("X: a\n\r\n", "bare LF"),
        ("X: a\r\n\n", "bare LF"),
        ("X: a\rContent-Length: 5\r\n\r\n", "control character"),
        ("X: a\r\r\n\r\n", "control character"),
        ("X: a\0b\r\n\r\n", "control character"),
        ("X: a\x7f\r\n\r\n", "control character"),
        ("X\0: a\r\n\r\n", "not a token"),
        ("X(y): a\r\n\r\n", "not a token"),
        (": a\r\n\r\n", "not a token"),
        ("X\r\n\r\n", "without a colon"),
        ("\rX: a\r\n\r\n", "not a token"),
        ("Host: b\r\n\r\n", "several Host"),
    ];
    for (rest, rule) in table {
        let request =
            format!("POST / HTTP/1.1\r\nHost: a\r\n{rest}GET /smuggled HTTP/1.1\r\nHost: a\r\n\r\n");
        let refusal = refusal(request.as_bytes(), Limits::default()).await?;
        assert!(matches!(refusal, Refusal::Malformed(text) if text.contains(rule)), "{rest:?}: {refusal}");
        assert_eq!(refusal.status(), 400);
    }
    Ok(())
}

#[tokio::test]
async fn request_lines_that_are_none() -> io::Result<()> {
    let table = [
        ("GET /", "without a version"),
        ("GET  / HTTP/1.1", "without a target"),
        ("GET /  HTTP/1.1", "does not end with"),
        ("GET / HTTP/1.1 ", "does not end with"),
        ("GET / HTTP/1.2", "does not end with"),
        ("GET / HTTP/2.0", "does not end with"),
        ("GET / http/1.1", "does not end with"),
        ("GET /a b HTTP/1.1", "does not end with"),
        ("GET\t/\tHTTP/1.1", "start with a method"),
        (" GET / HTTP/1.1", "start with a method"),
        ("G(T / HTTP/1.1", "start with a method"),
        ("\0", "start with a method"),
        ("GET /a\tb HTTP/1.1", "forbidden bytes"),
        ("GET /a\rb HTTP/1.1", "forbidden bytes"),
        ("GET /\u{e9} HTTP/1.1", "forbidden bytes"),
        ("GET /a#b HTTP/1.1", "fragment"),
        ("GET a HTTP/1.1", "not a valid one"),
        ("GET a:80 HTTP/1.1", "not a valid one"),
        ("GET * HTTP/1.1", "not a valid one"),
        ("GET ?a HTTP/1.1", "not a valid one"),
        ("GET /<a> HTTP/1.1", "not a valid one"),
        ("GET http:///a HTTP/1.1", "not a valid one"),
        ("CONNECT / HTTP/1.1", "not a valid one"),
        ("CONNECT http://a/ HTTP/1.1", "not a valid one"),
    ];
    for (line, rule) in table {
        let request = format!("{line}\r\nHost: a\r\n\r\n");
        let refusal = refusal(request.as_bytes(), Limits::default()).await?;
        assert!(matches!(refusal, Refusal::Malformed(text) if text.contains(rule)), "{line:?}: {refusal}");
    }
    Ok(())
}

#[tokio::test]
async fn what_only_the_whole_head_can_tell() -> io::Result<()> {
    let table = [
        ("GET / HTTP/1.1\r\n\r\n", "without a Host"),
        ("POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", "in an HTTP/1.0 request"),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\nx", "with content"),
        ("CONNECT a:1 HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", "with content"),
        ("GET / HTTP/1.1\r\nHost: a\r\n", "end of file"),
        ("G", "end of file"),
        ("GET / HTTP/1.1\nHost: a\n\n", "bare LF"),
    ];
    for (request, rule) in table {
        let refusal = refusal(request.as_bytes(), Limits::default()).await?;
        assert!(matches!(refusal, Refusal::Malformed(text) if text.contains(rule)), "{request:?}: {refusal}");
    }
    Ok(())
}

#[tokio::test]
async fn what_is_too_large_is_refused_at_its_limit_and_not_before() -> io::Result<()> {
    let target = |bytes: usize| format!("GET /{} HTTP/1.1\r\nHost: a\r\n\r\n", "t".repeat(bytes - 1));
    let headers = |lines: usize| format!("GET / HTTP/1.1\r\nHost: a\r\n{}\r\n", "x: y\r\n".repeat(lines - 1));
    let head = |bytes: usize| {
        let start = "GET / HTTP/1.1\r\nHost: a\r\nX: ";
        format!("{start}{}\r\n\r\n", "x".repeat(bytes - start.len() - 4))
    };
    for fits in [target(32), headers(4), head(256)] {
        let (passed, _) = through(vec![fits.clone().into_bytes()], SMALL).await?;
        assert_eq!(String::from_utf8_lossy(&passed), fits);
    }
    let table = [
        (target(33), Refusal::TargetTooLong(32), 414),
        (target(3000), Refusal::TargetTooLong(32), 414),
        ("GET /".to_owned() + &"t".repeat(100), Refusal::TargetTooLong(32), 414),
        (headers(5), Refusal::TooManyHeaders(4), 431),
        (head(257), Refusal::HeadTooLarge(256), 431),
        (head(900), Refusal::HeadTooLarge(256), 431),
    ];
    for (request, expected, status) in table {
        assert_eq!(refusal(request.as_bytes(), SMALL).await?, expected, "{request}");
        assert_eq!(expected.status(), status);
    }
    Ok(())
}

#[tokio::test]
async fn chunks_that_can_be_read_in_two_ways_end_the_body_there() -> io::Result<()> {
    let long = ["5;".to_owned() + &"x".repeat(256), "\r\nX: y".repeat(5)];
    let table: &[(&str, &str, &str)] = &[
        ("", "x\r\nhello\r\n0\r\n\r\n", "hexadecimal"),
        ("", "\r\n", "hexadecimal"),
        ("", " 5\r\nhello", "hexadecimal"),
        ("", "-5\r\nhello", "hexadecimal"),
        ("0", "x5\r\nhello", "hexadecimal"),
        ("5", " \r\nhello", "hexadecimal"),
        ("5", "\nhello", "hexadecimal"),
        ("00000000000000005"[..16].as_ref(), "5\r\nhello", "hexadecimal"),
        ("5\r", "hello", "end with CRLF"),
        ("5\r\nhello", "0\r\n\r\n", "data do not end"),
        ("5\r\nhello", "\n0\r\n\r\n", "data do not end"),
        ("5\r\nhello\r", "\r\n0\r\n\r\n", "data do not end"),
        ("5;a=b", "\nhello", "chunk extension"),
        ("5;a=", "\0\r\nhello", "chunk extension"),
        ("5;a=b\r", "x\nhello", "end with CRLF"),
        ("5;", &long[0][2..], "more bytes than are taken"),
        ("0\r\nX: y", "\n\r\n", "bare LF"),
        ("0\r\nX : y\r", "\n\r\n", "blank between"),
        ("0\r\nContent-Length: 5\r", "\n\r\n", "frames or routes"),
        ("0\r\nTransfer-Encoding: chunked\r", "\n\r\n", "frames or routes"),
        ("0\r\nHost: b\r", "\n\r\n", "frames or routes"),
        ("0\r\nX: a\rb\r", "\n\r\n", "control character"),
    ];
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    for (fine, rest, rule) in table {
        let bytes = format!("{head}{fine}{rest}");
        for pieces in cuts(bytes.as_bytes()) {
            let (passed, gate) = through(pieces, Limits::default()).await?;
            let passed = String::from_utf8_lossy(&passed).into_owned();
            let (start, end) = (format!("{head}{fine}"), format!("{head}{fine}{rest}"));
            // Where a line is wrong as a whole, its first bytes may have passed.
            assert!(end.starts_with(&passed) && passed.len() < end.len(), "{rest:?}: {passed:?}");
            assert!(start.starts_with(&passed) || rest.len() > 100, "{rest:?}: {passed:?}");
            assert_eq!(gate.next_request(), None);
            let refusal = gate.body_refusal();
            assert!(
                matches!(refusal, Some(Refusal::Malformed(text)) if text.contains(rule)),
                "{rest:?}: {refusal:?}"
            );
        }
    }
    let many = format!("{head}0{}\r\n\r\n", long[1]);
    let (_, gate) = through(vec![many.into_bytes()], SMALL).await?;
    assert_eq!(gate.body_refusal(), Some(Refusal::TooManyHeaders(4)));
    Ok(())
}

#[tokio::test]
async fn extensions_and_trailers_are_bounded_over_the_whole_body() -> io::Result<()> {
    let head = "POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n";
    let chunk = format!("1;{}\r\nx\r\n", "e".repeat(200));
    let fits = format!("{head}{}0\r\n\r\n", chunk.repeat(40));
    let (passed, _) = through(vec![fits.clone().into_bytes()], Limits::default()).await?;
    assert_eq!(passed, fits.as_bytes());
    let line = format!("X: {}\r\n", "t".repeat(1000));
    for body in [chunk.repeat(41), format!("0\r\n{}\r\n", line.repeat(17))] {
        let (_, gate) = through(vec![format!("{head}{body}").into_bytes()], Limits::default()).await?;
        let refusal = gate.body_refusal();
        assert!(
            matches!(refusal, Some(Refusal::Malformed(text)) if text.contains("more bytes than are taken")),
            "{refusal:?}"
        );
    }
    Ok(())
}
