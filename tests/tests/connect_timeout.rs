//! `connectionPool.tcp.connectTimeout`: who takes no connection is given up after that time, and not after the default of ten
//! seconds, whatever is spoken and wherever it is.

use std::net::TcpListener;

use anyhow::{Result, ensure};
use lab::{Pair, Pod, apps::RawEnd, eventually, peer, require_root};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpStream;

const APP: u16 = 8080;
const HTTP: u16 = 80;
const TCP: u16 = 81;

/// Listens, and has as many connections waiting as it lets wait: the kernel drops every other SYN.
struct Full {
    _listener: TcpListener,
    _waiting: TcpStream,
}

impl Full {
    fn new(pod: &Pod) -> Result<Self> {
        let listener = pod.netns().inside(|| {
            let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
            socket.bind(&std::net::SocketAddr::from(([0, 0, 0, 0], APP)).into())?;
            socket.listen(0)?;
            Ok(TcpListener::from(socket))
        })?;
        // A queue of 0 holds one; nobody else's SYN is answered.
        let waiting = peer::dial(pod, ([127, 0, 0, 1], APP).into())?;
        Ok(Self { _listener: listener, _waiting: waiting })
    }
}

const RULE: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: NAME, namespace: default }
spec: { host: NAME, trafficPolicy: { connectionPool: { tcp: { connectTimeout: 0.3s } } } }
";

#[tokio::test]
async fn who_takes_no_connection_is_given_up_in_time() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("unanswered").await?;
    let out = pair.b.pod("out").label("app", "out").unenrolled().start().await?;
    let far = pair.b.pod("far").label("app", "far").start().await?;
    let near = pair.a.pod("near").label("app", "near").start().await?;
    for (name, pod) in [("out", &out), ("far", &far), ("near", &near)] {
        let service = pair.lab.service(name).selector("app", name);
        let service = service.port("http", HTTP, APP).port("tcp", TCP, APP).apply()?;
        pair.apply(&format!("{name}-rule.yaml"), &RULE.replace("NAME", name)).await?;
        pair.settled().await?;
        if name != "out" {
            pod.enrolled().await?;
        }
        let full = Full::new(pod)?;
        let answer = pair.client.http_get(&service.url(HTTP, "/"), &[]).await?;
        ensure!(answer.status == 503, "{name}: {answer:?}");
        let closed = pair.client.raw(service.at(TCP)).send("a").expect("a").run().await?;
        ensure!(matches!(closed.end, RawEnd::Closed | RawEnd::Reset), "{name}: {closed:?}");
        given_up(&pair, pod).await?;
        drop(full);
    }
    pair.finish().await
}

/// The agent that dials the app says of both, the request and the connection, how long it was waited.
async fn given_up(pair: &Pair, pod: &Pod) -> Result<()> {
    let waited = format!("no connection to {} within 300ms", pod.at(APP));
    eventually("both in the log", async || {
        let log = [pair.agent_a.access_log(), pair.agent_b.access_log()].concat();
        let of = |event: &str| log.iter().any(|line| line.contains(event) && line.contains(&waited));
        ensure!(of("event=request") && of("event=refused"), "{waited}: {}", log.join("\n"));
        Ok(())
    })
    .await
}
