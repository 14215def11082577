//! Requests go where the VirtualService says: by header, by weight, rewritten, redirected, delayed, aborted, retried.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::{Pair, Pod, Service, apps, require_root};

/// `reviews` in three versions over both nodes, with a subset for each.
struct Reviews {
    pair: Pair,
    service: Service,
    _pods: Vec<Pod>,
}

const SUBSETS: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: reviews, namespace: default }
spec:
  host: reviews
  subsets:
    - { name: v1, labels: { version: v1 } }
    - { name: v2, labels: { version: v2 } }
    - { name: v3, labels: { version: v3 } }
";

/// A VirtualService for `reviews` with this `http` list.
fn routes(version: &str, http: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/{version}\nkind: VirtualService\n\
         metadata: {{ name: reviews, namespace: default }}\nspec:\n  hosts: [reviews]\n  http:{http}"
    )
}

impl Reviews {
    async fn new(name: &str) -> Result<Self> {
        let pair = Pair::new(name).await?;
        let mut pods = Vec::new();
        for (node, version) in [(&pair.a, "v1"), (&pair.b, "v2"), (&pair.b, "v3")] {
            let pod = node.pod(&format!("reviews-{version}")).sa("reviews");
            let pod = pod.labels([("app", "reviews"), ("version", version)]).start().await?;
            pod.serve(apps::http(9080)).await?;
            pods.push(pod);
        }
        let service =
            pair.lab.service("reviews").selector("app", "reviews").port("http", 9080, 9080).apply()?;
        pair.apply("subsets.yaml", SUBSETS).await?;
        for pod in &pods {
            pod.enrolled().await?;
        }
        Ok(Self { pair, service, _pods: pods })
    }

    async fn tally(&self, count: u64, user: Option<&str>) -> Result<lab::apps::Tally> {
        let mut request = self.pair.client.get(self.service.url(9080, "/reviews/0"));
        if let Some(user) = user {
            request = request.header("end-user", user);
        }
        request.many(count, 4, None).await
    }

    /// What the client's agent has counted and logged of requests that a version answered.
    async fn told(&self, version: &str, requests: u64) -> Result<()> {
        let labels = [("reporter", "source"), ("destination_version", version), ("response_code", "200")];
        lab::eventually("requests are counted and logged", async || {
            let metrics = self.pair.agent_a.metrics().await?;
            let counted = lab::metric(&metrics, "istio_requests_total", &labels) as u64;
            let lines = self.pair.agent_a.access_log();
            let name = format!("reviews-{version}");
            let of_version = |line: &&String| {
                let line = lab::fields(line);
                line.get("reporter").is_some_and(|reporter| reporter == "source")
                    && line.get("dst.workload").is_some_and(|workload| *workload == name)
                    && line["status"] == "200"
            };
            let logged = lines.iter().filter(of_version).count() as u64;
            ensure!((counted, logged) == (requests, requests), "{counted} counted, {logged} logged");
            Ok(())
        })
        .await
    }

    async fn all_from(&self, pod: &str, user: Option<&str>) -> Result<()> {
        let tally = self.tally(20, user).await?;
        ensure!(tally.pods.get(pod) == Some(&20) && tally.statuses.get(&200) == Some(&20), "{tally:?}");
        Ok(())
    }
}

const JASON: &str = "
    - match: [{ headers: { end-user: { exact: jason } } }]
      route: [{ destination: { host: reviews, subset: v2 } }]
    - route: [{ destination: { host: reviews, subset: v3 } }]
";

#[tokio::test]
async fn jason_goes_to_v2_and_everybody_else_to_v3() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let reviews = Reviews::new("jason").await?;
    for version in ["v1alpha3", "v1beta1", "v1"] {
        reviews.pair.apply("reviews.yaml", &routes(version, JASON)).await?;
        reviews.all_from("reviews-v2", Some("jason")).await?;
        reviews.all_from("reviews-v3", Some("jasonx")).await?;
        reviews.all_from("reviews-v3", None).await?;
    }
    // The same over HTTP/2 and over IPv6.
    let url = reviews.service.url6(9080, "/reviews/0");
    let answer = reviews.pair.client.get(url).header("end-user", "jason").h2c().send().await?;
    ensure!(answer.pod() == Some("reviews-v2"), "{answer:?}");
    reviews.told("v2", 61).await?;
    reviews.told("v3", 120).await?;
    reviews.pair.finish().await
}

#[tokio::test]
async fn weights_split_and_unmatched_requests_get_404() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let reviews = Reviews::new("weights").await?;
    let http = "
    - match: [{ uri: { prefix: /reviews } }]
      route:
        - { destination: { host: reviews, subset: v1 }, weight: 90 }
        - { destination: { host: reviews, subset: v3 }, weight: 10 }
";
    reviews.pair.apply("reviews.yaml", &routes("v1", http)).await?;
    let tally = reviews.tally(1000, None).await?;
    let v3 = tally.pods.get("reviews-v3").copied().unwrap_or_default();
    // Four standard deviations of 1,000 draws at 10 %.
    ensure!((62..=138).contains(&v3) && tally.statuses.get(&200) == Some(&1000), "{tally:?}");
    let other = reviews.pair.client.http_get(&reviews.service.url(9080, "/other"), &[]).await?;
    ensure!(other.status == 404, "{other:?}");
    reviews.told("v3", v3).await?;
    let line = [("status", "404"), ("flags", "NR"), ("path", "/other"), ("src.workload", "client")];
    reviews.pair.agent_a.logged(&line).await?;
    reviews.pair.finish().await
}

#[tokio::test]
async fn faults_hit_whom_they_name() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let reviews = Reviews::new("faults").await?;
    let http = "
    - match: [{ headers: { end-user: { exact: jason } } }]
      fault: { delay: { percentage: { value: 100 }, fixedDelay: 700ms } }
      route: [{ destination: { host: reviews, subset: v1 } }]
    - match: [{ headers: { end-user: { exact: eve } } }]
      fault: { abort: { percentage: { value: 100 }, httpStatus: 418 } }
      route: [{ destination: { host: reviews, subset: v1 } }]
    - route: [{ destination: { host: reviews, subset: v1 } }]
";
    reviews.pair.apply("reviews.yaml", &routes("v1", http)).await?;
    let url = reviews.service.url(9080, "/");
    let client = &reviews.pair.client;
    let begun = Instant::now();
    let delayed = client.http_get(&url, &[("end-user", "jason")]).await?;
    ensure!(delayed.status == 200 && begun.elapsed() >= Duration::from_millis(700), "{delayed:?}");
    ensure!(client.http_get(&url, &[("end-user", "eve")]).await?.status == 418);
    ensure!(client.http_get(&url, &[("end-user", "ada")]).await?.status == 200);
    let flags = |flag: &'static str| [("reporter", "source"), ("response_flags", flag)];
    let metrics = reviews.pair.agent_a.metrics().await?;
    for flag in ["DI", "FI", "-"] {
        let seen = lab::metric(&metrics, "istio_requests_total", &flags(flag));
        ensure!((seen - 1.0).abs() < f64::EPSILON, "{flag}: {seen}\n{metrics}");
    }
    reviews.pair.finish().await
}

#[tokio::test]
async fn requests_and_responses_are_changed_as_the_route_says() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let reviews = Reviews::new("changes").await?;
    let http = "
    - match: [{ uri: { prefix: /old } }]
      redirect: { uri: /new, authority: reviews.example, redirectCode: 308 }
    - match: [{ uri: { prefix: /a/ } }]
      rewrite: { uri: /b/, authority: inner.example }
      headers:
        request: { set: { x-set: one }, add: { x-add: two }, remove: [x-gone] }
        response: { set: { x-answer: three }, remove: [x-lab-pod] }
      route: [{ destination: { host: reviews, subset: v2 } }]
";
    reviews.pair.apply("reviews.yaml", &routes("v1", http)).await?;
    let client = &reviews.pair.client;
    let moved = client.http_get(&reviews.service.url(9080, "/old/x"), &[]).await?;
    ensure!(moved.status == 308 && moved.headers["location"] == "http://reviews.example/new", "{moved:?}");
    let url = reviews.service.url(9080, "/a/c?q=1");
    let answer = client.http_get(&url, &[("x-gone", "0"), ("x-add", "zero"), ("x-set", "zero")]).await?;
    let echo = answer.echo()?;
    ensure!(echo.target == "/b/c?q=1" && echo.authority == "inner.example", "{echo:?}");
    ensure!(echo.headers["x-set"] == "one" && echo.headers["x-add"] == "zero, two", "{echo:?}");
    ensure!(!echo.headers.contains_key("x-gone") && !answer.headers.contains_key("x-lab-pod"), "{answer:?}");
    ensure!(answer.headers["x-answer"] == "three", "{answer:?}");
    // Headers that only the mesh may use never come through.
    let forged = client.http_get(&url, &[("mesh-port", "1"), ("mesh-app-protocol", "h2")]).await?.echo()?;
    ensure!(!forged.headers.keys().any(|name| name.starts_with("mesh-")), "{forged:?}");
    reviews.pair.finish().await
}

#[tokio::test]
async fn retries_hide_a_failing_replica_and_timeouts_end() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let reviews = Reviews::new("retries").await?;
    let bad = reviews.pair.b.pod("reviews-bad").sa("reviews").labels([("app", "reviews"), ("version", "v1")]);
    let bad = bad.start().await?;
    bad.serve(apps::http(9080).arg("--status=503")).await?;
    let without = "
    - retries: { attempts: 0 }
      route: [{ destination: { host: reviews, subset: v1 } }]
";
    reviews.pair.apply("reviews.yaml", &routes("v1", without)).await?;
    bad.enrolled().await?;
    let tally = reviews.tally(40, None).await?;
    ensure!(tally.statuses.contains_key(&503) && tally.statuses.contains_key(&200), "{tally:?}");

    let with = "
    - match: [{ uri: { prefix: /slow } }]
      timeout: 300ms
      route: [{ destination: { host: reviews, subset: v3 } }]
    - retries: { attempts: 3, perTryTimeout: 5s, retryOn: 5xx }
      route: [{ destination: { host: reviews, subset: v1 } }]
";
    reviews.pair.apply("reviews.yaml", &routes("v1", with)).await?;
    let tally = reviews.tally(100, None).await?;
    ensure!(tally.statuses.get(&200) == Some(&100), "{tally:?}");
    let body = reviews.pair.client.get(reviews.service.url(9080, "/echo")).method("POST").body_bytes(30_000);
    let tally = body.many(20, 2, None).await?;
    ensure!(tally.statuses.get(&200) == Some(&20), "{tally:?}");

    let slow = reviews.pair.client.http_get(&reviews.service.url(9080, "/slow/60000"), &[]).await?;
    ensure!(slow.status == 504, "{slow:?}");
    reviews.pair.finish().await
}
