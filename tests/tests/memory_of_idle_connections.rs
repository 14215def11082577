//! What an idle connection costs the agent of the client's pod, in memory: counted where it is allocated, so that neither the
//! allocator's way of keeping it nor the machine is in it, and never more than is written here.
//!
//! Each connection is used once and then held. What a first one makes for all is there before. A kept HTTP connection is at
//! its least some time after its last request, which is awaited.

use std::{net::SocketAddr, process::Command, time::Duration};

use anyhow::{Result, ensure};
use lab::{Counted, Lab, Pod, Process, apps, binary, eventually, eventually_within, require_root};
use tempfile::TempDir;

/// Connections that are held.
const HELD: u32 = 500;

/// What a connection may hold, in bytes: a few per cent above what was counted last, in a debug build. Whoever makes it less
/// takes these down, and whoever cannot avoid to make it more says why.
const OF_HTTP: u64 = 4400;
const OF_BYTES: u64 = 5800;

/// Longer than a kept connection goes without a request before it gives back what requests take.
const QUIET: Duration = Duration::from_millis(1200);

/// How long hundreds of connections may take to be there.
const HOLDING: Duration = Duration::from_mins(1);
const GRACE: Duration = Duration::from_secs(20);

/// Connections of a pod that were used once.
async fn hold(client: &Pod, server: SocketAddr, connections: u32, args: &[&str]) -> Result<Process> {
    let mut command = Command::new(binary("bench-app", "MESH_BENCH_APP", "lab")?);
    command.args(["hold", &server.to_string(), "--connections", &connections.to_string()]).args(args);
    let clients = client.spawn(command)?;
    eventually_within(HOLDING, "connections that are held", async || {
        ensure!(clients.status().is_none(), "the clients have ended\n{}", clients.tail());
        ensure!(clients.stdout().contains("listening"), "there are not {connections} connections yet");
        Ok(())
    })
    .await?;
    Ok(clients)
}

/// Holds connections until each of them takes no more than `most` bytes.
async fn check(
    agent: &Counted,
    client: &Pod,
    server: SocketAddr,
    args: &[&str],
    (kind, most): (&str, u64),
) -> Result<()> {
    let first = hold(client, server, 1, args).await?;
    let before = agent.allocated()?.bytes;
    let clients = hold(client, server, HELD, args).await?;
    let each = eventually("connections that hold no more than is stated", async || {
        let each = agent.allocated()?.bytes.saturating_sub(before) / u64::from(HELD);
        ensure!(each <= most, "each {kind} holds {each} bytes, more than {most}");
        Ok(each)
    })
    .await?;
    println!("{kind}: {each} bytes a connection");
    // Whoever counted nothing would find everything small.
    ensure!(each >= 512, "not counted: {each} bytes a connection");
    for clients in [first, clients] {
        ensure!(clients.status().is_none(), "the clients have ended\n{}", clients.tail());
        clients.stop(GRACE).await?;
    }
    Ok(())
}

/// What a client says after a silence is answered as what it said before, in whatever pieces it comes.
async fn asks_again(client: &Pod, server: SocketAddr) -> Result<()> {
    let script = client.raw(server).send("GET /first HTTP/1.1\r\nHost: a\r\n\r\n").pause(QUIET);
    let script = script.send("\r\n").pause(QUIET).send("POST /second HTTP/1.1\r\nHo").pause(QUIET);
    let script = script.send("st: a\r\nContent-Length: 4\r\n\r\nbo").pause(QUIET).send("dy").pause(QUIET);
    let answer = script.send("GET /third HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n").run().await?;
    ensure!(answer.statuses() == [200; 3], "{answer:?}");
    for part in ["/first", "/second", r#""body_bytes":4"#, "/third"] {
        ensure!(answer.text().contains(part), "no {part} in {answer:?}");
    }
    Ok(())
}

#[tokio::test]
async fn an_idle_connection_holds_no_more_than_is_stated() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let (lab, dir) = (Lab::new("held").await?, TempDir::new()?);
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let server = b.pod("server").sa("server").label("app", "server").start().await?;
    let client = a.pod("client").sa("client").start().await?;
    server.serve(apps::http(8080)).await?;
    server.serve(apps::tcp_echo(9000)).await?;
    let service = lab.service("server").selector("app", "server");
    let service = service.port("http", 80, 8080).port("tcp", 90, 9000).apply()?;
    let source = Counted::start(&a, &dir).await?;
    let destination = b.agent().arg("--access-log=off").start().await?;
    client.enrolled().await?;
    server.enrolled().await?;
    let url = service.url(80, "/");
    eventually("an answer through both agents", async || {
        let status = client.get(&*url).send().await?.status;
        ensure!(status == 200, "answered {status}");
        Ok(())
    })
    .await?;
    asks_again(&client, service.at(80)).await?;
    check(&source, &client, service.at(80), &[], ("HTTP connection", OF_HTTP)).await?;
    check(&source, &client, service.at(90), &["--bytes"], ("tunnel", OF_BYTES)).await?;
    for agent in [source.agent, destination] {
        let status = agent.stop().await?;
        ensure!(status.success(), "an agent ended with {status}");
    }
    lab.finish().await
}
