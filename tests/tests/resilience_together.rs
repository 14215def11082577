//! Subsets, places, health checks, outlier detection, retries and fallbacks at the same time: who can serve does, the near before
//! the far before the fallback, and no request fails on the way there and back.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Node, Pair, Pod, Process, Service,
    apps::{self, Load, LoadKind},
    eventually, eventually_within, metric, require_root,
};

/// Where the apps say whether they are well: an app that fails may well say that it is.
const CHECKED: u16 = 9000;
const V1: &str = "outbound|80|v1|web.default.svc.cluster.local";
const V2: &str = "outbound|80|v2|web.default.svc.cluster.local";

/// All requests are for v1. Three failures in a row eject whoever has failed, so that a later try goes elsewhere; not always the
/// fourth, for what was under way to an app that ends may still be answered in between.
const RULES: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web, namespace: default }
spec:
  host: web
  trafficPolicy:
    outlierDetection:
      { consecutive5xxErrors: 3, interval: 500ms, baseEjectionTime: 6s, maxEjectionPercent: 100 }
  subsets: [{ name: v1, labels: { version: v1 } }, { name: v2, labels: { version: v2 } }]
---
apiVersion: networking.istio.io/v1
kind: VirtualService
metadata: { name: web, namespace: default }
spec:
  hosts: [web]
  http: [{ retries: { attempts: 8, retryOn: '5xx' }, route: [{ destination: { host: web, subset: v1 } }] }]
---
apiVersion: mesh.io/v1alpha1
kind: ServicePolicy
metadata: { name: web, namespace: default }
spec:
  service: web
  healthCheck: { http: { path: /healthz }, port: 9000, interval: 200ms, unhealthyThreshold: 2 }
  fallbacks: [{ subset: v1, to: [{ subset: v2 }] }]
";

struct World {
    pair: Pair,
    service: Service,
    /// Two of v1 beside the client, one of v1 and one of v2 on the other node; each with its app.
    pods: BTreeMap<&'static str, (Pod, Process)>,
}

impl World {
    async fn new() -> Result<Self> {
        let pair = Pair::new("together").await?;
        for (node, region) in [("a", "r1"), ("b", "r2")] {
            let object = format!(
                "{{apiVersion: v1, kind: Node, metadata: {{name: {node}, \
                 labels: {{topology.kubernetes.io/region: {region}}}}}}}"
            );
            pair.lab.apply(&format!("node-{node}.yaml"), &object)?;
        }
        let mut pods = BTreeMap::new();
        let all: [(&Node, &str, &str); 4] = [
            (&pair.a, "near-1", "v1"),
            (&pair.a, "near-2", "v1"),
            (&pair.b, "far", "v1"),
            (&pair.b, "spare", "v2"),
        ];
        for (node, name, version) in all {
            let pod = node.pod(name).label("app", "web").label("version", version).start().await?;
            pod.serve(apps::http(CHECKED)).await?;
            let app = pod.serve(apps::http(8080)).await?;
            pods.insert(name, (pod, app));
        }
        let service = pair.lab.service("web").selector("app", "web").port("http", 80, 8080).apply()?;
        pair.apply("rules.yaml", RULES).await?;
        for (pod, _) in pods.values() {
            pod.enrolled().await?;
        }
        Ok(Self { pair, service, pods })
    }

    fn pod(&self, name: &str) -> Result<&Pod> {
        Ok(&self.pods.get(name).context("no such pod")?.0)
    }

    /// The app of a pod is another one from now on.
    async fn replace(&mut self, name: &'static str, app: apps::App) -> Result<()> {
        let (pod, before) = self.pods.remove(name).context("no such pod")?;
        before.stop(Duration::from_secs(5)).await?;
        let serving = pod.serve(app).await?;
        self.pods.insert(name, (pod, serving));
        Ok(())
    }

    async fn set_near_sick(&self, sick: bool) -> Result<()> {
        for name in ["near-1", "near-2"] {
            self.pod(name)?.set_sick(CHECKED, sick).await?;
        }
        Ok(())
    }

    /// Waits until these pods serve, and no others; every request on the way there is answered with 200.
    async fn served_by(&self, expected: &[&str]) -> Result<()> {
        let url = self.service.url(80, "/");
        eventually("who serves", async || {
            let tally = self.pair.client.get(&url).many(40, 2, None).await?;
            ensure!(tally.statuses.get(&200) == Some(&40), "{tally:?}");
            let pods: Vec<&str> = tally.pods.keys().map(String::as_str).collect();
            ensure!(pods == expected, "{tally:?}");
            Ok(())
        })
        .await
    }

    /// Waits until the endpoints of v1 are like this, by the names of their pods, as `meshctl config endpoints` shows them.
    async fn health(&self, expected: &[(&str, &str)]) -> Result<()> {
        // Who has been ejected again and again is so for longer each time.
        eventually_within(Duration::from_mins(1), "how the endpoints are", async || {
            let all = self.pair.agent_a.endpoints(V1).await?;
            for (name, health) in expected {
                let workload = format!("default/{name}");
                let one = all.iter().find(|one| one["workload"] == *workload);
                ensure!(one.is_some_and(|one| one["health"] == *health), "{name} is not {health}: {all:?}");
            }
            Ok(())
        })
        .await
    }

    async fn counted(&self, name: &str, labels: &[(&str, &str)]) -> Result<f64> {
        Ok(metric(&self.pair.agent_a.metrics().await?, name, labels))
    }

    async fn load(&self) -> Result<[Load; 2]> {
        let (client, url) = (&self.pair.client, self.service.url(80, "/"));
        let pause = Duration::from_millis(10);
        Ok([
            client.load(LoadKind::Requests, &url, 2, pause).await?,
            client.load(LoadKind::KeptAlive, &url, 2, pause).await?,
        ])
    }
}

#[tokio::test]
async fn whoever_can_serves_and_no_request_fails_on_the_way_there_and_back() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let mut world = World::new().await?;
    let load = world.load().await?;
    world.served_by(&["near-1", "near-2"]).await?;

    // The near ones say that they are sick: the other region.
    world.set_near_sick(true).await?;
    world.served_by(&["far"]).await?;
    world.health(&[("near-1", "unhealthy"), ("near-2", "unhealthy"), ("far", "healthy")]).await?;
    ensure!(world.counted("mesh_fallbacks_total", &[]).await? < 0.5, "nobody has fallen back yet");

    // That one says that it is well, and fails: ejected, and the fallback serves.
    world.replace("far", apps::http(8080).arg("--status=503")).await?;
    world.served_by(&["spare"]).await?;
    world.health(&[("near-1", "unhealthy"), ("far", "ejected")]).await?;
    let fallen = world.counted("mesh_fallbacks_total", &[("cluster", V1), ("to", V2)]).await?;
    ensure!(fallen >= 40.0, "{fallen}");
    let ejections = world.counted("mesh_endpoint_ejections_total", &[("cluster", V1)]).await?;
    ensure!(ejections > 0.5, "{ejections}");

    // The near ones are well again, whatever becomes of the far one.
    world.set_near_sick(false).await?;
    world.served_by(&["near-1", "near-2"]).await?;

    // The far one works again, and is back when its time is over: it stands in as before.
    world.replace("far", apps::http(8080)).await?;
    world.health(&[("near-1", "healthy"), ("near-2", "healthy"), ("far", "healthy")]).await?;
    world.set_near_sick(true).await?;
    world.served_by(&["far"]).await?;
    world.set_near_sick(false).await?;
    world.served_by(&["near-1", "near-2"]).await?;

    for load in load {
        load.goes_on(3).await?;
        let loaded = load.finish().await?;
        ensure!(loaded.errors.is_empty(), "{loaded:?}");
    }
    world.pair.finish().await
}
