//! `backendUtilization` of a DestinationRule: endpoints get shares by what they report of themselves, in the head of a response
//! or in its trailers, whatever is spoken and wherever they are.

use std::convert::Infallible;

use anyhow::{Result, ensure};
use http_body_util::StreamBody;
use hyper::{
    HeaderMap, Response, Version,
    body::{Bytes, Frame},
    service::service_fn,
};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
};
use lab::{
    Pair, Pod,
    apps::{POD_HEADER, Tally},
    eventually, metric, require_root,
};
use tokio::task::JoinSet;

const APP: u16 = 8080;
const HTTP: u16 = 80;
const HTTP2: u16 = 81;
const REQUESTS: u64 = 2_100;

/// Answers with its name and this load: in the head over HTTP/1.1, in trailers over HTTP/2.
fn serve(pod: &Pod, load: f64) -> Result<JoinSet<()>> {
    let (name, report) = (pod.name().to_owned(), format!("TEXT cpu_utilization={load}, rps_fractional=100"));
    pod.serve_own(APP, move |stream| {
        let (name, report) = (name.clone(), report.clone());
        let answer = service_fn(move |request: hyper::Request<_>| {
            let answer = answer(&name, &report, request.version());
            async move { answer }
        });
        async move {
            let server = auto::Builder::new(TokioExecutor::new());
            let _ = server.serve_connection(TokioIo::new(stream), answer).await;
        }
    })
}

type Frames = futures_util::stream::Iter<std::vec::IntoIter<Result<Frame<Bytes>, Infallible>>>;

fn answer(
    name: &str,
    report: &str,
    version: Version,
) -> Result<Response<StreamBody<Frames>>, hyper::http::Error> {
    let mut frames = vec![Ok(Frame::data(Bytes::from_static(b"{}")))];
    let mut head = Response::builder().header(POD_HEADER, name);
    if version == Version::HTTP_2 {
        let mut trailers = HeaderMap::new();
        trailers.insert("endpoint-load-metrics", report.parse()?);
        frames.push(Ok(Frame::trailers(trailers)));
    } else {
        head = head.header("endpoint-load-metrics", report);
    }
    head.body(StreamBody::new(futures_util::stream::iter(frames)))
}

const RULE: &str = "
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: { name: web, namespace: default }
spec:
  host: web
  trafficPolicy:
    loadBalancer: { backendUtilization: { blackoutPeriod: 0s, weightUpdatePeriod: 100ms } }
";

/// What is believed of each endpoint, as far as that is anything.
async fn believed(pair: &Pair, port: u16) -> Result<Vec<f64>> {
    let shown = pair.agent_a.endpoints(&format!("|{port}||web.")).await?;
    Ok(shown.iter().filter_map(|one| one["reported_weight"].as_f64()).collect())
}

fn check(tally: &Tally, pods: &[(&Pod, f64)]) -> Result<()> {
    let sum: f64 = pods.iter().map(|(_, load)| 1.0 / load).sum();
    for (pod, load) in pods {
        let (share, n) = (1.0 / load / sum, REQUESTS as f64);
        let found = tally.pods.get(pod.name()).copied().unwrap_or_default() as f64;
        // Five standard deviations.
        let allowed = 5.0 * (n * share * (1.0 - share)).sqrt();
        ensure!(
            (found - n * share).abs() < allowed,
            "{}: {found} of {n}, not {share:.2}: {tally:?}",
            pod.name()
        );
    }
    Ok(())
}

#[tokio::test]
async fn endpoints_get_shares_by_what_they_report() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("utilized").await?;
    let mut pods = Vec::new();
    let mut serving = Vec::new();
    let far = pair.b.pod("far").label("app", "web").start().await?;
    let near = pair.a.pod("near").label("app", "web").start().await?;
    let out = pair.b.pod("out").label("app", "web").unenrolled().start().await?;
    for (pod, load) in [(&far, 0.25), (&near, 0.5), (&out, 1.0)] {
        serving.push(serve(pod, load)?);
        pods.push((pod, load));
    }
    let service = pair.lab.service("web").selector("app", "web");
    let service = service.port("http", HTTP, APP).port("http2", HTTP2, APP).apply()?;
    pair.settled().await?;
    for pod in [&far, &near] {
        pod.enrolled().await?;
    }
    pair.apply("rule.yaml", RULE).await?;
    for port in [HTTP, HTTP2] {
        eventually("a report of each endpoint", async || {
            pair.client.get(service.url(port, "/")).many(10, 1, None).await?;
            let believed = believed(&pair, port).await?;
            ensure!(believed.len() == 3, "{believed:?}");
            Ok(())
        })
        .await?;
        eventually("shares by the reports", async || {
            let tally = pair.client.get(service.url(port, "/")).many(REQUESTS, 8, None).await?;
            ensure!(tally.statuses.get(&200) == Some(&REQUESTS), "{tally:?}");
            check(&tally, &pods)
        })
        .await?;
    }
    let metrics = pair.agent_a.metrics().await?;
    let endpoint = far.at(APP).to_string();
    let cluster = format!("outbound|{HTTP}||web.default.svc.cluster.local");
    let labels = [("cluster", &*cluster), ("endpoint", &*endpoint)];
    let reported = metric(&metrics, "mesh_endpoint_reported_weight", &labels);
    ensure!((reported - 400.0).abs() < 1e-6, "{reported}");
    drop(serving);
    pair.finish().await
}
