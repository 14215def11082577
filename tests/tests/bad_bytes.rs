//! What is not HTTP where HTTP is declared gets a 400 or an end, is counted, and harms nobody else.

use std::{fmt::Write as _, net::SocketAddr, time::Duration};

use anyhow::{Result, ensure};
use lab::{Pair, Pod, apps, eventually, metric, require_root};

/// Sends bytes from inside an enrolled pod's cgroup and namespace and returns what comes back.
async fn say(from: &Pod, to: SocketAddr, bytes: &[u8]) -> Result<Vec<u8>> {
    let mut escaped = String::new();
    for byte in bytes {
        write!(escaped, "\\x{byte:02x}")?;
    }
    let (ip, port) = (to.ip(), to.port());
    let script = format!("exec 3<>/dev/tcp/{ip}/{port}; printf '{escaped}' >&3; timeout 10 cat <&3");
    let mut bash = std::process::Command::new("bash");
    bash.args(["-c", &script]);
    let output = from.run_within(Duration::from_secs(15), bash).await?;
    Ok(output.stdout.into_bytes())
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
        let answer = say(&pair.client, to, request).await?;
        let text = String::from_utf8_lossy(&answer).into_owned();
        ensure!(text.starts_with("HTTP/1.1 400"), "{:?} got {text:?}", String::from_utf8_lossy(request));
    }
    // An HTTP/2 peer that breaks the protocol: the preface, then a frame no connection may begin with.
    let broken =
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(), b"\x00\x00\x00\x09\x00\x00\x00\x00\x00"].concat();
    let answer = say(&pair.client, to, &broken).await?;
    // GOAWAY is frame type 7.
    ensure!(answer.windows(4).any(|window| window[3] == 7) || answer.is_empty(), "{answer:?}");
    eventually("both protocol errors are counted", async || {
        let metrics = pair.agent_a.metrics().await?;
        let refused = metric(&metrics, "mesh_refused_total", &[("side", "source"), ("kind", "bad_request")]);
        ensure!(refused >= 2.0, "{refused}\n{metrics}");
        Ok(())
    })
    .await?;
    ensure!(pair.client.http_get(&service.url(80, "/"), &[]).await?.status == 200);
    pair.finish().await
}
