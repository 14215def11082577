//! The main job, shown: two nodes, Bookinfo on both, an agent on each; what was sent, what was seen, ok or FAILED.
//!
//! Exit code 1 when any row failed. `--keep` leaves everything running and prints how to send requests from a pod.

use std::{
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use lab::{
    Agent, Lab, Pod, Service, apps,
    bookinfo::{self, Bookinfo},
    eventually, metric,
};

#[derive(Debug, Parser)]
#[command(about = "Two nodes with Bookinfo, real eBPF, and a table of what was sent and seen")]
struct Cli {
    /// Leave nodes, pods and agents running, and print how to send requests from a pod
    #[arg(long)]
    keep: bool,
}

/// The rows so far.
#[derive(Debug, Default)]
struct Table {
    failed: usize,
}

impl Table {
    /// Prints a row: what was sent, and what was seen or what went wrong.
    fn row(&mut self, sent: &str, seen: Result<String>) {
        let (word, seen) = match seen {
            Ok(seen) => ("ok    ", seen),
            Err(error) => {
                self.failed += 1;
                ("FAILED", format!("{error:#}"))
            }
        };
        println!("{word}  {sent:<56}  {seen}");
    }
}

struct World {
    lab: Lab,
    bookinfo: Bookinfo,
    a: Agent,
    b: Agent,
    echo: Service,
    grpc: Service,
    _servers: Vec<Pod>,
}

impl World {
    async fn start() -> Result<Self> {
        let lab = Lab::new("demo").await?;
        let (node_a, node_b) = (lab.node("a").await?, lab.node("b").await?);
        let bookinfo = Bookinfo::start(&lab).await?;
        let mut servers = Vec::new();
        for (name, app) in [("echo", apps::tcp_echo(7000).arg("--report")), ("grpc", apps::grpc(50051))] {
            let pod = node_b.pod(name).label("app", name).start().await?;
            pod.serve(app).await?;
            servers.push(pod);
        }
        let echo = lab.service("echo").selector("app", "echo").port("tcp", 7000, 7000).apply()?;
        let grpc = lab.service("grpc").selector("app", "grpc").port("grpc", 50051, 50051).apply()?;
        let (a, b) = tokio::try_join!(node_a.agent().start(), node_b.agent().start())?;
        for pod in bookinfo.pods.iter().chain(&servers).chain([&bookinfo.client]) {
            pod.enrolled().await?;
        }
        Ok(Self { lab, bookinfo, a, b, echo, grpc, _servers: servers })
    }

    /// Applies one of the sample's files in the place of those before it and waits until agent `a` has it in force.
    async fn route(&self, place: &str, file: &str) -> Result<()> {
        let seen = (self.a.revision().await?, self.b.revision().await?);
        bookinfo::apply(&self.lab, place, file)?;
        self.a.revision_after(seen.0).await?;
        self.b.revision_after(seen.1).await?;
        Ok(())
    }

    async fn reviews(&self, user: &str, count: u64) -> Result<lab::apps::Tally> {
        let request = self.bookinfo.client.get(self.bookinfo.reviews.url(9080, "/reviews/0"));
        request.header("end-user", user).many(count, 4, Some(bookinfo::POD_HEADER)).await
    }

    async fn all_from(&self, user: &str, pod: &str) -> Result<String> {
        let tally = self.reviews(user, 20).await?;
        ensure!(tally.pods.get(pod) == Some(&20) && tally.statuses.get(&200) == Some(&20), "{tally:?}");
        Ok(format!("20 of 20 answered by {pod}"))
    }

    async fn split(&self) -> Result<String> {
        self.route("reviews.yaml", "virtual-service-90-10.yaml").await?;
        let tally = self.reviews("ada", 1000).await?;
        let small = tally.pods.get("reviews-v3").copied().unwrap_or_default();
        let large = tally.pods.get("reviews-v1").copied().unwrap_or_default();
        ensure!((60..=140).contains(&small) && small + large == 1000, "{tally:?}");
        Ok(format!("{large} by v1, {small} by v3"))
    }

    /// How long ratings take for a user.
    async fn ratings(&self, user: &str) -> Result<(u16, Duration)> {
        let begun = Instant::now();
        let url = self.bookinfo.ratings.url(9080, "/ratings/0");
        let answer = self.bookinfo.client.http_get(&url, &[("end-user", user)]).await?;
        Ok((answer.status, begun.elapsed()))
    }

    async fn delay(&self) -> Result<String> {
        self.route("ratings.yaml", "fault-delay-jason.yaml").await?;
        let (jason, ada) = (self.ratings("jason").await?, self.ratings("ada").await?);
        let two = Duration::from_secs(2);
        ensure!(jason.0 == 200 && jason.1 >= two && ada.0 == 200 && ada.1 < two, "{jason:?} {ada:?}");
        Ok("jason waits 2 s, ada does not".to_owned())
    }

    async fn abort(&self) -> Result<String> {
        self.route("ratings.yaml", "fault-abort.yaml").await?;
        let (jason, ada) = (self.ratings("jason").await?.0, self.ratings("ada").await?.0);
        ensure!((jason, ada) == (500, 200), "jason {jason}, ada {ada}");
        Ok("jason gets 500, ada 200".to_owned())
    }

    async fn retries(&mut self) -> Result<String> {
        let broken = ["--broken=503"];
        self.bookinfo.add(&self.lab, "b", "ratings-broken", "ratings", "v1", &broken).await?;
        self.bookinfo.pod("ratings-broken")?.enrolled().await?;
        self.route("ratings.yaml", "retry.yaml").await?;
        let url = self.bookinfo.ratings.url(9080, "/ratings/0");
        let tally = self.bookinfo.client.get(url).many(100, 4, None).await?;
        ensure!(tally.statuses.get(&200) == Some(&100), "{tally:?}");
        let retried =
            self.a.access_log().iter().any(|line| line.contains("tries=2") && line.contains("/ratings/0"));
        ensure!(retried, "the broken replica was never tried");
        Ok("100 of 100 answered 200".to_owned())
    }

    async fn wire(&self) -> Result<String> {
        let tap = self.lab.tap()?;
        let tally = self.reviews("jason-the-secret", 5).await?;
        ensure!(tally.statuses.get(&200) == Some(&5), "{tally:?}");
        self.bookinfo.client.tcp(self.echo.at(7000), 5000, &["--report"]).await?;
        let seen = tap.stop()?;
        let segments = seen.segments().count();
        ensure!(segments > 0 && seen.segments().all(|s| s.from == 15008 || s.to == 15008), "a stray segment");
        for clear in ["jason-the-secret", "end-user", "HTTP/1.1", "/reviews/0"] {
            ensure!(!seen.contains(clear.as_bytes()), "{clear:?} crossed in the clear");
        }
        ensure!(seen.tls_versions(15008).iter().all(|version| *version == 0x0304), "an older TLS than 1.3");
        Ok(format!("{segments} segments, all of port 15008, no plaintext"))
    }

    async fn names(&self) -> Result<String> {
        let principals = [
            ("connection_security_policy", "mutual_tls"),
            ("source_principal", "spiffe://cluster.local/ns/default/sa/client"),
            ("destination_principal", "spiffe://cluster.local/ns/default/sa/bookinfo-reviews"),
        ];
        for agent in [&self.a, &self.b] {
            let seen = metric(&agent.metrics().await?, "istio_requests_total", &principals);
            ensure!(seen >= 20.0, "{seen} requests between these names");
        }
        Ok(format!("{} -> {}, on both nodes", principals[1].1, principals[2].1))
    }

    async fn echo(&self) -> Result<String> {
        const BYTES: u64 = 1_000_003;
        let seen = self.bookinfo.client.tcp(self.echo.at(7000), BYTES, &["--report"]).await?;
        let report = seen.report.context("the server reported nothing")?;
        ensure!(seen.intact && report.received == BYTES, "{} of {BYTES} bytes", seen.received);
        ensure!(report.peer.ip() == self.bookinfo.client.ip(), "accept showed {}", report.peer);
        ensure!(seen.peer == self.echo.at(7000), "getpeername showed {}", seen.peer);
        self.flow(seen.local.to_string(), BYTES).await?;
        Ok(format!("accept shows {}, getpeername {}, meshctl flows {BYTES} B", report.peer.ip(), seen.peer))
    }

    /// Waits until the flow with this local address has ended with these counts.
    async fn flow(&self, local: String, sent: u64) -> Result<()> {
        eventually("the flow is shown with what was sent", async || {
            let flows = self.a.flows().await?;
            let flow = flows.as_array().into_iter().flatten().find(|flow| flow["local"] == local.as_str());
            let flow = flow.with_context(|| format!("no flow from {local}"))?;
            ensure!(flow["tx_bytes"] == sent && flow["state"] == "closed", "{flow}");
            Ok(())
        })
        .await
    }

    async fn grpc(&self) -> Result<String> {
        let called = self.bookinfo.client.grpc(&self.grpc.url(50051, ""), "count/5").await?;
        ensure!(called.check == "SERVING" && called.stream.len() == 5 && called.ended == "Ok", "{called:?}");
        Ok("Check: SERVING, Watch: 5 messages, Ok".to_owned())
    }

    async fn rows(&mut self, table: &mut Table) -> Result<()> {
        self.route("reviews.yaml", "virtual-service-jason.yaml").await?;
        table.row("20 requests for reviews as jason", self.all_from("jason", "reviews-v2").await);
        table.row("20 requests for reviews as ada", self.all_from("ada", "reviews-v3").await);
        table.row("requests and bytes between the nodes, wire tapped", self.wire().await);
        table.row("who the peers of these requests proved to be", self.names().await);
        table.row("1000 requests for reviews, split 90/10", self.split().await);
        table.row("ratings as jason and ada, 2 s delay for jason", self.delay().await);
        table.row("ratings as jason and ada, abort for jason", self.abort().await);
        table.row("100 requests for ratings, one of two replicas broken", self.retries().await);
        table.row("1000003 bytes echoed over TCP, half-closed", self.echo().await);
        table.row("gRPC unary and streaming", self.grpc().await);
        Ok(())
    }
}

async fn run(cli: &Cli) -> Result<bool> {
    println!("two nodes with Bookinfo are starting …");
    let mut world = World::start().await?;
    let mut table = Table::default();
    world.rows(&mut table).await?;
    if cli.keep {
        keep(world);
        return Ok(table.failed == 0);
    }
    let World { lab, a, b, .. } = world;
    for agent in [a, b] {
        let status = agent.stop().await?;
        ensure!(status.success(), "an agent ended with {status}");
    }
    table.row(
        "agents, nodes and pods ended",
        lab.finish().await.map(|()| "nothing is left behind".to_owned()),
    );
    Ok(table.failed == 0)
}

fn keep(world: World) {
    let netns = world.bookinfo.client.netns().path();
    println!(
        "\nEverything is left running. From inside the client's pod (its cgroup makes it part of the mesh):\n"
    );
    println!(
        "  sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net={} curl -H \"end-user: jason\" {}'\n",
        world.bookinfo.client.cgroup().display(),
        netns.display(),
        world.bookinfo.reviews.url(9080, "/reviews/0"),
    );
    println!(
        "The configuration is in {}; `cargo xtask clean` ends it all.",
        world.lab.config_dir().display()
    );
    world.lab.keep();
}

#[tokio::main]
async fn main() -> ExitCode {
    match run(&Cli::parse()).await {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}
