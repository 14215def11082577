//! The main job, shown: two nodes, Bookinfo on both, an agent on each; what was sent, what was seen, ok or FAILED.
//!
//! Exit code 1 when any row failed. `--keep` leaves everything running, with the routes of the README in force, and
//! prints how to send requests from a pod.

use std::{
    process::{Command, ExitCode},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use lab::{
    Agent, Lab, Pod, Service, apps, binary,
    bookinfo::{self, Bookinfo},
    eventually, metric,
};
use serde_json::Value;

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
    /// TCP: on port 7000 the server says in the end what it saw, on 7001 it echoes and nothing more.
    echo: Service,
    grpc: Service,
    servers: Vec<Pod>,
}

/// The sample's routes for reviews that the README shows.
const JASON: &str = "virtual-service-jason.yaml";

impl World {
    async fn start() -> Result<Self> {
        let lab = Lab::new("demo").await?;
        let (node_a, node_b) = (lab.node("a").await?, lab.node("b").await?);
        let bookinfo = Bookinfo::start(&lab).await?;
        let mut servers = Vec::new();
        let echoes = vec![apps::tcp_echo(7000).arg("--report"), apps::tcp_echo(7001)];
        for (name, apps) in [("echo", echoes), ("grpc", vec![apps::grpc(50051)])] {
            let pod = node_b.pod(name).label("app", name).start().await?;
            for app in apps {
                pod.serve(app).await?;
            }
            servers.push(pod);
        }
        let echo = lab.service("echo").selector("app", "echo");
        let echo = echo.port("tcp", 7000, 7000).port("tcp-plain", 7001, 7001).apply()?;
        let grpc = lab.service("grpc").selector("app", "grpc").port("grpc", 50051, 50051).apply()?;
        let (a, b) = tokio::try_join!(node_a.agent().start(), node_b.agent().start())?;
        for pod in bookinfo.pods.iter().chain(&servers).chain([&bookinfo.client]) {
            pod.enrolled().await?;
        }
        Ok(Self { lab, bookinfo, a, b, echo, grpc, servers })
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

    /// The whole page, through productpage on node a.
    async fn page(&self) -> Result<String> {
        for (user, stars, reviews) in [("jason", "black", "v2"), ("ada", "red", "v3")] {
            let page = self.bookinfo.client.http_get(&self.bookinfo.page(), &[("end-user", user)]).await?;
            let header = |name: &str| page.headers.get(name).map_or("", String::as_str);
            let seen = (page.status, header(bookinfo::STARS_HEADER), header(bookinfo::REVIEWS_HEADER));
            ensure!(seen == (200, stars, reviews), "{user} saw {seen:?}");
        }
        Ok("jason sees black stars (v2), ada red ones (v3)".to_owned())
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
        let versions = seen.tls_versions(15008);
        ensure!(!versions.is_empty(), "no TLS handshake was seen");
        ensure!(versions.iter().all(|version| *version == 0x0304), "another TLS than 1.3: {versions:04x?}");
        Ok(format!("TLS 1.3; {segments} segments, all of port 15008, no plaintext"))
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
        Ok(format!("accept shows {}, getpeername {}", report.peer.ip(), seen.peer))
    }

    /// The program `meshctl`, on both nodes: the same bytes from the client's side and from the server's.
    async fn tcp_flows(&self) -> Result<String> {
        const BYTES: u64 = 123_457;
        let seen = self.bookinfo.client.tcp(self.echo.at(7001), BYTES, &[]).await?;
        ensure!(seen.intact, "{} of {BYTES} bytes came back", seen.received);
        // Nobody else dials this port of that pod.
        let (client, server) = (seen.local.to_string(), self.echo_pod().at(7001).to_string());
        let counted = |flow: &Value| {
            ensure!(flow["tx_bytes"] == BYTES && flow["rx_bytes"] == BYTES, "{flow}");
            ensure!(flow["state"] == "closed" && flow["security"] == "mutual_tls", "{flow}");
            Ok(())
        };
        shown(
            &self.a,
            "the client's side",
            |flow| flow["pod"] == "client" && flow["local"] == *client,
            |flow| {
                ensure!(flow["service"] == self.echo.host() && flow["peer_pod"] == "default/echo", "{flow}");
                counted(flow)
            },
        )
        .await?;
        shown(
            &self.b,
            "the server's side",
            |flow| flow["pod"] == "echo" && flow["local"] == *server,
            |flow| {
                ensure!(flow["peer_pod"] == "default/client", "{flow}");
                counted(flow)
            },
        )
        .await?;
        Ok(format!("{BYTES} B out and in on the client's side, and on the server's"))
    }

    fn echo_pod(&self) -> &Pod {
        &self.servers[0]
    }

    async fn request_flows(&self) -> Result<String> {
        let url = self.bookinfo.reviews.url(9080, "/reviews/0");
        let http = self.bookinfo.client.http_get(&url, &[("end-user", "jason")]).await?;
        ensure!(http.status == 200, "{http:?}");
        self.grpc().await?;
        let (http, mut routes) = (http.local.to_string(), Vec::new());
        for (protocol, service) in [("http", &self.bookinfo.reviews), ("grpc", &self.grpc)] {
            let is = |flow: &Value| {
                let ours = protocol != "http" || flow["local"] == *http;
                ours && flow["pod"] == "client" && flow["protocol"] == protocol
            };
            let flow = shown(&self.a, protocol, is, |flow| {
                ensure!(flow["service"] == service.host() && flow["endpoint"].is_string(), "{flow}");
                ensure!(flow["route"].is_string() && flow["security"] == "mutual_tls", "{flow}");
                Ok(())
            })
            .await?;
            routes.push(format!(
                "{protocol} to {} by {:?}",
                service.name,
                flow["route"].as_str().unwrap_or("")
            ));
        }
        Ok(routes.join(", "))
    }

    async fn grpc(&self) -> Result<String> {
        let called = self.bookinfo.client.grpc(&self.grpc.url(50051, ""), "count/5").await?;
        ensure!(called.check == "SERVING" && called.stream.len() == 5 && called.ended == "Ok", "{called:?}");
        Ok("Check: SERVING, Watch: 5 messages, Ok".to_owned())
    }

    async fn rows(&mut self, table: &mut Table) -> Result<()> {
        self.route("reviews.yaml", JASON).await?;
        table.row("20 requests for reviews as jason", self.all_from("jason", "reviews-v2").await);
        table.row("20 requests for reviews as ada", self.all_from("ada", "reviews-v3").await);
        table.row("the page as jason and as ada", self.page().await);
        table.row("requests and bytes between the nodes, wire tapped", self.wire().await);
        table.row("who the peers of these requests proved to be", self.names().await);
        table.row("1000 requests for reviews, split 90/10", self.split().await);
        table.row("ratings as jason and ada, 2 s delay for jason", self.delay().await);
        table.row("ratings as jason and ada, abort for jason", self.abort().await);
        table.row("100 requests for ratings, one of two replicas broken", self.retries().await);
        table.row("1000003 bytes echoed over TCP, half-closed", self.echo().await);
        table.row("gRPC unary and streaming", self.grpc().await);
        table.row("meshctl flows: TCP, on both nodes", self.tcp_flows().await);
        self.route("reviews.yaml", JASON).await?;
        table.row("meshctl flows: HTTP and gRPC", self.request_flows().await);
        table.row("a request from a shell inside the client's pod", self.shell().await);
        Ok(())
    }
}

async fn run(cli: &Cli) -> Result<bool> {
    println!("two nodes with Bookinfo are starting …");
    let mut world = World::start().await?;
    let mut table = Table::default();
    world.rows(&mut table).await?;
    if cli.keep {
        keep(world)?;
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

/// Waits until `meshctl flows` of this agent shows the flow as `expected` wants it.
async fn shown(
    agent: &Agent,
    what: &str,
    is: impl Fn(&Value) -> bool,
    expected: impl Fn(&Value) -> Result<()>,
) -> Result<Value> {
    eventually("the flow is shown as it was", async || {
        let flows = agent.flows().await?;
        // The oldest comes first; what was just done is the last.
        let flow = flows.as_array().into_iter().flatten().rfind(|flow| is(flow));
        let flow = flow.with_context(|| format!("no such flow: {what}"))?;
        expected(flow)?;
        Ok(flow.clone())
    })
    .await
}

impl World {
    /// A command line that runs `program` inside the client's pod, from any shell of root's.
    fn in_client(&self, program: &str) -> String {
        let client = &self.bookinfo.client;
        format!(
            "sh -c 'echo $$ > {}/cgroup.procs; exec nsenter --net={} {program}'",
            client.cgroup().display(),
            client.netns().path().display()
        )
    }

    /// Twenty requests as a user, and how many of them each pod has answered.
    fn count_reviews(&self, user: &str) -> Result<String> {
        Ok(self.in_client(&format!(
            "{} many --count 20 --by {} --header \"end-user: {user}\" {}",
            binary("lab-app", "MESH_LAB_APP", "lab")?.display(),
            bookinfo::POD_HEADER,
            self.bookinfo.reviews.url(9080, "/reviews/0"),
        )))
    }

    /// Runs what `--keep` prints.
    async fn shell(&self) -> Result<String> {
        for (user, pod) in [("jason", "reviews-v2"), ("ada", "reviews-v3")] {
            let command = self.count_reviews(user)?;
            let run = tokio::task::spawn_blocking(move || Command::new("sh").args(["-c", &command]).output());
            let output = run.await??;
            let tally: apps::Tally = serde_json::from_slice(&output.stdout)
                .with_context(|| String::from_utf8_lossy(&output.stderr).into_owned())?;
            ensure!(tally.pods.get(pod) == Some(&20), "{tally:?}");
        }
        Ok("jason: 20 of 20 by reviews-v2, ada: 20 of 20 by reviews-v3".to_owned())
    }
}

fn keep(world: World) -> Result<()> {
    let app = binary("lab-app", "MESH_LAB_APP", "lab")?;
    println!("\nEverything is left running, with {JASON} in force. From inside the client's pod, as root:\n");
    println!("twenty requests for reviews, counted by the pod that answered; as jason, and as anybody else");
    println!("  {}", world.count_reviews("jason")?);
    println!("  {}\n", world.count_reviews("ada")?);
    println!(
        "one request for the page; the answer is shown as JSON, {} among its headers",
        bookinfo::STARS_HEADER
    );
    let asked = format!("--header \"end-user: jason\" {}", world.bookinfo.page());
    println!("  {}\n", world.in_client(&format!("{} get {asked}", app.display())));
    println!("the same with curl, where it is installed");
    println!("  {}\n", world.in_client(&format!("curl -si {}", asked.replace("--header", "-H"))));
    println!("what the agents of the two nodes saw of it; a flow that has ended is shown for 30 s");
    let meshctl = binary("meshctl", "MESHCTL_BIN", "mesh-agent")?;
    for agent in [&world.a, &world.b] {
        for command in ["flows", "status"] {
            let (run, bpf) = (agent.run_dir(), agent.bpf_dir());
            println!(
                "  {} --run-dir {} --bpf-dir {} {command}",
                meshctl.display(),
                run.display(),
                bpf.display()
            );
        }
    }
    println!(
        "\nThe configuration is in {}: the agents follow its changes.",
        world.lab.config_dir().display()
    );
    println!("`cargo xtask clean` ends it all.");
    world.lab.keep();
    Ok(())
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
