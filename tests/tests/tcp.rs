//! Bytes pass whole, each direction to its own end, whoever speaks first, and both apps see each other's true addresses.

use anyhow::{Result, ensure};
use lab::{Pair, apps, metric, require_root};

#[tokio::test]
async fn bytes_and_addresses_are_true_across_and_within_nodes() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("tcp").await?;
    let (far, near) = (pair.b.pod("far").start().await?, pair.a.pod("near").start().await?);
    for pod in [&far, &near] {
        pod.serve(apps::tcp_echo(7000).arg("--report")).await?;
    }
    pair.settled().await?;
    far.enrolled().await?;
    near.enrolled().await?;
    for (name, server) in [("far", &far), ("near", &near)] {
        let label = format!("{name}-only");
        let yaml = format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{ name: {label}, namespace: default }}\nspec:\n  \
             clusterIPs: [10.96.77.{octet}, 'fd00:96::77{octet}']\n  ipFamilies: [IPv4, IPv6]\n  \
             ports: [{{ name: tcp, port: 70, targetPort: 7000 }}]\n---\n\
             apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {{ name: {label}, namespace: default, labels: {{ kubernetes.io/service-name: {label} }} }}\n\
             ports: [{{ name: tcp, port: 7000, protocol: TCP }}]\n\
             endpoints: [{{ addresses: ['{ip}'], conditions: {{ ready: true }} }}]\n",
            octet = if name == "far" { 1 } else { 2 },
            ip = server.ip(),
        );
        pair.apply(&format!("{label}.yaml"), &yaml).await?;
        let octet = if name == "far" { 1 } else { 2 };
        let vips = [format!("10.96.77.{octet}:70"), format!("[fd00:96::77{octet}]:70")];
        for (vip, bytes) in vips.iter().zip([3_000_000, 10]) {
            let vip = vip.parse()?;
            let seen = pair.client.tcp(vip, bytes, &["--report"]).await?;
            ensure!(seen.intact && seen.received == bytes, "{name} {vip}: {seen:?}");
            ensure!(seen.peer == vip, "getpeername of the client is what it dialled: {seen:?}");
            let report = seen.report.as_ref().ok_or_else(|| anyhow::anyhow!("no report: {seen:?}"))?;
            ensure!(report.received == bytes && report.pod == name, "{seen:?}");
            ensure!(report.peer == report.peername, "accept and getpeername agree: {seen:?}");
            let client = [pair.client.ip(), pair.client.ip6()];
            ensure!(client.contains(&report.peer.ip()), "the server sees the client's own address: {seen:?}");
            // And its port, where both speak of the same address: connections of one client stay apart.
            let same = seen.local.ip() == report.peer.ip();
            ensure!(same == (vip.is_ipv4() || name == "near"), "{seen:?}");
            ensure!(!same || seen.local == report.peer, "the server sees the client's own port: {seen:?}");
        }
    }
    // A pod dialled by its own address takes the same way.
    let direct = pair.client.tcp(far.at(7000), 1000, &["--report"]).await?;
    ensure!(direct.intact && direct.peer == far.at(7000), "{direct:?}");
    let metrics = pair.agent_b.metrics().await?;
    let opened = metric(
        &metrics,
        "istio_tcp_connections_opened_total",
        &[("reporter", "destination"), ("connection_security_policy", "mutual_tls")],
    );
    ensure!((opened - 3.0).abs() < f64::EPSILON, "{opened}\n{metrics}");
    pair.finish().await
}

#[tokio::test]
async fn servers_that_speak_first_are_heard_on_declared_and_undeclared_ports() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("greet").await?;
    let server = pair.b.pod("mail").label("app", "mail").start().await?;
    server.serve(apps::server_first(7025)).await?;
    let declared =
        pair.lab.service("declared").selector("app", "mail").port("tcp-mail", 7025, 7025).apply()?;
    let undeclared =
        pair.lab.service("undeclared").selector("app", "mail").port("mail", 7025, 7025).apply()?;
    pair.settled().await?;
    server.enrolled().await?;
    for service in [declared, undeclared] {
        let seen = pair.client.tcp(service.at(7025), 5000, &["--greeting"]).await?;
        ensure!(seen.intact && seen.greeting.is_some(), "{}: {seen:?}", service.name);
    }
    pair.finish().await
}

#[tokio::test]
async fn undeclared_ports_are_told_by_their_first_bytes() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("detect").await?;
    let server = pair.b.pod("web").label("app", "web").start().await?;
    server.serve(apps::http(8080)).await?;
    server.serve(apps::tcp_echo(7000)).await?;
    let service = pair.lab.service("web").selector("app", "web").port("web", 80, 8080).port("raw", 81, 7000);
    let service = service.apply()?;
    pair.settled().await?;
    server.enrolled().await?;
    let h1 = pair.client.get(service.url(80, "/")).send().await?;
    let h2 = pair.client.get(service.url(80, "/")).h2c().send().await?;
    ensure!(h1.echo()?.version == "HTTP/1.1" && h2.echo()?.version == "HTTP/2.0", "{h1:?} {h2:?}");
    let raw = pair.client.tcp(service.at(81), 100_000, &[]).await?;
    ensure!(raw.intact, "{raw:?}");
    let metrics = pair.agent_a.metrics().await?;
    let requests =
        metric(&metrics, "istio_requests_total", &[("reporter", "source"), ("response_code", "200")]);
    ensure!((requests - 2.0).abs() < f64::EPSILON, "{metrics}");
    pair.finish().await
}
