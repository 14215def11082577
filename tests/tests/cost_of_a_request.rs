//! What a request costs the two agents it passes, in allocations and system calls: counted, not timed, and never more than
//! is written here.
//!
//! One client asks on one kept connection, each time as soon as it was answered, so that nothing is shared between requests:
//! the most that a request can cost. Everything is at its default but the access log, which is off. What is counted are
//! batches that differ in nothing but their number of requests, so that connections and handshakes cancel out; of several
//! the cheapest counts, for what an agent does besides (timers, the ring buffer) is on top of it.

use anyhow::{Context as _, Result, ensure};
use lab::{
    Counted, Lab, Pod, apps, bench::Asked, binary, eventually, require_root, system_calls::SystemCalls,
};
use tempfile::TempDir;

/// Requests of a batch, and of one that has nothing but what comes with each.
const MANY: u64 = 300;
const FEW: u64 = 50;
/// How often both are measured.
const BATCHES: usize = 3;

/// What a request may cost.
#[derive(Debug, Clone, Copy)]
struct Most {
    allocations: f64,
    system_calls: f64,
}

/// HTTP/1.1 between two nodes: a few per cent above what was counted last. Whoever makes a request cheaper takes these
/// down, and whoever cannot avoid to make one dearer says why.
const AT_SOURCE: Most = Most { allocations: 26.6, system_calls: 6.6 };
const AT_DESTINATION: Most = Most { allocations: 31.7, system_calls: 6.6 };

/// What has been done so far, or in a batch.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Cost {
    allocations: f64,
    system_calls: f64,
}

/// Of what happens meanwhile. The asking itself is outside of what is counted.
async fn during(counted: &Counted, work: impl Future<Output = Result<()>>) -> Result<Cost> {
    let before = counted.allocated()?.times;
    let mut calls = SystemCalls::of(counted.agent.process().pid())?;
    work.await?;
    let system_calls = calls.count()? as f64;
    Ok(Cost { allocations: (counted.allocated()?.times - before) as f64, system_calls })
}

async fn ask(client: &Pod, server: &str, requests: u64) -> Result<()> {
    let mut command = std::process::Command::new(binary("bench-app", "MESH_BENCH_APP", "lab")?);
    command.args(["ask", server, "--requests", &requests.to_string()]);
    let output = client.run(command).await?;
    ensure!(output.status.success(), "{}", output.stderr);
    let asked: Asked = serde_json::from_str(&output.stdout)?;
    ensure!(asked.count == requests, "{asked:?}");
    Ok(())
}

/// What a request costs this agent, at its cheapest.
async fn each(counted: &Counted, client: &Pod, server: &str) -> Result<Cost> {
    let mut least: Option<Cost> = None;
    for _ in 0..BATCHES {
        let few = during(counted, ask(client, server, FEW)).await?;
        let many = during(counted, ask(client, server, MANY)).await?;
        let share = |many: f64, few: f64| (many - few) / (MANY - FEW) as f64;
        let one = Cost {
            allocations: share(many.allocations, few.allocations),
            system_calls: share(many.system_calls, few.system_calls),
        };
        least = Some(least.map_or(one, |least| Cost {
            allocations: least.allocations.min(one.allocations),
            system_calls: least.system_calls.min(one.system_calls),
        }));
    }
    least.context("no batch")
}

fn check(whose: &str, cost: Cost, most: Most) -> Result<()> {
    println!(
        "{whose}: {:.2} allocations and {:.2} system calls a request",
        cost.allocations, cost.system_calls
    );
    // Whoever counted nothing would find everything cheap.
    ensure!(cost.allocations >= 1.0 && cost.system_calls >= 2.0, "{whose}: not counted: {cost:?}");
    ensure!(
        cost.allocations <= most.allocations && cost.system_calls <= most.system_calls,
        "{whose}: a request costs {cost:?}, more than {most:?}"
    );
    Ok(())
}

#[tokio::test]
async fn a_request_costs_no_more_allocations_and_system_calls_than_is_stated() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let (lab, dir) = (Lab::new("cost").await?, TempDir::new()?);
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let server = b.pod("server").sa("server").label("app", "server").start().await?;
    let client = a.pod("client").sa("client").start().await?;
    server.serve(apps::http(8080)).await?;
    let service = lab.service("server").selector("app", "server").port("http", 80, 8080).apply()?;
    lab.apply(
        "route.yaml",
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: server, namespace: default }\n\
         spec:\n  hosts: [server]\n  http:\n    - match: [{ headers: { end-user: { exact: nobody } } }]\n      \
         fault: { abort: { httpStatus: 555, percentage: { value: 100 } } }\n      \
         route: [{ destination: { host: server } }]\n    - route: [{ destination: { host: server } }]\n",
    )?;
    let (source, destination) = tokio::try_join!(Counted::start(&a, &dir), Counted::start(&b, &dir))?;
    client.enrolled().await?;
    server.enrolled().await?;
    let url = service.url(80, "/");
    eventually("an answer through both agents", async || {
        let status = client.get(&*url).send().await?.status;
        ensure!(status == 200, "answered {status}");
        Ok(())
    })
    .await?;
    let at = service.at(80).to_string();
    let costs = [each(&source, &client, &at).await?, each(&destination, &client, &at).await?];
    for counted in [source, destination] {
        let status = counted.agent.stop().await?;
        ensure!(status.success(), "an agent ended with {status}");
    }
    lab.finish().await?;
    check("source", costs[0], AT_SOURCE)?;
    check("destination", costs[1], AT_DESTINATION)
}
