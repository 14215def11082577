//! What is not HTTP where HTTP is declared gets a 400 or an end, is counted, and harms nobody else.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use lab::{
    Pair, Pod, apps, eventually, metric, require_root,
    wire::{H2_PREFACE, H2_STRAY_CONTINUATION, H2Frame, h2_frames},
};

/// What `timeout` ends with when it had to end the program.
const TIMED_OUT: i32 = 124;

/// Sends bytes from inside an enrolled pod's cgroup and namespace and returns what comes back, and whether the other
/// side ended the connection.
async fn say(from: &Pod, to: SocketAddr, bytes: &[u8]) -> Result<(Vec<u8>, bool)> {
    let mut escaped = String::new();
    for byte in bytes {
        write!(escaped, "\\x{byte:02x}")?;
    }
    let (ip, port) = (to.ip(), to.port());
    // In hexadecimal: what comes back need not be text.
    let script = format!(
        "exec 3<>/dev/tcp/{ip}/{port}; printf '{escaped}' >&3; set -o pipefail; timeout 10 cat <&3 | od -An -v -tx1"
    );
    let mut bash = std::process::Command::new("bash");
    bash.args(["-c", &script]);
    let output = from.run_within(Duration::from_secs(15), bash).await?;
    let bytes: Result<Vec<u8>, _> =
        output.stdout.split_whitespace().map(|byte| u8::from_str_radix(byte, 16)).collect();
    Ok((bytes?, output.status.code() != Some(TIMED_OUT)))
}

#[tokio::test]
async fn garbage_is_answered_400_and_counted() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("garbage").await?;
    let server = pair.b.pod("server").label("app", "server").start().await?;
    server.serve(apps::http(8080)).await?;
    let service = pair.lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    pair.settled().await?;
    server.enrolled().await?;
    let to = service.at(80);
    let requests: [&[u8]; 3] = [
        b"\x16\x03\x01garbage first line\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\nConnection: close\r\n\r\n",
        b"GET / HTTP/1.1\r\nConnection: close\r\n\r\n",
    ];
    for request in requests {
        let (answer, _) = say(&pair.client, to, request).await?;
        let text = String::from_utf8_lossy(&answer).into_owned();
        ensure!(text.starts_with("HTTP/1.1 400"), "{:?} got {text:?}", String::from_utf8_lossy(request));
    }
    // An HTTP/2 peer that breaks the protocol: it is told so, or cut off; it is not served.
    let (answer, ended) = say(&pair.client, to, &[H2_PREFACE, H2_STRAY_CONTINUATION].concat()).await?;
    let frames = h2_frames(&answer);
    let told = frames.iter().any(|frame| frame.goaway_code().is_some_and(|code| code != 0));
    let served = frames.iter().any(|frame| frame.kind == H2Frame::HEADERS);
    ensure!(ended && !served && (told || frames.len() <= 1), "ended: {ended}, {frames:?} in {answer:?}");
    eventually("what was no HTTP/2 and what were no requests is counted", async || {
        let metrics = pair.agent_a.metrics().await?;
        let refused = metric(&metrics, "mesh_refused_total", &[("side", "source"), ("kind", "bad_request")]);
        let answered = [("reporter", "source"), ("response_code", "400"), ("response_flags", "DPE")];
        let answered = metric(&metrics, "istio_requests_total", &answered);
        ensure!(refused as u64 == 1 && answered as u64 == 3, "{refused} {answered}\n{metrics}");
        Ok(())
    })
    .await?;
    let error = ("error", "several Host headers in one request (RFC 9112 §3.2)");
    pair.agent_a.logged(&[("status", "400"), ("flags", "DPE"), ("reporter", "source"), error]).await?;
    let line = [("event", "refused"), ("kind", "bad_request"), ("pod", "client"), ("flags", "DPE")];
    pair.agent_a.logged(&line).await?;
    ensure!(pair.client.http_get(&service.url(80, "/"), &[]).await?.status == 200);
    pair.finish().await
}
