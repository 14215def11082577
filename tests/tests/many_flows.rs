//! Each of very many live flows is told of, once, with what its socket counts at that moment and with pod, identity,
//! service and route. A flow is one connection of an app, as seen at the app's own socket.
//!
//! 20,000 of them; `MESH_LAB_FLOWS` sets another number (a multiple of 20), and the processor time of each step is
//! printed: `MESH_LAB_FLOWS=100000 cargo test --release -p lab --test many_flows -- --nocapture`.

#[path = "capture/world.rs"]
#[allow(dead_code, reason = "the world of the tests of capture, of which these need a part")]
mod world;

use std::{
    collections::{HashMap, HashSet},
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, TcpStream},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use lab::Parking;
use mesh_agent::{
    capture::{Listener, PodNet, bring_up_to_date, inspect},
    identity::SpiffeId,
    report::{Clock, Context as FlowContext, FlowGuard, FlowKey, FlowView, Reporter, join as view},
    state::snapshot::{CapturePolicy, Snapshot, Workload},
};
use nix::time::{ClockId, clock_gettime};

use crate::world::{Agent, LIMIT, POD4, POD6, join, pair, workload_as};

/// Pods that share them.
const PODS: usize = 5;
/// Threads of an app, in each pod.
const THREADS: usize = 4;
/// Whom they go to: one connection in so many.
const DESTINATIONS: usize = 100;
/// What each app sends; the answer has as many bytes and one more.
const SAID: &[u8] = b"said";

fn flows() -> usize {
    std::env::var("MESH_LAB_FLOWS").ok().and_then(|flows| flows.parse().ok()).unwrap_or(20_000)
}

/// Opens connections one after the other, and exchanges a few bytes on each.
fn dial(count: usize) -> Result<Parking> {
    let mut parking = Parking::default();
    for n in 0..count {
        let to = SocketAddr::from((Ipv4Addr::new(192, 0, 2, u8::try_from(n % DESTINATIONS)?), 8080));
        let mut stream = TcpStream::connect_timeout(&to, LIMIT).with_context(|| format!("{n}: {to}"))?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.write_all(SAID)?;
        stream.read_exact(&mut [0; SAID.len() + 1]).with_context(|| format!("{n}: {to}"))?;
        parking.park(stream)?;
    }
    Ok(parking)
}

/// The agent: answers each connection, keeps it, and knows of it what it knows of any.
async fn serve(net: Arc<PodNet>, reporter: Arc<Reporter>, count: usize) -> Result<(Parking, Vec<FlowGuard>)> {
    let (mut parking, mut known) = (Parking::default(), Vec::new());
    let peer = SpiffeId {
        trust_domain: "cluster.local".into(),
        namespace: "default".into(),
        service_account: "keeper".into(),
    };
    let texts = ["keeper.default.svc.cluster.local", "default/keeper", "all"].map(Arc::<str>::from);
    for _ in 0..count {
        let captured = net.accept(Listener::Outbound).await?;
        let flow = reporter.flow(&net.workload, FlowKey::Outbound(captured.client, captured.original_dst));
        flow.learn(|facts| {
            let [service, pod, route] = texts.clone();
            (facts.service, facts.peer_pod, facts.route) = (Some(service), Some(pod), Some(route));
            (facts.peer, facts.endpoint) = (Some(peer.clone()), Some(captured.original_dst));
            facts.mutual_tls = true;
        });
        known.push(flow);
        let mut stream = tokio::net::TcpStream::from_std(captured.stream)?;
        tokio::io::AsyncReadExt::read_exact(&mut stream, &mut [0; SAID.len()]).await?;
        tokio::io::AsyncWriteExt::write_all(&mut stream, &[b'!'; SAID.len() + 1]).await?;
        parking.park(stream.into_std()?)?;
    }
    Ok((parking, known))
}

/// Processor time of this thread, in the kernel too.
fn cpu() -> Result<Duration> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}

/// As the agent answers `/flows`. What it took is printed.
fn read(agent: &Agent, nets: &[Arc<PodNet>], reporter: &Reporter) -> Result<(Vec<FlowView>, usize)> {
    let begun = cpu()?;
    let mut records = inspect::read_flows(&agent.config.bpf_dir)?;
    let read = cpu()?;
    bring_up_to_date(&mut records, nets.iter().map(|net| &**net));
    let asked = cpu()?;
    let pods: HashMap<u64, Arc<Workload>> =
        nets.iter().filter_map(|net| Some((net.cookie()?, Arc::clone(&net.workload)))).collect();
    let context = FlowContext {
        snapshot: &Snapshot::default(),
        pod_of: &|cookie| pods.get(&cookie).cloned(),
        facts: &|pod: &Workload, key| reporter.facts(pod, key),
        endpoint: &|_| None,
        clock: Clock::now(),
    };
    let mut views: Vec<_> = records.iter().map(|record| view(record, &context)).collect();
    let joined = cpu()?;
    views.sort_by(|a, b| (&a.start, a.socket).cmp(&(&b.start, b.socket)));
    let json = serde_json::to_vec(&views)?;
    let written = cpu()?;
    println!(
        "{} flows: {:?} of CPU (maps {:?}, sockets {:?}, join {:?}, JSON of {} MiB {:?})",
        views.len(),
        written.saturating_sub(begun),
        read.saturating_sub(begun),
        asked.saturating_sub(read),
        joined.saturating_sub(asked),
        json.len() >> 20,
        written.saturating_sub(joined)
    );
    Ok((views, json.len()))
}

#[test]
fn each_of_very_many_live_flows_is_told_of_once_with_all_that_is_known() -> Result<()> {
    let (all, reporter) = (flows(), Arc::new(Reporter::default()));
    let each = all / PODS;
    let worlds: Vec<_> = (0..PODS).map(|_| pair()).collect::<Result<_>>()?;
    let mut agent = Agent::new()?;
    agent.config.tables.max_flows_per_pod = u32::try_from(each + 1000)?;
    agent.remove()?;
    agent.restart()?;
    let (mut nets, mut serving) = (Vec::new(), Vec::new());
    for (n, (pod, _)) in worlds.iter().enumerate() {
        let workload = workload_as(pod.path(), &[POD4, POD6], CapturePolicy::default())?;
        let mut workload = Arc::into_inner(workload).context("a workload of its own")?;
        workload.name = format!("pod-{n}").into();
        let net = agent.enrol_workload(Arc::new(workload))?;
        serving.push(agent.rt.spawn(serve(Arc::clone(&net), Arc::clone(&reporter), each)));
        nets.push(net);
    }
    let share = each / THREADS;
    let apps: Vec<_> =
        worlds.iter().flat_map(|(pod, _)| (0..THREADS).map(|_| pod.spawn(move || dial(share)))).collect();
    let open: Vec<Parking> = apps.into_iter().map(join).collect::<Result<_>>()?;
    let mut served = Vec::new();
    for pod in serving {
        served.push(agent.rt.block_on(pod)??);
    }

    let (views, json) = read(&agent, &nets, &reporter)?;
    let live: Vec<_> = views.iter().filter(|flow| flow.transport == "tcp").collect();
    ensure!(live.len() == all, "{} flows are told of", live.len());
    ensure!(
        live.iter().map(|flow| flow.socket).collect::<HashSet<_>>().len() == all,
        "some are told of twice"
    );
    let said = SAID.len() as u64;
    for flow in &live {
        let known = flow.state == "established"
            && (flow.tx_bytes, flow.rx_bytes) == (said, said + 1)
            && flow.service.as_deref() == Some("keeper.default.svc.cluster.local")
            && flow.peer_identity.as_deref() == Some("spiffe://cluster.local/ns/default/sa/keeper")
            && flow.route.as_deref() == Some("all")
            && flow.endpoint == Some(flow.remote);
        ensure!(known, "{flow:?}");
    }
    let mut of_pods: HashMap<&str, usize> = HashMap::new();
    for flow in &live {
        *of_pods.entry(flow.pod.as_deref().unwrap_or_default()).or_default() += 1;
    }
    ensure!(of_pods.len() == PODS && of_pods.values().all(|count| *count == each), "{of_pods:?}");
    ensure!(json > 0, "no JSON");
    drop((open, served));
    nets.clear();
    drop(agent);
    drop(worlds);
    Ok(())
}
