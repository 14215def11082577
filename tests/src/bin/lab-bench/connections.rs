//! What a new connection costs between two nodes, and what a full handshake costs the one who answers it.

use anyhow::{Result, ensure};
use lab::{Lab, Node, Pod, bench::Connected};

use crate::{
    figures::{Figure, Measured},
    goals::{Goal, times},
    load::{CONNECTIONS, Connections, WRK, flood},
    meter::Meter,
    peers::{Course, INBOUND, Kind, Room, Root, Traffic, agents, by_mutual_tls},
    rounds::{Plan, alternate},
    world::{ask, each, finish},
};

const RATE: &str = "new connections";
const CPU: &str = "CPU of both proxies, per connection";
const HANDSHAKE: &str = "CPU of the one who answers, per full handshake";
const KINDS: [Kind; 5] = [Kind::None, Kind::Mesh, Kind::Nginx, Kind::Haproxy, Kind::Envoy];
/// Where the mesh answers, and as whom it is asked.
const MESH: u16 = 15008;
const CLIENT: &str = "spiffe://cluster.local/ns/default/sa/client";
/// Handshakes at a time.
const WORKERS: &str = "4";

/// Who makes handshakes with the one at the server.
struct Greeter {
    pod: Pod,
    certificates: Room,
}

pub async fn run(plan: &Plan) -> Result<Measured> {
    ensure!(std::path::Path::new(WRK).is_file(), "no {WRK}: `cargo xtask bench connections` installs it");
    let lab = Lab::new("bench-conns").await?;
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let (c, d) = (lab.node("c").await?, lab.node("d").await?);
    let (root, mut courses) = (Root::new()?, Vec::new());
    for kind in KINDS.into_iter().filter(|kind| kind.is_installed()) {
        courses.push(match kind {
            Kind::Mesh => Course::meshed(&lab, "server", Traffic::Http, &a, &b).await?,
            Kind::None => Course::new(kind, Traffic::Http, &c, &d, &root).await?,
            _ => Course::new(kind, Traffic::Http, &c, &d, &root).await?.captured().await?,
        });
    }
    let agents = agents(&[&a, &b]).await?;
    for course in &courses {
        course.ready().await?;
    }
    let of_mesh = greeter(&c, "greeter-mesh").await?;
    Root::certify_of_mesh(agents[1].state_dir(), CLIENT, &of_mesh.certificates)?;
    let of_nginx = greeter(&c, "greeter-nginx").await?;
    root.certify(&of_nginx.certificates)?;
    let meter = Meter::new(lab.cgroup())?;
    let rounds = alternate(plan, &meter, courses.len(), async |at| {
        let course = &courses[at];
        let mut figures = measure(plan, course).await?;
        match course.kind {
            Kind::Mesh => figures.push(of_mesh.measure(plan, course, MESH, "mesh-h2").await?),
            Kind::Nginx => figures.push(of_nginx.measure(plan, course, INBOUND, "http/1.1").await?),
            _ => {}
        }
        Ok(figures)
    });
    let rounds = rounds.await?;
    by_mutual_tls(&agents).await?;
    finish(lab, agents).await?;
    let names: Vec<_> = courses.iter().map(|course| course.kind.name()).collect();
    let mut measured = Measured::new("New connections between two nodes", about(), &names, &rounds);
    let over = |figure, kind: Kind| times(&measured.rows, figure, Kind::Mesh.name(), kind.name());
    measured.goals = vec![
        Goal::at_least(
            "new connections per second, of the nginx pair's behind capture",
            over(RATE, Kind::Nginx),
            0.9,
        )
        .aim(1.2),
        Goal::at_most("CPU per full handshake, of nginx's", over(HANDSHAKE, Kind::Nginx), 0.5),
    ];
    Ok(measured)
}

fn about() -> Vec<String> {
    vec![
        format!(
            "As for HTTP, but that each of wrk's {CONNECTIONS} clients makes a new connection for each request. Connections \
             between the proxies are kept. The client of every pair dials an address where nobody listens, and \
             `iptables -j REDIRECT` gives it to its proxy, as the mesh's programs give it to the agent."
        ),
        format!(
            "Full handshakes: {WORKERS} clients outside of what is measured make one after the other, with a certificate and no \
             session kept, against the agent of the server's node and against nginx at the server; counted is the processor \
             time of these alone. The client offers X25519MLKEM768 first; the mesh takes it, nginx (with Debian's OpenSSL) \
             takes X25519."
        ),
    ]
}

async fn measure(plan: &Plan, course: &Course) -> Result<Vec<Figure>> {
    let before = course.cpu()?;
    let flood = flood(&course.client, &course.url(), Connections::New, plan.seconds).await?;
    let used = course.cpu()?.saturating_sub(before);
    let mut figures = vec![Figure::new(RATE, "1/s", flood.per_second)];
    if course.has_proxies() {
        figures.push(Figure::new(CPU, "µs", each(used, flood.requests)));
    }
    Ok(figures)
}

async fn greeter(node: &Node, name: &str) -> Result<Greeter> {
    Ok(Greeter { pod: node.pod(name).unenrolled().start().await?, certificates: Room::new()? })
}

impl Greeter {
    async fn measure(&self, plan: &Plan, course: &Course, port: u16, alpn: &str) -> Result<Figure> {
        let (at, seconds) = (course.server.at(port).to_string(), plan.seconds.to_string());
        let certificates = self.certificates.path().to_string_lossy().into_owned();
        let before = course.cpu()?;
        let args = ["--alpn", alpn, "--workers", WORKERS, "--seconds", &seconds, "--certs", &certificates];
        let done: Connected = ask(plan, &self.pod, &[&["handshake", &*at][..], &args].concat()).await?;
        ensure!(done.connections > 0, "no handshake was made");
        let used = course.cpu()?.saturating_sub(before);
        Ok(Figure::new(HANDSHAKE, "µs", each(used, done.connections)))
    }
}
