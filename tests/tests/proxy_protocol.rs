//! `proxyProtocol` of a DestinationRule: an app is told of the client, and of what it has dialled, before anything else on each
//! of its connections, wherever the app is and whatever is spoken with it.

use std::{
    net::{IpAddr, SocketAddr},
    sync::{Arc, Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use lab::{Pair, Pod, apps, peer, require_root};
use tokio::{
    io::{AsyncReadExt as _, copy_bidirectional},
    net::TcpStream,
    task::JoinSet,
};

const APP: u16 = 8080;
const ECHO: u16 = 9000;
/// Where the header is read, in front of the app and of the echo.
const TOLD_APP: u16 = 8081;
const TOLD_ECHO: u16 = 9001;

const HTTP: u16 = 80;
const HTTP2: u16 = 81;
const TCP: u16 = 82;

/// Version, client and what it has dialled.
type Told = (u8, SocketAddr, SocketAddr);

/// Reads the header at the start of each connection to a pod, and hands the rest to another port of it.
struct Front {
    told: Arc<Mutex<Vec<Told>>>,
    _serving: Vec<JoinSet<()>>,
}

impl Front {
    fn start(pod: &Pod) -> Result<Self> {
        let told = Arc::<Mutex<Vec<Told>>>::default();
        let mut serving = Vec::new();
        for (port, behind) in [(TOLD_APP, APP), (TOLD_ECHO, ECHO)] {
            let (of_pod, told) = (pod.clone(), Arc::clone(&told));
            serving.push(pod.serve_own(port, move |stream| {
                let (pod, told) = (of_pod.clone(), Arc::clone(&told));
                // What is wrong with one shows at the client, which gets no answer.
                async move { drop(serve(&pod, stream, behind, &told).await) }
            })?);
        }
        Ok(Self { told, _serving: serving })
    }

    /// Everything since the last time.
    fn told(&self) -> Vec<Told> {
        std::mem::take(&mut self.told.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

async fn serve(pod: &Pod, mut stream: TcpStream, behind: u16, told: &Mutex<Vec<Told>>) -> Result<()> {
    let mut start = [0; 6];
    stream.read_exact(&mut start).await?;
    let header =
        if &start == b"PROXY " { text(&mut stream).await? } else { binary(&mut stream, &start).await? };
    told.lock().unwrap_or_else(PoisonError::into_inner).push(header);
    let mut app = peer::dial(pod, ([127, 0, 0, 1], behind).into())?;
    copy_bidirectional(&mut stream, &mut app).await?;
    Ok(())
}

/// Version 1: byte by byte, so that nothing behind it is taken.
async fn text(stream: &mut TcpStream) -> Result<Told> {
    let mut line = Vec::new();
    while !line.ends_with(b"\r\n") {
        ensure!(line.len() < 107, "{line:?}");
        line.push(stream.read_u8().await?);
    }
    let line = String::from_utf8(line)?;
    let words: Vec<&str> = line.trim_end().split(' ').collect();
    let ["TCP4", from, to, from_port, to_port] = words[..] else { anyhow::bail!("{line:?}") };
    let at = |ip: &str, port: &str| Ok::<_, anyhow::Error>(SocketAddr::new(ip.parse()?, port.parse()?));
    Ok((1, at(from, from_port)?, at(to, to_port)?))
}

/// Version 2, of which this has come already.
async fn binary(stream: &mut TcpStream, start: &[u8]) -> Result<Told> {
    let mut rest = [0; 10];
    stream.read_exact(&mut rest).await?;
    let head = [start, &rest].concat();
    ensure!(head == b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", "{head:?}");
    let mut ends = [0; 12];
    stream.read_exact(&mut ends).await?;
    let ip = |at: usize| {
        ends.get(at..at + 4).and_then(|four| <[u8; 4]>::try_from(four).ok()).context("an address")
    };
    let port = |at: usize| u16::from_be_bytes([ends[at], ends[at + 1]]);
    let from = SocketAddr::new(IpAddr::from(ip(0)?), port(8));
    Ok((2, from, SocketAddr::new(IpAddr::from(ip(4)?), port(10))))
}

fn rule(host: &str, version: u8) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: {host}, namespace: default }}
spec: {{ host: {host}, trafficPolicy: {{ proxyProtocol: {{ version: V{version} }} }} }}
"
    )
}

#[tokio::test]
async fn apps_are_told_of_the_client_first_of_all() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("introduced").await?;
    let out = pair.b.pod("out").label("app", "out").unenrolled().start().await?;
    let far = pair.b.pod("far").label("app", "far").start().await?;
    let near = pair.a.pod("near").label("app", "near").start().await?;
    for (name, pod) in [("out", &out), ("far", &far), ("near", &near)] {
        pod.serve(apps::http(APP)).await?;
        pod.serve(apps::tcp_echo(ECHO)).await?;
        let front = Front::start(pod)?;
        let service = pair.lab.service(name).selector("app", name);
        let service = service.port("http", HTTP, TOLD_APP).port("http2", HTTP2, TOLD_APP);
        let service = service.port("tcp", TCP, TOLD_ECHO).apply()?;
        pair.settled().await?;
        if name != "out" {
            pod.enrolled().await?;
        }
        for version in [1, 2] {
            pair.apply("rule.yaml", &rule(name, version)).await?;
            for (port, spoken) in [(HTTP, "HTTP/1.1"), (HTTP2, "HTTP/2.0")] {
                // Each from a connection of its own: each is told of.
                let mut clients = Vec::new();
                for _ in 0..2 {
                    let answer = pair.client.http_get(&service.url(port, "/"), &[]).await?;
                    ensure!(answer.status == 200, "{name}, version {version}: {answer:?}");
                    ensure!(answer.echo()?.version == spoken, "{name}: {:?}", answer.echo()?);
                    let told = front.told();
                    let [(written, client, dialled)] = told[..] else { anyhow::bail!("{name}: {told:?}") };
                    ensure!((written, dialled) == (version, service.at(port)), "{name}: {told:?}");
                    ensure!(client.ip() == pair.client.ip(), "{name}: {told:?}");
                    clients.push(client);
                }
                ensure!(clients[0] != clients[1], "{name}: {clients:?}");
            }
            let bytes = pair.client.tcp(service.at(TCP), 100_000, &[]).await?;
            ensure!(bytes.intact && bytes.received == 100_000, "{name}: {bytes:?}");
            let told = front.told();
            let [(written, client, dialled)] = told[..] else { anyhow::bail!("{name}: {told:?}") };
            ensure!((written, dialled) == (version, service.at(TCP)), "{name}: {told:?}");
            ensure!(client.ip() == pair.client.ip(), "{name}: {told:?}");
        }
        // What many ask over one connection of theirs shares the app's.
        let streams = pair.client.get(service.url(HTTP2, "/")).streams(20, 1).await?;
        ensure!(streams.statuses.get(&200) == Some(&20), "{name}: {streams:?}");
        let told = front.told();
        ensure!(told.len() == 1, "{name}: {told:?}");
        drop(front);
    }
    pair.finish().await
}
