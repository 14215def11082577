//! Who gets a request: the near replicas as long as they serve, then those that stand in; shares by place and by weight; the
//! replica that answers soonest and does not refuse; what rules for some clients say; or whoever the client has dialled.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Node, Pair, Pod, Process, apps, eventually, metric, net::Addresses, require_root};
use serde_json::Value;

/// The nodes of a pair, in two regions.
async fn in_two_regions(pair: &Pair) -> Result<()> {
    for (node, region) in [("a", "r1"), ("b", "r2")] {
        let object = format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {node}, labels: {{topology.kubernetes.io/region: {region}}}}}}}"
        );
        pair.lab.apply(&format!("node-{node}.yaml"), &object)?;
    }
    pair.settled().await
}

async fn replica(node: &Node, name: &str, app: &str) -> Result<(Pod, Process)> {
    let pod = node.pod(name).label("app", app).start().await?;
    let process = pod.serve(apps::http(8080)).await?;
    pod.enrolled().await?;
    Ok((pod, process))
}

fn rule(policy: &str) -> String {
    format!(
        "{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: web, namespace: default}}, \
         spec: {{host: web, trafficPolicy: {{{policy}}}}}}}"
    )
}

fn route(retries: &str) -> String {
    format!(
        "{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: web, namespace: default}}, \
         spec: {{hosts: [web], http: [{{retries: {{{retries}}}, route: [{{destination: {{host: web}}}}]}}]}}}}"
    )
}

/// Which pods answered so many requests, all of them with 200.
async fn answered(client: &Pod, url: &str, count: u64, at_once: u64) -> Result<BTreeMap<String, u64>> {
    let tally = client.get(url).many(count, at_once, None).await?;
    ensure!(tally.statuses.get(&200) == Some(&count), "{tally:?}");
    Ok(tally.pods)
}

/// The endpoints of `web` as `meshctl config endpoints` shows them, by the name of their pod.
async fn endpoints(agent: &Agent) -> Result<BTreeMap<String, Value>> {
    let list = agent.endpoints("|80||web.").await?;
    let name = |one: &Value| Some(one["workload"].as_str()?.strip_prefix("default/")?.to_owned());
    list.into_iter().map(|one| Ok((name(&one).context("an endpoint without a pod")?, one))).collect()
}

#[tokio::test]
async fn another_region_stands_in_while_the_near_one_fails() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("locality").await?;
    in_two_regions(&pair).await?;
    let (near, serving) = replica(&pair.a, "near", "web").await?;
    let (_far, _serving) = replica(&pair.b, "far", "web").await?;
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    let outliers = "outlierDetection: {consecutive5xxErrors: 3, interval: 500ms, baseEjectionTime: 8s, maxEjectionPercent: 100}";
    pair.apply("rule.yaml", &rule(outliers)).await?;
    pair.apply("route.yaml", &route("attempts: 0")).await?;
    let (client, url) = (&pair.client, service.url(80, "/"));

    ensure!(answered(client, &url, 40, 2).await? == BTreeMap::from([("near".to_owned(), 40)]));
    let shown = endpoints(&pair.agent_a).await?;
    let levels: Vec<_> =
        ["near", "far"].iter().map(|pod| (&shown[*pod]["level"], &shown[*pod]["locality"])).collect();
    ensure!(levels == [(&0.into(), &"r1".into()), (&1.into(), &"r2".into())], "{shown:?}");
    // What is near is another thing for clients of the other node.
    ensure!(endpoints(&pair.agent_b).await?["near"]["level"] == 1);

    serving.stop(Duration::from_secs(5)).await?;
    let failing = near.serve(apps::http(8080).arg("--status=503")).await?;
    let tally = client.get(&url).many(30, 1, None).await?;
    let seen = (tally.statuses.get(&503), tally.statuses.get(&200), tally.pods.get("far"));
    ensure!(
        seen == (Some(&3), Some(&27), Some(&27)),
        "ejected after three errors, and far has all the rest: {tally:?}"
    );
    let shown = endpoints(&pair.agent_a).await?;
    ensure!(shown["near"]["health"] == "ejected" && shown["far"]["health"] == "healthy", "{shown:?}");
    let metrics = pair.agent_a.metrics().await?;
    let near_one = [("endpoint", &*near.at(8080).to_string())];
    ensure!(metric(&metrics, "mesh_endpoint_ejected", &near_one) > 0.5, "{metrics}");
    ensure!(metric(&metrics, "mesh_cluster_endpoints", &[("state", "ejected")]) > 0.5, "{metrics}");

    failing.stop(Duration::from_secs(5)).await?;
    let _serving = near.serve(apps::http(8080)).await?;
    eventually("the near one is back", async || {
        let pods = answered(client, &url, 10, 1).await?;
        ensure!(pods == BTreeMap::from([("near".to_owned(), 10)]), "{pods:?}");
        Ok(())
    })
    .await?;
    pair.finish().await
}

/// Clients of one node, whose own labels say who is near to them.
#[tokio::test]
async fn each_client_prefers_the_replicas_that_have_its_label() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("ownlabel").await?;
    let mut clients = Vec::new();
    for team in ["red", "blue"] {
        clients.push(pair.a.pod(&format!("client-{team}")).label("team", team).start().await?);
        let pod = pair.b.pod(team).label("app", "web").label("team", team).start().await?;
        let failing = if team == "red" { apps::http(8080).arg("--status=503") } else { apps::http(8080) };
        pod.serve(failing).await?;
        pod.enrolled().await?;
    }
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    pair.apply("route.yaml", &route("attempts: 0")).await?;
    let by_team = "loadBalancer: {localityLbSetting: {failoverPriority: [team]}}, outlierDetection: \
        {consecutive5xxErrors: 3, interval: 500ms, baseEjectionTime: 1m, maxEjectionPercent: 100}";
    pair.apply("rule.yaml", &rule(by_team)).await?;
    let url = service.url(80, "/");
    for client in &clients {
        client.enrolled().await?;
    }
    ensure!(answered(&clients[1], &url, 20, 2).await? == BTreeMap::from([("blue".to_owned(), 20)]));
    // Three failures of its own, and then the others stand in.
    let tally = clients[0].get(&url).many(20, 1, None).await?;
    let seen = (tally.statuses.get(&503), tally.pods.get("red"), tally.pods.get("blue"));
    ensure!(seen == (Some(&3), Some(&3), Some(&17)), "{tally:?}");
    let shown = endpoints(&pair.agent_a).await?;
    let levels = |pod: &str| shown[pod]["level_by_client"].clone();
    let of = |red: u32, blue: u32| serde_json::json!({"team=red": red, "team=blue": blue});
    ensure!(levels("red") == of(0, 1) && levels("blue") == of(1, 0), "{shown:?}");

    // One without the label prefers nobody.
    pair.client.get(&url).send().await?;
    let shown = endpoints(&pair.agent_a).await?;
    ensure!(shown["blue"]["level_by_client"]["team="] == 0, "{shown:?}");
    pair.finish().await
}

#[tokio::test]
async fn retries_go_to_other_places_only_where_they_are_told_to() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("remote").await?;
    in_two_regions(&pair).await?;
    // Never ejected: the levels are there, and the first one always fails.
    let near = pair.a.pod("near").label("app", "web").start().await?;
    near.serve(apps::http(8080).arg("--status=503")).await?;
    near.enrolled().await?;
    let (_far, _serving) = replica(&pair.b, "far", "web").await?;
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    pair.apply("rule.yaml", &rule("outlierDetection: {consecutive5xxErrors: 0}")).await?;
    let (client, url) = (&pair.client, service.url(80, "/"));

    pair.apply("route.yaml", &route("attempts: 2, retryOn: 5xx")).await?;
    let tally = client.get(&url).many(20, 1, None).await?;
    ensure!(tally.statuses.get(&503) == Some(&20), "{tally:?}");
    pair.apply("route.yaml", &route("attempts: 2, retryOn: 5xx, retryRemoteLocalities: true")).await?;
    ensure!(answered(client, &url, 20, 1).await? == BTreeMap::from([("far".to_owned(), 20)]));
    // Two tries where it would go anyhow, the third elsewhere.
    answered(client, &service.url(80, "/third"), 1, 1).await?;
    let third = [("reporter", "source"), ("path", "/third"), ("tries", "3"), ("dst.workload", "far")];
    pair.agent_a.logged(&third).await?;

    let shares = "loadBalancer: {localityLbSetting: {distribute: [{from: r1, to: {r2: 100}}]}}";
    pair.apply("rule.yaml", &rule(shares)).await?;
    pair.apply("route.yaml", &route("attempts: 0")).await?;
    ensure!(answered(client, &url, 20, 1).await? == BTreeMap::from([("far".to_owned(), 20)]));
    pair.finish().await
}

#[tokio::test]
async fn weights_are_kept_and_the_slow_replica_is_spared() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("weights").await?;
    let (_one, _serving) = replica(&pair.a, "one", "web").await?;
    let three = pair.b.pod("three").label("app", "web").annotation("mesh.io/weight", "3").start().await?;
    three.serve(apps::http(8080)).await?;
    three.enrolled().await?;
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    pair.apply("rule.yaml", &rule("loadBalancer: {simple: ROUND_ROBIN}")).await?;
    pair.apply("route.yaml", &route("attempts: 0")).await?;
    let (client, url) = (&pair.client, service.url(80, "/"));
    let shares = BTreeMap::from([("one".to_owned(), 50), ("three".to_owned(), 150)]);
    ensure!(answered(client, &url, 200, 4).await? == shares, "in turns, they are exact");

    // A third one, slow: it is asked, and then as good as left alone, though it has nothing in flight most of the time.
    let slow = pair.b.pod("slow").label("app", "web").annotation("mesh.io/weight", "3").start().await?;
    slow.serve(apps::http(8080).arg("--delay-ms=800")).await?;
    slow.enrolled().await?;
    let by_latency = rule("").replace(
        "namespace: default}",
        "namespace: default, annotations: {mesh.io/load-balancer: PEAK_EWMA}}",
    );
    pair.apply("rule.yaml", &by_latency).await?;
    let pods = answered(client, &url, 200, 2).await?;
    let of_slow = pods.get("slow").copied().unwrap_or_default();
    ensure!((1..=10).contains(&of_slow), "{pods:?}");
    let shown = endpoints(&pair.agent_a).await?;
    let latency = |pod: &str| shown[pod]["latency_ms"].as_f64().unwrap_or_default();
    ensure!(latency("slow") > latency("one") && latency("slow") > latency("three"), "{shown:?}");
    ensure!(shown["three"]["weight"] == 3 && shown["three"]["in_flight"] == 0, "{shown:?}");
    let table = pair.agent_a.meshctl(&["config", "endpoints"]).await?;
    ensure!(table.starts_with("CLUSTER") && table.contains("default/slow"), "{table}");
    let latency = [("endpoint", &*slow.at(8080).to_string())];
    let metrics = pair.agent_a.metrics().await?;
    ensure!(metric(&metrics, "mesh_endpoint_latency_seconds", &latency) > 0.0, "{metrics}");
    pair.finish().await
}

/// The replica that answers 503 is the first to answer.
#[tokio::test]
async fn who_refuses_fast_does_not_attract_what_is_chosen_by_latency() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("refusing").await?;
    let mut slower = Vec::new();
    for name in ["one", "two"] {
        let pod = pair.b.pod(name).label("app", "web").start().await?;
        let serving = pod.serve(apps::http(8080).arg("--delay-ms=30")).await?;
        pod.enrolled().await?;
        slower.push((pod, serving));
    }
    let failing = pair.b.pod("failing").label("app", "web").start().await?;
    let _serving = failing.serve(apps::http(8080).arg("--status=503")).await?;
    failing.enrolled().await?;
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    let by_latency = rule("").replace(
        "namespace: default}",
        "namespace: default, annotations: {mesh.io/load-balancer: PEAK_EWMA}}",
    );
    pair.apply("rule.yaml", &by_latency).await?;
    pair.apply("route.yaml", &route("attempts: 0")).await?;
    let url = service.url(80, "/");
    let tally = pair.client.get(&url).many(200, 2, None).await?;
    let failed = tally.statuses.get(&503).copied().unwrap_or_default();
    ensure!((1..=10).contains(&failed), "{tally:?}");
    pair.finish().await
}

/// Two clients of one node and namespace, of which a rule selects one.
#[tokio::test]
async fn a_rule_with_a_workload_selector_is_for_those_that_it_selects() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("selector").await?;
    let mut replicas = Vec::new();
    for version in ["v1", "v2"] {
        let pod = pair.b.pod(version).label("app", "web").label("version", version).start().await?;
        let serving = pod.serve(apps::http(8080)).await?;
        pod.enrolled().await?;
        replicas.push((pod, serving));
    }
    let batch = pair.a.pod("batch").label("role", "batch").start().await?;
    batch.enrolled().await?;
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    let subset = |name: &str, selector: &str, version: &str| {
        format!(
            "{{apiVersion: networking.istio.io/v1, kind: DestinationRule, metadata: {{name: {name}, namespace: default}}, \
             spec: {{host: web{selector}, subsets: [{{name: own, labels: {{version: {version}}}}}]}}}}"
        )
    };
    pair.apply("all.yaml", &subset("all", "", "v1")).await?;
    let selector = ", workloadSelector: {matchLabels: {role: batch}}";
    pair.apply("batch.yaml", &subset("batch", selector, "v2")).await?;
    let route = route("attempts: 0").replace("{host: web}", "{host: web, subset: own}");
    pair.apply("route.yaml", &route).await?;
    let url = service.url(80, "/");
    let only = |pod: &str| BTreeMap::from([(pod.to_owned(), 10)]);
    ensure!(answered(&pair.client, &url, 10, 1).await? == only("v1"));
    ensure!(answered(&batch, &url, 10, 1).await? == only("v2"));
    let table = pair.agent_a.meshctl(&["config", "endpoints"]).await?;
    ensure!(table.contains("default/role=batch"), "{table}");
    // It selects somebody else from now on.
    pair.apply("batch.yaml", &subset("batch", &selector.replace("role: batch", "role: other"), "v2")).await?;
    ensure!(answered(&batch, &url, 10, 1).await? == only("v1"));
    pair.finish().await
}

/// Half of the client's workload is on its node, and a quarter of the endpoints are: half of its requests stay.
#[tokio::test]
async fn what_a_zone_has_room_for_stays_in_it() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("zones").await?;
    for (node, zone) in [("a", "z1"), ("b", "z2")] {
        let object = format!(
            "{{apiVersion: v1, kind: Node, metadata: {{name: {node}, labels: {{topology.kubernetes.io/region: r1, \
             topology.kubernetes.io/zone: {zone}}}}}}}"
        );
        pair.lab.apply(&format!("node-{node}.yaml"), &object)?;
    }
    let mut kept = vec![replica(&pair.a, "near", "web").await?];
    for name in ["far1", "far2", "far3"] {
        kept.push(replica(&pair.b, name, "web").await?);
    }
    // Two pods of one workload, which is told by the hash in their names.
    let hash = "pod-template-hash";
    let client = pair.a.pod("shop-77-a").label(hash, "77").start().await?;
    let _other = pair.b.pod("shop-77-b").label(hash, "77").start().await?;
    client.enrolled().await?;
    let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
    pair.apply("rule.yaml", &rule("loadBalancer: {zoneAwareLbSetting: {minClusterSize: 4}}")).await?;
    pair.apply("route.yaml", &route("attempts: 0")).await?;
    let url = service.url(80, "/");
    let pods = answered(&client, &url, 400, 2).await?;
    let near = pods.get("near").copied().unwrap_or_default();
    // Half of 400, give or take 3.3 standard deviations of 10: wrong once in a thousand times.
    ensure!((167..=233).contains(&near) && pods.len() == 4, "{pods:?}");
    // With the same number of endpoints as there are pods of the workload in each zone, all of them do.
    for (pod, _) in kept.drain(2..) {
        pod.remove().await?;
    }
    pair.apply("rule.yaml", &rule("loadBalancer: {zoneAwareLbSetting: {minClusterSize: 2}}")).await?;
    ensure!(answered(&client, &url, 50, 2).await? == BTreeMap::from([("near".to_owned(), 50)]));
    pair.finish().await
}

#[tokio::test]
async fn passthrough_goes_where_the_client_has_dialled() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("passthrough").await?;
    // The service's address is that of a host outside the mesh, and its endpoint is another one.
    let outside = pair.b.pod("outside").unenrolled().start().await?;
    outside.serve(apps::http(80)).await?;
    let plain = pair.b.pod("plain").label("app", "web").unenrolled().start().await?;
    plain.serve(apps::http(8080)).await?;
    let (std::net::IpAddr::V4(v4), std::net::IpAddr::V6(v6)) = (outside.ip(), outside.ip6()) else {
        anyhow::bail!("a pod with addresses of other families")
    };
    let web = pair.lab.service("web").addresses(Addresses { v4, v6 }).selector("app", "web");
    let service = web.port("http", 80, 8080).apply()?;
    pair.settled().await?;
    let (client, url) = (&pair.client, service.url(80, "/"));
    ensure!(answered(client, &url, 4, 1).await? == BTreeMap::from([("plain".to_owned(), 4)]));
    pair.apply("rule.yaml", &rule("loadBalancer: {simple: PASSTHROUGH}")).await?;
    ensure!(answered(client, &url, 4, 1).await? == BTreeMap::from([("outside".to_owned(), 4)]));

    // With an endpoint in the mesh, plaintext to somebody unknown is not an answer.
    let (_pod, _serving) = replica(&pair.b, "enrolled", "web").await?;
    eventually("the endpoint in the mesh is known", async || {
        let tally = client.get(&url).many(4, 1, None).await?;
        ensure!(tally.statuses.get(&503) == Some(&4), "{tally:?}");
        Ok(())
    })
    .await?;
    pair.finish().await
}
