//! Databases and mail servers of the real world are served as they would be without a mesh, whoever speaks first: on
//! ports that are declared and ports that are not, on the ports they are known by and on others. Each sees its true
//! client.

use anyhow::{Context as _, Result, ensure};
use lab::{
    Pair, metric,
    servers::{Running, Server, require},
};

/// The port every server listens on, which says nothing.
const TARGET: u16 = 7000;
/// A port of the Service that nothing is known of.
const UNDECLARED: u16 = 8001;
/// A port whose name declares TCP.
const BY_NAME: u16 = 8002;
/// A port whose `appProtocol` declares TCP.
const BY_APP_PROTOCOL: u16 = 8003;

fn service(name: &str, octet: usize, usual: u16) -> String {
    let port = |name: &str, port: u16, more: &str| {
        format!("  - {{ name: {name}, port: {port}, targetPort: {TARGET}, protocol: TCP{more} }}\n")
    };
    [
        format!("apiVersion: v1\nkind: Service\nmetadata: {{ name: {name}, namespace: default }}\nspec:\n"),
        format!("  clusterIPs: [10.96.77.{octet}, 'fd00:96::77{octet}']\n  ipFamilies: [IPv4, IPv6]\n"),
        format!("  selector: {{ app: {name} }}\n  ports:\n"),
        port("usual", usual, ""),
        port("undeclared", UNDECLARED, ""),
        port("tcp-declared", BY_NAME, ""),
        port("declared", BY_APP_PROTOCOL, ", appProtocol: tcp"),
    ]
    .concat()
}

/// Has a client ask the server by every port of its Service, and by its own address.
async fn serves(pair: &Pair, server: Server, octet: usize) -> Result<Running> {
    let pod = pair.b.pod(server.name()).label("app", server.name()).start().await?;
    let running = pod.run_server(server, TARGET).await?;
    pair.lab
        .apply(&format!("{}.yaml", server.name()), &service(server.name(), octet, server.usual_port()))?;
    pair.settled().await?;
    pod.enrolled().await?;
    let vip = format!("10.96.77.{octet}");
    for port in [server.usual_port(), UNDECLARED, BY_NAME, BY_APP_PROTOCOL] {
        let seen = pair.client.ask(&running, format!("{vip}:{port}").parse()?).await;
        let seen = seen.with_context(|| format!("{server:?} at port {port}"))?;
        ensure!(seen.to_canonical() == pair.client.ip(), "{server:?} at port {port} sees {seen}");
    }
    let seen = pair.client.ask(&running, pod.at(TARGET)).await?;
    ensure!(seen.to_canonical() == pair.client.ip(), "{server:?} by its own address sees {seen}");
    Ok(running)
}

#[tokio::test]
async fn databases_and_mail_servers_are_served_whoever_speaks_first() -> Result<()> {
    if !require()? {
        return Ok(());
    }
    let pair = Pair::new("servers").await?;
    let [mariadb, redis, postgres, smtp] = Server::ALL;
    let _running = tokio::try_join!(
        serves(&pair, mariadb, 1),
        serves(&pair, redis, 2),
        serves(&pair, postgres, 3),
        serves(&pair, smtp, 4)
    )?;
    // Five connections to each of four servers, all of them between nodes, none of them read as HTTP.
    let labels = [("reporter", "destination"), ("connection_security_policy", "mutual_tls")];
    let metrics = pair.agent_b.metrics().await?;
    let opened = metric(&metrics, "istio_tcp_connections_opened_total", &labels);
    ensure!(opened >= 20.0, "{opened}\n{metrics}");
    let requests = metric(&metrics, "istio_requests_total", &[]);
    ensure!(requests.abs() < f64::EPSILON, "{requests}\n{metrics}");
    pair.finish().await
}
