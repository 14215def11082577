//! Adaptive concurrency: no more requests are in an app at a time than it does well with; the others are told 503 at once.

use anyhow::{Result, ensure};
use lab::{Pair, apps, metric, require_root};

/// Between two and four at a time. Nothing is tried twice, so that each refusal is seen.
const RULES: &str = "
apiVersion: mesh.io/v1alpha1
kind: ServicePolicy
metadata: { name: NAME, namespace: default }
spec:
  service: NAME
  adaptiveConcurrency:
    minConcurrency: 2
    maxConcurrency: 4
    updateInterval: 50ms
    minRTT: { interval: 1h, requests: 4 }
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: NAME, namespace: default }
spec:
  hosts: [NAME]
  http: [{ retries: { attempts: 0 }, route: [{ destination: { host: NAME } }] }]
";

#[tokio::test]
async fn an_app_has_no_more_requests_at_a_time_than_allowed() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("concurrency").await?;
    for (node, agent, name) in [(&pair.b, &pair.agent_b, "far"), (&pair.a, &pair.agent_a, "near")] {
        let pod = node.pod(name).label("app", name).start().await?;
        pod.serve(apps::http(8080)).await?;
        let service = pair.lab.service(name).selector("app", name).port("http", 80, 8080).apply()?;
        pair.apply(&format!("{name}.yaml"), &RULES.replace("NAME", name)).await?;
        pod.enrolled().await?;
        let host = service.host();

        // One after the other: the least latency is known after four.
        let url = service.url(80, "/slow/30");
        let alone = pair.client.get(&url).many(40, 1, None).await?;
        ensure!(alone.statuses.get(&200) == Some(&40), "{alone:?}");
        let limits = [("service", &*host)];
        let limit = metric(&agent.metrics().await?, "mesh_concurrency_limit", &limits);
        ensure!((2.0..=4.0).contains(&limit), "{limit}");

        let crowd = pair.client.get(service.url(80, "/slow/100")).many(200, 20, None).await?;
        let [served, refused] =
            [200, 503].map(|status| crowd.statuses.get(&status).copied().unwrap_or_default());
        ensure!(served >= 4 && refused > 0 && served + refused == 200, "{crowd:?}");
        let stats = pod.stats(8080).await?;
        ensure!((2..=4).contains(&stats.peak), "{stats:?}");
        let metrics = agent.metrics().await?;
        let counted = metric(&metrics, "mesh_concurrency_refused_requests_total", &limits);
        let flagged =
            [("reporter", "destination"), ("response_flags", "UO"), ("destination_service", &*host)];
        let flagged = metric(&metrics, "istio_requests_total", &flagged);
        let refused = f64::from(u32::try_from(refused)?);
        ensure!((counted, flagged) == (refused, refused), "{counted}, {flagged}, not {refused}");
        agent
            .config("the dump shows the limit", |dump| {
                let shown = &dump["guards"][pod.at(8080).to_string()]["adaptive_concurrency"];
                ensure!(shown["under_way"] == 0 && shown["min_rtt_us"].as_u64() > Some(29_000), "{shown}");
                Ok(())
            })
            .await?;
        // Nothing is held against those who come later.
        let after = pair.client.get(service.url(80, "/")).many(10, 1, None).await?;
        ensure!(after.statuses.get(&200) == Some(&10), "{after:?}");
    }
    pair.finish().await
}
