//! Pods join and leave the mesh while they run: what is open goes on untouched, what is new is as the label says, and
//! nothing of those that left stays with the agent.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use lab::{
    Agent, Lab, Pair, Pod, Service, apps, apps::Transfer, eventually, eventually_within, metric, require_root,
};
use time::{OffsetDateTime, format_description::well_known::Rfc3339};
use tokio::task::JoinHandle;

/// Bytes of a transfer that is under way while a pod joins or leaves, and how many of them go in a second. They are three
/// times what the buffers on the way take at most (6 MB to receive and 4 MB to send, on each side of an agent): an app
/// whose bytes are all in buffers has nothing open any more.
const BYTES: u64 = 60_000_000;
const RATE: u64 = 10_000_000;

/// The file of a pod's manifest.
fn manifest(lab: &Lab, pod: &str) -> std::path::PathBuf {
    lab.config_dir().join(format!("pod-default-{pod}.yaml"))
}

/// Transfers of the lab's pattern, out of a pod and into it, both ways each.
struct Transfers(Vec<(&'static str, JoinHandle<Result<Transfer>>)>);

impl Transfers {
    /// Begins them, and returns once the apps have seen all four.
    async fn begin(pod: &Pod, far: &Pod) -> Result<Self> {
        let (open, far_open) = (pod.stats(8080).await?.open, far.stats(8080).await?.open);
        let mut all = Vec::new();
        for (name, from, to) in [("out", pod.clone(), far.clone()), ("in", far.clone(), pod.clone())] {
            let (up, down) = (
                format!("http://{}/consume", to.at(8080)),
                format!("http://{}/pattern/{BYTES}", to.at(8080)),
            );
            let other = from.clone();
            all.push((name, tokio::spawn(async move { from.get(up).upload(BYTES, RATE).await })));
            all.push((name, tokio::spawn(async move { other.get(down).download(BYTES, RATE).await })));
        }
        eventually("all transfers are under way", async || {
            let now = (pod.stats(8080).await?.open - open, far.stats(8080).await?.open - far_open);
            ensure!(now == (2, 2), "{now:?}");
            Ok(())
        })
        .await?;
        Ok(Self(all))
    }

    /// All are still under way, and then all end well.
    async fn end(self) -> Result<()> {
        let over: Vec<_> =
            self.0.iter().filter(|(_, task)| task.is_finished()).map(|(name, _)| *name).collect();
        ensure!(over.is_empty(), "{over:?} ended before anything happened");
        for (name, task) in self.0 {
            let transfer = task.await?.context(name)?;
            ensure!(transfer.intact && transfer.bytes == BYTES, "{name}: {transfer:?}");
        }
        Ok(())
    }
}

/// Requests to this pod that its agent has seen.
async fn meshed(agent: &Agent, pod: &str) -> Result<u64> {
    let names = [("reporter", "source"), ("source_workload", pod)];
    Ok(metric(&agent.metrics().await?, "istio_requests_total", &names) as u64)
}

/// A request of the pod that is not the mesh's: the app sees the pod itself, and no agent counts it.
async fn passes_untouched(pair: &Pair, pod: &Pod, far: &Pod) -> Result<()> {
    let answer = pod.http_get(&format!("http://{}/", far.at(8080)), &[]).await?;
    ensure!(answer.status == 200 && answer.echo()?.peer.ip().to_canonical() == pod.ip(), "{answer:?}");
    let opened = metric(
        &pair.agent_a.metrics().await?,
        "istio_tcp_connections_opened_total",
        &[("source_workload", "late")],
    );
    ensure!(opened == 0.0, "the mesh carried it");
    Ok(())
}

async fn served_by_the_mesh(agent: &Agent, pod: &Pod, service: &Service) -> Result<()> {
    let before = meshed(agent, pod.name()).await?;
    let answer = pod.http_get(&service.url(80, "/"), &[]).await?;
    ensure!(answer.status == 200, "{answer:?}");
    eventually("the mesh has counted it", async || {
        let now = meshed(agent, pod.name()).await?;
        ensure!(now == before + 1, "{now}, {before} before");
        Ok(())
    })
    .await
}

#[tokio::test]
async fn what_is_open_goes_on_and_what_is_new_follows_the_label() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("label").await?;
    pair.lab.namespace("late", false)?;
    let pod = pair.a.pod("late").ns("late").sa("late").start().await?;
    let far = pair.b.pod("far").label("app", "far").start().await?;
    pod.serve(apps::http(8080)).await?;
    far.serve(apps::http(8080)).await?;
    let service = pair.lab.service("far").selector("app", "far").port("http", 80, 8080).apply()?;
    pair.settled().await?;
    far.enrolled().await?;

    passes_untouched(&pair, &pod, &far).await?;
    let before = Transfers::begin(&pod, &far).await?;
    pair.lab.namespace("late", true)?;
    pod.enrolled().await?;
    served_by_the_mesh(&pair.agent_a, &pod, &service).await?;
    before.end().await.context("open when the pod joined")?;

    let meshed = Transfers::begin(&pod, &far).await?;
    pair.lab.namespace("late", false)?;
    pod.not_enrolled().await?;
    let nowhere = pod.http_get(&service.url(80, "/"), &[]).await;
    ensure!(nowhere.is_err(), "a service that nothing routes has answered: {nowhere:?}");
    meshed.end().await.context("open when the pod left")?;
    let answer = far.http_get(&format!("http://{}/", pod.at(8080)), &[]).await?;
    ensure!(answer.status == 200, "{answer:?}");

    pair.lab.namespace("late", true)?;
    pod.enrolled().await?;
    served_by_the_mesh(&pair.agent_a, &pod, &service).await?;
    pair.finish().await
}

#[tokio::test]
async fn a_namespace_is_whose_pod_it_is_now() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let pair = Pair::new("reuse").await?;
    let far = pair.b.pod("far").label("app", "far").start().await?;
    far.serve(apps::http(8080)).await?;
    let service = pair.lab.service("far").selector("app", "far").port("http", 80, 8080).apply()?;
    let first = pair.a.pod("web").sa("first").start().await?;
    pair.settled().await?;
    first.enrolled().await?;
    let identity = async |pod: &Pod| -> Result<String> {
        let headers = pod.http_get(&service.url(80, "/"), &[]).await?.echo()?.headers;
        let text = headers.get("x-forwarded-client-cert").context("no identity")?;
        Ok(text.rsplit('/').next().unwrap_or_default().to_owned())
    };
    ensure!(identity(&first).await? == "first");

    // The same namespace, another pod.
    let path = manifest(&pair.lab, "web");
    let text = fs::read_to_string(&path)?.replace("\"web\"", "\"heir\"").replace("\"first\"", "\"second\"");
    pair.apply("pod-default-web.yaml", &text).await?;
    eventually("the namespace is the other pod's", async || {
        let enrolled = pair.agent_a.status().await?["enrolled"].to_string();
        ensure!(enrolled.contains("default/heir") && !enrolled.contains("default/web"), "{enrolled}");
        Ok(())
    })
    .await?;
    ensure!(identity(&first).await? == "second");

    // The same path and name, another namespace: the pod is replaced before the agent has looked.
    first.vanish().await?;
    let third = pair.a.pod("web").sa("third").start().await?;
    third.enrolled().await?;
    eventually("the new pod is itself", async || {
        let seen = identity(&third).await?;
        ensure!(seen == "third", "{seen}");
        Ok(())
    })
    .await?;
    third.remove().await?;
    eventually("no pod is left but the client", async || {
        let status = pair.agent_a.status().await?;
        ensure!(
            status["enrolled"] == serde_json::json!(["default/client"])
                && status["failing"] == serde_json::json!([]),
            "{status}"
        );
        Ok(())
    })
    .await?;
    pair.finish().await
}

#[tokio::test]
async fn what_a_pod_calls_its_interfaces_is_its_own_affair() -> Result<()> {
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("names").await?;
    let node = lab.node("a").await?;
    let pod = node.pod("odd").start().await?;
    let odd = |n: u32| format!("link add name odd{n} type veth peer name odd{n}p");
    let mut lines = vec!["link add name a_b type veth peer name a.b".to_owned()];
    lines.extend((0..40).map(odd));
    pod.netns().ip(&lines)?;
    let agent = node.agent().start().await?;
    pod.enrolled().await?;
    ensure!(agent.status().await?["failing"] == serde_json::json!([]));
    // Two that count flows on 32 of them; on each that leads into the pod, two for guests.
    let programs = lab::bpf::tcx_programs(&pod.netns().path())?;
    let counted = programs.iter().filter(|(name, count)| name == "eth0" || *count == 4).count();
    ensure!(programs.len() == 83 && counted == 32, "{programs:?}");
    lab.finish().await
}

/// What the agent has open.
fn descriptors(agent: &Agent) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", agent.process().pid()))?.count())
}

async fn crowd(agent: &Agent, count: usize) -> Result<()> {
    eventually_within(Duration::from_mins(1), "the crowd is as large as it should be", async || {
        let status = agent.status().await?;
        let enrolled = status["enrolled"].as_array().context("a list")?.len();
        ensure!(enrolled == count, "{enrolled} of {count}; {}", status["failing"]);
        Ok(())
    })
    .await
}

/// Times between one pod's enrolment and the next one's, by the agent's log.
fn times(agent: &Agent) -> Result<Vec<Duration>> {
    let lines = agent.log();
    let enrolled = lines.iter().filter(|line| line.contains("pod enrolled"));
    let at: Vec<_> = enrolled
        .map(|line| Ok(OffsetDateTime::parse(line.split(' ').next().unwrap_or_default(), &Rfc3339)?))
        .collect::<Result<_>>()?;
    Ok(at.windows(2).filter_map(|pair| Duration::try_from(pair[1] - pair[0]).ok()).collect())
}

#[tokio::test]
async fn pods_come_and_go_and_nothing_of_them_stays() -> Result<()> {
    const PODS: usize = 50;
    const ROUNDS: usize = 4;
    if !require_root()? {
        return Ok(());
    }
    let lab = Lab::new("crowd").await?;
    let node = lab.node("a").await?;
    lab.namespace("crowd", false)?;
    let mut starting = tokio::task::JoinSet::new();
    for n in 0..PODS {
        starting.spawn(node.pod(&format!("p{n}")).ns("crowd").start());
    }
    let pods: Vec<Pod> = starting.join_all().await.into_iter().collect::<Result<_>>()?;
    let agent = node.agent().start().await?;
    let (mut after, mut stayed) = (Vec::new(), 0);
    for _ in 0..ROUNDS {
        lab.namespace("crowd", true)?;
        crowd(&agent, PODS).await?;
        lab.namespace("crowd", false)?;
        crowd(&agent, 0).await?;
        for pod in &pods {
            // Not before it is gone: one that is back earlier was never away.
            pod.not_enrolled().await?;
        }
        let before: Option<usize> = after.first().map(|(descriptors, _)| *descriptors);
        eventually("descriptors do not stay", async || {
            let now = descriptors(&agent)?;
            ensure!(before.is_none_or(|before| now <= before), "{now}, {before:?} after the first round");
            Ok(())
        })
        .await?;
        // What the allocator keeps for the next pods goes back soon after. A thread that enrols a pod for the first time takes
        // some for good; what stays of each pod is seen in every round, 20 kilobytes of it as a megabyte.
        let before = after.last().map(|(_, bytes)| *bytes);
        let settled = eventually("memory goes back", async || {
            let now = agent.rss_bytes()?;
            ensure!(before.is_none_or(|before| now < before + (1 << 20)), "{now} bytes");
            Ok(())
        });
        stayed += usize::from(settled.await.is_err());
        after.push((descriptors(&agent)?, agent.rss_bytes()?));
    }
    let mut times = times(&agent)?;
    // Between two rounds lies more than one enrolment.
    times.sort_unstable();
    times.truncate(times.len() + 1 - ROUNDS);
    let at = |share: usize| times.get(times.len() * share / 100).copied().unwrap_or_default();
    println!("enrolling one pod, up to {PODS} there: p50 {:?}, p99 {:?}", at(50), at(99));
    println!("descriptors and memory after each round: {after:?}; processor {:?}", agent.cpu_time()?);
    ensure!(stayed < ROUNDS - 1, "memory stays: {after:?}");
    ensure!(fs::read_dir(agent.bpf_dir().join("pods"))?.count() == 0, "pins stay");
    ensure!(pods.iter().all(|pod| !pod.listens(15001)), "listeners stay");
    lab.finish().await
}
