//! What a pod's latency suffers from another pod's bulk: through the same agent, and outside the mesh.

use anyhow::{Result, ensure};
use lab::Lab;

use crate::{
    figures::{Figure, Measured},
    goals::{Goal, times},
    load::{RATE, RATE_CONNECTIONS, asks, bulk},
    meter::Meter,
    peers::{Course, Kind, Root, Traffic, agents},
    rounds::{Plan, alternate},
    world::finish,
};

const ALONE: &str = "alone";
const OUTSIDE: &str = "beside bulk outside the mesh";
const INSIDE: &str = "beside bulk in the mesh";
const P50: &str = "p50 at 1,000/s";
const P99: &str = "p99 at 1,000/s";
const BULK: &str = "bulk";
const GIB: f64 = (1_u64 << 30) as f64;

pub async fn run(plan: &Plan) -> Result<Measured> {
    ensure!(Kind::Nginx.is_installed(), "nginx is the server: `cargo xtask bench neighbour` installs it");
    let (lab, root) = (Lab::new("bench-noise").await?, Root::new()?);
    let (a, b) = (lab.node("a").await?, lab.node("b").await?);
    let quiet = Course::meshed(&lab, "quiet", Traffic::Http, &a, &b).await?;
    let loud = Course::meshed(&lab, "loud", Traffic::Bytes, &a, &b).await?;
    let outside = Course::new(Kind::None, Traffic::Bytes, &a, &b, &root).await?;
    let agents = agents(&[&a, &b]).await?;
    for course in [&quiet, &loud, &outside] {
        course.ready().await?;
    }
    let (meter, beside) = (Meter::new(lab.cgroup())?, [None, Some(&outside), Some(&loud)]);
    let rounds = alternate(plan, &meter, beside.len(), async |at| measure(plan, &quiet, beside[at]).await);
    let rounds = rounds.await?;
    finish(lab, agents).await?;
    let title = "A pod beside a loud neighbour";
    let mut measured = Measured::new(title, about(), &[ALONE, OUTSIDE, INSIDE], &rounds);
    let over = times(&measured.rows, P99, INSIDE, OUTSIDE);
    measured.goals =
        vec![Goal::at_most("p99 beside bulk in the mesh, of beside bulk outside of it", over, 1.3)];
    Ok(measured)
}

fn about() -> Vec<String> {
    vec![
        format!(
            "Two nodes with an agent each. A pod asks over HTTP at {RATE} requests per second on {RATE_CONNECTIONS} connections; \
             an answer's time counts from when it was due. Meanwhile another pod of the same node sends bulk to the other \
             node, on one connection, as fast as it goes."
        ),
        "outside the mesh: neither end of the bulk is enrolled.".to_owned(),
        "in the mesh: both are, so that the agents of both nodes carry and encrypt it.".to_owned(),
    ]
}

async fn measure(plan: &Plan, quiet: &Course, loud: Option<&Course>) -> Result<Vec<Figure>> {
    let noise = async {
        match loud {
            // It is loud for longer than the other listens.
            Some(loud) => {
                let sent = bulk(&Plan { seconds: plan.seconds + 1.0, ..*plan }, loud).await?;
                anyhow::Ok(Some(sent.bytes as f64 / GIB / sent.seconds))
            }
            None => Ok(None),
        }
    };
    let (seen, rate) = tokio::try_join!(asks(plan, quiet, RATE_CONNECTIONS, Some(RATE)), noise)?;
    let mut figures =
        vec![Figure::new(P50, "ms", seen.p50_us / 1000.0), Figure::new(P99, "ms", seen.p99_us / 1000.0)];
    figures.extend(rate.map(|rate| Figure::new(BULK, "GiB/s", rate)));
    Ok(figures)
}
