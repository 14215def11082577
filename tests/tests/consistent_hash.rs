//! `consistentHash`: who brings the same along goes to the same replica, from every node.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context as _, Result, ensure};
use lab::{Pair, Pod, Service, apps, require_root};

fn rule(hash: &str) -> String {
    format!(
        "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {{ name: web, namespace: default }}
spec:
  host: web
  trafficPolicy: {{ loadBalancer: {{ consistentHash: {{ {hash} }} }} }}
"
    )
}

async fn web(pair: &Pair) -> Result<(Service, Vec<Pod>)> {
    let mut pods = Vec::new();
    for (node, name) in [(&pair.a, "web-1"), (&pair.b, "web-2"), (&pair.b, "web-3")] {
        let pod = node.pod(name).label("app", "web").start().await?;
        pod.serve(apps::http(8080)).await?;
        pods.push(pod);
    }
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).port("tcp", 81, 8080);
    let service = service.apply()?;
    pair.settled().await?;
    for pod in &pods {
        pod.enrolled().await?;
    }
    Ok((service, pods))
}

async fn answered_by(client: &Pod, url: &str, headers: &[(&str, &str)]) -> Result<String> {
    let answer = client.http_get(url, headers).await?;
    ensure!(answer.status == 200, "{answer:?}");
    Ok(answer.pod().context("who answered?")?.to_owned())
}

/// Users of a header, of both clients: each has one replica, and together they have all.
async fn by_header(url: &str, clients: [&Pod; 2]) -> Result<()> {
    let mut replicas = BTreeMap::new();
    for round in 0..2 {
        for user in 0..20 {
            let name = format!("user-{user}");
            let replica = answered_by(clients[round % 2], url, &[("x-user", &name)]).await?;
            let first = replicas.entry(name).or_insert_with(|| replica.clone());
            ensure!(*first == replica, "user {user} was with {first}, and now with {replica}");
        }
    }
    let used: BTreeSet<&String> = replicas.values().collect();
    ensure!(used.len() == 3, "{replicas:?}");
    let tally = clients[0].get(url).many(60, 4, None).await?;
    ensure!(tally.pods.len() == 3, "without the header any will do: {tally:?}");
    Ok(())
}

/// Who has no cookie gets one, and stays with it.
async fn by_cookie(url: &str, clients: [&Pod; 2]) -> Result<()> {
    let mut replicas = BTreeSet::new();
    for _ in 0..12 {
        let first = clients[0].http_get(url, &[]).await?;
        let given = first.headers.get("set-cookie").context("no cookie was given")?;
        let (cookie, rest) = given.split_once("; ").context("a cookie with attributes")?;
        ensure!(rest == "Max-Age=60; Path=/; SameSite=Lax; HttpOnly", "{given}");
        let replica = first.pod().context("who answered?")?;
        for client in clients {
            let again = client.http_get(url, &[("cookie", cookie)]).await?;
            ensure!(again.pod() == Some(replica), "{cookie} was with {replica}: {again:?}");
            ensure!(!again.headers.contains_key("set-cookie"), "{again:?}");
        }
        replicas.insert(replica.to_owned());
    }
    ensure!(replicas.len() > 1, "every cookie led to {replicas:?}");
    Ok(())
}

#[tokio::test]
async fn the_same_key_goes_to_the_same_replica() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("hash").await?;
    let other = pair.b.pod("other").start().await?;
    let (service, _pods) = web(&pair).await?;
    other.enrolled().await?;
    let (clients, url) = ([&pair.client, &other], service.url(80, "/"));

    pair.apply("hash.yaml", &rule("httpHeaderName: x-user")).await?;
    by_header(&url, clients).await?;
    pair.apply("hash.yaml", &rule("httpHeaderName: x-user, maglev: {}")).await?;
    by_header(&url, clients).await?;

    let cookie =
        "httpCookie: { name: user, path: /, ttl: 60s, attributes: [{ name: SameSite, value: Lax }] }";
    pair.apply("hash.yaml", &rule(cookie)).await?;
    by_cookie(&url, clients).await?;

    pair.apply("hash.yaml", &rule("httpQueryParameterName: user")).await?;
    let alice = answered_by(clients[0], &service.url(80, "/?user=alice"), &[]).await?;
    for client in [clients[0], clients[1], clients[0], clients[1]] {
        ensure!(answered_by(client, &service.url(80, "/other?x=y&user=alice"), &[]).await? == alice);
    }

    // Opaque bytes have an address, and nothing else.
    pair.apply("hash.yaml", &rule("useSourceIp: true")).await?;
    for (client, port) in clients.into_iter().flat_map(|client| [(client, 80), (client, 81)]) {
        let tally = client.get(service.url(port, "/")).many(20, 2, None).await?;
        ensure!(tally.pods.len() == 1 && tally.statuses.get(&200) == Some(&20), "{tally:?}");
    }
    pair.finish().await
}
