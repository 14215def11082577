//! A change of policy cuts what is open and would be refused: bytes, calls and upgrades, across nodes and within one, and
//! in plaintext; and nothing else.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use lab::{
    Pod, Service,
    apps::{self, CallKind, Load, LoadKind, RawEnd},
    eventually, metric, require_root,
};

use super::{DENIED, Side, World};

/// What is open, by whom to whom.
struct Opened {
    what: String,
    load: Load,
}

impl Opened {
    async fn goes_on(&self) -> Result<()> {
        self.load.goes_on(2).await.with_context(|| format!("{} was cut", self.what))
    }

    /// Waits for its client to see the end of it.
    async fn ends(self) -> Result<()> {
        eventually("what is open to be cut", async || {
            ensure!(!self.load.seen()?.errors.is_empty(), "{} goes on", self.what);
            Ok(())
        })
        .await?;
        self.load.finish().await.map(|_| ())
    }
}

impl World {
    /// Bytes, a call and a WebSocket of this pod to both sides.
    async fn open(&self, from: &Pod, grpc: &[Service; 2]) -> Result<Vec<Opened>> {
        let mut all = Vec::new();
        for (side, grpc) in self.sides().into_iter().zip(grpc) {
            for (kind, url) in [
                (LoadKind::Tcp, side.tcp.url(70, "/")),
                (LoadKind::Grpc, grpc.url(90, "/")),
                (LoadKind::WebSocket, side.http.url(80, "/ws")),
            ] {
                let load = from.load(kind, &url, 1, Duration::from_millis(20)).await?;
                all.push(Opened {
                    what: format!("{kind:?} of {} to {}", from.name(), side.pod.name()),
                    load,
                });
            }
        }
        Ok(all)
    }

    /// Bytes of the pod that is not in the mesh.
    async fn open_plaintext(&self) -> Result<Vec<Opened>> {
        let mut all = Vec::new();
        for side in self.sides() {
            let url = format!("http://{}/", side.pod.at(7000));
            let load = self.stranger.load(LoadKind::Tcp, &url, 1, Duration::from_millis(20)).await?;
            all.push(Opened { what: format!("plaintext to {}", side.pod.name()), load });
        }
        Ok(all)
    }
}

#[tokio::test]
async fn a_change_cuts_what_is_open_and_would_be_refused() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let world = World::new("authz-cut").await?;
    let grpc = async |side: &Side| {
        side.pod.serve(apps::grpc(9000)).await?;
        let service = world.pair.lab.service(&format!("{}-grpc", side.pod.name()));
        service.selector("side", side.pod.name()).port("grpc", 90, 9000).apply()
    };
    let grpc = [grpc(&world.far).await?, grpc(&world.near).await?];
    // Policies from the beginning, so that nothing is direct, and requests are read where they decide.
    world
        .apply(
            "gets",
            "  action: DENY\n  rules: [{ to: [{ operation: { paths: [/no], ports: ['8080'] } }] }]",
        )
        .await?;
    let (cut, kept) = (world.open(&world.pair.client, &grpc).await?, world.open(&world.other, &grpc).await?);
    let plaintext = world.open_plaintext().await?;
    // Nothing moves on these.
    let silent = async |to| {
        let raw = world.pair.client.raw(to).send("hello").expect("hello");
        raw.limit(Duration::from_secs(50)).run().await
    };
    // Nor on these, until their app wakes.
    let call = async |service: &Service| {
        let call = world.pair.client.call(&service.url(90, "/"), CallKind::ServerStream);
        call.text("sleep/60000").send().await
    };
    let (far, near) = (silent(world.far.tcp.at(70)), silent(world.near.tcp.at(70)));
    let changed = async {
        for open in cut.iter().chain(&kept).chain(&plaintext) {
            open.goes_on().await?;
        }
        world
            .apply(
                "cut",
                "  action: DENY\n  rules: [{ from: [{ source: { principals: ['*/sa/client'] } }] }]",
            )
            .await
    };
    let (far, near, first, second, changed) =
        tokio::join!(far, near, call(&grpc[0]), call(&grpc[1]), changed);
    changed?;
    for called in [first?, second?] {
        ensure!(called.code == "PermissionDenied" && called.message == DENIED, "{called:?}");
    }
    for silent in [far?, near?] {
        ensure!(silent.text() == "hello" && silent.end != RawEnd::Open, "{silent:?}");
    }
    for open in cut {
        open.ends().await?;
    }
    for open in kept.iter().chain(&plaintext) {
        open.goes_on().await?;
    }
    for (agent, pod) in [(&world.pair.agent_b, "far"), (&world.pair.agent_a, "near")] {
        let metrics = agent.metrics().await?;
        let closed = [("destination_workload", pod), ("reporter", "destination"), ("response_flags", "DENY")];
        ensure!(metric(&metrics, "istio_tcp_connections_closed_total", &closed) >= 2.0, "{pod}\n{metrics}");
        ensure!(metric(&metrics, "mesh_refused_total", &[("kind", "denied")]) >= 2.0, "{pod}\n{metrics}");
        ensure!(metric(&metrics, "istio_tcp_connections_failed_total", &[]) == 0.0, "{pod}\n{metrics}");
        let named = |line: &&String| line.contains("event=connection") && line.contains("policy[cut]");
        ensure!(agent.access_log().iter().any(|line| named(&line) && line.contains("flags=DENY")), "{pod}");
    }

    // Requests by what they ask for, and who has no identity.
    let spec = "  action: DENY\n  rules:\n  - to: [{ operation: { paths: [/ws, '/lab.Notes/*'], ports: ['8080', '9000'] } }]\n  \
                - from: [{ source: { notPrincipals: ['*'] } }]";
    world.apply("cut", spec).await?;
    for open in plaintext {
        open.ends().await?;
    }
    for open in kept {
        if open.what.starts_with("Tcp") {
            open.goes_on().await?;
        } else {
            open.ends().await?;
        }
    }
    world.pair.finish().await
}

/// An agent whose place another has taken keeps what is open, and cuts it like any other.
#[tokio::test]
async fn an_agent_that_leaves_cuts_too() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let mut world = World::new("authz-leaving").await?;
    world.apply("none", "  action: DENY\n  rules: [{ to: [{ operation: { ports: ['1'] } }] }]").await?;
    let url = world.far.tcp.url(70, "/");
    let load = world.pair.client.load(LoadKind::Tcp, &url, 1, Duration::from_millis(20)).await?;
    let open = Opened { what: "bytes at the agent that leaves".to_owned(), load };
    let old = world.pair.agent_b.upgrade().await?;
    open.goes_on().await?;
    world
        .apply("cut", "  action: DENY\n  rules: [{ from: [{ source: { principals: ['*/sa/client'] } }] }]")
        .await?;
    open.ends().await?;
    let status = old.wait(Duration::from_secs(20)).await?;
    ensure!(status.success(), "{status}\n{}", old.tail());
    ensure!(old.stdout().contains("policy[cut]"), "it was not cut by policy\n{}", old.tail());
    world.pair.finish().await
}
