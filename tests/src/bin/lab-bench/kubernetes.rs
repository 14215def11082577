//! What an API server with many Services costs an agent: its start, its memory, and a change of one endpoint.
//!
//! Needs an API server that nobody else writes to; `cargo xtask bench` starts one. The smoke run of this suite is among the tests
//! on a cluster (`tests/cluster/measured.rs`).

mod api_server;
mod objects;

use std::{
    cell::Cell,
    path::PathBuf,
    time::{Duration, Instant, SystemTime},
};

use anyhow::{Context as _, Result, ensure};
use kube::{Api, core::DynamicObject};
use lab::{Agent, Lab, Node, Pod, Process, apps, bench::percentile, cgroup, eventually_within};
use serde_json::json;

use self::{
    api_server::{ApiServer, Relay, create, merge, resource},
    objects::{ENDPOINTS, NAMESPACE, ROUTED},
};
use crate::{
    figures::{Figure, Measured, pooled, rows},
    goals::{Goal, times},
    meter::Meter,
    rounds::{Plan, Rounds, alternate},
    world::{compiled, finish},
};

const READY: &str = "an agent's start, until it is ready";
const MEMORY: &str = "memory of the agent";
const PEAK: &str = "the most it held";
const CPU: &str = "CPU of a change of one endpoint";
/// Not shown as they are: all of them together give the two below.
const ASKED: &str = "asked for, until in force";
const ANSWERED: &str = "answered, until in force";
const ASKED_SHARES: [(&str, f64); 2] =
    [("change asked for, until in force, p50", 0.5), ("change asked for, until in force, p99", 0.99)];
const ANSWERED_SHARES: [(&str, f64); 2] =
    [("change answered, until in force, p50", 0.5), ("change answered, until in force, p99", 0.99)];
const FEW: usize = 10;
const MANY: usize = 10_000;
const QUICK_MANY: usize = 100;
/// Changes in each round, one after the other.
const CHANGES: usize = 100;
const QUICK_CHANGES: usize = 4;
/// How long the agent is watched for what it does anyway, and after the changes.
const WINDOW: Duration = Duration::from_millis(500);
/// Longer than an agent keeps what it has used and may need again.
const REST: Duration = Duration::from_secs(8);
/// How long an agent may take for anything.
const LIMIT: Duration = Duration::from_mins(3);
const MB: f64 = 1e6;

/// An API server that was given, and the processes that it is made of: what they do is done for the measurement.
#[derive(Debug, Clone)]
pub struct Given {
    pub kubeconfig: PathBuf,
    pub processes: Vec<u32>,
}

/// A node whose agents follow the API server, and what changes for them.
struct Site {
    node: Node,
    relay: Relay,
    client: Pod,
    /// By which the agent knows the network namespace of the client.
    _in_client: Process,
    client_object: Api<DynamicObject>,
    /// Between these the endpoint of a Service changes.
    servers: [Pod; 2],
    /// Whose turn is next.
    turn: Cell<usize>,
    slices: Api<DynamicObject>,
    /// Where that Service is.
    address: String,
}

pub async fn run(plan: &Plan, given: &Given) -> Result<Measured> {
    let api = ApiServer::new(&given.kubeconfig).await?;
    let routed = api.serves(&resource(objects::ROUTES.0, objects::ROUTES.1, objects::ROUTES.2)).await?;
    let lab = Lab::new("bench-kubernetes").await?;
    let meter = Meter::new(lab.cgroup())?.with(&given.processes);
    api.make_namespace(&objects::namespace()).await?;
    let site = Site::new(&api, &lab).await?;
    let counts = [FEW, if plan.quick { QUICK_MANY } else { MANY }];
    let (mut measured, mut there) = (Vec::new(), 0);
    for count in counts {
        let began = Instant::now();
        api.create_all(objects::services(&api, there..count, routed)).await?;
        println!("  {} Services written in {:.1} s", count - there, began.elapsed().as_secs_f64());
        there = count;
        measured.push(alternate(plan, &meter, 1, async |_| site.measure(plan).await).await?);
    }
    drop(site);
    finish(lab, []).await?;
    api.remove_namespace(NAMESPACE).await?;
    Ok(report(counts, routed, &beside(measured)))
}

/// The rounds of each, as if they had been measured in turn.
fn beside(measured: Vec<Rounds>) -> Rounds {
    let (discarded, noisy) =
        (measured.iter().map(|rounds| rounds.discarded).sum(), measured.iter().any(|rounds| rounds.noisy));
    let count = measured.iter().map(|rounds| rounds.kept.len()).min().unwrap_or_default();
    let mut all: Vec<_> = measured.into_iter().map(|rounds| rounds.kept.into_iter().flatten()).collect();
    let kept = (0..count).map(|_| all.iter_mut().filter_map(Iterator::next).collect()).collect();
    Rounds { kept, discarded, noisy }
}

fn report(counts: [usize; 2], routed: bool, rounds: &Rounds) -> Measured {
    let names = counts.map(|count| format!("{count} Services"));
    let variants = names.each_ref().map(String::as_str);
    let [few, many] = variants;
    let title = format!("An API server with {} Services of {ENDPOINTS} endpoints", counts[1]);
    let mut measured = Measured::new(&title, about(routed), &variants, rounds);
    measured.rows = shown(&variants, rounds);
    let of = |figure| crate::figures::median_of(&measured.rows, many, figure).ok();
    let goals = vec![
        Goal::at_most("memory of the agent", of(MEMORY), 150.0).unit("MB"),
        Goal::at_most("a change asked for in force, p99", of(ASKED_SHARES[1].0), 50.0).unit("ms"),
        Goal::at_most("CPU of a change of one endpoint", of(CPU), 1.0).unit("ms"),
    ];
    let times = times(&measured.rows, CPU, many, few);
    measured.findings.extend(
        times.map(|times| format!("A change takes {times:.2} times the CPU that it takes with {few}.")),
    );
    measured.goals = goals;
    measured
}

/// Changes are many in each round: what is shown of them is of all together.
fn shown(variants: &[&str; 2], rounds: &Rounds) -> Vec<crate::figures::Row> {
    let mut shown = rows(variants, rounds);
    shown.retain(|row| ![ASKED, ANSWERED].contains(&&*row.figure));
    for (of, shares) in [(ASKED, ASKED_SHARES), (ANSWERED, ANSWERED_SHARES)] {
        for (name, share) in shares {
            let mut first = None;
            for (at, variant) in variants.iter().enumerate() {
                let figures =
                    rounds.kept.iter().flat_map(|round| &round[at]).filter(|figure| figure.name == of);
                let all: Vec<f64> = figures.map(|figure| figure.value).collect();
                let value = percentile(&all, share);
                let mut row = pooled(variant, Figure::new(name, "ms", value), all);
                let base = *first.get_or_insert(value);
                row.ratio = (base > 0.0).then(|| value / base);
                shown.push(row);
            }
        }
    }
    shown
}

fn about(routed: bool) -> Vec<String> {
    let routed = if routed {
        format!("one of {ROUTED} has a VirtualService with three rules, the last of which holds")
    } else {
        "there are no VirtualServices: the API server does not serve them".to_owned()
    };
    vec![
        format!(
            "etcd and kube-apiserver on the same machine, and Services with {ENDPOINTS} endpoints each, each in an EndpointSlice of \
             its own; {routed}. First with {FEW}, then with all of them. An agent is started for each round."
        ),
        "Ready: the agent has listed everything, compiled it, and serves. Memory is what it holds eight seconds after the \
         changes of the round, when it has given back what it may need again, and the most it has held since its start."
            .to_owned(),
        "A change: the endpoint of one more Service is another pod, by a patch of its EndpointSlice, one after the other. From \
         when the API server is asked, and from when it has answered, to when the agent logs that it has compiled it; the last \
         is proven by a request that goes to the other pod. A relay, which leads out of the lab, lies between the two. CPU is \
         that of the agent until half a second after the last, less what it uses in such a time anyway."
            .to_owned(),
    ]
}

impl Site {
    async fn new(api: &ApiServer, lab: &Lab) -> Result<Self> {
        let node = lab.node("bench").await?;
        let client = node.pod("client").unenrolled().start().await?;
        let mut servers = Vec::new();
        for name in ["one", "other"] {
            let server = node.pod(name).unenrolled().start().await?;
            server.serve(apps::http(8080)).await?;
            servers.push(server);
        }
        let servers: [Pod; 2] = servers.try_into().ok().context("two servers")?;
        let of = |version, kind, plural| api.of(&resource(version, kind, plural), NAMESPACE);
        create(&of("v1", "ServiceAccount", "serviceaccounts"), &objects::account()).await?;
        let pods = of("v1", "Pod", "pods");
        let object = create(&pods, &objects::pod(client.name(), node.name())).await?;
        let status = json!({ "status": objects::running(client.ip()) });
        pods.patch_status(
            client.name(),
            &kube::api::PatchParams::default(),
            &kube::api::Patch::Merge(status),
        )
        .await?;
        let uid = object.metadata.uid.context("a pod with a UID")?;
        let mut sleep = std::process::Command::new("sleep");
        sleep.arg("infinity");
        let in_client = client.spawn_apart(&format!("pod{uid}"), sleep)?;
        let slices = of(objects::SLICES.0, objects::SLICES.1, objects::SLICES.2);
        let moving = create(&of("v1", "Service", "services"), &objects::service(objects::MOVING)).await?;
        create(&slices, &objects::slice(objects::MOVING, &[servers[0].ip()])).await?;
        let address =
            moving.data["spec"]["clusterIP"].as_str().context("a Service with an address")?.to_owned();
        let relay = api.relay(node.netns())?;
        Ok(Self {
            node,
            relay,
            client,
            _in_client: in_client,
            client_object: pods,
            servers,
            turn: Cell::new(1),
            slices,
            address,
        })
    }

    /// A round: an agent from its start to its end.
    async fn measure(&self, plan: &Plan) -> Result<Vec<Figure>> {
        let began = Instant::now();
        let agent =
            self.node.agent().kubeconfig(self.relay.kubeconfig.path()).arg("--access-log=off").spawn()?;
        eventually_within(LIMIT, "an agent that has listed all of it", async || {
            ensure!(agent.process().status().is_none(), "it has ended\n{}", agent.process().tail());
            let (ready, why) = agent.readiness().await?;
            ensure!(ready, "{why}");
            Ok(())
        })
        .await?;
        let mut figures = vec![Figure::new(READY, "s", began.elapsed().as_secs_f64())];
        self.client.enrolled().await?;
        self.announced().await?;
        let changed = self.changes(&agent, plan).await?;
        if !plan.quick {
            tokio::time::sleep(REST).await;
        }
        figures.push(Figure::new(MEMORY, "MB", agent.rss_bytes()? as f64 / MB));
        figures.push(Figure::new(PEAK, "MB", agent.peak_rss_bytes()? as f64 / MB));
        figures.extend(changed);
        let status = agent.stop().await?;
        ensure!(status.success(), "the agent ended with {status}");
        Ok(figures)
    }

    /// Waits until the agent has said that the client is in the mesh, which is a change too.
    async fn announced(&self) -> Result<()> {
        eventually_within(LIMIT, "the client's annotation", async || {
            let object = self.client_object.get(self.client.name()).await?;
            let annotations = object.metadata.annotations.unwrap_or_default();
            ensure!(annotations.contains_key("mesh.io/enrolled"), "it has {annotations:?}");
            Ok(())
        })
        .await
    }

    /// So many, and the agent's processor time for them.
    async fn changes(&self, agent: &Agent, plan: &Plan) -> Result<Vec<Figure>> {
        let count = if plan.quick { QUICK_CHANGES } else { CHANGES };
        let used = || anyhow::Ok((Instant::now(), cgroup::cpu_time(&self.node.agent_cgroup())?));
        let since = |(then, cpu): (Instant, Duration), (now, more): (Instant, Duration)| {
            (now - then, more.saturating_sub(cpu))
        };
        // What follows from the start is done when this one is, and half a second later.
        self.change(agent).await?;
        tokio::time::sleep(WINDOW).await;
        let before = used()?;
        tokio::time::sleep(WINDOW).await;
        let began = used()?;
        let (window, anyway) = since(before, began);
        let seen = compiled(agent)?.len();
        let mut figures = Vec::new();
        for _ in 0..count {
            let [asked, answered] = self.change(agent).await?;
            figures.push(Figure::new(ASKED, "ms", 1e3 * asked.as_secs_f64()));
            figures.push(Figure::new(ANSWERED, "ms", 1e3 * answered.as_secs_f64()));
        }
        tokio::time::sleep(WINDOW).await;
        let (elapsed, cpu) = since(began, used()?);
        let more = compiled(agent)?.len() - seen;
        // The smoke run has an API server that others write to as well.
        ensure!(more == count || plan.quick && more > count, "{count} changes were compiled {more} times");
        let last = self.servers[1 - self.turn.get()].name();
        let answer = self.client.get(format!("http://{}/", self.address)).send().await?;
        ensure!(answer.pod() == Some(last), "{last} did not answer: {answer:?}");
        let anyway = anyway.mul_f64(elapsed.as_secs_f64() / window.as_secs_f64());
        figures.push(Figure::new(CPU, "ms", 1e3 * cpu.saturating_sub(anyway).as_secs_f64() / count as f64));
        Ok(figures)
    }

    /// How long until it was in force: from when it was asked for, and from when that was answered.
    async fn change(&self, agent: &Agent) -> Result<[Duration; 2]> {
        let to = &self.servers[self.turn.get()];
        self.turn.set(1 - self.turn.get());
        let (seen, asked) = (compiled(agent)?.len(), SystemTime::now());
        let change = json!({ "endpoints": [objects::endpoint(to.ip())] });
        merge(&self.slices, &objects::slice_name(objects::MOVING), &change).await?;
        let answered = SystemTime::now();
        let in_force = eventually_within(LIMIT, "the change is compiled", async || {
            compiled(agent)?.get(seen).copied().context("nothing was compiled")
        });
        let in_force = in_force.await?;
        let took = in_force.duration_since(asked).context("it was compiled before it was asked for")?;
        // The agent may be told before the one who asked is.
        Ok([took, in_force.duration_since(answered).unwrap_or_default()])
    }
}
