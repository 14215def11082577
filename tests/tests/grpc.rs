//! gRPC passes: unary and streaming, statuses in trailers, and what the mesh refuses is a gRPC status too.

use anyhow::{Result, ensure};
use lab::{Pair, apps, require_root};

#[tokio::test]
async fn unary_and_streaming_calls_pass_across_and_within_nodes() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("grpc").await?;
    for (name, node) in [("far", &pair.b), ("near", &pair.a)] {
        let server = node.pod(name).label("app", name).start().await?;
        server.serve(apps::grpc(50051)).await?;
        let service = pair.lab.service(name).selector("app", name).port("grpc", 50051, 50051).apply()?;
        pair.settled().await?;
        server.enrolled().await?;
        let called = pair.client.grpc(&service.url(50051, ""), "count/5").await?;
        ensure!(called.check == "SERVING" && called.pod.as_deref() == Some(name), "{called:?}");
        ensure!(called.stream.len() == 5 && called.ended == "Ok", "{called:?}");
        let unknown = pair.client.grpc(&service.url(50051, ""), "nobody").await?;
        ensure!(unknown.check == "NotFound", "{unknown:?}");
        // The status is that of the trailers, in both reports.
        for (status, path, count) in
            [("5", "/grpc.health.v1.Health/Check", 1.0), ("0", "/grpc.health.v1.Health/Check", 1.0)]
        {
            let labels =
                [("reporter", "source"), ("destination_workload", name), ("grpc_response_status", status)];
            let line =
                [("reporter", "source"), ("dst.workload", name), ("grpc_status", status), ("path", path)];
            ensure!(pair.agent_a.logged(&line).await?["protocol"] == "grpc");
            let seen = lab::metric(&pair.agent_a.metrics().await?, "istio_requests_total", &labels);
            ensure!(seen >= count, "{seen} calls to {name} with status {status}");
        }
    }
    let empty = pair.lab.service("empty").selector("app", "nobody").port("grpc", 50051, 50051).apply()?;
    pair.settled().await?;
    let refused = pair.client.grpc(&empty.url(50051, ""), "count/1").await?;
    ensure!(refused.check == "Unavailable", "{refused:?}");
    let path = ("path", "/grpc.health.v1.Health/Check");
    let line = [("reporter", "source"), ("grpc_status", "14"), ("flags", "UH"), path];
    ensure!(pair.agent_a.logged(&line).await?["endpoint"] == "-");
    let labels = [("reporter", "source"), ("grpc_response_status", "14"), ("response_flags", "UH")];
    ensure!(lab::metric(&pair.agent_a.metrics().await?, "istio_requests_total", &labels) >= 1.0);
    pair.finish().await
}
