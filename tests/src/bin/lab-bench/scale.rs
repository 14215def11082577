//! What the number of Services costs: a request, the agent's memory, and a change of one endpoint.

use std::{
    fmt::Write as _,
    hint::black_box,
    net::Ipv4Addr,
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use hyper::{Request, http::request::Parts};
use lab::{Agent, Lab, Pod, apps, cgroup, eventually_within};
use mesh_agent::{
    balance, route,
    source::read_text,
    state::{
        compile::{Settings, compile},
        snapshot::{Backend, RouteAction, Snapshot, Workload},
    },
};

use crate::{
    authorization::per_time,
    figures::{Figure, Measured},
    goals::{Goal, times},
    meter::Meter,
    rounds::{Plan, alternate},
    world::{compiled, finish},
};

const LOOKUP: &str = "lookup, route and balance of a request";
const MEMORY: &str = "memory of the agent";
const CHANGE: &str = "a change of one endpoint, until it is in force";
const CHANGE_CPU: &str = "CPU of a change of one endpoint";
/// Services, and those of them that have a VirtualService.
const FEW: usize = 10;
const MANY: usize = 10_000;
const QUICK_MANY: usize = 100;
const ENDPOINTS: usize = 10;
const ROUTED: usize = 10;
/// Services of a file.
const IN_A_FILE: usize = 100;
const BATCH: u32 = 1000;
const MB: f64 = 1e6;
/// How long the agent is watched for what it does anyway, and after a change.
const WINDOW: Duration = Duration::from_millis(500);
/// How long an agent may take to read all of it.
const READING: Duration = Duration::from_mins(3);

/// An agent with so many Services.
struct World {
    snapshot: Snapshot,
    client: Pod,
    agent: Agent,
    cgroup: std::path::PathBuf,
    /// Between these the endpoint of a Service changes.
    servers: [Pod; 2],
}

pub async fn run(plan: &Plan) -> Result<Measured> {
    let counts = [FEW, if plan.quick { QUICK_MANY } else { MANY }];
    let mut worlds = Vec::new();
    let meter_lab = Lab::new("bench-scale").await?;
    let mut labs = Vec::new();
    for count in counts {
        let lab = Lab::new("bench-services").await?;
        worlds.push(World::new(&lab, count).await?);
        labs.push(lab);
    }
    let meter = Meter::new(meter_lab.cgroup())?;
    // Nearly all of it is processor time of this thread, or of the agent alone: other work has little say.
    let plan = Plan { quick: true, ..*plan };
    let rounds =
        alternate(&plan, &meter, worlds.len(), async |at| worlds[at].measure(&plan, &labs[at]).await);
    let rounds = rounds.await?;
    for (lab, world) in labs.into_iter().zip(worlds) {
        finish(lab, [world.agent]).await?;
    }
    meter_lab.finish().await?;
    let names = counts.map(|count| format!("{count} Services"));
    let [few, many] = names.each_ref().map(String::as_str);
    let title = format!("{} Services of {ENDPOINTS} endpoints", counts[1]);
    let mut measured = Measured::new(&title, about(), &[few, many], &rounds);
    measured.noisy = false;
    let of = |figure| crate::figures::median_of(&measured.rows, many, figure).ok();
    measured.goals = vec![
        Goal::at_most(
            format!("lookup and route, of with {few}"),
            times(&measured.rows, LOOKUP, many, few),
            1.05,
        ),
        Goal::at_most("memory of the agent", of(MEMORY), 150.0).unit("MB"),
        Goal::at_most("a change of one endpoint in force", of(CHANGE), 50.0).unit("ms"),
        Goal::at_most("CPU of a change of one endpoint", of(CHANGE_CPU), 1.0).unit("ms"),
    ];
    Ok(measured)
}

fn about() -> Vec<String> {
    vec![
        format!(
            "Services with {ENDPOINTS} endpoints each, in files of {IN_A_FILE}; one of {ROUTED} has a VirtualService with three \
             rules, the last of which holds."
        ),
        format!(
            "Lookup: from the address that was dialled to an endpoint, in one thread of this program, in its processor time; \
             {FEW} Services, spread over all there are, are asked in turn."
        ),
        "A change: the endpoint of one more Service, in a file of its own, is another pod. From when the file is written to when \
         the agent logs that it has compiled it; a request then goes to the other pod. The time includes the 5 ms that \
         the agent waits for more after a file is complete. CPU is that of the agent until half a second after, \
         less what it uses in such a time anyway."
            .to_owned(),
    ]
}

/// Of the Service with this number.
fn address(number: usize) -> Result<Ipv4Addr> {
    let [_, high, middle, low] = u32::try_from(number)?.to_be_bytes();
    Ok(Ipv4Addr::new(10, 120 + high, middle, low))
}

fn services(numbers: std::ops::Range<usize>) -> Result<String> {
    let mut text = String::new();
    for number in numbers {
        let name = format!("many-{number}");
        let _ = write!(text, "---\n{}", service(&name, address(number)?));
        let endpoints = (0..ENDPOINTS).map(|endpoint| anyhow::Ok(address((number << 4) + endpoint)?));
        let endpoints: Vec<Ipv4Addr> = endpoints
            .map(|address| {
                let [_, b, c, d] = address?.octets();
                anyhow::Ok(Ipv4Addr::new(11, b, c, d))
            })
            .collect::<Result<_>>()?;
        let _ = write!(text, "---\n{}", slice(&name, &endpoints));
        if number % ROUTED == 0 {
            let _ = write!(
                text,
                "---\n{{apiVersion: networking.istio.io/v1, kind: VirtualService, metadata: {{name: {name}}}, spec: \
                 {{hosts: [{name}], http: [{{match: [{{headers: {{end-user: {{exact: jason}}}}}}], route: [{{destination: \
                 {{host: {name}}}}}]}}, {{match: [{{uri: {{prefix: /never}}}}], route: [{{destination: {{host: {name}}}}}]}}, \
                 {{route: [{{destination: {{host: {name}}}}}]}}]}}}}\n"
            );
        }
    }
    Ok(text)
}

fn service(name: &str, address: Ipv4Addr) -> String {
    format!(
        "{{apiVersion: v1, kind: Service, metadata: {{name: {name}}}, spec: {{clusterIP: {address}, clusterIPs: [{address}], \
         ports: [{{name: http, port: 80, targetPort: 8080}}]}}}}\n"
    )
}

fn slice(service: &str, endpoints: &[Ipv4Addr]) -> String {
    let endpoints: Vec<_> = endpoints.iter().map(|address| format!("{{addresses: [{address}]}}")).collect();
    format!(
        "{{apiVersion: discovery.k8s.io/v1, kind: EndpointSlice, addressType: IPv4, metadata: {{name: {service}-1, labels: \
         {{kubernetes.io/service-name: {service}}}}}, endpoints: [{}], ports: [{{name: http, port: 8080}}]}}\n",
        endpoints.join(", ")
    )
}

/// Where the Service is whose endpoint changes.
const MOVING: Ipv4Addr = Ipv4Addr::new(10, 119, 0, 1);

fn moving(to: &Pod) -> Result<String> {
    let std::net::IpAddr::V4(at) = to.ip() else { anyhow::bail!("no address of IPv4") };
    Ok(format!("---\n{}---\n{}", service("moving", MOVING), slice("moving", &[at])))
}

impl World {
    async fn new(lab: &Lab, count: usize) -> Result<Self> {
        let mut all = String::new();
        for first in (0..count).step_by(IN_A_FILE) {
            let text = services(first..(first + IN_A_FILE).min(count))?;
            lab.apply(&format!("services-{first}.yaml"), &text)?;
            all += &text;
        }
        let (objects, problems) = read_text(&all);
        ensure!(problems.is_empty(), "{:?}", problems.first());
        let (snapshot, problems) = compile(&objects, None, &Settings::default());
        ensure!(problems.is_empty(), "{:?}", problems.first());
        drop((objects, all));
        let node = lab.node("a").await?;
        let client = node.pod("client").sa("client").start().await?;
        let mut servers = Vec::new();
        for name in ["one", "other"] {
            let server = node.pod(name).unenrolled().start().await?;
            server.serve(apps::http(8080)).await?;
            servers.push(server);
        }
        let servers: [Pod; 2] = servers.try_into().ok().context("two servers")?;
        lab.apply("moving.yaml", &moving(&servers[0])?)?;
        let agent = node.agent().arg("--access-log=off").spawn()?;
        eventually_within(READING, "an agent that has read all of it", async || {
            ensure!(agent.process().status().is_none(), "it has ended\n{}", agent.process().tail());
            let (ready, why) = agent.readiness().await?;
            ensure!(ready, "{why}");
            Ok(())
        })
        .await?;
        client.enrolled().await?;
        Ok(Self { snapshot, client, agent, cgroup: node.agent_cgroup(), servers })
    }

    async fn measure(&self, plan: &Plan, lab: &Lab) -> Result<Vec<Figure>> {
        let looked_up = self.look_up(plan)?;
        let memory = self.agent.rss_bytes()? as f64 / MB;
        let away = self.change(lab, &self.servers[1]).await?;
        let back = self.change(lab, &self.servers[0]).await?;
        let mean = |of: fn(&(Duration, Duration)) -> Duration| {
            500.0 * (of(&away).as_secs_f64() + of(&back).as_secs_f64())
        };
        Ok(vec![
            Figure::new(LOOKUP, "ns", 1e9 * looked_up.as_secs_f64()),
            Figure::new(MEMORY, "MB", memory),
            Figure::new(CHANGE, "ms", mean(|change| change.0)),
            Figure::new(CHANGE_CPU, "ms", mean(|change| change.1)),
        ])
    }

    fn look_up(&self, plan: &Plan) -> Result<Duration> {
        let source = source()?;
        let request: Parts = Request::get("/items/7").header("host", "any").body(())?.into_parts().0;
        let count = self.snapshot.vips.len();
        let mut number = 0;
        per_time(plan.seconds, BATCH, || {
            number = (number + count / FEW) % count;
            let service = self.snapshot.service_at(address(number)?.into(), "default");
            let port = service.context("a Service")?.port_for("default", 80).context("its port")?;
            let (route, _) =
                route::find(&port.routes, black_box(&request), 80, &source).context("a route")?;
            let RouteAction::Forward(backends) = &route.action else { anyhow::bail!("no backend") };
            let Backend::Cluster(cluster) = &route::draw(backends).backend else {
                anyhow::bail!("no cluster")
            };
            let chosen = balance::choose(cluster, &balance::Wish::default());
            black_box(chosen.context("an endpoint")?);
            Ok(())
        })
    }

    /// How long until it was in force, and the agent's processor time for it.
    async fn change(&self, lab: &Lab, to: &Pod) -> Result<(Duration, Duration)> {
        let used = async || anyhow::Ok((Instant::now(), cgroup::cpu_time(&self.cgroup)?));
        let since = |(then, cpu): (Instant, Duration), (now, more): (Instant, Duration)| {
            (now - then, more.saturating_sub(cpu))
        };
        let before = used().await?;
        tokio::time::sleep(WINDOW).await;
        let began = used().await?;
        let (window, anyway) = since(before, began);
        let (seen, written) = (compiled(&self.agent)?.len(), SystemTime::now());
        lab.apply("moving.yaml", &moving(to)?)?;
        let in_force = eventually_within(READING, "the change is compiled", async || {
            compiled(&self.agent)?.get(seen).copied().context("nothing was compiled")
        });
        let took =
            in_force.await?.duration_since(written).context("it was compiled before it was written")?;
        // What follows from a snapshot is done by then.
        tokio::time::sleep(WINDOW).await;
        let (elapsed, cpu) = since(began, used().await?);
        let anyway = anyway.mul_f64(elapsed.as_secs_f64() / window.as_secs_f64());
        let answer = self.client.get(format!("http://{MOVING}/")).send().await?;
        ensure!(answer.pod() == Some(to.name()), "{} did not answer: {answer:?}", to.name());
        Ok((took, cpu.saturating_sub(anyway)))
    }
}

/// A pod that asks.
fn source() -> Result<Arc<Workload>> {
    let text = "{apiVersion: v1, kind: Pod, metadata: {name: client}, status: {podIP: 10.118.0.1}}";
    let (snapshot, _) = compile(&read_text(text).0, None, &Settings::default());
    Ok(Arc::clone(snapshot.workload_at("10.118.0.1".parse()?).context("the pod")?))
}
