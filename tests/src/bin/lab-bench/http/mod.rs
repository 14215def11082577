//! What a request costs between two nodes: the mesh against none, and against pairs of proxies.

mod envoy;
mod load;
mod nginx;
mod room;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Lab, Node, Pod, binary, cgroup, eventually, metric, servers::as_nobody};

use self::{
    load::{CONNECTIONS, RATE, RATE_CONNECTIONS, flood, paced},
    room::{NAME, Room, Root},
};
use crate::{
    figures::{Figure, Measured, median_of, rows},
    meter::Meter,
    rounds::{Plan, Rounds, alternate},
    world::{each, finish},
};

/// Where the app listens, and where the pairs do.
const APP: u16 = 8080;
const OUTBOUND: u16 = 9000;
const INBOUND: u16 = 9443;
const PORT: u16 = 80;
/// The cgroup of a pod's proxy, and that of its server.
const PROXY: &str = "proxy";
const SERVER: &str = "server";

const FLOOD: &str = "requests";
const CPU: &str = "CPU of both proxies, per request";
const P50: &str = "p50 at 1,000/s";
const P99: &str = "p99 at 1,000/s";
const ADDED_P50: &str = "added to p50 at 1,000/s";
const ADDED_P99: &str = "added to p99 at 1,000/s";

/// What a request goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    None,
    Mesh,
    Bare,
    Nginx,
    Envoy,
}

/// One of those that are compared, ready to be asked.
struct Variant {
    kind: Kind,
    client: Pod,
    url: String,
    /// Whose processor time is that of the proxies.
    proxies: Vec<PathBuf>,
    /// Directories of the processes, gone with this.
    _rooms: Vec<Room>,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::None => "no mesh",
            Self::Mesh => "mesh",
            Self::Bare => "bare hyper pair",
            Self::Nginx => "nginx pair",
            Self::Envoy => "Envoy pair",
        }
    }

    /// For names of pods.
    fn slug(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Mesh => "mesh",
            Self::Bare => "bare",
            Self::Nginx => "nginx",
            Self::Envoy => "envoy",
        }
    }

    /// The first is what the others are compared with.
    fn all() -> Vec<Self> {
        let mut kinds = vec![Self::None, Self::Mesh, Self::Bare, Self::Nginx];
        match envoy::program() {
            Ok(_) => kinds.push(Self::Envoy),
            Err(error) => println!("  Envoy is not compared: {error:#}"),
        }
        kinds
    }

    /// The two proxies, as processes of the client's pod and the server's.
    fn pair(self, at_client: &Room, at_server: &Room, server: &Pod) -> Result<Option<[Command; 2]>> {
        let local = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let (listen, peer, app) = (local(OUTBOUND), server.at(INBOUND), local(APP));
        Ok(match self {
            Self::None | Self::Mesh => None,
            Self::Bare => Some([
                bare("pair-outbound", at_client, listen, peer, &["--name", NAME])?,
                bare("pair-inbound", at_server, peer, app, &[])?,
            ]),
            Self::Nginx => {
                Some([nginx::outbound(at_client, listen, peer)?, nginx::inbound(at_server, peer, app)?])
            }
            Self::Envoy => {
                Some([envoy::outbound(at_client, listen, peer)?, envoy::inbound(at_server, peer, app)?])
            }
        })
    }
}

fn bare(role: &str, room: &Room, listen: SocketAddr, peer: SocketAddr, args: &[&str]) -> Result<Command> {
    let mut command = as_nobody(binary("bench-app", "MESH_BENCH_APP", "lab")?);
    command.args([role, "--listen", &listen.to_string(), "--peer", &peer.to_string()]);
    command.arg("--certs").arg(room.path()).args(args);
    Ok(command)
}

pub async fn run(plan: &Plan) -> Result<Measured> {
    for program in [nginx::PROGRAM, load::WRK] {
        ensure!(Path::new(program).is_file(), "no {program}: `cargo xtask bench http` installs it");
    }
    let lab = Lab::new("bench-http").await?;
    // Agents on the first two alone.
    let nodes = (lab.node("a").await?, lab.node("b").await?);
    let bare = (lab.node("c").await?, lab.node("d").await?);
    let (root, mut variants, mut agents) = (Root::new()?, Vec::new(), Vec::new());
    for kind in Kind::all() {
        variants.push(if kind == Kind::Mesh {
            let (variant, running) = mesh(&lab, &nodes.0, &nodes.1).await?;
            agents = running;
            variant
        } else {
            place(kind, &bare.0, &bare.1, &root).await?
        });
    }
    for variant in &variants {
        variant.ready().await?;
    }
    let meter = Meter::new(lab.cgroup())?;
    let rounds = alternate(plan, &meter, variants.len(), async |at| variants[at].measure(plan).await);
    let mut rounds = rounds.await?;
    by_mutual_tls(&agents).await?;
    finish(lab, agents).await?;
    add_differences(&mut rounds);
    let names: Vec<_> = variants.iter().map(|variant| variant.kind.name()).collect();
    let rows = rows(&names, &rounds);
    let mut findings = Vec::new();
    for name in &names[2..] {
        let times =
            |figure| anyhow::Ok(median_of(&rows, names[1], figure)? / median_of(&rows, name, figure)?);
        findings.push(format!(
            "The mesh against the {name}: {:.2} times the requests per second, {:.2} times the CPU per request.",
            times(FLOOD)?,
            times(CPU)?,
        ));
    }
    let title = "HTTP between two nodes, over mutual TLS".to_owned();
    let Rounds { discarded, noisy, .. } = rounds;
    Ok(Measured { title, about: about(), rows, findings, discarded, noisy })
}

fn about() -> Vec<String> {
    vec![
        format!(
            "A client's pod on one node, nginx with an answer of 1 KiB in a pod of another. Requests: wrk with {CONNECTIONS} \
             kept connections, each asking as soon as it was answered. Latency: fortio at {RATE} requests per second on \
             {RATE_CONNECTIONS} connections; what is added is the difference to no mesh in the same round. CPU is what the \
             two proxies used during wrk's run, the kernel's work for them included. No access logs, worker threads equal to \
             cores, TLS 1.3 with both certificates verified (P-256)."
        ),
        "no mesh: the client asks the server's pod.".to_owned(),
        "mesh: the client asks a Service; a VirtualService routes it; an agent on each node, mesh-h2 between them; \
         TLS_AES_256_GCM_SHA384."
            .to_owned(),
        "bare hyper pair: proxies in both pods that do nothing but proxy, from the agent's own libraries: HTTP/2 between \
         them, same cipher. A floor, not a peer."
            .to_owned(),
        "nginx pair: nginx in both pods, HTTP/1.1 with kept connections between them, same cipher.".to_owned(),
        "Envoy pair: Envoy in both pods, HTTP/2 between them; its TLS library chooses the cipher of TLS 1.3 by itself \
         (TLS_AES_128_GCM_SHA256, the cheaper one, where the processor has AES)."
            .to_owned(),
    ]
}

/// A client and a server, and the proxies between them, if any.
async fn place(kind: Kind, a: &Node, b: &Node, root: &Root) -> Result<Variant> {
    let client = a.pod(&format!("client-{}", kind.slug())).unenrolled().start().await?;
    let server = b.pod(&format!("server-{}", kind.slug())).unenrolled().start().await?;
    let (app, at_client, at_server) = (Room::new()?, Room::new()?, Room::new()?);
    server.spawn_apart(SERVER, nginx::server(&app, APP)?)?;
    root.certify(&at_client)?;
    root.certify(&at_server)?;
    let (mut url, mut proxies) = (format!("http://{}/", server.at(APP)), Vec::new());
    if let Some([outbound, inbound]) = kind.pair(&at_client, &at_server, &server)? {
        server.spawn_apart(PROXY, inbound)?;
        client.spawn_apart(PROXY, outbound)?;
        url = format!("http://127.0.0.1:{OUTBOUND}/");
        proxies = vec![client.cgroup().join(PROXY), server.cgroup().join(PROXY)];
    }
    Ok(Variant { kind, client, url, proxies, _rooms: vec![app, at_client, at_server] })
}

async fn mesh(lab: &Lab, a: &Node, b: &Node) -> Result<(Variant, Vec<Agent>)> {
    let client = a.pod("client").sa("client").start().await?;
    let server = b.pod("server").sa("server").label("app", "server").start().await?;
    let app = Room::new()?;
    server.spawn_apart(SERVER, nginx::server(&app, APP)?)?;
    let service = lab.service("server").selector("app", "server").port("http", PORT, APP).apply()?;
    lab.apply(
        "route.yaml",
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: { name: server, namespace: default }\n\
         spec:\n  hosts: [server]\n  http:\n    - match: [{ headers: { end-user: { exact: nobody } } }]\n      \
         fault: { abort: { httpStatus: 555, percentage: { value: 100 } } }\n      \
         route: [{ destination: { host: server } }]\n    - route: [{ destination: { host: server } }]\n",
    )?;
    let agent = |node: &Node| node.agent().arg("--access-log=off").start();
    let agents = tokio::try_join!(agent(a), agent(b))?;
    client.enrolled().await?;
    server.enrolled().await?;
    let url = service.url(PORT, "/");
    let proxies = vec![a.agent_cgroup(), b.agent_cgroup()];
    let variant = Variant { kind: Kind::Mesh, client, url, proxies, _rooms: vec![app] };
    Ok((variant, vec![agents.0, agents.1]))
}

impl Variant {
    async fn ready(&self) -> Result<()> {
        eventually("an answer through all that was started", async || {
            let answer = self.client.get(&*self.url).send().await?;
            ensure!(
                answer.status == 200 && answer.body_bytes == 1024,
                "{} bytes, {answer:?}",
                answer.body_bytes
            );
            Ok(())
        })
        .await
        .with_context(|| self.kind.name())
    }

    fn cpu(&self) -> Result<Duration> {
        self.proxies.iter().map(|proxy| cgroup::cpu_time(proxy)).sum()
    }

    async fn measure(&self, plan: &Plan) -> Result<Vec<Figure>> {
        let before = self.cpu()?;
        let flood = flood(&self.client, &self.url, plan.seconds).await?;
        let used = self.cpu()?.saturating_sub(before);
        let mut figures = vec![Figure::new(FLOOD, "1/s", flood.per_second)];
        if !self.proxies.is_empty() {
            figures.push(Figure::new(CPU, "µs", each(used, flood.requests)));
        }
        if plan.quick && !load::can_pace() {
            println!("  no latencies: fortio is not installed");
            return Ok(figures);
        }
        let paced = paced(&self.client, &self.url, plan.seconds).await?;
        if paced.reached() || plan.quick {
            figures.push(Figure::new(P50, "ms", paced.p50));
            figures.push(Figure::new(P99, "ms", paced.p99));
        } else {
            println!(
                "  {}: no latencies, it answered {:.0} requests per second",
                self.kind.name(),
                paced.rate
            );
        }
        Ok(figures)
    }
}

/// What each variant adds to the latencies of the first, in the same round.
fn add_differences(rounds: &mut Rounds) {
    let value = |figures: &[Figure], name| figures.iter().find(|figure| figure.name == name).map(|f| f.value);
    for round in &mut rounds.kept {
        let (first, others) = round.split_at_mut(1);
        for figures in others {
            for (of, added) in [(P50, ADDED_P50), (P99, ADDED_P99)] {
                if let (Some(without), Some(with)) = (value(&first[0], of), value(figures, of)) {
                    figures.push(Figure::new(added, "ms", with - without));
                }
            }
        }
    }
}

/// The mesh's requests were what they are said to be.
async fn by_mutual_tls(agents: &[Agent]) -> Result<()> {
    for agent in agents {
        let metrics = agent.metrics().await?;
        let all = metric(&metrics, "istio_requests_total", &[]);
        let secure =
            metric(&metrics, "istio_requests_total", &[("connection_security_policy", "mutual_tls")]);
        ensure!(secure > 0.0 && all - secure < 1.0, "{secure} of {all} requests by mutual TLS");
    }
    Ok(())
}
