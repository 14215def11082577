//! What is compared, ready to be asked: a client, a server, and what lies between the two.
//!
//! Promises: every pair of proxies has the same work, configured in its own file: TLS 1.3 between the two with both
//! certificates verified, no access log, as many threads as there are cores.

mod envoy;
mod haproxy;
pub mod nginx;
mod room;

use std::{
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lab::{Agent, Lab, Node, Pod, Process, apps, binary, cgroup, eventually, metric, servers::as_nobody};

pub use self::room::{NAME, Room, Root};
use crate::world::{bench_app, other_core, redirect, serve};

/// Where the app listens, where the pairs do, and a Service.
pub const APP: u16 = 8080;
const OUTBOUND: u16 = 9000;
pub const INBOUND: u16 = 9443;
const PORT: u16 = 80;
/// A port at which nobody listens: what is dialled there is captured.
const CAPTURED: u16 = 8081;
/// The cgroup of a pod's proxy, and that of its server.
const PROXY: &str = "proxy";
const SERVER: &str = "server";

/// What lies between client and server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    None,
    Mesh,
    Bare,
    Nginx,
    /// One nginx at the client, in the clear.
    NginxHop,
    Haproxy,
    Envoy,
}

/// What is carried.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Traffic {
    /// HTTP/1.1 at both ends; nginx answers.
    Http,
    /// gRPC, so HTTP/2 at both ends; the lab's own server answers.
    Grpc,
    /// Opaque TCP; `bench-app answer`.
    Bytes,
}

/// One of those that are compared.
#[derive(Debug)]
pub struct Course {
    pub kind: Kind,
    traffic: Traffic,
    pub client: Pod,
    pub server: Pod,
    /// Whom the client asks.
    pub at: SocketAddr,
    /// Whose processor time is that of the proxies.
    proxies: Vec<PathBuf>,
    /// The proxy on the client's side, where it is a process of its own.
    pub outbound: Option<Process>,
    /// Directories of the processes, gone with this.
    rooms: Vec<Room>,
}

impl Kind {
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "no mesh",
            Self::Mesh => "mesh",
            Self::Bare => "bare hyper pair",
            Self::Nginx => "nginx pair",
            Self::NginxHop => "nginx, one hop, no TLS",
            Self::Haproxy => "haproxy pair",
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
            Self::NginxHop => "hop",
            Self::Haproxy => "haproxy",
            Self::Envoy => "envoy",
        }
    }

    /// Whether its program is here; a line says so where it is not.
    pub fn is_installed(self) -> bool {
        let missing = match self {
            Self::None | Self::Mesh | Self::Bare => None,
            Self::Nginx | Self::NginxHop => missing(nginx::PROGRAM),
            Self::Haproxy => missing(haproxy::PROGRAM),
            Self::Envoy => envoy::program().err().map(|error| format!("{error:#}")),
        };
        if let Some(why) = &missing {
            println!("  {} is not compared: {why}", self.name());
        }
        missing.is_none()
    }

    /// The proxies, as processes of the client's pod and the server's.
    fn proxies(self, traffic: Traffic, rooms: [&Room; 2], server: &Pod) -> Result<[Option<Command>; 2]> {
        let local = |port| SocketAddr::new(Ipv4Addr::LOCALHOST.into(), port);
        let (listen, peer, app) = (local(OUTBOUND), server.at(INBOUND), local(APP));
        let [at_client, at_server] = rooms;
        let both = |outbound, inbound| [Some(outbound), Some(inbound)];
        Ok(match self {
            Self::None | Self::Mesh => [None, None],
            Self::Bare => both(
                bare("pair-outbound", at_client, listen, peer, &["--name", NAME])?,
                bare("pair-inbound", at_server, peer, app, &[])?,
            ),
            Self::Nginx => {
                both(nginx::outbound(at_client, listen, peer)?, nginx::inbound(at_server, peer, app)?)
            }
            Self::NginxHop => [Some(nginx::hop(at_client, listen, server.at(APP))?), None],
            Self::Haproxy => both(
                haproxy::outbound(at_client, traffic, listen, peer)?,
                haproxy::inbound(at_server, traffic, peer, app)?,
            ),
            Self::Envoy => both(
                envoy::outbound(at_client, traffic, listen, peer)?,
                envoy::inbound(at_server, traffic, peer, app)?,
            ),
        })
    }
}

fn missing(program: &str) -> Option<String> {
    (!Path::new(program).is_file()).then(|| format!("no {program}: `cargo xtask bench` installs it"))
}

fn bare(role: &str, room: &Room, listen: SocketAddr, peer: SocketAddr, args: &[&str]) -> Result<Command> {
    let mut command = as_nobody(binary("bench-app", "MESH_BENCH_APP", "lab")?);
    command.args([role, "--listen", &listen.to_string(), "--peer", &peer.to_string()]);
    command.arg("--certs").arg(room.path()).args(args);
    Ok(command)
}

impl Traffic {
    /// How a Service declares its port.
    fn declared(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Grpc => "grpc",
            Self::Bytes => "tcp",
        }
    }

    async fn serve(self, pod: &Pod, room: &Room) -> Result<()> {
        match self {
            Self::Http => drop(pod.spawn_apart(SERVER, nginx::server(room, APP)?)?),
            Self::Grpc => drop(pod.serve(apps::grpc(APP)).await?),
            Self::Bytes => {
                let (port, next, core) = (APP.to_string(), (APP + 1).to_string(), other_core()?.to_string());
                serve(pod, SERVER, bench_app(&["answer", "--port", &port])?).await?;
                serve(pod, SERVER, bench_app(&["answer", "--port", &next, "--core", &core])?).await?;
            }
        }
        Ok(())
    }
}

impl Course {
    /// Between two nodes, or two pods of one, that have no agent.
    pub async fn new(kind: Kind, traffic: Traffic, a: &Node, b: &Node, root: &Root) -> Result<Self> {
        let name = format!("{}-{}", kind.slug(), traffic.declared());
        Self::named(&name, kind, traffic, a, b, root).await
    }

    /// The same, with a name of its own for its pods.
    pub async fn named(
        pods: &str,
        kind: Kind,
        traffic: Traffic,
        a: &Node,
        b: &Node,
        root: &Root,
    ) -> Result<Self> {
        let client = a.pod(&format!("client-{pods}")).unenrolled().start().await?;
        let server = b.pod(&format!("server-{pods}")).unenrolled().start().await?;
        let (app, at_client, at_server) = (Room::new()?, Room::new()?, Room::new()?);
        traffic.serve(&server, &app).await?;
        root.certify(&at_client)?;
        root.certify(&at_server)?;
        let (mut at, mut proxies) = (server.at(APP), Vec::new());
        let [outbound, inbound] = kind.proxies(traffic, [&at_client, &at_server], &server)?;
        if let Some(inbound) = inbound {
            server.spawn_apart(PROXY, inbound)?;
            proxies.push(server.cgroup().join(PROXY));
        }
        let outbound = outbound.map(|command| client.spawn_apart(PROXY, command)).transpose()?;
        if outbound.is_some() {
            at = SocketAddr::new(Ipv4Addr::LOCALHOST.into(), OUTBOUND);
            proxies.push(client.cgroup().join(PROXY));
        }
        Ok(Self {
            kind,
            traffic,
            client,
            server,
            at,
            proxies,
            outbound,
            rooms: vec![app, at_client, at_server],
        })
    }

    /// Between enrolled pods, through a Service of this name. Agents are the caller's to start.
    pub async fn meshed(lab: &Lab, name: &str, traffic: Traffic, a: &Node, b: &Node) -> Result<Self> {
        Self::meshed_with(lab, name, traffic, a, b, &[]).await
    }

    /// The same with annotations for the server's pod.
    pub async fn meshed_with(
        lab: &Lab,
        name: &str,
        traffic: Traffic,
        a: &Node,
        b: &Node,
        annotations: &[(&str, &str)],
    ) -> Result<Self> {
        let client = a.pod(&format!("client-{name}")).sa("client").start().await?;
        let server = b.pod(&format!("server-{name}")).sa("server").label("app", name);
        let annotated = |pod: lab::PodBuilder, (key, value): &(&str, &str)| pod.annotation(key, value);
        let server = annotations.iter().fold(server, annotated).start().await?;
        let app = Room::new()?;
        traffic.serve(&server, &app).await?;
        let service = lab.service(name).selector("app", name).port(traffic.declared(), PORT, APP);
        let service = match traffic {
            Traffic::Bytes => service.port("tcp-pinned", PORT + 1, APP + 1).apply()?,
            Traffic::Http | Traffic::Grpc => service.apply()?,
        };
        if traffic != Traffic::Bytes {
            lab.apply(&format!("route-{name}.yaml"), &route(name))?;
        }
        let mut proxies = vec![a.agent_cgroup()];
        if a.name() != b.name() {
            proxies.push(b.agent_cgroup());
        }
        let at = service.at(PORT);
        Ok(Self { kind: Kind::Mesh, traffic, client, server, at, proxies, outbound: None, rooms: vec![app] })
    }

    /// Has the client's proxy take what the client sends to an address where nobody listens, by
    /// `iptables -j REDIRECT`, in place of being dialled itself.
    pub async fn captured(mut self) -> Result<Self> {
        redirect(&self.client, &OUTBOUND.to_string()).await?;
        self.at = self.server.at(CAPTURED);
        Ok(self)
    }

    /// Somebody in this cgroup of the client's pod carries what it sends.
    pub fn carried_by(&mut self, cgroup: &str) {
        self.proxies.push(self.client.cgroup().join(cgroup));
    }

    /// Waits until the mesh has both pods, where it is the mesh.
    pub async fn enrolled(&self) -> Result<()> {
        if self.kind == Kind::Mesh {
            self.client.enrolled().await?;
            self.server.enrolled().await?;
        }
        Ok(())
    }

    /// Where single bytes are sent back by a server that stays on one core: where the scheduler puts two that wait for each
    /// other decides how long they wait. Only where bytes are carried, and no pair carries them.
    pub fn pinned(&self) -> SocketAddr {
        SocketAddr::new(self.at.ip(), self.at.port() + 1)
    }

    pub fn url(&self) -> String {
        format!("http://{}/", self.at)
    }

    /// Waits until what it carries goes through all that was started.
    pub async fn works(&self) -> Result<()> {
        let tried = async || match self.traffic {
            Traffic::Http => {
                let answer = self.client.get(self.url()).send().await?;
                let bytes = answer.body_bytes;
                ensure!(answer.status == 200 && bytes == nginx::BODY, "{bytes} bytes, {answer:?}");
                Ok(())
            }
            Traffic::Grpc => {
                let health = self.client.grpc(&self.url(), "count/1").await?;
                ensure!(health.check == "SERVING", "{health:?}");
                Ok(())
            }
            Traffic::Bytes => {
                let args = ["exchange", &self.at.to_string(), "--seconds", "0.01"];
                let output = self.client.run(bench_app(&args)?).await?;
                ensure!(output.status.success(), "{}", output.stderr);
                Ok(())
            }
        };
        eventually("an answer through all that was started", tried).await.with_context(|| self.kind.name())
    }

    /// Waits for the mesh to have both pods, where it is the mesh, and for the first answer.
    pub async fn ready(&self) -> Result<()> {
        self.enrolled().await?;
        self.works().await
    }

    /// What the proxies have used so far, the kernel's work for them included.
    pub fn cpu(&self) -> Result<Duration> {
        self.proxies.iter().map(|proxy| cgroup::cpu_time(proxy)).sum()
    }

    /// What everybody has used: client, server, and what is between.
    pub fn cpu_of_all(&self) -> Result<Duration> {
        let [client, server] = [&self.client, &self.server].map(|pod| cgroup::cpu_time(pod.cgroup()));
        let agents = if self.kind == Kind::Mesh { self.cpu()? } else { Duration::ZERO };
        Ok(client? + server? + agents)
    }

    /// A directory of one of its processes, which nobody of them reads.
    pub fn room(&self) -> &Room {
        &self.rooms[0]
    }

    pub fn has_proxies(&self) -> bool {
        !self.proxies.is_empty()
    }
}

/// A rule that never holds, and a route.
fn route(name: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: VirtualService\nmetadata: {{ name: {name}, namespace: default }}\n\
         spec:\n  hosts: [{name}]\n  http:\n    - match: [{{ headers: {{ end-user: {{ exact: nobody }} }} }}]\n      \
         fault: {{ abort: {{ httpStatus: 555, percentage: {{ value: 100 }} }} }}\n      \
         route: [{{ destination: {{ host: {name} }} }}]\n    - route: [{{ destination: {{ host: {name} }} }}]\n"
    )
}

/// Agents as everything is measured with: all is at its default, but for the log of single requests, which the alternatives
/// do not write either.
pub async fn agents(nodes: &[&Node]) -> Result<Vec<Agent>> {
    let mut agents = Vec::new();
    for node in nodes {
        agents.push(node.agent().arg("--access-log=off").start().await?);
    }
    Ok(agents)
}

/// Those of these kinds that are installed, ready: the mesh between two nodes, whose agents come along, and each of the others
/// between two nodes without.
pub async fn between_nodes(lab: &Lab, kinds: &[Kind], traffic: Traffic) -> Result<(Vec<Course>, Vec<Agent>)> {
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let (c, d) = (lab.node("c").await?, lab.node("d").await?);
    let (root, mut courses) = (Root::new()?, Vec::new());
    for kind in kinds.iter().copied().filter(|kind| kind.is_installed()) {
        courses.push(match kind {
            Kind::Mesh => Course::meshed(lab, "server", traffic, &a, &b).await?,
            _ => Course::new(kind, traffic, &c, &d, &root).await?,
        });
    }
    let agents = agents(&[&a, &b]).await?;
    for course in &courses {
        course.ready().await?;
    }
    Ok((courses, agents))
}

/// The mesh's requests were what they are said to be.
pub async fn by_mutual_tls(agents: &[Agent]) -> Result<()> {
    for agent in agents {
        let metrics = agent.metrics().await?;
        let all = metric(&metrics, "istio_requests_total", &[]);
        let secure =
            metric(&metrics, "istio_requests_total", &[("connection_security_policy", "mutual_tls")]);
        ensure!(secure > 0.0 && all - secure < 1.0, "{secure} of {all} requests by mutual TLS");
    }
    Ok(())
}
