//! What capturing a connection costs: the mesh's way against `iptables -j REDIRECT`, and against none.

use anyhow::{Result, ensure};
use lab::{Lab, Pod, binary, cgroup, servers::as_nobody};

use crate::{
    figures::{Figure, Measured, median_of, rows},
    meter::Meter,
    rounds::{Plan, alternate},
    world::{CPU, RATE, Site, WORKERS, each, finish, redirect, serve},
};

const VARIANTS: [&str; 3] = ["no capture", "mesh", "iptables REDIRECT"];
const RELAY_CPU: &str = "CPU of the relay, per connection";
/// Where the relay listens.
const RELAY_PORT: &str = "15101";

/// A node without the mesh, with a client of its own behind a relay, and one with it.
struct World {
    bare: Site,
    redirected: Pod,
    mesh: Site,
}

pub async fn run(plan: &Plan) -> Result<Measured> {
    let lab = Lab::new("bench-capture").await?;
    let (bare, mesh) = (Site::new(&lab, "bare", false).await?, Site::new(&lab, "mesh", true).await?);
    let redirected = bare.node.pod("redirected").unenrolled().start().await?;
    put_relay(&redirected).await?;
    let agent = mesh.agent().await?;
    mesh.client.enrolled().await?;
    let world = World { bare, redirected, mesh };
    let meter = Meter::new(lab.cgroup())?;
    let rounds = alternate(plan, &meter, VARIANTS.len(), async |variant| world.measure(plan, variant).await);
    let rounds = rounds.await?;
    finish(lab, [agent]).await?;
    let rows = rows(&VARIANTS, &rounds);
    let added = |variant| anyhow::Ok(median_of(&rows, variant, CPU)? - median_of(&rows, VARIANTS[0], CPU)?);
    let findings = vec![format!(
        "The mesh's capture and hop make {:.2} times the connections per second of REDIRECT's, and add {:.1} µs of CPU to \
         each where REDIRECT adds {:.1} µs.",
        median_of(&rows, VARIANTS[1], RATE)? / median_of(&rows, VARIANTS[2], RATE)?,
        added(VARIANTS[1])?,
        added(VARIANTS[2])?,
    )];
    Ok(Measured {
        title: "Capturing a connection".to_owned(),
        about: about(),
        rows,
        findings,
        goals: Vec::new(),
        discarded: rounds.discarded,
        noisy: rounds.noisy,
    })
}

fn about() -> Vec<String> {
    vec![
        format!(
            "{WORKERS} clients, each in a closed loop: connect, one byte there, one byte back, close. Opaque TCP to another \
             pod of the same node, dialled by its address."
        ),
        "no capture: client and server pod on a node without an agent.".to_owned(),
        "mesh: the client's pod is enrolled, the server's is not, so that there is one hop, as with REDIRECT: the agent \
         takes the connection by its kernel programs, dials the server from inside the client's pod and copies. It also \
         does what it always does: identity, policy, flow records, metrics."
            .to_owned(),
        "iptables REDIRECT: a relay in the client's pod behind `iptables -t nat -A OUTPUT -p tcp -j REDIRECT`, exempt by \
         its user: it accepts, asks for SO_ORIGINAL_DST, dials and copies, and does nothing else (tokio, a thread a core)."
            .to_owned(),
        "CPU of all is everything on the node, the kernel's work included: client, server, and relay or agent.".to_owned(),
    ]
}

impl World {
    async fn measure(&self, plan: &Plan, variant: usize) -> Result<Vec<Figure>> {
        let Self { bare, redirected, mesh } = self;
        let (site, client, relay) = match variant {
            0 => return Ok(bare.connect(plan, &bare.client).await?.1),
            1 => (mesh, &mesh.client, mesh.node.agent_cgroup()),
            _ => (bare, redirected, redirected.cgroup().join("relay")),
        };
        let before = cgroup::cpu_time(&relay)?;
        let (done, mut figures) = site.connect(plan, client).await?;
        let used = cgroup::cpu_time(&relay)?.saturating_sub(before);
        // Whoever has done nothing was passed by.
        ensure!(!used.is_zero(), "{}: the relay has seen nothing of it", VARIANTS[variant]);
        figures.push(Figure::new(RELAY_CPU, "µs", each(used, done.connections)));
        Ok(figures)
    }
}

/// Puts the relay in the pod, and every TCP connection of the pod but its own into its hands.
async fn put_relay(pod: &Pod) -> Result<()> {
    let mut relay = as_nobody(binary("bench-app", "MESH_BENCH_APP", "lab")?);
    relay.args(["relay", "--port", RELAY_PORT]);
    serve(pod, "relay", relay).await?;
    redirect(pod, RELAY_PORT).await
}
