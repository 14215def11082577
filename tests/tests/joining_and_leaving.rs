//! Requests go on while pods join the mesh and leave it: from them and to them, within a node and between two, none is
//! lost, and none to a pod of the mesh goes in the clear.

use std::time::Duration;

use anyhow::{Result, ensure};
use lab::{
    Pair, Pod, Service, apps,
    apps::{Load, LoadKind},
    eventually, metric, require_root,
};

const QUICK: Duration = Duration::from_millis(25);
const ROUNDS: usize = 2;

/// A pod on each node that joins and leaves, and one that stays. All answer HTTP on 8080.
struct World {
    pair: Pair,
    come_and_go: [Pod; 2],
    services: [Service; 2],
    stays: Pod,
    loads: Vec<(String, Load)>,
}

impl World {
    async fn new(name: &str) -> Result<Option<Self>> {
        if !require_root()? {
            return Ok(None);
        }
        let pair = Pair::new(name).await?;
        pair.lab.namespace("turn", false)?;
        let turning = async |node: &lab::Node, name: &str| {
            let pod = node.pod(name).ns("turn").label("app", name).start().await?;
            let service = pair.lab.service(name).ns("turn").selector("app", name);
            anyhow::Ok((pod, service.port("http", 80, 8080).apply()?))
        };
        let (near, near_service) = turning(&pair.a, "near").await?;
        let (far, far_service) = turning(&pair.b, "far").await?;
        let (come_and_go, services) = ([near, far], [near_service, far_service]);
        let stays = pair.a.pod("stays").start().await?;
        for pod in come_and_go.iter().chain([&stays]) {
            pod.serve(apps::http(8080)).await?;
        }
        pair.settled().await?;
        stays.enrolled().await?;
        let mut world = Self { pair, come_and_go, services, stays, loads: Vec::new() };
        world.begin().await?;
        Ok(Some(world))
    }

    /// The one that stays asks those that do not, by service, which reads requests, and by address, which does not; and the
    /// other way round, by address alone: those of services lead nowhere for who is not in the mesh.
    async fn begin(&mut self) -> Result<()> {
        let stays = &self.stays;
        for (turns, service) in self.come_and_go.iter().zip(&self.services) {
            let ways = [
                (stays, turns, service.url(80, "/")),
                (stays, turns, format!("http://{}/", turns.at(8080))),
                (turns, stays, format!("http://{}/", stays.at(8080))),
            ];
            for (from, to, url) in ways {
                for kind in [LoadKind::Requests, LoadKind::KeptAlive] {
                    let name = format!("{kind:?} from {} to {} by {url}", from.name(), to.name());
                    self.loads.push((name, from.load(kind, &url, 1, QUICK).await?));
                }
            }
        }
        Ok(())
    }

    async fn turn(&self, into: bool) -> Result<()> {
        self.pair.lab.namespace("turn", into)?;
        for pod in &self.come_and_go {
            if into { pod.enrolled().await? } else { pod.not_enrolled().await? }
        }
        self.nothing_lost().await
    }

    async fn nothing_lost(&self) -> Result<()> {
        for (name, load) in &self.loads {
            load.goes_on(10).await.map_err(|error| error.context(name.clone()))?;
        }
        Ok(())
    }

    /// Requests to this pod that came from the mesh, as its own node saw them.
    async fn meshed(&self, pod: &Pod) -> Result<f64> {
        let agent = if pod.name() == "near" { &self.pair.agent_a } else { &self.pair.agent_b };
        let labels = [
            ("reporter", "destination"),
            ("destination_workload", pod.name()),
            ("connection_security_policy", "mutual_tls"),
        ];
        let metrics = agent.metrics().await?;
        let names = ["istio_requests_total", "istio_tcp_connections_opened_total"];
        Ok(names.map(|name| metric(&metrics, name, &labels)).iter().sum())
    }

    async fn finish(self) -> Result<()> {
        for (name, load) in self.loads {
            let seen = load.finish().await?;
            ensure!(seen.errors.is_empty(), "{name}: {seen:?}");
        }
        self.pair.finish().await
    }
}

#[tokio::test]
async fn no_request_is_lost_while_pods_join_and_leave() -> Result<()> {
    let Some(mut world) = World::new("turns").await? else { return Ok(()) };
    world.turn(true).await?;
    // What was open before stays as it was: these begin in the mesh.
    world.begin().await?;
    world.turn(false).await?;
    for round in 0..ROUNDS {
        world.turn(true).await?;
        for pod in &world.come_and_go {
            let before = world.meshed(pod).await?;
            eventually("requests come by the mesh", async || {
                let now = world.meshed(pod).await?;
                ensure!(now > before, "round {round}, {}: {now}, {before} before", pod.name());
                Ok(())
            })
            .await?;
        }
        world.turn(false).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_server_that_is_strict_loses_none_either() -> Result<()> {
    let Some(world) = World::new("strict-turns").await? else { return Ok(()) };
    let strict = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\n\
                  metadata: { name: strict, namespace: turn }\nspec: { mtls: { mode: STRICT } }\n";
    world.pair.apply("strict.yaml", strict).await?;
    for _ in 0..2 {
        world.turn(true).await?;
        world.turn(false).await?;
    }
    world.finish().await
}

#[tokio::test]
async fn a_pod_that_is_back_before_it_has_left_was_never_away() -> Result<()> {
    let Some(world) = World::new("back-turns").await? else { return Ok(()) };
    world.turn(true).await?;
    let enrolled = async |want: bool| {
        eventually("the agent has read the label", async || {
            let status = world.pair.agent_a.status().await?["enrolled"].to_string();
            ensure!(status.contains("turn/near") == want, "{status}");
            Ok(())
        })
        .await
    };
    for _ in 0..2 {
        world.pair.lab.namespace("turn", false)?;
        enrolled(false).await?;
        ensure!(world.come_and_go[0].listens(15008), "its agent lets go before others can know");
        world.pair.lab.namespace("turn", true)?;
        enrolled(true).await?;
        world.nothing_lost().await?;
    }
    ensure!(
        !world.pair.agent_a.log().iter().any(|line| line.contains("has left the mesh")),
        "it was let go of in between"
    );
    world.turn(false).await?;
    world.finish().await
}
