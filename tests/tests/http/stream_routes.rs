//! Connections that are not HTTP go where `tls` and `tcp` routes say, by server name, port, client and weight.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use lab::{Pair, Pod, Service, apps, require_root};

use crate::world::{counted, logged_times};

struct Databases {
    pair: Pair,
    service: Service,
}

impl Databases {
    async fn new(name: &str) -> Result<Option<Self>> {
        if !require_root()? {
            return Ok(None);
        }
        let pair = Pair::new(name).await?;
        for (node, version) in [(&pair.a, "one"), (&pair.b, "two"), (&pair.b, "three")] {
            let pod = node
                .pod(&format!("db-{version}"))
                .labels([("app", "db"), ("version", version)])
                .start()
                .await?;
            pod.serve(apps::tcp_echo(7000).arg("--report")).await?;
            pair.settled().await?;
            pod.enrolled().await?;
        }
        let service = pair.lab.service("db").selector("app", "db");
        let service = service.port("tcp", 70, 7000).port("tls", 443, 7000).port("odd", 71, 7000).apply()?;
        pair.apply("subsets.yaml", SUBSETS).await?;
        Ok(Some(Self { pair, service }))
    }

    /// Which pod a connection led to.
    async fn reached(&self, from: &Pod, port: u16, args: &[&str]) -> Result<String> {
        let mut all = vec!["--report"];
        all.extend(args);
        let answer = from.tcp(self.service.at(port), 1000, &all).await?;
        ensure!(answer.intact, "{answer:?}");
        Ok(answer.report.map(|report| report.pod).unwrap_or_default())
    }

    /// Waits until the log tells of so many connections of this pod to a port, led to the subset of this version.
    async fn told(&self, from: &str, port: u16, version: &str, count: u64) -> Result<()> {
        let cluster = format!("outbound|{port}|{version}|db.default.svc.cluster.local");
        let line = [("event", "connection"), ("reporter", "source"), ("cluster", &*cluster)];
        let pod = format!("db-{version}");
        let line = [&line[..], &[("src.workload", from), ("dst.workload", &*pod), ("flags", "-")]].concat();
        logged_times(&self.pair.agent_a, &line, usize::try_from(count)?).await
    }

    /// Waits until the client's agent has counted so many connections from this pod to that one.
    async fn opened(&self, from: &str, to: &str, count: u64) -> Result<()> {
        let labels = [("reporter", "source"), ("source_workload", from), ("destination_workload", to)];
        counted(&self.pair.agent_a, "istio_tcp_connections_opened_total", &labels, count).await
    }

    /// Which pod a TLS client with this server name is led to; the echo sends the hello back.
    async fn by_name(&self, port: u16, name: &str) -> Result<Vec<u8>> {
        let hello = client_hello(name)?;
        let answer = self.pair.client.raw(at(&self.service, port)).send(&hello).finish().run().await?;
        ensure!(answer.received.0.starts_with(&hello), "{answer:?}");
        Ok(answer.received.0[hello.len()..].to_vec())
    }
}

fn at(service: &Service, port: u16) -> SocketAddr {
    service.at(port)
}

/// What a TLS client says first.
fn client_hello(name: &str) -> Result<Vec<u8>> {
    lab::client_hello(name)
}

const SUBSETS: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: db, namespace: default }
spec:
  host: db
  subsets:
    - { name: one, labels: { version: one } }
    - { name: two, labels: { version: two } }
    - { name: three, labels: { version: three } }
";

const ROUTES: &str = "
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: db, namespace: default }
spec:
  hosts: [db, a.example, '*.b.example']
  tls:
    - match: [{ port: 443, sniHosts: [a.example] }]
      route: [{ destination: { host: db, subset: one } }]
    - match: [{ port: 443, sniHosts: ['*.b.example'] }]
      route: [{ destination: { host: db, subset: two } }]
  tcp:
    - match: [{ port: 70, sourceLabels: { app: client } }]
      route: [{ destination: { host: db, subset: one } }]
    - match: [{ port: 70 }]
      route: [{ destination: { host: db, subset: two } }]
    - match: [{ port: 71 }]
      route:
        - { destination: { host: db, subset: two }, weight: 50 }
        - { destination: { host: db, subset: three }, weight: 50 }
    - route: [{ destination: { host: db, subset: three } }]
";

#[tokio::test]
async fn tcp_routes_choose_by_client_port_and_weight() -> Result<()> {
    let Some(databases) = Databases::new("tcp-routes").await? else { return Ok(()) };
    databases.pair.apply("db.yaml", ROUTES).await?;
    let other = databases.pair.a.pod("other").label("app", "other").start().await?;
    databases.pair.settled().await?;
    other.enrolled().await?;
    for _ in 0..5 {
        ensure!(databases.reached(&databases.pair.client, 70, &[]).await? == "db-one");
        ensure!(databases.reached(&other, 70, &[]).await? == "db-two");
    }
    let mut counts = std::collections::BTreeMap::<String, u32>::new();
    for _ in 0..40 {
        *counts.entry(databases.reached(&databases.pair.client, 71, &[]).await?).or_default() += 1;
    }
    ensure!(counts.len() == 2 && counts.values().all(|count| *count >= 6), "{counts:?}");
    ensure!(counts.contains_key("db-two") && counts.contains_key("db-three"), "{counts:?}");
    let (two, three) = (counts["db-two"].into(), counts["db-three"].into());
    for (from, pod, count) in [
        ("client", "db-one", 5),
        ("other", "db-two", 5),
        ("client", "db-two", two),
        ("client", "db-three", three),
    ] {
        databases.opened(from, pod, count).await?;
    }
    for (from, port, version, count) in [
        ("client", 70, "one", 5),
        ("other", 70, "two", 5),
        ("client", 71, "two", two),
        ("client", 71, "three", three),
    ] {
        databases.told(from, port, version, count).await?;
    }
    databases.pair.finish().await
}

#[tokio::test]
async fn tls_routes_choose_by_the_server_name() -> Result<()> {
    let Some(databases) = Databases::new("tls-routes").await? else { return Ok(()) };
    databases.pair.apply("db.yaml", ROUTES).await?;
    for (name, pod) in [("a.example", "db-one"), ("x.y.b.example", "db-two"), ("c.example", "db-three")] {
        let report = databases.by_name(443, name).await?;
        ensure!(
            String::from_utf8_lossy(&report).contains(pod),
            "{name}: {}",
            String::from_utf8_lossy(&report)
        );
    }
    // Without a server name only the tcp routes are left.
    ensure!(databases.reached(&databases.pair.client, 443, &[]).await? == "db-three");
    for (version, count) in [("one", 1), ("two", 1), ("three", 2)] {
        databases.opened("client", &format!("db-{version}"), count).await?;
        databases.told("client", 443, version, count).await?;
    }
    databases.pair.finish().await
}
